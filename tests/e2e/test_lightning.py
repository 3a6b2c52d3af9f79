"""A recipe under a bare `LightningCLI()` script, without the `kurtail` command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
SCRIPT = "from lightning.pytorch.cli import LightningCLI\n\nLightningCLI()\n"


SECTIONS = {
    "checkpoints": "Checkpoints",
    "fusion": "Fusion",
    "quantization": "WeightQuantization",
    "figures": "Figures",
    "evaluation": "Evaluation",
}


def in_class_path_form(recipe: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """A recipe as `LightningCLI` alone understands it: sections as callbacks, and nothing that is linked."""
    callbacks = [
        {"class_path": f"kurtail_pl.lit.callbacks.{name}", "init_args": recipe.pop(section)}
        for section, name in SECTIONS.items()
    ]
    callbacks.insert(1, {"class_path": "kurtail_pl.lit.callbacks.RotationWriter"})
    recipe["trainer"]["callbacks"] = callbacks
    assert recipe.pop("target") == "torch"  # What the quantization has when nothing is said.
    recipe["model"]["init_args"] |= {
        "sizes": {
            "layers": model["num_hidden_layers"],
            "hidden_size": model["hidden_size"],
            "head_dim": model["head_dim"],
            "kv_heads": model["num_key_value_heads"],
            "rms_norm_eps": model["rms_norm_eps"],
        },
        "aim": {"scheme": callbacks[3]["init_args"]["scheme"]},
    }
    return recipe


def test_a_recipe_with_the_sizes_written_out_runs_under_a_bare_script(
    kurtail: Callable[..., None], start: Callable[..., subprocess.Popen[str]], recipe: Path, tied: Path
) -> None:
    place = recipe.parent
    (place / "bare").mkdir()
    (place / "bare" / "script.py").write_text(SCRIPT)
    settings, model = yaml.safe_load(recipe.read_text()), json.loads((tied / "config.json").read_text())
    (place / "bare" / "recipe.yaml").write_text(yaml.safe_dump(in_class_path_form(settings, model)))
    command = ["fit", "--config", "recipe.yaml", "--trainer.max_steps", 3]
    process = start(place / "bare", *command, program=("script.py",))
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages

    kurtail(place, "fit", "--config", recipe, "--trainer.max_steps", 3)
    ours, theirs = (load_file(folder / "runs" / "rotations.safetensors") for folder in (place, place / "bare"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (place / "bare" / "artifacts" / "tied-kurtail-w4a4kv4" / "report.md").is_file()
