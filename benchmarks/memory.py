"""Peak memory of capture, fusion and GPTQ, each in its own process, on a model or on random weights of true shapes.

    python benchmarks/memory.py --model smollm2-135m
    python benchmarks/memory.py --shapes llama-3-8b --layers 4 --windows 4 --seqlen 512

Prints each stage's largest resident memory as the operating system counted it, beside what `kurtail plan` foresees.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.planning.learning import ProxyLearning
from kurtail_pl.stages.planning.plan import plan
from kurtail_pl.stages.quantization import QuantizeSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.sources import config_of

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "vocab_size": 49152},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256},
    "llama-3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 128256},
    # For one layer: with SmolLM2's vocabulary, as embedding and head would be larger than it.
    "llama-3-70b-layer": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "vocab_size": 49152,
    },
}
RUN = """
import resource, sys, kurtail_pl.cli.trainer, kurtail_pl.cli.verbs
from kurtail_pl.cli.main import main
from kurtail_pl.stages.meter import resident_memory
program = resident_memory()
main()
print(program, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def word_tokenizer(words: int = 1000) -> PreTrainedTokenizerFast:
    """Knows the words w0, w1 and so on, and needs no file."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n + 3 for n in range(words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_text(path: Path, tokens: int) -> Path:
    """A text of so many of the tokenizer's words at least, drawn at random."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    # A file's last part is kept for evaluation.
    lines = max(200, tokens // 12)
    path.write_text("\n".join(" ".join(f"w{draw.randrange(1000)}" for _ in range(20)) for _ in range(lines)))
    return path


def random_model(shapes: str, layers: int, folder: Path, device: str = "cpu") -> Path:
    """A Llama of true shapes with random bfloat16 weights, drawn on a device, one shard a layer."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    config = LlamaConfig(**{"num_key_value_heads": 8, **SHAPES[shapes]}, num_hidden_layers=layers, dtype="bfloat16")
    hidden, width, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    linears |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
    linears |= {"mlp.down_proj": (hidden, width)}
    weight_map: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {n: torch.randn(s, dtype=torch.bfloat16, device=device) * 0.02 for n, s in shapes.items()}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for i in range(layers):
        names = {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
        names |= {f"model.layers.{i}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        write(f"layer{i}.safetensors", names)
    write("embedding.safetensors", {"model.embed_tokens.weight": (config.vocab_size, hidden)})
    write("head.safetensors", {"lm_head.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    word_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def main() -> None:
    """Run the three stages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--stages", nargs="+", default=["capture", "fuse", "quantize"])
    parser.add_argument("--work", type=Path, default=Path("runs/memory"))
    args = parser.parse_args()
    model = str(random_model(args.shapes, args.layers, args.work / args.shapes)) if args.shapes else args.model
    source = str(word_text(args.work / "words.txt", args.windows * args.seqlen)) if args.shapes else "pydoc"
    text = TextSpec(source, args.windows, args.seqlen)
    cut = ["--spec.text.source", source, "--spec.text.windows", args.windows, "--spec.text.seqlen", args.seqlen]
    verbs = {
        "capture": ["capture", "--spec.model", model, *cut, "--spec.rows", args.rows, "--out", args.work / "store"],
        "fuse": ["fuse", "--model", model, "--method", "quarot", "--out", args.work / "fused"],
        "quantize": ["quantize", "--artefact", args.work / "fused", *cut, "--out", args.work / "artefact"],
    }
    for stage in args.stages:
        shutil.rmtree(args.work / {"capture": "store", "fuse": "fused", "quantize": "artefact"}[stage], True)
        command = [sys.executable, "-c", RUN, *map(str, verbs[stage])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        program, peak = map(int, done.stdout.split()[-2:])
        capture = CaptureSpec(model, text, args.rows)
        stages = plan(config_of(model), capture, ProxyLearning(100, 512), QuantizeSpec(text=text), TextSpec(), program)
        foreseen = next(s.memory for s in stages if s.stage == stage)
        print(f"{stage}: peak {peak / 1e9:.2f} GB, plan {foreseen / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
