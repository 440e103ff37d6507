"""Builds the learned parts of terms as dicts of arrays: linear maps, convolutions, batch norm.

Parameters are float32; a layer computes in the dtype of its input.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.types import Tree


def layer_init(key: jax.Array, *shape: int, bias: bool = True) -> dict[str, jax.Array]:
  """Returns a kernel of this shape and a bias of zeros.

  Args:
    key: typed PRNG key.
    *shape: [in, out] (a linear map of the channels), or [height, width, in, out] or
      [depth, height, width, in, out] (a convolution). Normal values with variance 1 / fan-in
      (LeCun).
    bias: add a bias [out].
  """
  params = {"kernel": jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)}
  return params | {"bias": jnp.zeros(shape[-1], jnp.float32)} if bias else params


def layer(params: Tree, x: jax.Array) -> jax.Array:
  """Maps [..., in] to [..., out]; a convolution has stride 1 and pads with zeros."""
  kernel = params["kernel"].astype(x.dtype)
  if kernel.ndim == 2:
    x = x @ kernel
  else:
    axes = "DHW"[5 - x.ndim :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    strides = (1,) * len(axes)
    x = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=numbers)
  return x + _channels(params["bias"].astype(x.dtype), x) if "bias" in params else x


def stack_init(
  key: jax.Array, sizes: Sequence[int], *, window: tuple[int, ...] = (), bias: bool = True
) -> Tree:
  """Returns layers '0', '1', ... from each size to the next; window (3, 3): convolutions."""
  keys = jax.random.split(key, len(sizes) - 1)
  return {
    str(i): layer_init(keys[i], *window, a, b, bias=bias)
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
  }


def stack(params: Tree, x: jax.Array, activation: Callable = jax.nn.relu) -> jax.Array:
  """Applies the layers in order, with the activation between them (not after the last)."""
  for i in range(len(params)):
    x = layer(params[str(i)], x if i == 0 else activation(x))
  return x


def connector_init(key: jax.Array, *shape: int) -> Tree:
  """Returns a layer without bias and its batch norm; shape as in `layer_init`."""
  norm = {"scale": jnp.ones(shape[-1], jnp.float32), "bias": jnp.zeros(shape[-1], jnp.float32)}
  return {"layer": layer_init(key, *shape, bias=False), "norm": norm}


def connector(
  params: Tree,
  x: jax.Array,
  *,
  where: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Applies the layer and batch norm over the valid rows and space (ddof 0, eps 1e-5).

  A term is only computed while training, so there are no running statistics.

  Args:
    params: from `connector_init`.
    x: [B, ..., in].
    where: valid rows, bool [B]; None: all.
    axis_name: mapped axis whose devices hold the other rows.
  """
  x = layer(params["layer"], x)
  dtype = x.dtype
  x = x.astype(reduce.common_dtype(dtype, jnp.float32))
  where = jnp.ones(len(x), bool) if where is None else where
  where = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))

  def total(values):
    values = jnp.where(where, values, 0).sum(tuple(range(x.ndim - 1)))
    return values if axis_name is None else jax.lax.psum(values, axis_name)

  count = jnp.maximum(total(jnp.ones_like(x)), 1)
  centered = x - _channels(total(x) / count, x)
  variance = total(centered**2) / count
  scale = params["norm"]["scale"].astype(x.dtype)
  bias = params["norm"]["bias"].astype(x.dtype)
  normal = centered * _channels(jax.lax.rsqrt(variance + 1e-5) * scale, x) + _channels(bias, x)
  return normal.astype(dtype)


def align_init(key: jax.Array, s: jax.Array, t: jax.Array) -> Tree:
  """Returns a linear map from the channels of s to those of t (FitNets' regressor).

  It is empty where the channels are equal. `s` and `t` may be `ShapeDtypeStruct`s.
  """
  return layer_init(key, s.shape[-1], t.shape[-1]) if s.shape[-1] != t.shape[-1] else {}


def align(params: Tree, s: jax.Array, t: jax.Array, *, resize: bool = True) -> jax.Array:
  """Returns s with the channels of t and, of maps [B, ..., H, W, C], with its size."""
  s = layer(params, s) if params else s
  return resize_to(s, t) if resize else s


def resize_to(s: jax.Array, t: jax.Array, method: str = "linear") -> jax.Array:
  """Returns a map at the size of t, antialiased where it shrinks.

  Args:
    s: maps [B, H, W, C], volumes [B, D, H, W, C] or clips [B, T, H, W, C], of which the depth or
      the time is resized too; other features stay as they are.
    t: maps of as many axes.
    method: of `jax.image.resize`.
  """
  if s.ndim < 4 or s.shape[1:-1] == t.shape[1:-1]:
    return s
  return jax.image.resize(s, (s.shape[0], *t.shape[1:-1], s.shape[-1]), method)


def shape_mismatch(s: tuple[int, ...], t: tuple[int, ...], *, resize: bool = True) -> str | None:
  """Returns why features of these shapes cannot be aligned, or None.

  Without `resize` their lengths, heights and widths may differ: the loss gets them as they are.
  """
  if len(s) != len(t):
    return "their ranks differ"
  if len(s) < 2:
    return "a feature needs rows and channels"
  if s[0] != t[0]:
    return "their numbers of rows differ"
  if resize and len(s) < 4 and s[1:-1] != t[1:-1]:
    return (
      "their lengths differ: objectives.sequences interpolates between the positions that are no "
      "padding"
    )
  return None


def _channels(values, x):
  """Returns values [C] with the rank of x."""
  return values.reshape((1,) * (x.ndim - 1) + (-1,))
