"""Bounds on the temporaries of compiled losses, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax import losses


def dino(student, teacher):
  return losses.dino(student, teacher, jnp.zeros(student.shape[-1]))[0].mean()


def cirkd(student, teacher):
  state = losses.cirkd_state(jax.random.key(0), 2, 8, pixels=64, regions=8)
  labels = jnp.zeros((8, 16, 16), int)
  return losses.cirkd(student, teacher, teacher, labels, jax.random.key(1), state)[0]


# The loss, shapes of student and teacher, most bytes. Comments: what a plain formula allocates.
LIMITS = {
  "rkd_angle": (losses.rkd_angle, (512, 64), (512, 64), 200e6),  # a cube of the batch: 537 MB
  "nst": (
    losses.nst,
    (64, 7, 7, 512),
    (64, 7, 7, 2048),
    100e6,
  ),  # Gram matrices of the channels: 1.07 GB
  "dino": (
    dino,
    (10, 32, 8192),
    (2, 32, 8192),
    40e6,
  ),  # products of 18 pairs of views: 19 MB, more than once
  "cirkd": (cirkd, (8, 16, 16, 8), (8, 16, 16, 8), 20e6),  # similarities of all pixels: 34 MB
  "kl_divergence": (losses.kl_divergence, (256, 8192), (256, 8192), 3.5 * 4 * 256 * 8192),
}


@pytest.mark.parametrize("name", LIMITS)
def test_temporaries_are_small(name):
  loss, student, teacher, most = LIMITS[name]
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (student, teacher)]
  gradient = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).mean()))
  size = gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  assert size < most
