"""One layer with the shapes of Llama-3-70B, random weights: more than the 2 GB that a protobuf file can hold."""

from pathlib import Path

import pytest
import torch
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.verify.layers import compare_layers
from kurtail_onnx.verify.structure import check_structure
from torch import Tensor
from transformers import LlamaConfig

from kurtail_pl.artefact.shards import ShardWriter
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.hadamard import random_hadamard_factors
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.storage.card import write_card
from kurtail_pl.storage.rotation_file import FILE, write_rotations
from kurtail_pl.surgery.equip import empty_model, equip_model, expect_quantized
from kurtail_pl.surgery.rotations import Rotations

VOCABULARY = 32_000


def random_artefact(folder: Path, tokenizer: Path) -> Path:
    """An artefact whose codes, scales and embeddings are drawn, not made from a model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8192, intermediate_size=28672, num_hidden_layers=1, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    online = [random_hadamard_factors(size, draw) for size in (128, 8192, 28672)]
    rotations = Rotations(query_key=online[0], attention_output=online[1], mlp_hidden=online[2])
    model, scheme = empty_model(config), Scheme()
    equip_model(model, scheme, rotations)
    expect_quantized(model, scheme)
    folder.mkdir()
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    write_rotations(folder / FILE, rotations)
    state = model.state_dict()
    shards = ShardWriter(folder, folder.parent, len(state))
    for number, (name, tensor) in enumerate(state.items()):
        shards.write(number, {name: drawn(name, tensor, draw)})
    shards.close()
    source = {"model": "random", "sha256": "0"}
    write_card(folder, {"method": "random", "source": source, "scheme": scheme.to_dict(), "cost": {}})
    return folder


def drawn(name: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
    if name.endswith("codes"):
        return torch.randint(256, tensor.shape, dtype=torch.uint8, generator=draw)
    if name.endswith("scale"):
        return torch.full(tensor.shape, 0.2 / 8192**0.5)
    return torch.ones(tensor.shape) if "norm" in name else torch.empty(tensor.shape).normal_(generator=draw)


@pytest.mark.slow
def test_a_layer_of_llama_3_70b(tied: Path, tmp_path: Path) -> None:
    artefact = random_artefact(tmp_path / "artefact", tied)
    folder = export(artefact, tmp_path / "onnx", ONNX(), check=False)
    assert (folder / "model.onnx.data").stat().st_size > 2**31
    assert (folder / "model.onnx").stat().st_size < 2**20 * 8
    assert check_structure(folder)["Hadamard"] == 2
    ((layer,), head) = compare_layers(folder, Source(artefact), ONNX())
    assert head.error < 1e-5
    assert layer.codes == 2 * 21 * 8 * 128 * 2
    assert layer.codes_differing <= 1e-3 * layer.codes
    assert layer.largest_code_difference <= 1
