"""Losses from hidden states equal the losses on logits: values, gradients, options, modes."""

import functools

import jax
import jax.numpy as jnp
import linear_problem
import numpy as np
import pytest
from linear_problem import (
  BY_CLASSES,
  BY_TOKENS,
  DENSE,
  KINDS,
  MIX,
  TAILS,
  compiled,
  compiled_unfused,
  fused,
)
from scipy import special

from distill_jax import losses

CLASSES = 300  # two parts of 128 classes and a remainder of 44
MODES = pytest.mark.parametrize("memory", [BY_CLASSES, BY_TOKENS], ids=["classes", "tokens"])
FIRST = {("kl", "classes"), ("kl", "tokens"), ("bucket", "classes"), ("jensen_shannon", "tokens")}
UNIT_TEMPERATURE = ("kl", "bucket", "conditional", "sampled")

pytestmark = pytest.mark.usefixtures("small_parts")


@functools.cache
def problem(**options):
  return linear_problem.problem(CLASSES, **options)


def edited(**entries):
  """The float64 problem with entries of its constants or integers replaced."""
  student, constants, integers = problem()
  student = entries.pop("student", student)
  return (
    student,
    {name: entries.get(name, x) for name, x in constants.items()},
    {name: entries.get(name, x) for name, x in integers.items()},
  )


def is_float(x):
  return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def as_dtype(dtype, tree):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype) if is_float(x) else x, tree)


def check_equals_unfused(kind, temperature, memory, kinds):
  with jax.enable_x64(True):
    p = problem(temperature=temperature)
    total, (gradients, constants) = compiled(kind, temperature, memory)(*p)
    expected = compiled_unfused(kinds, temperature)(*p)[kind]
    for a, b in zip(jax.tree.leaves((total, gradients)), jax.tree.leaves(expected), strict=True):
      assert a.dtype == b.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(constants))


# `.ci/run` has all of them, compiled as users compile.
@pytest.mark.parametrize(
  ("kind", "memory"),
  [
    pytest.param(
      kind,
      memory,
      id=f"{kind}-{name}",
      marks=() if (kind, name) in FIRST else pytest.mark.nightly,
    )
    for kind in KINDS
    for name, memory in (("classes", BY_CLASSES), ("tokens", BY_TOKENS))
  ],
)
def test_value_and_gradients_are_those_of_logits(kind, memory):
  check_equals_unfused(kind, 2.0, memory, KINDS)


@pytest.mark.parametrize("kind", UNIT_TEMPERATURE)
def test_temperature_one_shares_the_normalizer(kind):
  check_equals_unfused(kind, 1.0, BY_CLASSES, UNIT_TEMPERATURE)


WIDE = [("kl", "teacher"), ("kl", "kernel"), ("kl", "hidden"), ("bucket", "teacher")]


@MODES
@pytest.mark.parametrize("kind, wide", WIDE)
def test_inputs_of_several_precisions(kind, wide, memory):
  with jax.enable_x64(True):
    (hidden, kernel, bias), constants, integers = as_dtype(np.float32, problem())
    exact = as_dtype(np.float64, ((hidden, kernel, bias), constants))
    if wide == "teacher":
      constants = {**constants, **{name: exact[1][name] for name in ("teacher", "targets")}}
    hidden = exact[0][0] if wide == "hidden" else hidden
    kernel = exact[0][1] if wide == "kernel" else kernel
    student = hidden, kernel, bias
    (value, _), (gradients, _) = compiled(kind, 2.0, memory)(student, constants, integers)
    (total, _), expected = compiled_unfused(KINDS, 2.0)(*exact, integers)[kind]
  np.testing.assert_allclose(value, total, rtol=1e-5)
  for x, a, b in zip(student, gradients, expected, strict=True):
    assert a.dtype == x.dtype
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


LOW = ("kl", "jensen_shannon", "bucket")


@pytest.mark.parametrize(
  "kind, memory",
  [
    ("kl", BY_CLASSES),
    ("kl", BY_TOKENS),
    ("jensen_shannon", BY_CLASSES),
    ("bucket", BY_TOKENS),
  ],
)
def test_bfloat16_is_added_up_in_float32(kind, memory):
  (hidden, kernel, bias), *rest = problem(tokens=64, width=32, dtype=jnp.bfloat16, temperature=1.0)
  p = ((hidden, kernel / kernel.dtype.type(4), bias), *rest)
  (value, _), (gradients, _) = compiled(kind, 1.0, memory)(*p)
  (exact, _), expected = compiled_unfused(LOW, 1.0)(*as_dtype(np.float32, p))[kind]
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  for a, b in zip(gradients, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
    assert error < 2**-7, error


@MODES
def test_gradient_at_large_logits(memory, rng):
  student = np.where(rng.random((4, CLASSES)) < 0.5, -80, 80) + rng.normal(size=(4, CLASSES))
  teacher = student + 0.1 * rng.normal(size=student.shape)
  kernels = np.float32([student, teacher])
  expected = np.subtract(*special.softmax(np.float64(kernels), axis=-1)) / 4
  hidden = np.eye(4, dtype=np.float32)

  def loss(kernel):
    return losses.linear_kl(hidden, kernel, hidden, kernels[1], memory=memory)

  np.testing.assert_allclose(jax.jit(jax.grad(loss))(kernels[0]), expected, atol=1e-8)


FINITE = [kind for kind in DENSE if kind != "reverse_kl"]
SUPPORT = 4  # classes that the teacher holds possible


def impossible_problem(classes=256):
  """A student that believes in a class outside the teacher's support, in the second part."""
  hidden = np.eye(2, dtype=np.float32)
  kernel = np.zeros((2, classes), np.float32)
  kernel[:, 250] = 9.0
  bias = np.where(np.arange(classes) < SUPPORT, 0, -np.inf).astype(np.float32)
  log_probs = np.log(np.full((2, SUPPORT), 0.25, np.float32))
  indices = np.arange(SUPPORT)[None].repeat(2, 0)
  targets = losses.SparseTargets(indices, log_probs, np.full(2, -20.0, np.float32))
  return hidden, kernel, bias, targets


@functools.cache
def impossible_unfused():
  _, kernel, bias, _ = impossible_problem()

  def total(z):
    return sum(DENSE[kind](z, bias[None].repeat(2, 0)).mean() for kind in FINITE)

  return jax.jit(jax.value_and_grad(total))(kernel)


@MODES
def test_probability_outside_the_support_is_reduced(memory):
  hidden, kernel, bias, targets = impossible_problem()

  def live(kernel, kind):
    teacher = (jnp.zeros_like(kernel), bias, None)
    options = {"divergence": kind, **MIX.get(kind, {}), "memory": memory}
    return losses.linear_kl(hidden, kernel, hidden, teacher, **options)

  @jax.jit
  def run(kernel):
    total = jax.value_and_grad(lambda w: sum(live(w, kind) for kind in FINITE))(kernel)
    top = jax.grad(lambda w: losses.linear_sparse_kl(hidden, w, targets, memory=memory))(kernel)
    return total, top, live(kernel, "reverse_kl")

  (value, gradient), top, reverse = run(kernel)
  np.testing.assert_allclose(value, impossible_unfused()[0], rtol=1e-5)
  np.testing.assert_allclose(gradient, impossible_unfused()[1], rtol=1e-5, atol=1e-6)
  assert (top[:, 250] > 0.1).all()
  assert np.isinf(reverse)


@pytest.mark.parametrize("kind", ["kl", "bucket"])
def test_chunks_of_tokens_and_a_short_last_one(kind):
  tokens = 599
  sides, copies = (2, 4) if kind == "kl" else (1, 2)
  memory = 4 * (300 * (sides * CLASSES + copies * 256) + 2 * tokens * 3)  # for 300 tokens
  p = problem(tokens=tokens, width=3, dtype=np.float32)
  (value, _), (gradients, _) = compiled(kind, 2.0, memory)(*p)
  (exact, _), expected = compiled_unfused((kind,), 2.0)(*p)[kind]
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  for a, b in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
  without_gradient, _ = jax.jit(functools.partial(fused, kind, 2.0, memory))(*p)
  np.testing.assert_allclose(without_gradient, value, rtol=1e-6)


@MODES
@pytest.mark.parametrize("kind", ["kl", "bucket", "labels"])
def test_tokens_of_weight_zero_may_be_nan(kind, memory):
  (hidden, *head), constants, integers = problem()
  on = np.isin(np.arange(7), [2, 3], invert=True)
  weights = {name: constants[name] * on for name in ("weights", "label_weights")}
  t_hidden, *t_head = constants["teacher"]
  log_probs, log_tail = constants["targets"]["top"]
  dirty_targets = np.where(on[:, None], log_probs, np.nan), np.where(on, log_tail, np.nan)
  with jax.enable_x64(True):
    clean = compiled(kind, 2.0, memory)(*edited(**weights))
    dirty = compiled(kind, 2.0, memory)(
      *edited(
        student=(np.where(on[:, None], hidden, np.nan), *head),
        teacher=(np.where(on[:, None], t_hidden, np.nan), *t_head),
        targets={**constants["targets"], "top": dirty_targets},
        labels=np.where(on, integers["labels"], -100),
        **weights,
      )
    )
  for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
    np.testing.assert_array_equal(a, b)


@MODES
def test_all_tokens_masked_is_zero(memory):
  with jax.enable_x64(True):
    p = edited(weights=np.zeros(7), label_weights=np.zeros(7))
    (value, _), (gradients, _) = compiled("kl", 2.0, memory)(*p)
  assert float(value) == 0 and all((np.asarray(g) == 0).all() for g in gradients)


def test_weights_may_be_bool():
  hidden, head = np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)
  where = np.array([True, False])
  run = functools.partial(losses.linear_cross_entropy, labels=np.array([0, 9]), weights=where)
  assert jax.jit(run)(hidden, head) == pytest.approx(np.log(5))


@MODES
def test_classes_outside_the_vocabulary_are_nan_in_jit(memory):
  _, _, integers = problem()
  labels = np.where(np.arange(7) == 5, -1, integers["labels"])
  impossible = np.where(np.arange(7) == 5, 3, integers["labels"])  # class 3 does not exist
  indices = {name: x.copy() for name, x in integers["indices"].items()}
  indices["top"][4, 1] = CLASSES
  ones = {name: np.ones(7) for name in ("weights", "label_weights")}
  with jax.enable_x64(True):
    for kind, entry in [
      ("labels", {"labels": labels}),
      ("labels", {"labels": impossible}),
      ("bucket", {"indices": indices}),
    ]:
      (value, _), _ = compiled(kind, 2.0, memory)(*edited(**entry, **ones))
      assert np.isnan(value), (kind, entry)


def test_classes_outside_the_vocabulary_raise():
  (hidden, kernel, _), _, integers = problem(dtype=np.float32)
  labels = np.where(np.arange(7) == 5, -1, integers["labels"])
  with pytest.raises(ValueError, match="labels.*row 5"):
    losses.linear_cross_entropy(hidden, kernel, labels)
  indices = integers["indices"]["top"].copy()
  indices[4, 1] = CLASSES
  targets = losses.SparseTargets(indices, np.zeros((7, 40), np.float32), np.zeros(7, np.float32))
  with pytest.raises(ValueError, match="indices.*row 4"):
    losses.linear_sparse_kl(hidden, kernel, targets)


def ones(*shapes):
  return [np.ones(shape, np.float32) for shape in shapes]


def top(tokens, classes, k=2):
  """Targets without a computation."""
  indices = np.zeros((tokens, k), int)
  return losses.SparseTargets(indices, *ones((tokens, k), tokens), sampled=False)


KL, SPARSE, LABELS = losses.linear_kl, losses.linear_sparse_kl, losses.linear_cross_entropy
FOUR = ones((2, 3), (3, 5), (2, 4), (4, 5))
TWO = FOUR[:2]
INVALID = [
  (KL, ones((2, 3), (4, 5), (2, 4), (4, 5)), {}, "student_head"),
  (KL, ones((2, 3), (3, 5), (2, 4), (3, 5)), {}, "teacher_head"),
  (KL, ones((2, 3), (3, 5), (1, 4), (4, 5)), {}, "teacher_hidden"),
  (KL, ones((2, 3), (3, 5), (2, 4), (4, 6)), {}, "teacher_head"),
  (KL, ones((0, 3), (3, 5), (0, 4), (4, 5)), {}, "student_hidden"),
  (KL, FOUR, {"divergence": "js"}, "divergence"),
  (KL, (*TWO, FOUR[2], (FOUR[3], *ones(4), None)), {}, "teacher_head"),
  (KL, (*TWO, FOUR[2], (FOUR[3], None, 0)), {}, "teacher_head"),
  (KL, (*TWO, FOUR[2], (FOUR[3], None)), {}, "teacher_head"),
  (KL, FOUR, {"temperature": 0}, "temperature"),
  (KL, FOUR, {"alpha": 1.0}, "alpha"),
  (KL, FOUR, {"divergence": "jensen_shannon", "teacher_weight": 0}, "teacher_weight"),
  (KL, FOUR, {"weights": np.ones(3)}, "weights"),
  (KL, FOUR, {"labels": np.ones(2)}, "labels"),
  (KL, FOUR, {"labels": np.ones(3, int)}, "labels"),
  (KL, FOUR, {"labels": np.ones(2, int), "label_weights": np.ones(1)}, "label_weights"),
  (KL, FOUR, {"class_mask": np.ones(4, bool)}, "class_mask"),
  (KL, FOUR, {"class_mask": np.ones(5)}, "class_mask"),
  (KL, FOUR, {"memory": 0}, "memory"),
  (KL, FOUR, {"axis_name": "tensor"}, "axis_name.*check_vma=True"),
  (LABELS, (*np.ones((2, 3, 3), int), np.ones(3, int)), {}, "hidden"),
  (SPARSE, (*TWO, top(2, 6, k=6)), {}, "targets"),
  (SPARSE, (*TWO, top(3, 5)), {}, "targets"),
  (SPARSE, (*TWO, top(2, 5)), {"tail": "none"}, "tail"),
  (SPARSE, (*TWO, top(2, 5)), {"tail": "sampled"}, "tail"),
]


@pytest.mark.parametrize("loss, args, options, field", INVALID)
def test_invalid_arguments_raise(loss, args, options, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    loss(*args, **options)


def test_random_samples_need_their_tail():
  targets = losses.SparseTargets(*[np.zeros((2, 2), int), *ones((2, 2), 2)], sampled=True)
  for tail in set(TAILS) - {"sampled"}:
    with pytest.raises(ValueError, match="^tail"):
      losses.linear_sparse_kl(*TWO, targets, tail=tail)
