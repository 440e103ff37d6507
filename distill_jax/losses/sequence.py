"""Losses on whole sequences. Token losses are the logit losses under a token mask."""

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks, _softmax


def rnnt_three_way(student, teacher, labels, *, blank=0) -> jax.Array:
  """KL over (next label, blank, all the rest) at each node of the transducer's lattice.

  Node (t, u) has emitted u labels; its next label is labels[u]. At u = U there is none, and all but the blank is
  the rest. Padded nodes belong to `reduce.mean(values, where)`: t and u beyond an utterance's lengths; the
  labels there must still be valid classes (any but the blank).

  Args:
    student: logits [B, T, U + 1, V].
    teacher: logits of the same shape.
    labels: integers [B, U], none of them the blank.
    blank: the blank's class.

  Returns:
    Nats per node, [B, T, U + 1]; NaN where the next label is no class or is the blank. The paper sums the nodes.

  Raises:
    ValueError: shapes differ, labels are not integers [B, U], or blank is outside [0, V).

  Compares: label, blank and rest at each lattice node
  Shapes: [B, T, U+1, V], labels [B, U] -> [B, T, U+1]
  Use: RNN-transducers for speech: memory 3 in place of V per node when the teacher is stored
  Weight: to be tuned beside the transducer loss
  Source: Panchapagesan et al. 2021, arXiv:2011.06110

  >>> z = jnp.zeros((1, 1, 2, 4))
  >>> rnnt_three_way(z, z, jnp.array([[2]]))
  Array([[[0., 0.]]], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=4)
  batch, _, nodes, classes = student.shape
  labels = _checks.integers("labels", labels, (batch, nodes - 1))
  if not 0 <= blank < classes:
    raise ValueError(f"blank must be in [0, {classes}), got {blank}")
  wrong = (labels < 0) | (labels >= classes) | (labels == blank)
  labels = jnp.pad(jnp.where(wrong, blank, labels), ((0, 0), (0, 1)), constant_values=blank)
  log_q, log_p = (_three(z, labels, blank) for z in (student, teacher))
  values = _softmax.divergence(log_p, log_q)
  return jnp.where(jnp.pad(wrong, ((0, 0), (0, 1)))[:, None], jnp.nan, values)


def _three(z, labels, blank):
  """Log-probabilities of label, blank and rest, [B, T, U + 1, 3]; a label that is the blank is none."""
  vocabulary, labels = jnp.arange(z.shape[-1]), labels[:, None, :, None]
  rest = _softmax.log_sum(jnp.where((vocabulary == labels) | (vocabulary == blank), -jnp.inf, z))
  places = jnp.broadcast_to(labels, (*z.shape[:-1], 1))
  label = jnp.where(labels == blank, -jnp.inf, jnp.take_along_axis(z, places, -1))
  return _softmax.log_softmax(jnp.concatenate([label, z[..., blank, None], rest[..., None]], -1))
