"""Stages in bfloat16 against the same in float32: close, and never mistaken for it; models that follow to a device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kurtail_pl
from kurtail_pl.errors import ResumeMismatch, StoreMismatch
from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore, block_sites, value_sites
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import Compute

BFLOAT16 = Compute("cpu", "bfloat16")
CHANGE = 4 * 24 * 2.0**-9
"""Four layers of two dozen roundings (see streaming/test_compute.py)."""


def test_a_store_made_in_bfloat16(tiny: Path, text: TextSpec, store: ActivationStore, tmp_path: Path) -> None:
    """The same rows, rounded on their way; refused where float32 is asked for."""
    spec = CaptureSpec(str(tiny), text, rows=50, seed=3)
    rounded = capture(spec, tmp_path / "store", compute=BFLOAT16)
    assert rounded is not None
    assert rounded.origin == replace(store.origin, dtype="bfloat16")
    for site in (*block_sites(4), *value_sites(4)):
        exact = store.read(site, 0, 50)
        assert 0 < (rounded.read(site, 0, 50) - exact).norm() < CHANGE * exact.norm() or site == "layer000.attn_in"
    with pytest.raises(StoreMismatch, match="dtype is 'bfloat16', wanted 'float32'"):
        capture(spec, tmp_path / "store")
    assert capture(spec, tmp_path / "store", compute=BFLOAT16) is not None


def test_gptq_in_bfloat16(
    fused: Path, artefact: Path, text: TextSpec, tmp_path: Path, hessians: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hessians are sums in float64 of what bfloat16 layers write; what is not quantized is not rounded either."""
    rounded = quantize(fused, QuantizeSpec(text=text), tmp_path / "rounded", compute=BFLOAT16)
    seen = hessians.copy()
    hessians.clear()
    quantize(fused, QuantizeSpec(text=text), tmp_path / "exact", compute=Compute("cpu"))
    assert {h.dtype for h in (*seen, *hessians)} == {torch.float64}
    for hessian, exact in zip(seen[:7], hessians[:7], strict=True):
        assert 0 < (hessian - exact).norm() < 2 * CHANGE * exact.norm()
    cards = [json.loads((folder / "kurtail.json").read_text()) for folder in (rounded, artefact)]
    assert [card["dtype"] for card in cards] == ["bfloat16", "float32"]
    ones, others = (load_file(folder / "model.safetensors") for folder in (artefact, rounded))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ones[name], others[name]), name

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "solve_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(fused, QuantizeSpec(text=text), tmp_path / "out", compute=BFLOAT16)
    with pytest.raises(ResumeMismatch, match="dtype is 'bfloat16', wanted 'float32'"):
        quantize(fused, QuantizeSpec(text=text), tmp_path / "out")


@pytest.mark.parametrize("which", ["fused", "artefact"])
def test_perplexity_in_bfloat16(which: str, text: TextSpec, cache: Path, request: pytest.FixtureRequest) -> None:
    """Logits that move by a part of themselves move the log-likelihood of a token by no more than twice the largest."""
    folder: Path = request.getfixturevalue(which)
    checkpoint = Checkpoint(folder)
    exact, rounded = (perplexity(checkpoint, text, Compute("cpu", dtype)) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert exact["perplexity"] != rounded["perplexity"]
    with torch.no_grad():
        ids = torch.arange(48)[None]
        largest = kurtail_pl.load(folder)(ids).logits.abs().max().item()
    change = torch.tensor(rounded["perplexity"] / exact["perplexity"]).log().abs().item()
    assert change < 2 * CHANGE * largest


def own_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every tensor that any module holds, registered or not."""
    found = []
    for name, module in model.named_modules():
        held = {**module.__dict__, **module._parameters, **module._buffers}
        found += [(f"{name}.{key}", value) for key, value in held.items() if isinstance(value, Tensor)]
    return found


def test_a_loaded_model_follows_to_a_device(artefact: Path) -> None:
    """Codes, scales, online rotations and rotary frequencies: nothing stays behind."""
    model = kurtail_pl.load(artefact)
    assert any(name.endswith("rotation.left") for name, _ in own_tensors(model))
    assert any(name.endswith("inv_freq") for name, _ in own_tensors(model))
    nn.Module.to(model, "meta")
    assert [name for name, tensor in own_tensors(model) if tensor.device.type != "meta"] == []


@torch.no_grad()
def test_a_loaded_model_follows_to_a_type(fused: Path, tmp_path: Path) -> None:
    """In float64 it writes what it writes in float32."""
    weights = Scheme(activations=None, cache=None)
    folder = quantize(fused, QuantizeSpec(weights, RTN()), tmp_path / "rtn")
    ids = torch.arange(40)[None]
    expected = kurtail_pl.load(folder)(ids).logits
    wide = nn.Module.to(kurtail_pl.load(folder), torch.float64)(ids).logits
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-3, atol=1e-3)
