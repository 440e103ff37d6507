"""Properties of every public loss; the cases are in loss_cases.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import quick_compilation
from jax.test_util import check_vjp
from loss_cases import CASES, HELPERS, MASKABLE, SEPARABLE, SOFT, arguments, cast, map_floats

from distill_jax import losses, reduce


def each(cases):
  return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@functools.cache
def compiled(case):
  """Returns `args -> (values, gradients of their sum)`, compiled once for all tests of a loss.

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


@functools.cache
def modes(case):
  """Returns a loss's values in several modes: one program.

  'mapped' is under vmap, of two problems; 'bfloat16' has such arguments, 'widened' the same ones in
  float32.
  """
  args = arguments(case)
  low = cast(args, jnp.bfloat16)
  widened = map_floats(lambda x: x.astype(np.float32), low)
  stacked = jax.tree.map(lambda *x: np.stack(x), args, arguments(case, seed=1))

  def run(stacked, low):
    return {"mapped": jax.vmap(case)(*stacked), "bfloat16": case(*low)}

  with quick_compilation():
    values = jax.jit(run)(stacked, low)
  return jax.device_get(values) | {"widened": compiled(case)(widened)[0]}


def rows(case, args, index):
  """Returns the arguments of some rows only."""

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
    count = case.derivatives
    if not count:
      return

    def f(*x):
      return np.sum(compiled(case)((*x, *args[count:]))[0])

    def f_vjp(*x):
      values, gradients = compiled(case)((*x, *args[count:]))
      return np.sum(values), lambda ct: jax.tree.map(
        lambda g: np.asarray(g) * ct, gradients[:count]
      )

    check_vjp(f, f_vjp, args[:count], rtol=1e-5, atol=1e-7)


# A second program a loss. One loss per kind of computation: softmax, sorting, gathering, scans,
# decompositions, loops, kernels with a derivative of their own.
MODES = (
  "kl_divergence dkd uskd sparse_kl sparse_jensen_shannon sampled_cross_entropy linear_kl-kl "
  "linear_sparse_kl nst fsp vid mgd kdsvd affinity rkd_angle dark_rank info_nce crd attention_kl "
  "minilm_relations fgd rnnt_three_way"
).split()
modal = pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, id=case.id, marks=() if case.id in MODES else pytest.mark.nightly)
    for case in CASES
  ],
)


@each(CASES)
def test_a_value_for_each_row_or_one_in_float32(case):
  values = compiled(case)(arguments(case))[0]
  size = jax.tree.leaves(arguments(case))[0].shape[case.batch_axis]
  assert values.ndim == 0 if case.scalar else values.shape[0] == size
  assert values.dtype == jnp.float32


@modal
def test_compiled_and_mapped_agree(case):
  expected = [compiled(case)(arguments(case, seed))[0] for seed in (0, 1)]
  mapped = modes(case)["mapped"]
  assert mapped.dtype == jnp.float32
  np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)


@each(CASES)
def test_numpy_arguments_have_the_type_of_traced_ones(case):
  args = arguments(case)
  concrete, traced = jax.eval_shape(lambda: case(*args)), jax.eval_shape(case, *args)
  assert (concrete.shape, concrete.dtype) == (traced.shape, traced.dtype)


# One loss per kind of argument: arrays, labels, sparse targets, rows, maps, masks.
EAGER = ("kl_divergence", "dkd", "sparse_kl", "rkd_distance", "fsp", "attention_kl")


def check_eager(case):
  """Checks a loss op by op: dozens of programs a loss."""
  args = arguments(case)
  with quick_compilation():
    np.testing.assert_allclose(case(*args), compiled(case)(args)[0], rtol=1e-5, atol=1e-6)


@each([case for case in CASES if case.id in EAGER])
def test_eager_agrees_with_compiled(case):
  check_eager(case)


@pytest.mark.nightly
@each([case for case in CASES if case.id not in EAGER])
def test_eager_agrees_with_compiled_for_all_losses(case):
  check_eager(case)


@modal
def test_bfloat16_is_computed_in_float32(case):
  assert modes(case)["bfloat16"].dtype == jnp.float32
  np.testing.assert_allclose(modes(case)["bfloat16"], modes(case)["widened"], rtol=2e-6, atol=1e-6)


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
    assert (values > 1e-4).all(), "the test's student is at the minimum"
    for g in jax.tree.leaves(gradient) if case.smooth else ():
      np.testing.assert_allclose(g, 0, atol=2e-3)


CUTS = {"batch": lambda x: x[:1], "width": lambda x: x[..., :1], "rank": lambda x: x[0]}


@each(CASES)
def test_shapes_that_differ_raise(case):
  student, teacher, *rest = arguments(case)
  for name in case.invalid:
    cut = jax.tree.map(CUTS[name], teacher)
    shapes = [str(x.shape) for x in jax.tree.leaves((student, cut))]
    with pytest.raises(ValueError) as error:
      jax.eval_shape(case, student, cut, *rest)
    assert any(shape in str(error.value) for shape in shapes), error.value


def test_a_mismatch_shows_both_shapes():
  with pytest.raises(ValueError, match=r"student.*\(2, 3\).*\(2, 1\)"):
    losses.kl_divergence(np.ones((2, 3)), np.ones((2, 1)))
  with pytest.raises(ValueError, match=r"student.*\(0, 3\)"):
    losses.kl_divergence(np.ones((0, 3)), np.ones((0, 3)))


@each(SEPARABLE)
def test_rows_do_not_meet(case):
  args = arguments(case)
  values, _ = compiled(case)(args)
  size = values.shape[0]
  order = np.roll(np.arange(size), 1)
  order[0] = order[-1]  # One row twice, another removed: neighbors and position have no effect.
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
      out = jax.device_get(compiled(case)((*both, *args[2:])))
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(out)), name


@each(SOFT)
@pytest.mark.parametrize("constant", [100, 1_000, 10_000])
def test_a_constant_added_to_a_row_costs_no_digits(case, constant):
  args, rng = arguments(case), np.random.default_rng(1)
  pair, rest = args[:2], args[2:]
  if case.name == "sampled_cross_entropy":  # Its teacher is probabilities.
    pair, rest = args[:1], args[1:]
  added = [np.float32(constant) + rng.integers(0, 9, size=(*x.shape[:-1], 1)) for x in pair]
  moved = [(x + c).astype(np.float32) for x, c in zip(pair, added)]
  # The same differences: a difference of two floats within a factor of two has no rounding error.
  rounded = [(x - c).astype(np.float32) for x, c in zip(moved, added)]
  values, gradients = compiled(case)((*moved, *rest))
  expected, expected_gradients = compiled(case)((*rounded, *rest))
  np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-6)
  for actual, desired in zip(gradients[: len(pair)], expected_gradients):
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=1e-6)


@each(SEPARABLE)
def test_blank_rows_reach_neither_value_nor_gradient(case):
  student, teacher, *rest = arguments(case)
  values, gradients = compiled(case)((student, teacher, *rest))
  where = np.arange(values.shape[0]) != 1

  def mask(x):
    return np.broadcast_to(where, x.shape[: case.batch_axis + 1])

  def dirty(x):
    dirt = np.resize(np.float32([np.nan, np.inf, -np.inf]), x.shape)
    return np.where(mask(x).reshape(*mask(x).shape, *[1] * (x.ndim - mask(x).ndim)), x, dirt)

  def blank(pair):
    return jax.tree.map(lambda x: reduce.blank(mask(x), x), pair)

  blanked, pull = jax.vjp(blank, jax.tree.map(dirty, (student, teacher)))
  blank_values, blank_gradients = compiled(case)((*blanked, *rest))
  np.testing.assert_allclose(
    reduce.mean(blank_values, where), values[where].mean(), rtol=1e-5, atol=1e-6
  )
  (blank_gradients,) = pull(jax.tree.map(jnp.asarray, blank_gradients))
  for actual, expected in zip(jax.tree.leaves(blank_gradients), jax.tree.leaves(gradients)):
    rows = np.moveaxis(np.asarray(actual), case.batch_axis, 0)
    np.testing.assert_array_equal(rows[~where], 0)
    expected = np.moveaxis(np.asarray(expected), case.batch_axis, 0)
    np.testing.assert_allclose(rows[where], expected[where], rtol=1e-5, atol=1e-6)


@each(CASES)
def test_strict_promotion_of_dtypes_and_ranks(case):
  """The two sides may differ in precision, and JAX's defaults may be of 64 bits."""
  student, teacher, *rest = arguments(case)

  def total(pair):
    return case(*pair, *rest).sum()

  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
    jax.eval_shape(jax.value_and_grad(total), (student, cast(teacher, np.float64)))


@each(MASKABLE)
def test_class_mask_and_minus_infinity_are_slicing(case):
  student, teacher, *labels = arguments(case)
  mask = np.array([True, True, False, True, False])
  sliced_labels = [np.searchsorted(np.flatnonzero(mask), y) for y in labels]

  @jax.jit
  def both(mask, sliced, masked):
    return case(*sliced, *sliced_labels), case(*masked, *labels, class_mask=mask)

  sliced = student[..., mask], teacher[..., mask]
  dirty = [np.where(mask, x, np.float32(np.nan)) for x in (student, teacher)]
  expected, values = both(mask, sliced, dirty)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(both(np.zeros(5, bool), sliced, dirty)[1], 0)
  infinite = [np.where(mask, x, np.float32(-np.inf)) for x in (student, teacher)]
  values, gradients = jax.device_get(compiled(case)((*infinite, *labels)))
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  for gradient in gradients:
    assert np.isfinite(gradient).all() and (gradient[..., ~mask] == 0).all()
  for invalid in (np.ones(4, bool), np.ones(5)):
    with pytest.raises(ValueError, match="class_mask"):
      jax.eval_shape(functools.partial(case, class_mask=invalid), student, teacher, *labels)


INVALID = {
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
  "length": (0,),
  "num_classes": (0,),
  "k": (0,),
  "mu": (-0.1,),
  "head_mass": (0, 1.1),
  "threshold": (-0.1, 1.1),
  "teacher_mixing": (-0.1, 1.0),
  "kernel": ("laplace",),
  "mode": ("blank",),
  "blank": (-1, 5),
  "pool": (-0.1, 1.1),
  "pixel_weight": (-0.1,),
  "region_weight": (-0.1,),
}


@each([case for case in CASES if set(INVALID) & set(case.kwargs)])
def test_hyperparameters_outside_their_range_raise(case):
  args, loss = arguments(case), case.loss or getattr(losses, case.name)
  for name in set(INVALID) & set(case.kwargs):
    for value in INVALID[name]:
      if case.name in ("dkd", "dark_rank", "uskd", "vitkd") and (name, value) == ("alpha", 1.0):
        continue  # A weight here, a fraction of a mixture elsewhere.
      options = {**case.kwargs, name: value}
      with pytest.raises(ValueError, match=name):
        jax.eval_shape(functools.partial(loss, **options), *args)


def products(jaxpr):
  """Yields every matrix product of a program, those of inner programs too."""
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
    # The product of two bfloat16 values is exact: only the sum needs float32.
    assert product.invars[0].aval.dtype == product.invars[1].aval.dtype, product
    assert product.invars[0].aval.dtype == jnp.float32 or case.name.startswith("linear_"), product


OF_CLASSES = [
  case
  for case in CASES
  if case.kind == "logits" and case.name.split("_")[0] not in ("attention", "linear", "sparse")
]


@each(OF_CLASSES)
def test_one_class_raises(case):
  """A softmax over one logit is 1, so the loss was 0 and trained nothing (CASES.md, row 49)."""
  student, teacher, *rest = arguments(case)
  with pytest.raises(ValueError, match="2 classes"):
    case(student[..., :1], teacher[..., :1], *rest)


OF_PAIRS = (
  "similarity_preserving rkd_distance rkd_angle pkt correlation_congruence dark_rank correlation "
  "info_nce"
).split()


@each([case for case in CASES if case.name in OF_PAIRS])
def test_one_row_has_no_other_to_be_related_to(case):
  """The loss was 0 with zero gradient: a batch of one trained nothing."""
  student, teacher, *rest = arguments(case)
  with pytest.raises(ValueError, match="2 rows"):
    case(student[:1], teacher[:1], *rest)
