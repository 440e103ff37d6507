"""Tests tokenizers, rows and buckets of pairs for encoder-decoder networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import data, losses, objectives
from distill_jax.cache import TopK, write_cache
from distill_jax.data import leaks, text
from distill_jax.data.label_checks import UNLABELED
from distill_jax.models import from_apply
from distill_jax.train import RunOptions, fit
from distill_jax.types import Variables

TEXTS = ["the table is open", "la table est ouverte", "the tables are open", "le tableau"]
START, END, PAD = 8, 9, 0
SOURCES = [[1, 2, 3], [4], [5, 6, 7, 1], [2, 2], [3]]
TARGETS = [[7], [6, 5], [4], [3, 2, 1], [1, 7, 1]]


@pytest.fixture(scope="module")
def bpe():
  return text.sequence_tokenizer(text.train_pair_bpe(TEXTS, size=300))


def rows(sources=SOURCES, targets=TARGETS, **changes):
  arguments = {
    "source_length": 5,
    "target_length": 4,
    "start": START,
    "end": END,
    "source_end": END,
  }
  return text.pair_rows(sources, targets, **(arguments | changes))


def test_rows_follow_the_conventions():
  arrays = rows(source_pad=3)
  assert {name: (x.shape, str(x.dtype)) for name, x in arrays.items()} == {
    "source": ((5, 5), "int32"),
    "source_segments": ((5, 5), "int32"),
    "tokens": ((5, 4), "int32"),
    "label": ((5, 4), "int32"),
  }
  for i, (source, target) in enumerate(zip(SOURCES, TARGETS)):
    count = len(source) + 1
    assert arrays["source"][i].tolist() == [*source, END] + [3] * (5 - count)
    assert arrays["source_segments"][i].tolist() == [0] * count + [-1] * (5 - count)
    label = arrays["label"][i]
    assert label[label != UNLABELED].tolist() == [*target, END]
    assert arrays["tokens"][i, 0] == START
    assert arrays["tokens"][i, 1 : len(target) + 1].tolist() == target
  text.check_pairs(arrays, start=START, end=END)
  assert rows(source_end=None)["source"][0].tolist() == [1, 2, 3, 0, 0]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sources": []}, "^targets"),
    ({"sources": [], "targets": []}, "^sources"),
    ({"sources": [[1], []], "targets": [[1], [1]]}, "^sources: .*row 1"),
    ({"sources": [[1], [1]], "targets": [[1], []]}, "^targets: .*row 1"),
    ({"source_length": 4}, "^source_length: .*row 2.*4 tokens"),
    ({"target_length": 3}, "^target_length: .*row 3.*3 tokens"),
    ({"source_size": 7}, "^sources: .*row 2"),
    ({"target_size": 7}, "^targets: .*row 0"),
    ({"targets": [[1], [-1], [1], [1], [1]]}, "^targets: .*row 1"),
    ({"targets": [[1], [0.5], [1], [1], [1]]}, "^targets: .*row 1"),
    ({"targets": [[1], [START, 1], [1], [1], [1]]}, "^targets: .*start token 8.*row 1"),
    ({"targets": [[1], [1, END], [1], [1], [1]]}, "^targets: .*end token 9.*row 1"),
    ({"source_length": 0}, "^source_length"),
    ({"target_length": 1}, "^target_length"),
  ],
)
def test_invalid_pairs_raise(changes, message):
  with pytest.raises(ValueError, match=message):
    rows(**changes)


def changed(name, index, value):
  values = rows()[name].copy()
  values[index] = value
  return {name: values}


@pytest.mark.parametrize(
  "change, message",
  [
    (changed("tokens", (2, 0), 1), "^tokens: .*start token 8.*example id 12"),
    (changed("tokens", (3, 1), 1), "^tokens: .*labels.*example id 13"),
    (changed("label", (1, 2), UNLABELED), "^label: .*end token 9.*example id 11"),
    (changed("label", (3, 0), UNLABELED), "^label: .*between.*example id 13"),
    (changed("label", 4, UNLABELED), "^label: .*none.*example id 14"),
    (changed("source_segments", 1, -1), "^source_segments: .*none.*example id 11"),
    (changed("source_segments", (2, 1), -1), "^source_segments: .*between.*example id 12"),
    ({"source_segments": rows()["source_segments"] >= 0}, "^source_segments: .*got bool"),
    ({"source_segments": 1 + rows()["source_segments"]}, "^source_segments: .*got 1"),
    ({"label": np.zeros((5, 3), int)}, "^label: .*shape"),
  ],
)
def test_rows_made_elsewhere_are_checked(change, message):
  arrays = rows() | {"id": np.arange(10, 15)}
  text.check_pairs(arrays, start=START, end=END)
  with pytest.raises(ValueError, match=message):
    text.check_pairs(arrays | change, start=START, end=END)
  with pytest.raises(ValueError, match="^source_segments"):
    text.check_pairs({"source": arrays["source"]}, start=START, end=END)


def test_sources_of_texts(bpe, capsys):
  source = text.pair_source(
    TEXTS, TEXTS[::-1], bpe, source_length=12, target_length=12, name="doors"
  )
  assert source.classes == bpe.size and source.vocabulary == bpe.identity
  text.check_pairs(source.arrays, start=bpe.start, end=bpe.end)
  assert [bpe.decode(x) for x in source.arrays["source"]] == TEXTS
  assert [bpe.decode(np.maximum(x, bpe.pad)) for x in source.arrays["label"]] == TEXTS[::-1]
  longest = max(len(bpe.encode(x)) for x in TEXTS)
  lengths = {"source_length": longest, "target_length": 12}
  with pytest.raises(ValueError, match="^source_length"):
    text.pair_source(TEXTS, TEXTS[::-1], bpe, **lengths)
  short = text.pair_source(TEXTS, TEXTS[::-1], bpe, drop_longer=True, **lengths)
  kept = [i for i, x in enumerate(TEXTS) if len(bpe.encode(x)) < longest]
  assert short.ids.tolist() == kept and f"left out {4 - len(kept)} of 4" in capsys.readouterr().out
  with pytest.raises(ValueError, match="^target_length"):
    text.pair_source(TEXTS, TEXTS, bpe, drop_longer=True, source_length=2, target_length=2)
  # Rows of one set with equal ids are noticed on both sides.
  with pytest.warns(UserWarning, match="^evaluation"):
    leaks.warn_of_shared_examples(source, source.take(slice(2)))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_texts_are_decoded_as_they_were(bpe, sentence):
  tokens = bpe.encode(sentence)
  assert tokens.dtype == np.int32 and not set(tokens) & {bpe.start, bpe.end, bpe.pad}
  generated = [bpe.start, *tokens, bpe.end, bpe.end, 5, bpe.pad]
  assert bpe.decode(generated) == sentence.strip()


def test_vocabularies_are_compared(tmp_path, bpe):
  trained = text.train_pair_bpe(TEXTS, size=300)
  path = tmp_path / "tokenizer.json"
  trained.save(str(path))
  text.check_same_tokenizer(bpe, text.sequence_tokenizer(trained))
  text.check_same_tokenizer(bpe, text.sequence_tokenizer(path))
  others = [
    text.sequence_tokenizer(text.train_pair_bpe(TEXTS[:2], size=280)),
    text.sequence_tokenizer(path, start="<pad>"),
    text.symbol_tokenizer("abc"),
  ]
  for other in others:
    with pytest.raises(ValueError, match=r"^tokenizer: .*sequence-level"):
      text.check_same_tokenizer(bpe, other)
  assert text.symbol_tokenizer("abc").identity == text.symbol_tokenizer(["a", "b", "c"]).identity


def test_symbols_keep_the_positions_of_a_vocabulary():
  names = ["<pad>", "<unk>", "<s>", "</s>", "AH0", "B"]
  phones = text.symbol_tokenizer(names)
  assert (phones.size, phones.pad, phones.start, phones.end) == (6, 0, 2, 3)
  assert phones.encode(("B", "AH0")).tolist() == [5, 4]
  assert phones.decode([2, 5, 4, 3, 4, 0]) == ("B", "AH0")
  letters = text.symbol_tokenizer("ab", start="<pad>")
  assert (letters.size, letters.pad, letters.start, letters.end) == (4, 2, 2, 3)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda t: text.train_pair_bpe(TEXTS, size=258), "^size"),
    (lambda t: text.train_pair_bpe("one text", size=300), "^texts"),
    (lambda t: text.train_pair_bpe([], size=300), "^texts"),
    (lambda t: text.sequence_tokenizer(__file__), "^source"),
    (lambda t: text.sequence_tokenizer(text.train_pair_bpe(TEXTS, size=300), end="<e>"), "^end"),
    (lambda t: t.decode([300]), "^tokens: .*300"),
    (lambda t: text.symbol_tokenizer(""), "^symbols"),
    (lambda t: text.symbol_tokenizer("aba"), "^symbols: .*'a'"),
    (lambda t: text.symbol_tokenizer("ab").encode("abc"), "^sequence: .*'c'"),
    (lambda t: text.symbol_tokenizer("ab").decode([5]), "^tokens: .*5"),
  ],
)
def test_invalid_tokenizers_raise(bpe, call, message):
  with pytest.raises(ValueError, match=message):
    call(bpe)


LENGTHS = ((2, 3), (3, 4), (5, 4))


def bucket_of(row):
  sizes = len(SOURCES[row % 5]) + 1, len(TARGETS[row % 5]) + 1
  return next(x for x in LENGTHS if x[0] >= sizes[0] and x[1] >= sizes[1])


def test_buckets_hold_sources_and_targets():
  arrays = rows(4 * SOURCES, 4 * TARGETS)
  arrays["source_weight"] = np.ones((20, 5), np.float32)
  source = data.Source(arrays, 10, ignore_label=UNLABELED)
  buckets = text.LengthBuckets(source, 2, seed=3, lengths=LENGTHS)
  batches = list(itertools.islice(buckets(0), 10))
  assert len(np.unique(np.concatenate([b["id"] for b in batches]))) == 20
  for batch in batches:
    length = max(map(bucket_of, batch["id"]))
    assert batch["source"].shape == batch["source_segments"].shape == (2, length[0])
    assert batch["tokens"].shape == batch["label"].shape == (2, length[1])
    assert batch["source_weight"].shape == (2, 5)
    for name in ("source", "label"):
      full = arrays[name][batch["id"]]
      np.testing.assert_array_equal(batch[name], full[:, : batch[name].shape[1]])
    cut = text.cut_padding({name: x[batch["id"]] for name, x in source.arrays.items()}, LENGTHS)
    assert {name: x.shape for name, x in cut.items()} == {n: batch[n].shape for n in cut}
  assert {b["source"].shape[1] for b in batches} == {2, 3, 5}
  assert [b["id"].tolist() for b in itertools.islice(buckets(4), 3)] == [
    b["id"].tolist() for b in batches[4:7]
  ]


def decoder(seed=None):
  """Returns a network whose outputs depend on the tokens of source and target at each position."""

  def init(key, *inputs):
    keys = jax.random.split(key)
    return {
      "embed": jax.random.normal(keys[0], (10, 4)),
      "head": jax.random.normal(keys[1], (4, 10)),
    }

  def apply(weights, source, source_segments, tokens):
    vectors = jnp.where(source_segments[..., None] < 0, 0, weights["embed"][source])
    hidden = weights["embed"][tokens] + vectors.sum(1, keepdims=True)
    return {"hidden": hidden, "head": (weights["head"], None, None)}

  model = from_apply(init, apply, inputs=("source", "source_segments", "tokens"))
  if seed is None:
    return model
  return model._replace(variables=Variables(init(jax.random.key(seed)), {}))


def test_student_trains_on_buckets_of_pairs(tmp_path):
  source = data.Source(rows(6 * SOURCES, 6 * TARGETS), 10, ignore_label=UNLABELED, vocabulary="v")
  arguments = {"steps": 2, "batch_size": 8, "run": RunOptions(progress=False)}

  def train(teacher, loss, lengths):
    objective = objectives.weighted(soft=(1.0, objectives.tokens(loss)))
    buckets = text.LengthBuckets(source, 8, seed=0, lengths=lengths)
    result = fit(decoder(), teacher, objective, optax.sgd(1.0), buckets, **arguments)
    return jax.tree.leaves(result.variables.params)

  teacher = decoder(seed=1)
  # The tail is one token, so that nothing is lost.
  codecs = {"logits": TopK(9, bits=16)}
  cached = write_cache(tmp_path, teacher, source, codecs, batch_size=8, progress=False)
  live = train(teacher, losses.kl_divergence, ((3, 4), (5, 4)))
  stored = train(cached, losses.sparse_kl, ((3, 4), (5, 4)))
  for a, b in zip(live, stored):
    np.testing.assert_allclose(a, b, atol=1e-3)
  with pytest.raises(ValueError, match=r"^source: batch \d"):
    train(cached, losses.sparse_kl, ((5, 3), (5, 4)))


def test_bucket_identities_differ():
  source = data.Source(rows(), 10, ignore_label=UNLABELED)
  identities = [
    text.LengthBuckets(source, 2, seed=0, lengths=lengths).identity
    for lengths in (((5, 4),), [[5, 4]], ((2, 3), (5, 4)), ((5, 5),))
  ]
  assert identities[0] == identities[1] and len(set(identities)) == 3


@pytest.mark.parametrize(
  "lengths, message",
  [
    ((), "none"),
    (((2, 3), (2, 3)), "rise"),
    (((5, 3), (2, 4)), "rise"),
    (((0, 4),), "integer"),
    (((5, 4, 3),), "tuples of two"),
    ((2, (5, 4)), "tuples of two"),
    (((4, 4),), "5 tokens of the source of example id 2"),
    (((5, 3),), "4 tokens of the target of example id 3"),
  ],
)
def test_invalid_lengths_raise(lengths, message):
  source = data.Source(rows(), 10, ignore_label=UNLABELED)
  with pytest.raises(ValueError, match=f"^lengths: .*{message}"):
    text.LengthBuckets(source, 2, seed=0, lengths=lengths)
  with pytest.raises(ValueError, match="^source"):
    texts = {"tokens": source.arrays["tokens"], "segments": source.arrays["label"]}
    text.cut_padding(texts, ((5, 4),))
