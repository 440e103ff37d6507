"""Losses on feature maps and vectors, channels last: [B, ..., C] on both sides.

Where widths differ the student goes through a learned projection first (`objectives.learned`).
"""

import jax

from distill_jax.losses import _checks


def hint(student, teacher) -> jax.Array:
  """<(s - t)^2>, the mean over all elements of one example.

  The paper writes half the sum; every published implementation takes the mean of all elements.

  Args:
    student: features [B, ...], projected to the teacher's shape.
    teacher: features of the same shape.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ.

  Compares: feature values
  Shapes: [B, ...] -> [B]
  Use: a middle layer of an image network, the student's through a learned projection
  Weight: 100
  Source: FitNets, Romero et al. 2015, equation 3, arXiv:1412.6550

  >>> hint(jnp.array([[1., 2.]]), jnp.array([[1., 4.]]))
  Array([2.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  return _checks.mean_per_example((student - teacher) ** 2)


def cosine(student, teacher) -> jax.Array:
  """1 - cos(s, t) over the last axis.

  A row of zeros has no direction: its cosine is 0 and its gradient 0.

  Args:
    student: features [..., C].
    teacher: features of the same shape.

  Returns:
    [...], between 0 and 2.

  Raises:
    ValueError: shapes differ.

  Compares: directions of feature vectors
  Shapes: [..., C] -> [...]
  Use: hidden states of transformers, where scale carries little
  Weight: 1 beside the logit loss
  Source: DistilBERT, Sanh et al. 2019, section 2, arXiv:1910.01108

  >>> cosine(jnp.array([[1., 0.]]), jnp.array([[0., 2.]]))
  Array([1.], dtype=float32)
  """
  s, t = (_checks.unit(x) for x in _checks.pair(student, teacher))
  # |s - t|^2 / 2 in place of 1 - s't, which loses all digits near 0; norms are 1, or 0 for zeros.
  return 0.5 * ((s - t) ** 2).sum(-1) + 0.5 * ((s == 0).all(-1).astype(s.dtype) + (t == 0).all(-1))
