"""Spans against all pairs of positions and SQuAD's definition; bad input; the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import report, tasks
from distill_jax.report.document import Heading, Table
from distill_jax.tasks._spans import text_scores

LENGTH = 12


def passages(rng, rows):
  """Returns 'inside' [B, L]: [CLS], a question, the passage, padding."""
  position = np.arange(LENGTH)
  first = rng.integers(2, 5, (rows, 1))
  last = rng.integers(7, LENGTH, (rows, 1))
  return (position >= first) & (position <= last)


def best_of(start, end, inside, max_length):
  """Returns the best span of one row, of all pairs."""
  pairs = [
    (start[i] + end[j], -i, -j)
    for i in range(LENGTH)
    for j in range(i, min(i + max_length, LENGTH))
    if inside[i] and inside[j]
  ]
  score, i, j = max(pairs)
  return (0, 0) if not inside[0] and start[0] + end[0] > score else (-i, -j)


def example(rng, rows=16):
  """Returns logits and labels; every fourth question has no answer."""
  inside = passages(rng, rows)
  start, end = (rng.normal(size=(rows, LENGTH)).astype(np.float32) for _ in range(2))
  first = inside.argmax(1) + rng.integers(0, 3, rows)
  last = first + rng.integers(0, 2, rows)
  first[::4] = last[::4] = 0
  start[np.arange(rows), first] += rng.choice([0, 5], rows)
  end[np.arange(rows), last] += rng.choice([0, 5], rows)
  start[:, -1] = np.where(inside[:, -1], start[:, -1], np.nan)  # padding may hold anything
  labels = {"start": first.astype(np.int32), "end": last.astype(np.int32)}
  return {"start": start, "end": end}, labels | {"inside": inside}


def measured(task, outputs, batch, teacher=None):
  """Returns the scores, and the rows that the host gets."""
  arrays = jax.tree.map(jnp.asarray, (outputs, batch, teacher))
  scores = task.compute(jax.device_get(jax.jit(task.statistics)(*arrays)))
  rows = jax.device_get(jax.jit(task.predict)(*arrays[:2]))
  where = batch.get("where", np.ones(len(rows["f1"]), bool))
  rows = {name: x[where] for name, x in rows.items()}
  if task.evaluate_predictions is not None:
    references = {name: batch[name][where] for name in task.references}
    scores = scores | task.evaluate_predictions(rows, references)
  return scores, rows


@pytest.mark.parametrize("max_length", [1, 3, 30])
def test_scores_equal_those_of_all_pairs(rng, max_length):
  outputs, batch = example(rng)
  teacher, _ = example(rng)
  batch["where"] = np.arange(16) < 14
  batch["start"][15] = 99  # padding of the batch
  batch["start"][13] = -1  # no label
  task = tasks.spans(inside="inside", max_length=max_length)
  scores, _ = measured(task, outputs, batch, teacher)
  best, other = (
    [best_of(x["start"][i], x["end"][i], batch["inside"][i], max_length) for i in range(14)]
    for x in (outputs, teacher)
  )
  true = [(batch["start"][i], batch["end"][i]) for i in range(13)]
  tokens = [[set(range(a, b + 1)) for a, b in spans] for spans in (best[:13], true)]
  f1 = np.array([2 * len(p & t) / (len(p) + len(t)) for p, t in zip(*tokens)])
  has_answer = np.array([pair != (0, 0) for pair in true])
  assert scores["f1"] == pytest.approx(f1.mean(), rel=1e-5)
  assert scores["exact"] == pytest.approx(np.mean([p == t for p, t in zip(best, true)]))
  assert scores["answerable_f1"] == pytest.approx(f1[has_answer].mean(), rel=1e-5)
  assert scores["no_answer"] == pytest.approx(f1[~has_answer].mean(), rel=1e-5)
  assert scores["agreement"] == pytest.approx(np.mean([p == t for p, t in zip(best, other)]))


WORDS = ("[CLS]", "who", "?", "The", "Eiffel", "tower", ",", "a", "tower", "in", "Paris", "[PAD]")


def decode(ids):
  return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
  ("predicted", "true", "exact", "f1"),
  [
    ("The Eiffel tower,", "eiffel Tower", 1, 1),
    ("a tower", "the tower tower", 0, 2 / 3),
    ("Paris", "", 0, 0),
    ("", "", 1, 1),
    ("the", "", 1, 1),  # SQuAD's script leaves articles out
    ("in Paris", "Eiffel tower", 0, 0),
  ],
)
def test_scores_of_text_are_those_of_squad(predicted, true, exact, f1):
  assert text_scores(predicted, true) == (exact, pytest.approx(f1))


def test_same_words_elsewhere_are_right_with_text():
  logits = np.zeros((2, LENGTH), np.float32)
  ends = logits.copy()
  logits[0, 7], ends[0, 8] = 9, 9  # 'a tower'; the label is the other 'tower'
  logits[1, 0], ends[1, 0] = 9, 9
  outputs = {"start": logits, "end": ends}
  inside = np.tile((np.arange(LENGTH) >= 3) & (np.arange(LENGTH) < 11), (2, 1))
  batch = {"start": np.int32([5, 0]), "end": np.int32([5, 0]), "inside": inside}
  batch["tokens"] = np.tile(np.arange(LENGTH), (2, 1))
  assert measured(tasks.spans(inside="inside"), outputs, batch)[0]["exact"] == 0.5
  scores, _ = measured(tasks.spans(inside="inside", decode=decode), outputs, batch)
  expected = dict.fromkeys(("exact", "f1", "answerable_f1", "no_answer"), 1.0)
  assert scores == pytest.approx(expected)


@pytest.mark.parametrize(
  ("start", "end"),
  [(5, 4), (4, 11), (1, 5), (0, 4), (4, 12)],  # reversed, padding, question, [CLS], no position
)
def test_label_outside_of_the_passage_is_named(start, end):
  inside = (np.arange(LENGTH) >= 3) & (np.arange(LENGTH) < 10)
  batch = {"start": np.int32([start]), "end": np.int32([end]), "inside": inside[None]}
  outputs = dict.fromkeys(("start", "end"), np.zeros((1, LENGTH), np.float32))
  with pytest.raises(ValueError, match="^label"):
    measured(tasks.spans(inside="inside"), outputs, batch)


@pytest.mark.parametrize("has_text", [False, True])
def test_rows_without_tokens_labels_or_numbers(has_text):
  """A mask that hides everything leaves no answer; NaN inside makes scores NaN."""
  task = tasks.spans(inside="inside", decode=decode if has_text else None)
  outputs = {name: np.zeros((1, LENGTH), np.float32) for name in ("start", "end")}
  batch = {"inside": np.zeros((1, LENGTH), bool), "tokens": np.arange(LENGTH)[None]}
  batch |= {"start": np.int32([0]), "end": np.int32([0])}
  assert measured(task, outputs, batch)[0]["no_answer"] == 1
  unlabeled = batch | {"start": np.int32([-1]), "end": np.int32([-1])}
  assert measured(task, outputs, unlabeled)[0] == {}
  outputs["end"][0, 4] = np.nan
  assert measured(task, outputs, batch)[0]["f1"] == 1
  batch["inside"][0, 4] = True
  assert np.isnan(measured(task, outputs, batch)[0]["f1"])


@pytest.mark.parametrize(
  ("outputs", "change", "field"),
  [
    ({"start": (2, 4, 2), "end": (2, 4, 2)}, {}, "'start', 'end'"),
    ({"start": (2, 4), "end": (2, 5)}, {}, "'start', 'end'"),
    ({"start": (2, 4), "end": (2, 4)}, {"inside": np.ones((2, 4), int)}, "inside"),
    ({"start": (2, 4), "end": (2, 4)}, {"end": np.zeros((2, 4), int)}, "end"),
  ],
)
def test_shapes_that_do_not_fit_are_named(outputs, change, field):
  batch = {"start": np.zeros(2, int), "end": np.zeros(2, int), "inside": np.ones((2, 4), bool)}
  outputs = {name: jnp.zeros(shape) for name, shape in outputs.items()}
  with pytest.raises(ValueError, match=f"^{field}: "):
    tasks.spans(inside="inside").statistics(outputs, batch | change, None)


def test_report_shows_answers(rng):
  task = tasks.spans(inside="inside", decode=decode)
  entries, (_, batch) = [], example(rng)
  batch["tokens"] = np.tile(np.arange(LENGTH), (16, 1))
  for role in ("teacher", "baseline", "student"):
    outputs, _ = example(rng)
    scores, rows = measured(task, outputs, batch)
    entries.append(report.Entry(role, 0, scores, {}, [], "", {}, rows))
  heading, _, table = task.figures(entries, batch | {"id": np.arange(16) + 50}, ())
  assert isinstance(heading, Heading) and isinstance(table, Table) and len(table.rows) == 6
  for title, *texts in table.rows:
    row = int(title.split(":")[0]) - 50
    spans = [
      (rows[f"{prefix}start"][row], rows[f"{prefix}end"][row])
      for rows, prefix in [(entries[0].predictions, "true_")]
      + [(entry.predictions, "") for entry in entries]
    ]
    assert texts == ["(no answer)" if a < 0 else " ".join(WORDS[a : b + 1]) for a, b in spans]
