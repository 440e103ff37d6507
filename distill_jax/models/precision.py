"""The width of weights."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def cast(tree: Tree, dtype) -> Tree:
  """The tree with its floating arrays in another dtype, such as a teacher's `Variables` in half the memory.

      fit(student, teacher, ..., teacher_variables=cast(variables, jnp.bfloat16))

  Only what is not trained should be narrow: a parameter in bfloat16 does not move by less than 1/256 of itself. A
  network computes in the dtype of its layers (`dtype=`), or in the wider one of inputs and weights where they have
  none.

  Args:
    tree: of arrays or `ShapeDtypeStruct`s; integers, booleans and keys stay as they are.
    dtype: a floating one.

  Raises:
    ValueError: the dtype is not floating.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype: expected a floating one such as jnp.bfloat16, got {dtype}")

  def one(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return (
      jax.ShapeDtypeStruct(x.shape, dtype)
      if isinstance(x, jax.ShapeDtypeStruct)
      else x.astype(dtype)
    )

  return jax.tree.map(one, tree)
