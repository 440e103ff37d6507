"""Losses that relate rows: masked rows have no effect, and 8 devices agree with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_cases import RELATIONAL

from distill_jax import compat, losses

# Uneven over 8 devices of 2 rows: some have both rows, some one, some none.
WHERE = np.array([1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0], bool)
DIRT = np.float32([np.nan, np.inf, -np.inf, np.nan])
EACH = pytest.mark.parametrize("case", RELATIONAL, ids=[case.id for case in RELATIONAL])
# All of these losses gather rows in one function, so that a few of them test the modes of jax that
# differ in gradients: a loop over rows, moments, statistics of classes, a diagonal.
MODES = [case for case in RELATIONAL if case.name in ("rkd_angle", "pearson", "dist", "info_nce")]
EACH_MODE = pytest.mark.parametrize("case", MODES, ids=[case.id for case in MODES])


def problem(case):
  """Returns a weight [4, 4], inputs and teacher of 16 rows; invalid rows of both are not finite."""
  rng = np.random.default_rng(0)
  x, weight, teacher = rng.normal(size=(16, 4)), rng.normal(size=(4, 4)), rng.normal(size=(16, 4))
  x, teacher = (np.where(WHERE[:, None], a, DIRT) for a in (x, teacher))
  return weight.astype(np.float32), x.astype(np.float32), teacher.astype(np.float32)


def loss_of(case, axis_name=None):
  def loss(weight, x, teacher, where):
    # NaN must not reach the weight's gradient through the product: a network's rows do not meet.
    student = jnp.matmul(jnp.where(where[:, None], x, 0), weight)
    return case(jnp.where(where[:, None], student, DIRT), teacher, where=where, axis_name=axis_name)

  return loss


@functools.cache
def compiled(case):
  return jax.jit(jax.value_and_grad(loss_of(case)))


@functools.cache
def expected(case):
  """Returns value and gradient of the valid rows only."""
  weight, x, teacher = problem(case)
  return jax.jit(jax.value_and_grad(lambda w, a, t: case(a @ w, t)))(
    weight, x[WHERE], teacher[WHERE]
  )


def assert_agrees(case, value, gradient):
  np.testing.assert_allclose(
    value, np.broadcast_to(expected(case)[0], np.shape(value)), rtol=2e-5, atol=2e-6
  )
  np.testing.assert_allclose(
    gradient, np.broadcast_to(expected(case)[1], np.shape(gradient)), rtol=2e-3, atol=2e-5
  )


@EACH
def test_masked_rows_have_no_effect(case):
  assert_agrees(case, *compiled(case)(*problem(case), WHERE))


@EACH
def test_without_valid_rows_value_and_gradient_are_zero(case):
  value, gradient = compiled(case)(*problem(case), np.zeros(16, bool))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def device_step(case):
  loss = loss_of(case, "data")

  def step(weight, *rows):
    value, gradient = jax.value_and_grad(loss)(weight, *rows)
    return value, jax.lax.pmean(gradient, "data")

  return step


def check_shard_map(case, mesh, check_vma):
  def varying(weight, *rows):
    value, gradient = device_step(case)(compat.pcast_varying(weight, "data"), *rows)
    return jax.lax.pmean(value, "data"), gradient

  row, everywhere = PartitionSpec("data"), PartitionSpec()
  mapped = jax.shard_map(
    varying,
    mesh=mesh,
    in_specs=(everywhere, row, row, row),
    out_specs=(everywhere, everywhere),
    check_vma=check_vma,
  )
  assert_agrees(case, *jax.jit(mapped)(*problem(case), WHERE))


@EACH
def test_shard_map_agrees_with_one_device(case, mesh):
  check_shard_map(case, mesh, check_vma=True)


@EACH_MODE
def test_sharded_rows_agree_with_one_device(case, mesh):
  weight, *rows = (*problem(case), WHERE)
  rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
  weight = jax.device_put(weight, NamedSharding(mesh, PartitionSpec()))
  assert_agrees(case, *compiled(case)(weight, *rows))


@EACH_MODE
def test_unchecked_shard_map_and_pmap_agree_with_one_device(case, mesh):
  check_shard_map(case, mesh, check_vma=False)
  weight, *rows = (*problem(case), WHERE)
  split = [x.reshape(8, 2, *x.shape[1:]) for x in rows]
  mapped = jax.pmap(device_step(case), "data", in_axes=(None, 0, 0, 0))
  assert_agrees(case, *mapped(weight, *split))


def test_masks_that_do_not_fit_raise():
  x = np.ones((3, 2), np.float32)
  for where in (np.ones(2, bool), np.ones(3), np.ones((3, 2), bool)):
    with pytest.raises(ValueError, match="^where"):
      losses.similarity_preserving(x, x, where=where)


@pytest.mark.parametrize(
  "case", [case for case in RELATIONAL if not case.ordered], ids=lambda case: case.id
)
def test_order_of_the_batch_has_no_effect(case):
  weight, *rows = (*problem(case), WHERE)
  order = np.random.default_rng(0).permutation(16)
  value, gradient = compiled(case)(weight, *(x[order] for x in rows))
  assert_agrees(case, value, gradient)


@pytest.mark.parametrize("check_vma", [True, False])
def test_states_agree_on_all_devices(mesh, check_vma):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 16, 4)).astype(np.float32)
  student[~WHERE] = np.nan
  indices = rng.permutation(20)[:16]
  negatives = rng.integers(0, 20, size=(16, 3))
  memory = losses.crd_state(jax.random.key(0), 20, 4)
  views = rng.normal(size=(2, 16, 4)).astype(np.float32)
  center = np.zeros(4, np.float32)

  def both(student, teacher, indices, negatives, views, where, memory, center, axis_name=None):
    options = {"where": where, "axis_name": axis_name}
    value, memory = losses.crd(student, teacher, indices, negatives, memory, **options)
    other, center = losses.dino(views, views, center, **options)
    return jnp.where(where, value, 0), other, memory, center

  rows = (student, teacher, indices, negatives, views, WHERE)
  one_device = jax.jit(both)(*rows, memory, center)
  row, everywhere = PartitionSpec("data"), PartitionSpec()
  views_spec = PartitionSpec(None, "data")
  mapped = jax.shard_map(
    functools.partial(both, axis_name="data"),
    mesh=mesh,
    in_specs=(row, row, row, row, views_spec, row, everywhere, everywhere),
    out_specs=(row, row, everywhere, everywhere),
    check_vma=check_vma,
  )
  results = jax.device_get(jax.jit(mapped)(*rows, memory, center))
  for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(one_device), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  memory = jax.device_get(memory)
  _, _, after, moved = results
  touched = np.isin(np.arange(20), indices[WHERE])
  np.testing.assert_array_equal(after.student[~touched], memory.student[~touched])
  unit = teacher[WHERE] / np.linalg.norm(teacher[WHERE], axis=1, keepdims=True)
  half = (unit + memory.teacher[indices[WHERE]]) / 2
  expected = half / np.linalg.norm(half, axis=1, keepdims=True)
  np.testing.assert_allclose(after.teacher[indices[WHERE]], expected, rtol=1e-5)
  np.testing.assert_allclose(moved, 0.1 * views[:, WHERE].mean((0, 1)), rtol=1e-5)
