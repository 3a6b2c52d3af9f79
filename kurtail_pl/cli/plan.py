"""`kurtail plan`: what a recipe will take, before anything runs."""

from __future__ import annotations

from kurtail_pl.cli.trainer import SECTIONS, KurtailCLI, RecipeParser, command_line
from kurtail_pl.lit.callbacks import Evaluation, Fusion, WeightQuantization
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.stages.meter import device_memory, free_memory, resident_memory
from kurtail_pl.stages.planning import plan as stage
from kurtail_pl.stages.planning.speed import probe
from kurtail_pl.stages.planning.table import cache_line, misfits, state_places, table
from kurtail_pl.stages.quantization.spec import require_fit
from kurtail_pl.storage.files import free_disk
from kurtail_pl.storage.sources import config_of
from kurtail_pl.surgery.allowances import sentence
from kurtail_pl.surgery.families import architecture_of


class PlanCLI(KurtailCLI):
    """Makes what a plan looks at, and nothing whose sizes come from the weights."""

    def make_classes(self) -> None:
        """Make data module and sections, by a parser that links nothing to them."""
        parser = RecipeParser()
        parser.add_lightning_class_args(StoredModel, "data", subclass_mode=True)
        for name, kind in SECTIONS.items():
            parser.add_lightning_class_args(kind, name)
        self.config_init = parser.instantiate(self.config)


def plan(arguments: list[str]) -> None:
    """Print what each stage of a recipe takes, and whether it fits."""
    made = command_line(PlanCLI, "kurtail plan", arguments, run=False).config_init
    data: StoredModel = made["data"]
    fusion: Fusion = made["fusion"]
    quantization: WeightQuantization = made["quantization"]
    evaluation: Evaluation = made["evaluation"]
    config = config_of(data.capture_spec.model)
    require_fit(config, quantization.spec, data.compute)
    stages = stage.plan(
        config,
        data.capture_spec,
        data.learning(),
        quantization.spec,
        evaluation.text,
        resident_memory(),
        data.compute,
        fusion.scales,
        fusion.signs,
    )
    print(table(stages, probe(data.compute)))
    free = free_memory()
    print(state_places(stages, free))
    print(sentence(architecture_of(config)))
    if line := cache_line(config, quantization.spec.scheme.cache):
        print(line)
    found = misfits(stages, free, free_disk(data.store_folder), device_memory())
    for line in found:
        print(f"does not fit: {line}")
    if not found:
        print("every stage fits the memory and the disk that are free here")
