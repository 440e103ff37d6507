"""Which axes of which parameters belong to the same channels, neurons or heads: to be pruned, and removed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Slot = tuple[str, int]
"""(path of an array, axis of it that numbers the channels)."""


class Group(NamedTuple):
  """Channels (or neurons, or heads) of one width.

  Attributes:
    writers: parameters that make them. A channel is dead, zero for every input, if all of its slices of these are
      zero: kernels, biases, and the scales and biases of batch norm before a ReLU or a sum with channels of the group.
    readers: parameters that are multiplied with them.
    state: what else has a number for each of them: running statistics, in the tree of the model's state.
    parts: how many there are where an array has several neighboring numbers for each, as heads have; an axis is
      divided into so many equal parts. None: one number for each.
  """

  writers: tuple[Slot, ...]
  readers: tuple[Slot, ...]
  state: tuple[Slot, ...] = ()
  parts: int | None = None


Groups = Mapping[str, Group]


def groups_of(params: Tree, *, head_width: int | None = None) -> dict[str, Group]:
  """The groups of our networks, by the layer that makes the channels.

  In a `ResNet` the channels between the two convolutions of a block are a group, and so is the sum that blocks of one
  width add to, with all that writes it and reads it. (The mean over the map, pooling and dropout keep zeros.)

  In a `Decoder` and a `ViT` the heads of each block are a group, a head of keys and values with all the queries that
  look at it, and the inner neurons another. The width that blocks add to is none: norms divide by it, zeros or not.
  Blocks as a whole are `layers.layers_of`.

  Args:
    params: of the network: arrays, or `ShapeDtypeStruct`s.
    head_width: of a transformer, numbers of a head: its arrays do not tell.

  Raises:
    ValueError: another network; then write its groups down. Or a head_width that is missing or does not divide.
  """
  names = [name for name, _ in named_leaves(params)]
  if "blocks/0/query/kernel" in names:
    return _transformer(params, head_width)
  if "stem/kernel" in names and not any(re.search(r"shortcut/kernel$", name) for name in names):
    return _residual(names)
  kernels = sorted(
    (n for n in names if re.fullmatch(r"(blocks|hidden)/[\d/]+(conv/)?kernel", n)), key=natural
  )
  if not kernels or "head/kernel" not in names:
    raise ValueError(
      "groups_of knows MLP, CNN, VGG, ResNet, Decoder and ViT; give a Group for each width of another network. Its "
      f"leaves are {', '.join(names[:8])}, ..."
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

  return {
    n: Group(moved(g.writers), moved(g.readers), moved(g.state), g.parts) for n, g in groups.items()
  }


def widths(groups: Groups, params: Tree) -> dict[str, int]:
  """The number of channels of each group.

  Raises:
    ValueError: there are no groups, a group names no writer, an array or an axis that is not there, or arrays that
      differ in their number of channels, or do not divide into `parts`.
  """
  if not groups:
    raise ValueError("groups: expected at least one")
  shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
  found = {}
  for name, group in groups.items():
    sizes = {}
    for path, axis in (*group.writers, *group.readers):
      if path not in shapes:
        raise ValueError(f"group {name!r}: there is no {path!r}{suggest(path, shapes)}")
      if not -len(shapes[path]) <= axis < len(shapes[path]):
        raise ValueError(f"group {name!r}: {path} {list(shapes[path])} has no axis {axis}")
      sizes[f"{path}, axis {axis}"] = shapes[path][axis]
    if group.parts is not None:
      _check_parts(name, group.parts, sizes)
    elif not group.writers or len(set(sizes.values())) > 1:
      raise ValueError(
        f"group {name!r}: expected writers, and arrays with as many channels each, got {sizes}"
      )
    found[name] = group.parts or next(iter(sizes.values()))
  return found


def _check_parts(name: str, parts: int, sizes: Mapping[str, int]) -> None:
  if parts < 1 or not sizes or any(size % parts for size in sizes.values()):
    raise ValueError(
      f"group {name!r}: expected arrays that divide into parts={parts} equal parts, got {sizes}"
    )


def _transformer(params: Tree, head_width: int | None) -> dict[str, Group]:
  shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
  blocks = sorted({m[0] for n in shapes if (m := re.match(r"blocks/\d+", n))}, key=natural)
  groups = {}
  for block in blocks:
    size = shapes[f"{block}/key/kernel"][-1]
    if head_width is None or head_width < 1 or size % head_width:
      raise ValueError(
        f"head_width: expected the numbers of a head, a divisor of the {size} of {block}/key/kernel, got {head_width}"
      )
    heads, neurons = (f"{block}/{part}" for part in ("attention", "inner"))
    attention = _group(
      [*shapes], [f"{block}/{part}" for part in ("query", "key", "value")], [f"{block}/output"]
    )
    groups[heads] = attention._replace(parts=size // head_width)
    groups[neurons] = _group(
      [*shapes], [f"{block}/{part}" for part in ("gate", "up")], [f"{block}/down"]
    )
  return groups


def _residual(names: Sequence[str]) -> dict[str, Group]:
  blocks = sorted({m[0] for n in names if (m := re.match(r"stages/\d+/\d+", n))}, key=natural)
  groups, stream, writers, readers = {}, "stem", ["stem", "norm"], []
  for block in blocks:
    readers.append(f"{block}/conv1")
    if f"{block}/shortcut/layers/0/kernel" in names:
      readers.append(f"{block}/shortcut/layers/0")
      groups[stream] = _group(names, writers, readers)
      stream, readers = block, []
      writers = [f"{block}/shortcut/layers/0", f"{block}/shortcut/layers/1"]
    groups[f"{block}/conv1"] = _group(
      names, [f"{block}/conv1", f"{block}/norm1"], [f"{block}/conv2"]
    )
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


def natural(name: str) -> list[int]:
  """The numbers in a path, a key to sort by."""
  return [int(number) for number in re.findall(r"\d+", name)]
