import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, objectives, tasks
from distill_jax.data import pipeline
from distill_jax.data.leaks import (
  check_no_shared_cases,
  check_no_shared_groups,
  check_no_shared_iterator,
  warn_of_shared_examples,
)
from distill_jax.models import from_apply
from distill_jax.train import Evaluation, fit


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


def a_source(groups, name="person"):
  groups = np.asarray(groups)
  arrays = {"x": np.zeros((len(groups), 2)), "label": np.arange(len(groups)) % 2, "person": groups}
  return data.Source(arrays, classes=2, groups=name)


@pytest.mark.parametrize(
  "groups, others, shared",
  [
    ([1, 2, 2, 3], [4, 0], 0),
    ([1, 2, 2, 3], [4, 2, 3], 2),
    ([[0, 0, 8, 8]], [[9, 0, 17, 8]], 0),
    ([[0, 0, 8, 8]], [[8, 0, 16, 8]], 1),  # They share an edge,
    ([[0, 0, 8, 8]], [[8, 8, 16, 16]], 1),  # a corner,
    ([[0, 0, 8, 8]], [[-4, 2, 2, 4], [20, 20, 21, 21]], 1),  # pixels,
    ([[0, 0, 8, 8]], [[2, 2, 4, 4]], 1),  # all of one.
    ([[0, 0, 8, 8]], [[0, 9, 8, 17]], 0),
    ([[0, 0, 8, 8], [32, 0, 40, 8]], [[16, 0, 24, 8]], 0),
  ],
)
def test_groups_on_both_sides_raise(groups, others, shared):
  train = a_source(groups)
  for evaluation in (a_source(others), a_source(others, name="")):
    if not shared:
      check_no_shared_groups(train, evaluation)
      continue
    with pytest.raises(ValueError, match=rf"^test: .*got {shared} of {len(others)}"):
      check_no_shared_groups(train, evaluation, "test")


def test_cases_on_both_sides_raise():
  """`Cases("person")` without `groups="person"`."""
  source = a_source([1, 1, 2, 2, 3, 3], name="")
  train, evaluation = source.take([0, 1, 2]), source.take([3, 4])
  with pytest.raises(ValueError, match=r"^test: expected no 'person'.*got 1 there, 2 the first"):
    check_no_shared_cases(train, evaluation, "person", "test")
  for others, entry in ((source.take([4, 5]), "person"), (evaluation, ""), (evaluation, "slab")):
    check_no_shared_cases(train, others, entry)


def test_equal_case_numbers_of_two_sets_warn():
  train, evaluation = a_source([0, 1, 2], name=""), a_source([1, 0, 4], name="")
  with pytest.warns(UserWarning, match=r"^evaluation: expected no 'person'"):
    check_no_shared_cases(train, evaluation, "person")


def test_training_with_a_case_on_both_sides_raises():
  student = from_apply(
    lambda key, x: jnp.zeros((2, 2)), lambda w, x: x[:, None, None] @ w, inputs=("x",)
  )
  arrays = {"x": np.zeros((9, 2)), "label": np.zeros((9, 1, 1), int), "case": np.arange(9) // 3}
  source = data.Source(arrays, classes=2)
  with pytest.raises(ValueError, match=r"^evaluation: expected no 'case'"):
    fit(
      student,
      None,
      objectives.weighted(hard=(1.0, objectives.labels())),
      optax.sgd(0.1),
      source.take(np.arange(8)),
      steps=1,
      batch_size=8,
      evaluation=Evaluation(source.take([8])),
      task=tasks.segmentation(cases=tasks.Cases()),
    )


def test_training_with_a_person_on_both_sides_raises():
  student = from_apply(lambda key, x: jnp.zeros((2, 2)), lambda w, x: x @ w, inputs=("x",))
  with pytest.raises(ValueError, match=r"^evaluation: expected no 'person'"):
    fit(
      student,
      None,
      objectives.weighted(hard=(1.0, objectives.labels())),
      optax.sgd(0.1),
      a_source(np.arange(8)),
      steps=1,
      batch_size=8,
      evaluation=Evaluation(a_source([3, 9])),
    )


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


def batches():
  yield from [{"x": np.ones(2)}] * 3


def from_inside(iterator):
  def one_pass():
    yield from iterator

  return one_pass


@pytest.mark.parametrize(
  "make",
  [
    lambda it: (it, lambda: map(dict, it)),
    lambda it: (lambda start: it, lambda: itertools.islice(it, 3)),
    lambda it: (from_inside(it), from_inside(it)),
  ],
)
def test_one_iterator_for_training_and_evaluation_raises(make):
  train, evaluation = map(data.from_iterable, make(batches()))
  with pytest.raises(ValueError, match=r"^evaluation: .*new iterator"):
    check_no_shared_iterator(train, evaluation)


def test_iterators_of_their_own_and_counters_may_be_read():
  counter = itertools.count()

  def numbered():
    yield {"x": np.full(2, next(counter))}

  for train, evaluation in [(batches, batches), (batches(), batches()), (numbered, numbered)]:
    check_no_shared_iterator(*map(data.from_iterable, (train, evaluation)))
  check_no_shared_iterator(data.Source({"x": np.ones(2)}), data.from_iterable(batches()))


def test_fit_refuses_a_shared_iterator_before_training():
  iterator = ({"image": np.ones((8, 4), np.float32), "label": np.zeros(8, int)} for _ in range(9))
  student = from_apply(None, lambda w, x: x @ w, variables=np.ones((4, 2), np.float32))
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  with pytest.raises(ValueError, match=r"^evaluation: .*source"):
    fit(
      student,
      None,
      objective,
      optax.sgd(0.1),
      iterator,
      steps=2,
      batch_size=8,
      evaluation=lambda: map(dict, iterator),
    )
