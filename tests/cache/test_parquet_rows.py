"""Checks rows from parquet files: those of our own lists, or refused."""

import numpy as np
import pytest
from imported import lists_of
from language_models import VOCABULARY, language_model, token_rows

from distill_jax.cache import TopK, import_rows, parquet_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
K = 6


@pytest.fixture(scope="module")
def source():
  return token_rows(np.random.default_rng(0), number=12)


@pytest.fixture(scope="module")
def lists(source):
  """Lists of all positions of all rows."""
  teacher = language_model(1, logits=True)
  outputs, _ = teacher.apply(*teacher.variables, dict(source.arrays), train=False, key=None)
  return lists_of(outputs["logits"], K)


def columns_of(source, lists, padding):
  """Returns columns as DistillKit would have them as exact values.

  Args:
    padding: whether the tokens have one more; 2: the lists too.
  """
  columns = {"input_ids": [], "indices": [], "logprobs": [], "number": []}
  for at, id in enumerate(source.ids.tolist()):
    count = int((source.arrays["label"][at] >= 0).sum())
    tokens = source.arrays["tokens"][at, :count].tolist()
    columns["input_ids"].append(tokens + [0] * min(padding, 1))
    columns["number"].append(id)
    for name in ("indices", "logprobs"):
      values = lists[name][at, :count].tolist()
      columns[name].append(values + values[-1:] * (padding == 2))
  return columns


def write(folder, columns):
  path = folder / "rows.parquet"
  parquet.write_table(pyarrow.table(columns), path)
  return path


@pytest.mark.parametrize("id", [None, "number"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_lists_are_those_that_were_written(tmp_path, source, lists, padding, id):
  columns = columns_of(source, lists, padding)
  order = np.random.default_rng(0).permutation(len(source))
  columns = {name: [values[at] for at in order] for name, values in columns.items()}
  rows = list(parquet_rows(write(tmp_path, columns), source, top_k=K, id=id))
  assert sorted(row[0] for row in rows) == sorted(source.ids)
  labeled = source.arrays["label"] >= 0
  for number, view, values in rows:
    at = source.ids.tolist().index(number)
    assert view == 0
    for name in ("indices", "logprobs"):
      stored, expected = values[name][labeled[at]], lists[name][at][labeled[at]]
      np.testing.assert_array_equal(stored, expected)
  outputs = {"logits": TopK(K)}
  cache = import_rows(tmp_path / "cache", rows, source, outputs, identity="a file", progress=False)
  assert len(cache) == len(source)


def test_files_of_several_parts_are_read(tmp_path, source, lists):
  columns = columns_of(source, lists, 1)
  paths = []
  for part in (slice(3), slice(3, None)):
    folder = tmp_path / str(part.start)
    folder.mkdir()
    paths.append(write(folder, {name: values[part] for name, values in columns.items()}))
  assert len(list(parquet_rows(paths, source, top_k=K))) == len(source)


WRONG = {
  "row 2: expected the tokens of a row": lambda columns: columns["input_ids"][2].__setitem__(1, 3),
  "row 3: expected the tokens of a row .*each row once": lambda columns: [
    values.__setitem__(3, values[2]) for values in columns.values()
  ],
  "row 2: expected lists of one length": lambda columns: columns["indices"][2][1].pop(),
  "position": lambda columns: columns["logprobs"].__setitem__(
    2, [[1.0, *x[1:]] for x in columns["logprobs"][2]]
  ),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_rows_are_named(tmp_path, source, lists, reason):
  columns = columns_of(source, lists, 1)
  WRONG[reason](columns)
  rows = parquet_rows(write(tmp_path, columns), source, top_k=K)
  with pytest.raises(ValueError, match=reason):
    import_rows(
      tmp_path / "cache", rows, source, {"logits": TopK(K)}, identity="a file", progress=False
    )


WRONG_WITH_ID = {
  "example id .*position 1: expected the source's token .*got 3": lambda columns: columns[
    "input_ids"
  ][2].__setitem__(1, 3),
  "example id .*expected lists for": lambda columns: [
    columns[name][2].pop() for name in ("indices", "logprobs")
  ],
  "expected 6 or more": lambda columns: [
    columns[name].__setitem__(2, [x[:5] for x in columns[name][2]])
    for name in ("indices", "logprobs")
  ],
  "example id 99999": lambda columns: columns["number"].__setitem__(2, 99999),
}


@pytest.mark.parametrize("reason", WRONG_WITH_ID)
def test_wrong_rows_with_ids_are_named(tmp_path, source, lists, reason):
  columns = columns_of(source, lists, 1)
  WRONG_WITH_ID[reason](columns)
  with pytest.raises(ValueError, match=reason):
    list(parquet_rows(write(tmp_path, columns), source, top_k=K, id="number"))


@pytest.mark.parametrize(
  "packed", [["compressed_logprobs", "bytepacked_indices"], ["packed_indices", "exact_values"]]
)
def test_packed_columns_are_refused_by_name(tmp_path, source, packed):
  path = write(tmp_path, {"input_ids": [[0]]} | {name: [[[0]]] for name in packed})
  with pytest.raises(ValueError, match=f"rows.parquet.*{packed[0]}.*compression_config") as error:
    next(parquet_rows(path, source, top_k=K))
  assert packed[1] in str(error.value)


def test_other_files_and_columns_are_named(tmp_path, source):
  path = write(tmp_path, {"input_ids": [[0]], "indexes": [[[0]]], "logprobs": [[[0.0]]]})
  with pytest.raises(ValueError, match="'indices'; did you mean 'indexes'"):
    next(parquet_rows(path, source, top_k=K))
  path.write_bytes(b"text")
  with pytest.raises(ValueError, match="rows.parquet: expected a parquet file"):
    next(parquet_rows(path, source, top_k=K))
  with pytest.raises(ValueError, match="top_k"):
    next(parquet_rows(path, source, top_k=VOCABULARY + 1))
