"""Valid files of every kind, small: a model of two layers, and everything that is made of it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from families import fill
from kurtail_onnx.exporter import ONNX
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from kurtail_pl.methods import RTN
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.results import evaluate_folder
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import random_rotations

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


@dataclass(frozen=True)
class Samples:
    """Folders and files, none of which is changed."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def sharded(self) -> Path:
        return self.root / "sharded"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def fused(self) -> Path:
        return self.root / "fused"

    @property
    def artefact(self) -> Path:
        """Quantized and measured."""
        return self.root / "model-quarot-w4a4kv4"

    @property
    def exported(self) -> Path:
        return self.root / "exported"

    @property
    def spec(self) -> TextSpec:
        return TextSpec(str(self.text), windows=2, seqlen=8)


def make_samples(tokenizer: Path, root: Path) -> Samples:
    """All of them; takes some seconds."""
    samples = Samples(root)
    samples.text.write_text("The old king found a green dragon behind the river, and the queen sang. " * 4)
    model = fill(LlamaForCausalLM(CONFIG))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1, max_new_tokens=8)
    for folder, size in ((samples.model, "5GB"), (samples.sharded, "10KB")):
        model.save_pretrained(folder, max_shard_size=size)
        for file in tokenizer.glob("tokenizer*"):
            shutil.copy(file, folder)
    checkpoint = Checkpoint(samples.model)
    store = capture(CaptureSpec(str(samples.model), samples.spec, rows=12), samples.store)
    assert store is not None
    fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", samples.fused)
    quantize(samples.fused, QuantizeSpec(rounder=RTN(), text=samples.spec), samples.artefact)
    evaluate_folder(Checkpoint(samples.artefact), samples.artefact, samples.spec, store, validation_rows=4)
    export(samples.artefact, samples.exported, ONNX(), check=False)
    return samples
