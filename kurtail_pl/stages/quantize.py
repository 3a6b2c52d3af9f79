"""Quantize: a fused model's weights to integers by RTN or GPTQ, layer by layer, into an artefact folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.gptq import GPTQ, gptq
from kurtail_pl.maths.quantizers import Quantized, Quantizer
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.stages.fuse import UNROTATED, copy_companions
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import new_folder, require_space
from kurtail_pl.storage.folder import ShardWriter, named, read_card, rotations_of, write_card
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import empty_model, equip_model
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.scheme import Scheme

log = logging.getLogger(__name__)

FLOAT_DTYPE = torch.float16
"""Of embeddings, head, norms and unquantized weights: rotated weights are small, and float16 rounds them eight times
finer than bfloat16."""

INHERITED = ("source", "tokenizer_sha256", "rotations", "rotations_sha256", "gate")
"""What an artefact's card takes over from the fused model's."""


@dataclass(frozen=True)
class QuantizeSpec:
    """How weights become integers.

    Args:
        scheme: bits of weights, activations, keys and values.
        method: ``rtn`` or ``gptq``.
        gptq: settings of GPTQ.
        text: calibration text of GPTQ.
        quantized_activations: let the Hessians see activations and KV as quantized as they will be.
        seed: draws the calibration windows.
    """

    scheme: Scheme = field(default_factory=Scheme)
    method: Literal["rtn", "gptq"] = "gptq"
    gptq: GPTQ = field(default_factory=GPTQ)
    text: TextSpec = field(default_factory=TextSpec)
    quantized_activations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("rtn", "gptq"):
            raise ConfigError(f"method is {self.method!r}; weights are quantized by rtn or gptq")

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs of the linears are used."""
        return self.scheme.weights is not None and self.method == "gptq"


def quantize(fused: Path, spec: QuantizeSpec, folder: Path, overwrite: bool = False) -> Path:
    """Write an artefact folder from a fused model.

    Args:
        fused: folder that `fuse` wrote.
        spec: scheme and method.
        folder: where the artefact goes.
        overwrite: replace the folder if it exists.

    Raises:
        ArtefactError: when `fused` is not a fused model, or the folder exists.
        TextError: when the calibration text is too short.
        DiskFull: when the artefact does not fit.
    """
    fused_card = read_card(fused)
    checkpoint = Checkpoint(fused)
    scheme, rotations = spec.scheme, rotations_of(fused)
    model = empty_model(checkpoint.config)
    online = scheme if spec.quantized_activations else replace(scheme, activations=None, keys=None, values=None)
    equip_model(model, online, rotations)
    walker = Walker(checkpoint, model)
    solver = _Solver(spec)
    text = calibration_windows(checkpoint, spec)
    require_space(folder, checkpoint.size // 2)
    with new_folder(folder, overwrite) as partial:
        with Meter() as meter:
            _write_weights(walker, solver, None if text is None else text.tokens, partial)
        checkpoint.config.save_pretrained(partial)
        copy_companions(checkpoint, partial)
        write_rotations(partial / ROTATIONS, rotations)
        card: dict[str, Any] = {
            **{key: fused_card[key] for key in INHERITED},
            # Without rotations, a method is how the weights are rounded.
            "method": spec.method if fused_card["method"] == UNROTATED else fused_card["method"],
            "scheme": scheme.to_dict(),
            "quantize": asdict(spec),
            "calibration_text_sha256": None if text is None else text.text_sha256,
            "fallbacks": solver.fallbacks,
            "cost": {**fused_card["cost"], "quantize": meter.to_dict()},
            "versions": versions(),
        }
        write_card(partial, card)
    log.info("quantized to %s in %.0f s (%.0f CPU s): %s", scheme.name, meter.seconds, meter.cpu_seconds, folder)
    return folder


def calibration_windows(checkpoint: Checkpoint, spec: QuantizeSpec) -> Windows | None:
    """Windows that GPTQ's Hessians are made from; None where no inputs are needed."""
    if not spec.needs_inputs:
        return None
    return cut_windows(checkpoint.tokenizer(), spec.text, "calibration", seed=spec.seed)


@torch.no_grad()
def _write_weights(walker: Walker, solver: _Solver, windows: Tensor | None, folder: Path) -> None:
    architecture = walker.architecture
    shards = ShardWriter(folder, shards=walker.n_layers + 2)

    def write(prefix: str, module: nn.Module) -> dict[str, Tensor]:
        state = module.state_dict()
        # Scales stay float32: there is one for thousands of weights.
        return named(prefix, {k: v if k.endswith("scale") else _half(v) for k, v in state.items()})

    embedding = walker.embedding()
    shards.write(write(architecture.embedding, embedding))
    hidden = [] if windows is None else [embedding(window.unsqueeze(0)) for window in windows]
    embedding.to("meta")
    for index, layer in walker.layers(f"{solver.spec.method} layers"):
        hidden = _quantize_layer(walker, layer, hidden, solver, f"{architecture.layers}.{index}")
        shards.write(write(f"{architecture.layers}.{index}", layer))
    norm, head = walker.head()
    shards.write({**write(architecture.final_norm, norm), **write(architecture.head, head)})
    shards.close()


def _half(tensor: Tensor) -> Tensor:
    return tensor.to(FLOAT_DTYPE) if tensor.is_floating_point() else tensor


def _quantize_layer(
    walker: Walker, layer: nn.Module, hidden: list[Tensor], solver: _Solver, prefix: str
) -> list[Tensor]:
    """Quantize a decoder layer's linears in the order data reaches them; returns the hidden states after it.

    Each linear sees inputs that went through the linears already quantized. A block whose last linear is set aside
    returns that linear's input, so one forward pass serves all Hessians of a layer.
    """
    architecture = walker.architecture

    def linears(names: tuple[str, ...]) -> dict[str, QuantizedLinear]:
        found = {name: layer.get_submodule(name) for name in names}
        return {f"{prefix}.{name}": linear for name, linear in found.items() if isinstance(linear, QuantizedLinear)}

    def block(name: str, x: Tensor) -> Tensor:
        output = layer.get_submodule(name)(x, **(walker.positions(x) if name == architecture.attention else {}))
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    for block_name, norm_name, readers, writer in (
        (architecture.attention, architecture.attention_norm, architecture.attention_readers, architecture.output),
        (architecture.mlp, architecture.mlp_norm, architecture.mlp_readers, architecture.down),
    ):
        norm = layer.get_submodule(norm_name)
        normed = [norm(h) for h in hidden]
        solver.solve(linears(readers), normed)
        last = linears((writer,))
        with _set_aside(layer, writer) as linear:
            inner = [block(block_name, x) for x in normed]
            solver.solve(last, inner)
            hidden = [h + linear(x) for h, x in zip(hidden, inner, strict=True)]
    return hidden


@contextmanager
def _set_aside(layer: nn.Module, name: str) -> Iterator[nn.Module]:
    """Put the identity in a linear's place for a while."""
    linear = layer.get_submodule(name)
    layer.set_submodule(name, nn.Identity())
    try:
        yield linear
    finally:
        layer.set_submodule(name, linear)


class _Solver:
    """Turns weights into codes, by RTN or GPTQ, and remembers where GPTQ had to give way to RTN."""

    def __init__(self, spec: QuantizeSpec) -> None:
        self.spec = spec
        self.fallbacks: list[str] = []

    def solve(self, linears: dict[str, QuantizedLinear], inputs: list[Tensor]) -> None:
        """Quantize linears that read the same inputs, a list of ``[1, tokens, in]``."""
        quantizer = self.spec.scheme.weights
        if quantizer is None:
            return
        hessian = _hessian(next(iter(linears.values())), inputs) if self.spec.needs_inputs else None
        for name, linear in linears.items():
            assert linear.weight is not None
            linear.pack(self._codes(name, linear.weight, hessian, quantizer), quantizer)

    def _codes(self, name: str, weight: Tensor, hessian: Tensor | None, quantizer: Quantizer) -> Quantized:
        grid = search_grid(weight, quantizer)
        if hessian is not None:
            try:
                return gptq(weight, hessian, grid, quantizer, self.spec.gptq)
            except LinAlgError:
                log.warning("%s: the Hessian is not positive definite; its weight is rounded to nearest", name)
                self.fallbacks.append(name)
        return round_to_nearest(weight, grid, quantizer)


def _hessian(linear: QuantizedLinear, inputs: list[Tensor]) -> Tensor:
    """``X^T X`` over all tokens of what the linear's weight multiplies, ``[in, in]`` float64."""
    total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    for x in inputs:
        rows = linear.prepare(x).flatten(0, -2)
        total += rows.T @ rows
    return total
