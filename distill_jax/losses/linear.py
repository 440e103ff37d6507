"""Losses of a head with a large vocabulary: hidden states and kernels in, never logits [tokens, vocabulary].

Each gives one scalar, the weighted sum of the token losses, equal to that of the losses on logits to float32 rounding,
and its gradients for the student's hidden states, kernel and bias; whatever else goes in is a constant.

`memory` decides how. By classes: the vocabulary some classes at a time, once for the sums of exponentials and once
more, backward, for the gradients; temporaries of a few tens of megabytes for a third more work (divergences to a
mixture read the vocabulary three times). By tokens: the logits of some tokens at a time, held until their gradients are
known, on the way forward; as much work as the unfused loss, but the kernel's gradient is read and written once a chunk.
"""

import operator

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks
from distill_jax.losses._fused.by_classes import by_classes
from distill_jax.losses._fused.by_tokens import by_tokens
from distill_jax.losses._fused.heads import Plan, Rows, Shared
from distill_jax.losses._fused.prepared import prepare, side, vocabulary
from distill_jax.losses._fused.token_values import DIVERGENCES, TAILS
from distill_jax.losses.sparse import SparseTargets

MEMORY = 2**26  # bytes
LEAST_TOKENS = 256  # by tokens: each chunk reads and writes an array of the kernel's size
LEAST_CLASSES = 128  # by classes: the lanes of a TPU
PART = 2048  # classes by tokens: what is computed of so many stays in the processor's cache


def linear_kl(
  student_hidden,
  student_kernel,
  teacher_hidden,
  teacher_kernel,
  *,
  weights=None,
  divergence: str = "kl",
  temperature=1.0,
  teacher_weight=0.5,
  alpha=0.1,
  student_bias=None,
  teacher_bias=None,
  student_softcap=None,
  teacher_softcap=None,
  class_mask=None,
  labels=None,
  label_weights=None,
  axis_name: str | None = None,
  memory: int | None = None,
):
  """A divergence between a student's and a live teacher's tokens, from hidden states: `kl_divergence`, fused.

  Logits are cap(hidden @ kernel + bias), cap(z) = c tanh(z / c) with a soft-cap c. Arrays in bfloat16 are multiplied
  in bfloat16, as a model's head is, and added up in float32.

  Args:
    student_hidden: [T, H].
    student_kernel: [H, V].
    teacher_hidden: [T, G]; a constant, like all of the teacher's.
    teacher_kernel: [G, V].
    weights: of the tokens, [T], numbers or bools; None: 1 / T each. What has weight 0 may be NaN.
    divergence: 'kl', 'reverse_kl', 'jensen_shannon', 'skew_kl' or 'skew_reverse_kl', as the losses of these names.
    temperature: T > 0, may be traced; the divergence is multiplied by T^2.
    teacher_weight: of jensen_shannon, in (0, 1), may be traced.
    alpha: of the skewed ones, in [0, 1), may be traced.
    student_bias: [V] or None.
    teacher_bias: [V] or None.
    student_softcap: > 0, or None for none.
    teacher_softcap: > 0, or None for none.
    class_mask: classes that exist, bool [V] (a padded vocabulary).
    labels: classes [T]; adds the cross entropy with them, at temperature 1, from the same logits.
    label_weights: of the tokens in that term, [T]; None: 1 / T each.
    axis_name: the mesh axis of `shard_map` (with check_vma) that the vocabulary is spread over: kernels, biases and
      class_mask hold this device's classes; hidden states are the same along it.
    memory: bytes that temporaries may take, roughly; None: 64 MiB. By tokens where that suffices for it and axis_name
      is None, else by classes, 128 at least. CPUs widen a whole kernel in bfloat16 besides, and so does a product with
      hidden states that are wider.

  Returns:
    Nats, a scalar; with labels `(scalar, (divergence, cross entropy))`, the sum and its parts (constants, to log).

  Raises:
    ValueError: shapes that do not fit, an option outside its range, labels outside the vocabulary (NaN under jit), or
      an axis_name that the kernel is not spread over.

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
    raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
  student = side("student_", student_hidden, student_kernel, student_bias, student_softcap)
  teacher = side("teacher_", teacher_hidden, teacher_kernel, teacher_bias, teacher_softcap)
  if len(teacher[0]) != len(student[0]):
    raise ValueError(
      f"student_hidden {student[0].shape} and teacher_hidden {teacher[0].shape} must have as many tokens"
    )
  if teacher[1].kernel.shape[1] != student[1].kernel.shape[1]:
    raise ValueError(
      f"student_kernel {student[1].kernel.shape} and teacher_kernel {teacher[1].kernel.shape} must have as many classes"
    )
  share = _mix(divergence, teacher_weight, alpha)
  rows = Rows(student[0], teacher[0], labels=labels, weights=weights, label_weights=label_weights)
  shared = Shared(student[1], teacher[1], class_mask, temperature, share)
  return _loss(divergence, rows, shared, axis_name, memory)


def linear_sparse_kl(
  student_hidden,
  student_kernel,
  targets: SparseTargets,
  *,
  weights=None,
  tail: str = "bucket",
  bias=None,
  softcap=None,
  class_mask=None,
  labels=None,
  label_weights=None,
  axis_name: str | None = None,
  memory: int | None = None,
):
  """A divergence from a teacher kept as K of V classes, from hidden states: `sparse_kl`, fused.

  Args:
    student_hidden: [T, H].
    student_kernel: [H, V].
    targets: of `top_k`, or of `sample_k` for tail 'sampled'; indices [T, K] are of the whole vocabulary. The
      temperature is theirs. Constants.
    weights: of the tokens, [T], numbers or bools; None: 1 / T each. What has weight 0 may be NaN.
    tail: the mass that was left out is 'bucket', one class more on both sides (`sparse_kl`); 'conditional', gone from
      both sides (`sparse_kl_conditional`); 'sampled', none, since the targets are draws (`sampled_cross_entropy`).
    bias: [V] or None.
    softcap: > 0, or None for none.
    class_mask: classes that exist, bool [V] (a padded vocabulary).
    labels: classes [T]; adds the cross entropy with them, at temperature 1, from the same logits.
    label_weights: of the tokens in that term, [T]; None: 1 / T each.
    axis_name: the mesh axis that the vocabulary is spread over, as in `linear_kl`.
    memory: bytes that temporaries may take, as in `linear_kl`.

  Returns:
    Nats, a scalar; with labels `(scalar, (divergence, cross entropy))`, the sum and its parts (constants, to log).

  Raises:
    ValueError: shapes that do not fit, K > V unless sampled, a tail that is not for such targets, an option outside
      its range, indices or labels outside the vocabulary (NaN under jit), or an axis_name that the kernel is not spread
      over.

  Compares: class probabilities of stored targets, without logits
  Shapes: [T, H], [H, V], targets [T, K] -> scalar
  Use: language models with a cached teacher
  Weight: as kl_divergence
  Source: as sparse_kl and sampled_cross_entropy

  >>> h, w = jnp.ones((3, 2)), jnp.array([[0., 1., 5.], [0., 0., 1.]])
  >>> abs(linear_sparse_kl(h, w, top_k(h @ w, 2))).round(6)
  Array(0., dtype=float32)
  """
  if tail not in TAILS:
    raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
  if targets.drawn is not None and targets.drawn != (tail == "sampled"):
    kind, fit = (
      ("draws (sample_k)", "'sampled'")
      if targets.drawn
      else ("the most probable classes (top_k)", "'bucket' or 'conditional'")
    )
    raise ValueError(f"tail: the targets are {kind}: expected {fit}, got {tail!r}")
  student = side("student_", student_hidden, student_kernel, bias, softcap)
  tokens, k = len(student[0]), jnp.shape(targets.log_probs)[-1]
  if jnp.shape(targets.log_probs) != (tokens, k) or jnp.shape(targets.log_tail) != (tokens,):
    raise ValueError(
      f"student_hidden {student[0].shape} does not fit log_probs {jnp.shape(targets.log_probs)} and log_tail "
      f"{jnp.shape(targets.log_tail)}: expected [T, H], [T, K] and [T]"
    )
  indices = _checks.integers("indices", targets.indices, (tokens, k))
  classes = vocabulary(student[1].kernel, axis_name)
  if k > classes and tail != "sampled":
    raise ValueError(f"targets keep {k} classes, more than the student's {classes}")
  parts = indices, jnp.asarray(targets.log_probs), jnp.asarray(targets.log_tail)
  rows = Rows(student[0], None, *parts, labels, weights, label_weights)
  shared = Shared(student[1], class_mask=class_mask, temperature=targets.temperature)
  return _loss(tail, rows, shared, axis_name, memory)


def linear_cross_entropy(
  hidden,
  kernel,
  labels,
  *,
  weights=None,
  bias=None,
  softcap=None,
  class_mask=None,
  axis_name: str | None = None,
  memory: int | None = None,
):
  """-log softmax(logits) at the labels, from hidden states.

  Args:
    hidden: [T, H].
    kernel: [H, V].
    labels: classes [T], integers.
    weights: of the tokens, [T], numbers or bools; None: 1 / T each. What has weight 0 may be NaN, its label anything.
    bias: [V] or None.
    softcap: > 0, or None for none.
    class_mask: classes that exist, bool [V] (a padded vocabulary).
    axis_name: the mesh axis that the vocabulary is spread over, as in `linear_kl`.
    memory: bytes that temporaries may take, as in `linear_kl`.

  Returns:
    Nats, a scalar.

  Raises:
    ValueError: shapes that do not fit, an option outside its range, labels outside the vocabulary (NaN under jit), or
      an axis_name that the kernel is not spread over.

  Compares: class probabilities with labels, without logits
  Shapes: [T, H], [H, V], [T] -> scalar
  Use: language models trained alone, or a teacher
  Weight: 1
  Source: Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy); Hsu et al. 2024, arXiv:2410.10989

  >>> linear_cross_entropy(jnp.ones((3, 2)), jnp.zeros((2, 4)), jnp.array([0, 1, 3])).round(4)
  Array(1.3863, dtype=float32)
  """
  student = side("", hidden, kernel, bias, softcap)
  rows = Rows(student[0], labels=labels, label_weights=weights)
  return _loss(None, rows, Shared(student[1], class_mask=class_mask), axis_name, memory)[0]


def _loss(
  divergence: str | None, rows: Rows, shared: Shared, axis_name: str | None, memory: int | None
):
  rows, shared, one_temperature = prepare(divergence, rows, shared, axis_name)
  classes, tokens = _choose(divergence, rows, shared, axis_name, memory)
  plan = Plan(divergence, classes, tokens, axis_name, one_temperature)
  loss, parts = (by_classes if tokens is None else by_tokens)(plan, rows, shared)
  return loss if rows.labels is None else (loss, jax.lax.stop_gradient(parts))


def _choose(
  divergence: str | None, rows: Rows, shared: Shared, axis_name: str | None, memory: int | None
) -> tuple[int, int | None]:
  """How many classes, and tokens, at a time; None: all tokens, none of whose logits are held."""
  memory = MEMORY if memory is None else operator.index(memory)
  if memory <= 0:
    raise ValueError(f"memory must be a number of bytes > 0, got {memory}")
  (tokens, _), kernel, number = rows.student.shape, shared.student.kernel, rows.weights.dtype
  classes, copies = kernel.shape[1], _copies(divergence)
  sides, held = (
    1 if rows.teacher is None else 2,
    2 * rows.student.size,
  )  # its gradient, in chunks and in order
  # Of another dtype, the kernel's gradient is not added up in its place, and TPUs make room for the logits twice.
  if kernel.dtype != number:
    sides, held = 2 * sides, held + kernel.size
  # The last part, smaller than the others, shares no memory with them.
  at_once = (memory // number.itemsize - held) // (
    sides * classes + copies * min(2 * PART, classes)
  )
  if axis_name is None and at_once >= min(tokens, LEAST_TOKENS):
    return min(PART, classes), _even(tokens, at_once)
  at_once = max(memory // (copies * number.itemsize * tokens), LEAST_CLASSES)
  size = _even(classes, at_once) if at_once < classes else classes
  return min(-(-size // LEAST_CLASSES) * LEAST_CLASSES, classes), None


def _copies(divergence: str | None) -> int:
  """How many arrays of the logits of some classes XLA holds at once (on CPUs, as compiled)."""
  if divergence in ("kl", "reverse_kl"):
    return 4
  return 10 if divergence in DIVERGENCES else 2


def _even(total: int, most: int) -> int:
  """The size of the fewest equal parts of at most `most`, the last one perhaps smaller."""
  return -(-total // -(-total // most))


def _mix(divergence: str, teacher_weight, alpha):
  dtype = jnp.result_type(float)
  if divergence == "jensen_shannon":
    return _checks.number(
      "teacher_weight", teacher_weight, dtype, low=0, high=1, open_low=True, open_high=True
    )
  return _checks.number("alpha", alpha, dtype, low=0, high=1, open_high=True)
