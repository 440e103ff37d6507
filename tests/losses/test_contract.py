"""What holds for every public loss; the rows are in loss_cases.py."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_vjp
from loss_cases import CASES, HELPERS, MASKABLE, SEPARABLE, SOFT, arguments, cast, map_floats

from distill_jax import losses


def each(cases):
  return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@functools.cache
def compiled(case):
  """`args -> (values, gradients of their sum)`, compiled once for all tests of a loss.

  Hyper-parameters that are floats are traced, as under a schedule.
  """
  numbers = {k: np.asarray(v) for k, v in case.kwargs.items() if type(v) is float}
  traced = dataclasses.replace(
    case, kwargs={k: v for k, v in case.kwargs.items() if k not in numbers}
  )

  def total(both, rest, numbers):
    values = traced(*both, *rest, **numbers)
    return values.sum(), values

  f = jax.jit(jax.value_and_grad(total, has_aux=True))

  def run(args):
    (_, values), gradients = f(tuple(args[:2]), tuple(args[2:]), numbers)
    return values, gradients

  return run


@contextlib.contextmanager
def quick_compilation():
  """Most of XLA's optimizations off: a third less time to compile what runs once."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


def rows(case, args, index):
  """The arguments of some rows only."""

  def take(x):
    return np.take(x, index, case.batch_axis)

  return tuple(a if i in case.shared else jax.tree.map(take, a) for i, a in enumerate(args))


def test_every_public_loss_has_a_row():
  assert set(losses.__all__) - HELPERS == {case.name for case in CASES}
  assert set(losses.__all__) >= HELPERS


@each(CASES)
def test_value_is_the_formula_and_gradient_is_its_derivative(case):
  with jax.enable_x64(True), quick_compilation():
    args = arguments(case, dtype=np.float64)
    values, _ = compiled(case)(args)
    assert values.dtype == jnp.float64
    np.testing.assert_allclose(values, case.reference(*args, **case.kwargs), rtol=1e-8, atol=1e-12)
    own = case.derivatives
    if not own:
      return

    def f(*x):
      return compiled(case)((*x, *args[own:]))[0].sum()

    def f_vjp(*x):
      values, gradients = compiled(case)((*x, *args[own:]))
      return values.sum(), lambda ct: jax.tree.map(lambda g: g * ct, gradients[:own])

    check_vjp(f, f_vjp, args[:own], rtol=1e-5, atol=1e-7)


@each(CASES)
def test_compiled_and_eager_agree_alone_and_mapped(case):
  batches = [arguments(case, seed) for seed in (0, 1)]
  each_alone = [compiled(case)(args)[0] for args in batches]
  size = jax.tree.leaves(batches[0])[0].shape[case.batch_axis]
  assert each_alone[0].ndim == 0 if case.scalar else each_alone[0].shape[0] == size
  with quick_compilation():  # op by op: dozens of programs a loss
    eager = jax.vmap(case)(*jax.tree.map(lambda *x: np.stack(x), *batches))
  assert eager.dtype == each_alone[0].dtype == jnp.float32
  np.testing.assert_allclose(eager, each_alone, rtol=1e-5, atol=1e-6)


@each(CASES)
def test_low_precision_is_computed_in_float32(case):
  args = cast(arguments(case), jnp.bfloat16)
  values = jax.jit(case)(*args)
  assert values.dtype == jnp.float32
  wide = map_floats(lambda x: x.astype(np.float32), args)
  np.testing.assert_allclose(values, compiled(case)(wide)[0], rtol=2e-6, atol=1e-6)


@each(CASES)
def test_value_at_the_teacher_and_sign(case):
  args = arguments(case)
  values, _ = compiled(case)(args)
  if case.positive:
    assert (values >= -1e-6).all()
  if case.least is not None:
    teacher = args[1]
    if jax.tree.map(np.shape, args[0]) == jax.tree.map(np.shape, teacher):
      same, (gradient, _) = compiled(case)((teacher, teacher, *args[2:]))
    else:
      same, (gradient, _) = jax.jit(
        jax.value_and_grad(lambda s, t: case(s, t, *args[2:]).sum(), (0, 1))
      )(teacher, teacher)
    np.testing.assert_allclose(same, case.least, atol=2e-5)
    assert (values > 1e-4).all(), "the test's student should not be at the minimum"
    for g in jax.tree.leaves(gradient) if case.smooth else ():
      np.testing.assert_allclose(g, 0, atol=2e-3)


CUTS = {"batch": lambda x: x[:1], "width": lambda x: x[..., :1], "rank": lambda x: x[0]}


@each(CASES)
def test_shapes_that_differ_are_refused(case):
  student, teacher, *rest = arguments(case)
  for name in case.wrong:
    cut = jax.tree.map(CUTS[name], teacher)
    shapes = [str(x.shape) for x in jax.tree.leaves((student, cut))]
    with pytest.raises(ValueError) as error:
      case(student, cut, *rest)
    assert any(shape in str(error.value) for shape in shapes), error.value


def test_a_mismatch_shows_both_shapes():
  with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 1\)"):
    losses.kl_divergence(np.ones((2, 3)), np.ones((2, 1)))
  with pytest.raises(ValueError, match=r"student \(0, 3\) is empty"):
    losses.kl_divergence(np.ones((0, 3)), np.ones((0, 3)))


@each(SEPARABLE)
def test_rows_do_not_meet(case):
  args = arguments(case)
  values, _ = compiled(case)(args)
  size = values.shape[0]
  order = np.roll(np.arange(size), 1)
  order[0] = order[-1]  # a row twice, another gone: neither its neighbors nor its place matter
  np.testing.assert_allclose(
    compiled(case)(rows(case, args, order))[0], values[order], rtol=1e-5, atol=1e-6
  )


@each(CASES)
def test_values_and_gradients_are_finite(case):
  args = arguments(case)
  fills = {
    "zeros": lambda x: 0 * x,
    "constant": lambda x: 0 * x + 3,
    "duplicate rows": lambda x: 0 * x + x[:1],
    "huge": lambda x: np.sign(x) * np.float32(1e4),
    "tiny": lambda x: x * np.float32(1e-30),
  }
  if case.name == "sampled_cross_entropy":  # its teacher is probabilities
    fills = {"constant": lambda x: 0 * x + 0.25}
  for name, f in fills.items():
    student, teacher = map_floats(f, tuple(args[:2]))
    for both in ((student, teacher), (student, args[1]), (args[0], teacher)):
      out = compiled(case)((*both, *args[2:]))
      assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out)), name


@each(SOFT)
def test_a_constant_added_to_a_row_changes_nothing(case):
  args, rng = arguments(case), np.random.default_rng(1)
  moved = [x + 9 * rng.normal(size=(*x.shape[:-1], 1)).astype(np.float32) for x in args[:2]]
  np.testing.assert_allclose(
    compiled(case)((*moved, *args[2:]))[0], compiled(case)(args)[0], rtol=5e-4, atol=5e-5
  )


@each(MASKABLE)
def test_class_mask_and_minus_infinity_are_slicing(case):
  student, teacher, *labels = arguments(case)
  mask = np.array([True, True, False, True, False])
  sliced = [np.searchsorted(np.flatnonzero(mask), y) for y in labels]
  expected = jax.jit(case)(student[..., mask], teacher[..., mask], *sliced)
  dirty = [np.where(mask, x, np.float32(np.nan)) for x in (student, teacher)]
  masked = jax.jit(lambda mask, *args: case(*args, class_mask=mask))
  np.testing.assert_allclose(masked(mask, *dirty, *labels), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(masked(np.zeros(5, bool), *dirty, *labels), 0)
  gone = [np.where(mask, x, np.float32(-np.inf)) for x in (student, teacher)]
  values, gradients = compiled(case)((*gone, *labels))
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  for gradient in gradients:
    assert jnp.isfinite(gradient).all() and (gradient[..., ~mask] == 0).all()
  for bad in (np.ones(4, bool), np.ones(5)):
    with pytest.raises(ValueError, match="class_mask"):
      case(student, teacher, *labels, class_mask=bad)


BAD = {
  "temperature": (0, -1.0, np.inf, np.nan, np.ones(3)),
  "student_temperature": (0,),
  "teacher_temperature": (0,),
  "teacher_weight": (0, 1),
  "alpha": (-0.1, 1.0),
  "beta": (-0.1,),
  "gamma": (-0.1,),
  "relation": (-0.1,),
  "label_smoothing": (1.0, -0.1),
  "eps": (0.5,),
  "p": (0.5,),
  "power": (0.5,),
  "margin": (-1.0,),
  "momentum": (1.0, -0.1),
  "relation_heads": (0, 4),
  "kernel": ("laplace",),
}


@each([case for case in CASES if set(BAD) & set(case.kwargs)])
def test_hyperparameters_outside_their_range_are_refused(case):
  args, f = arguments(case), case.loss or getattr(losses, case.name)
  for name in set(BAD) & set(case.kwargs):
    for bad in BAD[name]:
      if (case.name, name, bad) == ("dkd", "alpha", 1.0):
        continue  # a weight there, a share of a mixture elsewhere
      with pytest.raises(ValueError, match=name):
        f(*args, **{**case.kwargs, name: bad})


def products(jaxpr):
  """Every matrix product of a program, those of inner programs too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for inner in jax.tree.leaves(list(equation.params.values())):
      if hasattr(inner, "eqns"):
        yield from products(inner)


@each(CASES)
def test_matrix_products_ask_for_full_precision(case):
  args = cast(arguments(case), jnp.bfloat16)
  for product in products(jax.make_jaxpr(case)(*args).jaxpr):
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product
    assert product.params["preferred_element_type"] == jnp.float32, product
    # Two bfloat16 numbers have an exact product: it is only to be added up in float32.
    assert product.invars[0].aval.dtype == product.invars[1].aval.dtype, product
    assert product.invars[0].aval.dtype == jnp.float32 or case.name.startswith("linear_"), product
