"""The walk, one layer at a time, against transformers' whole model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from walks import embed

from kurtail_pl.errors import CheckpointError, UnsupportedArchitecture
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.walker import Walker

MODELS = ["tiny", "tied", "stories"]
WINDOWS = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def walk(walker: Walker, windows: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """Hidden states of every window after the embedding and after each layer, and the logits."""
    hidden = embed(walker, windows)
    states = [list(hidden)]
    for _, layer in walker.layers("test"):
        hidden = [walker.advance(layer, h) for h in hidden]
        states.append(list(hidden))
    norm, head = walker.head()
    return states, torch.cat([head(norm(h)) for h in hidden])


@pytest.mark.parametrize("which", MODELS)
def test_states_and_logits_are_those_of_the_whole_model(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    model = AutoModelForCausalLM.from_pretrained(folder)
    states, logits = walk(Walker(Checkpoint(folder)), WINDOWS)
    assert len(states) == model.config.num_hidden_layers + 1
    # Hooks, since the last of transformers' own hidden states has been normed.
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    for number, window in enumerate(WINDOWS):
        seen.clear()
        with torch.no_grad():
            output = model(window.unsqueeze(0), output_hidden_states=True)
        torch.testing.assert_close(states[0][number], output.hidden_states[0], rtol=0, atol=0)
        for index, expected in enumerate(seen, start=1):
            torch.testing.assert_close(states[index][number], expected, rtol=1e-5, atol=1e-5)
        for index, expected in enumerate(output.hidden_states[1:-1], start=1):
            torch.testing.assert_close(states[index][number], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits[number], output.logits[0])


def test_float64(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    _, logits = walk(Walker(Checkpoint(tiny), dtype=torch.float64), WINDOWS)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, model(WINDOWS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", MODELS)
def test_only_the_current_layer_has_weights(which: str, request: pytest.FixtureRequest) -> None:
    walker = Walker(Checkpoint(request.getfixturevalue(which)))

    def held() -> set[str]:
        return {name for name, p in walker.model.named_parameters() if p.device.type != "meta"}

    assert held() == set()
    embed(walker, WINDOWS)
    assert held() == set()
    for index, layer in walker.layers("test"):
        assert held() == {f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()}
    assert held() == set()
    walker.head()
    assert held() == {"model.norm.weight", "lm_head.weight"}


def test_a_walk_can_be_repeated(tiny: Path) -> None:
    walker = Walker(Checkpoint(tiny))
    assert torch.equal(walk(walker, WINDOWS)[1], walk(walker, WINDOWS)[1])


def test_windows_of_several_lengths(tiny: Path) -> None:
    """Positions are kept by length; a causal model gives a prefix the same states."""
    walker = Walker(Checkpoint(tiny))
    long, short = walk(walker, WINDOWS)[1], walk(walker, WINDOWS[:, :7])[1]
    torch.testing.assert_close(short, long[:, :7], rtol=1e-5, atol=1e-5)


def test_a_tied_head_reads_the_embedding(tied: Path) -> None:
    checkpoint = Checkpoint(tied)
    assert not any("lm_head.weight" in load_file(path) for path in checkpoint.files)
    _, head = Walker(checkpoint).head()
    assert torch.equal(head.weight, checkpoint.tensor("model.embed_tokens.weight"))


def test_unknown_family(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "config.json").read_text().replace('"llama"', '"bert"')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedArchitecture, match="bert"):
        Walker(Checkpoint(tmp_path))


@pytest.mark.parametrize("damage", ["gone", "wrong shape"])
def test_weights_that_do_not_belong_to_the_config(tiny: Path, tmp_path: Path, damage: str) -> None:
    tensors = load_file(tiny / "model.safetensors")
    weight = tensors.pop("model.layers.2.mlp.up_proj.weight")
    if damage == "wrong shape":
        tensors["model.layers.2.mlp.up_proj.weight"] = weight[:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    walker = Walker(Checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r"up_proj"):
        walk(walker, WINDOWS)


def test_rotary_frequencies_in_an_old_checkpoint_are_ignored(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in range(4)}
    save_file(tensors | old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    _, logits = walk(Walker(Checkpoint(tmp_path)), WINDOWS)
    _, expected = walk(Walker(Checkpoint(tiny)), WINDOWS)
    assert torch.equal(logits, expected)


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2 + i for i in range(8)]},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions_on_both_sides_of_the_border(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Longer windows first, and shorter ones after: transformers' own modules remember lengths that they have seen."""
    folder, border = Path(shutil.copytree(tiny, tmp_path / "model")), 16
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    if kind not in ("dynamic", "linear"):
        rope["original_max_position_embeddings"] = border
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope, "max_position_embeddings": 64}))
    walker = Walker(Checkpoint(folder))
    windows = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(1))
    for length in (64, border + 1, border, 5, border + 1, 64):
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(windows[:, :length]).logits
        _, logits = walk(walker, windows[:, :length])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
