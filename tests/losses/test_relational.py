"""Losses that relate rows: invalid rows are nobody's neighbors, and 8 devices agree with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_cases import RELATIONAL

from distill_jax import losses

# Uneven over 8 devices of 2 rows: some have both rows, some one, some none.
WHERE = np.array([1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0], bool)
IDS = [case.id for case in RELATIONAL]


def problem(case):
  """Inputs of 16 rows, a weight [4, 4], the teacher; invalid rows of both sides are NaN."""
  rng = np.random.default_rng(0)
  x, weight, teacher = rng.normal(size=(16, 4)), rng.normal(size=(4, 4)), rng.normal(size=(16, 4))
  x, teacher = (np.where(WHERE[:, None], a, np.nan) for a in (x, teacher))
  return weight.astype(np.float32), x.astype(np.float32), teacher.astype(np.float32)


def loss_of(case, axis_name=None):
  def loss(weight, x, teacher, where):
    # Rows that are not valid are cut off before the product, as a network's rows do not meet.
    student = jnp.matmul(jnp.where(where[:, None], x, 0), weight)
    return case(
      jnp.where(where[:, None], student, jnp.nan), teacher, where=where, axis_name=axis_name
    )

  return loss


@functools.cache
def expected(case):
  """Value and gradient of the valid rows alone, cut out."""
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


@pytest.mark.parametrize("case", RELATIONAL, ids=IDS)
def test_masked_rows_are_cut_out_on_one_device_and_on_a_mesh(case, mesh):
  args = (*problem(case), WHERE)
  f = jax.jit(jax.value_and_grad(loss_of(case)))
  assert_agrees(case, *f(*args))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  weight = jax.device_put(args[0], NamedSharding(mesh, PartitionSpec()))
  assert_agrees(case, *f(weight, *jax.device_put(args[1:], rows)))


@pytest.mark.parametrize("case", RELATIONAL, ids=IDS)
def test_mapped_devices_agree_with_one(case, mesh):
  weight, *rows = (*problem(case), WHERE)
  loss = loss_of(case, "data")

  def step(weight, *rows):
    value, gradient = jax.value_and_grad(loss)(weight, *rows)
    return value, jax.lax.pmean(gradient, "data")

  split = [x.reshape(8, 2, *x.shape[1:]) for x in rows]
  assert_agrees(case, *jax.pmap(step, "data", in_axes=(None, 0, 0, 0))(weight, *split))

  def varying(weight, *rows):
    value, gradient = step(jax.lax.pcast(weight, "data", to="varying"), *rows)
    return jax.lax.pmean(value, "data"), gradient

  spec, whole = PartitionSpec("data"), PartitionSpec()
  for check_vma in (True, False):
    shard = jax.shard_map(
      varying,
      mesh=mesh,
      in_specs=(whole, spec, spec, spec),
      out_specs=(whole, whole),
      check_vma=check_vma,
    )
    assert_agrees(case, *jax.jit(shard)(weight, *rows))


@pytest.mark.parametrize("case", RELATIONAL, ids=IDS)
def test_no_valid_row_is_zero_with_a_zero_gradient(case):
  value, gradient = jax.jit(jax.value_and_grad(loss_of(case)))(*problem(case), np.zeros(16, bool))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_masks_that_do_not_fit_are_refused():
  x = np.ones((3, 2), np.float32)
  for where in (np.ones(2, bool), np.ones(3), np.ones((3, 2), bool)):
    with pytest.raises(ValueError, match="where must be bool"):
      losses.similarity_preserving(x, x, where=where)


def test_the_order_of_the_batch_does_not_matter():
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 6, 4)).astype(np.float32)
  order = rng.permutation(6)
  for case in RELATIONAL:
    f = jax.jit(case)
    np.testing.assert_allclose(f(student, teacher), f(student[order], teacher[order]), rtol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_states_that_are_carried_agree_on_all_devices(mesh, check_vma):
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
  alone = jax.jit(both)(*rows, memory, center)
  spec, whole = PartitionSpec("data"), PartitionSpec()
  views_spec = PartitionSpec(None, "data")
  mapped = jax.shard_map(
    functools.partial(both, axis_name="data"),
    mesh=mesh,
    in_specs=(spec, spec, spec, spec, views_spec, spec, whole, whole),
    out_specs=(spec, spec, whole, whole),
    check_vma=check_vma,
  )
  together = jax.jit(mapped)(*rows, memory, center)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, alone)
  _, _, after, moved = together
  touched = np.isin(np.arange(20), indices[WHERE])
  np.testing.assert_array_equal(after.student[~touched], memory.student[~touched])
  unit = teacher[WHERE] / np.linalg.norm(teacher[WHERE], axis=1, keepdims=True)
  half = (unit + memory.teacher[indices[WHERE]]) / 2
  expected = half / np.linalg.norm(half, axis=1, keepdims=True)
  np.testing.assert_allclose(after.teacher[indices[WHERE]], expected, rtol=1e-5)
  np.testing.assert_allclose(moved, 0.1 * views[:, WHERE].mean((0, 1)), rtol=1e-5)
