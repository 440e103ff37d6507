"""Pseudo labels of a CTC teacher: no start and end tokens, rows that are empty, a WER filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import cache, data, objectives
from distill_jax.cache.sequence_level import (
  below,
  nth_best,
  pseudo_label_figures,
  word_error_rate,
)
from distill_jax.models import from_apply
from distill_jax.models.decoding import ctc_nbest

BLANK, CLASSES, FRAMES, WIDTH = 0, 5, 8, 4
LETTERS = "_ab c"
TEXTS = ["ab", "a b", "", "cab a", "b c", "aa", "c", "abc"]


def ids_of(text):
  return [LETTERS.index(c) for c in text]


def decode(tokens):
  if tokens == [BLANK]:  # a transcript of silence
    return ""
  assert BLANK not in tokens
  return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def source():
  """Returns frames that say TEXTS, and references: the texts, but of row 4 another, and none."""
  path = np.zeros((len(TEXTS), FRAMES), int)
  label = np.full((len(TEXTS), WIDTH), data.UNLABELED)
  for row, text in enumerate(TEXTS):
    separate = text == "aa"
    ids = [x for token in ids_of(text) for x in ([token, BLANK] if separate else [token])]
    path[row, : len(ids)] = ids
    label[row, : len(text)] = ids_of(text)[:WIDTH]
  label[2] = BLANK
  label[4, :3] = ids_of("c a")
  label[3] = ids_of("cab ")
  arrays = {
    "id": np.arange(len(TEXTS)) * 3,
    "features": np.float32(6 * (path[..., None] == np.arange(CLASSES))),
    "frames": np.full(len(TEXTS), FRAMES, np.int32),
    "label": label,
  }
  return data.Source(arrays, CLASSES, name="toy", ignore_label=data.UNLABELED)


@pytest.fixture(scope="module")
def teacher():
  def apply(w, features, frames):
    return {"logits": w * features, "lengths": frames}

  return from_apply(None, apply, variables=jnp.float32(1), inputs=("features", "frames"))


@pytest.fixture(scope="module")
def beam(teacher):
  return jax.jit(ctc_nbest(teacher, beam_size=4))


def written(url, beam, teacher, source, **options):
  options = dict(start_token=None, end_token=None, settings={"beam_size": 4}) | options
  return cache.seq_kd(url, beam, teacher.variables, source, batch_size=8, progress=False, **options)


def texts(labels):
  rows = zip(labels.ids.tolist(), labels.arrays["label"])
  return {id: decode(row[row >= 0].tolist()) for id, row in rows}


def test_labels_are_the_teachers_best_sequences(tmp_path, beam, teacher, source):
  labels = written(tmp_path, beam, teacher, source, keep=nth_best(0))
  # Row 2 is silent, and row 3 has five tokens, more than the source's labels.
  assert texts(labels) == {0: "ab", 3: "a b", 6: "", 12: "b c", 15: "aa", 18: "c", 21: "abc"}
  assert labels.arrays["label"][2].tolist() == [BLANK, -1, -1, -1]
  assert labels.arrays["label"].shape == (7, WIDTH) and "tokens" not in labels.arrays
  figures = pseudo_label_figures(tmp_path)
  dropped = [figures["dropped"][name] for name in ("empty", "too long")]
  assert (figures["rows"], figures["kept"], sum(dropped)) == (8, 7, 0)
  # The file is opened as it is, and other choices read the same sequences.
  again = cache.pseudo_labels(tmp_path, source)
  np.testing.assert_array_equal(again.arrays["label"], labels.arrays["label"])
  second = texts(cache.pseudo_labels(tmp_path, source, keep=nth_best(1)))
  assert all(second[id] != text for id, text in texts(labels).items() if id in second)
  rules = [nth_best(0), below(word_error_rate(decode), 0.3)]
  filtered = cache.pseudo_labels(tmp_path, source, keep=rules)
  assert texts(filtered) == {0: "ab", 3: "a b", 6: "", 15: "aa", 18: "c", 21: "abc"}


def test_filter_is_stored_and_labels_train(tmp_path, beam, teacher, source):
  labels = written(
    tmp_path, beam, teacher, source, keep=[nth_best(0), below(word_error_rate(decode), 0.3)]
  )
  assert 12 not in labels.ids
  assert cache.pseudo_labels(tmp_path, source).ids.tolist() == labels.ids.tolist()
  student = {"logits": 3 * labels.arrays["features"], "lengths": labels.arrays["frames"]}
  batch = {"label": jnp.asarray(labels.arrays["label"])}
  term = objectives.ctc()
  loss = jax.jit(lambda *x: term.apply({}, {}, x[0], {}, x[1], step=0, key=None)[0])
  values, where = loss(student, batch)
  assert where.all() and (values < 0.1).all()


def test_a_stopped_writer_resumes(tmp_path, beam, teacher, source):
  def interrupted(variables, batch):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    written(tmp_path / "a", interrupted, teacher, source)
  with pytest.raises(cache.Mismatch, match="blank"):
    written(tmp_path / "b", beam, teacher, source)
    written(tmp_path / "b", beam, teacher, source, blank=1)
  assert len(written(tmp_path / "a", beam, teacher, source)) == 8


def test_empty_references_and_missing_ones(tmp_path, beam, teacher, source):
  arrays = dict(source.arrays)
  arrays["label"] = np.where(np.arange(8)[:, None] == 0, BLANK, arrays["label"])
  score = below(word_error_rate(decode), 0.3)
  written(tmp_path, beam, teacher, source)
  empty = data.Source(arrays, CLASSES, name="toy", ignore_label=data.UNLABELED)
  assert 0 not in cache.pseudo_labels(tmp_path, empty, keep=score).ids  # its WER is 1
  arrays["label"] = np.where(np.arange(8)[:, None] == 0, -1, arrays["label"])
  missing = data.Source(arrays, CLASSES, name="toy", ignore_label=data.UNLABELED)
  with pytest.raises(ValueError, match="label"):
    cache.pseudo_labels(tmp_path, missing, keep=score)


@pytest.mark.parametrize(
  "field, options, tokens",
  [
    ("lengths", {}, [1, 0]),  # the blank inside
    ("tokens", {}, [1, CLASSES]),
    ("blank", {"blank": CLASSES}, [1, 2]),
    ("end_token", {"start_token": 1}, [1, 2]),
  ],
)
def test_errors(tmp_path, teacher, source, field, options, tokens):
  def sample(variables, key, batch):
    rows = len(batch["id"])
    return np.tile(tokens, (rows, 1)), np.full(rows, 2)

  with pytest.raises(ValueError, match=field):
    written(tmp_path, sample, teacher, source, **options)
