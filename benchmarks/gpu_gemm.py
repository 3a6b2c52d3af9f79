"""Codes and outputs of humming-kernels' product on linears of an exported folder, against the exporter's mirror."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from gpu_humming import Product, read_rule
from kurtail_vllm.groups import PACKED, input_arguments, weight_arguments
from kurtail_vllm.tensors import packed
from kurtail_vllm.transforms import Transform, transform_config
from kurtail_vllm.verify.folder import Served
from kurtail_vllm.verify.mirror import MirrorLinear, quantized
from safetensors.torch import save_file
from torch import Tensor, nn

from kurtail_pl.maths.hadamard import random_hadamard_factors
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import Uniform
from kurtail_pl.surgery.linear import QuantizedLinear

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative, of a number to the nearest."""
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
"""The smallest numbers, which two roundings miss by at most one."""
FLOAT32, BORDER = 2.0**-24, 2.0**-20
"""Roundings of float32; and what is this near to a half, in steps of the grid, may be rounded to either side: two
roundings, of the scale's inverse and of the product, are off by 7 * 2^-23 in 4 bits and 127 * 2^-23 in 8, where the
border is sixteen times as wide."""
TOKENS = 64

Make = Callable[[dict[str, Tensor], int], Product]


def random_folder(folder: Path, rows: int, columns: int, dtype: torch.dtype) -> Path:
    """A folder as the exporter writes it, of one down_proj with random weights, R5, and inputs of 4 bits."""
    generator, name = torch.Generator().manual_seed(0), "model.layers.0.mlp.down_proj"
    linear = QuantizedLinear(nn.Linear(columns, rows, bias=False, device="meta"), None, None)
    weights = Uniform(scales="float16")
    quantized_weight = weights.nearest(torch.randn(rows, columns, generator=generator) / columns**0.5)
    if dtype == torch.bfloat16:
        # The rounder knows the numbers of float16; these are for a look at the other type.
        grid = quantized_weight.grid
        quantized_weight = quantized_weight._replace(grid=grid._replace(scale=grid.scale.to(dtype).float()))
    linear.pack(quantized_weight, weights)
    online = Transform("mlp_hidden", random_hadamard_factors(columns, generator), "mlp.down_proj")
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weight_arguments(weights.quantizer),
        input_activations=input_arguments(Quantizer()),
        format=PACKED,
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=PACKED)
    given = config.model_dump(mode="json", exclude_unset=True) | {"transform_config": transform_config([online])}
    tensors = packed(name, quantized_weight, linear, dtype) | {f"{name}.mlp_hidden_input.weight": online.matrix(dtype)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": given}), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def linears(folder: Path, most: int) -> Iterator[dict[str, Any]]:
    """Quantized linears of the first decoder layers: their tensors, mirror and bits."""
    served = Served(folder)
    names = [name.removesuffix(".weight_packed") for name in served.names if name.endswith(".weight_packed")]
    if not names:
        raise ValueError(f"{folder} has no weights of the layout pack-quantized")
    for name in sorted(names)[:most]:
        tensors, mirror = served.weight(name), MirrorLinear(served, name)
        yield {"name": name, "tensors": tensors, "mirror": mirror}


def compare(folder: Path, make: Make, device: str, most: int = 7) -> dict[str, Any]:
    """Every linear of the folder's first layers; what is compared, and ``failures`` in words."""
    found: dict[str, Any] = {"linears": {}, "failures": []}
    for linear in linears(folder, most):
        name, mirror, tensors = linear["name"], linear["mirror"], linear["tensors"]
        if why := reason_against(mirror, tensors):
            found["linears"][name] = {"left out": why}
            continue
        product = make(tensors, mirror.inputs.num_bits)
        dtype = tensors["weight_scale"].dtype
        # A token with outliers among ordinary ones, as models have them.
        x = torch.randn(TOKENS, mirror.weight.shape[1], generator=torch.Generator().manual_seed(1))
        x[::7, ::61] *= 30
        result = one_linear(product, mirror, x.to(dtype), device)
        found["linears"][name] = result
        found["failures"] += [f"{name}: {what}" for what in result["failures"]]
    return found


def reason_against(mirror: MirrorLinear, tensors: dict[str, Tensor]) -> str:
    """Why a linear is not for this product, or nothing."""
    if mirror.inputs is None:
        return "its inputs stay float"
    if tensors["weight_scale"].shape[1] != 1 or mirror.inputs.group_size is not None:
        return "scales of groups are added up in another order, for which no bound is derived here"
    if tensors["weight_scale"].dtype not in ROUNDING:
        return f"its scales are {tensors['weight_scale'].dtype}, for which vLLM has no kernels"
    if "weight_zero_point" in tensors or tensors["weight_packed"].shape[1] * 8 != mirror.weight.shape[1]:
        return "its weights are not symmetric ones of 4 bits"
    return ""


def one_linear(product: Product, mirror: MirrorLinear, x: Tensor, device: str) -> dict[str, Any]:
    """Transform, codes, scales and outputs of one linear, each against double."""
    assert mirror.inputs is not None
    failures: list[str] = []
    result: dict[str, Any] = {"kernel": product.chosen(len(x)), "failures": failures}
    if mirror.matrix is not None:
        x, result["transform error over bound"] = transformed(x, mirror.matrix, device, failures)
    codes, scale = (tensor.cpu() for tensor in product.quantized(x.to(device)))
    result |= compare_codes(x, codes, scale, mirror, failures)
    reference = (codes.double() * scale.double().unsqueeze(-1)) @ mirror.weight.T
    whole, split = (multiply(x.to(device)).double().cpu() for multiply in (product.whole, product.split))
    rounding = ROUNDING[x.dtype]
    # Two roundings to the type, and one of float32; the sum of codes is exact below 2^24.
    bound = (2 * rounding + rounding**2 + 2 * FLOAT32) * reference.abs() + 2 * TINY[x.dtype]
    result["output error over bound"] = float(((whole - reference).abs() / bound).max())
    result["output error, relative"] = float((whole - reference).norm() / reference.norm())
    result["split sums, relative"] = float((split - reference).norm() / reference.norm())
    exact = quantized(x.double(), mirror.inputs) @ mirror.weight.T
    result["output against the mirror's, relative"] = float((whole - exact).norm() / exact.norm())
    if not result["output error over bound"] <= 1:
        failures.append("outputs are further from codes times scales than their roundings explain")
    return result


def transformed(x: Tensor, matrix: Tensor, device: str, failures: list[str]) -> tuple[Tensor, float]:
    """What the linear reads behind its transform, in the model's type as vLLM multiplies it, and its error."""
    root = len(matrix) ** 0.5
    # vLLM divides what it has read in the model's type.
    stored = (matrix * root).to(x.dtype).to(device) / root
    turned = (x.to(device) @ stored).cpu()
    exact = x.double() @ matrix
    rounding = ROUNDING[x.dtype]
    # Entries and sums are rounded to the type, and products are added in float32.
    share = rounding * (1 + rounding) + len(matrix) * FLOAT32
    bound = share * (x.double().abs() @ matrix.abs()) + rounding * exact.abs() + TINY[x.dtype]
    error = float(((turned.double() - exact).abs() / bound).max())
    if not error <= 1:
        failures.append("the transform is further from x W / sqrt(n) than its roundings explain")
    return turned, error


def compare_codes(
    x: Tensor, codes: Tensor, scale: Tensor, mirror: MirrorLinear, failures: list[str]
) -> dict[str, float | int]:
    """Codes and scales of what the linear reads: equal to the rule in float32, and to the mirror but on borders."""
    assert mirror.inputs is not None
    wanted, wanted_scale = read_rule(x, mirror.inputs.num_bits)
    largest = (1 << (mirror.inputs.num_bits - 1)) - 1
    exact_scale = x.double().abs().amax(-1, keepdim=True) / largest
    steps = x.double() / exact_scale
    mirrored = (quantized(x.double(), mirror.inputs) / exact_scale).round()
    other = codes != mirrored
    beyond = other & (((steps - steps.floor()) - 0.5).abs() > BORDER * (largest + 1) / 8)
    result: dict[str, float | int] = {
        "codes": codes.numel(),
        "codes unlike the rule in float32": int((codes != wanted).sum()),
        "scales unlike": int((scale != wanted_scale).sum() + (scale != exact_scale.squeeze(-1).float()).sum()),
        "codes unlike the mirror's, on a border": int((other & ~beyond).sum()),
        "codes unlike the mirror's, elsewhere": int(beyond.sum()),
    }
    failures += [
        f"{count} {what}" for what, count in result.items() if "unlike" in what and "on a" not in what and count
    ]
    return result
