"""Every streaming stage on CUDA against the same on the CPU, and a loaded model moved there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import tensors_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import kurtail_pl
from kurtail_pl.methods import GPTQ, RTN, Rounder
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import block_sites, value_sites
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import Compute
from kurtail_pl.surgery.rotations import random_rotations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, CUDA = Compute("cpu"), Compute("cuda")


@pytest.fixture
def text(text_file: Path) -> TextSpec:
    return TextSpec(str(text_file), windows=6, seqlen=48)


@pytest.fixture
def fused(tiny: Path, tmp_path: Path) -> Path:
    rotations = random_rotations(AutoConfig.from_pretrained(tiny), 0)
    return fuse(Checkpoint(tiny), rotations, "quarot", tmp_path / "fused", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_rows(tiny: Path, text: TextSpec, tmp_path: Path, dtype: str) -> None:
    """Stored in bfloat16: a last digit may fall to the other side."""
    spec = CaptureSpec(str(tiny), text, rows=50)
    here, there = (capture(spec, tmp_path / d, compute=Compute(d, dtype)) for d in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert here is not None
    assert there is not None
    assert here.origin == there.origin
    tolerance = 2.0**-8 if dtype == "float32" else 4 * 24 * 2.0**-9
    for site in (*block_sites(4), *value_sites(4)):
        exact = here.read(site, 0, 50)
        assert (there.read(site, 0, 50) - exact).norm() < tolerance * exact.norm(), site


def test_fused_weights(tiny: Path, fused: Path, tmp_path: Path) -> None:
    """Float64 on both, written in float32."""
    rotations = random_rotations(AutoConfig.from_pretrained(tiny), 0)
    there = tensors_of(fuse(Checkpoint(tiny), rotations, "quarot", tmp_path / "there", device="cuda"))
    for name, tensor in tensors_of(fused).items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rounder", [RTN(), GPTQ()])
def test_codes_and_perplexity(fused: Path, text: TextSpec, tmp_path: Path, cache: Path, rounder: Rounder) -> None:
    """The first linears read the same inputs: only ties are decided otherwise.

    Activations are left float: where one lies on the edge between two codes, a last bit decides, and a random model's
    perplexity of a thousand moves by parts of a hundred.
    """
    spec = QuantizeSpec(Scheme(activations=None, cache=None), rounder, text=text)
    here, there = (quantize(fused, spec, tmp_path / c.device, compute=c) for c in (CPU, CUDA))
    name = "model.layers.0.self_attn.q_proj.codes"
    assert (tensors_of(here)[name] != tensors_of(there)[name]).double().mean() < 1e-2
    assert json.loads((there / "kurtail.json").read_text())["fallbacks"] == []
    exact = perplexity(Checkpoint(here), text, CPU)["perplexity"]
    assert perplexity(Checkpoint(here), text, CUDA)["perplexity"] == pytest.approx(exact, rel=1e-3)
    assert perplexity(Checkpoint(here), text, Compute("cuda", "bfloat16"))["perplexity"] == pytest.approx(
        exact, rel=0.2
    )
    assert perplexity(Checkpoint(there), text, CPU)["perplexity"] == pytest.approx(exact, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device_map": "auto"}, {"device_map": {"": 0}}])
def test_a_loaded_model_on_the_device(fused: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = quantize(fused, QuantizeSpec(rounder=RTN()), tmp_path / "rtn", compute=CPU)
    ids = torch.arange(40)[None]
    expected = kurtail_pl.load(folder)(ids).logits
    model = kurtail_pl.load(folder, **options)
    assert model.lm_head.weight.is_cuda
    # An activation on the edge between two codes may fall to the other side.
    assert (model(ids.cuda()).logits.cpu() - expected).norm() < 0.05 * expected.norm()
    model.save_pretrained(tmp_path / "saved")


def test_memory_of_the_device_is_a_layer_or_the_embedding(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """All layers at once would be 268 MB in float32; room is left for what the libraries take."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capture(CaptureSpec(str(tmp_path / "model"), text, rows=50), tmp_path / "store", compute=CUDA)
    cost = json.loads((tmp_path / "store" / "cost.json").read_text())
    assert 4 * 2_600_000 < cost["device_peak_bytes"] < 120e6
