"""Losses that never hold the logits are the losses on logits: values, gradients, options, modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

CLASSES = 300  # two chunks of 128 classes and a remainder of 44
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
FINITE = [
  kind for kind in DENSE if kind != "reverse_kl"
]  # where the teacher holds a class impossible
BY_CLASSES, BY_TOKENS = 1, 2**26
MODES = pytest.mark.parametrize("memory", [BY_CLASSES, BY_TOKENS], ids=["classes", "tokens"])

pytestmark = pytest.mark.usefixtures("parts_by_tokens_too")


def problem(tokens=7, width=5, dtype=np.float64, seed=0):
  rng = np.random.default_rng(seed)
  cap = 4.0
  mask = np.arange(CLASSES) % 7 != 3
  teacher_bias = rng.normal(size=CLASSES)
  return {
    "student": [
      x.astype(dtype)
      for x in (rng.normal(size=s) for s in ((tokens, width), (width, CLASSES), CLASSES))
    ],
    "teacher": [
      x.astype(dtype)
      for x in (rng.normal(size=(tokens, 4)), rng.normal(size=(4, CLASSES)), teacher_bias)
    ],
    "caps": (cap, 5.0),
    "mask": mask,
    "labels": rng.choice(np.flatnonzero(mask), size=tokens),
    "weights": rng.random(tokens).astype(dtype),
    "label_weights": (rng.random(tokens) > 0.3).astype(dtype),
  }


def logits(hidden, kernel, bias, cap, mask):
  hidden, kernel, bias = (
    x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (hidden, kernel, bias)
  )
  z = jnp.matmul(hidden, kernel, precision="highest") + bias
  return jnp.where(mask, cap * jnp.tanh(z / cap), -jnp.inf)


def targets(tail, z, temperature):
  if tail == "sampled":
    return losses.sample_k(jax.random.key(0), z, 40, temperature=temperature)
  return losses.top_k(z, 40, temperature=temperature)


def fused(kind, temperature, memory, student, p):
  """Everything at once: bias, caps, mask, weights, temperature, labels."""
  hidden, kernel, bias = student
  options = {name: p[name] for name in ("weights", "labels", "label_weights")}
  options |= {"class_mask": p["mask"], "memory": memory}
  if kind in DENSE:
    t_hidden, t_kernel, t_bias = p["teacher"]
    options |= MIX.get(kind, {}) | dict(zip(("student_softcap", "teacher_softcap"), p["caps"]))
    biases = {"student_bias": bias, "teacher_bias": t_bias, "temperature": temperature}
    return losses.linear_kl(
      hidden, kernel, t_hidden, t_kernel, divergence=kind, **biases, **options
    )
  if kind in TAILS:
    kept = targets(kind, logits(*p["teacher"], p["caps"][1], p["mask"]), temperature)
    return losses.linear_sparse_kl(
      hidden, kernel, kept, tail=kind, bias=bias, softcap=p["caps"][0], **options
    )
  options |= {"weights": options.pop("label_weights"), "bias": bias, "softcap": p["caps"][0]}
  value = losses.linear_cross_entropy(hidden, kernel, options.pop("labels"), **options)
  return value, (jnp.zeros(()), value)


def unfused(kind, temperature, student, p):
  """From the losses on logits."""
  z = logits(*student, p["caps"][0], p["mask"])
  t = logits(*p["teacher"], p["caps"][1], p["mask"])
  divergence = jnp.zeros(())
  if kind in DENSE:
    divergence = p["weights"] @ DENSE[kind](z, t, temperature=temperature)
  elif kind in TAILS:
    divergence = p["weights"] @ TAILS[kind](z, targets(kind, t, temperature))
  log_q = jnp.take_along_axis(jax.nn.log_softmax(z), p["labels"][:, None], 1)[:, 0]
  cross_entropy = -p["label_weights"] @ log_q
  return divergence + cross_entropy, (divergence, cross_entropy)


def graded(f, p):
  """(value, parts) and the gradients for the student's arrays; compiled."""
  return jax.jit(jax.value_and_grad(f, has_aux=True))(p["student"], p)


def both(kind, temperature, memory, p):
  """Of the fused and of the unfused loss."""
  own = graded(functools.partial(fused, kind, temperature, memory), p)
  return own, graded(functools.partial(unfused, kind, temperature), p)


ALL = [
  (kind, 2.0, memory) for kind in [*DENSE, *TAILS, "labels"] for memory in (BY_CLASSES, BY_TOKENS)
]
ONE_TEMPERATURE = [(kind, 1.0, BY_CLASSES) for kind in ("kl", "bucket", "conditional", "sampled")]


@pytest.mark.parametrize("kind, temperature, memory", ALL + ONE_TEMPERATURE)
def test_value_and_gradients_are_those_of_the_loss_on_logits(kind, temperature, memory):
  with jax.enable_x64(True):
    got, expected = both(kind, temperature, memory, problem())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert a.dtype == b.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@MODES
@pytest.mark.parametrize("kind", ["kl", "bucket", "labels"])
@pytest.mark.parametrize("wide", ["teacher", "kernel", "hidden"])
def test_inputs_of_several_precisions(kind, wide, memory):
  with jax.enable_x64(True):
    p = problem(dtype=np.float32)
    chosen = {
      "teacher": ("teacher", slice(None)),
      "kernel": ("student", slice(1, 2)),
      "hidden": ("student", slice(1)),
    }
    side, place = chosen[wide]
    p[side][place] = [x.astype(np.float64) for x in p[side][place]]
    (value, _), gradients = graded(functools.partial(fused, kind, 2.0, memory), p)
    exact = jax.tree.map(
      lambda x: x.astype(np.float64) if np.asarray(x).dtype == np.float32 else x, p
    )
    (expected, _), known = graded(functools.partial(unfused, kind, 2.0), exact)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for own, a, b in zip(p["student"], gradients, known, strict=True):
      assert a.dtype == own.dtype
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@MODES
@pytest.mark.parametrize("kind", ["kl", "jensen_shannon", "bucket"])
def test_bfloat16_is_added_up_in_float32(kind, memory):
  p = problem(tokens=64, width=32, dtype=jnp.bfloat16)
  p["student"][1] = p["student"][1] / 4
  (value, _), gradients = graded(functools.partial(fused, kind, 1.0, memory), p)
  wide = jax.tree.map(
    lambda x: x.astype(np.float32) if np.asarray(x).dtype == jnp.bfloat16 else x, p
  )
  (exact, _), expected = graded(functools.partial(unfused, kind, 1.0), wide)
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  for a, b in zip(gradients, expected):
    assert a.dtype == jnp.bfloat16
    error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
    assert error < 2**-7, error


@MODES
def test_mass_off_the_teachers_support_is_pushed_back(memory):
  """The student believes in a class that the teacher never kept, or holds impossible."""
  hidden, kernel = np.eye(2, dtype=np.float32), np.zeros((2, CLASSES), np.float32)
  kernel[:, 250] = 9.0
  kept = losses.top_k(np.linspace(0, -40, CLASSES, dtype=np.float32)[None].repeat(2, 0), 4)
  impossible = np.where(np.arange(CLASSES) < 4, 0, -np.inf).astype(np.float32)
  gradient = jax.grad(lambda w: losses.linear_sparse_kl(hidden, w, kept, memory=memory))(kernel)
  assert (gradient[:, 250] > 0.1).all()

  teacher = impossible[None].repeat(2, 0)

  def total(kernel):
    options = {"teacher_bias": impossible, "memory": memory}
    return sum(
      losses.linear_kl(
        hidden,
        kernel,
        hidden,
        jnp.zeros_like(kernel),
        divergence=kind,
        **MIX.get(kind, {}),
        **options,
      )
      for kind in FINITE
    )

  got = jax.jit(jax.value_and_grad(total))(kernel)
  expected = jax.jit(
    jax.value_and_grad(lambda z: sum(DENSE[kind](z, teacher).mean() for kind in FINITE))
  )(kernel)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-6)
  infinite = {"divergence": "reverse_kl", "teacher_bias": impossible, "memory": memory}
  assert np.isinf(losses.linear_kl(hidden, kernel, hidden, 0 * kernel, **infinite))


@pytest.mark.parametrize("tokens", [600, 599])
@pytest.mark.parametrize(
  "kind, held", [("kl", 2 * CLASSES + 4 * 256), ("bucket", CLASSES + 2 * 256)]
)
def test_chunks_of_tokens_and_a_short_last_one(kind, held, tokens):
  p = problem(tokens, width=3, dtype=np.float32)
  memory = 4 * (300 * held + 2 * tokens * 3)  # for 300 tokens
  got, expected = both(kind, 2.0, memory, p)
  np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
  for a, b in zip(got[1], expected[1]):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
  value, _ = jax.jit(functools.partial(fused, kind, 2.0, memory))(
    p["student"], p
  )  # no gradient asked
  np.testing.assert_allclose(value, got[0][0], rtol=1e-6)


@MODES
@pytest.mark.parametrize("kind", ["kl", "bucket", "labels"])
def test_tokens_of_weight_zero_may_hold_anything(kind, memory):
  p = problem(dtype=np.float32)
  p["weights"][2:4] = p["label_weights"][2:4] = 0
  clean = graded(functools.partial(fused, kind, 2.0, memory), p)
  for hidden in (p["student"][0], p["teacher"][0]):
    hidden[2:4] = np.nan
  p["labels"][2:4] = -100
  dirty = graded(functools.partial(fused, kind, 2.0, memory), p)
  for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
    np.testing.assert_array_equal(a, b)


@MODES
def test_all_tokens_masked_is_zero(memory):
  p = problem(dtype=np.float32)
  p["weights"], p["label_weights"] = np.zeros((2, 7), bool)
  (value, _), gradients = graded(functools.partial(fused, "kl", 1.0, memory), p)
  assert value == 0 and all((g == 0).all() for g in gradients)


@MODES
def test_the_teacher_and_the_weights_get_no_gradient(memory):
  p = problem(dtype=np.float32)

  def loss(t_hidden, t_kernel, weights, temperature):
    hidden, kernel, _ = p["student"]
    options = {"weights": weights, "temperature": temperature, "memory": memory}
    return losses.linear_kl(
      hidden, kernel, t_hidden, t_kernel, divergence="jensen_shannon", **options
    )

  for gradient in jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*p["teacher"][:2], p["weights"], 2.0):
    assert (gradient == 0).all()


def test_labels_and_indices_outside_the_vocabulary():
  p = problem(dtype=np.float32)
  hidden, kernel, _ = p["student"]
  kept = losses.top_k(np.ones((7, CLASSES), np.float32), 3)
  wrong = losses.SparseTargets(kept.indices.at[4, 1].set(CLASSES), kept.log_probs, kept.log_tail)
  labels = np.where(np.arange(7) == 5, -1, p["labels"])
  with pytest.raises(ValueError, match=r"labels must be in \[0, 299\], got -1 in row 5"):
    losses.linear_cross_entropy(hidden, kernel, labels)
  with pytest.raises(ValueError, match=r"indices must be in \[0, 299\], got 300 in row 4"):
    losses.linear_sparse_kl(hidden, kernel, wrong)
  for memory in (BY_CLASSES, BY_TOKENS):
    assert np.isnan(
      jax.jit(losses.linear_cross_entropy, static_argnames="memory")(
        hidden, kernel, labels, memory=memory
      )
    )
    assert np.isnan(
      jax.jit(losses.linear_sparse_kl, static_argnames="memory")(
        hidden, kernel, wrong, memory=memory
      )
    )
  masked = {"class_mask": np.arange(CLASSES) != p["labels"][0]}
  assert np.isnan(losses.linear_cross_entropy(hidden, kernel, p["labels"], **masked))


def arrays(*shapes):
  return [np.ones(shape, np.float32) for shape in shapes]


KL, SPARSE, LABELS = losses.linear_kl, losses.linear_sparse_kl, losses.linear_cross_entropy
FOUR = arrays((2, 3), (3, 5), (2, 4), (4, 5))


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: KL(*arrays((2, 3), (4, 5), (2, 4), (4, 5))),
      r"student_hidden \(2, 3\) does not fit student_kernel \(4, 5\)",
    ),
    (
      lambda: KL(*arrays((2, 3), (3, 5), (2, 4), (3, 5))),
      r"teacher_hidden \(2, 4\) does not fit teacher_kernel",
    ),
    (lambda: KL(*arrays((2, 3), (3, 5), (1, 4), (4, 5))), "as many tokens"),
    (
      lambda: KL(*arrays((2, 3), (3, 5), (2, 4), (4, 6))),
      r"\(3, 5\) and teacher_kernel \(4, 6\).*as many classes",
    ),
    (lambda: KL(*arrays((0, 3), (3, 5), (0, 4), (4, 5))), r"student_hidden \(0, 3\)"),
    (lambda: KL(*FOUR, divergence="js"), "divergence must be one of kl, .*'js'"),
    (lambda: KL(*FOUR, student_bias=np.ones(4, np.float32)), r"student_bias \(4,\)"),
    (lambda: KL(*FOUR, student_softcap=0), "student_softcap"),
    (lambda: KL(*FOUR, temperature=0), "temperature"),
    (lambda: KL(*FOUR, weights=np.ones(3)), r"weights \(3,\).*\(2,\)"),
    (lambda: KL(*FOUR, labels=np.ones(2)), "labels must be integers"),
    (lambda: KL(*FOUR, labels=np.ones(3, int)), r"labels \(3,\)"),
    (lambda: KL(*FOUR, labels=np.ones(2, int), label_weights=np.ones(1)), "label_weights"),
    (lambda: KL(*FOUR, class_mask=np.ones(4, bool)), r"class_mask \(4,\)"),
    (lambda: KL(*FOUR, class_mask=np.ones(5)), "class_mask must be bool"),
    (lambda: KL(*FOUR, memory=0), "memory"),
    (lambda: KL(*FOUR, axis_name="tensor"), "axis_name='tensor'.*check_vma=True"),
    (lambda: LABELS(*np.ones((2, 3, 3), int), np.ones(3, int)), "hidden must be floating-point"),
    (
      lambda: SPARSE(*FOUR[:2], losses.top_k(np.ones((2, 6)), 6)),
      "keep 6 classes, more than the student's 5",
    ),
    (
      lambda: SPARSE(*FOUR[:2], losses.top_k(np.ones((3, 5)), 2)),
      r"\(2, 3\) does not fit log_probs \(3, 2\)",
    ),
    (
      lambda: SPARSE(*FOUR[:2], losses.top_k(np.ones((2, 5)), 2), tail="none"),
      "tail must be one of bucket",
    ),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
