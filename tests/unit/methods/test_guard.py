"""Nobody but methods, the forms of exports and the tests names a method: a new one is a file of its own.

Nobody but its package names an exporter.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kurtail_pl.cli.export import exporters
from kurtail_pl.methods import BitTuner, CacheFormat, ClipTuner, Format, Rounder, Side, TransformTuner, WeightTuner
from kurtail_pl.methods.method import Method

SEAMS: list[type[Method]] = [Format, CacheFormat, Rounder, Side, ClipTuner, TransformTuner, BitTuner, WeightTuner]
ROOT = Path(__file__).resolve().parents[3]
FORMS = tuple(ROOT / "export" / package / "forms.py" for package in ("kurtail_onnx", "kurtail_gguf", "kurtail_vllm"))
ALLOWED = (ROOT / "kurtail_pl" / "methods", *FORMS)
SOURCES = [path for folder in ("kurtail_pl", "export") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [path for path in SOURCES if not any(path.is_relative_to(allowed) for allowed in ALLOWED)]


def names_in(path: Path) -> Iterator[str]:
    """Every name that the code of a file uses; strings and comments are not looked at."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_no_file_names_a_method() -> None:
    methods = {name for seam in SEAMS for name in seam.kinds()}
    assert methods >= {
        "Uniform",
        "NVFP4",
        "Progressive",
        "Mixed",
        "Skim",
        "RTN",
        "GPTQ",
        "HQQ",
        "PerTokenHead",
        "NUQCache",
        "SearchedClips",
        "LowRank",
        "Sparse",
        "BlockTransforms",
        "SensitiveBits",
        "Matching",
    }
    assert len(FILES) > 150
    found = {str(path.relative_to(ROOT)): both for path in FILES if (both := methods & set(names_in(path)))}
    assert found == {}


def test_no_other_package_names_an_exporter() -> None:
    declared = exporters()
    assert {"gguf", "onnx", "vllm"} <= set(declared)
    assert len(SOURCES) > 150
    for point in declared.values():
        package = point.module.split(".")[0]
        others = [path for path in SOURCES if package not in path.parts]
        assert len(others) < len(SOURCES)
        assert [str(path) for path in others if point.attr in names_in(path)] == []


@pytest.mark.parametrize("seam", SEAMS)
def test_every_method_has_a_file_and_a_sentence(seam: type[Method]) -> None:
    for kind in seam.kinds().values():
        assert re.fullmatch(r"kurtail_pl\.methods\.(formats|caches|rounders|sides|tuners)\.\w+", kind.__module__)
        sentence = kind().sentence()
        assert sentence
        assert not sentence.endswith(".")
