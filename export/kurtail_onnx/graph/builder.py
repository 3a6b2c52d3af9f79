"""A graph under construction: scoped names, shared constants, and weights that are read only when written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kurtail_onnx.settings import Precision

OPSET, IR_VERSION = 23, 10
FLOATS: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "fp64": ir.DataType.DOUBLE,
}
Array = NDArray[np.generic]
Attribute = int | float | str | Sequence[int] | ir.TensorProtocol


class GraphBuilder:
    """Nodes, initializers and functions of one model.

    A node is named by its scope and operator, such as ``/model/layers.7/mlp/down_proj/MatMul``; an operator that comes
    twice in a scope gets a number. The order of calls decides every name, so equal inputs give equal bytes.

    Args:
        dtype: floating-point type of the computation, one of `FLOATS`.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="kurtail")
        self.functions: dict[tuple[str, str, str], ir.Function] = {}
        self._scopes: list[str] = []
        self._seen: Counter[str] = Counter()
        self._constants: dict[str, ir.Value] = {}

    @property
    def double(self) -> bool:
        """Whether the computation is in double; some operators then have no kernel and are written out."""
        return self.dtype == ir.DataType.DOUBLE

    @property
    def wide(self) -> ir.DataType:
        """Type of what is never computed in half precision."""
        return self.dtype if self.double else ir.DataType.FLOAT

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name what is added in the block under ``name``; dots in a module's name stay with its layer's index."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    @contextmanager
    def root_scope(self, *names: str) -> Iterator[None]:
        """Name what is added in the block from the top, whatever scope is open."""
        outer, self._scopes = self._scopes, list(names)
        try:
            yield
        finally:
            self._scopes = outer

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Attribute
    ) -> ir.Value:
        """Append a node with one output; `name` replaces the operator in the node's name."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        name: str | None = None,
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        stem = "/".join(["", *self._scopes, name or op_type])
        number = self._seen[stem]
        self._seen[stem] += 1
        full = f"{stem}_{number}" if number else stem
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=full)
        for index, value in enumerate(node.outputs):
            value.name = f"{full}/output_{index}"
        self.graph.append(node)
        return node.outputs

    def call(self, function: ir.Function, *inputs: ir.Value, name: str, **attributes: Attribute) -> ir.Value:
        """Append a node that calls a model-local function."""
        self.functions.setdefault(function.identifier(), function)
        return self.op(function.name, *inputs, domain=function.domain, name=name, **attributes)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare an input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a value an output of the graph, under another name."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def weight(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """Declare an initializer whose content is read when the file is written; nothing is kept in memory."""
        tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)
        return self._initializer(tensor, name)

    def constant(self, array: Array, name: str) -> ir.Value:
        """Declare an initializer that is at hand; one of the same name is shared."""
        if name not in self._constants:
            self._constants[name] = self._initializer(ir.Tensor(np.ascontiguousarray(array), name=name), name)
        return self._constants[name]

    def ints(self, *numbers: int) -> ir.Value:
        """A shared int64 vector."""
        return self.constant(np.array(numbers, np.int64), f"constants.int64.{'_'.join(map(str, numbers))}")

    def index(self, number: int) -> ir.Value:
        """A shared int64 scalar."""
        return self.constant(np.array(number, np.int64), f"constants.int64.scalar_{number}")

    def scalar(self, number: float) -> ir.Value:
        """A shared scalar in the dtype of the computation."""
        return self.constant(np.array(number, self.dtype.numpy()), f"constants.float.{number}")

    def times(self, x: ir.Value, number: float) -> ir.Value:
        """Append a product with a number, unless it is one."""
        return x if number == 1 else self.op("Mul", x, self.scalar(number))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Append a Cast."""
        return self.op("Cast", x, to=int(dtype))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Append a Reshape to a constant shape: 0 keeps a dimension, -1 takes what is left."""
        return self.op("Reshape", x, self.ints(*shape))

    def model(self, metadata: dict[str, str]) -> ir.Model:
        """The finished model."""
        return ir.Model(
            self.graph,
            ir_version=IR_VERSION,
            producer_name="kurtail_onnx",
            functions=list(self.functions.values()),
            metadata_props=metadata,
        )

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value
