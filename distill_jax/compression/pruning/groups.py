"""Groups the axes of parameters that belong to the same channels, neurons or heads."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Slot = tuple[str, int]
"""(path of an array, the axis that numbers the channels)."""


class Group(NamedTuple):
  """The arrays of a set of channels (or neurons, or heads), which are pruned and removed together.

  Attributes:
    writers: parameters that compute the channels. A channel is dead, zero for every input, if all
      its slices of these are zero: kernels, biases, and the scales and biases of batch norm before
      a ReLU or a sum with channels of the group.
    readers: parameters that are multiplied with the channels.
    state: arrays of the model's state with a value per channel: running statistics.
    parts: number of channels where each has several neighboring values, as heads have: an axis is
      divided into as many equal parts. None: one value per channel.
  """

  writers: tuple[Slot, ...]
  readers: tuple[Slot, ...]
  state: tuple[Slot, ...] = ()
  parts: int | None = None


Groups = Mapping[str, Group]


def groups_of(params: Tree, *, head_dim: int | None = None) -> dict[str, Group]:
  """Returns the groups of a network of `models.zoo`, by the layer that computes the channels.

  In a `ResNet` the channels between the two convolutions of a block are a group, and so is the sum
  that blocks of one width add to, with all its writers and readers. (The mean over the map, pooling
  and dropout keep zeros.)

  In a `Decoder` and a `ViT` the heads of each block are a group, a head of keys and values with all
  the queries that attend to it, and the neurons of its MLP another. The stream that blocks add to
  is
  none: norms divide by all its values, zeros or not. `layers.layers_of` groups full blocks.

  Args:
    params: parameters of the network: arrays, or `ShapeDtypeStruct`s.
    head_dim: values of a head of a transformer, which its arrays do not show; else None.

  Raises:
    ValueError: another network, whose groups must be written by hand; or a head_dim that is missing
      or does not divide.
  """
  names = [name for name, _ in named_leaves(params)]
  if "blocks/0/query/kernel" in names:
    return _transformer(params, head_dim)
  if "stem/kernel" in names and not any(re.search(r"shortcut/kernel$", name) for name in names):
    return _residual(names)
  kernels = [n for n in names if re.fullmatch(r"(blocks|hidden)/[\d/]+(conv/)?kernel", n)]
  kernels.sort(key=path_numbers)
  if not kernels or "head/kernel" not in names:
    raise ValueError(
      "params: expected an MLP, CNN, VGG, ResNet, Decoder or ViT, got the leaves "
      f"{', '.join(names[:8])}, ...: write a Group for each width of another network"
    )
  layers = [kernel.removesuffix("/kernel") for kernel in kernels]
  return {
    re.sub("/conv$", "", layer): _group(names, [layer], [reader])
    for layer, reader in zip(layers, [*layers[1:], "head"], strict=True)
  }


def under(prefix: str, groups: Groups) -> dict[str, Group]:
  """Returns the groups with a prefix to all paths: `under("student", groups)` for a train state."""

  def with_prefix(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    return tuple((f"{prefix}/{name}", axis) for name, axis in slots)

  return {
    name: Group(with_prefix(g.writers), with_prefix(g.readers), with_prefix(g.state), g.parts)
    for name, g in groups.items()
  }


def widths(groups: Groups, params: Tree) -> dict[str, int]:
  """Returns the number of channels of each group.

  Raises:
    ValueError: no groups; a group without writers, with an array or an axis that does not exist, or
      with arrays that differ in their number of channels or do not divide into `parts`.
  """
  if not groups:
    raise ValueError("groups: expected at least one, got none")
  shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
  channels = {}
  for name, group in groups.items():
    sizes = {}
    for path, axis in (*group.writers, *group.readers):
      if path not in shapes:
        raise ValueError(f"group {name!r}: expected a leaf {path!r}{suggest(path, shapes)}")
      if not -len(shapes[path]) <= axis < len(shapes[path]):
        raise ValueError(
          f"group {name!r}: expected an axis of {path} {list(shapes[path])}, got {axis}"
        )
      sizes[f"{path}, axis {axis}"] = shapes[path][axis]
    if group.parts is not None:
      _check_parts(name, group.parts, sizes)
    elif not group.writers or len(set(sizes.values())) > 1:
      raise ValueError(
        f"group {name!r}: expected writers, and arrays with equally many channels, got {sizes}"
      )
    channels[name] = group.parts or next(iter(sizes.values()))
  return channels


def _check_parts(name: str, parts: int, sizes: Mapping[str, int]) -> None:
  if parts < 1 or not sizes or any(size % parts for size in sizes.values()):
    raise ValueError(
      f"group {name!r}: expected arrays that divide into parts={parts} equal parts, got {sizes}"
    )


def _transformer(params: Tree, head_dim: int | None) -> dict[str, Group]:
  shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
  blocks = sorted({m[0] for n in shapes if (m := re.match(r"blocks/\d+", n))}, key=path_numbers)
  groups = {}
  for block in blocks:
    size = shapes[f"{block}/key/kernel"][-1]
    if head_dim is None or head_dim < 1 or size % head_dim:
      raise ValueError(
        f"head_dim: expected the values of a head, a divisor of the {size} of {block}/key/kernel, "
        f"got {head_dim}"
      )
    projections = [f"{block}/{part}" for part in ("query", "key", "value")]
    attention = _group([*shapes], projections, [f"{block}/output"])
    groups[f"{block}/attention"] = attention._replace(parts=size // head_dim)
    inner = [f"{block}/{part}" for part in ("gate", "up")]
    groups[f"{block}/inner"] = _group([*shapes], inner, [f"{block}/down"])
  return groups


def _residual(names: Sequence[str]) -> dict[str, Group]:
  blocks = sorted({m[0] for n in names if (m := re.match(r"stages/\d+/\d+", n))}, key=path_numbers)
  groups = {}
  stream = "stem"
  writers = ["stem", "norm"]
  readers: list[str] = []
  for block in blocks:
    readers.append(f"{block}/conv1")
    if f"{block}/shortcut/layers/0/kernel" in names:
      readers.append(f"{block}/shortcut/layers/0")
      groups[stream] = _group(names, writers, readers)
      stream = block
      readers = []
      writers = [f"{block}/shortcut/layers/0", f"{block}/shortcut/layers/1"]
    groups[f"{block}/conv1"] = _group(
      names, [f"{block}/conv1", f"{block}/norm1"], [f"{block}/conv2"]
    )
    writers += [f"{block}/conv2", f"{block}/norm2"]
  return groups | {stream: _group(names, writers, [*readers, "head"])}


def _group(names: Sequence[str], layers: Sequence[str], readers: Sequence[str]) -> Group:
  """Returns the group that these layers write, with the batch norm of each `ConvNormRelu`."""
  norms = [re.sub("conv$", "norm", layer) for layer in layers if re.search("(^|/)conv$", layer)]
  layers = [*layers, *norms]
  parts = [f"{layer}/{part}" for layer in layers for part in ("kernel", "scale", "bias")]
  norms = [layer for layer in layers if f"{layer}/scale" in names]
  return Group(
    writers=tuple((part, -1) for part in parts if part in names),
    readers=tuple((f"{layer}/kernel", -2) for layer in readers),
    state=tuple((f"{norm}/{part}", 0) for norm in norms for part in ("mean", "var")),
  )


def path_numbers(name: str) -> list[int]:
  """Returns the numbers in a path, a key to sort by."""
  return [int(number) for number in re.findall(r"\d+", name)]
