"""Weights of classes from counts, against scikit-learn and the papers' formulas."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from distill_jax import data


def maps(rng, *shape):
  label = rng.choice(4, p=[0.7, 0.2, 0.09, 0.01], size=shape)
  return np.where(rng.random(shape) < 0.2, 255, label)


def source(label, classes=4):
  return data.Source({"label": label}, classes=classes, ignore_label=255)


@pytest.mark.parametrize("shape", [(500,), (6, 20, 20), (3, 4, 10, 10)])
def test_inverse_frequency_equals_scikit_learn(rng, shape):
  label = maps(rng, *shape)
  y = label[label != 255]
  expected = compute_class_weight("balanced", classes=np.arange(4), y=y)
  weights = data.class_weights(source(label))
  np.testing.assert_allclose(weights, expected)
  np.testing.assert_allclose(weights[y].mean(), 1)


def test_median_frequency_counts_the_maps_with_the_class():
  label = np.array([[[0, 0], [0, 1]], [[0, 0], [255, 255]], [[2, 1], [1, 1]]])
  # Of 10 labels class 0 has 5 of 6 in its maps, class 1 has 4 of 8 and class 2 has 1 of 4.
  expected = 0.5 / np.array([5 / 6, 4 / 8, 1 / 4])
  np.testing.assert_allclose(data.class_weights(source(label, 3), "median_frequency"), expected)


@pytest.mark.parametrize("beta", [0.0, 0.99, None])
def test_effective_number_equals_its_sum(beta):
  counts = np.array([60, 30, 9, 1])
  weights = data.class_weights(
    source(np.repeat(np.arange(4), counts)), "effective_number", beta=beta
  )
  powers = (0.99 if beta is None else beta) ** np.arange(60)
  expected = 1 / np.array([powers[:n].sum() for n in counts])
  np.testing.assert_allclose(weights, 4 * expected / expected.sum())


@pytest.mark.parametrize("formula", ["inverse_frequency", "median_frequency", "effective_number"])
def test_a_class_that_does_not_occur_changes_no_other(formula):
  label = np.array([[0, 0, 0, 1], [1, 1, 255, 0]])
  three, two = (
    data.class_weights(source(label, 3), formula),
    data.class_weights(source(label, 2), formula),
  )
  np.testing.assert_allclose(three, [*two, 1])


@pytest.mark.parametrize(
  ("examples", "arguments", "field"),
  [
    (np.zeros((2, 3), int), {}, "source"),
    (data.Source({"label": np.zeros(3)}), {}, "source"),
    (data.Source({"label": np.eye(2)}, classes=2), {}, "source"),
    (source(np.full((2, 3), 255)), {}, "source"),
    (source(np.zeros((2, 3), int)), {"formula": "median"}, "formula"),
    (source(np.zeros(3, int)), {"formula": "median_frequency"}, "formula"),
    (source(np.zeros(3, int)), {"beta": 0.9}, "beta"),
    (source(np.zeros(3, int)), {"formula": "effective_number", "beta": 1}, "beta"),
  ],
)
def test_what_has_no_weights_raises(examples, arguments, field):
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    data.class_weights(examples, **arguments)
