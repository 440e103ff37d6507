"""Text that is read from a file while training: the rows, batches, caches and runs of the same text in memory."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, objectives
from distill_jax.cache import Dense, Mismatch, TopK, verify, write_cache
from distill_jax.data import text
from distill_jax.data.text import packed, tokenized
from distill_jax.data.text.packed import BYTES
from distill_jax.data.text.stream import TextStream
from distill_jax.data.text.tokenized import tokenize
from distill_jax.models import from_apply
from distill_jax.train import fit
from distill_jax.types import Variables

OPTIONS = {"length": 16, "separator": "\n\n"}


@pytest.fixture
def corpus(tmp_path, rng):
  folder = tmp_path / "corpus"
  (folder / "b").mkdir(parents=True)
  words = [bytes(rng.integers(97, 123, n).tolist()) for n in rng.integers(0, 60, 40)]
  (folder / "a.txt").write_bytes(b"\n\n".join(words[:25]))
  (folder / "b" / "c.txt").write_bytes(b"\n\n\n" + b"\n\n".join(words[25:]) + b"\n\n")
  return folder


@pytest.fixture(params=[1, 7, 2**20])
def block(request, monkeypatch):
  monkeypatch.setattr(packed, "BLOCK", request.param)


def speaker(seed, width=4):
  keys = jax.random.split(jax.random.key(seed), 2)
  weights = {
    "embed": jax.random.normal(keys[0], (257, width)),
    "head": jax.random.normal(keys[1], (width, 257)),
  }
  apply = lambda w, tokens: {"hidden": w["embed"][tokens], "head": (w["head"], None, None)}  # noqa: E731
  model = from_apply(lambda key, tokens: weights, apply, inputs="tokens")
  return model._replace(variables=Variables(weights, {}))


def same(a, b):
  assert set(a) == set(b)
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("length", [2, 16, 999, 10_000])
def test_rows_are_those_of_the_text_in_memory(corpus, tmp_path, block, length):
  options = OPTIONS | {"length": length}
  expected = text.load(corpus, **options)
  found = tokenize(corpus, tmp_path / "work", **options)
  same(found.rows(found.ids), dict(expected.arrays))
  assert (found.name, found.classes, found.vocabulary) == (expected.name, 257, "bytes")
  assert found.class_names == expected.class_names
  same(dict(found.in_memory().arrays), dict(expected.arrays))
  some = np.arange(len(expected))[::-1][:3]
  same(found.take(some).rows(found.take(some).ids), dict(expected.take(some).arrays))


def test_the_separator_is_found_wherever_blocks_end(corpus, block):
  whole = (corpus / "b" / "c.txt").read_bytes().split(b"\n\n")
  found = list(text.documents_of(corpus / "b" / "c.txt", BYTES, ".txt", "\n\n"))
  assert [None if not part else list(part) for part in whole] == [
    None if x is None else x.tolist() for x in found
  ]


def test_whole_files_are_documents_and_the_counts_are_told(tmp_path, capsys):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for name, words in {"a": "one", "b": "", "c": "three"}.items():
    (folder / f"{name}.txt").write_text(words)
  found = tokenize(folder, tmp_path / "work", length=4)
  same(found.rows(found.ids), dict(text.load(folder, length=4).arrays))
  assert "11 tokens of 3 documents" in capsys.readouterr().out
  assert [found.about[name] for name in ("documents", "empty", "skipped", "tokens")] == [
    3,
    1,
    0,
    11,
  ]
  (folder / "a.txt").write_text("x;;y;")
  other = tokenize(folder, tmp_path / "other", length=4, separator=";")
  assert [other.about[name] for name in ("documents", "empty", "skipped")] == [3, 0, 3]
  assert "0 of them empty; 3 times nothing between separators" in capsys.readouterr().out


def test_tokens_are_written_once_and_in_few_bytes(corpus, tmp_path, monkeypatch):
  work = tmp_path / "work"
  first = tokenize(corpus, work, **OPTIONS)
  assert (work / "tokens.bin").stat().st_size == 2 * (first.about["tokens"] + 1)
  monkeypatch.setattr(tokenized, "documents_of", None)
  again = tokenize(corpus, work, **OPTIONS | {"length": 8})
  assert again.length == 8 and isinstance(again.tokens, np.memmap)
  np.testing.assert_array_equal(again.tokens, first.tokens)


def test_a_tokenization_that_was_killed_begins_anew(corpus, tmp_path, monkeypatch):
  def killed(*args):
    yield BYTES.encode(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tokenized, "documents_of", killed)
    with pytest.raises(KeyboardInterrupt):
      tokenize(corpus, tmp_path / "work", **OPTIONS)
  found = tokenize(corpus, tmp_path / "work", **OPTIONS)
  same(found.rows(found.ids), dict(text.load(corpus, **OPTIONS).arrays))


@pytest.mark.parametrize("start", [0, 3, 40])
def test_batches_are_those_of_the_rows_in_memory_from_any_step_on(corpus, tmp_path, start):
  source, rows = text.load(corpus, **OPTIONS), tokenize(corpus, tmp_path / "work", **OPTIONS)
  expected = data.batches(source, 8, seed=5, start=start)
  for a, b in itertools.islice(zip(TextStream(rows, 8, seed=5)(start), expected), 20):
    same(a, b)
  part = next(TextStream(rows, 8, seed=5).for_rows(np.array([1, 6]))(start))
  whole = next(data.batches(source, 8, seed=5, start=start))
  same(part, {name: x[[1, 6]] for name, x in whole.items()})


def test_a_cache_of_the_one_is_that_of_the_other(corpus, tmp_path):
  source, rows = text.load(corpus, **OPTIONS), tokenize(corpus, tmp_path / "work", **OPTIONS)
  teacher, kept = speaker(0), {"hidden": Dense("float32"), "logits": TopK(3)}
  options = {"outputs": kept, "batch_size": 8, "progress": False}
  cached = write_cache(tmp_path / "cache", teacher, rows, **options)
  again = write_cache(tmp_path / "cache", teacher, source, **options)  # or it would refuse
  assert again.digest == cached.digest
  cached.check(source)
  cached.check(rows.take(slice(1, 5)))
  assert verify(cached, teacher, rows, 16, batch_size=8)["logits"].top1 == 1
  goal = objectives.weighted(soft=(1.0, objectives.tokens("kl")))

  def trained(teacher_outputs, shown):
    return fit(
      speaker(1),
      teacher_outputs,
      objectives.weighted(soft=(1.0, objectives.tokens("bucket")))
      if teacher_outputs is cached
      else goal,
      optax.adam(1e-2),
      shown,
      steps=5,
      batch_size=8,
      ignore_label=data.UNLABELED,
      progress=False,
    ).state.params

  for teacher_outputs in (teacher, cached):
    a, b = trained(teacher_outputs, source), trained(teacher_outputs, TextStream(rows, 8, seed=0))
    jax.tree.map(np.testing.assert_array_equal, a, b)
  (corpus / "a.txt").write_text("another text " * 40)
  changed = tokenize(corpus, tmp_path / "changed", **OPTIONS)
  with pytest.raises((Mismatch, ValueError), match="inputs have changed|is not in the cache"):
    cached.check(changed)
  with pytest.raises(Mismatch, match="example id [0-9]+ is not the one that the teacher"):
    trained(cached, TextStream(changed.take(slice(8)), 8, seed=0))


# what does not fit


def test_tokens_of_another_text_or_tokenizer_are_refused(corpus, tmp_path):
  work = tmp_path / "work"
  tokenize(corpus, work, **OPTIONS)
  with pytest.raises(ValueError, match="vocabulary is 'bytes' there, 'other' wanted"):
    tokenize(corpus, work, **OPTIONS, tokenizer=BYTES._replace(identity="other"))
  with pytest.raises(ValueError, match="separator is '\\\\n\\\\n' there, None wanted"):
    tokenize(corpus, work, length=16)
  (corpus / "a.txt").write_text("more")
  with pytest.raises(
    ValueError, match="holds other tokens; name another folder or delete it: files is"
  ):
    tokenize(corpus, work, **OPTIONS)


def test_damaged_tokens_are_refused(corpus, tmp_path):
  work = tmp_path / "work"
  tokenize(corpus, work, **OPTIONS)
  for name in ("tokens.bin", "starts.bin"):
    whole = (work / name).read_bytes()
    (work / name).write_bytes(whole[:-1])
    with pytest.raises(OSError, match=f"{name} is damaged: expected {len(whole):,} bytes"):
      tokenize(corpus, work, **OPTIONS)
    (work / name).write_bytes(whole)


def test_text_that_cannot_be_read_is_refused_by_the_file_s_name(tmp_path):
  pytest.importorskip("tokenizers")
  folder = tmp_path / "corpus"
  folder.mkdir()
  (folder / "a.txt").write_text("fine words " * 30)
  tokenizer = text.bpe(text.train_bpe(folder, size=257))
  (folder / "b.txt").write_bytes(b"abc\xff")
  with pytest.raises(ValueError, match="b.txt: byte 3 is not UTF-8"):
    tokenize(folder, tmp_path / "work", length=8, tokenizer=tokenizer)
  assert not (tmp_path / "work" / tokenized.INDEX).exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 1}, "length must be at least 2, got 1"),
    ({"length": 4, "suffix": ".md"}, "no files that end in .md"),
  ],
)
def test_what_cannot_be_tokenized_is_refused(corpus, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    tokenize(corpus, tmp_path / "work", **options)


def test_no_text_and_too_many_rows_are_refused(corpus, tmp_path, monkeypatch):
  (tmp_path / "none").mkdir()
  (tmp_path / "none" / "a.txt").write_text("")
  with pytest.raises(ValueError, match="none holds no text"):
    tokenize(tmp_path / "none", tmp_path / "work", length=4)
  monkeypatch.setattr(tokenized, "ROWS", 10)
  with pytest.raises(
    ValueError, match="length: 16 makes [0-9]+ rows, more than the ids 10; least is [0-9]+"
  ):
    tokenize(corpus, tmp_path / "many", **OPTIONS)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 999}, "batch_size 999 is more than the [0-9]+ rows of corpus"),
    ({"batch_size": 0}, "batch_size must be a whole number from 1"),
    ({"seed": -1}, "seed must be"),
    ({"threads": 0}, "threads must be"),
  ],
)
def test_a_stream_is_not_made_with(corpus, tmp_path, options, message):
  rows = tokenize(corpus, tmp_path / "work", **OPTIONS)
  with pytest.raises(ValueError, match=message):
    TextStream(rows, **{"batch_size": 4, "seed": 0} | options)


def test_a_stream_is_known_by_its_rows(corpus, tmp_path):
  rows = tokenize(corpus, tmp_path / "work", **OPTIONS)
  same_again = tokenize(corpus, tmp_path / "other", **OPTIONS)
  known = [TextStream(r, 4, seed=0).identity for r in (rows, same_again, rows.take(slice(9)))]
  assert known[0] == known[1] != known[2]
  assert json.loads((tmp_path / "work" / "index.json").read_text())["dtype"] == "<u2"
  assert jnp.asarray(rows.tokens[:1]).dtype == jnp.uint16
