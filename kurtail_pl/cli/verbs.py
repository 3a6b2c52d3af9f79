"""The verbs that need no trainer; each calls one stage, and its parameters are the options."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from kurtail_pl.errors import CheckpointError, ConfigError, StoreMismatch
from kurtail_pl.methods.target import Online
from kurtail_pl.stages import quantization as quantize_stage
from kurtail_pl.stages.capture import stage as capture_stage
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.evaluation.results import add_tasks, evaluate_folder
from kurtail_pl.stages.evaluation.tasks.evaluate import evaluate_models
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec, chosen_tasks
from kurtail_pl.stages.evaluation.tasks.table import tasks_note, tasks_table
from kurtail_pl.stages.fusion import stage as fuse_stage
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.signs import SignSpec
from kurtail_pl.stages.reporting import figures as figures_stage
from kurtail_pl.stages.reporting import report as report_stage
from kurtail_pl.stages.text import TextSpec, said
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.card import is_ours
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import refuse_finished
from kurtail_pl.storage.rotation_file import read_rotations, require_rotations_of
from kurtail_pl.storage.sources import config_of, open_any, open_model
from kurtail_pl.streaming.compute import AUTO, Compute, Device
from kurtail_pl.surgery.positions import require_positions
from kurtail_pl.surgery.rotations import BlockSize, Rotations, random_rotations


def capture(spec: capture_stage.CaptureSpec, out: Path, dry_run: bool = False, compute: Compute = AUTO) -> None:
    """Run the model over text and store sampled activations.

    Args:
        spec: model, text, rows and seed.
        out: folder of the activation store; one of the same origin is reused.
        dry_run: print sites, rows and bytes, and stop.
        compute: device and floating-point type.
    """
    capture_stage.capture(spec, out, dry_run, compute)


def fuse(
    model: str,
    out: Path,
    rotations: Path | None = None,
    method: Literal["quarot", "none"] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    device: Device = "auto",
    scales: ScaleSpec | None = None,
    signs: SignSpec | None = None,
    online: list[Online] | None = None,
    block_size: BlockSize | None = None,
    block: int | None = None,
) -> None:
    """Fuse rotations, learned or random, into a model's weights.

    Args:
        model: name, folder or GGUF file.
        out: folder of the fused model, an artefact that is not quantized yet.
        rotations: the learned `rotations.safetensors`, which name their method.
        method: without such a file: quarot (random Hadamards) or none.
        seed: of the random Hadamards, for method quarot.
        overwrite: replace `out` if it exists.
        device: auto, cpu or cuda; float64 on either.
        scales: channels to scale; null for none.
        signs: of R4 and R5, chosen among several draws; null takes them as they are.
        online: the rotations that act at run time, of query_key (R3), attention_output (R4) and mlp_hidden (R5); null
            for all that there are.
        block_size: R4 and R5, for method quarot, mix so many neighbouring channels: a power of two, widest for the
            largest that divides each width, or null for all.
        block: R1 and R2, for method quarot, mix so many neighbouring channels: a power of two, or null for all.
    """
    if (rotations is None) == (method is None):
        raise ConfigError(
            f"method is {method} and rotations are {rotations}; give one of the two: --rotations FILE for learned "
            "ones, or --method quarot or none"
        )
    for name, size in (("block_size", block_size), ("block", block)):
        if size is not None and method != "quarot":
            raise ConfigError(
                f"{name} is {size}, which is for --method quarot; learned rotations have the blocks that they were "
                "learned for: leave it out"
            )
    checkpoint = open_model(model)
    if rotations is not None:
        chosen = read_rotations(rotations)
        require_rotations_of(checkpoint.config, chosen, f"rotations {rotations}")
        if "method" not in chosen.origin:
            raise CheckpointError(f"{rotations} does not name the method that learned it; run kurtail fit again")
    else:
        chosen = random_rotations(checkpoint.config, seed, block_size, block) if method == "quarot" else Rotations()
        chosen = replace(chosen, origin={**chosen.origin, "method": method})
    fuse_stage.fuse(checkpoint, chosen.keeping(online), chosen.origin["method"], out, overwrite, device, scales, signs)


def quantize(
    artefact: Path,
    out: Path,
    spec: quantize_stage.QuantizeSpec,
    overwrite: bool = False,
    compute: Compute = AUTO,
) -> None:
    """Quantize a fused model.

    Args:
        artefact: folder that kurtail fuse wrote.
        out: folder of the quantized artefact.
        spec: bits, method, calibration.
        overwrite: replace `out` if it exists.
        compute: device and floating-point type.
    """
    quantize_stage.quantize(artefact, spec, out, overwrite, compute)


def evaluate(
    text: TextSpec | None = None,
    tasks: TaskSpec | None = None,
    model: list[str] | str | None = None,
    onnx: Path | None = None,
    store: Path | None = None,
    validation_rows: int = 1024,
    profile: Literal["exact", "fast"] = "exact",
    device: Literal["cpu", "cuda"] = "cpu",
    compute: Compute = AUTO,
) -> None:
    """Measure perplexity or tasks of models, artefacts or an export.

    Args:
        text: evaluation text, windows and their length; the embedded text when no tasks are given either.
        tasks: of the lm-evaluation-harness; an artefact's results.json gets what they give.
        model: name, folder, GGUF file or artefact; several by repeating it; an artefact gets results.json with a store.
        onnx: instead, a folder that kurtail export wrote.
        store: activation store of the float model, for the kurtosis of the block inputs.
        validation_rows: its last rows, on which kurtosis is measured.
        profile: of the export: exact or fast.
        device: of the export: cpu or cuda.
        compute: device and floating-point type of a model or artefact; tasks are answered in float32.
    """
    if (model is None) == (onnx is None):
        raise ConfigError(f"model is {model} and onnx is {onnx}; give one of --model and --onnx")
    if text is None and tasks is None:
        text = TextSpec()
    if onnx is not None:
        _measure_export(onnx, text, tasks, profile, device)
        return
    names = [model] if isinstance(model, str) else model or []
    checkpoints = [open_any(name) for name in names]
    if tasks is not None:
        chosen_tasks(tasks)
    if text is not None:
        _measure_texts(checkpoints, text, store, validation_rows, compute)
    if tasks is not None:
        _measure_tasks(names, checkpoints, tasks, compute.device)


def _measure_export(
    folder: Path,
    text: TextSpec | None,
    tasks: TaskSpec | None,
    profile: Literal["exact", "fast"],
    device: Literal["cpu", "cuda"],
) -> None:
    if text is None or tasks is not None:
        raise ConfigError("tasks are for models and artefacts; measure the artefact of the export")
    from kurtail_pl.cli.onnx import measure

    _print_perplexity(measure(folder, text, profile, device), text)


def _measure_tasks(names: list[str], checkpoints: list[Checkpoint], tasks: TaskSpec, device: Device) -> None:
    found = evaluate_models(checkpoints, tasks, device)
    for checkpoint, result in zip(checkpoints, found, strict=True):
        if is_ours(checkpoint.folder):
            add_tasks(checkpoint.folder, result)
    print(tasks_table(list(zip(_labels(names), found, strict=True))), tasks_note(found[0]), sep="\n\n")


def _labels(names: list[str]) -> list[str]:
    """Names of models for the head of a table: the last part of each, unless two end alike."""
    last = [Path(name).name for name in names]
    return [full if last.count(short) > 1 else short for full, short in zip(names, last, strict=True)]


def _measure_texts(
    checkpoints: list[Checkpoint], text: TextSpec, store: Path | None, validation_rows: int, compute: Compute
) -> None:
    for checkpoint in checkpoints:  # Of none a number, if not of all.
        require_positions(text.seqlen, checkpoint.positions)
    for checkpoint in checkpoints:
        if store is not None and is_ours(checkpoint.folder):
            activations = ActivationStore(store)
            evaluate_folder(checkpoint, checkpoint.folder, text, activations, validation_rows, compute=compute)
        else:
            _print_perplexity(perplexity(checkpoint, text, compute)["perplexity"], text)


def _print_perplexity(value: float, text: TextSpec) -> None:
    print(f"perplexity {value:.4f} ({said({**asdict(text), 'windows': text.windows or 'all'})} of {text.name})")


def figures(
    store: Path,
    rotations: Path,
    out: Path,
    layers: list[int] | None = None,
    model: str | None = None,
    validation_rows: int = 1024,
    overwrite: bool = False,
) -> None:
    """Draw the paper's figures from activations and rotations.

    Args:
        store: activation store of the float model.
        rotations: the learned `rotations.safetensors`; random Hadamards of its seed are drawn beside it.
        out: folder of the figures and their numbers.
        layers: whose sensitivity, surface and histogram are drawn; by default the paper's 1 and 15, or the last one.
        model: the store's model, if it is no longer where it was captured.
        validation_rows: the store's last rows, on which everything is measured.
        overwrite: replace `out` if it exists.
    """
    refuse_finished(out, overwrite)
    activations, learned = ActivationStore(store), read_rotations(rotations)
    config = config_of(model or activations.origin.model)
    require_rotations_of(config, learned, f"rotations {rotations}")
    if capture_stage.shape_of(config, activations.origin.values) != activations.shape:
        named = model or activations.origin.model
        raise StoreMismatch(f"{store} is of a model of other sizes than {named}; name its own model by --model")
    hadamard = random_rotations(config, learned.origin.get("seed", 0))
    pages = figures_stage.figures(
        activations, learned, hadamard, config.rms_norm_eps, out, validation_rows, layers, overwrite
    )
    print(f"{pages.tables['max_reduction']}\n{out}")


def report(artefact: Path) -> None:
    """Write an artefact's report and print the table of methods.

    Args:
        artefact: folder with results; folders beside it that measured the same model on the same text are listed too.
    """
    print(report_stage.report(artefact))
