"""A problem for the `linear_*` losses, and the same losses from logits, for test_linear.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses

DENSE = {
  "kl": losses.kl_divergence,
  "reverse_kl": losses.reverse_kl,
  "jensen_shannon": functools.partial(losses.jensen_shannon, teacher_weight=0.1),
  "skew_kl": functools.partial(losses.skew_kl, alpha=0.2),
  "skew_reverse_kl": functools.partial(losses.skew_reverse_kl, alpha=0.2),
}
MIX = {
  "jensen_shannon": {"teacher_weight": 0.1},
  "skew_kl": {"alpha": 0.2},
  "skew_reverse_kl": {"alpha": 0.2},
}
TAILS = {
  "bucket": losses.sparse_kl,
  "conditional": losses.sparse_kl_conditional,
  "sampled": losses.sampled_cross_entropy,
}
KINDS = (*DENSE, *TAILS, "labels")
BY_CLASSES = 1
BY_TOKENS = 2**26
CAPS = 4.0, 5.0  # softcaps of student and teacher


def problem(classes, tokens=7, width=5, dtype=np.float64, temperature=2.0):
  """Student, floating constants and integers, for all kinds.

  The student is (hidden, kernel, bias). The constants' gradients are zero by contract.
  """
  rng = np.random.default_rng(0)
  mask = np.arange(classes) % 7 != 3

  def side(width):
    shapes = (tokens, width), (width, classes), (classes,)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)

  student, teacher = side(width), side(4)
  constants = {
    "teacher": teacher,
    "weights": rng.random(tokens).astype(dtype),
    "label_weights": (rng.random(tokens) > 0.3).astype(dtype),
    "temperature": dtype(temperature) if dtype != jnp.bfloat16 else np.float32(temperature),
  }
  integers = {"mask": mask, "labels": rng.choice(np.flatnonzero(mask), size=tokens)}
  with jax.enable_x64(True):
    targets = jax.tree.map(np.asarray, _targets(temperature)(teacher, mask))
  float_dtype = jnp.promote_types(dtype, np.float32)
  constants["targets"] = {
    kind: (x.log_probs.astype(float_dtype), x.log_tail.astype(float_dtype))
    for kind, x in targets.items()
  }
  integers["indices"] = {kind: x.indices for kind, x in targets.items()}
  return student, constants, integers


@functools.cache
def _targets(temperature):
  """Top-k and random targets of a teacher, compiled."""

  def targets(teacher, mask):
    z = logits(*teacher, CAPS[1], mask)
    sampled = losses.sample_k(jax.random.key(0), z, 40, temperature=temperature)
    return {"top": losses.top_k(z, 40, temperature=temperature), "sampled": sampled}

  return jax.jit(targets)


def logits(hidden, kernel, bias, cap, mask):
  hidden, kernel, bias = (
    x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (hidden, kernel, bias)
  )
  z = jnp.matmul(hidden, kernel, precision="highest") + bias
  return jnp.where(mask, cap * jnp.tanh(z / cap), -jnp.inf)


def sparse_targets(kind, temperature, constants, integers):
  name = "sampled" if kind == "sampled" else "top"
  log_probs, log_tail = constants["targets"][name]
  indices = integers["indices"][name]
  return losses.SparseTargets(indices, log_probs, log_tail, temperature, kind == "sampled")


def fused(kind, temperature, memory, student, constants, integers):
  """`(value, (divergence, cross entropy))` from hidden states: bias, caps, mask, weights, labels.

  A temperature other than 1 is traced, except in targets.
  """
  hidden, kernel, bias = student
  head = kernel, bias, CAPS[0]
  options = {"class_mask": integers["mask"], "memory": memory}
  labels, label_weights = integers["labels"], constants["label_weights"]
  if kind == "labels":
    value = losses.linear_cross_entropy(hidden, head, labels, weights=label_weights, **options)
    return value, (jnp.zeros(()), value)
  options |= {"labels": labels, "label_weights": label_weights, "weights": constants["weights"]}
  if kind in TAILS:
    targets = sparse_targets(kind, temperature, constants, integers)
    return losses.linear_sparse_kl(hidden, head, targets, tail=kind, **options)
  t_hidden, t_kernel, t_bias = constants["teacher"]
  options["temperature"] = 1.0 if temperature == 1 else constants["temperature"]
  return losses.linear_kl(
    hidden,
    head,
    t_hidden,
    (t_kernel, t_bias, CAPS[1]),
    divergence=kind,
    **MIX.get(kind, {}),
    **options,
  )


def unfused(kind, temperature, student, constants, integers):
  """The same value from the losses on logits."""
  z = logits(*student, CAPS[0], integers["mask"])
  divergence = jnp.zeros(())
  if kind in DENSE:
    t = logits(*constants["teacher"], CAPS[1], integers["mask"])
    divergence = constants["weights"] @ DENSE[kind](z, t, temperature=temperature)
  elif kind in TAILS:
    targets = sparse_targets(kind, temperature, constants, integers)
    divergence = constants["weights"] @ TAILS[kind](z, targets)
  log_q = jnp.take_along_axis(jax.nn.log_softmax(z), integers["labels"][:, None], 1)[:, 0]
  cross_entropy = -constants["label_weights"] @ log_q
  return divergence + cross_entropy, (divergence, cross_entropy)


@functools.cache
def compiled(kind, temperature, memory):
  """`problem -> ((value, parts), (student's gradients, constants' gradients))`, compiled once."""
  f = functools.partial(fused, kind, temperature, memory)
  return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))


@functools.cache
def compiled_unfused(kinds, temperature):
  """The same by kind, from logits and for the student's gradients only: one program."""

  def all_kinds(*args):
    graded = (
      jax.value_and_grad(functools.partial(unfused, k, temperature), has_aux=True) for k in kinds
    )
    return {kind: f(*args) for kind, f in zip(kinds, graded)}

  return jax.jit(all_kinds)
