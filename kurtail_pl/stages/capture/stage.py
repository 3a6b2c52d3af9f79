"""Capture: run the model layer by layer over calibration text and keep sampled rows of every site (KurTail, §3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_pl.errors import ConfigError, require_seed
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.capture.sampling import Draw, SiteFiles, Taps, Values
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.activations import (
    COST,
    MANIFEST,
    ActivationStore,
    Origin,
    Shape,
    store_bytes,
    write_manifest,
)
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import gigabytes, require_space, write_json
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.resume import Workplace, resumable_folder
from kurtail_pl.storage.sources import open_model
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import head_dim_of

log = logging.getLogger(__name__)


def _many_short_windows() -> TextSpec:
    """The first token of a window takes the attention that goes nowhere else: rows of long ones hold too few of it."""
    return TextSpec(windows=512, seqlen=64)


@dataclass(frozen=True)
class CaptureSpec:
    """What to capture.

    Args:
        model: name, folder or GGUF file.
        text: calibration text.
        rows: rows kept of each site, drawn without replacement from all tokens of the text's windows; ``all`` keeps
            every token, shuffled all the same. They are written as they come: memory does not grow with their number.
        seed: decides the windows, the rows and their order.
        values: what R2 is learned from: values as ``projected`` by `v_proj`, or as ``attended``, mixed by the attention
            for each query head, which is what `o_proj` reads.
    """

    model: str = "smollm2-135m"
    text: TextSpec = field(default_factory=_many_short_windows)
    rows: int | Literal["all"] = 9216
    seed: int = 0
    values: Values = "projected"

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        if self.text.windows is not None:
            self.rows_of(self.text.windows)
        elif self.rows != "all" and self.rows < 1:
            raise ConfigError(f"rows is {self.rows}; give a positive number, or all")

    def rows_of(self, windows: int) -> int:
        """Rows kept of so many windows; raises ConfigError unless they have so many."""
        available = windows * self.text.seqlen
        if self.rows == "all":
            return available
        if not 1 <= self.rows <= available:
            raise ConfigError(
                f"rows is {self.rows}; {windows} windows of {self.text.seqlen} tokens have 1 to {available}: "
                "ask for fewer rows or more windows"
            )
        return self.rows

    @property
    def known_rows(self) -> int | None:
        """Rows kept of each site; None where only the text can tell: all of a text that is taken whole."""
        if self.text.windows is not None:
            return self.rows_of(self.text.windows)
        return None if self.rows == "all" else self.rows


def capture(
    spec: CaptureSpec, folder: Path, dry_run: bool = False, compute: Compute = AUTO, ranks: Ranks = ALONE
) -> ActivationStore | None:
    """Make an activation store, or reuse the one that stands there.

    The plan (sites, rows, bytes) is logged before anything is written; which rows is a function of the seed and the
    windows alone.

    Args:
        spec: model, text, rows, seed.
        folder: where the store goes.
        dry_run: stop after the plan; returns None.
        compute: device and floating-point type of the model.
        ranks: the processes that share the windows; all see the same folder, and the first writes the store.

    Raises:
        StoreMismatch: when the folder holds a store made from something else.
        DiskFull: when the store does not fit.
        KurtailError: for a model or text that cannot be had.
    """
    checkpoint = open_model(spec.model)
    walker = Walker(checkpoint, dtype=compute.torch_dtype, device=compute.torch_device)
    windows = cut_windows(checkpoint, spec.text, "calibration", seed=spec.seed)
    rows = spec.rows_of(len(windows.tokens))
    origin = origin_of(spec, checkpoint, windows, compute)
    shape = shape_of(checkpoint.config, spec.values)
    size = store_bytes(shape, rows)
    plan = (
        f"capture: {shape.layers} layers, {windows.tokens.numel()} tokens through the model{ranks.shared}, "
        f"{rows} rows of each of {3 * shape.layers} sites, {gigabytes(size)} in {folder}"
    )
    if dry_run and not (folder / MANIFEST).is_file():
        log.info(plan)
        return None
    with alone_with(folder, ranks):
        if (folder / MANIFEST).is_file():
            return _reused(folder, origin, ranks)
        log.info(plan)
        require_space(folder, size)
        with resumable_folder(folder, overwrite=False, recipe=origin.key, ranks=ranks) as work:
            with Meter(work.state.get("cost")) as meter:
                draw = Draw(len(windows.tokens), spec.text.seqlen, rows, spec.seed)
                _capture_layers(walker, windows.tokens, spec.values, draw, work, meter, ranks)
            if ranks.leads:
                write_manifest(work.folder, origin, shape, versions())
                write_json(work.folder / COST, meter.to_dict())
    return ActivationStore(folder)


def _reused(folder: Path, origin: Origin, ranks: Ranks) -> ActivationStore:
    """The store that stands there, if it is what is wanted."""
    store = ActivationStore(folder)
    store.require_origin(origin)
    if ranks.leads:
        store.require_intact()
    ranks.barrier()
    log.info("reusing the activation store %s", folder)
    return store


def origin_of(spec: CaptureSpec, checkpoint: Checkpoint, windows: Windows, compute: Compute = AUTO) -> Origin:
    """Everything that decides a store's rows."""
    return Origin(
        model=spec.model,
        model_sha256=checkpoint.sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256(),
        text=spec.text.name,
        text_sha256=windows.text_sha256,
        windows=len(windows.tokens),
        seqlen=spec.text.seqlen,
        rows=spec.rows_of(len(windows.tokens)),
        seed=spec.seed,
        bos=spec.text.bos,
        dtype=compute.dtype,
        values=spec.values,
    )


def shape_of(config: PretrainedConfig, values: Values = "projected") -> Shape:
    """Sizes of a model's store; attended values have as many heads as queries have."""
    architecture_of(config)  # An unknown family is refused before its sizes are read.
    heads = config.num_key_value_heads if values == "projected" else config.num_attention_heads
    return Shape(config.num_hidden_layers, config.hidden_size, heads, head_dim_of(config))


@torch.no_grad()
def _capture_layers(
    walker: Walker, windows: Tensor, values: Values, draw: Draw, work: Workplace, meter: Meter, ranks: Ranks
) -> None:
    shape, mine = shape_of(walker.checkpoint.config, values), ranks.share(len(windows))
    hidden = walker.hidden_states(windows[mine.start : mine.stop], work)
    for index, layer in walker.layers("capture layers", work):
        taps = Taps(layer, walker.architecture, shape.width("value"), values)
        with SiteFiles(work.folder, index, shape, draw.rows, ranks) as files:
            for step, number in enumerate(mine):
                tokens, places = draw.window(number)
                hidden.after[step] = walker.advance(layer, hidden.before[step])
                files.write(places, taps.rows(tokens))
            for _ in range(len(mine), -(-len(windows) // ranks.size)):
                files.write_nothing()  # Others have one window more.
        taps.close()
        work.state["cost"] = meter.to_dict()
