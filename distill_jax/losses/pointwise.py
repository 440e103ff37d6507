"""Losses that compare features value by value: absolute, with a variance, or of masked tokens."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks
from distill_jax.losses._checks import Scalar


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


def vitkd(
  student: tuple[ArrayLike, ArrayLike],
  teacher: tuple[ArrayLike, ArrayLike],
  masked: ArrayLike,
  *,
  alpha: Scalar = 3e-5,
  beta: Scalar = 3e-6,
) -> jax.Array:
  """alpha sum (s - t)^2 of shallow layers + beta N / M sum (g - t)^2 of the M masked of N tokens.

  g is generated from the unmasked tokens of the student's last layer by a learned network
  (`objectives.vitkd`). M / N is the paper's lambda, 0.5.

  Args:
    student: shallow layers [B, ..., C], mapped to the teacher's width, and generated tokens
      [B, N, C].
    teacher: shallow layers and last layer, of the same shapes.
    masked: the tokens that were masked, bool [B, N].
    alpha: weight >= 0 of the shallow layers, may be traced.
    beta: weight >= 0 of the last layer, may be traced.

  Returns:
    [B], summed over tokens and channels.

  Raises:
    ValueError: not two features; shapes differ; masked is not bool [B, N]; or a negative weight.

  Compares: shallow features, and the last layer's generated from a part of the student's
  Shapes: ([B, ..., C], [B, N, C]) x 2, masked [B, N] -> [B]
  Use: vision transformers, layers 1 and 2 and the last one
  Weight: 1 in addition to a logit loss, the weights being alpha and beta
  Source: ViTKD, Yang et al. 2022, arXiv:2209.02432

  >>> s, t = (jnp.ones((1, 2)), jnp.ones((1, 2, 3))), (jnp.zeros((1, 2)), jnp.zeros((1, 2, 3)))
  >>> vitkd(s, t, jnp.array([[True, False]]), alpha=1., beta=1.)
  Array([8.], dtype=float32)
  """
  for name, features in (("student", student), ("teacher", teacher)):
    if not isinstance(features, tuple | list) or len(features) != 2:
      raise ValueError(
        f"{name}: expected two features (shallow, last), got {type(features).__name__}"
      )
  shallow, deep = (_checks.pair(s, t, ndim=2) for s, t in zip(student, teacher))
  _checks.array("student", deep[0], exactly=3)
  alpha, beta = (
    _checks.number(name, x, deep[0].dtype, low=0) for name, x in (("alpha", alpha), ("beta", beta))
  )
  masked = jnp.asarray(masked)
  if masked.dtype != jnp.bool_ or masked.shape != deep[0].shape[:2]:
    raise ValueError(
      f"masked: expected bool {deep[0].shape[:2]}, got {masked.dtype} {masked.shape}"
    )
  error = jnp.where(masked[..., None], deep[0] - deep[1], 0)
  size = masked.shape[1] / jnp.maximum(masked.sum(-1, dtype=error.dtype), 1)
  mimicking = _checks.per_example((shallow[0] - shallow[1]) ** 2, total=True)
  return alpha * mimicking + beta * size * _checks.per_example(error**2, total=True)
