"""What is taken from calibration windows before weights are solved: centres, static grids, what tokens count for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kurtail_pl.maths.finite import half_or_float
from kurtail_pl.maths.massive import is_massive
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.maths.received import attention_received
from kurtail_pl.maths.static_grid import BINS, count_values, static_grid
from kurtail_pl.methods import CacheFormat
from kurtail_pl.ranks import Ranks
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import Scored, behind_prefix, put_found, subtract_from_keys, watched_scores
from kurtail_pl.surgery.before_rope import watched_states
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import head_dim_of


def as_stored(tensor: Tensor) -> Tensor:
    """A tensor as an artefact keeps it: codes as they are, floats in float16 where that holds them.

    Rotated weights are small, and float16 rounds them eight times finer than bfloat16. Scales are not asked: they stay
    float32.
    """
    return half_or_float(tensor) if tensor.is_floating_point() else tensor


def centre_inputs(
    readers: Sequence[QuantizedLinear], inputs: Iterable[Tensor], ranks: Ranks, device: torch.device
) -> None:
    """Let linears subtract the mean of their inputs, over the tokens that are not massive."""
    total = torch.zeros(readers[0].in_features + 1, dtype=torch.float64, device=device)
    for x in inputs:
        rows = readers[0].turn(x).flatten(0, -2)
        rows = rows[~is_massive(rows)].double()
        total += torch.cat([rows.sum(0), total.new_tensor([len(rows)])])
    total = ranks.sum(total)
    for linear in readers:
        # As it will be stored: the bias then makes up for just what is subtracted.
        linear.subtract(as_stored(total[:-1] / total[-1].clamp(min=1)))


def centre_keys(attention: nn.Module, attended: Iterable[Tensor], ranks: Ranks, walker: Walker) -> None:
    """Let the attention subtract the mean of its rotated keys, which go by as it makes what is attended to."""
    config, dtype = walker.model.config, walker.dtype
    total = torch.zeros(config.num_key_value_heads, 1, head_dim_of(config), dtype=torch.float64).to(walker.device)
    with watched_scores(attention, lambda seen: total.add_(seen.key[0].double().mean(1, keepdim=True))):
        windows = sum(1 for _ in attended)
    mean = ranks.sum(total) / sum(ranks.each(windows))
    subtract_from_keys(attention, as_stored(mean).to(dtype))


def fit_cache(cache: CacheFormat, layer: nn.Module, attended: Iterable[Tensor], ranks: Ranks, walker: Walker) -> None:
    """Let a cache's format find what it wants of a layer's keys and values, which go by as what is attended to is made.

    The first process finds it for all; each brings its share of the sample, its first tokens.
    """
    assert cache.sample is not None
    config, left = walker.model.config, dict.fromkeys(("keys", "values"), cache.sample // ranks.size)
    heads, head_dim = config.num_key_value_heads, head_dim_of(config)
    rows: dict[str, list[Tensor]] = {part: [] for part in left}

    def see(part: str, states: Tensor) -> None:
        taken = states[0].transpose(0, 1)[: left[part]].flatten(1).float().cpu()
        left[part] -= len(taken)
        rows[part].append(taken)

    with watched_states(layer, walker.architecture, head_dim, see):
        for _ in attended:
            pass
    nothing = torch.zeros(0, heads * head_dim)
    gathered = [ranks.gather(torch.cat([nothing, *rows[part]])) for part in ("keys", "values")]
    shapes = cache.buffers(heads, head_dim)
    found = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in shapes.items()}
    if ranks.leads:
        keys, values = (torch.cat(parts).view(-1, heads, head_dim) for parts in gathered)
        found = cache.fitted(keys, values)
    shared = {name: as_stored(ranks.sum(tensor)).to(walker.device, walker.dtype) for name, tensor in found.items()}
    put_found(layer.get_submodule(walker.architecture.attention), shared)


def received_by(attention: nn.Module, attended: Iterable[Tensor]) -> list[Tensor]:
    """The squared attention that each token of each window gets, ``[tokens]``, from float keys."""
    found = []

    def see(scored: Scored) -> None:
        query, key, mask, scaling, sinks = scored
        tokens = key.shape[2]
        if getattr(attention, "prefix_key", None) is not None:
            key, mask = behind_prefix(attention, query, key, mask)
        found.append(attention_received(query, key, mask, scaling, sinks)[-tokens:])

    with watched_scores(attention, see):
        for _ in attended:
            pass
    return found


def fix_grid(
    readers: Sequence[QuantizedLinear],
    inputs: Iterable[Tensor],
    quantizer: Quantizer,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Let linears quantize all inputs on the one grid that is best for the tokens that are not massive.

    A grid that holds the massive ones too is too coarse for all others.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=device)
    for x in inputs:
        rows = readers[0].turn(x).flatten(0, -2)
        counts += count_values(rows[~is_massive(rows)])
    grid = static_grid(ranks.sum(counts), quantizer)
    for linear in readers:
        linear.fix_grid(grid)
