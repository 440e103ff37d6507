"""Which axes of which parameters belong to the same channels, so that channels can be pruned and removed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distill_jax.errors import suggest
from distill_jax.fingerprint import named_leaves
from distill_jax.types import Tree

Slot = tuple[str, int]
"""(path of an array, axis of it that numbers the channels)."""


class Group(NamedTuple):
  """Channels (or neurons) of one width.

  Attributes:
    writers: parameters that make them. A channel is dead, zero for every input, if all of its slices of these are
      zero: kernels, biases, and the scales and biases of batch norm before a ReLU or a sum with channels of the group.
    readers: parameters that are multiplied with them.
    state: what else has a number for each of them: running statistics, in the tree of the model's state.
  """

  writers: tuple[Slot, ...]
  readers: tuple[Slot, ...]
  state: tuple[Slot, ...] = ()


Groups = Mapping[str, Group]


def groups_of(params: Tree) -> dict[str, Group]:
  """The groups of our `MLP`, `CNN`, `VGG` and `ResNet`, by the layer that makes the channels.

  In a `ResNet` the channels between the two convolutions of a block are a group, and so is the sum that blocks of one
  width add to, with all that writes it and reads it. (The mean over the map, pooling and dropout keep zeros.)

  Args:
    params: of the network: arrays, or `ShapeDtypeStruct`s.

  Raises:
    ValueError: another network; then write its groups down.
  """
  names = [name for name, _ in named_leaves(params)]
  if "stem/kernel" in names and not any(re.search(r"shortcut/kernel$", name) for name in names):
    return _residual(names)
  kernels = sorted(
    (n for n in names if re.fullmatch(r"(blocks|hidden)/[\d/]+(conv/)?kernel", n)), key=_natural
  )
  if not kernels or "head/kernel" not in names:
    raise ValueError(
      "groups_of knows MLP, CNN, VGG and ResNet; give a Group for each width of another network. Its leaves are "
      f"{', '.join(names[:8])}, ..."
    )
  layers = [kernel.removesuffix("/kernel") for kernel in kernels]
  return {
    re.sub("/conv$", "", layer): _group(names, [layer], [reader])
    for layer, reader in zip(layers, [*layers[1:], "head"], strict=True)
  }


def under(prefix: str, groups: Groups) -> dict[str, Group]:
  """The groups of a tree that holds the network's parameters under a name: `under("student", groups)` in training."""

  def moved(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    return tuple((f"{prefix}/{name}", axis) for name, axis in slots)

  return {name: Group(moved(g.writers), moved(g.readers), moved(g.state)) for name, g in groups.items()}


def widths(groups: Groups, params: Tree) -> dict[str, int]:
  """The number of channels of each group.

  Raises:
    ValueError: there are no groups, a group names no writer, an array or an axis that is not there, or arrays that
      differ in their number of channels.
  """
  if not groups:
    raise ValueError("groups: expected at least one")
  shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
  found = {}
  for group, (writers, readers, _) in groups.items():
    sizes = {}
    for name, axis in (*writers, *readers):
      if name not in shapes:
        raise ValueError(f"group {group!r}: there is no {name!r}{suggest(name, shapes)}")
      if not -len(shapes[name]) <= axis < len(shapes[name]):
        raise ValueError(f"group {group!r}: {name} {list(shapes[name])} has no axis {axis}")
      sizes[f"{name}, axis {axis}"] = shapes[name][axis]
    if not writers or len(set(sizes.values())) > 1:
      raise ValueError(
        f"group {group!r}: expected writers, and arrays with as many channels each, got {sizes}"
      )
    found[group] = next(iter(sizes.values()))
  return found


def _residual(names: Sequence[str]) -> dict[str, Group]:
  blocks = sorted({m[0] for n in names if (m := re.match(r"stages/\d+/\d+", n))}, key=_natural)
  groups, stream, writers, readers = {}, "stem", ["stem", "norm"], []
  for block in blocks:
    readers.append(f"{block}/conv1")
    if f"{block}/shortcut/layers/0/kernel" in names:
      readers.append(f"{block}/shortcut/layers/0")
      groups[stream] = _group(names, writers, readers)
      stream, readers = block, []
      writers = [f"{block}/shortcut/layers/0", f"{block}/shortcut/layers/1"]
    groups[f"{block}/conv1"] = _group(names, [f"{block}/conv1", f"{block}/norm1"], [f"{block}/conv2"])
    writers += [f"{block}/conv2", f"{block}/norm2"]
  return groups | {stream: _group(names, writers, [*readers, "head"])}


def _group(names: Sequence[str], layers: Sequence[str], readers: Sequence[str]) -> Group:
  """The group that these layers write, and the batch norm beside a convolution of `ConvNormRelu`."""
  beside = [re.sub("conv$", "norm", layer) for layer in layers if re.search("(^|/)conv$", layer)]
  layers = [*layers, *beside]
  parts = [f"{layer}/{part}" for layer in layers for part in ("kernel", "scale", "bias")]
  norms = [layer for layer in layers if f"{layer}/scale" in names]
  return Group(
    writers=tuple((part, -1) for part in parts if part in names),
    readers=tuple((f"{layer}/kernel", -2) for layer in readers),
    state=tuple((f"{norm}/{part}", 0) for norm in norms for part in ("mean", "var")),
  )


def _natural(name: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", name)]
