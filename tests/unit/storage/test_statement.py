"""What a model folder states of its origin."""

import logging
from pathlib import Path

import pytest

from kurtail_pl.storage.statement import origin_of

OTHER = "license: other\nlicense_name: gemma\nlicense_link: https://ai.google.dev/gemma/terms"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, {}),
        ("# A model", {}),
        ("---\nlicense: mit\ntags: [a]\n---\n# A model", {"license": "mit"}),
        (f"---\n{OTHER}\n---\n", dict(line.split(": ") for line in OTHER.splitlines())),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\n---\n# Nothing", {}),
    ],
)
def test_the_license_that_a_card_states(card: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert origin_of(tmp_path) == {"model": tmp_path.name, **expected}


@pytest.mark.parametrize("card", ["---\nlicense: {mit\n---\n", "---\n- mit\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_card_that_cannot_be_read_states_nothing(
    card: str | bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    with caplog.at_level(logging.WARNING):
        assert origin_of(tmp_path) == {"model": tmp_path.name}
    assert "no license is taken from" in caplog.text


def test_a_download_has_its_name_on_the_hub(tmp_path: Path) -> None:
    for place, expected in (
        ("models--HuggingFaceTB--SmolLM2-135M/snapshots/0123", {"hub": "HuggingFaceTB/SmolLM2-135M"}),
        ("models--gpt2/snapshots/0123", {"hub": "gpt2"}),
        ("datasets--a--b/snapshots/0123", {}),
        ("snapshots/0123", {}),
        ("models--a--b", {}),
    ):
        assert origin_of(tmp_path / place) == {"model": Path(place).name, **expected}
