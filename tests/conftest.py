"""A tiny Llama with every odd case, its tokenizer and text; the real stories260k where it is beside the checkout."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import fill
from task_rows import write_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "models" / "stories260k"
VOCABULARY = """the a little old king queen dragon river mountain castle bread apple walked ran found lost sang gave
told and but then because under over behind with without green red silver heavy bright"""


def sentences(count: int, seed: int) -> list[str]:
    """Made-up sentences, each ending in a full stop."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(VOCABULARY.split(), k=draw.randint(4, 9))).capitalize() + "." for _ in range(count)]


def tiny_config(tied: bool) -> LlamaConfig:
    """Heads wider than hidden / heads, grouped queries, biases everywhere, and 172 = 4 * 43, which Paley cannot do."""
    return LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def tiny_model(tied: bool) -> PreTrainedModel:
    return fill(LlamaForCausalLM(tiny_config(tied)))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(200, seed=1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def write_tiny(folder: Path, tied: bool, shard: str = "5GB") -> Path:
    model = tiny_model(tied)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: one that is begun last keeps one worker busy while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _bugs_are_raised() -> Iterator[None]:
    """A bug is raised, traceback and all, and is never an exit code that a test could take for a refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KURTAIL_TRACEBACK", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """One, unless OMP_NUM_THREADS says otherwise: with small matrices threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in one file, head of its own."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in many shards, the head tied to the embedding."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tied", tied=True, shard="60KB")


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories260k: a real model of 260 thousand parameters."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not beside the checkout")
    return STORIES


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand tokens of text."""
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    path.write_text("\n".join(sentences(400, seed=2)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def task_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local rows of all ten tasks; skips where the extra `eval` is not installed."""
    pytest.importorskip("lm_eval")
    return write_tasks(tmp_path_factory.mktemp("tasks") / "rows")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("KURTAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
