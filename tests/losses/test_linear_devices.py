"""Losses from hidden states on eight devices: tokens over `data`, the vocabulary over `tensor`."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses

TOKENS, CLASSES = 16, 640
BY_CLASSES, BY_TOKENS = 1, 2**26

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture(scope="module")
def grid():
  return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "student": {"hidden": normal(TOKENS, 5), "kernel": normal(5, CLASSES), "bias": normal(CLASSES)},
    "teacher": {"hidden": normal(TOKENS, 4), "kernel": normal(4, CLASSES)},
    "mask": rng.random(CLASSES) > 0.1,
    "labels": rng.integers(0, CLASSES, TOKENS),
    "weights": rng.random(TOKENS).astype(np.float32),
    "targets": losses.top_k(normal(TOKENS, CLASSES), 6, temperature=2.0),
  }


SPECS = {
  "student": {"hidden": P("data"), "kernel": P(None, "tensor"), "bias": P("tensor")},
  "teacher": {"hidden": P("data"), "kernel": P(None, "tensor")},
  "mask": P("tensor"),
  "labels": P("data"),
  "weights": P("data"),
  "targets": P("data"),
}
TOKEN_SPECS = jax.tree.map(
  lambda spec: spec if spec == P("data") else P(), SPECS, is_leaf=lambda x: isinstance(x, P)
)


def loss(kind, student, rest, **options):
  weights = rest["weights"]
  options |= {"weights": weights, "labels": rest["labels"], "label_weights": weights / 2}
  options["class_mask"] = rest["mask"]
  head = student["kernel"], student["bias"], None
  if kind == "bucket":
    return losses.linear_sparse_kl(student["hidden"], head, rest["targets"], **options)[0]
  teacher = rest["teacher"]
  options |= {"divergence": kind, "temperature": 2.0}
  return losses.linear_kl(student["hidden"], head, teacher["hidden"], teacher["kernel"], **options)[
    0
  ]


@pytest.fixture(scope="module")
def on_one_device(arrays):
  """`kind -> (value, gradients)`, each computed once."""

  @functools.cache
  def run(kind):
    step = jax.jit(jax.value_and_grad(functools.partial(loss, kind)))
    return step(arrays["student"], arrays)

  return run


def check(actual, expected):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jensen_shannon", "bucket"])
def test_vocabulary_over_devices(kind, arrays, on_one_device, grid):
  @functools.partial(jax.shard_map, mesh=grid, in_specs=(SPECS["student"], SPECS), out_specs=P())
  def total(student, rest):
    return jax.lax.psum(loss(kind, student, rest, axis_name="tensor", memory=BY_CLASSES), "data")

  check(jax.jit(jax.value_and_grad(total))(arrays["student"], arrays), on_one_device(kind))


def test_gradient_inside_shard_map(arrays, on_one_device, grid):
  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=grid, in_specs=(SPECS["student"], SPECS), out_specs=(P(), SPECS["student"])
  )
  def graded(student, rest):
    value, gradients = jax.value_and_grad(functools.partial(loss, "kl"))(
      student, rest, axis_name="tensor"
    )
    return jax.lax.psum(value, "data"), gradients

  check(graded(arrays["student"], arrays), on_one_device("kl"))


@pytest.mark.parametrize("memory", [BY_CLASSES, BY_TOKENS])
@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_over_devices(memory, check_vma, arrays, on_one_device, mesh):
  """Without check_vma the gradients are local; with it the kernel's are summed already."""

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(TOKEN_SPECS["student"], TOKEN_SPECS),
    out_specs=(P(), TOKEN_SPECS["student"]),
    check_vma=check_vma,
  )
  def graded(student, rest):
    value, gradients = jax.value_and_grad(functools.partial(loss, "kl"))(
      student, rest, memory=memory
    )
    if not check_vma:
      gradients |= {name: jax.lax.psum(gradients[name], "data") for name in ("kernel", "bias")}
    return jax.lax.psum(value, "data"), gradients

  check(graded(arrays["student"], arrays), on_one_device("kl"))


@pytest.mark.parametrize("memory", [BY_CLASSES, 4 * (8 * (640 + 2 * 256) + 2 * 16 * 5)])
def test_tokens_stay_on_their_device_under_jit(memory, arrays, on_one_device, mesh, monkeypatch):
  monkeypatch.setattr("distill_jax.losses.linear.plan.MIN_TOKENS", 8)  # two chunks of tokens
  placed = jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    arrays,
    jax.tree.map(
      lambda spec, x: jax.tree.map(lambda _: spec, x),
      TOKEN_SPECS,
      arrays,
      is_leaf=lambda x: isinstance(x, P),
    ),
  )
  step = jax.jit(jax.value_and_grad(functools.partial(loss, "bucket", memory=memory)))
  compiled = step.lower(placed["student"], placed).compile()
  check(compiled(placed["student"], placed), on_one_device("bucket"))
  text = compiled.as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def trace(kind, grid, arrays, specs=SPECS, check_vma=True):
  """Traces a loss with the vocabulary over `tensor`."""
  run = jax.shard_map(
    functools.partial(loss, kind, axis_name="tensor"),
    mesh=grid,
    in_specs=(specs["student"], specs),
    out_specs=P(),
    check_vma=check_vma,
  )
  jax.eval_shape(run, arrays["student"], arrays)


def test_axis_that_the_kernel_is_not_sharded_over_raises(arrays, grid):
  for specs, check_vma in ((TOKEN_SPECS, True), (SPECS, False)):
    with pytest.raises(ValueError, match="axis_name.*'tensor'.*check_vma=True"):
      trace("kl", grid, arrays, specs, check_vma)


def test_vocabulary_that_does_not_divide_raises(arrays, grid):
  student = {**arrays["student"], "kernel": np.ones((5, CLASSES + 1), np.float32)}
  with pytest.raises(ValueError, match="641"):
    trace("kl", grid, {**arrays, "student": student})


def test_more_target_classes_than_all_devices_have_raises(arrays, grid):
  shape = TOKENS, CLASSES + 1
  targets = losses.SparseTargets(
    np.zeros(shape, int), np.zeros(shape, np.float32), np.zeros(TOKENS, np.float32)
  )
  with pytest.raises(ValueError, match="targets.*640.*641"):
    trace("bucket", grid, {**arrays, "targets": targets})
