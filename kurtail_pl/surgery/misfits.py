"""Whether rotations are of a model's sizes, and of the kinds that its family allows."""

from __future__ import annotations

from transformers import PretrainedConfig

from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.surgery.families import architecture_of, mlp_widths
from kurtail_pl.surgery.rotations import Rotations, head_dim_of


def misfits(rotations: Rotations, config: PretrainedConfig) -> list[str]:
    """What is not of a model's sizes, or not allowed in its family, in words."""
    layers, hidden, head = config.num_hidden_layers, config.hidden_size, head_dim_of(config)
    width, *dense = mlp_widths(config)
    fused = {
        "residual": (rotations.residual, [[hidden, hidden]]),
        "value": (rotations.value, [[layers, head, head], [layers, config.num_key_value_heads, head, head]]),
    }
    online = {
        "query_key": (rotations.query_key, head),
        "attention_output": (rotations.attention_output, config.num_attention_heads * head),
        "mlp_hidden": (rotations.mlp_hidden, width),
        "dense_hidden": (rotations.dense_hidden, dense[0] if dense else "none"),
    }
    return (
        _forbidden(rotations, config)
        + [
            f"{name} is {list(matrix.shape)}, the model wants {shapes[0]}"
            for name, (matrix, shapes) in fused.items()
            if matrix is not None and list(matrix.shape) not in shapes
        ]
        + [
            f"{name} has size {size_of(factors)}, the model wants {size}"
            for name, (factors, size) in online.items()
            if factors is not None and size_of(factors) != size
        ]
        + _unstacked(rotations.block_input, 2 * layers, hidden)
    )


def _forbidden(rotations: Rotations, config: PretrainedConfig) -> list[str]:
    record, kind = architecture_of(config), config.model_type
    found = []
    if record.rigid_residual is not None and rotations.residual is not None:
        found.append(f"residual is there, and this {kind} takes no R1 in its weights: {record.rigid_residual}")
    if record.rigid_hidden is not None:
        found += [
            f"{name} has signs, and this {kind} takes none: {record.rigid_hidden}"
            for name in ("mlp_hidden", "dense_hidden")
            if getattr(getattr(rotations, name), "signs", None) is not None
        ]
    return found


def _unstacked(factors: HadamardFactors | None, count: int, size: int) -> list[str]:
    """Whether factors, if any, are a stack of so many of a size."""
    if factors is None:
        return []
    shapes = [list(factor.shape) for factor in (factors.left, factors.right)]
    stacked = all(len(shape) == 3 and shape[0] == count for shape in shapes)
    if stacked and size_of(factors.of(0)) == size:
        return []
    return [f"block_input has factors {shapes[0]} and {shapes[1]}, the model wants {count} of size {size}"]


def size_of(factors: HadamardFactors) -> int:
    """Width of what a Hadamard acts on; 0 where its factors are not square, or its signs are of another number."""
    square = all(factor.ndim == 2 and factor.shape[0] == factor.shape[1] for factor in (factors.left, factors.right))
    fits = factors.signs is None or factors.signs.shape == (factors.size,)
    return factors.size if square and fits else 0
