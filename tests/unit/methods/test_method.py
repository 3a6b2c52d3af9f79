"""Methods in cards: the kinds that are known, settings of their types, and nothing imported."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import GPTQ, HQQ, NVFP4, RTN, Format, Normal, Rounder, Uniform
from kurtail_pl.methods.method import Method


@pytest.mark.parametrize(
    "method",
    [
        RTN(),
        GPTQ(),
        GPTQ(64, 0.02, False, "foem"),
        GPTQ(refine=3),
        HQQ(),
        Uniform(3, False, 16),
        Normal(2, 8),
        NVFP4(),
    ],
    ids=str,
)
def test_plain_data_and_back(method: Method) -> None:
    data = json.loads(json.dumps(method.to_dict()))
    assert set(data) == {"kind", "settings"}
    assert data["kind"] == type(method).__name__
    seam = Rounder if isinstance(method, Rounder) else Format
    assert seam.from_dict(data) == method
    assert "\n" not in method.sentence()
    assert not method.sentence().endswith(".")


UNKNOWN: list[Any] = [
    None, [], 3, "GPTQ", {}, {"settings": {}}, {"kind": None}, {"kind": []}, {"kind": {}}, {"kind": "gptq"},
    {"kind": "os.system", "settings": {}}, {"kind": "Rounder", "settings": {}}, {"kind": "Uniform", "settings": {}},
]  # fmt: skip


@pytest.mark.parametrize("data", UNKNOWN, ids=str)
def test_an_unknown_kind_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no rounder of this version; use the one that made it .*GPTQ.*RTN") as e:
        Rounder.from_dict(data)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("data", [{"kind": "Format"}, {"kind": "_FP4"}, {"kind": "GPTQ"}], ids=str)
def test_what_is_no_format_of_its_own_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="is no format of this version"):
        Format.from_dict({**data, "settings": {}})


@pytest.mark.parametrize("kind", ["evil", "evil.Evil", "evil:Evil"])
def test_a_kind_imports_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for seam in (Method, Format, Rounder):
        with pytest.raises(ConfigError):
            seam.from_dict({"kind": kind, "settings": {"class_path": "evil.Evil"}})
    assert not (tmp_path / "ran").exists()
    assert "evil" not in set(sys.modules) - before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "GPTQ is None"),
        ([128], r"GPTQ is \[128\]"),
        ({"block_size": "128"}, "GPTQ.block_size is '128': Input should be a valid integer"),
        ({"block_size": 1.5}, "GPTQ.block_size is 1.5"),
        ({"block_size": 0}, "block_size is 0; give a positive number of columns"),
        ({"act_order": 1}, "GPTQ.act_order is 1: Input should be a valid boolean"),
        ({"correction": "awq"}, "GPTQ.correction is 'awq'"),
        ({"percdamp": None}, "GPTQ.percdamp is None"),
        ({"percdamp": -1.0}, "percdamp is -1.0; give a positive number"),
        ({"colour": 1}, "GPTQ.colour is 1: Unexpected"),
        ({"block_size": "1" * 5000}, "GPTQ.block_size is '111"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_are_not_as_they_should_be(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Rounder.from_dict({"kind": "GPTQ", "settings": settings})
    assert len(str(error.value)) < 300


def test_settings_that_are_left_out_are_the_defaults() -> None:
    assert Rounder.from_dict({"kind": "GPTQ", "settings": {"refine": 2}}) == GPTQ(refine=2)


class Seam(Method):
    """Of this test alone: the others' kinds are for the whole process."""


def test_a_kind_that_somebody_else_defines_is_known() -> None:
    """Once it is imported, by them."""

    @dataclass(frozen=True)
    class Elsewhere(Seam):
        rounds: int = 3

        def sentence(self) -> str:
            return "done elsewhere"

    assert Seam.from_dict({"kind": "Elsewhere", "settings": {"rounds": 4}}) == Elsewhere(4)
    assert Seam.from_dict(Elsewhere().to_dict()) == Elsewhere()
