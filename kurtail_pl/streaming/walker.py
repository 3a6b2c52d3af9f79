"""One decoder layer's weights in memory at a time; capture, folding, GPTQ and evaluation all walk this way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from kurtail_pl.errors import CheckpointError
from kurtail_pl.progress import track
from kurtail_pl.storage.card import require_plain
from kurtail_pl.storage.checkpoint import Checkpoint, to_float
from kurtail_pl.storage.resume import Workplace
from kurtail_pl.streaming.heap import trim_heap
from kurtail_pl.streaming.hidden import CPU, HiddenStates
from kurtail_pl.surgery.equip import empty_model, layers_of
from kurtail_pl.surgery.families import architecture_of, number_of
from kurtail_pl.surgery.layout import module_state

SLIDING, FULL = "sliding_attention", "full_attention"
"""What transformers calls kinds of layers."""


class Walker:
    """Runs a checkpoint layer by layer.

    Args:
        checkpoint: where the weights are.
        model: its modules, without weights; the plain model of the configuration when not given.
        dtype: floating-point type of the computation.
        device: where the current module's weights are, and its hidden states go through it.

    Raises:
        UnsupportedArchitecture: when the model's family has no matching record.
        ArtefactError: when the plain model of a KurTail folder is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        if model is None:
            require_plain(checkpoint.folder)
        self.model = empty_model(checkpoint.config) if model is None else model
        self.architecture = architecture_of(checkpoint.config)
        self.n_layers = len(layers_of(self.model, self.architecture))
        self.model.get_submodule(self.architecture.rotary).to(device)
        self._positions: dict[tuple[int, torch.dtype, str], dict[str, object]] = {}

    def _read(self, prefix: str) -> dict[str, Tensor]:
        return module_state(self.checkpoint.tensors_under(prefix), self.architecture)

    def _read_ahead(self, prefix: str) -> dict[str, Tensor]:
        """The same in a thread; for CUDA to where the device copies from by itself, which is what reads the disk."""
        tensors = self._read(prefix)
        return {n: t.pin_memory() for n, t in tensors.items()} if self.device.type == "cuda" else tensors

    def _to_device(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # First to the device, as it is: fewer bytes, and the conversion is done there.
        tensor = tensor.to(self.device, non_blocking=True)
        # The scales of packed weights stay float32, as there is one for thousands of weights; so do biases that choose
        # experts, where a rounded one would choose others.
        exact = name.endswith(("scale", "correction_bias"))
        return to_float(tensor, torch.promote_types(dtype, torch.float32) if exact else dtype)

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None) -> nn.Module:
        return self._put(module, self._read(prefix), prefix, dtype)

    def _put(
        self, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None = None
    ) -> nn.Module:
        trim_heap()  # Of what the module before left.
        state = {name: self._to_device(name, t, dtype or self.dtype) for name, t in tensors.items()}
        self.checkpoint.fill(module, prefix, state)
        # What is not part of the checkpoint, such as the factors of online Hadamards.
        return module.to(self.device)

    def embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The embedding, with its weights, in a type of its own if one is given; drop it when done."""
        name = self.architecture.embedding
        return cast(nn.Embedding, self._fill(self.model.get_submodule(name), name, dtype))

    def embed(self, embedding: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """What the first decoder layer reads of tokens ``[..., tokens]``: ``[..., tokens, hidden]``."""
        return embedding(ids) * number_of(self.checkpoint.config, self.architecture.embedding_multiplier)

    def added(self, hidden: Tensor, written: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The residual stream behind a block: what was there and what the block writes, through a norm if given."""
        written = written if norm is None else norm(written)
        return hidden + written * number_of(self.checkpoint.config, self.architecture.residual_multiplier)

    def logits(self, norm: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
        """What final norm and head make of hidden states ``[..., hidden]``: ``[..., vocabulary]``."""
        config, architecture = self.checkpoint.config, self.architecture
        logits: Tensor = head(norm(hidden)) / number_of(config, architecture.logits_divisor)
        cap = None if architecture.logits_cap is None else getattr(config, architecture.logits_cap)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Linear]:
        """Final norm and `lm_head`, with their weights, as `embedding`."""
        norm = self.model.get_submodule(self.architecture.final_norm)
        norm = self._fill(norm, self.architecture.final_norm, dtype)
        name = self.architecture.head
        return norm, cast(nn.Linear, self._fill(self.model.get_submodule(name), name, dtype))

    def layers(self, description: str, work: Workplace | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Each decoder layer in turn, with its weights only while it is the current one; shows progress.

        The next layer's tensors are read from disk while this one computes.

        Args:
            description: for the progress display.
            work: finished layers are left out, and each layer counts as finished when the next is asked for.
        """
        layers, prefix = layers_of(self.model, self.architecture), self.architecture.layers
        todo = range((work and work.done) or 0, self.n_layers)
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self._read_ahead, f"{prefix}.{todo.start}") if todo else None
            for index in track(todo, description):
                assert coming is not None
                # Nothing here may hold on to the tensors: what replaces them in the layer would not free them.
                layer = self._put(layers[index], coming.result(), f"{prefix}.{index}")
                coming = reader.submit(self._read_ahead, f"{prefix}.{index + 1}") if index + 1 < self.n_layers else None
                yield index, layer
                layers[index].to("meta")
                if work is not None:
                    work.finished(index + 1)

    @torch.no_grad()
    def hidden_states(self, windows: Tensor, work: Workplace, name: str = "hidden") -> HiddenStates:
        """Hidden states of ``[windows, tokens]`` after the finished layers of the work; from the embedding, if none is.

        No windows give no states. Those of other windows have files of another name.

        Raises:
            CheckpointError: when a token has no embedding.
        """
        vocabulary = self.checkpoint.config.vocab_size
        if windows.numel() and windows.max() >= vocabulary:
            raise CheckpointError(
                f"the text has token {windows.max()} and the model in {self.checkpoint.folder} has {vocabulary}; give "
                "the model's own tokenizer, or a text without the names of added tokens"
            )
        shape = *windows.shape, int(self.checkpoint.config.hidden_size)
        hidden = HiddenStates(work, shape, self.dtype, self.device, name)
        if not work.done:
            if len(windows):
                embedding = self.embedding()
                hidden.before.fill(self.embed(embedding, window.unsqueeze(0).to(self.device)) for window in windows)
                embedding.to("meta")
            work.finished(0)
        return hidden

    def positions(self, layer: nn.Module, hidden: Tensor) -> dict[str, object]:
        """Keyword arguments that a decoder layer, or its attention, needs beside ``[1, tokens, hidden]`` states."""
        kind = self._kind(layer)
        key = hidden.shape[1], hidden.dtype, kind
        if key not in self._positions:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            make_mask = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            self._positions[key] = {
                "position_ids": position_ids,
                "position_embeddings": self.angles(layer, hidden, position_ids),
                # None where windows are no longer than the sliding one: the attention then takes its causal path.
                "attention_mask": make_mask(
                    config=self.model.config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=position_ids,
                ),
            }
        return self._positions[key]

    def angles(self, layer: nn.Module, hidden: Tensor, position_ids: Tensor) -> object:
        """Cosines and sines that a layer turns queries and keys at some positions by."""
        rotary = self.model.get_submodule(self.architecture.rotary)
        kind = (self._kind(layer),) if self.architecture.rotary_by_kind else ()
        return rotary(hidden, position_ids, *kind)

    def _kind(self, layer: nn.Module) -> str:
        """How a layer attends, to a sliding window or to all; families say so for each layer or for all."""
        config = self.model.config
        kinds: list[str] | None = getattr(config, "layer_types", None)
        if kinds is None:
            return FULL if getattr(config, "sliding_window", None) is None else SLIDING
        return kinds[cast(int, layer.get_submodule(self.architecture.attention).layer_idx)]

    @torch.no_grad()
    def advance(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after a decoder layer, ``[1, tokens, hidden]``."""
        output: Tensor = layer(hidden, **self.positions(layer, hidden))
        return output
