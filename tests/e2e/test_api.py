"""`kurtail_pl.quantize` against `kurtail fit`: the same artefact, and errors that are exceptions."""

import doctest
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kurtail_pl
from kurtail_pl.errors import ArtefactError, CheckpointError, KurtailError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]


def test_it_is_kurtail_fit(
    kurtail: Callable[..., None], tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = list(sys.argv)
    evaluation = {"text": {"source": str(text_file)}}
    folder = kurtail_pl.quantize(
        tied, recipe="smoke", text=str(text_file), out=tmp_path / "out", evaluation=evaluation,
        quantization={"rounder": {"class_path": "GPTQ", "init_args": {"percdamp": 0.05}}},
    )  # fmt: skip
    assert folder == tmp_path / "out"
    assert sys.argv == arguments
    texts = [f"--{place}.text.source={text_file}" for place in ("data.capture", "evaluation")]
    rounder = ["--quantization.rounder=GPTQ", "--quantization.rounder.percdamp=0.05"]
    other = ["--quantization.out", "other", "--data.store", "other-store", "--trainer.default_root_dir", "other-run"]
    kurtail(tmp_path, "fit", "--config", "smoke", f"--data.capture.model={tied}", *texts, *rounder, *other)
    ones, others = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "other"))
    assert ones.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in ones.items())
    assert kurtail_pl.load(folder)(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ArtefactError, match="out exists"):
        kurtail_pl.quantize(tied, recipe="smoke", text=str(text_file), out=folder, evaluation=evaluation)


def test_what_is_wrong_is_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KurtailError, match=r"there is no recipe 'smokey'; did you mean smoke\?"):
        kurtail_pl.quantize("smollm2-135m", recipe="smokey")
    with pytest.raises(KurtailError, match=r"no setting quantization\.rounding; did you mean rounder"):
        kurtail_pl.quantize("smollm2-135m", recipe="smoke", quantization={"rounding": 1})
    with pytest.raises(CheckpointError, match="nowhere"):
        kurtail_pl.quantize(tmp_path / "nowhere", recipe="smoke")
    assert list(tmp_path.iterdir()) == []


def test_the_page_for_python_runs_as_it_stands(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (failed, attempted) == (0, PAGE.read_text().count(">>> "))


def test_the_readme_calls_what_the_page_calls() -> None:
    """Its lines run in `test_readme`, on the real model."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (PAGE.parents[1] / "README.md").read_text(), re.M | re.S)
    called = set(re.findall(r"kurtail_pl\.\w+|Auto\w+\.\w+", block))
    assert called
    assert called <= set(re.findall(r"kurtail_pl\.\w+|Auto\w+\.\w+", PAGE.read_text()))
