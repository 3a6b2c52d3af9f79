"""Whatever reads a folder of ours compares it with its card first: a lost byte or file, whichever it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import kurtail_pl
from kurtail_pl.errors import KurtailError, StoreMismatch
from kurtail_pl.methods import RTN
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.evaluation.results import evaluate_folder
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.reporting.figures import figures
from kurtail_pl.stages.reporting.report import report
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations

pytestmark = pytest.mark.usefixtures("cache")


def damage(path: Path, lost: bool) -> None:
    """Lose a file, or one byte in its middle: numbers of a tensor, which stay numbers."""
    if lost:
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[-len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("model.safetensors", "rotations.safetensors", "config.json", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("lost", [False, True], ids=["byte", "file"])
def test_a_damaged_folder_is_refused_by_all_that_read_it(
    name: str, lost: bool, fused: Path, artefact: Path, store: ActivationStore, text: TextSpec, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (fused, artefact)]
    for folder in folders:
        damage(folder / name, lost)
    spec, out = QuantizeSpec(rounder=RTN(), text=text), tmp_path / "out"
    readers: list[Callable[[Path], object]] = [
        lambda folder: quantize(folder, spec, out),
        lambda folder: perplexity(Checkpoint(folder), text),
        lambda folder: evaluate_folder(Checkpoint(folder), folder, text, store, 10),
        report,
        kurtail_pl.load,
    ]
    # Without weights or a configuration it is no model folder, whoever wrote it.
    wanted = rf"FOLDER(/{name} is missing| has no {name})" if lost else rf"FOLDER/{name} is damaged"
    for read in readers:
        for folder in folders:
            with pytest.raises(KurtailError, match=wanted.replace("FOLDER", folder.name)):
                read(folder)
    assert not out.exists()
    assert not (folders[1] / "results.json").exists()


def test_a_damaged_store_is_refused_by_all_that_read_it(
    store: ActivationStore, artefact: Path, text: TextSpec, rotations: Rotations, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(store.folder, tmp_path / "store"))
    damage(copy / "layer001.ffn_in.safetensors", lost=False)
    damaged, folder = ActivationStore(copy), Path(shutil.copytree(artefact, tmp_path / "artefact"))
    with pytest.raises(StoreMismatch, match=r"layer001\.ffn_in\.safetensors is missing or damaged"):
        evaluate_folder(Checkpoint(folder), folder, text, damaged, 10)
    with pytest.raises(StoreMismatch, match=r"layer001\.ffn_in\.safetensors is missing or damaged"):
        figures(damaged, rotations, rotations, 1e-6, tmp_path / "figures", 10)
    assert not (tmp_path / "figures").exists()
