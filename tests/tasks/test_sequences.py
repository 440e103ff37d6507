"""Tasks of generated sequences: translation and transduction."""

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF

from distill_jax import tasks
from distill_jax.models import from_apply
from distill_jax.report import Entry
from distill_jax.report.document import Table, Text
from distill_jax.train import evaluate_models
from distill_jax.types import SAMPLE

END, START, SIZE, LENGTH = 0, 1, 40, 10
WORDS = [
  "</s>",
  "<s>",
  *(f"word{i}" for i in range(30)),
  "the",
  "Page",
  "is.",
  "a",
  "b",
  ",",
  "c",
  "d",
]
RNG = np.random.default_rng(3)


def decode(ids):
  """Fails for special tokens, which are never to be shown."""
  assert ids.dtype == np.int32 and not {START, END} & set(ids.tolist())
  return " ".join(WORDS[i] for i in ids)


def examples(number=60):
  """Returns targets of 0 to 9 words, the last row without any label; sources are the same."""
  lengths = RNG.integers(0, LENGTH, number)
  lengths[:2] = 0, LENGTH - 1
  inside = np.arange(LENGTH) < lengths[:, None]
  words = RNG.integers(2, SIZE, (number, LENGTH))
  label = np.where(inside, words, np.where(np.arange(LENGTH) == lengths[:, None], END, -1))
  label[-1] = -1
  return {
    "id": np.arange(number) + 100,
    "source": np.where(inside, words, END).astype(np.int32),
    "source_segments": np.where(inside, 0, -1),
    "label": label,
  }


ROWS = examples()


def copies(errors):
  """Returns a toy Model whose logits and text copy the source, but for each `errors`-th token."""

  def written(batch):
    source = batch["source"]
    changed = 2 + (source + 1) % (SIZE - 2)
    places = (jnp.arange(source.size).reshape(source.shape) % errors == errors - 1) & (
      source != END
    )
    return jnp.where(places, changed, source)

  def apply(w, source):
    return {"logits": w * (written({"source": source})[..., None] == jnp.arange(SIZE))}

  def sample(variables, key, batch):
    tokens = written(batch)
    return tokens, (batch["source_segments"] >= 0).sum(1)

  return from_apply(None, apply, variables=jnp.float32(5), inputs="source")._replace(sample=sample)


def measured(task, *models):
  """Evaluates models on 20 batches of 3 rows, with a row of padding each."""
  batches = []
  for i in range(0, len(ROWS["id"]), 3):
    batch = {name: np.concatenate([x[i : i + 3], x[:1]]) for name, x in ROWS.items()}
    batches.append(batch | {"where": np.array([True, True, True, False])})
  trained = [(model, model.variables) for model in models]
  return evaluate_models(trained, batches, task, predict=True, leave_out=True, teacher=trained[0])


def entries(evaluated):
  roles = ("teacher", "baseline", "student")
  return [
    Entry(role, 0, one.scores, {}, [], predictions=one.predictions, leave_out=one.leave_out)
    for role, one in zip(roles, evaluated)
  ]


def shown(blocks):
  """Returns the cells of all tables, and the paragraphs."""
  tables = [block for block in blocks if isinstance(block, Table)]
  return tables, [block.text for block in blocks if isinstance(block, Text)]


def texts(rows):
  return [" ".join(WORDS[i] for i in row if i not in (-1, END)) for row in rows]


@pytest.fixture(scope="module")
def translated():
  task = tasks.translation(decode, end_token=END)
  return task, measured(task, copies(10**6), copies(3), copies(5))


def test_bleu_and_chrf_are_sacrebleus(translated):
  task, evaluated = translated
  true = texts(ROWS["label"][:-1])
  for one in evaluated:
    text = texts(one.predictions["tokens"])[:-1]
    assert one.scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(text, [true]).score, abs=1e-9)
    assert one.scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(text, [true]).score, abs=1e-9)
    part = [i for i in range(len(text)) if i // 3 != 7]  # Without batch 7.
    expected = BLEU().corpus_score([text[i] for i in part], [[true[i] for i in part]]).score
    assert one.leave_out["bleu"][7] == pytest.approx(expected, abs=1e-9)
  assert "" in true and "" in text and evaluated[0].scores["bleu"] == pytest.approx(100)
  assert evaluated[1].scores["bleu"] < evaluated[2].scores["bleu"] < 90
  assert {"nll", "accuracy", "agreement", "perplexity"} <= set(evaluated[1].scores)
  assert [metric.name for metric in task.metrics][:4] == ["bleu", "chrf", "nll", "accuracy"]


def test_report_of_a_translation(translated):
  task, evaluated = translated
  references = {name: ROWS[name] for name in ("id", "source", "source_segments")}
  tables, paragraphs = shown(task.figures(entries(evaluated), references, ()))
  assert len(tables) == 8 and len(set(paragraphs)) == 10
  for table in tables:
    names = [row[0] for row in table.rows]
    assert names == ["Source", "Reference", "Teacher", "Baseline", "Distilled"]
    by_name = {row[0]: row[1] for row in table.rows}
    assert by_name["Source"] == by_name["Reference"] == by_name["Teacher"]
  assert "largest gain" in paragraphs[1] and "worst" in paragraphs[8]
  bleu, chrf = BLEU(), CHRF()
  for metric in (bleu, chrf):
    metric.corpus_score(["a"], [["a"]])
    assert str(metric.get_signature()) in paragraphs[-1]


def test_references_are_the_original_texts_by_id(translated):
  _, evaluated = translated
  predictions = evaluated[1].predictions
  original = {i: f"Original text {i}, word3" for i in range(100, 160)}
  task = tasks.translation(decode, end_token=END, references=original)
  scores = task.evaluate_predictions(predictions, {"id": ROWS["id"]})
  text = texts(predictions["tokens"])[:-1]
  expected = sacrebleu.corpus_chrf(text, [list(original.values())[:-1]]).score
  assert scores["chrf"] == pytest.approx(expected, abs=1e-9)
  with pytest.raises(ValueError, match="references"):
    task.evaluate_predictions(predictions, {"id": ROWS["id"] + 1000})


def test_symbols_match_jiwer(translated):
  task = tasks.transduction(decode, end_token=END, symbol="phone", decode_source=decode)
  _, evaluated = translated  # Networks predict the same for both tasks.
  true = texts(ROWS["label"][:-1])
  for one in evaluated:
    text = texts(one.predictions["tokens"])[:-1]
    scores = task.evaluate_predictions(one.predictions, {})
    assert scores["error_rate"] == pytest.approx(jiwer.wer(true, text))
    assert scores["exact"] == pytest.approx(np.mean([a == b for a, b in zip(true, text)]))
  assert 0 < scores["exact"] < task.evaluate_predictions(evaluated[0].predictions, {})["exact"] == 1
  references = {name: ROWS[name] for name in ("id", "source", "source_segments")}
  tables, paragraphs = shown(task.figures(entries(evaluated), references, ()))
  assert len(tables) == 8 and "phone error rate" in paragraphs[0]
  ratios = [float(row[2].rstrip("%")) for row in tables[-1].rows[2:]]
  assert ratios[0] == 0 and ratios[2] > 0


@pytest.mark.parametrize("make", [tasks.transduction, tasks.translation])
def test_ends_of_texts(make):
  task = make(decode, end_token=END)
  tokens = jnp.array([[2, 3, END], [2, 3, 4], [END, 5, 5], [9, 9, 9]])
  label = jnp.array([[2, 3, END], [2, 3, 4], [END, -1, -1], [-5, -1, -1]])
  outputs = {SAMPLE: (tokens, jnp.array([3, 3, 3, 3]))}  # A sampler that counts the end token.
  predictions = task.predict(outputs, {"label": label})
  scores = task.evaluate_predictions(predictions, {})
  # The label that is cut off has no end; the last row has no label.
  assert scores.get("exact", 1) == 1 and scores.get("error_rate", 0) == 0
  none = {"tokens": np.full((2, 3), -1), "label": np.full((2, 3), -1)}
  assert task.evaluate_predictions(none, {}) == {}
  empty = none | {"label": np.array([[END, -1, -1]] * 2)}
  assert "error_rate" not in task.evaluate_predictions(empty, {})
  with pytest.raises(ValueError, match="end_token"):
    make(decode, end_token=39).evaluate_predictions(predictions, {})
  with pytest.raises(ValueError, match="decides.*nll"):
    make(decode, end_token=END, decides="nl")
  assert make(decode, end_token=END, decides="nll").decides == "nll"


def test_a_teacher_of_another_vocabulary_is_not_compared():
  task = tasks.translation(decode, end_token=END)
  batch = {"label": jnp.zeros((3, LENGTH), int)}
  student, other = ({"logits": jnp.zeros((3, LENGTH, size))} for size in (SIZE, SIZE + 7))
  sums = [jax.eval_shape(task.statistics, student, batch, x) for x in (student, other)]
  assert ["agreement" in x for x in sums] == [True, False]
