"""What a recipe is compared with."""

import copy
from pathlib import Path
from typing import Any

import yaml

from kurtail_pl.cli.cells import Recipe, cells_of

GPTQ = "kurtail_pl.methods.GPTQ"
BASE = Path(__file__).resolve().parents[3] / "configs" / "base.yaml"


def recipe(*roundings: str, **fusion: Any) -> Recipe:
    settings: dict[str, Any] = yaml.safe_load(BASE.read_text())
    settings["trainer"]["default_root_dir"], settings["quantization"]["out"] = "here", "there"
    settings["fusion"].update(fusion)
    rounded = {}
    for name in roundings:
        rounded[name] = copy.deepcopy(settings)
        if name != "gptq":  # The recipe's own.
            rounded[name]["quantization"]["rounder"] = {"class_path": name}
    return Recipe(settings, rounded)


def test_scaled_channels_and_chosen_signs_are_the_methods_own() -> None:
    """As learned rotations are: neither QuaRot nor the unrotated model has them. All have the same rotations online."""
    own = {"scales": {"parts": ["values"]}, "signs": {"candidates": 4}, "online": ["mlp_hidden"], "block_size": 4}
    cells = list(cells_of([recipe("float", **own)], ["float"], None))
    hadamards = [cell.settings["model"]["init_args"].get("hadamard") for cell in cells]
    assert hadamards == [False, True, None]
    none = {"scales": None, "signs": None, "online": ["mlp_hidden"], "block_size": 4}
    assert [cell.settings["fusion"] for cell in cells] == [none, none, own]


def test_what_is_not_the_recipe_itself_has_folders_of_its_own() -> None:
    """Other seeds learn elsewhere; another rounding is written elsewhere, of what was learned."""
    cells = list(cells_of([recipe("rtn", "gptq")], ["rtn", "gptq"], [0, 1]))
    learned = [cell for cell in cells if "hadamard" not in cell.settings["model"]["init_args"]]
    folders = [
        (cell.seed, spec["rounder"]["class_path"], cell.settings["trainer"]["default_root_dir"], spec["out"])
        for cell in learned
        for spec in [cell.settings["quantization"]]
    ]
    assert folders == [
        (0, "rtn", "here", None), (0, GPTQ, "here", "there"), (1, "rtn", None, None), (1, GPTQ, None, None)
    ]  # fmt: skip
    assert len(cells) == len(learned) + 2 + 4
    others = [cell.settings for cell in cells if cell not in learned]
    assert all(each["trainer"]["default_root_dir"] is None for each in others)
