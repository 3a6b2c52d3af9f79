"""Files of a plain model."""

import json
import shutil
from pathlib import Path

from families import fill
from fuzz.mutations import damaged, foreign, json_files, tensor_files
from fuzz.registry import Target, copied, json_target, target
from fuzz.samples import CONFIG, Samples
from gguf_files import write_gguf
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from kurtail_pl.artefact.load import load
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.planning.learning import ProxyLearning
from kurtail_pl.stages.planning.plan import plan
from kurtail_pl.stages.planning.table import table
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.sources import config_of, open_model


@target
def config(samples: Samples, place: Path) -> Target:
    """config.json of a model with weights, to the plan and the perplexity."""
    model = copied(samples.model, place)
    file = model / "config.json"

    def use() -> None:
        found = config_of(str(model))
        stages = plan(
            found,
            CaptureSpec(str(model), samples.spec, 12),
            ProxyLearning(1, 2),
            QuantizeSpec(text=samples.spec),
            samples.spec,
            0,
        )
        table(stages, None)
        perplexity(Checkpoint(model), samples.spec)

    return json_target(700, file, use)


@target
def index(samples: Samples, place: Path) -> Target:
    model = copied(samples.sharded, place)
    file = model / "model.safetensors.index.json"

    def use() -> None:
        checkpoint = Checkpoint(model)
        assert checkpoint.size > 0
        for name in checkpoint.names:
            checkpoint.dtype(name)
            checkpoint.tensor(name)
        perplexity(checkpoint, samples.spec)

    return json_target(600, file, use)


@target
def weights(samples: Samples, place: Path) -> Target:
    model = copied(samples.model, place)
    file = model / "model.safetensors"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        perplexity(Checkpoint(model), samples.spec)

    return Target(1500, tensor_files(file.read_bytes()), read)


@target
def gguf(samples: Samples, place: Path) -> Target:
    file = write_gguf(place / "little.gguf", fill(LlamaForCausalLM(CONFIG)))
    valid = file.read_bytes()
    start = len(valid) - sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters()) * 4

    def read(content: bytes) -> None:
        file.write_bytes(content)
        shutil.rmtree(place.parent / "cache", ignore_errors=True)
        perplexity(open_model(str(file)), samples.spec)

    return Target(1000, st.one_of(damaged(valid, within=start), foreign()), read)


@target
def tokenizer(samples: Samples, place: Path) -> Target:
    model = copied(samples.model, place)
    file = model / "tokenizer.json"

    def use() -> None:
        checkpoint = Checkpoint(model)
        checkpoint.tokenizer_sha256()
        perplexity(checkpoint, samples.spec)

    return json_target(700, file, use)


@target
def tokenizer_config(samples: Samples, place: Path) -> Target:
    model = copied(samples.model, place)
    file = model / "tokenizer_config.json"

    def use() -> None:
        Checkpoint(model).tokenizer_sha256()
        perplexity(Checkpoint(model), samples.spec)

    return json_target(700, file, use)


@target
def generation(samples: Samples, place: Path) -> Target:
    folder = copied(samples.artefact, place)
    card = folder / "kurtail.json"
    content = json.loads(card.read_text())
    del content["sha256"]["generation_config.json"]
    card.write_text(json.dumps(content))
    file = folder / "generation_config.json"
    valid = json.loads(file.read_text()) | {"temperature": 0.7, "do_sample": True, "top_p": 0.9}

    def read(content: bytes) -> None:
        file.write_bytes(content)
        load(folder)

    return Target(200, json_files(valid), read)
