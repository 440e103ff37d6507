"""Losses of heads with a large vocabulary, from hidden states: no logits [tokens, vocabulary].

Each returns one scalar, the weighted sum of the token losses, equal to that of the losses on logits
up to float32 rounding, and has gradients for the student's hidden states, kernel and bias; all
other arguments are constants.

`memory` chooses the order of the work:

- By classes: some classes at a time, once forward for the sums of exponentials and once backward
  for the gradients. Temporaries take a few tens of megabytes, for a third more work than the
  unfused loss (divergences to a mixture read the vocabulary three times).
- By tokens: the logits of some tokens at a time, with their gradients on the way forward. As much
  work as the unfused loss, but each chunk reads and writes the kernel's gradient once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks
from distill_jax.losses._checks import Scalar
from distill_jax.losses._fused import plan
from distill_jax.losses._fused.arguments import HeadLike, num_classes, prepare, side
from distill_jax.losses._fused.by_classes import by_classes
from distill_jax.losses._fused.by_tokens import by_tokens
from distill_jax.losses._fused.heads import Rows, Shared
from distill_jax.losses._fused.token_values import DIVERGENCES, TAILS
from distill_jax.losses.targets import SparseTargets

LinearLoss = jax.Array | tuple[jax.Array, tuple[jax.Array, jax.Array]]
"""A scalar; with labels `(scalar, (divergence, cross entropy))`."""


def linear_kl(
  student_hidden: ArrayLike,
  student_head: HeadLike,
  teacher_hidden: ArrayLike,
  teacher_head: HeadLike,
  *,
  weights: ArrayLike | None = None,
  divergence: str = "kl",
  temperature: Scalar = 1.0,
  teacher_weight: Scalar = 0.5,
  alpha: Scalar = 0.1,
  class_mask: ArrayLike | None = None,
  labels: ArrayLike | None = None,
  label_weights: ArrayLike | None = None,
  axis_name: str | None = None,
  memory: int | None = None,
) -> LinearLoss:
  """A divergence from a live teacher, computed from hidden states: `kl_divergence`, fused.

  A head is its kernel, or (kernel, bias, softcap) as in a model's outputs; bias and softcap may be
  None. Logits are cap(hidden @ kernel + bias), cap(z) = c tanh(z / c) with a softcap c. Arrays in
  bfloat16 are multiplied in bfloat16, as in a model's head, and summed in float32.

  Args:
    student_hidden: hidden states [T, H].
    student_head: kernel [H, V], or (kernel, bias [V] or None, softcap > 0 or None).
    teacher_hidden: hidden states [T, G]; a constant, like the teacher's head.
    teacher_head: kernel [G, V], or (kernel, bias, softcap).
    weights: weights of the tokens, [T], numbers or bools; None: 1 / T each. Tokens of weight 0 may
      be NaN.
    divergence: 'kl', 'reverse_kl', 'jensen_shannon', 'skew_kl' or 'skew_reverse_kl', as the losses
      of these names.
    temperature: T > 0, may be traced; the divergence is multiplied by T^2.
    teacher_weight: weight of the teacher in jensen_shannon, in (0, 1), may be traced.
    alpha: skew of skew_kl and skew_reverse_kl, in [0, 1), may be traced.
    class_mask: classes that exist, bool [V] (a padded vocabulary); None: all.
    labels: classes [T]; adds the cross entropy with them, at temperature 1, from the same logits.
    label_weights: weights of the tokens in the cross entropy, [T]; None: 1 / T each.
    axis_name: mesh axis of `shard_map` (with check_vma) that the vocabulary is sharded over:
      kernels, biases and class_mask are this device's classes; hidden states are the same along it.
      None: not sharded.
    memory: bytes that temporaries may take, roughly; None: 64 MiB. The loss is computed by tokens
      where that suffices for it and axis_name is None, else by classes, 128 at least. CPUs also
      widen a full kernel in bfloat16, and so does a product with hidden states that are wider.

  Returns:
    Nats, a scalar; with labels `(scalar, (divergence, cross entropy))`, the sum and its parts
    (constants, to log).

  Raises:
    ValueError: shapes that do not fit, an option outside its range, labels outside the vocabulary
      (NaN under jit), or an axis_name that the kernel is not sharded over.

  Compares: class probabilities, without logits
  Shapes: [T, H], [H, V], [T, G], [G, V] -> scalar
  Use: language models with a live teacher; V from about 8,000
  Weight: as kl_divergence
  Source: Hsu et al. 2024, arXiv:2410.10989 (Liger), by classes and with any divergence

  >>> h, w = jnp.ones((3, 2)), jnp.array([[0., 1.], [0., 0.]])
  >>> linear_kl(h, w, h, w)
  Array(0., dtype=float32)
  """
  if divergence not in DIVERGENCES:
    raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
  hidden, head = side("student_", student_hidden, student_head)
  other_hidden, other_head = side("teacher_", teacher_hidden, teacher_head)
  if len(other_hidden) != len(hidden):
    raise ValueError(
      f"teacher_hidden: expected as many tokens as student_hidden {hidden.shape}, got "
      f"{other_hidden.shape}"
    )
  if other_head.kernel.shape[1] != head.kernel.shape[1]:
    raise ValueError(
      f"teacher_head: expected as many classes as student_head's kernel {head.kernel.shape}, got "
      f"{other_head.kernel.shape}"
    )
  mix = _mix(divergence, teacher_weight, alpha)
  rows = Rows(hidden, other_hidden, labels=labels, weights=weights, label_weights=label_weights)
  shared = Shared(head, other_head, class_mask, temperature, mix)
  return _loss(divergence, rows, shared, axis_name, memory)


def linear_sparse_kl(
  student_hidden: ArrayLike,
  student_head: HeadLike,
  targets: SparseTargets,
  *,
  weights: ArrayLike | None = None,
  tail: str = "bucket",
  class_mask: ArrayLike | None = None,
  labels: ArrayLike | None = None,
  label_weights: ArrayLike | None = None,
  axis_name: str | None = None,
  memory: int | None = None,
) -> LinearLoss:
  """A divergence from a teacher stored as K of V classes, from hidden states: `sparse_kl`, fused.

  Args:
    student_hidden: hidden states [T, H].
    student_head: kernel [H, V], or (kernel, bias [V] or None, softcap > 0 or None), as in
      `linear_kl`.
    targets: from `top_k`, or from `sample_k` for tail 'sampled'; indices [T, K] are of the full
      vocabulary. The temperature is theirs. Constants.
    weights: weights of the tokens, [T], numbers or bools; None: 1 / T each. Tokens of weight 0 may
      be NaN.
    tail: treatment of the other classes. 'bucket': one class on both sides (`sparse_kl`);
      'conditional': left out on both sides (`sparse_kl_conditional`); 'sampled': none, the targets
      are random samples (`sampled_cross_entropy`).
    class_mask: classes that exist, bool [V] (a padded vocabulary); None: all.
    labels: classes [T]; adds the cross entropy with them, at temperature 1, from the same logits.
    label_weights: weights of the tokens in the cross entropy, [T]; None: 1 / T each.
    axis_name: mesh axis that the vocabulary is sharded over, as in `linear_kl`.
    memory: bytes that temporaries may take, as in `linear_kl`.

  Returns:
    Nats, a scalar; with labels `(scalar, (divergence, cross entropy))`, the sum and its parts
    (constants, to log).

  Raises:
    ValueError: shapes that do not fit, K > V unless sampled, a tail that does not fit the targets,
      an option outside its range, indices or labels outside the vocabulary (NaN under jit), or an
      axis_name that the kernel is not sharded over.

  Compares: class probabilities of stored targets, without logits
  Shapes: [T, H], [H, V], targets [T, K] -> scalar
  Use: language models with a cached teacher
  Weight: as kl_divergence
  Source: as sparse_kl and sampled_cross_entropy

  >>> h, w = jnp.ones((3, 2)), jnp.array([[0., 1., 5.], [0., 0., 1.]])
  >>> abs(linear_sparse_kl(h, w, top_k(h @ w, 2))).round(6)
  Array(0., dtype=float32)
  """
  _check_tail(tail, targets.sampled)
  hidden, head = side("student_", student_hidden, student_head)
  log_probs = jnp.asarray(targets.log_probs)
  log_tail = jnp.asarray(targets.log_tail)
  tokens, k = len(hidden), jnp.shape(log_probs)[-1]
  if log_probs.shape != (tokens, k) or log_tail.shape != (tokens,):
    raise ValueError(
      f"targets: expected log_probs [T, K] and log_tail [T] for student_hidden [T, H] "
      f"{hidden.shape}, got {log_probs.shape} and {log_tail.shape}"
    )
  indices = _checks.integers("indices", targets.indices, (tokens, k))
  classes = num_classes(head.kernel, axis_name)
  if k > classes and tail != "sampled":
    raise ValueError(f"targets: expected at most the student's {classes} classes, got {k}")
  rows = Rows(hidden, None, indices, log_probs, log_tail, labels, weights, label_weights)
  shared = Shared(head, class_mask=class_mask, temperature=targets.temperature)
  return _loss(tail, rows, shared, axis_name, memory)


def linear_cross_entropy(
  hidden: ArrayLike,
  head: HeadLike,
  labels: ArrayLike,
  *,
  weights: ArrayLike | None = None,
  class_mask: ArrayLike | None = None,
  axis_name: str | None = None,
  memory: int | None = None,
) -> jax.Array:
  """-log softmax(logits) at the labels, from hidden states.

  Args:
    hidden: hidden states [T, H].
    head: kernel [H, V], or (kernel, bias [V] or None, softcap > 0 or None), as in `linear_kl`.
    labels: classes [T], integers.
    weights: weights of the tokens, [T], numbers or bools; None: 1 / T each. Tokens of weight 0 may
      be NaN and have any label.
    class_mask: classes that exist, bool [V] (a padded vocabulary); None: all.
    axis_name: mesh axis that the vocabulary is sharded over, as in `linear_kl`.
    memory: bytes that temporaries may take, as in `linear_kl`.

  Returns:
    Nats, a scalar.

  Raises:
    ValueError: shapes that do not fit, an option outside its range, labels outside the vocabulary
      (NaN under jit), or an axis_name that the kernel is not sharded over.

  Compares: class probabilities with labels, without logits
  Shapes: [T, H], [H, V], [T] -> scalar
  Use: language models trained without a teacher, or a teacher
  Weight: 1
  Source: Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy); Hsu et al. 2024,
    arXiv:2410.10989

  >>> linear_cross_entropy(jnp.ones((3, 2)), jnp.zeros((2, 4)), jnp.array([0, 1, 3])).round(4)
  Array(1.3863, dtype=float32)
  """
  hidden, head = side("", hidden, head)
  rows = Rows(hidden, labels=labels, label_weights=weights)
  return _value(None, rows, Shared(head, class_mask=class_mask), axis_name, memory)[0]


def _loss(
  divergence: str, rows: Rows, shared: Shared, axis_name: str | None, memory: int | None
) -> LinearLoss:
  """Returns the loss; with labels also its parts."""
  loss, parts = _value(divergence, rows, shared, axis_name, memory)
  return loss if rows.labels is None else (loss, jax.lax.stop_gradient(parts))


def _value(
  divergence: str | None, rows: Rows, shared: Shared, axis_name: str | None, memory: int | None
) -> tuple[jax.Array, Any]:
  rows, shared, unit_temperature = prepare(divergence, rows, shared, axis_name)
  chosen = plan.choose(divergence, rows, shared, unit_temperature, axis_name, memory)
  compute = by_classes if chosen.tokens is None else by_tokens
  return compute(chosen, rows, shared)


def _check_tail(tail: str, sampled: bool | None) -> None:
  """Raises where there is no such tail, or where it is not for such targets."""
  if tail not in TAILS:
    raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {tail!r}")
  if sampled and tail != "sampled":
    raise ValueError(f"tail: expected 'sampled' for random samples (sample_k), got {tail!r}")
  if sampled is False and tail == "sampled":
    raise ValueError(f"tail: expected 'bucket' or 'conditional' for top_k targets, got {tail!r}")


def _mix(divergence: str, teacher_weight: Scalar, alpha: Scalar) -> Scalar:
  """Returns the weight of the divergence's mixture, checked."""
  dtype = jnp.result_type(float)
  if divergence == "jensen_shannon":
    return _checks.number(
      "teacher_weight", teacher_weight, dtype, low=0, high=1, open_low=True, open_high=True
    )
  return _checks.number("alpha", alpha, dtype, low=0, high=1, open_high=True)
