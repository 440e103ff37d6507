"""Losses on sequences. Token losses are the losses on logits under a token mask."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax


def rnnt_three_way(
  student: ArrayLike, teacher: ArrayLike, labels: ArrayLike, *, blank: int = 0
) -> jax.Array:
  """KL over (next label, blank, all others) at each node of the transducer's lattice.

  Node (t, u) has emitted u labels; its next label is labels[u]. At u = U there is none, and all but
  the blank are the others. Padded nodes belong to `reduce.mean(values, where)`: t and u beyond an
  utterance's lengths; the labels there must still be valid classes (any but the blank).

  Args:
    student: logits [B, T, U + 1, V].
    teacher: logits of the same shape.
    labels: integers [B, U], none of them the blank.
    blank: class of the blank.

  Returns:
    Nats per node, [B, T, U + 1]; NaN where the next label is no class or is the blank. The paper
    sums the nodes.

  Raises:
    ValueError: shapes differ, labels are not integers [B, U], or blank is outside [0, V).

  Compares: label, blank and all others at each lattice node
  Shapes: [B, T, U+1, V], labels [B, U] -> [B, T, U+1]
  Use: RNN-transducers for speech: 3 instead of V stored values per node of a cached teacher
  Weight: to be tuned against the transducer loss
  Source: Panchapagesan et al. 2021, arXiv:2011.06110

  >>> z = jnp.zeros((1, 1, 2, 4))
  >>> rnnt_three_way(z, z, jnp.array([[2]]))
  Array([[[0., 0.]]], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=4)
  _softmax.check_classes(student)
  batch, _, nodes, classes = student.shape
  labels = _checks.integers("labels", labels, (batch, nodes - 1))
  if not 0 <= blank < classes:
    raise ValueError(f"blank: expected a class in [0, {classes}), got {blank}")
  invalid = (labels < 0) | (labels >= classes) | (labels == blank)
  labels = jnp.pad(jnp.where(invalid, blank, labels), ((0, 0), (0, 1)), constant_values=blank)
  log_q, log_p = (_three(z, labels, blank) for z in (student, teacher))
  values = _softmax.divergence(log_p, log_q)
  return jnp.where(jnp.pad(invalid, ((0, 0), (0, 1)))[:, None], jnp.nan, values)


def _three(z: jax.Array, labels: jax.Array, blank: int) -> jax.Array:
  """Returns log-probabilities [B, T, U + 1, 3] of label, blank, others; the blank is no label."""
  z = _softmax.centered(z)
  vocabulary = jnp.arange(z.shape[-1]).reshape(1, 1, 1, -1)
  labels = labels[:, None, :, None]
  rest = _softmax.log_sum(jnp.where((vocabulary == labels) | (vocabulary == blank), -jnp.inf, z))
  indices = jnp.broadcast_to(labels, (*z.shape[:-1], 1))
  label = jnp.where(labels == blank, -jnp.inf, jnp.take_along_axis(z, indices, -1))
  return _softmax.log_softmax(jnp.concatenate([label, z[..., blank, None], rest[..., None]], -1))
