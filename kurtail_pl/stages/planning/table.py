"""A plan for people: its table, where hidden states are kept, and what does not fit."""

from __future__ import annotations

from transformers import PretrainedConfig

from kurtail_pl.methods import CacheFormat
from kurtail_pl.methods.cache import FLOAT_BITS
from kurtail_pl.stages.planning.run import StagePlan
from kurtail_pl.stages.planning.speed import Speed
from kurtail_pl.storage.files import gigabytes
from kurtail_pl.surgery.rotations import head_dim_of


def misfits(stages: list[StagePlan], memory: int | None, disk: int, device: int | None = None) -> list[str]:
    """What does not fit, each with the knob to turn; hidden states may stay on the disk.

    Args:
        stages: the plan.
        memory: bytes free; None where that is not known.
        disk: bytes free.
        device: bytes free on the CUDA device; None where there is none.
    """
    found = [
        f"{stage.stage} needs {gigabytes(needed)} of {kind} and {gigabytes(free)} are free: {stage.knob}"
        for stage in stages
        for kind, needed, free in (
            ("memory", stage.memory - stage.states, memory),
            ("device memory", stage.device, device),
        )
        if needed is not None and free is not None and needed > free
    ]
    needed = sum(stage.disk for stage in stages)
    if needed > disk:
        largest = max(stages, key=lambda stage: stage.disk)
        found.append(
            f"the stages need {gigabytes(needed)} of disk and {gigabytes(disk)} are free; "
            f"{largest.stage} takes most: {largest.knob}"
        )
    return found


def state_places(stages: list[StagePlan], memory: int | None) -> str:
    """Where the hidden states of each stage are kept, given the bytes of memory free; None where that is not known."""

    def fits(stage: StagePlan) -> bool:
        return memory is None or stage.memory <= memory

    kept = {
        place: [
            f"{stage.stage} {gigabytes(stage.states)}" for stage in stages if stage.states and fits(stage) == inside
        ]
        for place, inside in (("in memory", True), ("in files, for want of memory", False))
    }
    return "hidden states: " + "; ".join(f"{place}: {', '.join(found)}" for place, found in kept.items() if found)


def cache_line(config: PretrainedConfig, cache: CacheFormat | None) -> str:
    """What a token takes in the cache, and bits of a number of keys and of values, all that is stored included.

    Empty where the format does not know.
    """
    heads, head_dim, total, said = config.num_key_value_heads, head_dim_of(config), 0.0, []
    for part in ("keys", "values"):
        bits = FLOAT_BITS if cache is None else cache.bits_per_number(part, heads, head_dim)
        if bits is None:
            return ""
        total += bits
        said.append(f"{bits:.2f} bits a number of {part}")
    size = total / 8 * heads * head_dim * config.num_hidden_layers
    return f"cache: {size / 1000:.1f} kB a token, {', '.join(said)}"


def table(stages: list[StagePlan], speed: Speed | None) -> str:
    """The plan for people; without a speed, no seconds."""
    widths = (8, 9, 9, 9, 9, 8)
    head = ("stage", "device", "memory", "disk", "TFLOPs", "seconds")
    lines = [
        "| " + " | ".join(name.ljust(width) for name, width in zip(head, widths, strict=True)) + " |",
        "| " + " | ".join("-" * width for width in widths) + " |",
    ]
    for stage in stages:
        cells = (
            stage.stage.ljust(8),
            ("-" if stage.device is None else gigabytes(stage.device)).rjust(9),
            gigabytes(stage.memory).rjust(9),
            gigabytes(stage.disk).rjust(9),
            f"{stage.flops / 1e12:.2f}".rjust(9),
            ("-" if speed is None else f"{speed.seconds(stage.flops, stage.passes):.0f}").rjust(8),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
