"""Names the leaves of a tree by their paths, and selects them by pattern."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distill_jax.types import Tree


def named_leaves(tree: Tree) -> list[tuple[str, jax.Array]]:
  """Returns the leaves with their paths as text: `[('layers/0/kernel', array), ...]`."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def describe_leaf(shape: Sequence[int], dtype: object) -> str:
  """Returns a leaf's dtype and shape as an error message shows them.

  >>> describe_leaf((3, 2), "float32")
  'float32[3,2]'
  """
  return f"{dtype}[{','.join(map(str, shape))}]"


def batch_specs(
  arrays: Mapping[str, Any], rows: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of a batch as `jit` sees them; `rows`: in place of its own number.

  jax 0.12 warns of specs with 64 bits, which `jit` truncates in arrays without a word.
  """
  shapes = {name: x.shape if rows is None else (rows, *x.shape[1:]) for name, x in arrays.items()}
  dtypes = {name: jax.dtypes.canonicalize_dtype(x.dtype) for name, x in arrays.items()}
  return {name: jax.ShapeDtypeStruct(shapes[name], dtypes[name]) for name in shapes}


def path_mask(tree: Tree, pattern: str) -> Tree:
  """Returns a tree of bools, a mask for optax: whether the pattern is found in a leaf's path.

      optax.freeze(lambda params: path_mask(params, r"^student/blocks/0/"))

  Args:
    tree: arrays, or `ShapeDtypeStruct`s.
    pattern: regular expression for `re.search`; "" is found in every path.

  Raises:
    ValueError: it is found in no path, or is no regular expression.

  >>> path_mask({"a": {"kernel": 1.0, "bias": 0.0}}, "kernel$")
  {'a': {'bias': False, 'kernel': True}}
  """
  names = [name for name, _ in named_leaves(tree)]
  try:
    mask = [re.search(pattern, name) is not None for name in names]
  except re.error as error:
    raise ValueError(f"pattern: expected a regular expression, got {pattern!r}: {error}") from error
  if not any(mask):
    raise ValueError(
      f"pattern: expected one found in a leaf's path, got {pattern!r}; some paths are "
      f"{', '.join(names[:8])}"
    )
  return jax.tree.unflatten(jax.tree.structure(tree), mask)


def select_leaves(tree: Tree, pattern: str) -> dict[str, jax.Array]:
  """Returns the leaves in whose path the pattern is found, by path; raises as `path_mask`."""
  mask = jax.tree.leaves(path_mask(tree, pattern))
  return {
    name: leaf for (name, leaf), selected in zip(named_leaves(tree), mask, strict=True) if selected
  }
