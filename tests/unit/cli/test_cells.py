"""What a recipe is compared with."""

from pathlib import Path

import yaml

from kurtail_pl.cli.cells import cells_of, settings_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_scaled_channels_and_chosen_signs_are_the_methods_own() -> None:
    """As learned rotations are: neither QuaRot nor the unrotated model has them."""
    recipe = yaml.safe_load((CONFIGS / "smollm2-135m-plus.yaml").read_text())
    own = {"scales": {"parts": ["values"]}, "signs": {"candidates": 4}}
    settings_of(recipe, "Fusion").update(own)
    cells = list(cells_of([recipe], ["float"], None))
    roots = {cell.root.rpartition("/")[2]: settings_of(cell.settings, "Fusion") for cell in cells}
    name, none = "smollm2-135m-plus", {"scales": None, "signs": None}
    assert roots == {f"{name}-none": none, f"{name}-quarot": none, name: own}
