"""Reads the arguments of a smaller network's class off its arrays.

    small = shrink(variables, groups_of(variables.params))
    arguments = arguments_of(small.params)
    export_student(small, folder, description={"arguments": arguments})

and, wherever the folder is used,

    arguments = json.loads((folder / "model.json").read_text())["description"]["arguments"] model =
    from_nnx(lambda rngs: CNN(**arguments, rngs=rngs))         # or VGG(**arguments, rngs=rngs)
    model = from_nnx(lambda rngs: Decoder(**arguments, rngs=rngs), inputs="tokens") variables =
    load_student(folder, model, batch)

What arrays do not show must be given as before: dropout, dtype, a `Decoder`'s options, and the
channels, size and patch of a `ViT`.
A network with widths that its class cannot have (a VGG with other widths in one block) is loaded
into the large one: `load_student(folder, model._replace(variables=small))`, where `small` may be
shapes.
"""

import re
from typing import Any

from distill_jax.compression.pruning.groups import groups_of, path_numbers
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

_VGG = (64, 128, 256, 512, 512)
"""Channels of the blocks at width 1."""
Shapes = dict[str, tuple[int, ...]]


def arguments_of(params: Tree, *, head_dim: int | None = None) -> dict[str, Any]:
  """Returns the arguments of an `MLP`, `CNN`, `VGG`, `Decoder` or `ViT` with these arrays.

  Args:
    params: parameters of the network, shrunk or not: arrays, or `ShapeDtypeStruct`s.
    head_dim: values of a head of a transformer; else None.

  Returns:
    Keyword arguments, plain values that json can hold.

  Raises:
    ValueError: another network; widths that its class cannot have; a head_dim that is missing or
      does not divide.
  """
  shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}
  groups_of(params, head_dim=head_dim)
  if head_dim is not None and "blocks/0/query/kernel" in shapes:
    return (_decoder if "embed/embedding" in shapes else _vit)(shapes, head_dim)
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
    "params: expected an MLP, CNN, VGG, Decoder or ViT, got the leaves "
    f"{', '.join([*shapes][:8])}, ..."
  )


def _vgg(shapes: Shapes) -> dict[str, Any]:
  blocks = [_sizes(shapes, rf"blocks/{b}/\d+/conv/kernel") for b in range(len(_VGG))]
  widths = [block[-1][1] for block in blocks]
  # `round(width * 64)` and the others each allow an interval of widths.
  low = max((n - 0.5) / full if n > 1 else 0.0 for n, full in zip(widths, _VGG, strict=True))
  high = min((n + 0.5) / full for n, full in zip(widths, _VGG, strict=True))
  width = (low + high) / 2
  is_uniform = all(b == n for block, n in zip(blocks, widths) for _, b in block)
  if not is_uniform or [max(1, round(width * full)) for full in _VGG] != widths:
    channels = [[b for _, b in block] for block in blocks]
    raise ValueError(
      f"params: expected {list(_VGG)} times one width as channels of a VGG's blocks, got {channels}"
    )
  return {
    "channels": blocks[0][0][0],
    # The name counts the paper's three linear layers.
    "depth": sum(map(len, blocks)) + 3,
    "classes": shapes["head/kernel"][-1],
    "width": width,
  }


def _decoder(shapes: Shapes, head_dim: int) -> dict[str, Any]:
  vocab_size, embed_dim = shapes["embed/embedding"]
  sizes = _block(shapes)
  return {
    "vocab_size": vocab_size,
    "embed_dim": embed_dim,
    "num_layers": sizes["num_layers"],
    "num_heads": sizes["query"] // head_dim,
    "num_kv_heads": sizes["key"] // head_dim,
    "head_dim": head_dim,
    "mlp_dim": sizes["up"],
    "tie_embeddings": "head" not in shapes,
    "qkv_bias": "blocks/0/query/bias" in shapes,
    "qk_norm": "blocks/0/query_norm/scale" in shapes,
  }


def _vit(shapes: Shapes, head_dim: int) -> dict[str, Any]:
  embed_dim, classes = shapes["head/kernel"]
  sizes = _block(shapes)
  return {
    "classes": classes,
    "embed_dim": embed_dim,
    "num_layers": sizes["num_layers"],
    "num_heads": sizes["query"] // head_dim,
    "head_dim": head_dim,
    "mlp_ratio": sizes["up"] / embed_dim,
    "distilled": "distilled/kernel" in shapes,
  }


def _block(shapes: Shapes) -> dict[str, int]:
  """Returns the outputs of the layers of a transformer's blocks, and the number of blocks."""
  block: dict[str, int] = {}
  for layer in ("query", "key", "up"):
    sizes = [b for _, b in _sizes(shapes, rf"blocks/\d+/{layer}/kernel")]
    if len(set(sizes)) > 1:
      raise ValueError(
        f"params: expected blocks with equally many heads and neurons, got {sizes} outputs of "
        f"{layer}"
      )
    block |= {layer: sizes[0], "num_layers": len(sizes)}
  return block


def _sizes(shapes: Shapes, pattern: str) -> list[tuple[int, int]]:
  """Returns (inputs, outputs) of the kernels whose paths match, in the order of their numbers."""
  names = sorted((name for name in shapes if re.fullmatch(pattern, name)), key=path_numbers)
  return [(shapes[name][-2], shapes[name][-1]) for name in names]
