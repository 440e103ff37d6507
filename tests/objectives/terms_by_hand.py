"""What the tests of terms share: random arrays, shapes, softmax in float64, a term's value."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce

KEY = jax.random.key(0)


def shaped(**shapes):
  """Outputs that are only shapes, as `make_init` passes them."""
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def evaluate(term, student, teacher, batch, *, params=None, axis_name=None):
  """Returns a term's value, and its mean as the step takes it."""
  if params is None:
    params = term.init(KEY, student, teacher).params

  @jax.jit
  def apply(params, student, teacher, batch):
    value, _ = term.apply(
      params, {}, student, teacher, batch, step=jnp.int32(0), key=KEY, axis_name=axis_name
    )
    return value, reduce.mean(*value) if isinstance(value, tuple) else value

  return apply(params, student, teacher, batch)


def softmax64(z):
  e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def normal(rng, *shape):
  """Standard normal float32 values of this shape."""
  return rng.normal(size=shape).astype(np.float32)
