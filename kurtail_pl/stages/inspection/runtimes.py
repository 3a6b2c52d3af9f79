"""What each runtime makes of a file: whether it loads, what it computes with, and whether that is the file's model.

Nothing is run. Each rule was read in the runtime's source, or seen when it was run: vLLM 0.32 (`compressed_tensors/`),
transformers 5.23 (`quantizers/`), llama.cpp of October 2026 (`conversion/`, `llama-kv-cache.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kurtail_pl.stages.inspection.facts import FLOAT, Facts, Kind

Result = Literal["exact", "approximate", "garbage", "does not load"]
AS_ASKED = "as the server is asked to"
INT8 = "8-bit integers in blocks of 32"


@dataclass(frozen=True)
class Verdict:
    """A runtime with a file.

    Args:
        runtime: its name, and how it is started where that matters.
        result: ``exact`` where it computes the model that the file stands for, ``approximate`` where it rounds
            otherwise, ``garbage`` where it leaves out what the weights expect.
        reason: why, or what to do instead.
        weights: what it multiplies by, in words.
        activations: what they are multiplied with.
        cache: what it keeps of keys and values.
        rotations: which are fused, run, or are left out.
    """

    runtime: str
    result: Result
    reason: str
    weights: str = ""
    activations: str = ""
    cache: str = ""
    rotations: str = "fused"


def verdicts(facts: Facts) -> list[Verdict]:
    """One for each runtime, in the order of a table."""
    return list(RULES[facts.kind](facts))


def _artefact(facts: Facts) -> Iterator[Verdict]:
    computed = (facts.weights, facts.activations, facts.cache, _acting(facts))
    yield Verdict("torch", "exact", "kurtail_pl.load", *computed)
    yield Verdict("transformers", "exact", "after import kurtail_pl; without it, it refuses", *computed)
    for runtime, exporter in {"vLLM": "vllm", "SGLang": "vllm", "llama.cpp": "gguf", "ONNX Runtime": "onnx"}.items():
        yield _refused(runtime, f"kurtail export --to {exporter} writes what it loads, or says why not")


def _graph(facts: Facts) -> Iterator[Verdict]:
    for runtime in ("torch", "transformers", "vLLM", "SGLang", "llama.cpp"):
        yield _refused(runtime, "this is an ONNX graph")
    yield Verdict(
        "ONNX Runtime", "exact", "with the session settings of kurtail_export.json", facts.weights, facts.activations,
        facts.cache, "fused, others are nodes",
    )  # fmt: skip


def _gguf(facts: Facts) -> Iterator[Verdict]:
    yield _refused("torch", "kurtail fit --data.init_args.capture.model FILE reads it as a model to quantize")
    if facts.online:
        garbage = f"the weights expect rotated inputs ({', '.join(facts.online)}), and nothing here rotates them"
        yield Verdict("transformers", "garbage", garbage, FLOAT, FLOAT, FLOAT, "left out")
        yield Verdict("llama.cpp", "garbage", garbage, facts.weights, INT8, AS_ASKED, "left out")
    else:
        yield Verdict("transformers", "exact", "gguf_file= dequantizes the weights", FLOAT, FLOAT, FLOAT)
        yield Verdict(
            "llama.cpp", "exact", "-ctk q4_0 -ctv q4_0 for a 4-bit cache, which it turns by a Hadamard of its own",
            facts.weights, INT8, AS_ASKED,
        )  # fmt: skip
    for runtime in ("vLLM", "SGLang"):
        yield _refused(runtime, "not without a plugin; kurtail export --to vllm writes what it loads")
    yield _refused("ONNX Runtime", "kurtail export --to onnx writes what it loads")


def _compressed(facts: Facts) -> Iterator[Verdict]:
    yield _refused("torch", "KurTail loads its own artefacts; this folder is for servers")
    yield _compressed_elsewhere("transformers", facts, facts.activations, "simulated")
    yield from _vllm(facts)
    yield _compressed_elsewhere("SGLang", facts, FLOAT, "left float")
    yield _converted(facts)
    yield _refused("ONNX Runtime", "kurtail export --to onnx, from the artefact, writes what it loads")


def _compressed_elsewhere(runtime: str, facts: Facts, activations: str, done: str) -> Verdict:
    """Runtimes that load the layout and do not read `transform_config`."""
    if facts.online:
        return Verdict(
            runtime, "garbage", f"it ignores transform_config, and the weights expect {_listed(facts)} rotated",
            facts.weights, activations, FLOAT, "left out",
        )  # fmt: skip
    same = facts.activations == FLOAT or activations == facts.activations
    reason = "weights alone are quantized" if facts.activations == FLOAT else f"quantized activations are {done}"
    return Verdict(runtime, "exact" if same else "approximate", reason, facts.weights, activations, FLOAT)


def _vllm(facts: Facts) -> Iterator[Verdict]:
    rotations = f"fused; {_listed(facts)} rotated at run time" if facts.online else "fused"
    if facts.turned_cache:
        rotations += "; that of queries and keys is left out, which changes no score"
    if facts.activations == FLOAT:
        yield Verdict("vLLM", "exact", "weights alone are quantized", facts.weights, FLOAT, AS_ASKED, rotations)
        return
    yield Verdict(
        "vLLM, as it starts by default", "approximate",
        "it takes the first kernel that fits, and leaves activations float without a word; start it with "
        "--linear-backend humming",
        facts.weights, FLOAT, AS_ASKED, rotations,
    )  # fmt: skip
    yield Verdict(
        "vLLM --linear-backend humming", "exact",
        "on GPUs of compute capability 8.0 to 8.9; its log says HummingLinearKernel; --kv-cache-dtype "
        "int4_per_token_head for a 4-bit cache",
        facts.weights, facts.activations, AS_ASKED, rotations,
    )  # fmt: skip


def _converted(facts: Facts) -> Verdict:
    if facts.online:
        return Verdict(
            "llama.cpp", "garbage", f"its converter ignores transform_config, and the weights expect {_listed(facts)} "
            "rotated", "", INT8, AS_ASKED, "left out",
        )  # fmt: skip
    return Verdict(
        "llama.cpp", "approximate", "convert_hf_to_gguf rounds the weights again; export --to gguf keeps the codes",
        "rounded again", INT8, AS_ASKED,
    )  # fmt: skip


def _plain(facts: Facts) -> Iterator[Verdict]:
    for runtime in ("torch", "transformers", "vLLM", "SGLang"):
        yield Verdict(runtime, "exact", "a plain model: nothing is quantized", FLOAT, FLOAT, FLOAT, "none")
    yield _refused("llama.cpp", "convert_hf_to_gguf writes what it loads")
    yield _refused("ONNX Runtime", "optimum writes what it loads")


RULES: dict[Kind, Callable[[Facts], Iterator[Verdict]]] = {
    "artefact": _artefact,
    "onnx": _graph,
    "gguf": _gguf,
    "compressed-tensors": _compressed,
    "plain": _plain,
}


def _refused(runtime: str, instead: str) -> Verdict:
    return Verdict(runtime, "does not load", instead, rotations="")


def _acting(facts: Facts) -> str:
    return "fused" if not facts.online else f"fused; {', '.join(facts.online)} at run time"


def _listed(facts: Facts) -> str:
    return " and ".join(facts.online)
