"""Folders that a recipe leaves open."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kurtail_pl.cli.naming import artefact_suffix, reference_suffix, run_folder, store_folder

BASE: dict[str, Any] = yaml.safe_load((Path(__file__).parents[3] / "configs" / "base.yaml").read_text())
CAPTURE, DATA, QUANTIZATION = "data.init_args.capture", "data.init_args", "quantization"


def with_setting(path: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    place = settings
    for name in parents:
        place = place[name]
    place[last] = value
    return settings


def folders(settings: dict[str, Any]) -> tuple[str, str, str]:
    return (
        str(store_folder(settings, BASE)), str(run_folder(settings, BASE, "kurtail")), artefact_suffix(settings, BASE)
    )  # fmt: skip


def test_the_default_has_plain_names() -> None:
    assert folders(BASE) == ("runs/smollm2-135m/store", "runs/smollm2-135m/kurtail", "")
    other = with_setting(f"{CAPTURE}.model", "meta-llama/Llama-3.2-1B")
    assert folders(other) == ("runs/llama-3.2-1b/store", "runs/llama-3.2-1b/kurtail", "")


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        (f"{CAPTURE}.text.source", "wikitext", (True, True, True)),
        (f"{CAPTURE}.rows", 1000, (True, True, True)),
        (f"{DATA}.steps", 300, (False, True, True)),
        (f"{DATA}.compute.dtype", "bfloat16", (False, True, True)),
        ("model.init_args.rotation_seed", 1, (False, True, True)),
        ("seed_everything", 1, (False, True, True)),
        ("fusion.scales", {"parts": ["values"]}, (False, False, True)),
        (f"{QUANTIZATION}.rounder.init_args.percdamp", 0.05, (False, False, True)),
        (f"{QUANTIZATION}.scheme.cache.init_args.keys.clip.amount", 1.0, (False, False, True)),
        (f"{QUANTIZATION}.out", "elsewhere", (False, False, False)),
        (f"{DATA}.store", "elsewhere", (False, False, False)),
        (f"{DATA}.compute.device", "cpu", (False, False, False)),
        ("trainer.accelerator", "cpu", (False, False, False)),
        ("evaluation.text.windows", 9, (False, False, False)),
    ],
)
def test_each_name_tells_apart_what_differs(path: str, value: Any, changed: tuple[bool, bool, bool]) -> None:
    """Store, run and artefact; what decides nothing of them leaves their names."""
    settings = with_setting(path, value)
    assert tuple(a != b for a, b in zip(folders(settings), folders(BASE), strict=True)) == changed


def test_a_source_that_was_filled_in_changes_no_name() -> None:
    filled = with_setting(f"{QUANTIZATION}.text.source", "pydoc")
    filled["evaluation"]["text"]["source"] = "pydoc"
    assert folders(filled) == folders(BASE)
    assert reference_suffix(filled, BASE) == ""
    other = with_setting(f"{QUANTIZATION}.text.source", "wikitext")
    assert artefact_suffix(other, BASE)


def test_all_artefacts_have_names_of_their_own() -> None:
    changes: Iterator[tuple[str, Any]] = iter(
        [("fusion.scales", {}), (f"{QUANTIZATION}.seed", 1), (f"{QUANTIZATION}.seed", 2), ("seed_everything", 1)]
    )
    names = [artefact_suffix(with_setting(path, value), BASE) for path, value in changes]
    assert all(a != b for a, b in itertools.combinations(names, 2))
    assert {len(name) for name in names} == {7}
