"""The parts of a report that show tags: scores of classes, and sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import report, tasks
from distill_jax.report import style
from distill_jax.report.document import Code, Heading, Numbers, Table
from distill_jax.tasks._class_figures.tags import _columns

NAMES = ("noun", "verb", "other")
SKILL = {"teacher": 0.95, "baseline": 0.5, "student": 0.8}


def make_entry(task, role, seed, label):
  rng = np.random.default_rng(10 * seed + len(role))
  predicted = np.where(
    rng.random(label.shape) < SKILL[role], label, rng.integers(0, 3, label.shape)
  )
  logits = 5 * jnp.eye(3)[predicted]
  batch = {"label": jnp.asarray(label)}
  sums = jax.device_get(task.statistics({"logits": logits}, batch, None))
  predictions = {k: np.asarray(x) for k, x in task.predict({"logits": logits}, batch).items()}
  return report.Entry(role, seed, task.compute(sums), {}, [], "", sums, predictions)


@pytest.mark.parametrize("with_words", [True, False])
def test_report_has_scores_of_classes_and_sentences(with_words):
  label = np.random.default_rng(0).integers(0, 3, (8, 5)).astype(np.int32)
  label[:, 3] = -1
  words = ("the", "cat", "sat", "##ting", "down")
  task = tasks.tagging(class_names=NAMES, decode=lambda ids: [words[i] for i in ids])
  entries = [make_entry(task, role, seed, label) for role in SKILL for seed in (0, 1)]
  references = {"id": np.arange(8) + 50} | (
    {"tokens": np.tile(np.arange(5), (8, 1))} if with_words else {}
  )
  with style.context():
    blocks = task.figures(entries, references, ())
  headings = [block.text for block in blocks if isinstance(block, Heading)]
  assert headings == ["Scores by class", "Calibration", "Examples"]
  (numbers,) = [block for block in blocks if isinstance(block, Numbers)]
  assert [one["tokens"] for one in numbers.values] == [(label == c).sum() for c in range(3)]
  (table,) = [block for block in blocks if isinstance(block, Table)]
  titles = [row[0].removeprefix("Test ") for row in table.rows[1:]]
  assert titles == [f"F1 of {name}, % ↑" for name in NAMES]
  examples = [block.text.splitlines() for block in blocks if isinstance(block, Code)]
  assert len(examples) == 6
  for title, *lines in examples:
    row = int(title.split()[1].rstrip(":")) - 50
    if with_words:
      assert lines.pop(0).split() == ["the", "cat", "sat", "down"]  # A sub-word has no tag.
    counted = label[row] >= 0
    assert lines[0].split() == ["Label", *(NAMES[c] for c in label[row][counted])]
    shown = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    predicted = entries[-2].predictions["class"][row][counted]  # the student of the first seed
    assert shown["Distilled"] == [
      "·" if p == y else NAMES[p] for p, y in zip(predicted, label[row][counted])
    ]


def test_long_sentences_are_broken_into_lines():
  items = {"": ["word" * 4] * 12, "Label": ["noun"] * 12}
  lines = _columns(items)
  assert max(map(len, lines)) <= 88 and len(lines) == 2 * 3
  assert [word for line in lines[::2] for word in line.split()] == items[""]
