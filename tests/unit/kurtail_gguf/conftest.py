"""Artefacts of the tiny families for GGUF, made once each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ggufs import artefact_of, model_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kurtail_pl.methods import Format, Uniform
from kurtail_pl.stages.text import TextSpec

MakeArtefact = Callable[..., Path]
HALF = Uniform(scales="float16")


@pytest.fixture(scope="session")
def make_artefact(tiny: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeArtefact:
    """Artefact of a family by its name; ``changes`` are those of its configuration, others those of the scheme."""
    made: dict[str, Path] = {}
    text = TextSpec(str(text_file), windows=4, seqlen=64)

    def make(
        family: str,
        weights: Format | None = HALF,
        changes: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **scheme: Any,
    ) -> Path:
        key = str((family, weights, changes, scheme))
        # A tokenizer has no name: an artefact with one of its own is made anew.
        if key not in made or tokenizer is not None:
            place = tmp_path_factory.mktemp("artefact")
            own = AutoTokenizer.from_pretrained(tiny) if tokenizer is None else tokenizer
            model = model_folder(place / "model", family, own, **(changes or {}))
            artefact = artefact_of(model, place, text, weights, **scheme)
            if tokenizer is not None:
                return artefact
            made[key] = artefact
        return made[key]

    return make
