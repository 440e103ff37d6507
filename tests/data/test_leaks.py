import warnings

import numpy as np
import pytest

from distill_jax import data
from distill_jax.data import pipeline
from distill_jax.data.leaks import warn_of_shared_examples


def test_shared_examples_warn_with_their_count():
  train = data.Source({"x": np.arange(20.0), "label": np.arange(20) % 2})
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    with pytest.raises(UserWarning, match=r"^evaluation: .*got 20 of 20"):
      warn_of_shared_examples(train, train)
    with pytest.raises(UserWarning, match=r"^evaluation: .*got 5 of 5"):
      warn_of_shared_examples(train, train.take(slice(5)))
    warn_of_shared_examples(*data.split(train, 0.3))
    # The same ids, of another set.
    warn_of_shared_examples(train, data.Source({"x": -1 - np.arange(5.0), "label": np.ones(5)}))


def test_second_pass_over_a_used_iterator_names_the_cause():
  iterator = iter([{"x": np.ones(2)}] * 3)
  batches = data.from_iterable(lambda: map(dict, iterator))
  assert len(list(batches)) == 3
  with pytest.raises(ValueError, match=r"^source: .*again.*new iterator"):
    list(batches)
  repeated = data.from_iterable(lambda: iter([{"x": np.ones(2)}]))
  assert len(list(repeated)) == len(list(repeated)) == 1


def test_pass_that_seems_endless_warns(monkeypatch):
  monkeypatch.setattr(pipeline, "MANY_BATCHES", 5)
  with pytest.warns(UserWarning, match=r"^source: read 5 batches.*islice"):
    list(data.from_iterable(lambda: iter([{"x": np.ones(2)}] * 9)))
  list(data.from_iterable([{"x": np.ones(2)}] * 9))
