"""A file for each runtime; `TARGETS` has them by the names that recipes write."""

from typing import Literal

from kurtail_pl.methods.target import Target
from kurtail_pl.methods.targets.llama_cpp import LlamaCpp
from kurtail_pl.methods.targets.onnxruntime import ONNXRuntime
from kurtail_pl.methods.targets.simulation import Simulation
from kurtail_pl.methods.targets.vllm import VLLMKernels

TargetName = Literal["torch", "onnxruntime", "llama.cpp", "vllm"]
TARGETS: dict[TargetName, Target] = {
    "torch": Simulation(),
    "onnxruntime": ONNXRuntime(),
    "llama.cpp": LlamaCpp(),
    "vllm": VLLMKernels(),
}
