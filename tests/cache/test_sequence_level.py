"""Checks that pseudo labels are a teacher's sequences by id, are resumed, and reject others."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from toy_sequences import (
  END,
  ROWS,
  START,
  VOCAB,
  WEIGHTS,
  WIDTH,
  beams,
  pairs,
  shifted,
  targets,
  texts,
  written,
)

from distill_jax import data
from distill_jax.cache import (
  CorruptCache,
  Dense,
  Incomplete,
  Mismatch,
  open_cache,
  pseudo_labels,
  seq_kd,
  write_cache,
)
from distill_jax.cache.sequence_level import (
  nth_best,
  pseudo_label_figures,
  selection,
  writing,
)
from distill_jax.models import from_apply
from distill_jax.types import Variables


@pytest.fixture(scope="module")
def source():
  return pairs()


@pytest.fixture(scope="module")
def url(tmp_path_factory, source):
  """Pseudo labels of beams that tests only read."""
  url = tmp_path_factory.mktemp("pseudo") / "labels"
  written(url, source, beams)
  return url


def never(*_):
  raise AssertionError("the sampler was called")


def files(folder):
  """Returns the bytes of the files of a folder by name; of the manifest there are times inside."""
  paths = sorted(path for path in pathlib.Path(folder).iterdir() if path.name != "manifest.json")
  return {path.name: path.read_bytes() for path in paths}


def test_rows_have_the_teachers_sequences(tmp_path, source):
  labels = written(tmp_path, source)
  assert targets(labels) == texts(source, shift=3)
  np.testing.assert_array_equal(labels.ids, source.ids)
  for name in ("source", "source_segments"):
    np.testing.assert_array_equal(labels.arrays[name], source.arrays[name])
  label, tokens = labels.arrays["label"], labels.arrays["tokens"]
  assert label.shape == tokens.shape == (ROWS, WIDTH)
  assert (tokens[:, 0] == START).all() and (label.dtype, tokens.dtype) == (np.int32, np.int32)
  inside = label[:, :-1] > END
  np.testing.assert_array_equal(tokens[:, 1:][inside], label[:, :-1][inside])
  assert ((label == END).sum(1) == 1).all() and (label[:, -1] == data.UNLABELED).all()
  assert (labels.classes, labels.name) == (VOCAB, source.name)
  assert labels.digest != source.digest


def test_choices_among_a_beam(source, url):
  best = pseudo_labels(url, source)
  assert targets(best) == texts(source, shift=3)
  copies = pseudo_labels(url, source, keep=nth_best(2))
  assert targets(copies) == texts(source)
  shorter = pseudo_labels(url, source, keep=[nth_best(1)])
  expected = {id: text[:-1] for id, text in texts(source, shift=3).items() if len(text) > 1}
  assert targets(shorter) == expected  # the others are empty
  assert len({labels.digest for labels in (best, copies, shorter)}) == 3


def test_a_part_of_the_rows_is_read_by_id(source, url):
  part = source.take(np.arange(ROWS)[::-3])
  labels = pseudo_labels(url, part)
  np.testing.assert_array_equal(labels.ids, part.ids)
  assert targets(labels) == texts(part, shift=3)
  unlabeled = data.unlabeled(part)
  assert targets(pseudo_labels(url, unlabeled)) == texts(part, shift=3)


def test_a_finished_file_is_opened_as_it_is(tmp_path, source):
  first = written(tmp_path, source)
  before = files(tmp_path) | {"manifest.json": (tmp_path / "manifest.json").read_bytes()}
  again = written(tmp_path, source, never)
  assert again.digest == first.digest
  assert files(tmp_path) | {"manifest.json": (tmp_path / "manifest.json").read_bytes()} == before


@pytest.mark.parametrize("stop", [0, 1, 3, "reading back", "selection"])
def test_a_stopped_writer_resumes_to_the_same_bytes(tmp_path, source, monkeypatch, stop):
  monkeypatch.setattr(writing, "SHARD_BATCHES", 2)
  written(tmp_path / "full", source, keep=nth_best(0))
  calls = []

  def interrupted(variables, key, batch):
    if len(calls) == stop:
      raise KeyboardInterrupt
    calls.append(batch["id"])
    return shifted(variables, key, batch)

  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    if stop == "reading back":
      patched.setattr(writing.shards, "complete", interrupt)
    elif stop == "selection":
      patched.setattr(selection, "select", interrupt)
    with pytest.raises(KeyboardInterrupt):
      written(tmp_path / "stopped", source, interrupted, keep=nth_best(0))
  with pytest.raises(Incomplete):
    pseudo_labels(tmp_path / "stopped", source)
  sampler = never if isinstance(stop, str) else shifted
  written(tmp_path / "stopped", source, sampler, keep=nth_best(0))
  full, resumed = files(tmp_path / "full"), files(tmp_path / "stopped")
  assert full == resumed and len([name for name in full if name.startswith("shard-")]) == 3


def test_samples_do_not_depend_on_the_batches(tmp_path, source):
  """The sampler gets the same key for every batch: rows draw by their id."""

  def random(variables, key, batch):
    seed = jax.random.key_data(key).tolist()
    draws = [
      np.random.default_rng([*seed, id]).integers(2, VOCAB, 4) for id in batch["id"].tolist()
    ]
    return np.stack(draws), np.full(len(draws), 3)

  key = jax.random.key(3)
  first = targets(written(tmp_path / "8", source, random, key=key))
  assert targets(written(tmp_path / "16", source, random, key=key, batch_size=16)) == first
  assert targets(written(tmp_path / "default", source, random)) != first
  with pytest.raises(Mismatch, match=r"decoding\.key"):
    written(tmp_path / "8", source, random, key=jax.random.key(4))


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("teacher.weights", {"variables": Variables({"shift": np.asarray(4)}, {})}),
    (r"decoding\.settings\.length", {"settings": {"length": 5}}),
    ("start_token", {"start_token": 2}),
    ("keep", {"keep": nth_best(1)}),
  ],
)
def test_other_pseudo_labels_are_rejected(source, url, field, change):
  options = dict(start_token=START, end_token=END, settings={"length": WIDTH}, batch_size=8)
  with pytest.raises(Mismatch, match=field):
    seq_kd(url, never, source=source, **({"variables": WEIGHTS} | options | change))


def test_other_rows_are_rejected(source, url):
  changed = source.arrays["source"].copy()
  changed[7] += 1
  other = dataclasses.replace(source, arrays={**source.arrays, "source": changed})
  with pytest.raises(Mismatch, match=r"data\.examples\.source"):
    written(url, other, never)
  with pytest.raises(Mismatch, match=f"source.*id {source.ids[7]}"):
    pseudo_labels(url, other)
  with pytest.raises(Mismatch, match="vocabulary"):
    pseudo_labels(url, dataclasses.replace(source, vocabulary="another"))
  with pytest.raises(ValueError, match=r"id 7\d+ "):
    pseudo_labels(
      url, dataclasses.replace(source, arrays={**source.arrays, "id": 7000 + source.ids})
    )


def test_a_changed_row_is_named(tmp_path, source):
  written(tmp_path, source, beams)
  [shard] = tmp_path.glob("shard-*")
  content = bytearray(shard.read_bytes())
  content[-20] ^= 1  # in the row with the largest id
  shard.write_bytes(content)
  with pytest.raises(CorruptCache, match=f"example id {source.ids.max()}"):
    pseudo_labels(tmp_path, source)
  shard.write_bytes(content[:-100])  # a file that is half written
  with pytest.raises(CorruptCache, match="shard-"):
    pseudo_labels(tmp_path, source)
  shard.unlink()
  with pytest.raises(Incomplete):
    pseudo_labels(tmp_path, source)
  restored = written(tmp_path, source, beams)
  assert targets(restored) == texts(source, shift=3)


def test_a_changed_choice_is_detected(tmp_path, source):
  written(tmp_path, source, beams)
  for name in ("kept.json", next(tmp_path.glob("kept-*")).name):
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(CorruptCache, match=re.escape(name)):
      pseudo_labels(tmp_path, source)
    path.write_bytes(content)
  (tmp_path / "kept.json").unlink()  # the way to choose otherwise
  assert targets(written(tmp_path, source, never, keep=nth_best(2))) == texts(source)


def test_other_functions_of_the_same_name_are_noticed(tmp_path, source):
  first = written(tmp_path, source, beams, keep=lambda candidates: candidates.usable)
  again = written(tmp_path, source, beams, keep=lambda candidates: candidates.usable & True)
  assert again.digest == first.digest
  with pytest.raises(Mismatch, match="keep"):
    written(tmp_path, source, beams, keep=lambda candidates: nth_best(2)(candidates))


def test_each_kind_of_file_says_what_reads_it(tmp_path, source, url):
  with pytest.raises(Mismatch, match="pseudo_labels"):
    open_cache(url)
  teacher = from_apply(
    None, lambda w, x: x @ w, variables=2 * np.eye(3, dtype=np.float32), inputs="x"
  )
  arrays = {"x": np.eye(3, dtype=np.float32)}
  write_cache(tmp_path, teacher, arrays, {"logits": Dense("float32")}, progress=False)
  with pytest.raises(Mismatch, match="open_cache"):
    pseudo_labels(tmp_path, source)
  with pytest.raises(Mismatch):
    written(tmp_path, source)


def test_rows_without_a_sequence_are_dropped_and_counted(tmp_path, source, capsys):
  def mixed(variables, key, batch):
    tokens = np.full((len(batch["id"]), 7), 5)
    lengths = np.asarray(batch["id"]) % 8  # 0 is empty, 6 too long, 7 has not ended
    tokens[lengths == 3, 0] = START
    return tokens, lengths

  labels = written(tmp_path, source, mixed, progress=True)
  lengths = source.ids % 8
  counts = {name: int((lengths == n).sum()) for name, n in (("empty", 0), ("not ended", 7))}
  counts |= {"start token first": int((lengths == 3).sum()), "too long": int((lengths == 6).sum())}
  assert min(counts.values()) > 0
  kept = ROWS - sum(counts.values())
  figures = {"rows": ROWS, "kept": kept, "dropped": counts}
  assert pseudo_label_figures(tmp_path) == figures and len(labels) == kept
  assert f"kept {kept} of {ROWS}" in capsys.readouterr().out
  np.testing.assert_array_equal(labels.ids, source.ids[np.isin(lengths, [1, 2, 4, 5])])
  assert {len(tokens) for tokens in targets(labels).values()} == {1, 2, 4, 5}
  with pytest.warns(UserWarning, match="label"):
    short = pseudo_labels(tmp_path, pairs(width=5))
  assert len(short) == kept - (lengths == 5).sum()
  with pytest.raises(ValueError, match="keep"):
    pseudo_labels(tmp_path, source, keep=lambda candidates: candidates.usable & False)


def test_sources_without_references_or_classes(tmp_path, source):
  arrays = {name: source.arrays[name] for name in ("id", "source", "source_segments")}
  labels = written(tmp_path, data.Source(arrays), beams)
  assert targets(labels) == texts(source, shift=3)
  assert labels.arrays["label"].shape == (ROWS, WIDTH)
