"""Logits of vLLM's arithmetic against the artefact's, and greedy tokens of transformers'.

Both are of the same floats, those of the folder, in double: what is compared are codes, transforms and quantizers, and
where a value is rounded shall not depend on the order of a sum. Neither quantizes its cache: vLLM's has another rule.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kurtail_pl.artefact.skeleton import skeleton, whole_model
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import empty_model, layers_of
from kurtail_pl.surgery.gate import use_exact_layer, use_exact_norm
from kurtail_pl.surgery.layout import module_name
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.positions import steady_positions
from kurtail_vllm.groups import place_of
from kurtail_vllm.settings import Settings
from kurtail_vllm.transforms import Transform, transforms_of
from kurtail_vllm.verify.folder import Served
from kurtail_vllm.verify.mirror import MirrorLinear

BATCH, TOKENS, NEW = 2, 32, 12
LOGITS = 1e-8
"""Of the largest: products of doubles in another order, 1e-16 each, and no value that is rounded to another code."""
GREEDY = 1e-4
"""Of the largest, in float32: decoder layers of two dozen products, 6e-8 each, added in another order."""
HELD = 1e-12
"""Entries that are further from what a type holds than this are rounded by it; 1 and -1 are not."""

M = TypeVar("M", bound=nn.Module)


class Turned(nn.Module):
    """The product with a rotation as a type of few bits holds it: ``sqrt(n) Q`` is rounded, as it is in the folder."""

    def __init__(self, transform: Transform, dtype: torch.dtype) -> None:
        super().__init__()
        root = transform.factors.size**0.5
        self.matrix = (transform.factors.dense() * root).to(dtype).double() / root

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]`` -> ``[..., n]``."""
        turned: Tensor = x @ self.matrix
        return turned


@torch.no_grad()
def compare_logits(source: Source, spec: Settings, served: Served) -> dict[str, Any]:
    """Compare logits of two texts, one decoder layer of each model in memory at a time.

    Raises:
        CheckFailed: when they differ by more than `LOGITS`.
    """
    architecture, eps = source.architecture, source.config.rms_norm_eps
    walker, mirror = Walker(source.checkpoint, _reference(source, spec), torch.float64), empty_model(source.config)
    tokens = min(TOKENS, steady_positions(source.config))
    ids = torch.randint(source.config.vocab_size, (BATCH, tokens), generator=torch.Generator().manual_seed(0))
    embedding = _rounded(walker.embedding(), spec.torch_dtype)
    expected = [walker.embed(embedding, text.unsqueeze(0)) for text in ids]
    table = served.tensor(f"{architecture.embedding}.weight").double()
    found = [walker.embed(table.__getitem__, text.unsqueeze(0)) for text in ids]
    embedding.to("meta")
    mirrors = layers_of(mirror, architecture)
    for index, layer in walker.layers("check layers"):
        use_exact_layer(_rounded(layer, spec.torch_dtype), architecture, eps)
        _fill(mirrors[index], source, served, index)
        for hidden, model in ((expected, layer), (found, mirrors[index])):
            hidden[:] = [cast(Any, model)(states, **walker.positions(layer, states)) for states in hidden]
        mirrors[index] = nn.Identity()
    _, head = (_rounded(module, spec.torch_dtype) for module in walker.head())
    use_exact_norm(walker.model, architecture.final_norm, eps)
    norm = walker.model.get_submodule(architecture.final_norm)
    weight = served.tensor(f"{architecture.head}.weight").double()
    gain = served.tensor(f"{architecture.final_norm}.weight").double()
    wanted = torch.cat([cast(Tensor, head(norm(states))) for states in expected])
    given = torch.cat([nn.functional.rms_norm(states, gain.shape, gain, eps) @ weight.T for states in found])
    error = float((given - wanted).abs().max() / wanted.abs().max())
    if not error <= LOGITS:
        raise CheckFailed(
            f"the logits of what vLLM computes from the export differ from the artefact's by {error:.1e} relative; "
            "report it with its kurtail.json"
        )
    return {"tokens": ids.numel(), "logits_error": error, "cache": "float"}


def _reference(source: Source, spec: Settings) -> PreTrainedModel:
    """The artefact's modules, without weights, R3 and cache quantizers."""
    model = skeleton(source.checkpoint)
    model.set_attn_implementation("sdpa")
    turned = {
        transform.linear: Turned(transform, spec.torch_dtype)
        for transform in transforms_of(source)
        if _rounding(transform, spec.torch_dtype) > HELD
    }
    for layer in layers_of(model, source.architecture):
        for name, module in layer.named_modules():
            if isinstance(module, QuantizedLinear):
                if name in turned:
                    module.rotation = turned[name]  # type: ignore[assignment]
                if spec.activations == "none":
                    module.activations = None
    return model


def _rounding(transform: Transform, dtype: torch.dtype) -> float:
    """How far the entries of the two factors, of size about 1, are from what a type holds."""
    factors = [factor * len(factor) ** 0.5 for factor in (transform.factors.left, transform.factors.right)]
    return max(float((factor.to(dtype).double() - factor).abs().max()) for factor in factors)


def _rounded(module: M, dtype: torch.dtype) -> M:
    """A module with its parameters, in place, as a type holds them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return module


def _fill(layer: nn.Module, source: Source, served: Served, index: int) -> None:
    """Give a plain decoder layer vLLM's linears, and everything else from the folder."""
    architecture, prefix = source.architecture, source.layer_name(index)
    linears = architecture.linears(layer)
    for name in linears:
        layer.set_submodule(name, MirrorLinear(served, place_of(f"{prefix}.{name}", architecture)))
    names = {module_name(name, architecture): name for name in served.names if name.startswith(f"{prefix}.")}
    inner = {name.removeprefix(f"{prefix}."): place for name, place in names.items()}
    rest = {
        name: served.tensor(place).double()
        for name, place in inner.items()
        if not name.startswith(tuple(f"{linear}." for linear in linears))
    }
    layer.load_state_dict(rest, assign=True)
    use_exact_layer(layer, architecture, source.config.rms_norm_eps)


@torch.no_grad()
def compare_tokens(source: Source, spec: Settings, folder: str) -> dict[str, Any]:
    """Compare greedy tokens, and logits, of transformers' model of the folder with the artefact's in float32.

    Raises:
        CheckFailed: when a token is another, or logits differ by more than `GREEDY`.
    """
    ids = torch.randint(source.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(1))
    wanted, logits = _of_the_artefact(source, spec, ids)
    with redirect_stderr(StringIO()):  # Progress of two libraries, while it is loaded and at its first call.
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        given, error = _greedy(model, ids), float("inf")
    if torch.equal(wanted, given):
        error = float((model(given).logits - logits).abs().max() / logits.abs().max())
    if not error <= GREEDY:
        raise CheckFailed(
            f"transformers' model of {folder} gives other tokens or logits than the artefact ({error:.1e})"
        )
    return {"transformers": transformers.__version__, "tokens": NEW, "logits_error": error}


def _of_the_artefact(source: Source, spec: Settings, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Its greedy tokens and their logits. Its model is gone then: two at once are twice the memory."""
    reference = _rounded(whole_model(source.checkpoint), spec.torch_dtype)
    reference.set_attn_implementation("sdpa")
    for module in reference.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = None
    tokens = _greedy(reference, ids)
    return tokens, reference(tokens).logits


def _greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids
