"""Maps of logits on other grids; the values were computed by PyTorch's `interpolate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import losses as compiled
from interpolation import interpolate

from distill_jax import losses


@pytest.mark.parametrize(
  ("grid", "size"),
  [((2, 3), (8, 12)), ((3, 5), (4, 7)), ((12, 9), (4, 3)), ((2, 1, 3), (4, 2, 3))],
)
def test_pixels_are_areas(rng, grid, size):
  x = rng.normal(size=(2, *grid, 3)).astype(np.float32)
  y = compiled.resize_logits(x, size)
  np.testing.assert_allclose(y, interpolate(x, size), atol=1e-5)


def test_values_of_pytorch():
  # F.interpolate(x, size=(4,), mode="linear", align_corners=False), and the same for a size of 3.
  x = jnp.array([1.0, 2.0, 4.0, 8.0, 0.0, -4.0]).reshape(1, 6, 1)
  np.testing.assert_allclose(losses.resize_logits(x, (4,)).ravel(), [1.25, 3.5, 6.0, -3.0])
  np.testing.assert_allclose(losses.resize_logits(x, (3,)).ravel(), [1.5, 6.0, -2.0])


def test_a_class_that_does_not_exist_is_not_nan(rng):
  x = rng.normal(size=(1, 2, 2, 3)).astype(np.float32)
  x[..., 1] = -np.inf

  def total(x):
    y = losses.resize_logits(x, (4, 6))
    return jax.nn.logsumexp(y, -1).sum(), y

  gradient, y = jax.jit(jax.grad(total, has_aux=True))(x)
  assert np.isfinite(gradient).all() and (y[..., 1] == -np.inf).all()
  np.testing.assert_allclose(y[..., [0, 2]], interpolate(x[..., [0, 2]], (4, 6)), atol=1e-6)
  # A weight of 0 that float32 rounds: the neighbors of a missing value stay.
  x = jnp.arange(9.0).reshape(1, 9, 1).at[0, 4].set(-jnp.inf)
  np.testing.assert_array_equal(losses.resize_logits(x, (3,)).ravel(), [1.0, -jnp.inf, 7.0])


def test_low_precision_is_interpolated_in_float32(rng):
  x = jnp.asarray(rng.normal(size=(1, 3, 3, 2)), jnp.bfloat16)
  y = losses.resize_logits(x, (6, 6))
  assert y.dtype == jnp.float32
  np.testing.assert_array_equal(y, losses.resize_logits(x.astype(jnp.float32), (6, 6)))
  assert losses.resize_logits(x, (3, 3)) is x


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ((2, 4, 8, 3), (8, 4)),  # Transposed.
    ((2, 4, 9, 3), (8, 8)),
    ((2, 4, 4, 3), (4, 4, 4)),
    ((2, 16, 3), (4, 4)),
    ((2, 3), ()),
  ],
)
def test_grids_that_cannot_be_meant_raise(shape, size):
  with pytest.raises(ValueError, match=r"^head: expected .*got"):
    losses.resize_logits(jnp.zeros(shape), size, name="head")
