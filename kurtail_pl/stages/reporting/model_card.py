"""The model card of an artefact: `README.md`, as the Hugging Face hub reads it and as people do."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.methods import ClipTuner, Rounder, TransformTuner, WeightTuner
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.targets import TARGETS
from kurtail_pl.stages.text import said, title_of
from kurtail_pl.storage.files import gigabytes
from kurtail_pl.storage.statement import LICENSE


def model_card(folder: Path, card: dict[str, Any], results: dict[str, Any], tasks: str) -> str:
    """The page of an artefact.

    Args:
        folder: of the artefact.
        card: its `kurtail.json`.
        results: what was measured.
        tasks: their table and note, if any.
    """
    evaluation, scheme = results["evaluation"], Scheme.from_dict(card["scheme"])
    return (
        f"---\n{_front_matter(folder.name, card, results)}\n---\n\n# {folder.name}\n\n"
        f"{results['model']} (weights {card['source']['sha256'][:12]}) quantized to {scheme.name} by "
        f"{card['method']}.\n\n"
        + "\n".join(f"- {part}: {said}" for part, said in _parts(scheme, card).items())
        + _target(card.get("quantize") or {})
        + f"\n\nPerplexity {evaluation['perplexity']:.3f} on {title_of(evaluation['source'])} "
        f"({said(evaluation)}). "
        f"Weights on disk: {gigabytes(results['disk_bytes'])}{_bits_per_weight(card)}.\n{tasks}\n"
        f"{_stored(scheme)} `kurtail.json` holds every setting, seed, version and hash.\n\n"
        "```python\nimport kurtail_pl\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = kurtail_pl.load("{folder.name}")\n'
        "# The same, by transformers, which needs kurtail_pl imported:\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")\n```\n'
    )


def _front_matter(name: str, card: dict[str, Any], results: dict[str, Any]) -> str:
    """What the hub lists and filters by, as YAML; base model and license where the source states them."""
    source, evaluation, scheme = card["source"], results["evaluation"], Scheme.from_dict(card["scheme"])
    text = title_of(evaluation["source"])
    measured = EvalResult(
        task_type="text-generation",
        dataset_type=text,
        dataset_name=text,
        dataset_args={key: evaluation[key] for key in ("windows", "seqlen", "bos") if key in evaluation},
        metric_type="perplexity",
        metric_value=evaluation["perplexity"],
    )
    data = ModelCardData(
        base_model=source.get("hub"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["kurtail", *(["quantized"] if "quantize" in card else []), scheme.name],
        model_name=name,
        eval_results=[measured],
        **{key: source[key] for key in LICENSE if key in source},
    )
    return str(data.to_yaml())


def _parts(scheme: Scheme, card: dict[str, Any]) -> dict[str, str]:
    """What was done to each part of the model, in words."""
    quantize, conditions = card.get("quantize") or {}, card.get("transforms") or []
    parts = {
        "weights": _weights(scheme, quantize),
        "activations": _activations(scheme),
        "cache": "float" if scheme.cache is None else scheme.cache.sentence(),
    }
    if channels := _channels(card):
        parts["channels"] = channels
    if clips := _clips(card, quantize.get("clips")):
        parts["clips"] = clips
    if transforms := quantize.get("transforms"):
        largest = max((number for layer in conditions for number in layer.values()), default=1.0)
        said = f"; the largest condition number of a map is {largest:.3g}" if conditions else ""
        parts["before the quantizers"] = TransformTuner.from_dict(transforms).sentence() + said
    if scheme.prefix is not None:
        parts["before every text"] = f"float keys and values of the tokens {scheme.prefix}"
    return parts


def _clips(card: dict[str, Any], tuner: dict[str, Any] | None) -> str:
    """How clips were found, and those that stand in place of the scheme's; empty where there are no others."""
    said = [] if tuner is None else [ClipTuner.from_dict(tuner).sentence()]
    sites = [site for layer in card.get("clips") or [] for site in layer.items()]
    if sites:
        parts, ratios = {place.rpartition(".")[2] for place, _ in sites}, [ratio for _, ratio in sites]
        ends = f"{min(ratios):.3g} to {max(ratios):.3g}"
        said.append(f"{', '.join(sorted(parts))} have ratios of {ends}, site by site, in place of those above")
    return "; ".join(said)


def _channels(card: dict[str, Any]) -> str:
    """How fusion scaled the channels, with the alpha that was given or found; empty where it did not."""
    given, found = card.get("fuse", {}).get("scales"), card.get("rotations", {}).get("scales")
    if not isinstance(given, dict):
        return ""
    if given.get("rule") != "absmax":
        return "scaled so that the output errs least"
    alpha = {**given, **(found if isinstance(found, dict) else {})}.get("alpha")
    said = "of each layer's own" if isinstance(alpha, list) else alpha
    return f"scaled by their {given.get('magnitudes')} magnitudes, alpha {said}"


def _target(quantize: dict[str, Any]) -> str:
    """By whose rules the model was rounded and evaluated; nothing where they are torch's."""
    name = quantize.get("target", "torch")
    target = next((target for known, target in TARGETS.items() if known == name), None)
    if target is None:
        raise ConfigError(f"target is {shortened(repr(name), 40)}, expected one of {', '.join(TARGETS)}")
    if not target.rules:
        return ""
    rules = [f"- {rule.step}: {rule.rule} ({rule.source})" for rule in target.rules]
    return "\n".join([f"\n\nMade for {target.name}: rounded and evaluated by its rules.\n", *rules])


def _weights(scheme: Scheme, quantize: dict[str, Any]) -> str:
    if scheme.weights is None:
        return "float"
    said = [scheme.weights.sentence()]
    if "rounder" in quantize:
        said.append(Rounder.from_dict(quantize["rounder"]).sentence())
        if matching := quantize.get("matching"):
            said.append(WeightTuner.from_dict(matching).sentence())
    if scheme.side is not None:
        said.append(f"beside them {scheme.side.sentence()}")
    bits = "" if scheme.layer_bits is None else f"; but with bits of each layer's own, {_bits(scheme.layer_bits)}"
    return ", ".join(said) + bits


def _activations(scheme: Scheme) -> str:
    if scheme.activations is None:
        return "float"
    said = str(scheme.activations)
    if scheme.attention_output == "head":
        said += "; one scale a head in the input of the output projection"
    if scheme.static:
        said += "; one calibrated scale for all tokens of each input"
    return said


def _stored(scheme: Scheme) -> str:
    """What is in the file, and what is done at run time."""
    weights = "in floating point" if scheme.weights is None else "as packed codes"
    done = {"activations": scheme.activations, "the KV cache": scheme.cache}
    quantized = [what for what, how in done.items() if how is not None]
    if not quantized:
        return f"Weights are stored {weights}."
    verb = "is" if quantized == ["the KV cache"] else "are"
    kernel = "to the numbers that a kernel for them gives"
    return f"Weights are stored {weights}; {' and '.join(quantized)} {verb} quantized at run time, {kernel}."


def _bits_per_weight(card: dict[str, Any]) -> str:
    """What a number of a linear's weight takes; nothing where these are float, or the artefact is older."""
    bits = card.get("bits_per_weight")
    return "" if bits is None else f", {bits:.3g} bits for each number of a linear, scales and all else included"


def _bits(layers: list[int]) -> str:
    """Bits of every layer, for people."""
    if len(set(layers)) == 1:
        return f"{layers[0]} bits"
    return f"{fmean(layers):.3g} bits on average: layer by layer {' '.join(map(str, layers))}"
