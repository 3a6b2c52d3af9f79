"""Every field of an artefact's card in turn holds a value of another kind: a result, or one of our errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutations import as_json, edit, places
from fuzz.ours import card
from fuzz.outcomes import Finding, outcome
from fuzz.samples import Samples

RETYPED: list[Any] = [None, True, -1.5, "a", [2, "a"], {"a": 2}]


@pytest.mark.parametrize("value", RETYPED, ids=json.dumps)
def test_no_field_of_a_card_is_used_before_its_type_is_known(samples: Samples, tmp_path: Path, value: Any) -> None:
    target = card(samples, tmp_path)
    valid = (samples.artefact / "kurtail.json").read_text()
    findings: dict[str, str] = {}
    for path in places(json.loads(valid)):
        content = as_json(edit(json.loads(valid), path, "replace", value))
        try:
            outcome(lambda content=content: target.read(content))
        except Finding as finding:
            findings[".".join(map(str, path))] = str(finding)
    assert not findings
