"""The kernels of vLLM that an exported folder needs, on a GPU: do they compute what its mirrors do, and how fast.

    python benchmarks/gpu_kernels.py --folder exports/llama --out gpu.json     # on a card of 8.0 or more, in 8 minutes
    python benchmarks/gpu_kernels.py --cpu-dry-run                             # anywhere, to see that it works

Three parts, each for itself; one that cannot run says why in a line. `gemm`: codes, scales and outputs of
humming-kernels on the folder's linears, or on a random one. `cache`: what vLLM's kernel writes for
`int4_per_token_head`. `times`: the linears of a Llama-3-8B layer. benchmarks/README.md says what to install, and
docs/results/gpu.md what an H200 gave.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PACKAGES = ("torch", "triton", "humming-kernels", "vllm", "compressed-tensors", "kurtail-pl")
PARTS = ("gemm", "cache", "times")


def machine() -> dict[str, Any]:
    """The card and the versions."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        found |= {"card": torch.cuda.get_device_name(), "capability": ".".join(map(str, capability))}
        found["vLLM 0.32 takes 4-bit inputs of linears as"] = served(capability)
    return found


def served(capability: tuple[int, int]) -> str:
    """What vLLM makes of 4-bit inputs here (`utils/humming/schema.py`, `check_and_fallback_input_schema`)."""
    if capability < (9, 0):
        return "int4"
    return "float16 or bfloat16" if (10, 3) <= capability < (11, 0) else "int8; int4 below is the package's alone"


def gemm(args: argparse.Namespace) -> dict[str, Any]:
    """Codes and outputs of the product."""
    import gpu_gemm
    import gpu_humming

    # In parts of sums torch would round to float16, and its error had no bound here.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    make: gpu_gemm.Make = gpu_humming.Emulated
    if not args.cpu_dry_run:
        make = _humming(gpu_gemm.TOKENS)
    device = "cpu" if args.cpu_dry_run else "cuda"
    if args.folder is not None:
        return gpu_gemm.compare(args.folder, make, device, args.linears)
    with tempfile.TemporaryDirectory() as place:
        rows, columns = args.shape
        folder = gpu_gemm.random_folder(Path(place), rows, columns, DTYPES[args.dtype])
        return gpu_gemm.compare(folder, make, device)


def _humming(tokens: int) -> Any:
    import gpu_humming

    return lambda tensors, bits: gpu_humming.Humming(tensors, bits, (tokens,))


def cache(args: argparse.Namespace) -> dict[str, Any]:
    """What is written into the cache."""
    import gpu_cache

    if args.cpu_dry_run:
        return gpu_cache.compare(gpu_cache.Emulated(), (64,), tokens=16)
    return gpu_cache.compare(gpu_cache.Kernel(args.cache_source))


def times(args: argparse.Namespace) -> dict[str, Any]:
    """The linears of a layer."""
    import gpu_times

    dtype = DTYPES[args.dtype]
    return gpu_times.rehearse(dtype) if args.cpu_dry_run else gpu_times.measure(args.repeats, args.seconds, dtype)


def run(part: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """A part's result with its seconds, or why there is none."""
    before = time.monotonic()
    try:
        result = part(args)
    except Exception as error:  # Whatever a library of others raises, the other parts go on.
        lines = str(error).strip().splitlines() or ["no more is said"]
        result = {"not run": f"{type(error).__name__}: {lines[0][:300]}"}
    return result | {"seconds": round(time.monotonic() - before, 1)}


def told(name: str, result: dict[str, Any]) -> str:
    """A part in a line, and its failures in one each."""
    if "not run" in result:
        return f"{name}: not run: {result['not run']}"
    failures = result.get("failures", [])
    verdict = f"{len(failures)} failures" if failures else "done" if name == "times" else "as the mirror"
    return "\n".join([f"{name}: {verdict}, {result['seconds']} s", *(f"  {failure}" for failure in failures)])


def table(times_found: dict[str, Any]) -> str:
    """Milliseconds of the whole layer, and of each linear."""
    blocks = {"layer": times_found.get("layer", {})}
    blocks |= {name: linear["times"] for name, linear in times_found.get("linears", {}).items()}
    lines = []
    for name, by_tokens in blocks.items():
        whats = list(dict.fromkeys(what for row in by_tokens.values() for what in row))
        if whats:
            lines.append(f"{name}, ms".ljust(56) + "".join(f"{tokens:>22}" for tokens in by_tokens))
        for what in whats:
            cells = (row.get(what) for row in by_tokens.values())
            lines.append(f"  {what}".ljust(56) + "".join(f"{'-' if c is None else f'{c:.4f}':>22}" for c in cells))
    for name, linear in times_found.get("linears", {}).items():
        lines += [f"{name}, {what}: {kernel}" for what, kernel in linear.get("kernels", {}).items()]
    return "\n".join([*lines, *(f"stopped: {why}" for why in times_found.get("stopped", ()))])


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of kurtail export --to vllm; none: a random layer")
    parser.add_argument("--linears", type=int, default=7, help="so many of the folder's")
    parser.add_argument("--shape", type=int, nargs=2, help="outputs and inputs of the random layer: 1024 4096")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of the random layer and of times")
    parser.add_argument("--cache-source", type=Path, help="vLLM's int4_per_token_head.py, where vLLM is not installed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300, help="after which no more times are taken")
    parser.add_argument("--out", type=Path, help="JSON of all that was found")
    parser.add_argument("--cpu-dry-run", action="store_true", help="kernels emulated in torch, tiny shapes, no times")
    return parser


def main() -> int:
    """Run, print, write; 1 when a kernel does not compute what the mirror does."""
    args = arguments().parse_args()
    args.shape = args.shape or ((64, 384) if args.cpu_dry_run else (1024, 4096))
    if not args.cpu_dry_run and not torch.cuda.is_available():
        print("no GPU here; --cpu-dry-run runs what needs none")
        return 2
    report: dict[str, Any] = {"machine": machine(), "dry run": args.cpu_dry_run}
    for name, value in report["machine"].items():
        print(f"{name}: {value}")
    verbs = {"gemm": gemm, "cache": cache, "times": times}
    for name in args.parts:
        report[name] = run(verbs[name], args)
        print(told(name, report[name]), flush=True)
        if args.out is not None:
            # After each part: the machine may be taken away.
            args.out.write_text(json.dumps(report, indent=2), encoding="utf-8")
    for name, linear in report.get("gemm", {}).get("linears", {}).items():
        print(f"{name}: {json.dumps(linear)}")
    if text := table(report.get("times", {})):
        print(text)
    return int(any(report[name].get("failures") for name in args.parts))


if __name__ == "__main__":
    sys.exit(main())
