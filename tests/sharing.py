"""Stages on windows that several processes share: run here by one process, or as a program by each of several.

`python sharing.py PLACE OUT RANK SIZE [LAYERS]`; with LAYERS, the last process kills itself once GPTQ solved so many.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from kurtail_pl.methods import GPTQ, RTN, BlockTransforms, LearnedClips, NUQCache, Uniform
from kurtail_pl.methods.rounders import gptq as rounder_module
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import equip_model
from kurtail_pl.surgery.rotations import Rotations

WINDOWS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))
"""For two processes, one and two of them."""


def stages(place: Path, out: Path, ranks: Ranks = ALONE) -> None:
    """Capture `model` and quantize `fused` several times, all under `place`, and solve a layer of `mixture`."""
    text = TextSpec(str(place / "text.txt"), windows=3, seqlen=64)
    for windows in (1, 3):
        spec = CaptureSpec(str(place / "model"), TextSpec(text.source, windows, 64), "all", seed=4)
        capture(spec, out / f"store{windows}", ranks=ranks)
    for windows in (1, 3):
        _mixture(place / "mixture", WINDOWS[:windows], out / f"mixture{windows}", ranks)
    quantize(place / "fused", QuantizeSpec(text=text), out / "artefact", ranks=ranks)
    quantize(place / "fused", QuantizeSpec(rounder=GPTQ(correction="gptaq"), text=text), out / "gptaq", ranks=ranks)
    learning = LearnedClips(["activations", "weights"], steps=4, windows=3, seqlen=64)
    spec = QuantizeSpec(rounder=RTN(), text=text, quantized_activations=True, clips=learning)
    quantize(place / "fused", spec, out / "learned", ranks=ranks)
    cache = Scheme(weights=None, activations=None, cache=NUQCache(3, 3))
    quantize(place / "fused", QuantizeSpec(cache, text=text), out / "levels", ranks=ranks)
    training = BlockTransforms(epochs=3, windows=3, seqlen=64)
    spec = QuantizeSpec(rounder=RTN(), text=text, quantized_activations=True, transforms=training)
    quantize(place / "fused", spec, out / "trained", ranks=ranks)


@torch.no_grad()
def _mixture(model: Path, windows: Tensor, out: Path, ranks: Ranks) -> None:
    """Write the Hessians and static scales of a layer's linears, experts included, and the notes."""
    walker = Walker(Checkpoint(model))
    equip_model(walker.model, FLOAT, Rotations())
    solver = LayerSolver(walker, Scheme(Uniform(8), activation_scales="static"), GPTQ(), ranks=ranks)
    hessians: list[Tensor] = []
    real = rounder_module.gptq

    def record(weight: Tensor, hessian: Tensor, *rest: Any) -> Any:
        hessians.append(hessian.clone())
        return real(weight, hessian, *rest)

    rounder_module.gptq = record
    mine = ranks.share(len(windows))
    with resumable_folder(out, False, {}, ranks) as work:
        _, layer = next(walker.layers("test", work))
        solver.solve_layer(layer, "layer", walker.hidden_states(windows[mine.start : mine.stop], work), Uniform(8))
        save_file({str(n): hessian for n, hessian in enumerate(hessians)}, work.folder / f"hessians{ranks.rank}")
        scales = {name: t for name, t in layer.state_dict().items() if name.endswith("input_scale")}
        save_file(scales, work.folder / f"scales{ranks.rank}")
        (work.folder / f"notes{ranks.rank}").write_text(json.dumps(solver.notes))
    rounder_module.gptq = real


def _die_in_gptq(layers: int) -> None:
    solve, solved = LayerSolver.solve_layer, 0

    def solve_or_die(self: LayerSolver, layer: Any, prefix: str, *rest: Any) -> None:
        nonlocal solved
        solve(self, layer, prefix, *rest)
        solved += prefix != "layer"
        if solved == layers:
            os.kill(os.getpid(), signal.SIGKILL)

    LayerSolver.solve_layer = solve_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    place, out = map(Path, sys.argv[1:3])
    rank, size, *layers = map(int, sys.argv[3:])
    if layers and rank == size - 1:
        _die_in_gptq(layers[0])
    meeting = f"file://{out}/meeting{len(layers)}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    stages(place, out, Ranks.joined())
    dist.destroy_process_group()
