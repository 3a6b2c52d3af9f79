"""Exports against the torch model: every family, every form of weights, every kind of quantizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from exports import TEXTS, TOKENS, TOLERANCE, all_equal, checks_of, has_torchs_logits
from families import GRAPHS, WITHOUT_GRAPH
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.perplexity import perplexity
from kurtail_onnx.run.session import open_session
from torch.nn.functional import cross_entropy

import kurtail_pl
from kurtail_pl.errors import UnsupportedArchitecture
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead, Progressive, Uniform
from kurtail_pl.stages.export import export
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.surgery.linear import QuantizedLinear

MakeArtefact = Callable[..., Path]


@pytest.mark.parametrize("family", GRAPHS)
def test_every_family(
    family: str, make_family: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(make_family(family))
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    linears = [m for m in kurtail_pl.load(artefact).modules() if isinstance(m, QuantizedLinear)]
    assert checks_of(folder)["linears"] == {"quantized": len(linears), "fused": len(linears)}
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)


@pytest.mark.parametrize("family", WITHOUT_GRAPH)
def test_families_without_a_graph_are_refused(
    family: str, make_family: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=WITHOUT_GRAPH[family]):
        export(make_artefact(make_family(family)), tmp_path / "onnx", ONNX())


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaled_positions_up_to_the_last(
    kind: str, make_family: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    """Texts as long as the model's positions: the dynamic type scales longer ones alone."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    artefact = make_artefact(make_family("qwen3", rope_parameters=rope, max_position_embeddings=TOKENS))
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)


def test_stories(story_artefact: Path, tmp_path: Path) -> None:
    folder = export(story_artefact, tmp_path / "onnx", ONNX(), check=True)
    assert all_equal(story_artefact, folder)
    assert checks_of(folder)["texts"]["batch"]["codes"] > 10_000


def test_token_by_token_equals_one_prefill(story_artefact: Path, tmp_path: Path) -> None:
    """Of several texts, one: the others may hold a value on the border of two codes."""
    opened = Export(export(story_artefact, tmp_path / "onnx", ONNX(), check=False))
    session = open_session(opened.model, threads=1)

    def equal(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(512, size=(1, TOKENS))
        whole, single = Decoder(opened, session), Decoder(opened, session)
        logits = whole.forward(ids)
        steps = np.concatenate([single.forward(ids[:, n : n + 1]) for n in range(TOKENS)], axis=1)
        codes = [name for name, array in whole.cache().items() if array.dtype == np.uint8]
        same = all(np.array_equal(single.cache()[name], whole.cache()[name]) for name in codes)
        return same and bool(np.abs(steps - logits).max() <= TOLERANCE * np.abs(logits).max())

    assert any(equal(seed) for seed in range(TEXTS))


ASYMMETRIC = Quantizer(4, False)
VARIANTS: dict[str, tuple[ONNX, dict[str, Quantizer | str | None]]] = {
    "groups": (ONNX(), {"weights": Uniform(group_size=16)}),
    "groups-asymmetric": (ONNX(), {"weights": Uniform(4, False, group_size=32)}),
    "asymmetric": (ONNX(), {"weights": Uniform(4, False), "activations": ASYMMETRIC}),
    "activation-groups": (ONNX(), {"activations": Quantizer(group_size=16)}),
    "quantile": (ONNX(), {"activations": Quantizer(clip=Clip("quantile", 0.98))}),
    "scale-a-head": (ONNX(), {"activations": ASYMMETRIC, "attention_output": "head"}),
    "float-values": (ONNX(), {"cache": PerTokenHead(values=None)}),
    "float-activations": (ONNX(), {"activations": None}),
    "float-weights": (ONNX(), {"weights": None}),
    "kernel": (ONNX(weights="matmulnbits"), {}),
    "kernel-groups-16": (ONNX(weights="matmulnbits"), {"weights": Uniform(group_size=16)}),
    "kernel-groups-32": (ONNX(weights="matmulnbits"), {"weights": Uniform(4, False, group_size=32)}),
    "kernel-asymmetric": (ONNX(weights="matmulnbits"), {"weights": Uniform(4, False)}),
    "kernel-8-bits": (ONNX(weights="matmulnbits"), {"weights": Uniform(8)}),
    "two-levels": (ONNX(), {"weights": Progressive(16), "activations": ASYMMETRIC}),
    "kernel-two-levels": (ONNX(weights="matmulnbits"), {"weights": Progressive(32)}),
    "integer": (ONNX(weights="integer"), {}),
    "float-cache": (ONNX(kv="float"), {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form(variant: str, grouped: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, quantizers = VARIANTS[variant]
    artefact = make_artefact(grouped, **quantizers)
    folder = export(artefact, tmp_path / "onnx", spec, check=True)
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)
    assert (folder / "genai_config.json").is_file() == (spec.kv == "float")


@pytest.mark.parametrize("weights", ["qdq", "integer"])
def test_eight_bits(
    weights: Literal["qdq", "integer"], grouped: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    """Sixteen times as many borders, and codes that matter sixteen times less."""
    artefact = make_artefact(
        grouped, weights=Uniform(8), activations=Quantizer(8), cache=PerTokenHead(Quantizer(8), Quantizer(8))
    )
    folder = export(artefact, tmp_path / "onnx", ONNX(weights=weights), check=True)
    assert has_torchs_logits(kurtail_pl.load(artefact), folder, tolerance=0.02)


def test_without_rotations(tiny: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(tiny, rotated=False)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=True)
    assert "Hadamard" not in checks_of(folder)["operators"]
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)


def test_float_activations_on_request(artefact: Path, make_artefact: MakeArtefact, tiny: Path, tmp_path: Path) -> None:
    """`act none` of a W4A4KV4 artefact is the W4A16KV4 artefact: rounding to nearest does not see activations."""
    folder = export(artefact, tmp_path / "onnx", ONNX(act="none"), check=True)
    assert has_torchs_logits(kurtail_pl.load(make_artefact(tiny, activations=None)), folder)


def test_half_precision_of_a_float_model(stories: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    floats = make_artefact(stories, weights=None, activations=None, cache=None)
    text = TextSpec(windows=4, seqlen=128)
    single, half = (
        perplexity(Export(export(floats, tmp_path / dtype, ONNX(dtype), check=True)), text)
        for dtype in ("fp32", "fp16")
    )
    assert half == pytest.approx(single, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("artefact", ["story_artefact", "centred_stories", "static_stories"])
def test_half_precision_has_torchs_mean_likelihood(
    artefact: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Single tokens differ, since half precision moves values over the borders of codes; their mean does not."""
    made = request.getfixturevalue(artefact)
    opened = Export(export(made, tmp_path / "onnx", ONNX("fp16"), check=True))
    model, session = kurtail_pl.load(made), open_session(opened.model, threads=1)
    windows = cut_windows(opened, TextSpec(windows=16, seqlen=128), "evaluation").tokens
    change = []
    for window in windows:
        half = torch.from_numpy(Decoder(opened, session).forward(window[None].numpy())[0])
        losses = [cross_entropy(x[:-1], window[1:], reduction="none") for x in (half, model(window[None]).logits[0])]
        change.append(losses[0] - losses[1])
    difference = torch.cat(change).double()
    assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5 < 0.2
