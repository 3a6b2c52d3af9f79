"""Valid files of every kind, small: a model of two layers, and everything that is made of it."""

from pathlib import Path

import pytest
from fuzz.samples import Samples, make_samples


@pytest.fixture(scope="session")
def samples(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return make_samples(tied, tmp_path_factory.mktemp("samples"))
