import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models.adapters.outputs import select_inputs
from distill_jax.models.input_errors import name_network


def test_gray_images_without_an_axis_are_named():
  """The error of the convolution came as it is."""
  batch = {"image": np.zeros((2, 8, 8), np.float32)}
  with pytest.raises(ValueError, match=r"^model: expected .*image\[\.\.\., None\].*image\[None\]"):
    with name_network("model", batch, dict):
      kernel = jnp.zeros((3, 3, 1, 4))
      jax.eval_shape(
        lambda x: jax.lax.conv_general_dilated(
          x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        batch["image"],
      )


def test_errors_that_name_a_field_stay():
  with pytest.raises(ValueError, match=r"^image: expected 3 channels"):
    with name_network("model", {"image": np.zeros((2, 8, 8))}, dict):
      raise ValueError("image: expected 3 channels, got 8")


def test_missing_input_names_the_network():
  batch = {"image": np.zeros((2, 8))}
  with pytest.raises(ValueError, match="^teacher: inputs: expected .*'tokens'"):
    with name_network("teacher", batch, dict):
      select_inputs(batch, "tokens")


@pytest.mark.parametrize(
  ("sides", "stride", "multiples"),
  [((12, 13), 4, "12 x 16"), ((18, 17), 8, "24 x 24"), ((9, 8, 8), 2, "10 x 8 x 8")],
)
def test_sides_that_a_network_does_not_take_name_the_divisor(sides, stride, multiples):
  def output_shapes(batch):
    def skip(x):
      low = x[(slice(None), *[slice(None, None, stride)] * len(sides))]
      for axis in range(1, 1 + len(sides)):
        low = jnp.repeat(low, stride, axis)
      return jnp.concatenate([low, x], -1)

    return jax.eval_shape(skip, batch["image"])

  batch = {"image": jnp.zeros((2, *sides, 1)), "label": jnp.zeros((2, *sides), int)}
  with pytest.raises(ValueError, match=rf"^student: .* {stride} divides.*'image' to {multiples},"):
    with name_network("student", batch, output_shapes):
      output_shapes(batch)
