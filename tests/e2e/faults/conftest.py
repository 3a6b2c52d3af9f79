"""One server, and everything that commands read, for all tests here."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.faults.forks import server
from e2e.faults.scenes import Stage
from families import fill, sizes
from gguf_files import write_gguf
from task_rows import write_tasks
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
    tied: Path,
    text_file: Path,
    write_recipe: Callable[[Path, Path], str],
) -> Iterator[Stage]:
    place = tmp_path_factory.mktemp("faults")
    with server(place) as serves:
        stage = Stage(place, serves)
        shutil.copytree(tied, stage.all / "model")
        write_gguf(stage.all / "little.gguf", fill(LlamaForCausalLM(LlamaConfig(**sizes()))))
        write_tasks(stage.all / "tasks")
        shutil.copy(text_file, stage.all / "tales.txt")
        (stage.all / "recipe.yaml").write_text(write_recipe(Path("model"), Path("tales.txt")))
        yield stage
