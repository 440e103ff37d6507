"""Losses of maps take volumes [B, D, H, W, C] and clips [B, T, H, W, C]: all positions are alike.

The values are those of the float64 references, which run over positions of any number of axes.
"""

import functools

import jax
import map_references as maps
import numpy as np
import pytest
from compiled_losses import quick_compilation
from loss_cases import with_classes

from distill_jax import losses

SHAPE = (2, 3, 2, 2)
CLASSES = {"num_classes": 4, "ignore_label": 255}


@functools.cache
def arguments():
  """Returns the arguments of each loss: volumes, and labels of another size."""
  rng = np.random.default_rng(0)
  s, t, wide, second_s, second_t = (
    rng.normal(size=(*SHAPE, channels)).astype(np.float32) for channels in (4, 4, 5, 3, 3)
  )
  labels = with_classes(rng, (2, 3, 4, 3))
  return {
    "attention_transfer": ((s, wide), {}),
    "importance_map": ((s, wide), {}),
    "nst": ((s, wide), {}),
    "fsp": (((s, second_s), (t, second_t)), {}),
    "inter_channel": ((s, t[:, :2]), {}),
    "kdsvd": (((s, second_s), (t[:, :2], second_t)), {}),
    "cwd": ((s, t), {"temperature": 1.0}),
    "pearson": ((s, t), {}),
    "mgd": ((s, t), {}),
    "hint": ((s, t), {}),
    "cosine": ((s, t), {}),
    "similarity_preserving": ((s, wide), {}),
    "ifv": ((s, wide, labels), CLASSES),
    "region_affinity": ((s, wide, labels), CLASSES),
    "pairwise_similarity": ((s, wide), {"pool": 0.7}),
  }


@functools.cache
def values():
  """Returns the values of all losses: one program."""

  def run(inputs):
    return {
      name: getattr(losses, name)(*inputs[name], **options)
      for name, (_, options) in arguments().items()
    }

  with quick_compilation():
    return jax.jit(run)({name: arrays for name, (arrays, _) in arguments().items()})


@pytest.mark.parametrize("name", arguments())
def test_volume_equals_the_formula(name):
  arrays, options = arguments()[name]
  options = {"k": 1} | options if name == "kdsvd" else options
  arrays = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arrays)
  expected = getattr(maps, name)(*arrays, **options)
  np.testing.assert_allclose(values()[name], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  "call",
  [
    lambda x: losses.review_kd(x, x),
    lambda x: losses.fgd(x, x, np.zeros(x.shape[:-1]), losses.fgd_init(jax.random.key(0), 4)),
    lambda x: losses.layer_attention(
      [x], [x], losses.layer_attention_init(jax.random.key(0), [4], [4], width=2)
    ),
  ],
  ids=["review_kd", "fgd", "layer_attention"],
)
def test_losses_of_images_reject_volumes(call):
  with pytest.raises(ValueError, match=r"^student: expected maps \[B, H, W, C\].*losses\.cwd"):
    jax.eval_shape(call, jax.ShapeDtypeStruct((*SHAPE, 4), np.float32))
