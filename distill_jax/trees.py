"""Names the leaves of a tree by their paths, and selects them by pattern."""

import re
from collections.abc import Sequence

import jax

from distill_jax.types import Tree


def named_leaves(tree: Tree) -> list[tuple[str, jax.Array]]:
  """The leaves with their paths as text: `[('layers/0/kernel', array), ...]`."""
  with_path = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in with_path
  ]


def describe_leaf(shape: Sequence[int], dtype: object) -> str:
  """Returns a leaf's dtype and shape as an error message shows them.

  >>> describe_leaf((3, 2), "float32")
  'float32[3,2]'
  """
  return f"{dtype}[{','.join(map(str, shape))}]"


def matching(tree: Tree, pattern: str) -> Tree:
  """A tree of bools: whether the regular expression is found in a leaf's path; a mask as optax takes them.

      optax.chain(optax.adamw(1e-3), optax.freeze(lambda params: matching(params, r"^student/blocks/0/")))

  Args:
    tree: arrays, or `ShapeDtypeStruct`s.
    pattern: for `re.search`; "" is found in every path.

  Raises:
    ValueError: it is found in none, or is no regular expression.

  >>> matching({"a": {"kernel": 1.0, "bias": 0.0}}, "kernel$")
  {'a': {'bias': False, 'kernel': True}}
  """
  names = [name for name, _ in named_leaves(tree)]
  try:
    found = [re.search(pattern, name) is not None for name in names]
  except re.error as error:
    raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
  if not any(found):
    raise ValueError(f"pattern {pattern!r} fits no leaf; some are {', '.join(names[:8])}")
  return jax.tree.unflatten(jax.tree.structure(tree), found)


def chosen(tree: Tree, pattern: str) -> dict[str, jax.Array]:
  """The leaves in whose path the pattern is found, by path. Raises as `matching`."""
  found = jax.tree.leaves(matching(tree, pattern))
  return {name: leaf for (name, leaf), fits in zip(named_leaves(tree), found, strict=True) if fits}
