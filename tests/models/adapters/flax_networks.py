"""Small Flax networks that several tests share, as NNX and as Linen modules."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.models import from_linen, from_nnx

KEY = jax.random.key(1)


class Block(nnx.Module):
  """Attention, layer norm, batch norm and dropout: all modes and kinds of state, nested."""

  def __init__(self, rngs: nnx.Rngs):
    self.attention = nnx.MultiHeadAttention(
      2, 4, dropout_rate=0.5, decode=False, rngs=rngs, broadcast_dropout=False
    )
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.batch_norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.batch_norm(self.norm(x + self.attention(x))))


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.block = Block(rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.block(x).mean(1))


class LinenBlock(linen.Module):
  """The same network in Linen; its mode is an argument named `train`."""

  @linen.compact
  def __call__(self, x, train):
    x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(2)(x))
    x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    return linen.Dropout(0.5, deterministic=not train)(x)


class LinenNet(linen.Module):
  @linen.compact
  def __call__(self, x, train):
    return linen.Dense(2, name="head")(LinenBlock(name="block")(x, train).mean(1))


class Twice(nnx.Module):
  """Calls one layer twice."""

  def __init__(self, rngs: nnx.Rngs):
    self.layer = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    return self.layer(jnp.sin(self.layer(x)))


class LinenTwice(linen.Module):
  @linen.compact
  def __call__(self, x):
    layer = linen.Dense(4, name="layer")
    return layer(jnp.sin(layer(x)))


LIBRARIES = {
  "nnx": lambda features=(): from_nnx(Net, features=features),
  "linen": lambda features=(): from_linen(LinenNet(), features=features),
}


def ones(*shape):
  return {"image": np.ones(shape, np.float32)}


def assert_same(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_one_structure(a, b):
  """A scan or a donated buffer needs the same tree, shapes and dtypes on both sides."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
