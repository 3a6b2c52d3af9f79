"""What a recipe is compared with."""

from pathlib import Path
from typing import Any

import yaml

from kurtail_pl.cli.cells import cells_of

BASE = Path(__file__).resolve().parents[3] / "configs" / "base.yaml"


def recipe(**fusion: Any) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(BASE.read_text())
    settings["trainer"]["default_root_dir"], settings["quantization"]["out"] = "here", "there"
    settings["fusion"].update(fusion)
    return settings


def test_scaled_channels_and_chosen_signs_are_the_methods_own() -> None:
    """As learned rotations are: neither QuaRot nor the unrotated model has them."""
    own = {"scales": {"parts": ["values"]}, "signs": {"candidates": 4}}
    cells = list(cells_of([recipe(**own)], ["float"], None))
    hadamards = [cell.settings["model"]["init_args"].get("hadamard") for cell in cells]
    assert hadamards == [False, True, None]
    none = {"scales": None, "signs": None}
    assert [cell.settings["fusion"] for cell in cells] == [none, none, own]


def test_what_is_not_the_recipe_itself_has_folders_of_its_own() -> None:
    """Other seeds learn elsewhere; another rounding is written elsewhere, of what was learned."""
    cells = list(cells_of([recipe()], ["rtn", "gptq"], [0, 1]))
    learned = [cell for cell in cells if "hadamard" not in cell.settings["model"]["init_args"]]
    folders = [
        (cell.seed, cell.settings["quantization"]["method"], cell.settings["trainer"]["default_root_dir"],
         cell.settings["quantization"]["out"])
        for cell in learned
    ]  # fmt: skip
    assert folders == [
        (0, "rtn", "here", None), (0, "gptq", "here", "there"), (1, "rtn", None, None), (1, "gptq", None, None)
    ]  # fmt: skip
    assert len(cells) == len(learned) + 2 + 4
    others = [cell.settings for cell in cells if cell not in learned]
    assert all(each["trainer"]["default_root_dir"] is None for each in others)
