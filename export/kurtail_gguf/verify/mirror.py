"""What llama.cpp computes on a CPU, in torch: float weights as the file has them, inputs of linears in int8 blocks."""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers import PreTrainedModel

from kurtail_gguf.blocks import BLOCK
from kurtail_gguf.families import linears_of, norms_of
from kurtail_gguf.tensors import EMBEDDING, FINAL_NORM, HEAD
from kurtail_gguf.verify.file import Written
from kurtail_pl.artefact.source import Source
from kurtail_pl.surgery.equip import empty_model


def float_model(source: Source, written: Written) -> PreTrainedModel:
    """Transformers' own model with the numbers of a file, nothing quantized, on the CPU."""
    model, record = empty_model(source.config), source.architecture
    for name, module in ((EMBEDDING, record.embedding), (FINAL_NORM, record.final_norm), (HEAD, record.head)):
        _put(model, module, "weight", written, name)
    for index, layer in enumerate(source.layers):
        prefix = source.layer_name(index)
        for norm in norms_of(source, index):
            _put(model, norm.modules[0], "weight", written, f"{norm.name}.weight")
        if router := record.router_of(layer):
            _put(model, f"{prefix}.{router}", "weight", written, f"blk.{index}.ffn_gate_inp.weight")
        for part in linears_of(source, index):
            values = torch.from_numpy(written.values(f"{part.name}.weight"))
            for module, weight in zip(part.modules, values if part.stacked else [values], strict=True):
                model.get_submodule(module).weight = nn.Parameter(weight, requires_grad=False)
            if f"{part.name}.bias" in written.tensors:
                _put(model, part.modules[0], "bias", written, f"{part.name}.bias")
    return model


def _put(model: nn.Module, module: str, ending: str, written: Written, name: str) -> None:
    values = torch.from_numpy(written.values(name).copy())
    setattr(model.get_submodule(module), ending, nn.Parameter(values, requires_grad=False))


def round_inputs(model: PreTrainedModel, source: Source, written: Written) -> None:
    """Let linears round what they read as llama.cpp does."""
    _round(model.get_submodule(source.architecture.head), written.kind(HEAD))
    for index in range(len(source.layers)):
        for part in linears_of(source, index):
            name = f"{part.name}.weight"
            for number, module in enumerate(part.modules):
                linear = model.get_submodule(module)
                _round(linear, written.kind(name))
                if written.kind(name) == Kind.Q4_1:
                    minima = torch.from_numpy(written.minima(name))
                    _sum_apart(linear, minima[number] if part.stacked else minima)


def _round(linear: nn.Module, kind: Kind) -> None:
    rounded = half if kind == Kind.F16 else int8
    linear.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))


def _sum_apart(linear: nn.Module, minima: Tensor) -> None:
    """Let a linear multiply the smallest values of blocks ``[out, blocks]`` with sums of inputs that are rounded."""
    surplus: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, inputs: surplus.append(lost_sums(inputs[0])), prepend=True)
    linear.register_forward_hook(lambda module, inputs, output: output + surplus.pop() @ minima.T)


def half(x: Tensor) -> Tensor:
    """Beside weights in float16."""
    return x.half().float()


def int8(x: Tensor) -> Tensor:
    """Beside quantized weights: 127 steps up to the largest of 32 numbers, the step stored in float16."""
    codes, step = _blocks(x)
    return (codes * half(step)).reshape(x.shape)


def lost_sums(x: Tensor) -> Tensor:
    """What llama.cpp's sum of each block, ``[..., blocks]``, is too large by: it is in float16, beside the codes."""
    codes, step = _blocks(x)
    total = codes.sum(-1, keepdim=True)
    return (half(step * total) - half(step) * total).squeeze(-1)


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[..., blocks, 32]`` and their steps ``[..., blocks, 1]``."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    return torch.round(blocks * torch.where(largest > 0, 127 / largest, 0)), largest / 127
