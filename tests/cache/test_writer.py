"""Checks how a cache is written: resumed, shared between processes, and never with invalid rows."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from toys import CLASSES, ROWS, linear, teacher_logits, written

from distill_jax.cache import CorruptCache, Dense, Incomplete, open_cache, writer
from distill_jax.cache.store import shards
from distill_jax.models import from_apply


@pytest.fixture
def small_shards(monkeypatch):
  """Shards of one batch: four for 60 rows."""
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)


def logits_of(cache, ids):
  return cache.add_columns({"id": ids})["teacher/logits.values"]


def test_a_second_call_opens_the_cache(tmp_path, source, monkeypatch):
  teacher = linear()
  written(tmp_path, source, teacher._replace(variables=None), teacher_variables=teacher.variables)
  before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  monkeypatch.setattr(writer, "fill_missing", None)  # a call would raise
  assert len(written(tmp_path, source)) == ROWS
  assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_stopped_cache_resumes_to_the_same_bytes(tmp_path, source, monkeypatch, small_shards):
  written(tmp_path / "full", source)
  write_shard, calls = shards.write_shard, []

  def stop_at_the_third(*arguments):
    if len(calls) == 2:
      raise KeyboardInterrupt
    calls.append(1)
    return write_shard(*arguments)

  with monkeypatch.context() as patched:
    patched.setattr(shards, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
      written(tmp_path / "stopped", source)
  with pytest.raises(Incomplete, match="2 of 4 shards"):
    open_cache(tmp_path / "stopped")
  written(tmp_path / "stopped", source)
  names = sorted(path.name for path in (tmp_path / "full").glob("shard-*"))
  assert len(names) == 4
  for name in names:
    assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_a_shard_that_is_written_again_is_compared(tmp_path, source, monkeypatch, small_shards):
  """Another device's last bits are not those of the completion record."""
  written(tmp_path, source)
  (tmp_path / "shard-00000002").unlink()
  write_shard = shards.write_shard

  def write_other_bits(*arguments):
    columns = {name: x + np.float32(1e-6) for name, x in arguments[-1].items()}
    return write_shard(*arguments[:-1], columns)

  with monkeypatch.context() as patched:
    patched.setattr(shards, "write_shard", write_other_bits)
    with pytest.raises(CorruptCache, match=r"complete\.json"):
      written(tmp_path, source)
  (tmp_path / "complete.json").unlink()
  assert len(written(tmp_path, source)) == ROWS


def test_a_later_writer_uses_the_first_ones_shards(tmp_path, source, monkeypatch, small_shards):
  begin = shards.begin

  def begin_late(store, manifest, same):
    # Another writer comes first, after this one has looked.
    begin(store, dataclasses.replace(manifest, rows_per_shard=24), same)
    return begin(store, manifest, same)

  monkeypatch.setattr(shards, "begin", begin_late)
  cached = written(tmp_path, source, batch_size=16)
  assert cached.manifest.rows_per_shard == 24 and len(cached.manifest.plan) == 3
  expected = teacher_logits(source.arrays["image"])
  np.testing.assert_allclose(logits_of(cached, source.ids), expected, atol=1e-5)


def test_free_space_is_checked_before_anything_is_computed(tmp_path, source, monkeypatch):
  usage = shards.Store.probe_writable.__globals__["shutil"].disk_usage(tmp_path)
  monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
  with pytest.raises(OSError, match=r"2,\d\d\d bytes .* 1,000"):
    written(tmp_path, source)


def test_bytes_are_told_before_anything_is_computed(tmp_path, source, monkeypatch, capsys):
  monkeypatch.setattr(writer, "fill_missing", lambda *arguments, **options: 1 / 0)
  outputs = {"logits": Dense("float16"), "hidden": Dense("float32")}
  with pytest.raises(ZeroDivisionError):
    written(tmp_path, source, outputs=outputs, progress=True)
  output = capsys.readouterr().out
  assert f"(logits {2 * CLASSES}, hidden {4 * 16})" in output
  total = int(re.search(r"([\d,]+) bytes in all", output)[1].replace(",", ""))
  assert ROWS * (2 * CLASSES + 4 * 16) < total < ROWS * 128


def test_a_process_helps_with_the_shards_of_others(tmp_path, cached, source, small_shards):
  helped = written(tmp_path, source, part=(1, 3))
  np.testing.assert_array_equal(logits_of(helped, source.ids), logits_of(cached, source.ids))


def test_padding_rows_of_a_batch_are_not_written(tmp_path, cached, source):
  odd = written(tmp_path, source, batch_size=24)
  np.testing.assert_allclose(logits_of(odd, source.ids), logits_of(cached, source.ids), atol=1e-5)


def test_an_invalid_output_names_its_example(tmp_path, source):
  arrays = dict(source.arrays)
  arrays["image"] = arrays["image"].copy()
  arrays["image"][17, 0, 0, 0] = 1234.0
  marked = dataclasses.replace(source, arrays=arrays)

  def apply(weights, x):
    kernel, value = weights
    is_marked = (x == 1234.0).any((1, 2, 3))[:, None]
    return jnp.where(is_marked, value, x.reshape(len(x), -1) @ kernel), {}

  for value, match in ((np.nan, "NaN"), (np.inf, "inf"), (7e4, "float32")):
    weights = linear().variables.params, jnp.float32(value)
    teacher = from_apply(None, apply, variables=weights)
    folder = tmp_path / match
    with pytest.raises(ValueError, match=rf"'logits'.* id {source.ids[17]}, view 0 .*{match}"):
      written(folder, marked, teacher, {"logits": Dense("float16")})
    assert not list(folder.glob("shard-*"))
