"""The whole road by the real commands: fit, compare, load, and every verb alone, on two small models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from e2e.conftest import by_kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from walks import perplexity_of

import kurtail_pl

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
METHODS = ["float", "rtn", "gptq", "quarot", "kurtail"]


@dataclass(frozen=True)
class Road:
    """Where `fit` and `compare` were run, on what."""

    place: Path
    model: Path
    text: Path
    folders: dict[str, Path]
    """Artefacts of the table, by their methods."""

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's quantization."""
        settings = yaml.safe_load((self.place / "recipe.yaml").read_text())["quantization"]
        return {name: value for name, value in settings.items() if name != "out"}

    @property
    def in_cards(self) -> dict[str, Any]:
        """The recipe's quantization as an artefact's card says it."""
        settings, scheme = self.settings, self.settings["scheme"]
        formats = {part: by_kind(scheme[part]) for part in ("weights", "cache")}
        return settings | {"rounder": by_kind(settings["rounder"]), "scheme": scheme | formats, "target": "torch"}


@pytest.fixture(scope="module", params=["tied", "stories"])
def road(
    request: pytest.FixtureRequest,
    kurtail: Kurtail,
    write_recipe: Callable[[Path, Path], str],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Road:
    model = Path(request.getfixturevalue(request.param))
    place = tmp_path_factory.mktemp(request.param)
    (place / "recipe.yaml").write_text(write_recipe(model, text_file))
    kurtail(place, "fit", "--config", "recipe.yaml")
    kurtail(place, "compare", "--config", "recipe.yaml")
    results = list((place / "artifacts").glob("*/results.json"))
    folders = {json.loads(path.read_text())["method"]: path.parent for path in results}
    assert len(folders) == len(results)
    return Road(place, model, text_file, folders)


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert list(one) == list(other)
    assert len(one) > 10
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_folder_is_complete(road: Road) -> None:
    names = {path.name for path in road.folders["kurtail"].iterdir()}
    assert names >= {"config.json", "rotations.safetensors", "tokenizer.json", "kurtail.json", "README.md"}
    assert names >= {"results.json", "report.md", "report.html", "training.json", "model.safetensors"}
    assert list(road.place.rglob("*.partial")) == []
    card = json.loads((road.folders["kurtail"] / "kurtail.json").read_text())
    assert card["quantize"] == road.in_cards
    assert card["method"] == "kurtail"


def test_the_report_compares_the_five_methods(road: Road, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]) -> None:
    kurtail(road.place, "report", "--artefact", road.folders["kurtail"])
    printed = capsys.readouterr().out
    written = (road.folders["kurtail"] / "report.md").read_text()
    assert table_rows(printed) == table_rows(written)
    float_row, *others = table_rows(written)
    assert float_row[0] == "float"
    assert sorted(row[0] for row in others) == sorted(METHODS[1:])
    assert [float(row[4]) for row in others] == sorted((float(row[4]) for row in others), reverse=True)
    for row, bits in zip(table_rows(written), ["w16a16kv16"] + 4 * ["w4a4kv4"], strict=True):
        assert road.folders[row[0]].name.startswith(f"{road.model.name}-{row[0]}-{bits}")
        results = json.loads((road.folders[row[0]] / "results.json").read_text())
        assert row[1] == bits
        assert row[2] == f"{results['kurtosis']['mean']:.2f}"
        assert row[4] == f"{results['evaluation']['perplexity']:.2f}"


@pytest.mark.parametrize("method", ["float", "rtn", "quarot", "kurtail"])
def test_perplexity_is_that_of_the_loaded_model(road: Road, method: str) -> None:
    if method == "float":
        folder = road.folders["float"]
        model = AutoModelForCausalLM.from_pretrained(road.model, dtype=torch.float32)
    else:
        folder = road.folders[method]
        model = kurtail_pl.load(folder)
    evaluation = json.loads((folder / "results.json").read_text())["evaluation"]
    assert (evaluation["windows"], evaluation["seqlen"], evaluation["tokens"]) == (2, 128, 254)
    own = perplexity_of(model, AutoTokenizer.from_pretrained(road.model), road.text, 2, 128)
    assert evaluation["perplexity"] == pytest.approx(own, rel=1e-5)


def test_fused_model_is_the_original(road: Road) -> None:
    tokenizer = AutoTokenizer.from_pretrained(road.model)
    original = AutoModelForCausalLM.from_pretrained(road.model, dtype=torch.float32)
    fused = kurtail_pl.load(road.place / "runs" / "fused")
    expected = perplexity_of(original, tokenizer, road.text, 2, 128)
    assert perplexity_of(fused, tokenizer, road.text, 2, 128) == pytest.approx(expected, rel=1e-4)


def test_loaded_model_generates_text(road: Road) -> None:
    folder = road.folders["kurtail"]
    model, tokenizer = kurtail_pl.load(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the old king", return_tensors="pt", return_token_type_ids=False)
    length = prompt["input_ids"].shape[1]
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[:, :length], prompt["input_ids"])
    assert length < generated.shape[1] <= length + 8
    with torch.no_grad():
        assert generated[0, length] == model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(prompt["input_ids"][0], skip_special_tokens=True).strip() == "the old king"


@pytest.mark.parametrize("method", ["rtn", "kurtail"])
def test_kurtosis_is_scipys_on_the_rows_kept_out_of_training(road: Road, method: str) -> None:
    rotation = load_file(road.folders[method] / "rotations.safetensors").get("residual")
    config = json.loads((road.model / "config.json").read_text())
    measured = json.loads((road.folders[method] / "results.json").read_text())["kurtosis"]["sites"]
    assert len(measured) == 2 * config["num_hidden_layers"]
    for site, value in measured.items():
        rows = load_file(road.place / "runs" / "store" / f"{site}.safetensors")["rows"][-128:].double().numpy()
        normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + config["rms_norm_eps"])
        seen = normed if rotation is None else normed @ rotation.numpy()
        assert value == pytest.approx(float(scipy.stats.kurtosis(seen, axis=None, fisher=False)), rel=1e-9)


def test_written_rotations_are_orthogonal_and_learned(road: Road) -> None:
    learned = load_file(road.place / "runs" / "rotations.safetensors")
    random = load_file(road.folders["quarot"] / "rotations.safetensors")
    assert set(learned) == set(random) >= {"residual", "value"}
    for name, matrix in learned.items():
        error = matrix.mT @ matrix - torch.eye(matrix.shape[-1]).double()
        assert error.abs().max() < 1e-12
        # R1 and R2 moved from QuaRot's; the online ones are QuaRot's own.
        assert torch.equal(matrix, random[name]) == (name not in ("residual", "value"))
    assert load_file(road.folders["rtn"] / "rotations.safetensors") == {}


def test_the_verbs_one_by_one_give_the_same_folder(
    road: Road, kurtail: Kurtail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ["--spec.model", road.model, "--spec.rows", 256, "--spec.text.source", road.text]
    spec += ["--spec.text.windows", 2, "--spec.text.seqlen", 128, "--out", "store"]
    kurtail(tmp_path, "capture", *spec, "--dry_run", "true")
    assert list(tmp_path.iterdir()) == []
    kurtail(tmp_path, "capture", *spec)
    captured, reused = tmp_path / "store", road.place / "runs" / "store"
    assert stamps(captured).keys() == stamps(reused).keys()
    for path in captured.glob("*.safetensors"):
        assert path.read_bytes() == (reused / path.name).read_bytes()

    rotations = road.place / "runs" / "rotations.safetensors"
    kurtail(tmp_path, "fuse", "--model", road.model, "--rotations", rotations, "--out", "fused")
    assert_same_weights(tmp_path / "fused", road.place / "runs" / "fused")

    (tmp_path / "quantize.yaml").write_text(yaml.safe_dump({"spec": road.settings}))
    kurtail(tmp_path, "quantize", "--config", "quantize.yaml", "--artefact", "fused", "--out", "own")
    assert_same_weights(tmp_path / "own", road.folders["kurtail"])

    text = ["--text.source", road.text, "--text.windows", 2, "--text.seqlen", 128]
    capsys.readouterr()
    kurtail(tmp_path, "eval", "--model", "own", *text)
    printed = capsys.readouterr().out
    assert not (tmp_path / "own" / "results.json").exists()
    kurtail(tmp_path, "eval", "--model", "own", *text, "--store", "store", "--validation_rows", 128)
    own, first = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "own", road.folders["kurtail"]))
    assert own["evaluation"]["perplexity"] == first["evaluation"]["perplexity"]
    assert own["kurtosis"] == first["kurtosis"]
    assert f"perplexity {own['evaluation']['perplexity']:.4f} " in printed

    kurtail(tmp_path, "report", "--artefact", "own")
    (row,) = table_rows((tmp_path / "own" / "report.md").read_text())
    assert row[0] == "kurtail"


def test_more_validation_rows_than_the_store_has_are_refused(
    road: Road, kurtail: Kurtail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(road.folders["rtn"], tmp_path / "own")
    (tmp_path / "own" / "results.json").unlink()
    text = ["--text.source", road.text, "--text.windows", 2, "--text.seqlen", 128]
    with pytest.raises(SystemExit, match="1"):
        kurtail(tmp_path, "eval", "--model", "own", *text, "--store", road.place / "runs" / "store")
    assert "1024" in capsys.readouterr().err
    assert not (tmp_path / "own" / "results.json").exists()


def test_fuse_draws_quarots_rotations(road: Road, kurtail: Kurtail, tmp_path: Path) -> None:
    kurtail(tmp_path, "fuse", "--model", road.model, "--method", "quarot", "--out", "fused")
    (run,) = (road.place / "runs" / road.model.name).glob("quarot-*")
    assert_same_weights(tmp_path / "fused", run / "fused")


def test_compare_again_reuses_and_other_settings_are_refused(
    road: Road, kurtail: Kurtail, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = [road.folders[method] for method in ("rtn", "gptq", "quarot")]
    before = [stamps(folder) for folder in baselines]
    kurtail(road.place, "compare", "--config", "recipe.yaml")
    assert [row[0] for row in table_rows(capsys.readouterr().out)] == METHODS
    assert [stamps(folder) for folder in baselines] == before
    other = (road.place / "recipe.yaml").read_text().replace("percdamp: 0.01", "percdamp: 0.02")
    (road.place / "other.yaml").write_text(other)
    with pytest.raises(SystemExit, match="1"):
        kurtail(road.place, "compare", "--config", "other.yaml")
    assert "made or measured with other settings" in capsys.readouterr().err
    assert [stamps(folder) for folder in baselines] == before


def test_fit_again_reuses_the_store_and_gives_the_same_artefact(road: Road, kurtail: Kurtail) -> None:
    store, rotations = road.place / "runs" / "store", road.place / "runs" / "rotations.safetensors"
    before, learned, weights = stamps(store), load_file(rotations), weights_of(road.folders["kurtail"])
    made = stamps(road.folders["kurtail"])
    kurtail(road.place, "fit", "--config", "recipe.yaml", "--overwrite")
    assert stamps(store) == before
    again = {**load_file(rotations), **weights_of(road.folders["kurtail"])}
    assert again.keys() == {**learned, **weights}.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in {**learned, **weights}.items())
    remade = stamps(road.folders["kurtail"])
    assert all(remade[name] != made[name] for name in made if name != "report.md")


def test_the_same_rotations_have_the_same_hash(road: Road, kurtail: Kurtail, tmp_path: Path) -> None:
    rotations = road.place / "runs" / "rotations.safetensors"
    hashes = set()
    for number in range(4):
        folder = tmp_path / f"fused-{number}"
        kurtail(tmp_path, "fuse", "--model", road.model, "--rotations", rotations, "--out", folder)
        hashes.add(json.loads((folder / "kurtail.json").read_text())["rotations_sha256"])
    assert len(hashes) == 1
