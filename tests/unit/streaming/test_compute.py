"""Settings of the walk, and bfloat16 against float32 and float64 of the same walk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from walks import embed

from kurtail_pl.errors import ConfigError
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker

WINDOWS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(0))
ROUNDOFF = 2.0**-9
"""Of bfloat16: half of the distance from 1 to the next number."""
ROUNDINGS = 24
"""Of the hidden states in one layer of the tiny model: two norms, seven linears with their biases and rounded weights,
scores, softmax, gate, two sums."""


@torch.no_grad()
def last_states(folder: Path, compute: Compute) -> Tensor:
    walker = Walker(Checkpoint(folder), dtype=compute.torch_dtype, device=compute.torch_device)
    hidden = embed(walker, WINDOWS)
    for _, layer in walker.layers("test"):
        hidden = [walker.advance(layer, h) for h in hidden]
    assert {h.dtype for h in hidden} == {compute.torch_dtype}
    return torch.cat(hidden).double()


def test_bfloat16_is_within_its_roundings_of_float32(tiny: Path) -> None:
    """Each rounding moves a state by less than the roundoff, and they add up as independent errors do, or less well."""
    exact, rounded = (last_states(tiny, Compute("cpu", dtype)) for dtype in ("float32", "bfloat16"))  # type: ignore[arg-type]
    change = ((rounded - exact).norm() / exact.norm()).item()
    assert ROUNDOFF / 2 < change < 4 * ROUNDINGS * ROUNDOFF


def test_scales_of_packed_weights_stay_float32(tiny: Path, tmp_path: Path) -> None:
    walker = Walker(Checkpoint(tiny), dtype=torch.bfloat16)
    layer = torch.nn.Module()
    layer.register_buffer("scale", torch.zeros(2, device="meta"))
    layer.register_buffer("codes", torch.zeros(2, dtype=torch.uint8, device="meta"))
    layer.register_buffer("bias", torch.zeros(2, device="meta"))
    tensors = {"scale": torch.tensor([0.1, 0.2]), "codes": torch.ones(2).byte(), "bias": torch.ones(2)}
    walker._put(layer, tensors, "layer")
    found = {name: tensor.dtype for name, tensor in layer.named_buffers()}
    assert found == {"scale": torch.float32, "codes": torch.uint8, "bias": torch.bfloat16}
    assert torch.equal(layer.scale, tensors["scale"])


def test_an_embedding_may_have_a_type_of_its_own(tiny: Path) -> None:
    """What is written out is not rounded to what is computed in."""
    walker = Walker(Checkpoint(tiny), dtype=torch.bfloat16)
    assert walker.embedding().weight.dtype == torch.bfloat16
    expected = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(walker.embedding(torch.float32).weight, expected)


@pytest.mark.parametrize(("field", "value"), [("device", "tpu"), ("dtype", "float16"), ("dtype", "int8")])
def test_other_settings_are_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is '{value}'; choose"):
        Compute(**{field: value})  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert AUTO.torch_device.type == Compute("cuda").torch_device.type == "cuda"
        return
    assert AUTO.torch_device.type == "cpu"
    assert not AUTO.on_cuda
    assert Compute("cuda").on_cuda, "a plan is made for the machine that is meant"
    with pytest.raises(ConfigError, match="finds no CUDA device here; choose cpu or auto"):
        Compute("cuda").torch_device  # noqa: B018
