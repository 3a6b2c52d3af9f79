"""Draws the figures of docs/concepts.md from SmolLM2-135M, after `kurtail fit --config smollm2-135m`.

`python docs/figures.py` reads what was captured and learned, and writes into docs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.kurtosis import kurtosis, rms_norm
from kurtail_pl.maths.quantizers import Quantizer, dequantize, quantize
from kurtail_pl.methods import CacheFormat, default_cache
from kurtail_pl.stages.reporting.figures.kurtosis import draw_kurtosis_by_layer
from kurtail_pl.stages.reporting.figures.style import COLOURS, GREY, NORMALISED, new_figure
from kurtail_pl.storage.activations import ActivationStore, block_sites
from kurtail_pl.storage.rotation_file import read_rotations
from kurtail_pl.storage.sources import config_of
from kurtail_pl.surgery.rotations import head_dim_of

DOCS = Path(__file__).resolve().parent
RUN = Path("runs/smollm2-135m")
ROWS = 1024
"""The held-out rows of the store, which no method learned from."""
ACTIVATIONS = Quantizer(bits=4, clip=Clip(amount=0.9))
"""As configs/base.yaml has it."""
TOKENS = (0, 2048, 4096, 6144, 8192)


def kurtosis_by_layer(store: ActivationStore, bases: dict[str, Tensor | None], eps: float) -> Figure:
    """Of each block input, before and after."""
    found: dict[str, list[Tensor]] = {name: [] for name in bases}
    for site in block_sites(store.shape.layers):
        rows = held_out(store, site, eps)
        for name, basis in bases.items():
            found[name].append(kurtosis((rows if basis is None else rows @ basis).double().flatten()))
    return draw_kurtosis_by_layer({name: torch.stack(values).view(-1, 2) for name, values in found.items()})


def levels(store: ActivationStore, bases: dict[str, Tensor | None], eps: float) -> Figure:
    """One token's numbers on the levels of its grid, before and after."""
    rows = held_out(store, f"layer{store.shape.layers // 2:03d}.attn_in", eps)
    middle = rows.abs().amax(1).argsort()[len(rows) // 2]
    figure = new_figure(3.3)
    for axes, (name, basis) in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases.items(), strict=True):
        token = rows[middle] if basis is None else rows[middle] @ basis
        codes, (scale, _) = rounded = quantize(token, ACTIVATIONS)
        for code in range(-8, 8):
            axes.axhline(code * scale.item(), color=GREY, linewidth=0.4)
        axes.plot(token.tolist(), ".", color=COLOURS[0 if basis is None else 2], markersize=2.5)
        lost = ((dequantize(rounded) - token).square().sum() / token.square().sum()).item()
        axes.set_title(f"{name}: {len(codes.unique())} of 16 levels used, {lost:.1%} lost", fontsize=9)
        axes.set_xlabel("channel")
    figure.axes[0].set_ylabel(f"activation\n({NORMALISED})")
    return figure


def cache_memory(model: str, kept: CacheFormat) -> Figure:
    """Memory of keys and values by the length of the text, of the tensors themselves."""
    config = config_of(model)
    figure = new_figure(2.6)
    axes = figure.add_subplot()
    shape = (1, config.num_key_value_heads, 1, head_dim_of(config))
    token = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = [tensor for part in ("keys", "values") for tensor in kept.stored(part, token).values()]
    for name, tensors, colour in (("float16", [token.half()] * 2, 0), ("4 bits, packed", packed, 2)):
        each = config.num_hidden_layers * sum(tensor.nbytes for tensor in tensors)
        axes.plot(TOKENS, [tokens * each / 1e6 for tokens in TOKENS], color=COLOURS[colour], label=name)
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("keys and values, MB")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    return figure


def held_out(store: ActivationStore, site: str, eps: float) -> Tensor:
    """Normed rows ``[rows, hidden]`` of a block input."""
    rows = store.origin.rows
    return rms_norm(store.read(site, max(0, rows - ROWS), rows), eps)


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=RUN / "store")
    parser.add_argument("--rotations", type=Path, default=RUN / "kurtail" / "rotations.safetensors")
    parser.add_argument("--out", type=Path, default=DOCS)
    given = parser.parse_args()
    store, residual = ActivationStore(given.store), read_rotations(given.rotations).residual
    assert residual is not None
    bases = {"before": None, "after": residual.float()}
    eps = config_of(store.origin.model).rms_norm_eps
    made = {
        "kurtosis": kurtosis_by_layer(store, bases, eps),
        "levels": levels(store, bases, eps),
        "cache": cache_memory(store.origin.model, default_cache()),
    }
    for name, figure in made.items():
        figure.savefig(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
