"""The table of several models, from results written by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.reporting.comparison import write_comparison
from kurtail_pl.stages.reporting.figures.perplexity import draw_perplexity
from kurtail_pl.stages.reporting.lines import Row, lines_of
from kurtail_pl.stages.reporting.serving import Serving
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.surgery.rotations import Rotations

COST = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 5e8}


def write(folder: Path, method: str, perplexity: float, rounding: str = "gptq", zero_shot: float | None = None) -> Path:
    """A folder with the results, and the card, that a stage would leave."""
    folder.mkdir(parents=True)
    scheme = FLOAT if method == "float" else Scheme()
    results: dict[str, Any] = {
        "method": method,
        "model": "m",
        "measured": {"model_sha256": "1"},
        "scheme": scheme.to_dict(),
        "evaluation": {"perplexity": perplexity, "source": "t.txt", "windows": 2, "seqlen": 8, "tokens": 14},
        "kurtosis": {"mean": 2.0, "max": 3.0, "rows": 4, "sites": {}},
        "disk_bytes": 1000,
        "cost": {"learn": COST, "quantize": COST, "evaluate": {**COST, "peak_bytes": 7e8}},
    }
    if zero_shot is not None:
        asked: dict[str, Any] = {"tasks": {}, "settings": {}, "harness": "0", "files_sha256": {}, "skipped": {}}
        results["tasks"] = {"mean": zero_shot, **asked}
    (folder / "results.json").write_text(json.dumps(results))
    if method != "float":
        source = {"model": "m", "sha256": "1"}
        card = {"format": 3, "method": method, "scheme": scheme.to_dict(), "source": source, "cost": {}, "sha256": {}}
        card |= {"rounding": rounding, "quantize": {"rounder": {"kind": rounding.upper(), "settings": {}}}}
        (folder / "kurtail.json").write_text(json.dumps(card))
        write_rotations(folder / "rotations.safetensors", Rotations())
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return [
        Row(write(tmp_path / "float", "float", 10.0), 0),
        Row(write(tmp_path / "q0", "quarot", 30.0), 0),
        Row(write(tmp_path / "q1", "quarot", 34.0), 1),
        Row(write(tmp_path / "k0", "kurtail", 20.0), 0),
        Row(write(tmp_path / "k1", "kurtail", 24.0), 1),
        Row(write(tmp_path / "r", "quarot", 50.0, "rtn"), 0),
    ]


def cells(markdown: str) -> list[dict[str, str]]:
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_means_spreads_recovery_and_gap(rows: list[Row], tmp_path: Path) -> None:
    table = cells(write_comparison(rows, tmp_path))
    assert [(line["method"], line["weights"]) for line in table] == [
        ("float", "-"), ("quarot", "gptq"), ("kurtail", "gptq"), ("quarot", "rtn"),
    ]  # fmt: skip
    assert [line["perplexity"] for line in table] == [
        "10.00", "32.00 (30.00 to 34.00)", "22.00 (20.00 to 24.00)", "50.00",
    ]  # fmt: skip
    # 10 / 32, 10 / 22, 10 / 50; from 32 towards 10, 22 is 10 of 22.
    assert [line["recovery"] for line in table] == ["100.0 %", "31.2 %", "45.5 %", "20.0 %"]
    assert [line["gap closed"] for line in table] == ["-", "-", "45 %", "-"]
    assert {line["all s"] for line in table} == {"4"}
    assert {line["peak memory"] for line in table} == {"0.70 GB"}
    assert "0-shot" not in table[0]


def test_what_is_learned_from_counts_as_learning(rows: list[Row], tmp_path: Path) -> None:
    """A capture that nothing was learned from does not."""
    for row, capture in zip(rows[3:], (30.0, 50.0, 70.0), strict=True):
        path = row.folder / "results.json"
        results = json.loads(path.read_text())
        results["cost"]["capture"] = {**COST, "cpu_seconds": capture}
        path.write_text(json.dumps(results))
    path = rows[5].folder / "results.json"
    results = json.loads(path.read_text())
    del results["cost"]["learn"]
    path.write_text(json.dumps(results))
    table = cells(write_comparison(rows, tmp_path))
    learn = COST["cpu_seconds"]
    # Of several seeds the largest.
    assert [line["learn CPU s"] for line in table[1:3]] == [f"{learn:.0f}", f"{50 + learn:.0f}"]
    assert table[3]["learn CPU s"] == "0"


def test_systems_of_one_method_are_lines_of_their_own(rows: list[Row], tmp_path: Path) -> None:
    """Each with its seeds; QuaRot is what is called so. What was looked at stands beside, and who was refused below."""
    names = [None, "quarot", "quarot", "qoq", "qoq", None]
    folders = [row.folder for row in rows]
    for folder in folders[3:5]:
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "method": "quarot"}))
    looked: list[Path] = []

    def look(folder: Path) -> Serving:
        looked.append(folder)
        return Serving(4.25, None, 1_500_000, 30_000_000, {"onnx": None, "vllm": "no"})

    named = [replace(row, name=name) for row, name in zip(rows, names, strict=True)]
    text = write_comparison(named, tmp_path, look, {"mxfp4": "blocks of 32 do not divide 172"})
    table = cells(text)
    assert [line["method"] for line in table] == ["float", "quarot", "qoq", "quarot"]
    assert [line["perplexity"] for line in table] == [
        "10.00", "32.00 (30.00 to 34.00)", "22.00 (20.00 to 24.00)", "50.00",
    ]  # fmt: skip
    assert [line["gap closed"] for line in table] == ["-", "-", "45 %", "-"]
    assert looked == [folders[1], folders[3], folders[5]]
    shown = [(each["bits a weight"], each["more products"], each["runs in"]) for each in table[:2]]
    assert shown == [("16.00", "0", "-"), ("4.25", "1.50 M (5.0 %)", "torch, onnx")]
    assert [line["bits of the cache"] for line in table] == ["16.00", "-", "-", "-"]
    assert text.endswith("\nRefused:\n\n- mxfp4: blocks of 32 do not divide 172\n")
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["refused"] == {"mxfp4": "blocks of 32 do not divide 172"}
    assert data["lines"][2]["serving"]["refusals"] == {"onnx": None, "vllm": "no"}


def test_the_title_is_the_models_name(tmp_path: Path) -> None:
    """Not where it lies."""
    folder = write(tmp_path / "float", "float", 10.0)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "model": "/some/where/Small-2B.gguf"}))
    write_comparison([Row(folder, 0)], tmp_path)
    assert (tmp_path / "compare.md").read_text().startswith("# small-2b\n")
    assert "<title>small-2b" in (tmp_path / "report.html").read_text()


def test_recovery_is_of_accuracy_where_it_was_measured(tmp_path: Path) -> None:
    scored = [Row(write(tmp_path / m, m, 10.0, zero_shot=a), 0) for m, a in (("float", 0.5), ("kurtail", 0.4))]
    table = cells(write_comparison(scored, tmp_path))
    assert [line["0-shot"] for line in table] == ["50.0%", "40.0%"]
    assert [line["recovery"] for line in table] == ["100.0 %", "80.0 %"]


def test_data_and_picture_hold_the_same_numbers(rows: list[Row], tmp_path: Path) -> None:
    write_comparison(rows, tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text())
    assert [[v["perplexity"] for v in line["values"]] for line in data["lines"]] == [
        [10.0],
        [30.0, 34.0],
        [20.0, 24.0],
        [50.0],
    ]
    assert [folder["seed"] for folder in data["folders"]] == [0, 1, 0, 1, 0]
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.format == "PNG"
    chart = draw_perplexity({(g.method, g.weights, g.bits): g.of("perplexity") for g in lines_of(rows)}, "m")
    (axes,) = chart.axes
    assert [bar.get_width() for bar in axes.patches] == [10.0, 32.0, 22.0, 50.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "float w16a16kv16", "quarot w4a4kv4 gptq", "kurtail w4a4kv4 gptq", "quarot w4a4kv4 rtn",
    ]  # fmt: skip
    assert axes.get_xlabel() == "perplexity (lower is better)"
    left, right = axes.get_xlim()
    assert left < 10
    assert right > 50
