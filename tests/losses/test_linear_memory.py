"""Memory and matrix products of the losses of linear.py: compiled, or traced, never run."""

import math

import jax
import jax.numpy as jnp
import pytest

from distill_jax import losses

TOKENS, WIDTH, CLASSES, TOP = 4096, 512, 131_072, 64
MIB = 2**20


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


HIDDEN, KERNEL = shaped(TOKENS, WIDTH), shaped(WIDTH, CLASSES)
TARGETS = losses.SparseTargets(
  shaped(TOKENS, TOP, dtype=jnp.int32), shaped(TOKENS, TOP), shaped(TOKENS)
)


def temporaries(loss, *arguments):
  """Returns MiB of temporaries for the value and both gradients of the student."""
  compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes / MIB


def multiply(hidden, kernel):
  return jnp.matmul(hidden, kernel, precision="highest")


@pytest.mark.parametrize("memory, ratio, most", [(None, 40, 80), (512 * MIB, 8, 512)])
def test_top_k_targets(memory, ratio, most):
  size = temporaries(
    lambda h, w, t: losses.linear_sparse_kl(h, w, t, memory=memory), HIDDEN, KERNEL, TARGETS
  )
  unfused = temporaries(
    lambda h, w, t: losses.sparse_kl(multiply(h, w), t).mean(), HIDDEN, KERNEL, TARGETS
  )
  assert size <= most and size <= unfused / ratio


@pytest.mark.parametrize(
  "tokens, classes, memory", [(2048, 4096, 32), (4096, 6143, 64), (8192, 32_000, 256)]
)
def test_temporaries_fit_the_budget(tokens, classes, memory):
  hidden, kernel = shaped(tokens, WIDTH), shaped(WIDTH, classes)

  def labeled(h, w, labels):
    return losses.linear_cross_entropy(h, w, labels, memory=memory * MIB)

  def live(h, w, g, u):
    return losses.linear_kl(h, w, g, u, memory=memory * MIB)

  assert temporaries(labeled, hidden, kernel, shaped(tokens, dtype=jnp.int32)) <= 1.1 * memory
  assert temporaries(live, hidden, kernel, hidden, kernel) <= 1.1 * memory


def test_budget_includes_the_hidden_states_gradient():
  def labeled(h, w, labels):
    return losses.linear_cross_entropy(h, w, labels, memory=80 * MIB)

  shapes = shaped(16_384, WIDTH), shaped(WIDTH, 2048), shaped(16_384, dtype=jnp.int32)
  assert temporaries(labeled, *shapes) <= 80


@pytest.mark.parametrize("divergence", ["kl", "jensen_shannon"])
def test_a_live_teacher(divergence):
  def fused(h, w, g, u):
    return losses.linear_kl(h, w, g, u, divergence=divergence)

  def unfused(h, w, g, u):
    return losses.kl_divergence(multiply(h, w), multiply(g, u)).mean()

  arguments = HIDDEN, KERNEL, HIDDEN, KERNEL
  size = temporaries(fused, *arguments)
  assert size <= 100 and size <= temporaries(unfused, *arguments) / 20


def products(jaxpr, times=1):
  """Yields the multiply-adds of a program's products, a loop's as often as it runs."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contract, _), _ = equation.params["dimension_numbers"]
      left, right = (x.aval.shape for x in equation.invars)
      yield times * math.prod(left) * math.prod(right) // math.prod(left[i] for i in contract)
    inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
    for part in jax.tree.leaves(list(equation.params.values())):
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        yield from products(part, inner)


LIGER = (
  shaped(8192, 4096, dtype=jnp.bfloat16),
  shaped(4096, 128_256, dtype=jnp.bfloat16),
  shaped(8192, dtype=jnp.int32),
)
DENSE = HIDDEN, KERNEL, HIDDEN, KERNEL


@pytest.mark.parametrize(
  "loss, arguments, memory, work",
  [  # Relative to the unfused loss: 3 products for the student's side and 1 for the teacher's.
    (losses.linear_cross_entropy, LIGER, None, 4 / 3),
    (losses.linear_cross_entropy, LIGER, 2**33, 1),
    (losses.linear_sparse_kl, (HIDDEN, KERNEL, TARGETS), None, 4 / 3),
    (losses.linear_kl, DENSE, None, 6 / 4),
    (losses.linear_kl, DENSE, 2**32, 1),
  ],
)
def test_number_of_matrix_products(loss, arguments, memory, work):
  step = jax.value_and_grad(lambda h, w, *rest: loss(h, w, *rest, memory=memory), (0, 1))
  total = sum(products(jax.make_jaxpr(step)(*arguments).jaxpr))
  (tokens, width), (_, classes) = arguments[0].shape, arguments[1].shape
  unfused = tokens * width * classes * (4 if loss is losses.linear_kl else 3)
  assert work == pytest.approx(total / unfused, rel=0.01)
