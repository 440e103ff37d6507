"""Text that is read from a file gives the rows, batches, caches and runs of text in memory."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, losses, objectives
from distill_jax.cache import Dense, Mismatch, TopK, check_run, verify, write_cache
from distill_jax.data import text
from distill_jax.data.text import BYTES, documents, tokenized
from distill_jax.data.text.stream import TextStream
from distill_jax.data.text.tokenized import tokenize
from distill_jax.models import from_apply
from distill_jax.train import RunOptions, fit
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
  monkeypatch.setattr(documents, "BLOCK", request.param)


def language_model(seed, width=4):
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
def test_rows_match_text_in_memory(corpus, tmp_path, block, length):
  options = OPTIONS | {"length": length}
  expected = text.load(corpus, **options)
  found = tokenize(corpus, tmp_path / "work", **options)
  same(found.rows(found.ids), dict(expected.arrays))
  assert (found.name, found.classes, found.vocabulary) == (expected.name, 257, "bytes")
  assert found.class_names == expected.class_names
  same(dict(found.in_memory().arrays), dict(expected.arrays))
  some = np.arange(len(expected))[::-1][:3]
  same(found.take(some).rows(found.take(some).ids), dict(expected.take(some).arrays))


def test_separator_across_blocks(corpus, block):
  whole = (corpus / "b" / "c.txt").read_bytes().split(b"\n\n")
  found = list(text.read_documents(corpus / "b" / "c.txt", BYTES, ".txt", "\n\n"))
  assert [None if not part else list(part) for part in whole] == [
    None if x is None else x.tolist() for x in found
  ]


def test_files_are_documents_and_counts_are_printed(tmp_path, capsys):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for name, words in {"a": "one", "b": "", "c": "three"}.items():
    (folder / f"{name}.txt").write_text(words)
  found = tokenize(folder, tmp_path / "work", length=4)
  same(found.rows(found.ids), dict(text.load(folder, length=4).arrays))
  assert "11 tokens of 3 documents" in capsys.readouterr().out
  assert [found.index[name] for name in ("documents", "empty", "skipped", "tokens")] == [
    3,
    1,
    0,
    11,
  ]
  (folder / "a.txt").write_text("x;;y;")
  other = tokenize(folder, tmp_path / "other", length=4, separator=";")
  assert [other.index[name] for name in ("documents", "empty", "skipped")] == [3, 0, 3]
  assert "0 of them empty; skipped 3 times" in capsys.readouterr().out


def test_tokens_are_written_once_in_few_bytes(corpus, tmp_path, monkeypatch):
  work = tmp_path / "work"
  first = tokenize(corpus, work, **OPTIONS)
  assert (work / "tokens.bin").stat().st_size == 2 * (first.index["tokens"] + 1)
  monkeypatch.setattr(tokenized, "read_documents", None)
  again = tokenize(corpus, work, **OPTIONS | {"length": 8})
  assert again.length == 8 and isinstance(again.tokens, np.memmap)
  np.testing.assert_array_equal(again.tokens, first.tokens)


def test_interrupted_tokenization_starts_again(corpus, tmp_path, monkeypatch):
  def killed(*args):
    yield BYTES.encode(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tokenized, "read_documents", killed)
    with pytest.raises(KeyboardInterrupt):
      tokenize(corpus, tmp_path / "work", **OPTIONS)
  found = tokenize(corpus, tmp_path / "work", **OPTIONS)
  same(found.rows(found.ids), dict(text.load(corpus, **OPTIONS).arrays))


@pytest.mark.parametrize("start", [0, 3, 40])
def test_batches_match_rows_in_memory_from_any_step(corpus, tmp_path, start):
  source, rows = text.load(corpus, **OPTIONS), tokenize(corpus, tmp_path / "work", **OPTIONS)
  expected = data.batches(source, 8, seed=5, start=start)
  for a, b in itertools.islice(zip(TextStream(rows, 8, seed=5)(start), expected), 20):
    same(a, b)
  assert TextStream(rows, 8, seed=5).steps_per_epoch == len(source) // 8
  part = next(TextStream(rows, 8, seed=5).for_rows(np.array([1, 6]))(start))
  whole = next(data.batches(source, 8, seed=5, start=start))
  same(part, {name: x[[1, 6]] for name, x in whole.items()})


@pytest.mark.integration
def test_cache_of_text_in_memory_fits_streamed_text(corpus, tmp_path):
  source, rows = text.load(corpus, **OPTIONS), tokenize(corpus, tmp_path / "work", **OPTIONS)
  teacher = language_model(0)
  codecs = {"hidden": Dense("float32"), "logits": TopK(3)}
  options = {"outputs": codecs, "batch_size": 8, "progress": False}
  cached = write_cache(tmp_path / "cache", teacher, rows, **options)
  # It would raise for other inputs.
  again = write_cache(tmp_path / "cache", teacher, source, **options)
  assert again.digest == cached.digest
  check_run(cached, source)
  check_run(cached, rows.take(slice(1, 5)))
  assert verify(cached, teacher, rows, 16, batch_size=8)["logits"].top1 == 1
  objective = objectives.weighted(soft=(1.0, objectives.tokens(losses.sparse_kl)))

  def train(examples):
    return fit(
      language_model(1),
      cached,
      objective,
      optax.adam(1e-2),
      examples,
      steps=3,
      batch_size=8,
      run=RunOptions(ignore_label=data.UNLABELED, progress=False),
    ).state.params

  jax.tree.map(np.testing.assert_array_equal, train(source), train(TextStream(rows, 8, seed=0)))
  (corpus / "a.txt").write_text("another text " * 40)
  changed = tokenize(corpus, tmp_path / "changed", **OPTIONS)
  with pytest.raises((Mismatch, ValueError), match="example id"):
    check_run(cached, changed)
  with pytest.raises(Mismatch, match="example id"):
    train(TextStream(changed.take(slice(8)), 8, seed=0))


def test_tokens_of_another_text_or_tokenizer_raise(corpus, tmp_path):
  work = tmp_path / "work"
  tokenize(corpus, work, **OPTIONS)
  with pytest.raises(ValueError, match=r"^vocabulary:"):
    tokenize(corpus, work, **OPTIONS, tokenizer=BYTES._replace(identity="other"))
  with pytest.raises(ValueError, match=r"^separator:"):
    tokenize(corpus, work, length=16)
  (corpus / "a.txt").write_text("more")
  with pytest.raises(ValueError, match=r"^files:"):
    tokenize(corpus, work, **OPTIONS)


def test_corrupt_tokens_raise(corpus, tmp_path):
  work = tmp_path / "work"
  tokenize(corpus, work, **OPTIONS)
  for name in ("tokens.bin", "starts.bin"):
    whole = (work / name).read_bytes()
    (work / name).write_bytes(whole[:-1])
    with pytest.raises(OSError, match=f"{name} is corrupt"):
      tokenize(corpus, work, **OPTIONS)
    (work / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "index.json"])
def test_a_flip_in_tokens_is_found(corpus, tmp_path, name):
  work = tmp_path / "work"
  tokenize(corpus, work, **OPTIONS)
  content = (work / name).read_bytes()
  at = content.index(b'"checksums"') + 20 if name == "index.json" else len(content) // 2
  (work / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  with pytest.raises(OSError, match=r"(tokens|starts).bin is corrupt|index.json is corrupt"):
    tokenize(corpus, work, **OPTIONS)


def test_an_index_that_is_cut_raises(corpus, tmp_path):
  tokenize(corpus, tmp_path / "work", **OPTIONS)
  (tmp_path / "work" / "index.json").write_text('{"name": "corpus"')
  with pytest.raises(OSError, match="index.json is corrupt"):
    tokenize(corpus, tmp_path / "work", **OPTIONS)


def test_two_jobs_tokenize_into_one_folder(corpus, tmp_path, monkeypatch):
  """The second one starts and ends while the first one is in the middle of its text."""
  work, other = tmp_path / "work", []
  read = tokenized.read_documents

  def read_slowly(*args):
    for i, document in enumerate(read(*args)):
      if i == 10:
        monkeypatch.setattr(tokenized, "read_documents", read)
        other.append(tokenize(corpus, work, **OPTIONS))
      yield document

  monkeypatch.setattr(tokenized, "read_documents", read_slowly)
  first = tokenize(corpus, work, **OPTIONS)
  expected = dict(text.load(corpus, **OPTIONS).arrays)
  for corpus_of_job in (first, *other):
    same(corpus_of_job.rows(corpus_of_job.ids), expected)
  assert sorted(path.name for path in work.iterdir()) == ["index.json", "starts.bin", "tokens.bin"]


@pytest.mark.parametrize("name", ["s3://bucket/tokens", "gs://b/t", "a\\b"])
def test_tokens_in_an_object_store_are_rejected(corpus, tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"^folder: "):
    tokenize(corpus, name, **OPTIONS)
  assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_text_that_cannot_be_read_names_the_file(tmp_path):
  pytest.importorskip("tokenizers")
  folder = tmp_path / "corpus"
  folder.mkdir()
  (folder / "a.txt").write_text("fine words " * 30)
  tokenizer = text.bpe(text.train_bpe(folder, size=257))
  (folder / "b.txt").write_bytes(b"abc\xff")
  with pytest.raises(ValueError, match=r"b\.txt: .*UTF-8"):
    tokenize(folder, tmp_path / "work", length=8, tokenizer=tokenizer)
  assert not (tmp_path / "work" / tokenized.INDEX).exists()


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"length": 1}, "length"),
    ({"length": 4, "suffix": ".md"}, "suffix"),
  ],
)
def test_text_that_cannot_be_tokenized_raises(corpus, tmp_path, options, field):
  with pytest.raises(ValueError, match=f"^{field}:"):
    tokenize(corpus, tmp_path / "work", **options)


def test_no_text_and_too_many_rows_raise(corpus, tmp_path, monkeypatch):
  (tmp_path / "none").mkdir()
  (tmp_path / "none" / "a.txt").write_text("")
  with pytest.raises(ValueError, match=r"^path:"):
    tokenize(tmp_path / "none", tmp_path / "work", length=4)
  monkeypatch.setattr(tokenized, "MAX_ROWS", 10)
  with pytest.raises(ValueError, match=r"^length:"):
    tokenize(corpus, tmp_path / "many", **OPTIONS)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"batch_size": 999}, "batch_size"),
    ({"batch_size": 0}, "batch_size"),
    ({"seed": -1}, "seed"),
    ({"threads": 0}, "threads"),
  ],
)
def test_arguments_out_of_range_raise(corpus, tmp_path, options, field):
  rows = tokenize(corpus, tmp_path / "work", **OPTIONS)
  with pytest.raises(ValueError, match=f"^{field}:"):
    TextStream(rows, **{"batch_size": 4, "seed": 0} | options)


def test_identity_follows_from_the_rows(corpus, tmp_path):
  rows = tokenize(corpus, tmp_path / "work", **OPTIONS)
  same_again = tokenize(corpus, tmp_path / "other", **OPTIONS)
  identities = [TextStream(r, 4, seed=0).identity for r in (rows, same_again, rows.take(slice(9)))]
  assert identities[0] == identities[1] != identities[2]
  assert json.loads((tmp_path / "work" / "index.json").read_text())["dtype"] == "<u2"
  assert jnp.asarray(rows.tokens[:1]).dtype == jnp.uint16
