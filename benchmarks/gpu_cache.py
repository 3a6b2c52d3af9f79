"""The rule of vLLM's cache `int4_per_token_head` as its own kernel writes it, against `Int4PerTokenHead`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from kurtail_pl.methods import Int4PerTokenHead

PLACE = "vllm.v1.attention.ops.int4_per_token_head"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BFLOAT16 = 2.0**-8
BORDER = 15 * 2.0**-19
"""What is this near to a half, in steps, may be rounded to either side: quotients of Triton are off by two units in
the last place, each of 15 steps by 2^-23 or less a unit, and a dozen of such are room enough."""
SCALE = 2.0**-18
"""A scale's last four bits are the zero point's: one that is off by two units may lose another sixteen."""


class Writer(Protocol):
    """What turns rows ``[tokens, heads, head_dim]``, and writes turned rows into a cache."""

    def turned(self, rows: Tensor) -> Tensor:
        """As the kernel will read them, float32."""

    def written(self, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes ``[tokens, heads, head_dim / 2]`` and scales ``[tokens, heads]`` of turned rows."""


class Kernel:
    """vLLM's module, or its file alone beside a Triton that is installed.

    Args:
        source: that file; None imports vLLM.
    """

    def __init__(self, source: Path | None) -> None:
        self.module: Any = importlib.import_module(PLACE) if source is None else alone(source)

    def turned(self, rows: Tensor) -> Tensor:
        """What `reshape_and_cache_int4` does before its kernel."""
        turned: Tensor = self.module.single_rht(rows.cuda().float()).to(rows.dtype)
        return turned

    def written(self, turned: Tensor) -> tuple[Tensor, Tensor]:
        """By the kernel that has no turn in it; keys and values are the same rows."""
        tokens, heads, width = turned.shape
        turned = turned.cuda().contiguous()
        blocks = -(-tokens // 16)
        caches = [torch.zeros(blocks, 16, heads, width // 2, dtype=torch.uint8, device="cuda") for _ in range(2)]
        scales = [torch.zeros(blocks, 16, heads, device="cuda") for _ in range(2)]
        self.module._run_reshape_kernel(
            self.module._reshape_cache_int4_kernel,
            key=turned,
            value=turned,
            key_cache=caches[0],
            value_cache=caches[1],
            k_scale_cache=scales[0],
            v_scale_cache=scales[1],
            slot_mapping=torch.arange(tokens, device="cuda"),
            packing_factor=2,
        )
        if not torch.equal(caches[0], caches[1]):
            raise ValueError("keys and values of the same numbers were written differently")
        return caches[0].flatten(0, 1)[:tokens].cpu(), scales[0].flatten(0, 1)[:tokens].cpu()


class _Anything(ModuleType):
    """A module with every name in it, for what the kernel of the cache does not call."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def alone(source: Path) -> Any:
    """The module of a file of vLLM's, whose imports of vLLM are met by as little as its writing kernel needs."""
    import triton
    import triton.language

    platform = SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn, is_rocm=lambda: False, is_xpu=lambda: False, is_cuda=lambda: False
    )
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": triton.language, "triton": triton},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"largest_power_of_2_divisor": lambda number: number & -number},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.ops": {},
        "vllm.v1.attention.ops.triton_attention_helpers": {},
        "vllm.v1.attention.ops.triton_unified_attention": {},
    }
    spec = importlib.util.spec_from_file_location("int4_per_token_head", source)
    if spec is None or spec.loader is None:
        raise ValueError(f"{source} is no Python file")
    module = importlib.util.module_from_spec(spec)
    for name, members in names.items():
        sys.modules[name] = _Anything(name)
        vars(sys.modules[name]).update(members)
    # Triton looks its functions up by the module's name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for name in names:
            del sys.modules[name]
    return module


class Emulated:
    """What the kernel was read to write, on a CPU."""

    def turned(self, rows: Tensor) -> Tensor:
        """By a product in float32, rounded to bfloat16 on its way as vLLM's is."""
        turn = Int4PerTokenHead().key_turn(rows.shape[-1], torch.device("cpu"))
        return (rows.bfloat16().float() @ turn.forth).bfloat16().to(rows.dtype)

    def written(self, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Even channels in the low halves of bytes, and zero points in the last four bits of scales."""
        x = turned.float()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = (-low / scale + 0.5).clamp(0.0, 15.0).int()
        codes = (x * (1 / scale) + zero + 0.5).clamp(0.0, 15.0).to(torch.uint8)
        bits = (scale.view(torch.int32) & -16) | zero
        return codes[..., ::2] | codes[..., 1::2] << 4, bits.view(torch.float32).squeeze(-1)


def compare(writer: Writer, head_dims: tuple[int, ...] = (64, 128), tokens: int = 256) -> dict[str, Any]:
    """The turn, and the writing of turned rows, for each width of heads and type; ``failures`` in words."""
    found: dict[str, Any] = {"failures": []}
    for width in head_dims:
        for name, dtype in DTYPES.items():
            rows = torch.randn(tokens, 8, width, generator=torch.Generator().manual_seed(width))
            rows[..., 5] *= 20
            rows[1::2] += 3
            result = one_type(writer, rows.to(dtype))
            found[f"heads of {width}, {name}"] = result
            found["failures"] += [f"heads of {width}, {name}: {what}" for what in result.pop("failures")]
    return found


def one_type(writer: Writer, rows: Tensor) -> dict[str, Any]:
    """Of rows in a model's type."""
    cache, failures = Int4PerTokenHead(), list[str]()
    turn = cache.key_turn(rows.shape[-1], torch.device("cpu"))
    turned, exact = writer.turned(rows).cpu(), rows.double() @ turn.forth.double()
    # The row, two halves of the transform and its root are each rounded to bfloat16, and the result to the type:
    # none of what is rounded is larger than the sum of the row's magnitudes.
    bound = 5 * BFLOAT16 * (1 + 5 * BFLOAT16) * rows.double().abs().sum(-1, keepdim=True)
    result: dict[str, Any] = {"turn error over bound": float(((turned.double() - exact).abs() / bound).max())}
    if not result["turn error over bound"] <= 1:
        failures.append("rows are not turned by the mirror's matrix")
    stored, scale = writer.written(turned)
    result |= compare_rows(cache, turned, stored, scale, failures)
    # Of the whole way, with the mirror's own turn, which is not rounded to bfloat16.
    read = values(stored, scale)
    mirrored = cache.rounded(rows.float() @ turn.forth, rows.dtype)
    error, lost = ((kept.double() - exact).norm() / exact.norm() for kept in (read, mirrored))
    return result | {"error, relative": float(error), "the mirror's": float(lost), "failures": failures}


def values(stored: Tensor, scale: Tensor) -> Tensor:
    """What bytes stand for as vLLM's attention reads them."""
    codes = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)
    bits = scale.view(torch.int32)
    step = (bits & -16).view(torch.float32)
    return (codes.float() - (bits & 15).unsqueeze(-1)) * step.unsqueeze(-1)


def compare_rows(
    cache: Int4PerTokenHead, turned: Tensor, stored: Tensor, scale: Tensor, failures: list[str]
) -> dict[str, int | float]:
    """Rows as they are read against the mirror's, which has the same turned rows, in steps of their grids."""
    exact = turned.double()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-6)
    written = (scale.view(torch.int32) & -16).view(torch.float32).double().unsqueeze(-1)
    zero = -low / step
    border_row = near_half(zero) & (zero < 15.5)
    border = near_half(exact / step + (zero + 0.5).floor().clamp(0, 15))
    read, mirrored = values(stored, scale).double(), cache.rounded(turned.float(), turned.dtype).double()
    # Scales that differ in the last place move a value by a share of itself: codes are compared.
    apart = ((read / written).round() - (mirrored / step).round()).abs() > 0
    wrong = apart & ~border & ~border_row
    result: dict[str, int | float] = {
        "values": read.numel(),
        "equal bit for bit": int((read == mirrored).sum()),
        "codes apart on a border": int((apart & ~wrong).sum()),
        "codes apart elsewhere": int(wrong.sum()),
        "scale error over bound": float(((written / step - 1).abs() / SCALE).max()),
    }
    if result["codes apart elsewhere"]:
        failures.append(f"{result['codes apart elsewhere']} codes are not the mirror's")
    if not result["scale error over bound"] <= 1:
        failures.append("scales are not the mirror's")
    return result


def near_half(steps: Tensor) -> Tensor:
    """Whether numbers are as near to a half as may be rounded to either side."""
    return ((steps - steps.floor()) - 0.5).abs() <= BORDER
