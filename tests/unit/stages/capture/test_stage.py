"""Captured rows against hooks on transformers' whole model; reuse, refusals, dry runs."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kurtail_pl.errors import ArtefactError, ConfigError, DiskFull, StoreMismatch, TextError
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import COST, MANIFEST, ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint

ROWS, SEED = 50, 3


@pytest.fixture
def spec(tiny: Path, text: TextSpec) -> CaptureSpec:
    """What the shared store was made from."""
    return CaptureSpec(str(tiny), text, rows=ROWS, seed=SEED)


def drawn_windows(folder: Path, text: TextSpec) -> Tensor:
    """The windows that the seed draws, from the tokenizer's output."""
    content = Path(text.source).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(content, add_special_tokens=False)["input_ids"]
    available = len(ids) // text.seqlen
    order = torch.randperm(available, generator=torch.Generator().manual_seed(SEED))
    cut = [ids[i * text.seqlen : (i + 1) * text.seqlen] for i in order[: text.windows].tolist()]
    return torch.tensor(cut)


@torch.no_grad()
def all_rows(folder: Path, windows: Tensor) -> dict[str, Tensor]:
    """Every site's rows of every token, by hooks on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        for name, module in (("attn_in", layer.input_layernorm), ("ffn_in", layer.post_attention_layernorm)):
            found[f"layer{i:03d}.{name}"] = sink = []
            module.register_forward_pre_hook(lambda _, args, sink=sink: sink.append(args[0][0]))
        found[f"layer{i:03d}.value"] = sink = []
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, sink=sink: sink.append(out[0]))
        found[f"layer{i:03d}.attended"] = sink = []
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, sink=sink: sink.append(args[0][0]))
    for window in windows:
        model(window.unsqueeze(0))
    return {site: torch.cat(rows) for site, rows in found.items()}


def test_rows_are_those_of_the_whole_model(tiny: Path, text: TextSpec, store: ActivationStore) -> None:
    expected = all_rows(tiny, drawn_windows(tiny, text))
    expected = {site: rows for site, rows in expected.items() if not site.endswith("attended")}
    assert len(expected) == 12
    tokens = text.windows * text.seqlen
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(SEED))[:ROWS]
    assert len(set(chosen.tolist())) == ROWS
    for site, rows in expected.items():
        assert rows.shape[0] == tokens
        # Half a unit of bfloat16, and no more: rows are rounded once.
        torch.testing.assert_close(store.read(site, 0, ROWS), rows[chosen], rtol=2**-8, atol=1e-6)
    assert {p.stem for p in store.folder.glob("*.safetensors")} == set(expected)
    assert store.shape.width("layer000.value") == 32


def test_attended_values_are_what_o_proj_reads(spec: CaptureSpec, text: TextSpec, tmp_path: Path) -> None:
    attended = capture(replace(spec, values="attended"), tmp_path / "store")
    assert attended is not None
    folder = Path(spec.model)
    heads = LlamaConfig.from_pretrained(folder).num_attention_heads
    rows, tokens = all_rows(folder, drawn_windows(folder, text)), text.windows * text.seqlen
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(SEED))[:ROWS]
    for layer in range(4):
        found, expected = attended.read(f"layer{layer:03d}.value", 0, ROWS), rows[f"layer{layer:03d}.attended"][chosen]
        assert found.shape == (ROWS, heads * attended.shape.head_dim)
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)
    with pytest.raises(StoreMismatch, match="values is 'attended', wanted 'projected'"):
        capture(spec, tmp_path / "store")


def test_origin_and_manifest(tiny: Path, text: TextSpec, store: ActivationStore) -> None:
    checkpoint = Checkpoint(tiny)
    origin = store.origin
    assert (origin.model, origin.model_sha256, origin.tokenizer_sha256) == (
        str(tiny), checkpoint.sha256, checkpoint.tokenizer_sha256(),
    )  # fmt: skip
    assert (origin.text, origin.windows, origin.seqlen, origin.rows, origin.seed) == (text.source, 6, 48, ROWS, SEED)
    store.require_intact()
    assert json.loads((store.folder / COST).read_text())["peak_bytes"] > 0
    assert set(json.loads((store.folder / MANIFEST).read_text())["versions"]) >= {"torch", "transformers", "python"}


def test_an_existing_store_is_reused(spec: CaptureSpec, store: ActivationStore) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    again = capture(spec, store.folder)
    assert again is not None
    assert again.origin == store.origin
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_the_same_capture_gives_the_same_files(spec: CaptureSpec, store: ActivationStore, tmp_path: Path) -> None:
    capture(spec, tmp_path / "store")
    for path in store.folder.glob("*.safetensors"):
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", ["rows", "seed", "windows", "seqlen", "model"])
def test_another_origin_is_refused(
    spec: CaptureSpec, store: ActivationStore, tied: Path, text: TextSpec, change: str
) -> None:
    others = {
        "rows": replace(spec, rows=49),
        "seed": replace(spec, seed=4),
        "windows": replace(spec, text=replace(text, windows=5)),
        "seqlen": replace(spec, text=replace(text, seqlen=40)),
        "model": replace(spec, model=str(tied)),
    }
    named = "another model" if change == "model" else rf"{change} is .*wanted"
    with pytest.raises(StoreMismatch, match=named):
        capture(others[change], store.folder)
    store.require_intact()


def test_a_damaged_store_is_not_reused(spec: CaptureSpec, store: ActivationStore, tmp_path: Path) -> None:
    copy = shutil.copytree(store.folder, tmp_path / "copy")
    victim = copy / "layer002.value.safetensors"
    victim.write_bytes(victim.read_bytes()[:-2])
    with pytest.raises(StoreMismatch, match=r"layer002.value.safetensors is missing or damaged"):
        capture(spec, copy)


def test_a_dry_run_writes_nothing(
    spec: CaptureSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, store: ActivationStore
) -> None:
    with caplog.at_level("INFO", logger="kurtail_pl.stages.capture.stage"):
        assert capture(spec, tmp_path / "store", dry_run=True) is None
    assert list(tmp_path.iterdir()) == []
    payload = ROWS * 2 * 4 * (48 + 48 + 32)
    assert f"{payload / 1e6:.1f} MB" in caplog.text
    assert "12 sites" in caplog.text
    # What stands there is still looked at.
    with pytest.raises(StoreMismatch):
        capture(replace(spec, seed=9), store.folder, dry_run=True)


@pytest.mark.parametrize("rows", [0, -1, 6 * 48 + 1])
def test_rows_out_of_range(tiny: Path, text: TextSpec, rows: int) -> None:
    with pytest.raises(ConfigError, match=rf"rows is {rows}; 6 windows of 48 tokens have 1 to 288"):
        CaptureSpec(str(tiny), text, rows)


@pytest.mark.parametrize("windows", [2, None])
def test_all_rows_are_a_permutation_of_all_tokens(
    tiny: Path, text: TextSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, windows: int | None
) -> None:
    """Of so many windows, or of a text taken whole, whose length only the text can tell."""
    spec = CaptureSpec(str(tiny), replace(text, windows=windows, seqlen=16), "all", seed=SEED)
    drawn = drawn_windows(tiny, spec.text)
    assert spec.known_rows == (None if windows is None else 32)
    with caplog.at_level("INFO", logger="kurtail_pl.stages.capture.stage"):
        assert capture(spec, tmp_path / "store", dry_run=True) is None
    assert f"{drawn.numel()} rows of each of 12 sites" in caplog.text
    store = capture(spec, tmp_path / "store")
    assert store is not None
    assert store.origin.rows == drawn.numel()
    expected = all_rows(tiny, drawn)["layer000.attn_in"].to(torch.bfloat16).float()
    rows = store.read("layer000.attn_in", 0, drawn.numel())
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    assert not torch.equal(rows, expected)
    # As a number of rows, all of them are the same store.
    assert capture(replace(spec, rows=drawn.numel()), tmp_path / "store") is not None


def test_memory_does_not_grow_with_the_rows(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Of one layer's rows, 37 MB, less than a fourth is ever held; the hidden states are there either way."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    (tmp_path / "long.txt").write_text("\n".join([text_file.read_text()] * 5))
    text = TextSpec(str(tmp_path / "long.txt"), windows=48, seqlen=256)
    peaks = []
    for rows in (16, "all"):
        store = capture(CaptureSpec(str(tmp_path / "model"), text, rows), tmp_path / str(rows))
        assert store is not None
        peaks.append(json.loads((store.folder / COST).read_text())["peak_bytes"])
    assert peaks[1] - peaks[0] < 48 * 256 * 3 * 512 * 2 / 4


def test_a_text_too_short_leaves_nothing(spec: CaptureSpec, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="windows of 250"):
        capture(replace(spec, text=replace(spec.text, windows=1000, seqlen=250)), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(spec: CaptureSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskFull, match="store"):
        capture(spec, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_overwritten(spec: CaptureSpec, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ArtefactError, match="exists"):
        capture(spec, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
