"""Checks the functions that choose among a teacher's sequences, and what they compare with."""

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
import sacrebleu
from toy_sequences import END, START, VOCAB, beams, pairs, targets, texts, written

from distill_jax import data
from distill_jax.cache import Mismatch, pseudo_labels
from distill_jax.cache.sequence_level import (
  Candidates,
  at_least,
  backward_cross_entropy,
  below,
  nearest_to_reference,
  nth_best,
  pseudo_label_figures,
  reference_score,
  sentence_bleu,
  without_worst,
  word_error_rate,
)
from distill_jax.cache.sequence_level.selection import select
from distill_jax.models import from_apply
from distill_jax.models.decoding import sequence_log_probs

WORDS = ["", "", *(f"word{token}," for token in range(2, VOCAB))]


def words_of(tokens):
  return " ".join(WORDS[token] for token in tokens)


@pytest.fixture(scope="module")
def rows():
  """Six rows of three sequences, of which some are not usable, and their references."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, 8, (6, 3))
  references = rng.integers(2, 8, (6, 7))
  tokens = np.where(rng.random((6, 3, 7)) < 0.6, references[:, None], rng.integers(2, 8, (6, 3, 7)))
  tokens = np.where(np.arange(7) < lengths[..., None], tokens, END)
  label = np.concatenate([references, np.full((6, 1), END)], 1)
  label[::2, -2:] = END, data.UNLABELED
  usable = np.ones((6, 3), bool)
  usable[2, 0] = usable[3] = False
  arrays = {"label": label, "source": references, "source_segments": np.zeros_like(references)}
  return Candidates(10 + np.arange(6), tokens, lengths, -lengths, usable, arrays, END, START)


def reference_of(rows, row):
  label = rows.arrays["label"][row].tolist()
  return label[: label.index(END)]


@pytest.mark.parametrize("decode", [None, words_of])
def test_scores_equal_those_of_the_libraries(rows, decode):
  as_text = decode or (lambda tokens: " ".join(map(str, tokens)))
  bleu, error_rate = sentence_bleu(decode)(rows), word_error_rate(decode)(rows)
  tokenize = "none" if decode is None else "13a"
  for row, number in np.argwhere(rows.usable):
    sequence, reference = as_text(rows.sequence(row, number)), as_text(reference_of(rows, row))
    expected = sacrebleu.sentence_bleu(
      sequence, [reference], tokenize=tokenize, use_effective_order=True
    )
    assert bleu[row, number] == expected.score
    assert error_rate[row, number] == jiwer.wer(reference, sequence)
  assert len(set(bleu[rows.usable])) > 8 and np.isnan(bleu[~rows.usable]).all()


def test_symbols_are_joined_by_spaces(rows):
  symbols = word_error_rate(lambda tokens: tuple(f"AE{token}" for token in tokens))(rows)
  np.testing.assert_array_equal(symbols, word_error_rate()(rows))


def test_rules_equal_their_definitions(rows):
  bleu = np.where(rows.usable, sentence_bleu()(rows), np.nan)
  with np.errstate(invalid="ignore"):
    assert (at_least(sentence_bleu(), 30.0)(rows) == (bleu >= 30)).all()
    assert (below(sentence_bleu(), 30.0)(rows) == (bleu < 30)).all()

  def three(rows):
    return np.full(rows.usable.shape, 3.0)

  assert at_least(three, 3.0)(rows).sum() == rows.usable.sum() and not below(three, 3.0)(rows).any()
  nearest = nearest_to_reference()(rows)
  for row in range(6):
    expected = np.zeros(3, bool)
    if rows.usable[row].any():
      expected[np.nanargmax(bleu[row])] = True
    np.testing.assert_array_equal(nearest[row], expected)
  assert not nearest[:, 0].all()
  second = nth_best(1)(rows)
  np.testing.assert_array_equal(second, rows.usable & (np.arange(3) == 1))
  first = [bleu[row, rows.usable[row].argmax()] for row in (0, 1, 2, 4, 5)]
  worst = [(0, 1, 2, 4, 5)[i] for i in np.argsort(first)[-2:]]
  expected = rows.usable.copy()
  expected[worst] = False
  np.testing.assert_array_equal(without_worst(sentence_bleu(), 0.5)(rows), expected)
  np.testing.assert_array_equal(without_worst(sentence_bleu(), 0.0)(rows), rows.usable)


def test_rules_are_applied_in_order_and_counted(rows):
  longest = rows._replace(tokens=np.pad(rows.tokens, ((0, 0), (0, 0), (0, 9))))
  assert select(longest, [nth_best(0)]).dropped["nth_best(number=0)"] == 1  # row 2
  assert select(longest, [below(word_error_rate(), 0.5), nth_best(0)]).figures["kept"] < 5
  seen = []

  def only_second(candidates):
    seen.append(candidates.usable.copy())
    return np.broadcast_to([False, True, False], candidates.usable.shape)

  selection = select(longest, [only_second, only_second])
  assert selection.numbers.tolist() == [1, 1, 1, -1, 1, 1]
  np.testing.assert_array_equal(seen[1], seen[0] & (np.arange(3) == 1))
  text = str(selection)
  assert "5 of 6" in text and not any(selection.dropped.values())  # row 3 had none before


def test_interpolation_and_filters_of_a_file(tmp_path, capsys):
  source = pairs()  # whose references are the third sequence of each beam
  near = written(
    tmp_path, source, beams, keep=[nearest_to_reference(), at_least(sentence_bleu(), 90)]
  )
  assert targets(near) == texts(source)
  figures = pseudo_label_figures(tmp_path)
  assert figures["kept"] == len(source) and list(figures["dropped"])[-1].startswith("at_least(")
  with pytest.raises(Mismatch, match="keep"):
    written(tmp_path, source, beams, keep=nearest_to_reference())
  assert targets(pseudo_labels(tmp_path, source)) == texts(source)
  best = pseudo_labels(tmp_path, source, keep=[])
  assert targets(best) == texts(source, shift=3)
  half = pseudo_labels(tmp_path, source, without_worst(lambda rows: rows.lengths, 0.5))
  lengths = {id: len(text) for id, text in texts(source).items()}
  assert len(half) == len(source) // 2 and {lengths[id] for id in half.ids.tolist()} == {1, 2}
  assert "without_worst(" in capsys.readouterr().out


def test_backward_cross_entropy(rows):
  """The backward model reads the sequence and predicts the source: here by a table of bigrams."""
  table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB))

  def apply(w, source, tokens):
    return w[source[:, :1]] + w[tokens]

  backward = from_apply(None, apply, variables=jnp.float32(table), inputs=["source", "tokens"])
  shapes = set()

  @jax.jit
  def log_probs(batch):
    shapes.add(batch["source"].shape)
    outputs, _ = backward.apply(*backward.variables, batch, train=False, key=None)
    return sequence_log_probs(outputs, batch["label"])

  values = backward_cross_entropy(log_probs, start_token=START, end_token=END, batch_size=4)(rows)
  for row, number in np.argwhere(rows.usable):
    target = [*rows.arrays["source"][row], END]
    z = table[rows.tokens[row, number, 0]] + table[[START, *target[:-1]]]
    expected = -(z[np.arange(len(target)), target] - np.log(np.exp(z).sum(-1))).mean()
    np.testing.assert_allclose(values[row, number], expected, rtol=1e-5)
  assert np.isnan(values[~rows.usable]).all() and shapes == {(4, 7)}


def test_a_source_with_end_tokens_is_read_with_them_backward(rows):
  source = np.concatenate([rows.arrays["source"], np.full((6, 1), END)], 1)
  arrays = {"source": source, "source_segments": np.zeros_like(source)}
  batches = []

  def log_probs(batch):
    batches.append(batch)
    return np.zeros(batch["label"].shape)

  backward_cross_entropy(log_probs, start_token=START, end_token=9)(rows._replace(arrays=arrays))
  [batch] = batches
  count = int(rows.usable.sum())
  assert (batch["label"][:count] == 9).sum() == (batch["source"][:count] == 9).sum() == count
  assert (batch["label"][:count, 7] == 9).all() and not (batch["label"] == END).any()


@pytest.mark.parametrize(
  ("field", "make"),
  [
    ("number", lambda: nth_best(-1)),
    ("fraction", lambda: without_worst(sentence_bleu(), 1.0)),
    ("least", lambda: at_least(sentence_bleu(), float("nan"))),
    ("limit", lambda: below(sentence_bleu(), float("inf"))),
    ("batch_size", lambda: backward_cross_entropy(print, start_token=1, end_token=0, batch_size=0)),
  ],
)
def test_wrong_arguments_raise(field, make):
  with pytest.raises(ValueError, match=field):
    make()


def test_wrong_scores_and_rules_raise(rows):
  with pytest.raises(ValueError, match="number"):
    nth_best(3)(rows)
  with pytest.raises(ValueError, match=r"score.*\[6\]"):
    at_least(lambda rows: np.zeros(6), 1.0)(rows)
  with pytest.raises(ValueError, match="score.*id 11, sequence 2"):
    broken = np.zeros((6, 3))
    broken[1, 2] = np.nan
    broken[3] = np.nan  # is not usable
    at_least(lambda rows: broken, 1.0)(rows)
  with pytest.raises(ValueError, match="keep"):
    select(rows, [lambda rows: np.ones((6, 3))])
  unlabeled = rows.arrays["label"].copy()
  unlabeled[4] = data.UNLABELED
  with pytest.raises(ValueError, match="label.*id 14"):
    reference_score(lambda *_: 0.0)(rows._replace(arrays={"label": unlabeled}))
  with pytest.raises(ValueError, match="label"):
    nearest_to_reference()(rows._replace(arrays={}))
