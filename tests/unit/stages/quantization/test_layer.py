"""Hessians of experts against transformers' own routing of the same tokens."""

from pathlib import Path

import pytest
import torch
from families import tiny_family
from torch import Tensor

from kurtail_pl.methods import GPTQ, Uniform
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.quantization.float_layer import FloatLayer
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.resume import resumable_folder
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import empty_model, equip_model
from kurtail_pl.surgery.rotations import Rotations

WINDOWS = torch.randint(300, (8, 100), generator=torch.Generator().manual_seed(0))


def rows_of(model: torch.nn.Module, expert: int) -> Tensor:
    """What transformers' first layer gives to one of its experts, window by window, ``[tokens, hidden]``."""
    rows = []

    def keep(_: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, index, _weights = args
        rows.append(hidden[(index == expert).any(-1)])

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(keep)
    for window in WINDOWS:
        model(window[None])
    handle.remove()
    return torch.cat(rows).double()


@torch.no_grad()
def test_an_experts_hessian_is_of_the_tokens_routed_to_it(tmp_path: Path, hessians: list[Tensor]) -> None:
    """Eight bits: the experts then read nearly what they read in the float model."""
    model = tiny_family("mixtral")
    model.save_pretrained(tmp_path)
    walker = Walker(Checkpoint(tmp_path))
    equip_model(walker.model, FLOAT, Rotations())
    solver = LayerSolver(walker, Scheme(Uniform(8)), GPTQ())
    with resumable_folder(tmp_path / "work", False, {}) as work:
        _, layer = next(walker.layers("test", work))
        solver.solve_layer(layer, "model.layers.0", walker.hidden_states(WINDOWS, work), Uniform(8))
    assert len(hessians) == 4 + 4 * 3
    assert solver.notes["borrowers"] == []
    experts = model.model.layers[0].mlp.experts
    for expert in range(4):
        rows = rows_of(model, expert)
        # The attention before them is in 8 bits: a token between two experts may change sides.
        assert solver.notes["expert_tokens"][f"model.layers.0.mlp.experts.{expert}"] == pytest.approx(len(rows), abs=16)
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for hessian, x in zip(hessians[4 + 3 * expert :][:3], (rows, rows, inner), strict=True):
            expected = x.T @ x
            assert (hessian - expected).norm() < 0.05 * expected.norm(), expert


@torch.no_grad()
def test_experts_want_what_the_same_tokens_have_in_the_float_model(tmp_path: Path, crosses: list[Tensor]) -> None:
    model = tiny_family("mixtral")
    model.save_pretrained(tmp_path)
    walker, beside = Walker(Checkpoint(tmp_path)), empty_model(model.config)
    for each in (walker.model, beside):
        equip_model(each, FLOAT, Rotations())
    solver = LayerSolver(walker, Scheme(Uniform(8)), GPTQ(correction="gptaq"))
    with resumable_folder(tmp_path / "work", False, {}) as work:
        _, layer = next(walker.layers("test", work))
        hidden = walker.hidden_states(WINDOWS, work)
        exact = hidden.beside("exact")
        float_layer = FloatLayer(walker, beside.model.layers[0], layer, exact)
        solver.solve_layer(layer, "model.layers.0", hidden, Uniform(8), float_layer)
        # Where the float model is after the layer is transformers' own.
        for window, after, rounded in zip(WINDOWS, exact.after, hidden.after, strict=True):
            expected = model(window[None], output_hidden_states=True).hidden_states[1]
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
            assert (rounded - expected).norm() > 1e-4 * expected.norm()
    assert len(crosses) == 4 + 4 * 3
    experts = model.model.layers[0].mlp.experts
    for expert in range(4):
        rows = rows_of(model, expert)
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for cross, x in zip(crosses[4 + 3 * expert :][:3], (rows, rows, inner), strict=True):
            assert (cross - x.T @ x).norm() < 0.05 * (x.T @ x).norm(), expert
