"""`fit` stops where evaluations bring nothing, at the same step after any resume, and says why."""

import itertools
import json

import pytest
from test_loop import run, source

from distill_jax import data, tasks
from distill_jax.storage import sealed_json
from distill_jax.train.stopping import Patience
from distill_jax.types import Metric

ACCURACY = Metric("accuracy", "accuracy")
NAN = float("nan")


def scored(*scores):
  """Returns a classification whose accuracies are `scores`, after one for a check on zeros."""
  plain, accuracies = tasks.classification(), itertools.chain([0.0], scores)
  return plain._replace(compute=lambda sums: plain.compute(sums) | {"accuracy": next(accuracies)})


def stopped_after(scores, limit, metric=ACCURACY, stored_after=None):
  """Returns after how many evaluations a run stops, which may be stored and resumed in between."""
  patience = Patience(metric, limit, {})
  for number, score in enumerate(scores, 1):
    patience.update(number, {metric.name: score})
    if number == stored_after:
      patience = Patience(metric, limit, json.loads(json.dumps(patience.notes())))
    if patience.stop_reason():
      return number
  return None


@pytest.mark.parametrize(
  ("scores", "limit", "expected"),
  [
    ([0.5, 0.5, 0.5], 2, 3),
    ([0.5, 0.4, 0.6, 0.6, 0.5], 2, 5),
    ([0.1, 0.2, 0.3], 1, None),
    ([0.5, NAN, 0.4], 2, 3),
    ([NAN, NAN, 0.4], 2, 2),
    ([NAN, 0.1, 0.0, 0.2, NAN], 2, None),
    ([0.5, 0.5, 0.5], None, None),
  ],
)
def test_patience_counts_evaluations_without_a_better_score(scores, limit, expected):
  losses = [-score for score in scores]
  loss = Metric("loss", "loss", better="min")
  for stored_after in (None, *range(1, len(scores))):
    assert stopped_after(scores, limit, stored_after=stored_after) == expected
    assert stopped_after(losses, limit, loss, stored_after) == expected


def test_patience_of_another_metric_begins_again():
  patience = Patience(ACCURACY, 1, {"metric": "f1", "score": 0.9, "step": 5, "count": 3})
  assert not patience.stop_reason()
  patience.update(10, {"accuracy": 0.1})
  assert not patience.stop_reason()


def test_run_that_was_killed_stops_where_an_undisturbed_one_does(tmp_path, capsys):
  every = {"steps": 40, "patience": 3, "checkpoint_every": 9, "eval_every": 5}

  def killed(start):
    yield from itertools.islice(data.batches(source(), 16, seed=0, start=start), 19 - start)
    raise OSError

  named = lambda start: data.batches(source(), 16, seed=0, start=start)  # noqa: E731
  killed.identity = named.identity = "toy"
  with pytest.raises(OSError):
    run(tmp_path, source=killed, task=scored(0.25, 0.5, 0.25), **every)
  (tmp_path / "metrics.jsonl").unlink()
  # The best is that of step 10; 15, 20 and 25 are no better.
  result = run(tmp_path, source=named, task=scored(0.5, 0.0), progress=True, **every)
  assert int(result.state.step) == 25
  assert "accuracy" in result.stop_reason and "step 10" in result.stop_reason
  output = capsys.readouterr().out
  assert "after step 18 of 40" in output and f"after step 25: {result.stop_reason}" in output
  stop = {"step": 25, "phase": "stop", "reason": result.stop_reason}
  assert result.history[-1] == stop
  again = run(tmp_path, source=named, task=scored(), progress=True, **every)
  assert again.history.count(stop) == 1 and sealed_json.read_lines(tmp_path / "metrics.jsonl")
  assert again.stop_reason == result.stop_reason and again.history == result.history
  assert "resuming" not in capsys.readouterr().out
  more = run(tmp_path, source=named, task=scored(0.75), **every | {"steps": 30, "patience": 4})
  assert int(more.state.step) == 30 and not more.stop_reason


def test_patience_that_cannot_stop_before_the_last_step_warns():
  with pytest.warns(UserWarning, match="^patience: expected at least 3 evaluations"):
    result = run(steps=10, patience=1, task=scored(0.5, 0.5))
  assert int(result.state.step) == 10 and not result.stop_reason
