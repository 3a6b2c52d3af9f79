"""Names of artefacts whose rotations nobody learns."""

import pytest
from rotation_modules import SIZES

from kurtail_pl.lit import FixedRotations


@pytest.mark.parametrize(("hadamard", "kind"), [(True, "quarot"), (False, "none")])
@pytest.mark.parametrize("name", [None, "qoq"])
def test_a_name_is_the_artefacts_and_the_rotations_stay_what_they_are(
    hadamard: bool, kind: str, name: str | None
) -> None:
    module = FixedRotations(SIZES, hadamard, name=name)
    assert module.method == (name or kind)
    assert module.settings()["method"] == kind
