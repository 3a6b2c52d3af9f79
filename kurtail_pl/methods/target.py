"""Targets: the runtimes that models are made for, what each of them has, and the rules by which it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import ClassVar, Literal, NamedTuple, get_args

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import ClipTuner, TransformTuner

Online = Literal["query_key", "attention_output", "mlp_hidden"]
"""R3, R4 and R5, which act at run time."""
ONLINE: tuple[Online, ...] = get_args(Online)
NUMBERS: dict[Online, str] = {"query_key": "R3", "attention_output": "R4", "mlp_hidden": "R5"}


class Rule(NamedTuple):
    """A step of a runtime's arithmetic, and where the runtime's authors wrote it down."""

    step: str
    rule: str
    source: str


class Target(ABC):
    """A runtime. A recipe for it learns, rounds and is evaluated by its rules, so it may ask for nothing else.

    Attributes:
        name: as recipes write it.
        recipe: the recipe that puts all settings right.
        online: rotations that it computes itself at run time when a file says so.
        block_inputs: whether it turns block inputs by rotations of their own, as R1 of families with post-norms is.
        rules: its arithmetic, in the order of a linear and then of attention.
        clips: whether it clips what linears read and caches keep, each at its own place.
        transforms: whether it computes learned maps, each of its own layer and place.
    """

    name: ClassVar[str]
    recipe: ClassVar[str]
    online: ClassVar[tuple[Online, ...]] = ()
    block_inputs: ClassVar[bool] = False
    rules: ClassVar[tuple[Rule, ...]] = ()
    clips: ClassVar[bool] = True
    transforms: ClassVar[bool] = False

    @abstractmethod
    def lacks(self, scheme: Scheme) -> Iterator[str]:
        """What a scheme asks for and the runtime does not compute, each as ``WHAT: write SETTING``."""

    def require(self, scheme: Scheme, clips: ClipTuner | None, transforms: TransformTuner | None = None) -> None:
        """Raise ConfigError, naming the setting to change, when a recipe asks for what the runtime lacks."""
        found = next(self.lacks(scheme), None)
        if found is None and clips is not None and not self.clips:
            found = "it clips neither inputs of linears nor its cache: write quantization.clips: null"
        if found is None and transforms is not None and not self.transforms:
            found = "it computes no learned maps at run time: write quantization.transforms: null"
        if found is not None:
            raise ConfigError(f"target is {self.name}, and {found}, or put the recipe {self.recipe} over this one")

    def require_online(self, online: Collection[Online], block_inputs: bool = False) -> None:
        """Raise ConfigError when rotations, or those of block inputs, are to act that the runtime does not compute."""
        if block_inputs and not self.block_inputs:
            raise ConfigError(
                f"target is {self.name}, which does not turn block inputs at run time, and R1 of this model's family "
                "does not go into its weights; write target: torch"
            )
        missing = [name for name in ONLINE if name in online and name not in self.online]
        if missing:
            kept = [name for name in ONLINE if name in online and name in self.online]
            numbers = " and ".join(f"{NUMBERS[name]} ({name})" for name in missing)
            raise ConfigError(
                f"target is {self.name}, which does not compute {numbers} at run time: write fusion.online: "
                f"[{', '.join(kept)}], or put the recipe {self.recipe} over this one"
            )


def beside_the_quantizers(scheme: Scheme, runtime: str) -> Iterator[str]:
    """What nothing but KurTail's own model computes."""
    if scheme.centre:
        yield f"{runtime} subtracts no centre from what linears read: write quantization.scheme.centre: false"
    if scheme.static:
        yield f"{runtime} gives each token its own scales: write quantization.scheme.activation_scales: token"
    if scheme.side is not None:
        yield f"{runtime} adds nothing to the product of a rounded weight: write quantization.scheme.side: null"
    if scheme.prefix is not None:
        yield f"{runtime} puts no tokens before a text: write quantization.scheme.prefix: null"
