"""Tests rows of sentences, pairs and labeled words, and batches of similar length."""

import itertools
import json

import numpy as np
import optax
import pytest

from distill_jax import data, objectives, tasks
from distill_jax.data import text
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_checks import check_texts
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.train import fit

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "."]
VOCABULARY += ["[", "]", "mask", "Cat"]
SEP, CLS = VOCABULARY.index("[SEP]"), VOCABULARY.index("[CLS]")


@pytest.fixture
def vocabulary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join(VOCABULARY))
  return path


def spell(rows):
  return [" ".join(VOCABULARY[t] for t in row[row != 0]) for row in rows["tokens"]]


def test_vocabulary_and_released_file_give_the_same_rows(vocabulary, tmp_path):
  tokenizer = text.sentence_tokenizer(vocabulary)
  saved = json.loads(tokenizer.tokenizer.to_str())
  # As released files have them.
  saved["truncation"] = {
    "max_length": 3,
    "strategy": "LongestFirst",
    "stride": 0,
    "direction": "Right",
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
  released = text.sentence_tokenizer(tmp_path)
  assert released.identity == tokenizer.identity and released.size == len(VOCABULARY)
  texts = ["The cats sat.", "[MASK] Thé dog", "."]
  rows = [t.rows(texts, length=8) for t in (tokenizer, released)]
  for name in rows[0]:
    np.testing.assert_array_equal(*(r[name] for r in rows))
    assert rows[0][name].dtype == np.int32
  expected = ["[CLS] the cat ##s sat . [SEP]", "[CLS] [ mask ] the [UNK] [SEP]", "[CLS] . [SEP]"]
  assert spell(rows[0]) == expected
  np.testing.assert_array_equal(rows[0]["segments"], (rows[0]["tokens"] != 0) - 1)


def test_case_counts_where_it_is_told_to(vocabulary):
  tokenizer = text.sentence_tokenizer(vocabulary, lowercase=False)
  assert spell(tokenizer.rows(["the Cat"], length=4)) == ["[CLS] the Cat [SEP]"]


def test_pairs_have_types_and_are_cut_longest_first(vocabulary):
  rows = text.sentence_tokenizer(vocabulary).rows(
    ["the cat sat", "cat"], ["the", "sat ."], length=7
  )
  assert spell(rows) == ["[CLS] the cat sat [SEP] the [SEP]", "[CLS] cat [SEP] sat . [SEP]"]
  np.testing.assert_array_equal(rows["token_types"], [[0] * 5 + [1] * 2, [0] * 3 + [1] * 3 + [0]])
  short = text.sentence_tokenizer(vocabulary).rows(["the cat sat"], ["the"], length=6)
  assert spell(short) == ["[CLS] the cat [SEP] the [SEP]"]


def test_labels_of_words_are_at_their_first_tokens(vocabulary):
  tokenizer = text.sentence_tokenizer(vocabulary)
  words, labels = [["cats", "the", "cats"], ["sat"]], [[3, 1, 2], [0]]
  rows = tokenizer.word_rows(words, labels, length=6)
  assert spell(rows)[0] == "[CLS] cat ##s the cat [SEP]"
  np.testing.assert_array_equal(rows["label"], [[-1, 3, -1, 1, 2, -1], [-1, 0, -1, -1, -1, -1]])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda t: t.rows([], length=8), "^texts: .*none"),
    (lambda t: t.rows("cat", length=8), "^texts: .*one text"),
    (lambda t: t.rows(["cat", " "], length=8), "^texts: .*row 1"),
    (lambda t: t.rows([b"cat"], length=8), "^texts: .*bytes"),
    (lambda t: t.rows(["cat"], ["the", "cat"], length=8), "^pairs"),
    (lambda t: t.rows(["cat"], ["the"], length=4), "^length"),
    (lambda t: t.word_rows([["cat"]], [[1, 2]], length=8), "^labels: .*row 0"),
    (lambda t: t.word_rows([["cat"]], [], length=8), "^labels"),
    (lambda t: text.sentence_tokenizer(__file__), "^source"),
  ],
)
def test_invalid_texts_raise(call, message, vocabulary):
  with pytest.raises(ValueError, match=message):
    call(text.sentence_tokenizer(vocabulary))


def texts(sizes):
  """Returns a source of texts with these numbers of tokens, each token its row's number."""
  segments = np.where(np.arange(12) < np.array(sizes)[:, None], 0, -1)
  tokens = np.where(segments < 0, 0, np.arange(len(sizes))[:, None])
  arrays = {"tokens": tokens, "segments": segments, "score": np.ones((len(sizes), 12), np.float32)}
  return data.Source(arrays | {"label": np.arange(len(sizes)) % 2}, classes=2)


SIZES = [2, 4, 3, 12, 7, 8, 5, 1, 9, 4, 4, 6, 2]


def test_batches_have_the_first_length_that_holds_them():
  buckets = text.LengthBuckets(texts(SIZES), 3, seed=1, lengths=(4, 8, 12))
  assert buckets.steps_per_epoch == 4
  epochs = [list(itertools.islice(buckets(start), 4)) for start in (0, 4)]
  for epoch, batches in enumerate(epochs):
    ids = np.concatenate([b["id"] for b in batches])
    assert len(set(ids)) == len(ids) == 12
    for batch in batches:
      longest = max(SIZES[i] for i in batch["id"])
      length = min(n for n in (4, 8, 12) if n >= longest)
      assert batch["tokens"].shape == batch["segments"].shape == (3, length)
      assert batch["score"].shape == (3, 12) and (batch["view"] == epoch).all()
      np.testing.assert_array_equal(
        (batch["segments"] >= 0).sum(1), [SIZES[i] for i in batch["id"]]
      )
    lengths = [b["tokens"].shape[1] for b in batches]
    assert sorted(lengths) in ([4, 4, 8, 12], [4, 8, 8, 12])
  assert [b["id"].tolist() for b in epochs[0]] != [b["id"].tolist() for b in epochs[1]]


def test_batches_are_a_function_of_the_step_and_split_over_processes():
  buckets = text.LengthBuckets(texts(SIZES), 4, seed=2, lengths=(4, 12))
  batches = list(itertools.islice(buckets(0), 7))
  parts = [buckets.for_rows(rows)(5) for rows in (np.arange(2), np.arange(2, 4))]
  for expected, first, second in zip(batches[5:], *parts):
    for name, value in expected.items():
      np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), value)


def test_evaluation_batches_are_cut():
  batch = text.cut_padding(dict(texts([2, 3]).arrays), (4, 12))
  shapes = {name: x.shape for name, x in batch.items()}
  row = {"tokens": (2, 4), "segments": (2, 4)}
  assert shapes == row | {"id": (2,), "label": (2,), "score": (2, 12)}


@pytest.mark.parametrize(
  "lengths, message",
  [((), "none"), ((8, 4), "rise"), ((0, 12), "lengths"), ((4, 8), "12 tokens of example id 3")],
)
def test_invalid_lengths_raise(lengths, message):
  with pytest.raises(ValueError, match=f"^lengths: .*{message}|^{message}"):
    text.LengthBuckets(texts(SIZES), 3, seed=1, lengths=lengths)


def test_student_trains_on_batches_of_several_lengths():
  source = texts(2 * SIZES)
  config = EncoderConfig(26, 4, 1, 2, max_length=12, head="sequence", num_labels=2)
  student = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=("tokens", "segments"))
  buckets = text.LengthBuckets(source, 8, seed=0, lengths=(4, 12))
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  check_texts(source.arrays, config)
  task = tasks.classification()
  result = fit(student, None, objective, optax.sgd(0.1), buckets, steps=3, batch_size=8, task=task)
  assert int(result.state.step) == 3


CONFIG = EncoderConfig(9, 4, 1, 2, max_length=6)
GOOD = {
  "tokens": np.array([[2, 8, 0], [2, 5, 3]]),
  "segments": np.array([[0, 0, -1], [0, 0, 0]]),
  "token_types": np.array([[0, 1, 0], [0, 0, 1]]),
  "label": np.array([[-1, 3, -1], [-1, 0, -1]]),
  "id": np.array([40, 41]),
}


def changed(name, index, value):
  values = GOOD[name].copy()
  values[index] = value
  return {name: values}


@pytest.mark.parametrize(
  "change, message",
  [
    (changed("tokens", (1, 1), 9), "^tokens: .*got 9 in example id 41"),
    (changed("tokens", (0, 0), -1), "^tokens: .*got -1 in example id 40"),
    ({"tokens": np.zeros((2, 7), int)}, "^tokens: .*6 positions"),
    ({"tokens": np.zeros((2, 3))}, "^tokens: .*integers"),
    (changed("token_types", (1, 2), 2), "^token_types: .*got 2 in example id 41"),
    (changed("segments", 0, -1), "^segments: .*example id 40"),
    (changed("label", (0, 2), 1), "^label: .*example id 40"),
  ],
)
def test_texts_that_an_encoder_cannot_read_raise(change, message):
  check_texts(GOOD, CONFIG)
  with pytest.raises(ValueError, match=message):
    check_texts(GOOD | change, CONFIG)


@pytest.mark.parametrize("vocab_size, fits", [(14, True), (64, True), (13, False), (142, False)])
def test_tokenizer_of_another_vocabulary_raises(vocab_size, fits, vocabulary):
  tokenizer = text.sentence_tokenizer(vocabulary)
  assert tokenizer.size == 14
  config = EncoderConfig(vocab_size, 4, 1, 2)
  arrays = tokenizer.rows(["the cat"], length=5)
  if fits:
    check_texts(arrays, config, tokenizer)
  else:
    with pytest.raises(ValueError, match="^tokenizer"):
      check_texts(arrays, config, tokenizer)
