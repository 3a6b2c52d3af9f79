"""Perplexity, size and speed of GGUF files in llama.cpp itself, by the package xllamacpp, on a CPU.

    python benchmarks/gguf_files.py --artefact artifacts/ours exports/ours/model.gguf exports/float/model.gguf
    python benchmarks/gguf_files.py --artefact artifacts/ours exports/float/model.gguf --round Q4_0 --cache q4_0

The text is that of `kurtail eval` in the artefact's tokens: each token is forced, and the logarithm of its probability
read. `--round Q4_0` first writes every matrix of the layers of a file of floats in that type, as llama.cpp's own
quantizer does without an importance matrix (`gguf.quants`), beside the file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor, quants

from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint

FORCED = 1e4
"""Added to the logit of a token that is to come next; probabilities are told without it."""


def rounded(path: Path, kind: GGMLQuantizationType) -> Path:
    """A copy of a file whose layers' matrices have another type."""
    out = path.with_name(f"{path.stem}-{kind.name}.gguf")
    rewrite(path, out, kind, lambda tensor: quants.dequantize(tensor.data, tensor.tensor_type))
    return out


def rewrite(path: Path, out: Path, kind: GGMLQuantizationType, values_of: Callable[[ReaderTensor], Any]) -> None:
    """Copy a file, with other values of its layers' matrices, in another type."""
    reader = GGUFReader(path)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, each in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = each.types[-1] if each.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, each.contents(), each.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, quants.quantize(values_of(tensor), kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def server_of(path: Path, context: int, cache: str, threads: int) -> Any:
    """llama.cpp with a file."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup, parameters.verbosity, parameters.fit_params = False, -1, False
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    parameters.cache_type_k = parameters.cache_type_v = kind
    return xllamacpp.Server(parameters)


def surprise(server: Any, tokens: list[int]) -> list[float]:
    """Negative logarithms of the probabilities of all tokens but the first."""
    found = []
    for position in range(1, len(tokens)):
        answer = server.handle_completions({
            "prompt": tokens[:position], "n_predict": 1, "cache_prompt": True, "n_probs": 1, "temperature": 0,
            "logit_bias": [[tokens[position], FORCED]],
        })  # fmt: skip
        (step,) = answer["choices"][0]["logprobs"]["content"]
        if step["id"] != tokens[position]:
            raise SystemExit(f"llama.cpp chose {step['id']} where {tokens[position]} was forced")
        found.append(-float(step["logprob"]))
    return found


def measure(path: Path, windows: list[list[int]], cache: str, threads: int) -> dict[str, Any]:
    """Perplexity over windows, megabytes, and tokens a second of a forced text."""
    context = -(-(len(windows[0]) + 8) // 256) * 256
    server = server_of(path, context, cache, threads)
    start = time.perf_counter()
    losses = [loss for window in windows for loss in surprise(server, window)]
    seconds = time.perf_counter() - start
    return {
        "file": path.name,
        "cache": cache,
        "perplexity": math.exp(sum(losses) / len(losses)),
        "megabytes": path.stat().st_size / 1e6,
        "tokens_per_second": len(losses) / seconds,
        "xllamacpp": xllamacpp.__version__,
    }


def main() -> None:
    """Print a line of JSON for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--artefact", type=Path, required=True, help="whose tokenizer cuts the text")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--cache", default="f16", help="f16, f32, q8_0 or q4_0")
    parser.add_argument("--round", choices=["Q4_0", "Q4_1", "Q8_0"], help="round the files' floats so first")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    text = TextSpec(given.text, windows=given.windows, seqlen=given.seqlen)
    windows = cut_windows(Checkpoint(given.artefact), text, "evaluation").tokens.tolist()
    for path in given.files:
        file = path if given.round is None else rounded(path, GGMLQuantizationType[given.round])
        print(json.dumps(measure(file, windows, given.cache, given.threads)))


if __name__ == "__main__":
    main()
