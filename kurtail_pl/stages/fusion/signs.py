"""Signs of the online Hadamards: of several draws, those with which the inputs of linears are rounded best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_pl.errors import ConfigError, require_seed
from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_transform, random_hadamard_factors
from kurtail_pl.maths.orthogonal import random_signs
from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods.tuner import relative
from kurtail_pl.stages.fusion.scales import Part, ScaleSpec
from kurtail_pl.stages.fusion.scaling import scale_channels
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import settings_key, tokens_sha256
from kurtail_pl.storage.resume import resumable_work
from kurtail_pl.storage.rotation_file import hash_of
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.rotations import Rotations
from kurtail_pl.surgery.transform import RotateValues

ONLINE = ("attention_output", "mlp_hidden", "dense_hidden")
"""R4 and R5. The signs of R3 are not chosen: its keys may be centred before they are rounded, which fusion does not
know, and their offsets would decide."""
ROUNDING = Quantizer(4, symmetric=False)
"""Stands for the scheme, which fusion does not know either."""
SCALED: tuple[Part, ...] = ("values", "mlp_hidden")
"""Scales of channels that R4 and R5 mix."""

Draws = dict[str, list[HadamardFactors]]


def _short_windows() -> TextSpec:
    return TextSpec(windows=32, seqlen=64)


@dataclass(frozen=True)
class SignSpec:
    """Random signs of R4 and R5, chosen by the error of a 4-bit quantizer behind them; nothing is added at run time.

    Args:
        candidates: draws of each, of which the first are the rotations' own signs.
        text: its windows go through the original model; best none that the rotations have learned from.
        seed: draws the windows and the other signs.

    Raises:
        ConfigError: for fewer than two candidates.
    """

    candidates: int = 8
    text: TextSpec = field(default_factory=_short_windows)
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("signs.seed", self.seed)
        if self.candidates < 2:
            raise ConfigError(
                f"signs.candidates is {self.candidates}; give 2 or more to choose from, or write signs: null"
            )


def sign_windows(checkpoint: Checkpoint, signs: SignSpec) -> Windows:
    """Windows that signs are chosen on; raises TextError when the text is too short."""
    return cut_windows(checkpoint, signs.text, "calibration", seed=signs.seed)


def drawn(rotations: Rotations, signs: SignSpec) -> Draws:
    """The candidates of each online rotation that has signs, by its name; those of R4 in blocks are R2's."""
    generator, draws = torch.Generator().manual_seed(signs.seed), {}
    for name in ONLINE:
        own: HadamardFactors | None = getattr(rotations, name)
        if own is not None and not (own.signs is None and own.is_sylvester):
            draws[name] = [own, *(_redrawn(own, generator) for _ in range(signs.candidates - 1))]
    return draws


def _redrawn(own: HadamardFactors, generator: torch.Generator) -> HadamardFactors:
    """With other signs, where it has its own."""
    if own.signs is None:
        return random_hadamard_factors(own.size, generator)
    return replace(own, signs=random_signs(own.size, generator))


def with_signs(rotations: Rotations, signs: SignSpec, errors: Mapping[str, Sequence[float]]) -> Rotations:
    """The rotations with the best candidates in place of their own; their origin says which."""
    number = {name: min(range(len(found)), key=found.__getitem__) for name, found in errors.items()}
    chosen: dict[str, Any] = {name: draws[number[name]] for name, draws in drawn(rotations, signs).items()}
    note = {"seed": signs.seed, "candidates": signs.candidates, "chosen": number, "errors": dict(errors)}
    return replace(rotations, **chosen, origin={**rotations.origin, "signs": note})


@torch.no_grad()
def sign_errors(
    checkpoint: Checkpoint,
    rotations: Rotations,
    signs: SignSpec,
    windows: Tensor,
    scales: ScaleSpec | None = None,
    compute: Compute = AUTO,
) -> dict[str, list[float]]:
    """Error of rounding behind each candidate.

    It is the mean over layers and tokens of the rounding's square over the token's. The weights do not count: what the
    rounding adds is alike in all channels, and a Hadamard leaves the sum of a weight's squares as it is.

    Args:
        checkpoint: the original model.
        rotations: R2 turns the values before R4, and R4 and R5 are the first candidates.
        signs: how many candidates.
        windows: of tokens, ``[any number, any length]``.
        scales: channels that will be scaled; here the scales are measured on the same windows.
        compute: device and floating-point type of the layers.
    """
    scales = None if scales is None else scales.among(SCALED)
    recipe = {
        "model_sha256": checkpoint.sha256,
        "rotations_sha256": hash_of(rotations),
        "tokens_sha256": tokens_sha256(windows),
        "signs": [signs.candidates, signs.seed],
        "scales": None if scales is None else settings_key(scales),
        "dtype": compute.dtype,
    }
    draws = drawn(rotations, signs)
    if not draws:
        return {}
    with resumable_work(recipe) as work:
        walker = Walker(checkpoint, dtype=compute.torch_dtype, device=compute.torch_device)
        scaled = scale_channels(walker, scales)
        value = None if rotations.value is None else rotations.value.to(walker.device, walker.dtype)
        values = RotateValues(walker.architecture, value)
        sums: dict[str, list[float]] = work.state.setdefault("sums", {name: [0.0] * signs.candidates for name in draws})
        hidden = walker.hidden_states(windows, work)
        for index, layer in walker.layers("signs of R4 and R5", work):
            with scaled.watching(layer):
                hidden.after.fill(walker.advance(layer, states) for states in hidden.before)
            scaled.fold(layer, index)
            values.fold(layer, index)
            with _rounded(layer, walker.architecture, draws) as found:
                for states in hidden.before:
                    walker.advance(layer, states)
            for name, errors in found.items():
                sums[name] = [a + b / walker.n_layers for a, b in zip(sums[name], errors.tolist(), strict=True)]
        return sums


@contextmanager
def _rounded(layer: nn.Module, architecture: Architecture, draws: Draws) -> Iterator[dict[str, Tensor]]:
    """While a layer runs; afterwards, the mean error of what is read behind each candidate, ``[candidates]``."""
    readers = {"attention_output": [architecture.output]}
    for name in ("mlp_hidden", "dense_hidden"):
        readers[name] = [
            writer
            for writer in architecture.mlp_writers(layer)
            if name in draws and folding.linear_of(layer, writer).in_features == draws[name][0].size
        ]
    sums = {name: torch.zeros(len(candidates) + 1, dtype=torch.float64) for name, candidates in draws.items()}

    def see(name: str, rows: Tensor) -> None:
        errors = [_error(rows, factors) for factors in draws[name]]
        sums[name] += torch.tensor([*errors, float(len(rows))], dtype=torch.float64)

    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in draws:
            for reader in readers[name]:
                linear = folding.linear_of(layer, reader)
                hook = linear.register_forward_pre_hook(lambda _, read, name=name: see(name, read[0].flatten(0, -2)))
                stack.callback(hook.remove)
        yield found
    found |= {name: total[:-1] / total[-1].clamp(min=1) for name, total in sums.items()}


def _error(rows: Tensor, factors: HadamardFactors) -> float:
    """Sum over tokens ``[tokens, n]`` of the rounding's square over the token's."""
    turned = hadamard_transform(rows if factors.signs is None else rows * factors.signs.to(rows), factors)
    return float(relative(fake_quantize(turned, ROUNDING) - turned, turned))
