"""Perplexity of an export, on the windows and by the protocol of `kurtail_pl.stages.evaluation.perplexity`."""

from __future__ import annotations

import torch

from kurtail_onnx.profiles import Profile
from kurtail_onnx.run.decoder import Decoder
from kurtail_onnx.run.folder import Export
from kurtail_onnx.run.session import Device, open_session
from kurtail_pl.metrics import Perplexity
from kurtail_pl.progress import track
from kurtail_pl.stages.text import TextSpec, cut_windows


def perplexity(export: Export, spec: TextSpec, profile: Profile = "exact", device: Device = "cpu") -> float:
    """Perplexity over the first windows of a text, each in one forward step.

    Args:
        export: the folder.
        spec: text, number and length of the windows.
        profile: how the graph is run.
        device: where.

    Raises:
        ConfigError: when a window is longer than the model's positions.
        TextError: when the text is too short.
        NotFinite: when the perplexity is infinite or not a number.
    """
    windows = cut_windows(export, spec, "evaluation")
    session = open_session(export.model, profile, device)
    metric = Perplexity()
    for window in track(list(windows.tokens), "evaluate windows"):
        logits = Decoder(export, session, device=device).forward(window[None].numpy())
        metric.update(torch.from_numpy(logits), window[None])
    return float(metric.compute().item())
