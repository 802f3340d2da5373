"""Weights of one network as the start of another: of other widths, stages, lattices or transform.

Rows and columns of weights are *units*, of axes that several weights share: the channels of the
trunk of the analysis, the outputs of a stage's middle layer, the latents. For every axis it is said
once which old unit a new one continues, and all weights follow it:

- A wider axis has the old units first. Rows of new units keep their random weights, columns that
  read them are zero: they change nothing yet.
- A narrower axis keeps the units whose outgoing weights have the largest norms, in their order.
- Latents continue in their order, or, with a new transform, as the most similar channel, with its
  sign (``match_channels``).

A layer is taken over whole or begins afresh; what a fresh layer gives counts as new units. The
functions change nothing that they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tools.train.settings import NetworkSettings

HIDDEN = 96
"""Width of the middle of h_a."""

TRANSFORM = ("basis", "inverse", "mean", "deviation", "border")

Array = np.ndarray[Any, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Units:
    """Neighbouring rows or columns of a weight: ``width`` units of an axis from ``first`` on.

    each: rows or columns of one unit. signed: their sign is that of the latent.
    """

    axis: str
    width: int
    first: int = 0
    each: int = 1
    signed: bool = False


@dataclass(frozen=True)
class Layer:
    """What the rows (and bias) and columns of a weight are; a plain parameter has no columns.

    adds: to units that another layer makes. source: its name in its own network.
    """

    rows: tuple[Units, ...]
    columns: tuple[Units, ...] = ()
    adds: bool = False
    source: str = ""


def layers_of(n: NetworkSettings, stages: dict[int, int]) -> dict[str, Layer]:
    """Every layer, and every parameter without one, of a network.

    stages: its own stage for each one of the network that is named in the keys.
    """
    latents, plane = n.latent_channels, Units("plane", 1)
    seen_latents = Units("latents", n.context_channels, signed=True)
    analysed = Units("latents", n.analysis_channels, signed=True)
    trunk, features = Units("trunk", n.analysis), Units("features", n.analysis)
    z, step = Units("z", n.z_channels - 1), Units("step", 1)
    hidden, hyper = Units("hidden", HIDDEN), Units("hyper", n.hyper)
    layers = {
        "features": Layer((features,), (Units("colours", 3),)),
        "analysis.0": Layer((trunk,), (analysed, features, plane)),
        "analysis_out": Layer((analysed,), (trunk,)),
        "h_a.0": Layer((hidden,), (seen_latents, plane)),
        "h_a.2": Layer((z,), (hidden,)),
        "h_s_expand": Layer((Units("expanded", n.hyper, each=4),), (step, z)),
        "h_s": Layer((hyper,), (Units("expanded", n.hyper), plane)),
        "log_gain": Layer((Units("latents", latents),)),
        "z_log_scale": Layer((step, z)),
        "z_log_slope": Layer((step, z)),
    }
    for i in range(1, n.analysis_layers + 1):
        inner = Units(f"inner.{i}", n.analysis)
        layers[f"analysis.{i}.a"] = Layer((inner,), (trunk,))
        layers[f"analysis.{i}.b"] = Layer((trunk,), (inner,), adds=True)
    before: tuple[Units, ...] = (seen_latents, plane)
    for i in range(len(n.chain_kernels)):
        layers[f"chain.{i}"] = Layer((Units(f"chain.{i}", n.chain),), before)
        before = (Units(f"chain.{i}", n.chain),)
    layers["chain_out"] = Layer((Units("pixels", 3 * n.block**2),), before)
    layers = {name: replace(layer, source=name) for name, layer in layers.items()}
    for key, own in stages.items():
        for name, layer in stage_layers(n, own, f"stages.{key}.").items():
            layers[f"stages.{key}.{name}"] = replace(layer, source=f"stages.{own}.{name}")
    return layers


def stage_layers(n: NetworkSettings, index: int, prefix: str) -> dict[str, Layer]:
    """The layers of a stage; ``prefix`` is for the axes that are its own."""
    first, size, _ = n.stages[index]
    seen = min(n.channels_of(index), n.context_channels)
    middle, plane = Units(prefix + "middle", n.middle), Units("plane", 1)
    layers = {"scale": Layer((Units("latents", size, first),), (middle, plane))}
    inputs: tuple[Units, ...] = (Units("hyper", n.hyper), plane)
    if seen:
        read: tuple[Units, ...] = (Units("latents", seen),)  # magnitudes
        if index < n.mean_stages:
            read = (Units("latents", seen, signed=True), *read)
        if seen > 32:
            reduced = Units(prefix + "reduced", n.context)
            layers["reduce"] = Layer((reduced,), read)
            read = (reduced,)
        context = Units(prefix + "context", n.context)
        layers["context"] = Layer((context,), read)
        inputs = (inputs[0], context, plane)
    layers["middle"] = Layer((middle,), inputs)
    if index < n.mean_stages:
        layers["mean"] = Layer((Units("latents", size, first, signed=True),), (middle,))
    return layers


def stage_sources(old: Sequence[Sequence[int]], new: NetworkSettings) -> dict[int, int]:
    """For each stage of a new network the old one to begin with: the same, or one of the same
    channels."""
    sources = {}
    for k, stage in enumerate(new.stages):
        same = [i for i, s in enumerate(old) if tuple(s) == stage]
        alike = [i for i, s in enumerate(old) if tuple(s[:2]) == stage[:2]]
        if same or alike:
            sources[k] = (same or alike)[0]
    return sources


# -- latents of another transform --


@dataclass(frozen=True)
class Channels:
    """For each new latent channel the old one that it continues, -1 for none, and its sign.

    likeness: |cosine| of what the two look at, 0 for none.
    """

    source: Array
    sign: Array
    likeness: Array

    @classmethod
    def kept(cls, old: int, new: int) -> Channels:
        source = np.where(np.arange(new) < old, np.arange(new), -1)
        return cls(source, np.ones(new), (source >= 0).astype(float))


def looks(state: State, n: NetworkSettings) -> Array:
    """(latents, 3 * 32 * 32): what each latent looks at, its block and half a block around it, of
    unit length."""
    side = n.block
    border = state["border"].double() if n.lapped else torch.eye(side).double()
    line = torch.block_diag(border, border)[side // 2 : side // 2 + side]
    rows = state["basis"].double().reshape(-1, 3, side, side)
    wide = torch.einsum("ckij,ia,jb->ckab", rows, line, line).reshape(len(rows), -1).numpy()
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))


def match_channels(
    old: NetworkSettings, old_state: State, new: NetworkSettings, new_state: State
) -> Channels:
    """One to one, so that the sum of likenesses is largest.

    No channel leaves its range: those of the stages of both networks, cut where contexts and the
    analysis correction end.
    """
    if old.block != new.block:
        raise ValueError(f"blocks of {old.block} pixels have no likeness to those of {new.block}")
    count = new.latent_channels
    cuts = {0, old.latent_channels, count}
    for n in (old, new):
        cuts |= {n.context_channels, n.analysis_channels}
        cuts |= {c for first, size, _ in n.stages for c in (first, first + size)}
    cosine = looks(new_state, new) @ looks(old_state, old).T
    source, sign, likeness = np.full(count, -1), np.ones(count), np.zeros(count)
    ends = sorted(c for c in cuts if c <= min(old.latent_channels, count))
    for a, b in itertools.pairwise(ends):
        rows, columns = linear_sum_assignment(-np.abs(cosine[a:b, a:b]))
        source[a + rows] = a + columns
    found = source >= 0
    value = cosine[found, source[found]]
    sign[found], likeness[found] = np.where(value < 0, -1, 1), np.abs(value)
    return Channels(source, sign, likeness)


# -- the plan: which layers are taken, and which old unit each new one continues --


def _owners(layers: dict[str, Layer]) -> dict[str, list[str]]:
    """The layers that make each axis."""
    owners: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.columns and not layer.adds:
            for units in layer.rows:
                if units.axis not in ("latents", "pixels"):
                    owners.setdefault(units.axis, []).append(name)
    return owners


def _same_kernel(target: Tensor, source: Tensor) -> bool:
    sides = target.shape[2:], source.shape[2:]
    return sides[0] == sides[1] or (1, 1) in sides


def taken_layers(
    old: dict[str, Layer], new: dict[str, Layer], old_state: State, new_state: State
) -> set[str]:
    """Layers with an old counterpart whose inputs, too, have one."""
    taken = set()
    for name in new.keys() & old.keys():
        weight, source = f"{name}.weight", f"{old[name].source}.weight"
        if not new[name].columns or _same_kernel(new_state[weight], old_state[source]):
            taken.add(name)
    owners = _owners(new)
    while True:
        dead = {axis for axis, makers in owners.items() if not taken.issuperset(makers)}
        lost = set()
        for name in taken:
            read = {u.axis for u in new[name].columns} - {"plane"}
            common = read & {u.axis for u in old[name].columns}
            if new[name].columns and not common - dead:
                lost.add(name)
        if not lost:
            return taken
        taken -= lost


def _outgoing(axis: str, width: int, layers: dict[str, Layer], state: State) -> Array:
    """(width,): squared norms of the weights that read each unit of an axis."""
    total = np.zeros(width)
    for layer in layers.values():
        at = 0
        for units in layer.columns:
            if units.axis == axis:
                weight = state[f"{layer.source}.weight"][:, at : at + units.width].double()
                total += (weight**2).sum(tuple(i for i in range(weight.dim()) if i != 1)).numpy()
            at += units.width * units.each
    return total


def _widths(layers: dict[str, Layer]) -> dict[str, int]:
    widths: dict[str, int] = {}
    for layer in layers.values():
        for u in (*layer.rows, *layer.columns):
            widths[u.axis] = max(widths.get(u.axis, 0), u.first + u.width)
    return widths


def continued_units(
    old: dict[str, Layer], new: dict[str, Layer], old_state: State, taken: set[str]
) -> dict[str, Array]:
    """For each axis but the latents: the old unit that each new one continues, -1 for none."""
    before, after, owners = _widths(old), _widths(new), _owners(new)
    units = {}
    for axis, width in after.items():
        if axis not in before or not taken.issuperset(owners.get(axis, ())):
            units[axis] = np.full(width, -1)
        elif width >= before[axis]:
            units[axis] = np.where(np.arange(width) < before[axis], np.arange(width), -1)
        else:
            norms = _outgoing(axis, before[axis], old, old_state)
            units[axis] = np.sort(np.argsort(-norms, kind="stable")[:width])
    return units


# -- following it --


def _entries(
    target: tuple[Units, ...], source: tuple[Units, ...], units: dict[str, Array], sign: Array
) -> tuple[Tensor, Tensor]:
    """(entry of the old rows or columns, -1 for none; its sign) for each entry of the new ones."""
    starts = np.cumsum([0, *(s.width * s.each for s in source)])
    places = {(s.axis, s.signed): (s, int(a)) for s, a in zip(source, starts, strict=False)}
    found, signs = [], []
    for t in target:
        old = units[t.axis][t.first : t.first + t.width]
        if (t.axis, t.signed) in places:
            s, start = places[t.axis, t.signed]
            inside = (old >= s.first) & (old < s.first + s.width)
            entry = start + (old - s.first) * s.each
            entry = np.where(inside[:, None], entry[:, None] + np.arange(t.each), -1)
        else:
            entry = np.full((t.width, t.each), -1)
        found.append(entry.reshape(-1))
        flip = sign[t.first : t.first + t.width] if t.signed else np.ones(t.width)
        signs.append(np.repeat(flip, t.each))
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(signs)).float()


def _with_kernel(source: Tensor, sides: torch.Size) -> Tensor:
    """A 1x1 kernel as the centre of a larger one, and the other way round."""
    if source.shape[2:] == sides:
        return source
    row, column = (max(a, b) // 2 for a, b in zip(source.shape[2:], sides, strict=True))
    if tuple(sides) == (1, 1):
        return source[:, :, row, column, None, None]
    wide = source.new_zeros((*source.shape[:2], *sides))
    wide[:, :, row, column] = source[:, :, 0, 0]
    return wide


def _followed(
    target: Tensor,
    source: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """``target`` with the rows that have a counterpart in ``source``; their other columns are 0."""
    entry, sign = rows
    taken = entry >= 0
    values = source[entry[taken]] * sign[taken].view(-1, *[1] * (source.dim() - 1))
    if columns is not None:
        values = _with_kernel(values, target.shape[2:])
        at, flip = columns
        shape = (1, -1, *[1] * (target.dim() - 2))
        values = values[:, at.clamp_min(0)] * (flip * (at >= 0)).view(shape)
    result = target.clone()
    result[taken] = values.to(target)
    return result


def warm_start(
    old: NetworkSettings,
    old_state: State,
    new: NetworkSettings,
    new_state: State,
    channels: Channels | None = None,
) -> tuple[State, list[str]]:
    """(the new network's weights, names of the layers that begin afresh).

    channels: how latents continue in the new network's own transform (``match_channels``); without
    it the old transform is taken over, too. Raises ValueError where that is not possible.
    """
    if old.block != new.block:
        raise ValueError(f"blocks of {old.block} pixels cannot begin as those of {new.block}")
    stages = stage_sources(old.stages, new)
    mine = layers_of(new, {k: k for k in range(len(new.stages))})
    theirs = layers_of(old, stages)
    taken = taken_layers(theirs, mine, old_state, new_state)
    units = continued_units(theirs, mine, old_state, taken)
    keep = channels is None
    channels = channels or Channels.kept(old.latent_channels, new.latent_channels)
    units["latents"] = channels.source
    state = {k: v.clone() for k, v in new_state.items()}
    if keep:
        state |= transform_of(old, old_state, new)
    for name in taken:
        layer, source = mine[name], theirs[name]
        rows = _entries(layer.rows, source.rows, units, channels.sign)
        if not layer.columns:
            state[name] = _followed(new_state[name], old_state[source.source], rows, None)
            continue
        columns = _entries(layer.columns, source.columns, units, channels.sign)
        for kind, along in (("weight", columns), ("bias", None)):
            there = old_state[f"{source.source}.{kind}"]
            state[f"{name}.{kind}"] = _followed(new_state[f"{name}.{kind}"], there, rows, along)
        if name.endswith(".scale"):  # scales are in steps: they follow the spread of the channel
            first, size = layer.rows[0].first, layer.rows[0].width
            old_channels = channels.source[first : first + size]
            spread = state["deviation"][first : first + size]
            octaves = torch.log2(spread / old_state["deviation"][old_channels.clip(0)].to(spread))
            state[f"{name}.bias"] += octaves * torch.from_numpy(rows[0].numpy() >= 0)
    return state, sorted(mine.keys() - taken)


def transform_of(old: NetworkSettings, old_state: State, new: NetworkSettings) -> State:
    """The old network's transform, cut to the new network's latents."""
    count = new.latent_channels
    if (old.block, old.lapped) != (new.block, new.lapped) or count > old.latent_channels:
        raise ValueError(
            "the old network's transform does not fit the new one: another block, lapping or more "
            "latents; begin with a new transform (--new-basis)"
        )
    state = {k: old_state[k].clone() for k in TRANSFORM if k in old_state}
    state["basis"], state["inverse"] = state["basis"][:count], state["inverse"][:, :count]
    state["deviation"] = state["deviation"][:count]
    return state
