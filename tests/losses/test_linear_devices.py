"""Losses from hidden states on eight devices: tokens spread over `data`, the vocabulary over `tensor`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses

TOKENS, CLASSES = 16, 640
BY_CLASSES, BY_TOKENS = 1, 2**26

pytestmark = pytest.mark.usefixtures("parts_by_tokens_too")


@pytest.fixture(scope="module")
def grid():
  return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def arrays(rng):
  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "student": {"hidden": draw(TOKENS, 5), "kernel": draw(5, CLASSES), "bias": draw(CLASSES)},
    "teacher": {"hidden": draw(TOKENS, 4), "kernel": draw(4, CLASSES)},
    "mask": rng.random(CLASSES) > 0.1,
    "labels": rng.integers(0, CLASSES, TOKENS),
    "weights": rng.random(TOKENS).astype(np.float32),
    "targets": losses.top_k(draw(TOKENS, CLASSES), 6, temperature=2.0),
  }


SPECS = {
  "student": {"hidden": P("data"), "kernel": P(None, "tensor"), "bias": P("tensor")},
  "teacher": {"hidden": P("data"), "kernel": P(None, "tensor")},
  "mask": P("tensor"),
  "labels": P("data"),
  "weights": P("data"),
  "targets": P("data"),
}
TOKENS_ALONE = jax.tree.map(
  lambda spec: spec if spec == P("data") else P(), SPECS, is_leaf=lambda x: isinstance(x, P)
)


def loss(kind, student, rest, **options):
  options |= {
    "weights": rest["weights"],
    "labels": rest["labels"],
    "label_weights": rest["weights"] / 2,
  }
  options["class_mask"] = rest["mask"]
  own = student["hidden"], student["kernel"]
  if kind == "bucket":
    return losses.linear_sparse_kl(*own, rest["targets"], bias=student["bias"], **options)[0]
  other = rest["teacher"]["hidden"], rest["teacher"]["kernel"]
  options |= {"divergence": kind, "student_bias": student["bias"], "temperature": 2.0}
  return losses.linear_kl(*own, *other, **options)[0]


def alone(kind, arrays):
  return jax.jit(jax.value_and_grad(functools.partial(loss, kind)))(arrays["student"], arrays)


def check(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jensen_shannon", "bucket"])
def test_a_vocabulary_spread_over_devices(kind, arrays, grid):
  @jax.jit
  @functools.partial(jax.shard_map, mesh=grid, in_specs=(SPECS["student"], SPECS), out_specs=P())
  def total(student, rest):
    return jax.lax.psum(loss(kind, student, rest, axis_name="tensor", memory=BY_CLASSES), "data")

  check(jax.jit(jax.value_and_grad(total))(arrays["student"], arrays), alone(kind, arrays))


def test_the_gradient_may_be_taken_inside(arrays, grid):
  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=grid, in_specs=(SPECS["student"], SPECS), out_specs=(P(), SPECS["student"])
  )
  def graded(student, rest):
    value, gradients = jax.value_and_grad(functools.partial(loss, "kl"))(
      student, rest, axis_name="tensor"
    )
    return jax.lax.psum(value, "data"), gradients

  check(graded(arrays["student"], arrays), alone("kl", arrays))


@pytest.mark.parametrize("memory", [BY_CLASSES, BY_TOKENS])
@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_spread_over_devices(memory, check_vma, arrays, mesh):
  """Local gradients and their sum where nothing is checked; with check_vma the kernel's come summed."""

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(TOKENS_ALONE["student"], TOKENS_ALONE),
    out_specs=(P(), TOKENS_ALONE["student"]),
    check_vma=check_vma,
  )
  def graded(student, rest):
    value, gradients = jax.value_and_grad(functools.partial(loss, "kl"))(
      student, rest, memory=memory
    )
    if not check_vma:
      gradients |= {name: jax.lax.psum(gradients[name], "data") for name in ("kernel", "bias")}
    return jax.lax.psum(value, "data"), gradients

  check(graded(arrays["student"], arrays), alone("kl", arrays))


@pytest.mark.parametrize("memory", [BY_CLASSES, 4 * (8 * (640 + 2 * 256) + 2 * 16 * 5)])
def test_under_jit_tokens_stay_on_their_device(memory, arrays, mesh, monkeypatch):
  monkeypatch.setattr("distill_jax.losses.linear.LEAST_TOKENS", 8)  # two chunks of tokens
  placed = jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    arrays,
    jax.tree.map(
      lambda spec, x: jax.tree.map(lambda _: spec, x),
      TOKENS_ALONE,
      arrays,
      is_leaf=lambda x: isinstance(x, P),
    ),
  )
  step = jax.jit(jax.value_and_grad(functools.partial(loss, "bucket", memory=memory)))
  compiled = step.lower(placed["student"], placed).compile()
  check(compiled(placed["student"], placed), alone("bucket", arrays))
  text = compiled.as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def test_an_axis_that_the_kernel_is_not_spread_over_is_refused(arrays, grid):
  for specs, check_vma in ((TOKENS_ALONE, True), (SPECS, False)):
    run = jax.shard_map(
      functools.partial(loss, "kl", axis_name="tensor"),
      mesh=grid,
      in_specs=(specs["student"], specs),
      out_specs=P(),
      check_vma=check_vma,
    )
    with pytest.raises(ValueError, match="axis_name='tensor'.*check_vma=True"):
      run(arrays["student"], arrays)


def test_a_vocabulary_that_does_not_divide_is_refused(arrays, grid):
  odd = {**arrays["student"], "kernel": np.ones((5, CLASSES + 1), np.float32)}
  run = jax.shard_map(
    functools.partial(loss, "kl", axis_name="tensor"),
    mesh=grid,
    in_specs=(SPECS["student"], SPECS),
    out_specs=P(),
  )
  with pytest.raises(ValueError, match="641"):
    run(odd, arrays)


def test_more_classes_kept_than_all_devices_have(arrays, grid):
  kept = losses.SparseTargets(
    jnp.zeros((TOKENS, 641), int), jnp.zeros((TOKENS, 641)), jnp.zeros(TOKENS)
  )
  run = jax.shard_map(
    functools.partial(loss, "bucket", axis_name="tensor"),
    mesh=grid,
    in_specs=(SPECS["student"], SPECS),
    out_specs=P(),
  )
  with pytest.raises(ValueError, match="keep 641 classes, more than the student's 640"):
    run(arrays["student"], {**arrays, "targets": kept})
