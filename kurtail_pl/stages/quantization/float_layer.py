"""What the linears of a decoder layer read in the float model, beside the layer that is being quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from kurtail_pl.streaming.hidden import HiddenStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.experts import written


class FloatLayer:
    """A decoder layer of the float model, and the states of all windows there.

    Its methods give the inputs of the linears, window by window, ``[1, tokens, in]``, in the order in which data
    reaches them; `add_attention` and `add_mlp` take the states on, from `hidden.before` to `hidden.after`.

    Args:
        walker: runs it.
        layer: the layer without weights, equipped with the online rotations and nothing that quantizes.
        solved: the same layer with its weights, before any of them is changed; they are shared, not copied.
        hidden: states of all windows in the float model.
    """

    def __init__(self, walker: Walker, layer: nn.Module, solved: nn.Module, hidden: HiddenStates) -> None:
        self.walker, self.hidden, self.architecture = walker, hidden, walker.architecture
        layer.load_state_dict(solved.state_dict(), assign=True)
        self.layer = layer.to(walker.device)

    def attention_inputs(self) -> Iterator[Tensor]:
        """Of the attention's readers."""
        return map(self.layer.get_submodule(self.architecture.attention_norm), self.hidden.before)

    def output_inputs(self) -> Iterator[Tensor]:
        """Of the projection of the attention output."""
        attention = self.layer.get_submodule(self.architecture.attention)
        with set_aside(self.layer, self.architecture.output):
            yield from (attention(x, **self.walker.positions(self.layer, x))[0] for x in self.attention_inputs())

    def add_attention(self) -> None:
        """Take the states past the attention."""
        output = self.layer.get_submodule(self.architecture.output)
        post = post_norm(self.layer, self.architecture.attention_post_norm)
        states = zip(self.hidden.before, self.output_inputs(), strict=True)
        self.hidden.after.fill(self.walker.added(h, output(x), post) for h, x in states)

    def mlp_inputs(self) -> Iterator[Tensor]:
        """Of the MLP, or of every expert."""
        return map(self.layer.get_submodule(self.architecture.mlp_norm), self.hidden.after)

    def down_inputs(self, mlp: str, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """Of the down projection of a gated MLP that is given these inputs."""
        with set_aside(self.layer, f"{mlp}.{self.architecture.down}"):
            yield from map(self.layer.get_submodule(mlp), inputs)

    def add_mlp(self) -> None:
        """Take the states past the MLP; the layer then lets go of its weights."""
        block = self.layer.get_submodule(self.architecture.mlp)
        post = post_norm(self.layer, self.architecture.mlp_post_norm)
        states = zip(self.hidden.after, self.mlp_inputs(), strict=True)
        self.hidden.after.fill(self.walker.added(h, written(block(x)), post) for h, x in states)
        self.layer.to("meta")


def post_norm(layer: nn.Module, name: str | None) -> nn.Module | None:
    """The norm of what a block writes, where a record names one."""
    return None if name is None else layer.get_submodule(name)


@contextmanager
def set_aside(layer: nn.Module, name: str) -> Iterator[nn.Module]:
    """Put the identity in a linear's place for a while: its block then returns that linear's input."""
    linear = layer.get_submodule(name)
    layer.set_submodule(name, nn.Identity())
    try:
        yield linear
    finally:
        layer.set_submodule(name, linear)
