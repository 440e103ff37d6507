"""Casts weights to another dtype."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
  """Returns the tree with its floating arrays in another dtype, such as a teacher in half the
  memory.

      fit(student, teacher, ..., teacher_variables=cast(variables, jnp.bfloat16))

  Cast only what is not trained: a parameter in bfloat16 does not change by less than 1/256 of its
  value.
  A network computes in the dtype of its layers (`dtype=`), and without one in the wider dtype of
  inputs and weights.

  Args:
    tree: arrays or `ShapeDtypeStruct`s; integers, booleans and keys stay as they are.
    dtype: a floating dtype.

  Raises:
    ValueError: the dtype is not floating.

  >>> cast({"kernel": jnp.ones(2), "step": jnp.ones((), int)}, jnp.bfloat16)["kernel"].dtype
  dtype(bfloat16)
  """
  check_floating(dtype)

  def cast_leaf(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, dtype)
    return x.astype(dtype)

  return jax.tree.map(cast_leaf, tree)


def check_floating(dtype: DTypeLike) -> None:
  """Checks that a dtype is floating.

  Raises:
    ValueError: it is not.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype: expected a floating one such as jnp.bfloat16, got {dtype}")
