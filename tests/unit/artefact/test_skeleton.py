"""Modules without weights."""

from pathlib import Path

from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.storage.checkpoint import Checkpoint


def test_a_plain_folder_has_the_modules_of_its_weights(tiny: Path) -> None:
    model = skeleton(Checkpoint(tiny))
    assert set(model.state_dict()) == set(Checkpoint(tiny).names)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
