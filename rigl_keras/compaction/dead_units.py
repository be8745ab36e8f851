"""Removes the units that sparsity has cut off from inputs or outputs."""

import dataclasses
import math
from collections import Counter

import keras
import numpy as np

from rigl_keras._text import aligned
from rigl_keras.compaction.channel_rules import Slots, channel_count, rule_of
from rigl_keras.compaction.graphs import rebuild, tensors_in, trace

__all__ = ["Removal", "remove_dead_units"]


@dataclasses.dataclass(frozen=True)
class Removal:
    """The result of `remove_dead_units`.

    Attributes:
        layers: `{name: (units before, units after)}` of layers with weights
            that lost units.
        parameters_before: Size of all weights of the plain model.
        parameters_after: Size of all weights of the returned model.
    """

    layers: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        rows = [
            (name, f"{now:,} of {was:,} units")
            for name, (was, now) in self.layers.items()
        ] or [("no unit is dead", "")]
        lines = [line.rstrip() for line in aligned(rows)]
        share = f" ({after / before:.1%})" if before else ""
        lines.append(f"parameters: {after:,} of {before:,}{share}")
        return "\n".join(lines)


def remove_dead_units(model: keras.Model) -> tuple[keras.Model, Removal]:
    """Returns a model without the units that do not affect its outputs.

    1. Forward: find channels that have one value for all inputs. A unit without
       incoming connections has act(bias); batch norm, activations, pooling,
       sums and products pass such constants on. A layer adds a constant input
       to its bias, unless it is not 0 and the layer pads with zeros: then it
       differs at the border.
    2. Backward: find channels that affect an output through nonzero
       connections.
    3. Channels that must go together (the terms of an `Add`, the copies that
       `Flatten` makes of one channel) go if none of them matters. Inputs,
       outputs and what unknown layers read or return stay. A layer always keeps
       at least one unit.

    Args:
        model: A built Sequential or Functional model, masked or not. It is not
            changed.

    Returns:
        `(model, Removal)`: a plain Functional model, without models inside it,
        with the same outputs up to rounding. Kernels are also zero for units
        that stay without effect. If inputs are removed, groups of 2:4 differ
        from those of the masks.

    Raises:
        ValueError: The model is subclassed or not built.

    Example:

    >>> small, removal = remove_dead_units(model)
    >>> print(removal)
    conv1  5 of 8 units
    conv2  11 of 16 units
    parameters: 1,024 of 2,210 (46.3%)
    """
    graph = trace(model)
    channels = _Channels(graph)
    new = channels.layers()
    small = rebuild(graph, lambda layer: new.get(id(layer), layer))
    shrunk = {}
    for call in graph.calls:
        if getattr(call.layer, "weights", None) and id(call.layer) in new:
            kept = channels.kept(call.outputs)
            if not kept.all():
                shrunk[call.layer.name] = (kept.size, int(kept.sum()))
    before = {
        id(weight): math.prod(weight.shape)
        for call in graph.calls
        for weight in getattr(call.layer, "weights", ())
    }
    return small, Removal(shrunk, sum(before.values()), small.count_params())


class _UnionFind(Slots):
    """`Slots` as a forest of parents."""

    def __init__(self):
        self._parents, self._pinned = [], []

    def new(self, n):
        first = len(self._parents)
        self._parents.extend(range(first, first + n))
        return np.arange(first, first + n)

    def tie(self, one, other):
        for a, b in zip(one, other, strict=True):
            self._parents[self._root(b)] = self._root(a)

    def pin(self, slots):
        self._pinned.extend(slots)

    def roots(self, slots):
        return np.array([self._root(slot) for slot in slots], int)

    @property
    def pinned(self):
        return self.roots(self._pinned)

    def __len__(self):
        return len(self._parents)

    def _root(self, slot):
        while self._parents[slot] != slot:
            self._parents[slot] = self._parents[self._parents[slot]]
            slot = self._parents[slot]
        return slot


class _Channels:
    """The state of each channel of each tensor of a graph.

    Channels are the last axis. Only unknown layers read or write a tensor
    without channels or with an unknown number of them.
    """

    def __init__(self, graph):
        self._slots = _UnionFind()
        self._of = {}  # id of a tensor: its slots
        self._constants, self._needs = {}, {}
        times = Counter(id(call.layer) for call in graph.calls)
        self._rules = [(call, rule_of(call, times)) for call in graph.calls]
        for tensor in tensors_in(graph.inputs):
            self._pin_unknown(tensor)
        for call, rule in self._rules:
            self._forward(call, rule)
        for tensor in tensors_in(graph.outputs):
            self._need_all(tensor)
        for call, rule in reversed(self._rules):
            self._backward(call, rule)
        self._decide()

    def kept(self, tensor):
        """Returns the channels of a tensor that stay."""
        return self._stays[self._slots.roots(self._of[id(tensor)])]

    def layers(self):
        """Returns `{id of a layer: its replacement}`."""
        return {
            id(call.layer): rule.remade(
                [self.kept(t) for t in rule.inputs],
                self.kept(rule.output),
                self._needs[id(rule.output)],
            )
            for call, rule in self._rules
            if rule
        }

    def _pin_unknown(self, tensor):
        width = channel_count(tensor)
        if width is not None:
            self._of[id(tensor)] = self._slots.new(width)
            self._slots.pin(self._of[id(tensor)])
            self._constants[id(tensor)] = np.full(width, np.nan)
            self._needs[id(tensor)] = np.zeros(width, bool)

    def _need_all(self, tensor):
        if id(tensor) in self._needs:
            self._needs[id(tensor)][:] = True

    def _forward(self, call, rule):
        if not rule:
            for tensor in tensors_in(call.outputs):
                self._pin_unknown(tensor)
            return
        out = id(rule.output)
        constants = rule.constants(
            [self._constants[id(t)] for t in rule.inputs]
        )
        constants[~np.isfinite(constants)] = np.nan
        self._constants[out] = constants
        self._needs[out] = np.zeros(constants.size, bool)
        self._of[out] = rule.slots(
            [self._of[id(t)] for t in rule.inputs], self._slots
        )

    def _backward(self, call, rule):
        if not rule:
            for tensor in tensors_in((call.args, call.kwargs)):
                self._need_all(tensor)
            return
        needs = rule.needs(self._needs[id(rule.output)])
        for tensor, need in zip(rule.inputs, needs, strict=True):
            self._needs[id(tensor)] |= need

    def _decide(self):
        self._stays = np.zeros(len(self._slots), bool)
        self._stays[self._slots.pinned] = True
        for tensor, slots in self._of.items():
            self._stays[self._slots.roots(slots[self._needs[tensor]])] = True
        # No layer may have zero units. The kept set only grows: once is enough.
        for slots in self._of.values():
            roots = self._slots.roots(slots)
            if not self._stays[roots].any():
                self._stays[roots[0]] = True
