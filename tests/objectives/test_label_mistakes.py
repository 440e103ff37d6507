"""Mistakes with `objectives.labels` and what the messages say to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, losses, tasks, train
from distill_jax.objectives import labels, logits

KEY = jax.random.key(0)
NUMBERS = np.array([0, 1, 2, 0])
ROWS = np.eye(3, dtype=np.float32)[NUMBERS]
MULTI_HOT = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]], np.float32)


def shapes_of(term, output, **batch):
  """Returns the shapes of a term's value: what `fit` computes before training."""
  z = jax.ShapeDtypeStruct(output, jnp.float32)
  term.init(KEY, {"logits": z}, {})
  return jax.eval_shape(
    lambda z, batch: term.apply({}, {}, {"logits": z}, {}, batch, step=0, key=KEY)[0], z, batch
  )


@pytest.mark.parametrize(
  "loss",
  [
    optax.softmax_cross_entropy,
    optax.sigmoid_binary_cross_entropy,
    optax.squared_error,
    optax.losses.poly_loss_cross_entropy,
    optax.losses.kl_divergence,
  ],
)
@pytest.mark.parametrize("output", [(4, 3), (4, 4), (1, 3), (1, 2, 3), (4, 4, 4), (2, 1, 3)])
def test_loss_of_rows_refuses_class_numbers(loss, output):
  """Where there are as many rows as classes, numbers would be broadcast without an error."""
  numbers = np.zeros(output[:-1], int)
  with pytest.raises(ValueError, match="^loss: .*with_integer_labels"):
    shapes_of(labels(loss), output, label=numbers)
  rows = np.zeros(output, np.float32)
  values, _ = shapes_of(labels(loss), output, label=rows)
  assert values.shape[:1] == output[:1]


@pytest.mark.parametrize(
  "loss",
  [
    optax.softmax_cross_entropy_with_integer_labels,
    optax.losses.multiclass_hinge_loss,
    optax.losses.multiclass_sparsemax_loss,
    lambda z, y: -jnp.take_along_axis(z, y[..., None], -1)[..., 0],
  ],
)
@pytest.mark.parametrize("output", [(4, 3), (3, 3), (1, 3)])
def test_loss_of_class_numbers_takes_any_number_of_rows(loss, output):
  values, _ = shapes_of(labels(loss), output, label=np.zeros(output[:1], int))
  assert values.shape == output[:1]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_loss_of_class_numbers_refuses_rows(dtype):
  loss = optax.softmax_cross_entropy_with_integer_labels
  with pytest.raises(ValueError, match=r"^loss: .*label\.argmax\(-1\)"):
    shapes_of(labels(loss), (4, 3), label=ROWS.astype(dtype))


@pytest.mark.parametrize(
  ("output", "label", "field", "hint"),
  [
    # Numbers to predict next to one output, or without an axis of classes.
    ((4, 1), np.array([0.3, 2.5, -1, 0]), "logits", "squared_error.*regression"),
    ((4,), np.array([0.3, 2.5, -1, 0]), "logits", "squared_error.*regression"),
    ((4, 1), np.array([0, 1, 1, 0]), "logits", "sigmoid_binary_cross_entropy.*binary"),
    # Floats next to several outputs.
    ((4, 2), np.array([0.37, 0.1, 0.9, 1]), "label", r"np\.stack\(\[1 - label, label\]"),
    ((4, 2), np.array([[0.37], [0.1], [0.9], [1]]), "label", "probabilities of class 1"),
    ((4, 3), NUMBERS.astype(np.float32), "label", r"label\.astype\(np\.int32\)"),
    ((4, 3), np.ones((4, 2), np.float32), "label", "row of C probabilities"),
    ((4, 3), MULTI_HOT.astype(int), "label", "multi_label"),
  ],
)
def test_labels_that_need_another_loss_or_form_say_which(output, label, field, hint):
  with pytest.raises(ValueError, match=f"^{field}: expected .*got .*{hint}"):
    shapes_of(labels(), output, label=label)


@pytest.mark.parametrize(
  ("rows", "hint"),
  [
    (MULTI_HOT, r"labels\(optax\.sigmoid_binary_cross_entropy\), tasks\.multi_label"),
    (MULTI_HOT * 50, r"label / label\.sum"),
    (MULTI_HOT - 2, "softmax"),
  ],
)
def test_rows_that_are_no_probabilities_say_what_to_write(rows, hint):
  with pytest.raises(ValueError, match=f"^label: expected .*{hint}"):
    data.check_batch({"label": rows.astype(np.float32)}, 3)
  with pytest.raises(ValueError, match=f"^label: expected .*{hint}"):
    data.Source({"label": rows.astype(np.float32)}, classes=3)


@pytest.mark.parametrize(
  ("argument", "value", "hint"),
  [
    ("example_weights", np.ones(4), "example_weights='weight'"),
    ("example_weights", jnp.ones(4), "example_weights='weight'"),
    ("example_weights", [1, 2], "example_weights='weight'"),
    ("entry", 0, "entry='"),
    ("output", ("logits",), "output='"),
    ("class_weights", {0: 1.0, 1: 2.0}, r"\[weights\[i\] for i in range\(C\)\]"),
    ("class_weights", "balanced", r"data\.class_weights"),
    ("class_weights", 2.0, "1 leaves a class"),
  ],
)
def test_arguments_of_another_type_raise_at_once(argument, value, hint):
  with pytest.raises(ValueError, match=f"^{argument}: expected .*got .*{hint}"):
    labels(**{argument: value})


def test_class_weights_that_do_not_fit_say_how_many():
  sigmoid = labels(optax.sigmoid_binary_cross_entropy, class_weights=[1, 2])
  with pytest.raises(ValueError, match="^class_weights: expected None.*example_weights"):
    shapes_of(sigmoid, (4, 1), label=np.zeros(4, int))
  with pytest.raises(ValueError, match="^class_weights: expected 3 .*got 2"):
    shapes_of(labels(class_weights=[1, 2]), (4, 3), label=NUMBERS)


def test_missing_labels_are_named_once():
  with pytest.raises(ValueError, match="^label: expected labels") as error:
    shapes_of(labels(), (4, 3), image=np.ones(4))
  assert str(error.value).count("'image'") == 1
  with pytest.raises(ValueError, match=r"^label: .*labels\(entry='labels'\)"):
    shapes_of(labels(), (4, 3), labels=NUMBERS)


@pytest.mark.parametrize(
  ("label", "hint"),
  [
    (NUMBERS.astype(np.float32), r"label\.astype\(np\.int32\)"),
    (ROWS, r"label\.argmax\(-1\)"),
    (ROWS.astype(int), r"labels\.argmax\(-1\)"),
    (NUMBERS[:, None], r"labels\[\.\.\., 0\]"),
  ],
)
def test_losses_with_labels_say_which_form_they_take(label, hint):
  term = logits(losses.nkd)
  z = jnp.zeros((4, 3))
  with pytest.raises(ValueError, match=f"^labels?: expected .*{hint}"):
    term.apply({}, {}, {"logits": z}, {"logits": z}, {"label": label}, step=0, key=KEY)


def test_losses_take_bool_labels():
  z = jnp.array([[0.0, 1.0], [2.0, 0.0]])
  term = logits(losses.nkd)

  @jax.jit
  def values(*labels):
    outputs = {"logits": z}, {"logits": 2 * z}
    return [
      term.apply({}, {}, *outputs, {"label": label}, step=0, key=KEY)[0][0] for label in labels
    ]

  np.testing.assert_array_equal(*values(jnp.array([True, False]), jnp.array([1, 0])))


@pytest.mark.parametrize("value", ["255", [255], 255.0, True])
def test_ignore_labels_are_integers(value):
  takers = (
    labels,
    train.RunOptions,
    lambda ignore_label: data.Source({"label": NUMBERS}, classes=3, ignore_label=ignore_label),
    tasks.classification,
    tasks.binary,
    tasks.regression,
    tasks.multi_label,
    tasks.segmentation,
    tasks.language_modeling,
  )
  for take in takers:
    with pytest.raises(ValueError, match="^ignore_label: expected an integer"):
      take(ignore_label=value)
    take(ignore_label=np.int64(255))


@pytest.mark.parametrize("label", [NUMBERS[:3], ROWS[:3]])
def test_sum_over_the_batch_is_not_taken_for_one_value_a_row(label):
  """With as many rows as classes both are [3]."""

  def summed(z, y):
    y = jax.nn.one_hot(y, 3) if y.ndim == 1 else y
    return optax.squared_error(z, y).sum(0)

  with pytest.raises(ValueError, match="^loss: expected summed .* axis 0"):
    shapes_of(labels(summed), (3, 3), label=label)
