"""Losses that compare features value by value: absolute errors, errors with a learned variance."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks


def l1(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """<|s - t|>, the mean over all elements of one example.

  `hint` with absolute values: a few large differences dominate it less.

  Args:
    student: features [B, ...], projected to the teacher's shape.
    teacher: features of the same shape.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ.

  Compares: feature values
  Shapes: [B, ...] -> [B]
  Use: a middle layer whose features have outliers; generators of images
  Weight: 1 (MMRazor's default)
  Source: FitNets, Romero et al. 2015, with absolute values; `L1Loss` of MMRazor

  >>> l1(jnp.array([[1., 2.]]), jnp.array([[1., 5.]]))
  Array([1.5], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  return _checks.per_example(jnp.abs(student - teacher))


def pad(student: ArrayLike, teacher: ArrayLike, log_variance: ArrayLike) -> jax.Array:
  """<(s - t)^2> / (exp(v) + 1e-6) + v: squared error with a learned log-variance v per example.

  Examples that the student cannot fit get a large v, so that the others weigh more.
  torchdistill, after the authors' code, predicts one v for each value instead of each example.

  Args:
    student: features [B, ...], projected to the teacher's shape.
    teacher: features of the same shape.
    log_variance: v of each example, [B], predicted from the student's features.

  Returns:
    [B]; may be negative.

  Raises:
    ValueError: shapes differ, or log_variance is not [B].

  Compares: feature values, each example with a learned variance
  Shapes: [B, ...], log_variance [B] -> [B]
  Use: embeddings, where some examples are too hard or wrong
  Weight: 1
  Source: PAD, Zhang et al. 2020, arXiv:2008.01458

  >>> pad(jnp.array([[1., 2.]]), jnp.array([[1., 4.]]), jnp.zeros(1)).round(4)
  Array([2.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  log_variance = _checks.array("log_variance", log_variance).astype(student.dtype)
  if log_variance.shape != student.shape[:1]:
    raise ValueError(
      f"log_variance: expected one value an example, {student.shape[:1]}, got {log_variance.shape}"
    )
  error = _checks.per_example((student - teacher) ** 2)
  return error / (jnp.exp(log_variance) + 1e-6) + log_variance
