"""`kurtail plan`: what a recipe will take, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kurtail_pl.cli.cells import settings_of
from kurtail_pl.cli.trainer import RecipeCLI, command_line
from kurtail_pl.maths.gptq import GPTQ
from kurtail_pl.stages import plan as stage
from kurtail_pl.stages.capture import CaptureSpec
from kurtail_pl.stages.learned_clips import ClipLearning
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
from kurtail_pl.surgery.scheme import Scheme


def plan(arguments: list[str]) -> None:
    """Print what each stage of a recipe takes, and what does not fit."""
    config = command_line(RecipeCLI, "kurtail plan", arguments, run=False).config.as_dict()
    data = config["data"]["init_args"]
    capture, fusion = _with_text(data["capture"]), settings_of(config, "Fusion")
    compute = Compute(**data["compute"])
    stages = stage.plan(
        config_of(capture["model"]),
        CaptureSpec(**capture),
        _learning(data),
        _quantization(settings_of(config, "WeightQuantization")["quantize"]),
        TextSpec(**settings_of(config, "Evaluation")["text"]),
        resident_memory(),
        compute,
        fusion["scales"] and ScaleSpec(**_with_text(fusion["scales"])),
        fusion["signs"] and SignSpec(**_with_text(fusion["signs"])),
    )
    print(table(stages, probe(compute)))
    free = free_memory()
    print(state_places(stages, free))
    for line in misfits(stages, free, free_disk(Path(data["store"])), device_memory()):
        print(f"does not fit: {line}")


def _with_text(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "text": TextSpec(**settings["text"])}


def _learning(data: dict[str, Any]) -> stage.Learning:
    """How a recipe's data module has rotations learned."""
    if "batch_windows" in data:
        return stage.WholeModelLearning(data["steps"], data["batch_windows"], data["text"]["seqlen"])
    return stage.ProxyLearning(data["steps"], data["batch_rows"])


def _quantization(settings: dict[str, Any]) -> QuantizeSpec:
    scheme, gptq = Scheme.from_dict(settings["scheme"]), GPTQ(**settings["gptq"])
    learning = ClipLearning(**settings["learn_clips"]) if settings["learn_clips"] else None
    return QuantizeSpec(**{**_with_text(settings), "scheme": scheme, "gptq": gptq, "learn_clips": learning})
