"""`kurtail plan`: what a recipe will take, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kurtail_pl.cli.cells import settings_of
from kurtail_pl.cli.trainer import RecipeCLI, command_line
from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.stages import plan as stage
from kurtail_pl.stages.capture import CaptureSpec
from kurtail_pl.stages.meter import device_memory, free_memory, resident_memory
from kurtail_pl.stages.plan_table import misfits, state_places, table
from kurtail_pl.stages.quantize import QuantizeSpec
from kurtail_pl.stages.scales import ScaleSpec
from kurtail_pl.stages.signs import SignSpec
from kurtail_pl.stages.speed import probe
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.files import free_disk
from kurtail_pl.storage.sources import config_of
from kurtail_pl.streaming.compute import Compute

T = TypeVar("T")


def plan(arguments: list[str]) -> None:
    """Print what each stage of a recipe takes, and what does not fit."""
    config = command_line(RecipeCLI, "kurtail plan", arguments, run=False).config.as_dict()
    data, fusion = config["data"]["init_args"], settings_of(config, "Fusion")
    capture, compute = _made(CaptureSpec, data["capture"]), _made(Compute, data["compute"])
    stages = stage.plan(
        config_of(capture.model),
        capture,
        _learning(data),
        _made(QuantizeSpec, settings_of(config, "WeightQuantization")["quantize"]),
        _made(TextSpec, settings_of(config, "Evaluation")["text"]),
        resident_memory(),
        compute,
        fusion["scales"] and _made(ScaleSpec, fusion["scales"]),
        fusion["signs"] and _made(SignSpec, fusion["signs"]),
    )
    print(table(stages, probe(compute)))
    free = free_memory()
    print(state_places(stages, free))
    for line in misfits(stages, free, free_disk(Path(data["store"])), device_memory()):
        print(f"does not fit: {line}")


def _made(kind: type[T], settings: object) -> T:
    """A dataclass of a recipe's settings; raises ConfigError when they are others than it has."""
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place, found = ".".join(map(str, (kind.__name__, *first["loc"]))), shortened(repr(first["input"]), 40)
        said = shortened(first["msg"].removeprefix("Value error, "), 150)
        raise ConfigError(f"{shortened(place, 60)} is {found}: {said}; correct the recipe") from error


def _learning(data: dict[str, Any]) -> stage.Learning:
    """How a recipe's data module has rotations learned."""
    if "batch_windows" in data:
        return stage.WholeModelLearning(data["steps"], data["batch_windows"], data["text"]["seqlen"])
    return stage.ProxyLearning(data["steps"], data["batch_rows"])
