"""What to build a smaller network with: the arguments of its class, read off its arrays.

    small = shrink(variables, groups_of(variables.params))
    arguments = arguments_of(small.params)
    export_student(small, folder, description={"arguments": arguments})

and, wherever the folder is used,

    arguments = json.loads((folder / "model.json").read_text())["description"]["arguments"]
    model = from_nnx(lambda rngs: CNN(**arguments, rngs=rngs))         # or VGG(**arguments, rngs=rngs)
    model = from_nnx(lambda rngs: Decoder(**arguments, length=512, rngs=rngs), inputs="tokens")
    variables = load_student(folder, model, batch)

What arrays do not tell has to be given as before: dropout, dtype, rope_base, ..., of a `ViT` channels, size and patch.
A network whose layers have widths that its class cannot have (a VGG with other widths in one block) is loaded into the
large one: `load_student(folder, model._replace(variables=small))`, where `small` may be shapes.
"""

import re
from typing import Any

from distill_jax.compression.pruning.groups import groups_of, natural
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

_VGG = (64, 128, 256, 512, 512)  # channels of the blocks at width 1
Shapes = dict[str, tuple[int, ...]]


def arguments_of(params: Tree, *, head_width: int | None = None) -> dict[str, Any]:
  """Keyword arguments for the class of a network with these arrays: an `MLP`, `CNN`, `VGG`, `Decoder` or `ViT`.

  Args:
    params: of the network, shrunk or not: arrays, or `ShapeDtypeStruct`s.
    head_width: of a transformer, numbers of a head.

  Returns:
    Plain values that json can hold.

  Raises:
    ValueError: another network; widths that its class cannot have; a head_width that is missing or does not divide.
  """
  shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}
  groups_of(params, head_width=head_width)
  if head_width is not None and "blocks/0/query/kernel" in shapes:
    return (_decoder if "embed/embedding" in shapes else _vit)(shapes, head_width)
  if "blocks/0/0/conv/kernel" in shapes:
    return _vgg(shapes)
  if "blocks/0/conv/kernel" in shapes:
    sizes = _sizes(shapes, r"blocks/\d+/conv/kernel")
    return {
      "channels": sizes[0][0],
      "widths": [b for _, b in sizes],
      "classes": shapes["head/kernel"][-1],
    }
  if "hidden/0/kernel" in shapes:
    sizes = _sizes(shapes, r"hidden/\d+/kernel")
    return {
      "inputs": sizes[0][0],
      "widths": [b for _, b in sizes],
      "classes": shapes["head/kernel"][-1],
    }
  raise ValueError(
    f"arguments_of knows MLP, CNN, VGG, Decoder and ViT, not a network of {', '.join([*shapes][:8])}, ..."
  )


def _vgg(shapes: Shapes) -> dict[str, Any]:
  blocks = [_sizes(shapes, rf"blocks/{b}/\d+/conv/kernel") for b in range(len(_VGG))]
  widths = [block[-1][1] for block in blocks]
  # `round(width * 64)` and so on allow an interval each.
  low = max((n - 0.5) / whole if n > 1 else 0.0 for n, whole in zip(widths, _VGG, strict=True))
  high = min((n + 0.5) / whole for n, whole in zip(widths, _VGG, strict=True))
  width = (low + high) / 2
  if (
    any(b != n for block, n in zip(blocks, widths) for _, b in block)
    or [max(1, round(width * whole)) for whole in _VGG] != widths
  ):
    found = [[b for _, b in block] for block in blocks]
    raise ValueError(
      f"VGG has {list(_VGG)} times one width as channels of its blocks, and not {found}"
    )
  return {
    "channels": blocks[0][0][0],
    "depth": sum(map(len, blocks)) + 3,  # the name counts the paper's three linear layers
    "classes": shapes["head/kernel"][-1],
    "width": width,
  }


def _decoder(shapes: Shapes, head_width: int) -> dict[str, Any]:
  vocabulary, width = shapes["embed/embedding"]
  sizes = _block(shapes)
  return {
    "vocabulary": vocabulary,
    "width": width,
    "depth": sizes["depth"],
    "heads": sizes["query"] // head_width,
    "kv_heads": sizes["key"] // head_width,
    "head_width": head_width,
    "inner": sizes["up"],
    "tied": "head" not in shapes,
    "projection_bias": "blocks/0/query/bias" in shapes,
    "projection_norm": "blocks/0/query_norm/scale" in shapes,
  }


def _vit(shapes: Shapes, head_width: int) -> dict[str, Any]:
  width, classes = shapes["head/kernel"]
  sizes = _block(shapes)
  return {
    "classes": classes,
    "width": width,
    "depth": sizes["depth"],
    "heads": sizes["query"] // head_width,
    "head_width": head_width,
    "ratio": sizes["up"] / width,
    "distilled": "distilled/kernel" in shapes,
  }


def _block(shapes: Shapes) -> dict[str, int]:
  """What all blocks of a transformer have in common: outputs of their layers, and how many blocks there are."""
  found: dict[str, int] = {}
  for layer in ("query", "key", "up"):
    sizes = [b for _, b in _sizes(shapes, rf"blocks/\d+/{layer}/kernel")]
    if len(set(sizes)) > 1:
      raise ValueError(
        f"all blocks have as many heads and neurons; {layer} has {sizes} outputs, block by block"
      )
    found |= {layer: sizes[0], "depth": len(sizes)}
  return found


def _sizes(shapes: Shapes, pattern: str) -> list[tuple[int, int]]:
  """(inputs, outputs) of the kernels whose paths match, in the order of their numbers."""
  names = sorted((name for name in shapes if re.fullmatch(pattern, name)), key=natural)
  return [(shapes[name][-2], shapes[name][-1]) for name in names]
