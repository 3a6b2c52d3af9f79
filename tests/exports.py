"""An export's numbers against a torch model's; quantizers of centred inputs."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import open_session
from kurtail_onnx.verify.texts import compare_texts, scenarios
from transformers import DynamicCache, PreTrainedModel

from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead
from kurtail_pl.surgery.linear import QuantizedLinear

CENTRED: dict[str, Any] = {
    "activations": Quantizer(4, False, Clip(amount=0.85)),
    "cache": PerTokenHead(Quantizer(4, False), Quantizer(4, False), centre_keys=True),
    "centre": True,
}
"""A scheme that subtracts means, of inputs and of keys, before it quantizes, and needs a zero point still."""
TEXTS, TOKENS = 5, 40
"""More tokens than the sliding windows and than the short texts of longrope."""
STEPS = ([TOKENS], [TOKENS - 6, *[1] * 6])
TOLERANCE = 1e-5
"""Of the logits, relative to the largest: five layers of two dozen roundings to 24 bits, 6e-8 each.

Another code somewhere moves them by more than a thousandth.
"""


@torch.no_grad()
def has_torchs_logits(model: PreTrainedModel, folder: Path, tolerance: float = TOLERANCE) -> bool:
    """Whether a text has torch's logits in one prefill, and one when its last tokens come one by one.

    Several texts may be tried: a value on the border of two codes falls on either side, for torch itself too when it
    adds in another order, and changes all that follows. What is wrong in the graph is wrong in every text.
    """
    opened = Export(folder)
    session = open_session(opened.model, threads=1)

    def agrees(seed: int, widths: list[int]) -> bool:
        ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        cache, decoder = DynamicCache(), Decoder(opened, session)
        pieces = ids.split(widths, dim=1)
        expected = np.concatenate([model(piece, past_key_values=cache).logits.numpy() for piece in pieces], axis=1)
        found = np.concatenate([decoder.forward(piece.numpy()) for piece in pieces], axis=1)
        return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())

    return all(any(agrees(seed, widths) for seed in range(TEXTS)) for widths in STEPS)


def linears_of(model: PreTrainedModel) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def checks_of(folder: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((folder / "checks.json").read_text())
    return checks


def all_equal(artefact: Path, folder: Path) -> bool:
    """Whether torch's logits and cached codes come of a prefill, of steps, of chunks, and of a batch with padding.

    A check has one text for each; where a value lies on a border, others are tried as above.
    """
    left = {name for name, text in checks_of(folder)["texts"].items() if not _equal(text)}
    source = Source(artefact)
    todo = scenarios(source.config)
    assert set(checks_of(folder)["texts"]) == set(todo) >= {"prefill", "decode", "chunk", "batch"}
    for seed in range(1, TEXTS):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(source.config.vocab_size, todo["batch"].ids.shape, generator=draw)
        texts = {name: replace(todo[name], ids=ids[: len(todo[name].ids)]) for name in left}
        found = compare_texts(Export(folder), source, ONNX(), texts) if texts else {}
        left -= {name for name, text in found.items() if _equal(asdict(text))}
    return not left


def _equal(text: dict[str, Any]) -> bool:
    near = text["logits_error"] <= TOLERANCE * text["largest_logit"]
    return near and text["codes_differing"] == 0 and text["equal_tokens"] == text["tokens"]
