"""One pass over a fused model: solve a layer, write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kurtail_pl.artefact.shards import ShardWriter, named
from kurtail_pl.artefact.skeleton import bits_per_weight
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.methods.tuner import Block, Site, Tuning
from kurtail_pl.ranks import Ranks
from kurtail_pl.stages.fusion.stage import copy_companions
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.quantization.calibration import as_stored
from kurtail_pl.stages.quantization.float_layer import FloatLayer
from kurtail_pl.stages.quantization.layer import LayerSolver
from kurtail_pl.stages.quantization.prefix import prefix_states
from kurtail_pl.stages.quantization.spec import QuantizeSpec
from kurtail_pl.stages.quantization.transforms import TransformTraining
from kurtail_pl.stages.text import Windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.card import write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.mark import write_config
from kurtail_pl.storage.resume import Workplace
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.streaming.hidden import HiddenStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import put_prefix
from kurtail_pl.surgery.equip import empty_model, equip_model, layers_of
from kurtail_pl.surgery.exact import exact_names
from kurtail_pl.surgery.invertible import expect_maps
from kurtail_pl.surgery.layout import checkpoint_state
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import Rotations, head_dim_of

INHERITED = ("source", "tokenizer_sha256", "rotations", "rotations_sha256", "gate")
"""What an artefact's card takes over from the fused model's."""


class Rounding:
    """One pass over a fused model: solve a layer, write it.

    Args:
        walker: of the fused model, equipped.
        rotations: its own.
        spec: methods.
        scheme: its scheme, bits of layers decided.
        ranks: the processes that share the windows.
        work: where the artefact is made.
    """

    def __init__(
        self, walker: Walker, rotations: Rotations, spec: QuantizeSpec, scheme: Scheme, ranks: Ranks, work: Workplace
    ) -> None:
        self.walker, self.rotations = walker, rotations
        self.spec, self.scheme, self.ranks, self.work = spec, scheme, ranks, work
        self.float_model = equipped(walker.checkpoint, FLOAT, rotations) if spec.needs_float_model else None
        self.solver = LayerSolver(walker, spec.scheme, spec.rounder, spec.matching, ranks, spec.by_attention)
        self.solver.notes.update(work.state.get("notes", {}))
        self.clips: list[dict[str, float]] = list(work.state.get("clips", []))
        self.transforms: list[dict[str, float]] = list(work.state.get("transforms", []))
        self.head_dim = head_dim_of(walker.checkpoint.config)
        self.shards = ShardWriter(work.folder, work.scratch, parts=walker.n_layers + 2)

    @torch.no_grad()
    def run(self, text: Windows | None, own_text: Windows | None, meter: Meter) -> None:
        """Write all weights; go on after the last layer that was finished."""
        architecture, spec, walker, work = self.walker.architecture, self.spec, self.walker, self.work
        if work.done is None and self.ranks.leads:
            self._write_embedding()
        hidden = walker.hidden_states(self._share(text if spec.needs_inputs else None), work)
        own = walker.hidden_states(self._share(own_text), work, "learning")
        exact = None if self.float_model is None else hidden.beside("exact")
        prefix = self._prefix()
        label = "quantize" if self.scheme.weights is None else spec.rounder.label
        for index, layer in walker.layers(f"{label} layers", work):
            name = f"{architecture.layers}.{index}"
            self._train(index, layer, own)
            beside = self._beside(index, layer, exact)
            if prefix:
                self._put_prefix(prefix[index], layer, beside)
            tuning = None if spec.clips is None else spec.clips.tuning(self._block(layer, own))
            self.solver.solve_layer(layer, name, hidden, self.scheme.layer_weights(index), beside, tuning)
            if tuning is not None:
                self._tuned(layer, tuning, hidden)
            if self.ranks.leads:
                self.shards.write(index + 1, _state(name, layer, architecture))
            work.state.update(
                notes=self.solver.notes, clips=self.clips, transforms=self.transforms, cost=meter.to_dict()
            )
        if self.ranks.leads:
            self._write_head()

    def _write_embedding(self) -> None:
        architecture, embedding = self.walker.architecture, self.walker.embedding(torch.float32)
        self.shards.write(0, _state(architecture.embedding, embedding, architecture))
        embedding.to("meta")

    def _write_head(self) -> None:
        """Write final norm and head, the last of all."""
        architecture, (norm, head) = self.walker.architecture, self.walker.head(torch.float32)
        tensors = _state(architecture.final_norm, norm, architecture) | _state(architecture.head, head, architecture)
        self.shards.write(self.walker.n_layers + 1, tensors)
        self.shards.close()

    def _share(self, text: Windows | None) -> Tensor:
        """The windows of this process."""
        windows = torch.empty(0, 0, dtype=torch.long) if text is None else text.tokens
        mine = self.ranks.share(len(windows))
        return windows[mine.start : mine.stop]

    def _prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prefix in each layer; empty without one."""
        walker, prefix = self.walker, self.scheme.prefix
        return list(prefix_states(walker.checkpoint, prefix, walker.dtype, walker.device)) if prefix else []

    def _put_prefix(self, prefix: tuple[Tensor, Tensor], layer: nn.Module, beside: FloatLayer | None) -> None:
        """Put its keys and values before those of a layer, and of the one in the float model."""
        for each in (layer,) if beside is None else (layer, beside.layer):
            put_prefix(each.get_submodule(self.walker.architecture.attention), *prefix)

    def _beside(self, index: int, layer: nn.Module, exact: HiddenStates | None) -> FloatLayer | None:
        """The layer in the float model, where that runs beside."""
        if self.float_model is None or exact is None:
            return None
        twin = layers_of(self.float_model, self.walker.architecture)[index]
        if self.transforms:
            expect_maps(twin, self.walker.architecture, self.scheme, self.head_dim)
        return FloatLayer(self.walker, twin, layer, exact)

    def _block(self, layer: nn.Module, own: HiddenStates) -> Block:
        """A layer as tuners see it."""

        def packed() -> list[nn.Module]:
            return [module for module in layer.modules() if isinstance(module, QuantizedLinear)]

        def run(states: Tensor) -> Tensor:
            after: Tensor = layer(states, **self.walker.positions(layer, states))  # With gradients, where asked for.
            return after

        sites = _sites(layer, self.walker.architecture)
        return Block(sites, run, own.before, own.after, self.ranks, self.walker.device, packed)

    def _train(self, index: int, layer: nn.Module, own: HiddenStates) -> None:
        """Train what a recipe wants trained before the weights are solved."""
        spec, walker = self.spec, self.walker
        if spec.transforms is None:
            return
        training = TransformTraining(
            spec.transforms, walker.architecture, self.scheme, self.rotations, self.head_dim, spec.seed
        )
        block, weights = self._block(layer, own), self.scheme.layer_weights(index)
        conditions, clips = training.train(layer, index, block, weights, lambda states: walker.positions(layer, states))
        self.transforms += [conditions] if conditions else []
        self.clips += [clips] if clips else []

    def _tuned(self, layer: nn.Module, tuning: Tuning, hidden: HiddenStates) -> None:
        """Let a tuner finish; where it changed the solved layer, the windows go through it again."""
        tuning.solved()
        self.clips.append(tuning.ratios)
        if self.spec.clips is not None and self.spec.clips.own_windows is not None:
            hidden.after.fill(self.walker.advance(layer, states) for states in hidden.before)

    def write_rest(self, card: Mapping[str, Any], fused_card: Mapping[str, Any]) -> None:
        """Write what stands beside the weights, the card last; its part that is given is the caller's."""
        folder, checkpoint = self.work.folder, self.walker.checkpoint
        plain = self.scheme == FLOAT and not self.rotations.any_online
        write_config(folder, checkpoint.config, plain=plain)
        copy_companions(checkpoint, folder)
        write_rotations(folder / ROTATIONS, self.rotations)
        found = {
            **{key: fused_card.get(key) for key in INHERITED},
            "fuse": fused_card.get("recipe", {}),
            "method": self.spec.method_name(fused_card["method"]),
            "rounding": self.spec.rounding,
            "scheme": self.scheme.to_dict(),
            **self.solver.notes,
            "clips": self.clips,
            "transforms": self.transforms,
            "bits_per_weight": bits_per_weight(self.walker.model, self.scheme),
            "sensitivities": self.work.state.get("sensitivities"),
            "versions": versions(),
        }
        write_card(folder, {**card, **found})


def equipped(checkpoint: Checkpoint, scheme: Scheme, rotations: Rotations) -> PreTrainedModel:
    """A fused model without weights, with the modules of a scheme."""
    model = empty_model(checkpoint.config)
    equip_model(model, scheme, rotations)
    return model


def _state(name: str, module: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """What is stored of a module. Scales stay as they are: there is one for thousands of weights."""
    tensors, exact = checkpoint_state(module.state_dict(), architecture), exact_names(module)
    return named(name, {k: v if k.rpartition(".")[2] in exact else as_stored(v) for k, v in tensors.items()})


def _sites(layer: nn.Module, architecture: Architecture) -> list[Site]:
    """What has one clip in a decoder layer: linears that read the same inputs, its keys, its values."""
    readers = architecture.readers_alike(layer)
    inputs = [Site("activations", {name: layer.get_submodule(name) for name in names}) for names in readers]
    attention = {architecture.attention: layer.get_submodule(architecture.attention)}
    return [*inputs, Site("keys", attention), Site("values", attention)]
