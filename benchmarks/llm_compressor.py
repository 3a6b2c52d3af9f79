r"""llm-compressor on the windows that KurTail is calibrated and measured on, at the same bits.

Runs in an environment of its own, with this project's folder on its path for the windows alone:

    python -m venv /tmp/llmc && /tmp/llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    PYTHONPATH=. /tmp/llmc/bin/python benchmarks/llm_compressor.py --bits w4a16 --model FOLDER \
        --calibration wiki.train.raw --evaluation wiki.test.raw --methods gptq r1r2r4-gptq

Weights are symmetric with one scale for each output channel, or for groups of `--group_size`; activations have one for
each token. Embedding, head and KV cache stay float. Prints a line for each method: perplexity, seconds and CPU seconds
to make the model. `--save FOLDER` keeps each method's checkpoint, for `transformers_folders.py`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.modifier import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SpinQuantModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint

ROTATIONS = {"r1r2-gptq": ["R1", "R2"], "r1r2r4-gptq": ["R1", "R2", "R4"]}
METHODS = ("float", "rtn", "gptq", "awq", *ROTATIONS)


def scheme(bits: str, observer: str, group_size: int | None) -> dict[str, QuantizationScheme]:
    """4-bit weights, and 8-bit activations where asked for."""
    inputs = QuantizationArgs(num_bits=8, strategy="token", symmetric=False, dynamic=True, observer=None)
    strategy = "channel" if group_size is None else "group"
    weights = QuantizationArgs(num_bits=4, strategy=strategy, group_size=group_size, symmetric=True, observer=observer)
    return {
        "linears": QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=inputs if bits == "w4a8" else None
        )
    }


def modifiers(method: str, groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """The recipe of a method."""
    settings = {"config_groups": groups, "ignore": ["lm_head"]}
    if method == "rtn":
        return [QuantizationModifier(**settings)]
    if method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)]
    gptq = GPTQModifier(**settings, dampening_frac=0.01, actorder="static")
    if method in ROTATIONS:
        return [SpinQuantModifier(rotations=ROTATIONS[method], transform_type="random-hadamard"), gptq]
    return [gptq]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Perplexity: exp of the mean cross-entropy of all predicted tokens."""
    losses = [model(window[None], labels=window[None]).loss for window in windows]
    return math.exp(torch.stack(losses).double().mean().item())


def main() -> None:
    """Measure the methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--bits", choices=["w4a16", "w4a8"], required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--observer", default="memoryless_mse", help="how weight scales are chosen")
    parser.add_argument("--group_size", type=int, help="inputs of a scale; all without it")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--windows", type=int, default=6, help="of 2048 tokens, to measure on")
    parser.add_argument("--save", type=Path, help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    checkpoint = Checkpoint(args.model)
    calibration = cut_windows(
        checkpoint, TextSpec(args.calibration, args.samples, args.seqlen), "calibration", seed=args.seed
    ).tokens
    evaluation = cut_windows(checkpoint, TextSpec(args.evaluation, args.windows, 2048), "evaluation").tokens
    mask = torch.ones_like(calibration)
    data = Dataset.from_dict({"input_ids": calibration.tolist(), "attention_mask": mask.tolist()})
    for method in args.methods:
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        seconds, cpu = time.perf_counter(), time.process_time()
        if method != "float":
            recipe = modifiers(method, scheme(args.bits, args.observer, args.group_size))
            oneshot(
                model=model, dataset=data, recipe=recipe, processor=tokenizer, max_seq_length=args.seqlen,
                num_calibration_samples=len(data),
            )  # fmt: skip
        seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
        value = perplexity(model.eval(), evaluation)
        print(f"| {method} | {args.bits} | {value:.2f} | {seconds:.0f} s | {cpu:.0f} CPU s |", flush=True)
        if args.save is not None:
            model.save_pretrained(args.save / method, save_compressed=True)
            tokenizer.save_pretrained(args.save / method)


if __name__ == "__main__":
    main()
