"""The baselines: four folders, reused when nothing changed, refused when anything did."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kurtail_pl
from kurtail_pl.errors import ArtefactError
from kurtail_pl.maths.gptq import GPTQ
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.stages.capture import CaptureSpec, capture
from kurtail_pl.stages.compare import run_baselines
from kurtail_pl.stages.quantize import QuantizeSpec
from kurtail_pl.stages.results import read_results
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.folder import read_card, rotations_of
from kurtail_pl.surgery.rotations import Rotations, random_rotations
from kurtail_pl.surgery.scheme import Scheme

METHODS = ["float-w16a16kv16", "gptq-w4a4kv4", "quarot-w4a4kv4", "rtn-w4a4kv4"]


@dataclass(frozen=True)
class Call:
    """Arguments of `run_baselines`."""

    checkpoint: Checkpoint
    store: ActivationStore
    spec: QuantizeSpec
    text: TextSpec
    validation_rows: int = 10
    rotation_seed: int = 4

    def __call__(self, root: Path, overwrite: bool = False) -> None:
        run_baselines(
            self.checkpoint, self.store, self.spec, self.text, self.validation_rows, self.rotation_seed,
            root / "artefacts", root / "work", overwrite,
        )  # fmt: skip


@pytest.fixture(scope="module")
def call(tiny: Path, store: ActivationStore, text: TextSpec) -> Call:
    text = replace(text, windows=2, seqlen=24)
    return Call(Checkpoint(tiny), store, QuantizeSpec(text=text), text)


@pytest.fixture(scope="module")
def made(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    call(root)
    return root


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "artefacts").rglob("*") if path.is_file()}


def test_four_folders_measured_on_the_same_text(made: Path) -> None:
    folders = sorted((made / "artefacts").iterdir())
    assert [folder.name for folder in folders] == [f"tiny-{method}" for method in METHODS]
    results = [read_results(folder) for folder in folders]
    assert [r["method"] for r in results] == ["float", "gptq", "quarot", "rtn"]
    assert len({r["evaluation"]["text_sha256"] for r in results}) == 1
    assert all(r["evaluation"]["tokens"] == 46 for r in results)
    perplexities = [r["evaluation"]["perplexity"] for r in results]
    assert len(set(perplexities)) == 4


def test_each_method_is_what_its_name_says(made: Path, call: Call, tiny: Path) -> None:
    root = made / "artefacts"
    assert sorted(path.name for path in (root / "tiny-float-w16a16kv16").iterdir()) == ["results.json"]
    quantizers = {}
    for method in ("rtn", "gptq", "quarot"):
        folder = root / f"tiny-{method}-w4a4kv4"
        card = read_card(folder)
        quantizers[method] = card["quantize"]["method"]
        assert card["method"] == method
        assert {path.name for path in folder.iterdir()} >= {"results.json", "report.md", "README.md"}
        kurtail_pl.load(folder)
    assert quantizers == {"rtn": "rtn", "gptq": "gptq", "quarot": "gptq"}
    assert rotations_of(root / "tiny-rtn-w4a4kv4") == rotations_of(root / "tiny-gptq-w4a4kv4") == Rotations()
    expected = random_rotations(AutoModelForCausalLM.from_pretrained(tiny).config, call.rotation_seed)
    found = rotations_of(root / "tiny-quarot-w4a4kv4")
    assert torch.equal(found.residual, expected.residual)  # type: ignore[arg-type]
    assert torch.equal(found.value, expected.value)  # type: ignore[arg-type]


def test_a_second_run_reuses_all(made: Path, call: Call) -> None:
    before = stamps(made)
    call(made)
    assert stamps(made) == before


def test_a_lost_folder_is_made_again(made: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(made / "artefacts", tmp_path / "artefacts")
    (tmp_path / "artefacts" / "tiny-rtn-w4a4kv4" / "results.json").unlink()
    before = stamps(tmp_path)
    call(tmp_path)
    changed = {path.parent.name for path, stamp in stamps(tmp_path).items() if before.get(path) != stamp}
    assert changed == {"tiny-rtn-w4a4kv4"}
    old, new = (read_results(r / "artefacts" / "tiny-rtn-w4a4kv4")["evaluation"] for r in (made, tmp_path))
    assert old == new


CHANGES = {
    "windows": lambda c: replace(c, text=replace(c.text, windows=1)),
    "seqlen": lambda c: replace(c, text=replace(c.text, seqlen=20)),
    "calibration windows": lambda c: replace(c, spec=replace(c.spec, text=replace(c.text, windows=3))),
    "damping": lambda c: replace(c, spec=replace(c.spec, gptq=GPTQ(percdamp=0.1))),
    "clip": lambda c: replace(c, spec=replace(c.spec, scheme=Scheme(activations=Quantizer(4, clip="ratio:0.8")))),
    "rotation seed": lambda c: replace(c, rotation_seed=5),
    "validation rows": lambda c: replace(c, validation_rows=20),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused(made: Path, call: Call, change: str) -> None:
    before = stamps(made)
    with pytest.raises(ArtefactError, match=r"other settings.*pass --overwrite"):
        CHANGES[change](call)(made)
    assert stamps(made) == before


@pytest.fixture
def other_model(tiny: Path, call: Call, tmp_path: Path) -> Call:
    """A model of the same name whose weights are others."""
    folder = shutil.copytree(tiny, tmp_path / "elsewhere" / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = capture(CaptureSpec(str(folder), call.text, rows=40), tmp_path / "store")
    assert store is not None
    return replace(call, checkpoint=Checkpoint(folder), store=store)


def test_results_of_another_model_of_the_same_name_are_not_reused(made: Path, other_model: Call) -> None:
    with pytest.raises(ArtefactError, match="tiny-"):
        other_model(made)


def test_evaluation_text_that_changed_is_noticed(made: Path, call: Call, tmp_path: Path) -> None:
    """The same file name, another content."""
    content = Path(call.text.source).read_text(encoding="utf-8")
    path = tmp_path / "tales.txt"
    path.write_text(content, encoding="utf-8")
    text = replace(call.text, source=str(path))
    moved = replace(call, text=text, spec=replace(call.spec, text=text))
    moved(tmp_path)
    path.write_text(content[1000:], encoding="utf-8")
    with pytest.raises(ArtefactError, match="tiny-"):
        moved(tmp_path)


def test_overwriting_makes_all_anew(made: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(made / "artefacts", tmp_path / "artefacts")
    before = stamps(tmp_path)
    replace(call, rotation_seed=5)(tmp_path, overwrite=True)
    after = stamps(tmp_path)
    assert set(after) == set(before)
    assert all(after[path] != stamp for path, stamp in before.items())
    first, second = (rotations_of(r / "artefacts" / "tiny-quarot-w4a4kv4").residual for r in (made, tmp_path))
    assert not torch.equal(first, second)  # type: ignore[arg-type]
