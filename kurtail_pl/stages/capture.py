"""Capture: run the model layer by layer over calibration text and keep sampled rows of every site (KurTail, §3)."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kurtail_pl.errors import ConfigError
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.activations import (
    MANIFEST,
    ActivationStore,
    Origin,
    Shape,
    store_bytes,
    write_manifest,
    write_site,
)
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import gigabytes, require_space, write_json
from kurtail_pl.storage.resume import Workplace, resumable_folder
from kurtail_pl.storage.sources import open_model
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.rotations import head_dim_of

log = logging.getLogger(__name__)

COST = "cost.json"


@dataclass(frozen=True)
class CaptureSpec:
    """What to capture.

    Args:
        model: name, folder or GGUF file, as `open_model` takes it.
        text: calibration text.
        rows: rows kept of each site, drawn without replacement from all tokens of the text's windows.
        seed: decides the windows, the rows and their order.
    """

    model: str
    text: TextSpec
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text.windows is not None:
            self.require_rows(self.text.windows)
        elif self.rows < 1:
            raise ConfigError(f"rows is {self.rows}; give a positive number")

    def require_rows(self, windows: int) -> None:
        """Raise ConfigError unless so many windows have so many rows."""
        available = windows * self.text.seqlen
        if not 1 <= self.rows <= available:
            raise ConfigError(
                f"rows is {self.rows}; {windows} windows of {self.text.seqlen} tokens have 1 to {available}: "
                "ask for fewer rows or more windows"
            )


def capture(spec: CaptureSpec, folder: Path, dry_run: bool = False, compute: Compute = AUTO) -> ActivationStore | None:
    """Make an activation store, or reuse the one that stands there.

    The plan (sites, rows, bytes) is logged before anything is written; which rows is a function of the seed and the
    windows alone.

    Args:
        spec: model, text, rows, seed.
        folder: where the store goes.
        dry_run: stop after the plan; returns None.
        compute: device and floating-point type of the model.

    Raises:
        StoreMismatch: when the folder holds a store made from something else.
        DiskFull: when the store does not fit.
        KurtailError: for a model or text that cannot be had.
    """
    checkpoint = open_model(spec.model)
    walker = Walker(checkpoint, dtype=compute.torch_dtype, device=compute.torch_device)
    windows = cut_windows(checkpoint.tokenizer(), spec.text, "calibration", seed=spec.seed)
    spec.require_rows(len(windows.tokens))
    origin = origin_of(spec, checkpoint, windows, compute)
    if (folder / MANIFEST).is_file():
        store = ActivationStore(folder)
        store.require_origin(origin)
        store.require_intact()
        log.info("reusing the activation store %s", folder)
        return store
    shape = shape_of(checkpoint)
    size = store_bytes(shape, spec.rows)
    log.info(
        "capture: %d layers, %d tokens through the model, %d rows of each of %d sites, %s in %s",
        shape.layers, windows.tokens.numel(), spec.rows, 3 * shape.layers, gigabytes(size), folder,
    )  # fmt: skip
    if dry_run:
        return None
    require_space(folder, size)
    with resumable_folder(folder, overwrite=False, recipe=asdict(origin)) as work:
        with Meter(work.state.get("cost")) as meter:
            _capture_layers(walker, windows.tokens, spec, work, meter)
        write_manifest(work.folder, origin, shape, versions())
        write_json(work.folder / COST, meter.to_dict())
    return ActivationStore(folder)


def origin_of(spec: CaptureSpec, checkpoint: Checkpoint, windows: Windows, compute: Compute = AUTO) -> Origin:
    """Everything that decides a store's rows."""
    return Origin(
        model=spec.model,
        model_sha256=checkpoint.sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256(),
        text=spec.text.source,
        text_sha256=windows.text_sha256,
        windows=len(windows.tokens),
        seqlen=spec.text.seqlen,
        rows=spec.rows,
        seed=spec.seed,
        dtype=compute.dtype,
    )


def shape_of(checkpoint: Checkpoint) -> Shape:
    """Sizes of a model's store."""
    config = checkpoint.config
    architecture_of(config)  # An unknown family is refused before its sizes are read.
    return Shape(config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, head_dim_of(config))


@torch.no_grad()
def _capture_layers(walker: Walker, windows: Tensor, spec: CaptureSpec, work: Workplace, meter: Meter) -> None:
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = torch.randperm(windows.numel(), generator=generator)[: spec.rows]
    value_width = shape_of(walker.checkpoint).width("value")
    hidden = walker.hidden_states(windows, work)
    for index, layer in walker.layers("capture layers", work):
        taps = _Taps(layer, walker.architecture, chosen, windows.shape[1], value_width)
        for number, states in enumerate(hidden.before):
            taps.window = number
            hidden.after[number] = walker.advance(layer, states)
        taps.close()
        for name, rows in taps.rows.items():
            write_site(work.folder, f"layer{index:03d}.{name}", rows)
        work.state["cost"] = meter.to_dict()


class _Taps:
    """Hooks that keep the chosen tokens of one decoder layer's three sites; set `window` before each forward."""

    def __init__(
        self, layer: nn.Module, architecture: Architecture, chosen: Tensor, seqlen: int, value_width: int
    ) -> None:
        self.window = 0
        self.rows: dict[str, Tensor] = {}
        self._chosen, self._seqlen = chosen, seqlen
        attention_norm, mlp_norm, value = (
            layer.get_submodule(name)
            for name in (architecture.attention_norm, architecture.mlp_norm, architecture.value)
        )
        self._handles = [
            attention_norm.register_forward_pre_hook(lambda _, args: self._keep("attn_in", args[0])),
            mlp_norm.register_forward_pre_hook(lambda _, args: self._keep("ffn_in", args[0])),
            # The last channels: queries and keys come first where one linear makes all three.
            value.register_forward_hook(lambda _, __, output: self._keep("value", output[..., -value_width:])),
        ]

    def _keep(self, name: str, x: Tensor) -> None:
        # Row r of every site is token chosen[r] of the text: the rows come out shuffled, in any order of windows.
        here = (self._chosen // self._seqlen == self.window).nonzero().flatten()
        if name not in self.rows:
            self.rows[name] = torch.empty(len(self._chosen), x.shape[-1], dtype=torch.bfloat16)
        self.rows[name][here] = x[0, self._chosen[here] % self._seqlen].to("cpu", torch.bfloat16)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
