"""What each part of a recipe gives: the recipe with one change at a time, each made and measured by `kurtail fit`.

    KURTAIL_TEXT=TEXTS python benchmarks/ablation.py --evaluation wiki.valid.raw --weights float --seeds 0 1

Choose on validation text; the test text is for what was chosen. Rows that are measured already are not made again.
Changes of what comes after learning share the learned rotations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from kurtail_pl.cli.recipes import recipe_file

MODEL, STEPS = "model.init_args", "data.init_args.steps"
FUSION, QUANTIZE = "fusion", "quantization"
SCHEME = f"{QUANTIZE}.scheme"
CACHE = f"{SCHEME}.cache.init_args"
PERIOD = f"{MODEL}.scheduler.init_args.T_max"
PLAIN = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 100}}
LINEAR = {
    "class_path": "torch.optim.lr_scheduler.LinearLR",
    "init_args": {"start_factor": 1.0, "end_factor": 0.01, "total_iters": 100},
}
EARLY = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "error/validation", "patience": 3},
}
SCALED = ["values", "mlp_hidden"]


def searched(*parts: str) -> dict[str, Any]:
    """Clips by search."""
    return {"class_path": "kurtail_pl.methods.SearchedClips", "init_args": {"parts": list(parts)}}


def learned(*parts: str) -> dict[str, Any]:
    """Clips that learn."""
    return {"class_path": "kurtail_pl.methods.LearnedClips", "init_args": {"parts": list(parts)}}


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "nothing learned": {f"{MODEL}.optimizer.init_args.lr": 1e-9, STEPS: 1},
    "kurtosis objective": {f"{MODEL}.objective.kind": "kurtosis"},
    "kurtosis of each token": {f"{MODEL}.objective.kind": "token_kurtosis"},
    "whip": {f"{MODEL}.objective.kind": "whip"},
    "Wasserstein to uniform": {f"{MODEL}.objective.kind": "wasserstein"},
    "massive tokens count 1": {f"{MODEL}.objective.massive_weight": 1.0},
    "massive tokens count 10": {f"{MODEL}.objective.massive_weight": 10.0},
    "weights in the loss": {f"{MODEL}.objective.weight_term": 1.0},
    "sites by their effect": {f"{MODEL}.objective.site_weights": "effect"},
    "constant step": {f"{MODEL}.scheduler": PLAIN},
    "step falls by cosine": {f"{MODEL}.scheduler": COSINE},
    "step falls linearly": {f"{MODEL}.scheduler": LINEAR},
    "300 iterations": {STEPS: 300, PERIOD: 300},
    "1000 iterations": {STEPS: 1000, PERIOD: 1000},
    "stopped early": {  # 1000 iterations of constant step at most
        STEPS: 1000,
        f"{MODEL}.scheduler": PLAIN,
        "trainer.val_check_interval": 10,
        "trainer.callbacks": [EARLY],
        "checkpoints.every_n_train_steps": 1000,
    },
    "an R2 for each KV head": {f"{MODEL}.value_per_head": True},
    "R2 from attended values": {"data.init_args.capture.values": "attended"},
    "inputs not centred": {f"{SCHEME}.centre": False},
    "keys not centred": {f"{CACHE}.centre_keys": False},
    "weights not matched": {f"{QUANTIZE}.matching": None},
    "tokens count alike for values": {f"{QUANTIZE}.by_attention": False},
    "symmetric activations": {f"{SCHEME}.activations.symmetric": True},
    "activation clip 0.9": {f"{SCHEME}.activations.clip": {"kind": "ratio", "amount": 0.9}},
    "activation clip 0.8": {f"{SCHEME}.activations.clip": {"kind": "ratio", "amount": 0.8}},
    "channels not scaled": {f"{FUSION}.scales": None},
    "values alone scaled": {f"{FUSION}.scales.parts": ["values"]},
    "MLP channels alone scaled": {f"{FUSION}.scales.parts": ["mlp_hidden"]},
    "keys scaled too": {f"{FUSION}.scales.parts": [*SCALED, "keys"]},
    "norms scaled too": {f"{FUSION}.scales.parts": [*SCALED, "attention_input", "mlp_input"]},
    "signs of R4 and R5 out of 8": {f"{FUSION}.signs": {"candidates": 8}},
    "a clip for each site": {f"{QUANTIZE}.clips": searched("activations")},
    "a cache clip for each layer": {f"{QUANTIZE}.clips": searched("keys", "values")},
    "clips learned": {f"{QUANTIZE}.clips": learned("activations", "keys", "values")},
    "activation clips learned": {f"{QUANTIZE}.clips": learned("activations")},
    "cache clip 0.95": {f"{CACHE}.{part}.clip": {"kind": "ratio", "amount": 0.95} for part in ("keys", "values")},
    "first token in 16 bits": {f"{CACHE}.sinks": {"tokens": 1, "bits": 16}},
    "4 first tokens in 8 bits": {f"{CACHE}.sinks": {"tokens": 4, "bits": 8}},
    "a prefix": {f"{SCHEME}.prefix": [1]},
    "static activation scales": {f"{SCHEME}.activation_scales": "static"},
    "static activation scales, a prefix": {f"{SCHEME}.activation_scales": "static", f"{SCHEME}.prefix": [1]},
    "o_proj scales per head": {f"{SCHEME}.attention_output": "head"},
}
OF_GPTQ: dict[str, dict[str, Any]] = {
    "Hessians of float inputs": {f"{QUANTIZE}.quantized_activations": False, f"{QUANTIZE}.matching": None},
    "GPTAQ": {
        f"{QUANTIZE}.quantized_activations": True,
        f"{QUANTIZE}.matching": None,
        f"{QUANTIZE}.rounder.init_args.correction": "gptaq",
        f"{QUANTIZE}.rounder.init_args.refine": 0,
    },
    "FOEM": {f"{QUANTIZE}.rounder.init_args.correction": "foem", f"{QUANTIZE}.rounder.init_args.refine": 0},
    "codes not refined": {f"{QUANTIZE}.rounder.init_args.refine": 0},
    "columns in their order": {f"{QUANTIZE}.rounder.init_args.act_order": False},
    "GPTQ damping 0.1": {f"{QUANTIZE}.rounder.init_args.percdamp": 0.1},
    "32 windows for GPTQ": {f"{QUANTIZE}.text.windows": 32},
    "scales learned": {f"{QUANTIZE}.clips": learned("weights")},
    "clips and scales learned": {f"{QUANTIZE}.clips": learned("activations", "keys", "values", "weights")},
    # 128 does not divide the 576 channels of SmolLM2.
    "weights in groups of 64": {f"{SCHEME}.weights.init_args.group_size": 64},
}


def measure(recipes: list[str], name: str, seed: int, weights: str, evaluation: str) -> float:
    """Perplexity of the recipe with a change, made unless it stands there; what learns alike learns once."""
    folder = Path("artifacts/ablation", "-".join(Path(each).stem for each in recipes), Path(evaluation).stem)
    folder = folder / weights / name.replace(" ", "-") / f"seed{seed}"
    common: dict[str, Any] = {
        f"{MODEL}.rotation_seed": seed,
        "trainer.logger": False,
        "evaluation.text.source": evaluation,
        f"{QUANTIZE}.out": str(folder / "artefact"),
    }
    if not (folder / "artefact" / "results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        change = folder / "change.yaml"
        settings = common | (CHANGES | OF_GPTQ)[name]
        if not any(has_scheduler(each) for each in recipes) and f"{MODEL}.scheduler" not in settings:
            settings.pop(PERIOD, None)  # A constant step has no length.
        change.write_text(yaml.safe_dump(nested(settings), sort_keys=False))
        stacked = [argument for each in (*recipes, weights, str(change)) for argument in ("--config", each)]
        subprocess.run([sys.executable, "-m", "kurtail_pl", "fit", *stacked], check=True)
    results = json.loads((folder / "artefact" / "results.json").read_text())
    perplexity: float = results["evaluation"]["perplexity"]
    return perplexity


def has_scheduler(recipe: str) -> bool:
    """Whether a recipe says how the step size changes."""
    model = yaml.safe_load(recipe_file(recipe).read_text()).get("model", {})
    return "scheduler" in model.get("init_args", {})


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted names as a recipe."""
    settings: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        place = settings
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return settings


def main() -> None:
    """Print a line for each change as soon as its seeds are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["wikitext", "kurtail-plus"], help="one over the other")
    parser.add_argument("--evaluation", required=True, help="a text to evaluate on: a name or a file")
    parser.add_argument("--weights", choices=["float", "rtn", "gptq"], default="float")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", nargs="+", choices=CHANGES | OF_GPTQ, help="all that apply, when not given")
    args = parser.parse_args()
    applying = CHANGES | OF_GPTQ if args.weights == "gptq" else CHANGES
    for name in args.changes or applying:
        found = [measure(args.recipes, name, seed, args.weights, args.evaluation) for seed in args.seeds]
        print(f"| {name} | {' '.join(f'{p:.2f}' for p in found)} | {mean(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
