"""Pieces of an exported graph as graphs of their own: each decoder layer, and the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kurtail_onnx.describe import MODEL
from kurtail_onnx.graph.model import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, hidden_name
from kurtail_onnx.profiles import Profile
from kurtail_onnx.run.folder import present_of
from kurtail_onnx.run.session import open_session

STEP_INPUTS = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
PIECE = ".piece.onnx"


class Pieces:
    """Cuts the graph of an export at the residual stream between decoder layers.

    Args:
        folder: of the export; the weights stay in its file, and a piece's graph is put beside it for a moment.
        dtype: of the computation.
        profile: how pieces are run.
    """

    def __init__(self, folder: Path, dtype: ir.DataType, profile: Profile = "exact") -> None:
        self._folder, self._dtype, self._profile = folder, dtype, profile
        self._model = ir.load(folder / MODEL)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A session of one decoder layer, from ``hidden.{index}`` and its cache to the next."""
        pasts = [v.name for v in self._model.graph.inputs if (v.name or "").startswith(f"past_key_values.{index}.")]
        names = [name for name in pasts if name is not None]
        ends = [hidden_name(index + 1), *map(present_of, names)]
        with self._session([*STEP_INPUTS, hidden_name(index), *names], ends) as session:
            yield session

    @contextmanager
    def head(self, layers: int) -> Iterator[Any]:
        """A session of final norm and head, from ``hidden.{layers}`` to the logits."""
        with self._session([hidden_name(layers)], [LOGITS]) as session:
            yield session

    @contextmanager
    def _session(self, inputs: Sequence[str], outputs: Sequence[str]) -> Iterator[Any]:
        graph = ir.convenience.extract(self._model.graph, inputs, outputs)
        for value in (*graph.inputs, *graph.outputs):
            if value.type is None:
                value.type = ir.TensorType(self._dtype)
        functions = list(self._model.functions.values())
        path = self._folder / PIECE
        ir.save(ir.Model(graph, ir_version=self._model.ir_version, functions=functions), path)
        try:
            yield open_session(path, self._profile, threads=1)
        finally:
            path.unlink()
