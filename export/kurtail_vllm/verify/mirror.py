"""vLLM's arithmetic in torch: transform, quantizer and product of a linear, from what the folder says alone.

Each rule and where it stands in vLLM 0.32, below `vllm/model_executor/layers/quantization/compressed_tensors/`:

- the transform is of what a linear reads, before its quantizer (`transform/linear.py`, `apply`);
- a matrix is divided by the root of its size once it is read, and rows are multiplied by it: ``x W / sqrt(n)``
  (`transform/module.py`, `process_weights_after_loading` and `forward` without `inverse`);
- a transform of type ``hadamard`` is not read but computed, Sylvester's over sqrt(n); one with ``head_dim`` turns
  neighbouring blocks of so many channels (`transform/module.py`, `forward`);
- all layers share the matrix of a group and size (`_get_data_key`);
- what is read has one scale for each token or group, its largest magnitude over the largest code, and codes from
  ``-2^(bits - 1)`` on (`schemes/compressed_tensors_wNa4.py`; humming-kernels' `process_input.py`);
- a weight is ``(code - zero point) * scale``, and the bias is added to the product.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.maths.quantizers import split_groups
from kurtail_pl.maths.rounding import rounded
from kurtail_vllm.verify.folder import Served


class MirrorLinear(nn.Module):
    """A linear as vLLM computes it, in double.

    Args:
        served: the folder.
        name: of the linear in it.
    """

    def __init__(self, served: Served, name: str) -> None:
        super().__init__()
        scheme, state = served.scheme(name), served.weight(name)
        state["weight_scale"] = state["weight_scale"].double()
        self.inputs: QuantizationArgs | None = scheme.input_activations
        self.weight: Tensor = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        self.bias = served.tensor(f"{name}.bias").double() if f"{name}.bias" in served.names else None
        self.matrix = served.transform(name)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        if self.matrix is not None:
            assert self.bias is None, "vLLM stops here"
            x = (x.reshape(*x.shape[:-1], -1, len(self.matrix)) @ self.matrix).flatten(-2)
        return F.linear(x if self.inputs is None else quantized(x, self.inputs), self.weight, self.bias)


def quantized(x: Tensor, arguments: QuantizationArgs) -> Tensor:
    """Activations on the grid of each token, or group of its channels, ``[..., n]``."""
    largest = (1 << (arguments.num_bits - 1)) - 1
    grouped = split_groups(x, arguments.group_size)
    magnitude = grouped.abs().amax(-1, keepdim=True)
    scale = torch.where(magnitude > 0, magnitude / largest, 1.0)
    # Exact halves fall where they fall in the artefact's own double.
    return (rounded(grouped / scale).clamp(-largest - 1, largest) * scale).flatten(-2)
