"""The table of methods, and the Markdown pages that travel with an artefact."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

from kurtail_pl.errors import ArtefactError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import ClipTuner, Matching, Rounder
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.results import FLOAT_METHOD, RESULTS, read_results
from kurtail_pl.stages.evaluation.tasks.table import measured_alike, tasks_note, tasks_table
from kurtail_pl.stages.tables import markdown
from kurtail_pl.stages.text import title_of
from kurtail_pl.storage.card import is_ours, read_card, require_sound
from kurtail_pl.storage.files import gigabytes, write_text
from kurtail_pl.storage.lock import alone_with

log = logging.getLogger(__name__)

REPORT, MODEL_CARD = "report.md", "README.md"
COLUMNS = ("method", "bits", "kurtosis mean", "kurtosis max", "perplexity", "seconds", "peak memory")


def siblings(folder: Path) -> list[dict[str, Any]]:
    """Results of a folder and of those beside it that measured the same model on the same windows.

    The float model comes first, then the highest perplexity: each line is better than the one above it.
    """
    own = read_results(folder)
    if "evaluation" not in own:
        raise ArtefactError(f"{folder} has no perplexity yet; run kurtail eval on it with --text and --store")

    def measured_on(results: dict[str, Any]) -> tuple[Any, ...]:
        evaluation = results["evaluation"]
        return (
            results["measured"]["model_sha256"],
            *(evaluation.get(key) for key in ("text_sha256", "windows", "seqlen", "dtype")),
        )

    found = [own]
    for beside in sorted(path.parent for path in folder.parent.glob(f"*/{RESULTS}")):
        try:
            found += [] if beside.resolve() == folder.resolve() else [read_results(beside)]
        except ArtefactError as error:
            log.warning("left out of the table: %s", error)
    rows = [results for results in found if "evaluation" in results and measured_on(results) == measured_on(own)]
    return sorted(rows, key=lambda r: (r["method"] != FLOAT_METHOD, -r["evaluation"]["perplexity"]))


def row(results: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; the seconds are those of making the model, the memory also that of measuring it."""
    making = [cost for stage, cost in results["cost"].items() if stage != "evaluate"]
    return (
        results["method"],
        Scheme.from_dict(results["scheme"]).name,
        f"{results['kurtosis']['mean']:.2f}",
        f"{results['kurtosis']['max']:.2f}",
        f"{results['evaluation']['perplexity']:.2f}",
        f"{sum(cost['seconds'] for cost in making):.0f}" if making else "-",
        gigabytes(max(cost["peak_bytes"] for cost in results["cost"].values())),
    )


def comparison(folder: Path) -> str:
    """The table of a folder's results and its siblings', with what was measured."""
    results = siblings(folder)
    evaluation = results[0]["evaluation"]
    return (
        f"{markdown(COLUMNS, [row(r) for r in results])}\n\n"
        f"Perplexity on {title_of(evaluation['source'])}: {evaluation['windows']} windows of {evaluation['seqlen']} "
        f"tokens, {evaluation['tokens']} predicted. Kurtosis over the {len(results[0]['kurtosis']['sites'])} block "
        f"inputs (1.8 is uniform, 3 normal) on {results[0]['kurtosis']['rows']} rows kept out of training. Seconds to "
        f"learn, fuse and quantize; peak resident memory of any stage.\n{_tasks(read_results(folder), results)}"
    )


def _tasks(own: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table of tasks of a folder and of those beside it that were asked the same; empty when there is none."""
    if "tasks" not in own:
        return ""
    columns = [
        (results["method"], results["tasks"])
        for results in rows
        if "tasks" in results and measured_alike(results["tasks"], own["tasks"])
    ]
    return f"\n{tasks_table(columns)}\n\n{tasks_note(own['tasks'])}\n"


def report(folder: Path) -> str:
    """Write `report.md` and the model card of an artefact and return the comparison.

    Raises:
        ArtefactError: when the folder has no results, or a file of the artefact is missing or damaged.
    """
    if not folder.is_dir():
        raise ArtefactError(f"artefact {folder} does not exist; name a folder that kurtail fit or quantize made")
    require_sound(folder)
    text = comparison(folder)
    exceptions = _exceptions(read_card(folder)) if is_ours(folder) else ""
    with alone_with(folder / REPORT):
        write_text(folder / REPORT, f"# {folder.name}\n\n{text}{exceptions}")
        if is_ours(folder):
            write_text(folder / MODEL_CARD, _model_card(folder) + exceptions)
    return text


def _exceptions(card: dict[str, Any]) -> str:
    """Weights that were not quantized as the rest; empty when there are none."""
    fallbacks, borrowers, tokens = (card.get(key, {}) for key in ("fallbacks", "borrowers", "expert_tokens"))
    lines = [f"- `{name}`: left to plain rounding, its Hessian was not positive definite" for name in fallbacks]
    lines += [
        f"- `{name}`: {tokens.get(name, 0)} calibration tokens of its own, the rest borrowed from its block"
        for name in borrowers
    ]
    return "\n".join(["\n## Exceptions\n", *lines, ""]) if lines else ""


def _model_card(folder: Path) -> str:
    card, results = read_card(folder), read_results(folder)
    evaluation, scheme = results["evaluation"], Scheme.from_dict(card["scheme"])
    return (
        f"# {folder.name}\n\n"
        f"{results['model']} (weights {card['source']['sha256'][:12]}) quantized to {scheme.name} by "
        f"{card['method']}.\n\n"
        + "\n".join(f"- {part}: {said}" for part, said in _parts(scheme, card.get("quantize") or {}).items())
        + f"\n\nPerplexity {evaluation['perplexity']:.3f} on {title_of(evaluation['source'])} "
        f"({evaluation['windows']} windows of {evaluation['seqlen']} tokens). "
        f"Weights on disk: {gigabytes(results['disk_bytes'])}.\n{_tasks(results, [results])}\n"
        "Weights are stored as packed integers; activations and the KV cache are quantized in simulation, with the "
        "numbers that an integer kernel would give. `kurtail.json` holds every setting, seed, version and hash.\n\n"
        "```python\nimport kurtail_pl\nfrom transformers import AutoTokenizer\n\n"
        f'model = kurtail_pl.load("{folder.name}")\ntokenizer = AutoTokenizer.from_pretrained("{folder.name}")\n```\n'
    )


def _parts(scheme: Scheme, quantize: dict[str, Any]) -> dict[str, str]:
    """What was done to each part of the model, in words."""
    parts = {
        "weights": _weights(scheme, quantize),
        "activations": _activations(scheme),
        "keys": _integers(scheme.keys),
        "values": _integers(scheme.values),
    }
    if clips := quantize.get("clips"):
        parts["clips"] = ClipTuner.from_dict(clips).sentence()
    if scheme.sinks is not None:
        parts[f"keys and values of the first tokens ({scheme.sinks.tokens})"] = f"{scheme.sinks.bits} bits"
    if scheme.prefix is not None:
        parts["before every text"] = f"float keys and values of the tokens {scheme.prefix}"
    return parts


def _weights(scheme: Scheme, quantize: dict[str, Any]) -> str:
    if scheme.weights is None:
        return "float"
    said = [scheme.weights.sentence()]
    if "rounder" in quantize:
        said.append(Rounder.from_dict(quantize["rounder"]).sentence())
        if matching := quantize.get("matching"):
            said.append(Matching.from_dict(matching).sentence())
    bits = "" if scheme.layer_bits is None else f"; but with bits of each layer's own, {_bits(scheme.layer_bits)}"
    return ", ".join(said) + bits


def _activations(scheme: Scheme) -> str:
    said = _integers(scheme.activations)
    if scheme.activations is not None and scheme.attention_output == "head":
        said += "; one scale a head in the input of the output projection"
    if scheme.static:
        said += "; one calibrated scale for all tokens of each input"
    return said


def _integers(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "float"
    symmetry = "symmetric" if quantizer.symmetric else "asymmetric"
    return f"{quantizer.bits} bits, {symmetry}, clip {quantizer.clip}"


def _bits(layers: list[int]) -> str:
    """Bits of every layer, for people."""
    if len(set(layers)) == 1:
        return f"{layers[0]} bits"
    return f"{fmean(layers):.3g} bits on average: layer by layer {' '.join(map(str, layers))}"
