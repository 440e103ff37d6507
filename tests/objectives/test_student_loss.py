"""A training loss of one's own: masks, reductions, arguments and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from terms_by_hand import KEY, normal

from distill_jax import objectives, reduce

ROWS = 4
WHERE = np.array([True, False, True, True])


def detector_loss(outputs, batch):
  """Each image's distance of boxes over its number of boxes, plus a classification part."""
  exists = batch["label"] >= 0
  distance = jnp.abs(outputs["box_deltas"] - batch["boxes"]).sum(-1)
  boxes = jnp.where(exists, distance, 0).sum(-1) / jnp.maximum(exists.sum(-1), 1)
  return boxes + jax.nn.logsumexp(outputs["class_logits"], (1, 2))


def detector_problem(rng, boxes=3):
  student = {
    "box_deltas": normal(rng, ROWS, boxes, 4),
    "class_logits": normal(rng, ROWS, boxes, 2),
    "head": (normal(rng, ROWS, 5), None, None),
  }
  label = rng.integers(-1, 2, (ROWS, boxes)).astype(np.int32)
  return student, {"boxes": normal(rng, ROWS, boxes, 4), "label": label}


def apply(term, student, batch, **context):
  value, state = term.apply({}, {}, student, {}, batch, **{"step": 0, "key": KEY, **context})
  assert state == {}
  return value


def masked(x):
  bad = np.float32(np.nan) if x.dtype == np.float32 else x.dtype.type(0)
  return np.where(WHERE.reshape(-1, *[1] * (x.ndim - 1)), x, bad)


def test_masked_rows_are_as_if_sliced(rng):
  student, batch = detector_problem(rng)
  term = objectives.student_loss(detector_loss)
  outputs = {name: x for name, x in student.items() if name != "head"}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def mean(outputs, batch):
    value = apply(term, outputs | {"head": student["head"]}, batch)
    return reduce.mean(*value), value

  dirty = jax.tree.map(masked, outputs)
  (value, (values, where)), gradient = mean(dirty, jax.tree.map(masked, batch) | {"where": WHERE})
  sliced = jax.tree.map(lambda x: x[WHERE], (outputs, batch))
  expected = detector_loss(*sliced)
  np.testing.assert_array_equal(where, WHERE)
  np.testing.assert_allclose(values[WHERE], expected, rtol=1e-6)
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)
  by_hand = jax.grad(lambda outputs: detector_loss(outputs, sliced[1]).mean())(sliced[0])
  for name, g in gradient.items():
    assert np.isfinite(g).all() and not g[~WHERE].any()
    np.testing.assert_allclose(g[WHERE], by_hand[name], rtol=1e-5, atol=1e-7)


def test_generated_rows_do_not_count_and_outputs_are_float32(rng):
  student, batch = detector_problem(rng)
  dtypes = []

  def loss(outputs, batch):
    dtypes.append({name: outputs[name].dtype for name in ("box_deltas", "class_logits")})
    np.testing.assert_array_equal(outputs["head"][0], student["head"][0])
    return detector_loss(outputs, batch)

  low = student | {"box_deltas": jnp.asarray(student["box_deltas"], jnp.bfloat16)}
  batch |= {"where": WHERE, "generated": np.array([True, True, False, False])}
  values, where = apply(objectives.student_loss(loss), low, batch)
  np.testing.assert_array_equal(where, [False, False, True, True])
  batch["labeled"] = np.array([True, True, False, True])
  _, where = apply(objectives.student_loss(loss, valid="labeled"), low, batch)
  np.testing.assert_array_equal(where, [False, False, False, True])
  assert values.dtype == jnp.float32 and set(dtypes[0].values()) == {jnp.dtype(jnp.float32)}


def test_loss_that_relates_rows_takes_what_it_needs(rng):
  student, batch = detector_problem(rng)

  def loss(outputs, batch, where, *, step, axis_name):
    assert axis_name == "data"
    return step * reduce.mean(detector_loss(outputs, batch), where)

  value = apply(
    objectives.student_loss(loss), student, batch | {"where": WHERE}, step=2, axis_name="data"
  )
  np.testing.assert_allclose(value, 2 * detector_loss(student, batch)[WHERE].mean(), rtol=1e-6)


WRONG_VALUES = {
  "a mean": lambda outputs, batch: detector_loss(outputs, batch).mean(),
  "a sum over rows": lambda outputs, batch: outputs["box_deltas"].sum((0, 2)),
  "not reduced": lambda outputs, batch: outputs["box_deltas"].sum(-1),
  "a column": lambda outputs, batch: detector_loss(outputs, batch)[:, None],
  "integers": lambda outputs, batch: batch["label"][:, 0],
  "a number": lambda outputs, batch: 1.0,
  "several": lambda outputs, batch: {"boxes": detector_loss(outputs, batch)},
}


@pytest.mark.parametrize("function", WRONG_VALUES.values(), ids=WRONG_VALUES)
@pytest.mark.parametrize("boxes", [3, ROWS])  # As many as there are rows, too.
def test_values_that_are_not_one_a_row_raise(rng, function, boxes):
  student, batch = detector_problem(rng, boxes)
  with pytest.raises(ValueError, match="^(function|loss): expected"):
    apply(objectives.student_loss(function), student, batch)
  assert apply(objectives.student_loss(detector_loss), student, batch)[0].shape == (ROWS,)


class Head:
  """Has a loss, and is none."""

  def loss(self, outputs, batch):
    return detector_loss(outputs, batch)


@pytest.mark.parametrize(
  "function", [None, "focal", Head(), Head, lambda outputs: 0, lambda outputs, batch, gamma: 0]
)
def test_no_function_of_outputs_and_batch_raises_at_once(function):
  with pytest.raises(ValueError, match="^function: expected"):
    objectives.student_loss(function)


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"where": np.ones((ROWS, 2), bool)}, "where"),
    ({"where": np.ones(ROWS - 1, bool)}, "where"),
    ({"generated": np.ones(ROWS)}, "generated"),
    ({"labeled": np.ones(ROWS)}, "labeled"),
    ({"labeled": np.ones((ROWS, 1), bool)}, "labeled"),
    ({}, "labeled"),
  ],
)
def test_masks_of_other_shapes_raise(rng, change, field):
  student, batch = detector_problem(rng)
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    valid = "labeled" if field == "labeled" else None
    apply(objectives.student_loss(detector_loss, valid=valid), student, batch | change)


def test_missing_output_is_named_with_the_nearest(rng):
  student, batch = detector_problem(rng)
  loss = objectives.student_loss(lambda outputs, batch: outputs["box_delta"].sum((1, 2)))
  with pytest.raises(ValueError, match="^box_delta: expected .*'box_deltas'"):
    apply(loss, student, batch)
  own = objectives.student_loss(lambda outputs, batch: {}[len(batch)])
  with pytest.raises(KeyError):
    apply(own, student, batch)


def test_labels_of_images_next_to_boxes_are_named(rng):
  student, batch = detector_problem(rng)
  term = objectives.student_loss(detector_loss)
  with pytest.raises(ValueError, match=r"^label: expected .*\[4, 3\] next to .*got \[4\]: write"):
    apply(term, student, batch | {"label": batch["label"][:, 0]})
  with pytest.raises(TypeError, match="incompatible shapes"):  # Of the outputs.
    apply(term, student | {"box_deltas": student["box_deltas"][:, :2]}, batch)
