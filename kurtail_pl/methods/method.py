"""What all methods share: values that check themselves, and their form in cards."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isabstract
from typing import Any, ClassVar, Self, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.methods.cost import Cost, Sizes

T = TypeVar("T")
M = TypeVar("M", bound="Method")


class Method(ABC):
    """A frozen dataclass of settings, made by a recipe or found in a card.

    Attributes:
        label: short name in artefacts' names and tables.
    """

    label: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise ConfigError when a setting is of another type: whoever makes a method may not be type-checked."""
        for name, adapter in _fields_of(type(self)).items():
            value = getattr(self, name)
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as error:
                said = shortened(error.errors()[0]["msg"], 80)
                raise ConfigError(f"{name} is {shortened(repr(value), 40)}: {said}") from error

    @abstractmethod
    def sentence(self) -> str:
        """What it does, for cards and reports; has no full stop."""

    def cost(self, sizes: Sizes) -> Cost:
        """What it takes on a model of these sizes, for the plan."""
        return Cost()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: ``{kind, settings}``."""
        names = [each.name for each in fields(self)]  # type: ignore[arg-type]
        return {"kind": type(self).__name__, "settings": {name: plain(getattr(self, name)) for name in names}}

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """All methods of this seam by their names; a private one is no recipe's."""
        kinds = {kind.__name__: kind for kind in (cls, *_subclasses(cls)) if not isabstract(kind)}
        return {name: kind for name, kind in kinds.items() if not name.startswith("_")}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `to_dict`; nothing is imported for it.

        Raises:
            ConfigError: when the kind is none that is known here, or its settings are others than it has.
        """
        kinds = cls.kinds()
        found = data.get("kind") if isinstance(data, Mapping) else data
        if not isinstance(data, Mapping) or not isinstance(found, str) or found not in kinds:
            seam = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
            raise ConfigError(
                f"{shortened(repr(found), 30)} is no {seam} of this version; use the one that made it "
                f"(known here: {', '.join(sorted(kinds))})"
            )
        return validated(kinds[found], data.get("settings"))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Where a record holds one of several kinds it holds what `to_dict` gives."""
        return core_schema.no_info_plain_validator_function(cls.from_dict) if isabstract(cls) else handler(source)


def plain(value: Any) -> Any:
    """Plain data for JSON of nested dataclasses, methods by their kinds."""
    if isinstance(value, Method):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    return [plain(item) for item in value] if isinstance(value, list) else value


@cache
def _fields_of(kind: type[Method]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind)
    return {each.name: TypeAdapter(hints[each.name]) for each in fields(kind)}  # type: ignore[arg-type]


@cache
def adapter_of(kind: Hashable) -> TypeAdapter[Any]:
    """Reads lists of one dataclass; the configuration of a tuple reaches the dataclasses in it."""
    return TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid"))  # type: ignore[valid-type]


def validated(kind: type[T], settings: Any) -> T:
    """A dataclass of settings that a file holds, their types looked at.

    Raises:
        ConfigError: naming the first setting that is not as it should be.
    """
    try:
        return cast(T, adapter_of(cast(Hashable, kind)).validate_json(json.dumps([settings]))[0])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (kind.__name__, *first["loc"][1:])))
        said = shortened(first["msg"].removeprefix("Value error, "), 80)
        raise ConfigError(f"{shortened(place, 60)} is {shortened(repr(first['input']), 40)}: {said}") from error


def _subclasses(kind: type[M]) -> list[type[M]]:
    found: list[type[M]] = []
    children: list[type[M]] = kind.__subclasses__()
    for child in children:
        found += [child, *_subclasses(child)]
    return found
