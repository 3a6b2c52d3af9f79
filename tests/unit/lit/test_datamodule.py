"""The data module over a real capture of the tiny model, and over a store whose rows are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kurtail_pl.errors import ConfigError, StoreMismatch
from kurtail_pl.lit import ActivationDataModule
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.text import TextSpec


def captured(model: Path, text: Path, store: Path, **changes: Any) -> ActivationDataModule:
    spec = CaptureSpec(str(model), TextSpec(str(text), windows=4, seqlen=32), rows=100, **changes)
    return ActivationDataModule(spec, str(store), steps=10, batch_rows=16, validation_rows=20)


def over_known(known: Any, **changes: int) -> ActivationDataModule:
    """120 rows, the last 20 of them for validation."""
    spec = CaptureSpec("not needed", TextSpec(windows=1, seqlen=120), rows=120, seed=5)
    settings = {"steps": 12, "batch_rows": 20, "validation_rows": 20, **changes}
    module = ActivationDataModule(spec, str(known.store.folder), **settings)
    module.store = known.store
    return module


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return [int(32 * number) for number in batch["residual"][0, :, 0]]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_captures_once_then_reuses(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    captured(tiny, text_file, tmp_path / "store").setup("fit")
    first = contents(tmp_path / "store")
    assert sum(name.endswith(".safetensors") for name in first) == 3 * 4
    captured(tiny, text_file, tmp_path / "store").setup("fit")
    assert contents(tmp_path / "store") == first


def test_a_store_of_another_seed_is_refused_and_kept(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    captured(tiny, text_file, tmp_path / "store").setup("fit")
    first = contents(tmp_path / "store")
    with pytest.raises(StoreMismatch, match="seed is 0, wanted 1"):
        captured(tiny, text_file, tmp_path / "store", seed=1).setup("fit")
    assert contents(tmp_path / "store") == first


def test_batches_are_rows_of_the_captured_files(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    module = captured(tiny, text_file, tmp_path / "store")
    module.setup("fit")
    site = load_file(tmp_path / "store" / "layer002.ffn_in.safetensors")["rows"].float()
    value = load_file(tmp_path / "store" / "layer003.value.safetensors")["rows"].float()
    batch = next(iter(module.train_dataloader()))
    assert batch["residual"].shape == (2 * 4, 16, 48)
    assert batch["value"].shape == (4, 16, 2, 16)
    starts = [s for s in range(80) if torch.equal(site[s : s + 16], batch["residual"][5])]
    assert len(starts) == 1
    assert torch.equal(value[starts[0] : starts[0] + 16], batch["value"][3].flatten(1))


@pytest.mark.parametrize("name", ["tiny", "stories"])
def test_sizes_are_the_models(request: pytest.FixtureRequest, name: str, text_file: Path, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(name)
    module, config = captured(model, text_file, tmp_path), json.loads((model / "config.json").read_text())
    assert module.sizes["layers"] == config["num_hidden_layers"]
    assert module.sizes["hidden_size"] == config["hidden_size"]
    assert module.sizes["head_dim"] == config["head_dim"]
    assert module.sizes["rms_norm_eps"] == config["rms_norm_eps"]


def test_one_epoch_has_as_many_steps_as_asked_for(known: Any) -> None:
    assert len(list(over_known(known, steps=12).train_dataloader())) == 12
    assert len(list(over_known(known, steps=3).train_dataloader())) == 3


def test_training_and_validation_rows_are_disjoint_and_all_used(known: Any) -> None:
    module = over_known(known)
    trained = {row for batch in module.train_dataloader() for row in rows_of(batch)}
    validated = [row for batch in module.val_dataloader() for row in rows_of(batch)]
    assert trained == set(range(100))
    assert sorted(validated) == list(range(100, 120))


@pytest.mark.parametrize(("batch_rows", "validation_rows"), [(8, 20), (20, 30), (50, 20), (7, 1)])
def test_validation_reads_every_kept_row_once_whatever_the_batch(
    known: Any, batch_rows: int, validation_rows: int
) -> None:
    module = over_known(known, batch_rows=batch_rows, validation_rows=validation_rows)
    validated = [row for batch in module.val_dataloader() for row in rows_of(batch)]
    assert sorted(validated) == list(range(120 - validation_rows, 120))


def test_the_captures_seed_orders_the_batches(known: Any) -> None:
    first, second = over_known(known), over_known(known)
    second.capture_spec = CaptureSpec("not needed", TextSpec(windows=1, seqlen=120), rows=120, seed=6)
    orders = [[rows_of(batch) for batch in module.train_dataloader()] for module in (first, over_known(known), second)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("batch_rows", 0),
        ("batch_rows", -4),
        ("batch_rows", 101),
        ("validation_rows", 0),
        ("validation_rows", -1),
        ("validation_rows", 120),
        ("validation_rows", 101),
    ],
)
def test_settings_out_of_range_are_refused(known: Any, field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is {value}|less {value} for validation"):
        over_known(known, **{field: value})


def test_smallest_and_largest_settings_work(known: Any) -> None:
    assert len(next(iter(over_known(known, batch_rows=100).train_dataloader()))["value"][0]) == 100
    assert len(list(over_known(known, steps=1).train_dataloader())) == 1
    assert len(list(over_known(known, validation_rows=1, batch_rows=119).val_dataloader())) == 1


@pytest.mark.parametrize("rows", [0, 121, -1])
def test_more_rows_than_tokens_are_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match=f"rows is {rows}; 1 windows of 120 tokens have 1 to 120"):
        CaptureSpec("any", TextSpec(windows=1, seqlen=120), rows=rows)
