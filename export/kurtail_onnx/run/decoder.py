"""A batch of texts going through an export, prefill or token by token; the cache never leaves the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kurtail_onnx.run.folder import PAST, Export, Port, present_of
from kurtail_onnx.run.session import Device, import_runtime
from kurtail_pl.errors import ArtefactError, InputError, NotFinite

Cache = dict[str, NDArray[Any]]


class Decoder:
    """Runs an export and keeps its cache.

    Args:
        export: the folder.
        session: opened on its graph.
        batch: number of texts.
        device: where the session runs.

    Raises:
        ArtefactError: when the graph has another cache than its description says.
    """

    def __init__(self, export: Export, session: Any, batch: int = 1, device: Device = "cpu") -> None:
        self.export, self.session, self.device = export, session, device
        self._runtime = import_runtime()
        self._batch = batch
        self._mask: NDArray[np.int64]
        self._ids: NDArray[np.int64] | None
        self._cache: dict[str, Any]
        inputs = {value.name: (value.type, tuple(value.shape)) for value in session.get_inputs()}
        described = {port.name: (port.type, port.shape) for port in export.cache_ports}
        if described != {name: value for name, value in inputs.items() if name.startswith(PAST)}:
            raise ArtefactError(f"{export.model} has another cache than the description beside it says; export again")
        self._clear()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._mask.shape[1])

    def forward(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Logits of the next tokens, ``[batch, tokens, vocabulary]`` float32.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 0 for padding, which stands before a text.

        Where a text crosses the border of longrope, beyond which its first tokens too have other angles, all of it goes
        through the graph once more; its logits are always those of the whole text at once.

        Raises:
            InputError: when the text grows longer than the model's positions, or crosses that border after `restore`.
            NotFinite: when a logit is infinite or not a number.
        """
        total = self.length + input_ids.shape[1]
        if total > self.export.positions:
            raise InputError(
                f"{total} tokens do not fit the model's {self.export.positions} positions; shorten the prompt or "
                "generate fewer tokens"
            )
        new, count = np.ones_like(input_ids) if attention_mask is None else attention_mask, input_ids.shape[1]
        mask = np.concatenate([self._mask, new], axis=1)
        ids = None if self._ids is None else np.concatenate([self._ids, input_ids], axis=1)
        if self._crosses_border(mask):
            if ids is None:
                raise InputError(
                    f"a restored cache ends before {self.export.rotary_border} tokens, beyond which all tokens of a "
                    "text have other angles; feed the text from its beginning instead"
                )
            self._clear()
            input_ids = ids
        self._mask, self._ids = mask, ids
        positions = np.maximum(self._mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        binding.bind_output("logits", "cpu")
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(present_of(name), self.device)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self._cache = dict(zip(self._cache, presents, strict=True))
        result: NDArray[Any] = logits.numpy()[:, -count:]
        if not (np.isfinite(result.max()) and np.isfinite(result.min())):
            raise NotFinite(
                f"{self.export.model} gives logits that are nan or infinite: values grow beyond its floating-point "
                "type; export again in a wider one (--to.dtype)"
            )
        return result

    def _crosses_border(self, mask: NDArray[np.int64]) -> bool:
        """Whether tokens that a new mask adds bring the longest text over the border of longrope."""
        border, before, after = self.export.rotary_border, self._mask.sum(1).max(), mask.sum(1).max()
        return border is not None and bool(0 < before <= border < after)

    def _clear(self) -> None:
        """Begin with no text at all."""
        self._mask = self._ids = np.zeros((self._batch, 0), np.int64)
        self._set({port.name: np.zeros(self._shape(port, 0), port.dtype) for port in self.export.cache_ports})

    def cache(self) -> Cache:
        """The cache by the names of its inputs, copied to the host."""
        return {name: value.numpy() for name, value in self._cache.items()}

    def restore(self, cache: Cache, attention_mask: NDArray[np.int64]) -> None:
        """Take over a cache.

        Args:
            cache: an array for each cache input.
            attention_mask: of its tokens, ``[batch, past]``.

        Raises:
            InputError: naming an array that is missing, superfluous, or of another shape or type than the graph's.
        """
        ports = {port.name: port for port in self.export.cache_ports}
        if cache.keys() != ports.keys():
            raise InputError(f"cache arrays {sorted(cache.keys() ^ ports.keys())} are missing or unknown to the graph")
        self._mask, self._ids = attention_mask, None
        for name, array in cache.items():
            expected = self._shape(ports[name], self.length)
            if array.shape != expected or array.dtype != ports[name].dtype:
                raise InputError(
                    f"cache array {name} is {array.dtype} {list(array.shape)}, expected "
                    f"{np.dtype(ports[name].dtype)} {list(expected)}; restore what the graph gave"
                )
        self._set(cache)

    def _set(self, cache: Cache) -> None:
        make = self._runtime.OrtValue.ortvalue_from_numpy
        self._cache = {name: make(np.ascontiguousarray(array), self.device, 0) for name, array in cache.items()}

    def _shape(self, port: Port, tokens: int) -> tuple[int, ...]:
        sizes = {"batch": self._mask.shape[0], "past": tokens}
        return tuple(size if isinstance(size, int) else sizes[size] for size in port.shape)
