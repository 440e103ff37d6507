"""What holds for every public loss; the rows are in loss_cases.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from loss_cases import CASES, HELPERS, MASKABLE, SEPARABLE, SOFT, arguments, cast, map_floats

from distill_jax import losses


def each(cases):
  return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def value_and_gradients(case, args):
  """The summed loss and its gradients for student and teacher, under jit."""
  rest = args[2:]
  return jax.jit(jax.value_and_grad(lambda both: case(*both, *rest).sum()))(tuple(args[:2]))


def rows(case, args, index):
  """The arguments of some rows only."""
  return tuple(a if i in case.shared else jax.tree.map(lambda x: x[index], a) for i, a in enumerate(args))


def test_every_public_loss_has_a_row():
  assert set(losses.__all__) - HELPERS == {case.name for case in CASES}


@each(CASES)
def test_value_is_the_formula_and_gradient_is_its_derivative(case):
  with jax.enable_x64(True):
    args = arguments(case, dtype=np.float64)
    value = case(*args)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, case.reference(*args, **case.kwargs), rtol=1e-9, atol=1e-12)
    both = args[:1] if case.frozen else args[:2]
    f = jax.jit(lambda *x: case(*x, *args[len(both) :]))
    check_grads(f, both, order=1, modes=["rev"], rtol=1e-5, atol=1e-7)


@each(CASES)
def test_compiled_mapped_and_eager_agree(case):
  batches = [arguments(case, seed) for seed in (0, 1)]
  eager = [case(*args) for args in batches]
  assert eager[0].dtype == jnp.float32
  assert (
    eager[0].ndim == 0 if case.relational else eager[0].shape[0] == jax.tree.leaves(batches[0])[0].shape[0]
  )
  np.testing.assert_allclose(jax.jit(case)(*batches[0]), eager[0], rtol=1e-5, atol=1e-6)
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  np.testing.assert_allclose(jax.jit(jax.vmap(case))(*stacked), eager, rtol=1e-5, atol=1e-6)


@each(CASES)
def test_low_precision_is_computed_in_float32(case):
  args = cast(arguments(case), jnp.bfloat16)
  value = jax.jit(case)(*args)
  assert value.dtype == jnp.float32
  wide = map_floats(lambda x: x.astype(np.float32), args)
  np.testing.assert_allclose(value, jax.jit(case)(*wide), rtol=1e-6, atol=1e-7)


@each(CASES)
def test_value_at_the_teacher_and_sign(case):
  args = arguments(case)
  if case.positive:
    assert (case(*args) >= -1e-6).all()
  if case.least is not None:
    same = case(args[0], args[0], *args[2:])
    np.testing.assert_allclose(same, case.least, atol=2e-6)
    assert (case(*args) >= same - 1e-6).all()


@each(CASES)
def test_shapes_that_differ_are_refused(case):
  student, teacher, *rest = arguments(case)
  for wrong in (lambda x: x[:1], lambda x: x[..., :1], lambda x: x[0]):
    cut = jax.tree.map(wrong, teacher)
    shapes = [re.escape(str(jax.tree.leaves(x)[0].shape)) for x in (student, cut)]
    with pytest.raises(ValueError) as error:
      case(student, cut, *rest)
    assert all(re.search(shape, str(error.value)) for shape in shapes), error.value


@each(SEPARABLE)
def test_rows_do_not_meet(case):
  args, order = arguments(case), np.array([2, 0, 3])
  np.testing.assert_allclose(case(*rows(case, args, order)), case(*args)[order], rtol=1e-6, atol=1e-7)


def nasty(case):
  """Arguments that break careless code."""
  args = arguments(case)
  fills = {
    "zeros": lambda x: 0 * x,
    "constant": lambda x: 0 * x + 3,
    "duplicate rows": lambda x: 0 * x + x[:1],
    "huge": lambda x: np.sign(x) * np.float32(1e4),
  }
  for name, f in fills.items():
    both = map_floats(f, args[:2])
    yield name, (*both, *args[2:])
    yield f"{name} in the student", (both[0], *args[1:])
  yield "equal", (args[0], args[0], *args[2:])


@each(CASES)
def test_values_and_gradients_are_finite(case):
  compiled = jax.jit(jax.value_and_grad(lambda both, rest: case(*both, *rest).sum()))
  for name, args in nasty(case):
    out = compiled(tuple(args[:2]), tuple(args[2:]))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out)), name


@each(SOFT)
def test_a_constant_added_to_a_row_changes_nothing(case):
  args = arguments(case)
  shift = np.linspace(-9, 9, len(args[0]), dtype=np.float32)[:, None]
  moved = case(args[0] + shift, args[1] - 2 * shift, *args[2:])
  np.testing.assert_allclose(moved, case(*args), rtol=2e-4, atol=2e-5)


@each(MASKABLE)
def test_class_mask_and_minus_infinity_are_slicing(case):
  student, teacher, *rest = arguments(case)
  mask = np.array([True, True, False, True, False])
  expected = case(student[..., mask], teacher[..., mask], *rest)
  dirty = [np.where(mask, x, np.nan) for x in (student, teacher)]
  np.testing.assert_allclose(case(*dirty, *rest, class_mask=mask), expected, rtol=1e-5, atol=1e-6)
  gone = tuple(np.where(mask, x, -np.inf) for x in (student, teacher))
  np.testing.assert_allclose(case(*gone, *rest), expected, rtol=1e-5, atol=1e-6)
  _, grads = value_and_gradients(case, (*gone, *rest))
  for grad in grads:
    assert jnp.isfinite(grad).all() and (grad[..., ~mask] == 0).all()
  empty = case(*dirty, *rest, class_mask=np.zeros(5, bool))
  np.testing.assert_array_equal(empty, 0)
  with pytest.raises(ValueError, match="class_mask"):
    case(student, teacher, *rest, class_mask=np.ones(4, bool))
  with pytest.raises(ValueError, match="class_mask must be bool"):
    case(student, teacher, *rest, class_mask=np.ones(5))


@pytest.mark.parametrize("case", [c for c in CASES if "temperature" in c.kwargs], ids=lambda c: c.id)
def test_temperature(case):
  args = arguments(case)
  f = getattr(losses, case.name)
  options = {k: v for k, v in case.kwargs.items() if k != "temperature"}
  for bad in (0, -1.0, np.inf, np.nan):
    with pytest.raises(ValueError, match="temperature"):
      f(*args, **options, temperature=bad)
  with pytest.raises(ValueError, match="temperature must be a scalar"):
    f(*args, **options, temperature=np.ones(3))
  traced = jax.jit(lambda t: f(*args, **options, temperature=t))(jnp.float32(case.kwargs["temperature"]))
  np.testing.assert_allclose(traced, f(*args, **case.kwargs), rtol=1e-5)
