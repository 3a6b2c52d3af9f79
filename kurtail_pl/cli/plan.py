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
from kurtail_pl.stages.quantize import QuantizeSpec
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
    capture = {**data["capture"], "text": TextSpec(**data["capture"]["text"])}
    compute = Compute(**data["compute"])
    stages = stage.plan(
        config_of(capture["model"]),
        CaptureSpec(**capture),
        _learning(data),
        _quantization(settings_of(config, "WeightQuantization")["quantize"]),
        TextSpec(**settings_of(config, "Evaluation")["text"]),
        resident_memory(),
        compute,
    )
    print(stage.table(stages, probe(compute)))
    free = free_memory()
    print(stage.state_places(stages, free))
    for line in stage.misfits(stages, free, free_disk(Path(data["store"])), device_memory()):
        print(f"does not fit: {line}")


def _learning(data: dict[str, Any]) -> stage.Learning:
    """How a recipe's data module has rotations learned."""
    if "batch_windows" in data:
        return stage.WholeModelLearning(data["steps"], data["batch_windows"], data["text"]["seqlen"])
    return stage.ProxyLearning(data["steps"], data["batch_rows"])


def _quantization(settings: dict[str, Any]) -> QuantizeSpec:
    scheme, gptq, text = Scheme.from_dict(settings["scheme"]), GPTQ(**settings["gptq"]), TextSpec(**settings["text"])
    learning = ClipLearning(**settings["learn_clips"]) if settings["learn_clips"] else None
    return QuantizeSpec(**{**settings, "scheme": scheme, "gptq": gptq, "text": text, "learn_clips": learning})
