"""Weights of one network as the start of another: of other widths, stages or lattices.

Rows and columns of weights are *units*, of axes that several weights share: the outputs of a
stage's middle layer, the latents. For every axis it is said once which old unit a new one
continues, and all weights follow it:

- A wider axis has the old units first. Rows of new units keep their random weights, columns that
  read them are zero: they change nothing yet.
- A narrower axis keeps the units whose outgoing weights have the largest norms, in their order.
- Latents, and the transform that they are of, continue as they are.

A layer is taken over whole or begins afresh; what a fresh layer gives counts as new units. The
functions change nothing that they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.train.network import REFINE, TileNetwork
from tools.train.settings import NetworkSettings

HIDDEN = 96
"""Width of the middle of h_a."""

TRANSFORM = ("order", "colours", "mean", "deviation", "border")

Array = np.ndarray[Any, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Units:
    """Neighbouring rows or columns of a weight: ``width`` units of an axis from ``first`` on.

    each: rows or columns of one unit. signed: of latents themselves, not of their magnitudes.
    """

    axis: str
    width: int
    first: int = 0
    each: int = 1
    signed: bool = False


@dataclass(frozen=True)
class Layer:
    """What the rows (and bias) and columns of a weight are; a plain parameter has no columns.

    source: its name in its own network.
    """

    rows: tuple[Units, ...]
    columns: tuple[Units, ...] = ()
    source: str = ""


def layers_of(n: NetworkSettings, stages: dict[int, int]) -> dict[str, Layer]:
    """Every layer, and every parameter without one, of a network.

    stages: its own stage for each one of the network that is named in the keys.
    """
    latents, plane = n.latent_channels, Units("plane", 1)
    seen_latents = Units("latents", n.context_channels, signed=True)
    z, step = Units("z", n.z_channels - 1), Units("step", 1)
    hidden, hyper = Units("hidden", HIDDEN), Units("hyper", n.hyper)
    layers = {
        "h_a.0": Layer((hidden,), (seen_latents, plane)),
        "h_a.2": Layer((z,), (hidden,)),
        "h_s_expand": Layer((Units("expanded", n.hyper, each=4),), (step, z)),
        "h_s": Layer((hyper,), (Units("expanded", n.hyper), plane)),
        "log_gain": Layer((Units("latents", latents),)),
        "tilt": Layer((Units("latents", latents),)),
        "z_log_scale": Layer((step, z)),
        "z_log_slope": Layer((step, z)),
    }
    before: tuple[Units, ...] = (seen_latents, plane)
    for i in range(len(n.chain_kernels)):
        layers[f"chain.{i}"] = Layer((Units(f"chain.{i}", n.chain),), before)
        before = (Units(f"chain.{i}", n.chain),)
    layers["chain_out"] = Layer((seen_latents,), before)
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


# -- the plan: which layers are taken, and which old unit each new one continues --


def _owners(layers: dict[str, Layer]) -> dict[str, list[str]]:
    """The layers that make each axis."""
    owners: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.columns:
            for units in layer.rows:
                if units.axis != "latents":
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
    """For each axis: the old unit that each new one continues, -1 for none."""
    before, after, owners = _widths(old), _widths(new), _owners(new)
    units = {}
    for axis, width in after.items():
        if axis == "latents":
            units[axis] = np.arange(width)
        elif axis not in before or not taken.issuperset(owners.get(axis, ())):
            units[axis] = np.full(width, -1)
        elif width >= before[axis]:
            units[axis] = np.where(np.arange(width) < before[axis], np.arange(width), -1)
        else:
            norms = _outgoing(axis, before[axis], old, old_state)
            units[axis] = np.sort(np.argsort(-norms, kind="stable")[:width])
    return units


# -- following it --


def _entries(
    target: tuple[Units, ...], source: tuple[Units, ...], units: dict[str, Array]
) -> Tensor:
    """Entry of the old rows or columns, -1 for none, for each entry of the new ones."""
    starts = np.cumsum([0, *(s.width * s.each for s in source)])
    places = {(s.axis, s.signed): (s, int(a)) for s, a in zip(source, starts, strict=False)}
    found = []
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
    return torch.from_numpy(np.concatenate(found))


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


def _followed(target: Tensor, source: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    """``target`` with the rows that have a counterpart in ``source``; their other columns are 0."""
    taken = rows >= 0
    values = source[rows[taken]]
    if columns is not None:
        values = _with_kernel(values, target.shape[2:])
        shape = (1, -1, *[1] * (target.dim() - 2))
        values = values[:, columns.clamp_min(0)] * (columns >= 0).view(shape)
    result = target.clone()
    result[taken] = values.to(target)
    return result


def warm_start(
    old: NetworkSettings, old_state: State, new: NetworkSettings, new_state: State
) -> tuple[State, list[str]]:
    """(the new network's weights, names of the layers that begin afresh).

    The transform is the old one, and fresh layers begin as ``TileNetwork.start`` lets them begin
    with it. The refinement is taken over whole or begins afresh. A tilt that the old network lacks
    is zero. Raises ValueError where that is not possible.
    """
    count = new.latent_channels
    old_state = {"tilt": torch.zeros(old.latent_channels), **old_state}
    missing = [name for name in TRANSFORM if name not in old_state]
    if missing:
        raise ValueError(f"the old network's transform is not one of cosines: no {missing[0]!r}")
    if (old.block, old.lapped, old.turned) != (new.block, new.lapped, new.turned):
        raise ValueError("the old network's transform is another: block, lapped or turned differ")
    if count > old.latent_channels:
        raise ValueError(f"the old network has {old.latent_channels} latents, not {count}")
    stages = stage_sources(old.stages, new)
    mine = layers_of(new, {k: k for k in range(len(new.stages))})
    theirs = layers_of(old, stages)
    taken = taken_layers(theirs, mine, old_state, new_state)
    units = continued_units(theirs, mine, old_state, taken)
    variance = torch.zeros(3 * old.block**2)
    variance[old_state["order"]] = old_state["deviation"].float() ** 2
    net = TileNetwork(new)
    net.load_state_dict(new_state)
    net.start(variance, old_state["mean"], old_state["colours"], old_state["border"])
    state = net.state_dict()
    for name in ("order", "deviation"):
        state[name] = old_state[name][:count].clone()
    refine = [name for name in state if name.startswith(REFINE)]
    if same_refine := all(
        name in old_state and old_state[name].shape == state[name].shape for name in refine
    ):
        state.update({name: old_state[name].clone() for name in refine})
    for name in taken:
        layer, source = mine[name], theirs[name]
        rows = _entries(layer.rows, source.rows, units)
        if not layer.columns:
            state[name] = _followed(state[name], old_state[source.source], rows, None)
            continue
        columns = _entries(layer.columns, source.columns, units)
        for kind, along in (("weight", columns), ("bias", None)):
            there = old_state[f"{source.source}.{kind}"]
            state[f"{name}.{kind}"] = _followed(state[f"{name}.{kind}"], there, rows, along)
    afresh = sorted(mine.keys() - taken)
    return state, afresh if same_refine else [*afresh, REFINE.rstrip(".")]
