"""Kernels that an export to vLLM needs, by the script that is made for it: what they compute, not how fast."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("part", "package"), [("gemm", "humming"), ("cache", "vllm")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_kernel_computes_what_the_mirror_does(part: str, package: str, dtype: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    command = [sys.executable, str(SCRIPT), "--parts", part, "--dtype", dtype]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"{part}: as the mirror" in done.stdout, done.stdout + done.stderr
