"""Reads rows from parquet files with a list of tokens and log-probabilities for each position."""

import collections
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.cache.importing.importer import Row
from distill_jax.cache.importing.row_checks import TARGETS, row_name
from distill_jax.cache.importing.token_rows import TokenRows
from distill_jax.errors import check_integer, naming_extras, suggest

# DistillKit's, and those of its copy in open-instruct; the last three are of its older form.
PACKED = ("compressed_logprobs", "bytepacked_indices", "packed_indices", "exact_values", "coeffs")
BATCH_ROWS = 32


def parquet_rows(
  paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
  source: Any,
  *,
  top_k: int,
  indices: str = "indices",
  logprobs: str = "logprobs",
  tokens: str = "input_ids",
  id: str | None = None,
) -> Iterator[Row]:
  """Yields rows for `import_rows` from parquet files of exact values.

  A row of a file has the teacher's input in `tokens` [n], and lists [m, K] in `indices` and
  `logprobs`, where list t holds what the teacher predicts after token t: natural logarithms at
  temperature 1, under the normalizer of the full vocabulary. DistillKit and open-instruct name the
  input `input_ids`, and put a padding token after it, whose list they need not; they have no ids,
  so rows are found by their tokens. Their own columns of packed bytes are refused by name: unpack
  them with their `LogprobCompressor.decompress_to_sparse` and their compression_config.yaml.

  Positions after the last label count for no loss of tokens, and get a uniform distribution.

  Args:
    paths: one file or several.
    source: as for `import_rows`; a text with 'tokens' and 'label' [N, L], the label being the next
      token.
    top_k: number of tokens to read at each position, at least the k of `TopK`.
    indices, logprobs, tokens: names of the columns.
    id: name of the column with the examples' ids; None: rows are found by their tokens.

  Raises:
    ValueError: a file is no parquet, has other columns or packed ones, or a row is not one of the
      source's or has too few lists; the message names file and row, or id and position.
    ModuleNotFoundError: pyarrow is not installed.
    OSError: a file cannot be read.

  >>> import pathlib, tempfile
  >>> import pyarrow, pyarrow.parquet
  >>> from distill_jax import cache, data
  >>> arrays = {"tokens": np.array([[0, 1]]), "label": np.array([[1, 2]])}
  >>> source = data.Source(arrays, classes=3)
  >>> columns = {"input_ids": [[0, 1]], "indices": [[[1], [2]]], "logprobs": [[[-0.7], [-0.2]]]}
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.parquet"
  >>> pyarrow.parquet.write_table(pyarrow.table(columns), path)
  >>> [(id, view)] = [row[:2] for row in cache.parquet_rows(path, source, top_k=1)]
  >>> id, view
  (0, 0)
  """
  names = {"indices": indices, "logprobs": logprobs, "tokens": tokens}
  names |= {} if id is None else {"id": id}
  rows = TokenRows(source, top_k)
  ids_of: dict[bytes, collections.deque] = collections.defaultdict(collections.deque)
  for number in rows.ids if id is None else ():
    ids_of[_digest(rows.prompt(number)[:-1])].append(number)
  for path in [paths] if isinstance(paths, str | os.PathLike) else list(paths):
    for number, values in enumerate(_read(path, names)):
      name = f"{path}, row {number}"
      given = values["tokens"]
      lists = {key: _array(name, names[key], values[key]) for key in TARGETS}
      if id is None:
        found = _find(name, ids_of, given, min(map(len, lists.values())))
      else:
        found = check_integer(f"{name}: {id}", values["id"])
      yield found, 0, _values(rows, found, given, lists, top_k)
  # Rows without labels need no list, and their tokens may be in no file.
  for number in ids_of[_digest([])]:
    yield number, 0, rows.uniform()


def _values(
  rows: TokenRows, id: int, given: list[int], lists: Mapping[str, np.ndarray], top_k: int
) -> dict[str, Any]:
  """Returns a row's values; positions after the last label are uniform."""
  indices, logprobs = (lists[key] for key in TARGETS)
  prompt = rows.prompt(id)
  needed = len(prompt) - 1 if prompt else 0
  wrong = [at for at in range(needed) if at >= len(given) or given[at] != prompt[at]]
  if wrong:
    at = wrong[0]
    got = given[at] if at < len(given) else "the end"
    raise ValueError(
      f"{row_name(id, 0, (at,))}: expected the source's token {prompt[at]}, got {got}: pass the "
      "source whose rows the teacher received"
    )
  if min(len(indices), len(logprobs)) < needed:
    raise ValueError(
      f"{row_name(id, 0)}: expected lists for {needed} positions, up to the last label, got "
      f"{len(indices)} and {len(logprobs)}: compute the row again with a further token"
    )
  if indices.shape[1:] != logprobs.shape[1:] or indices.shape[-1] < top_k:
    raise ValueError(
      f"{row_name(id, 0)}: expected {top_k} or more tokens at each position, got {indices.shape} "
      f"and {logprobs.shape}: read fewer with top_k"
    )
  values: dict[str, Any] = dict(rows.uniform())
  order = np.argsort(-logprobs[:needed], axis=-1, kind="stable")[:, :top_k]
  values["indices"][:needed] = np.take_along_axis(indices[:needed], order, -1)
  values["logprobs"][:needed] = np.take_along_axis(logprobs[:needed], order, -1)
  return {**values, "temperature": 1.0}


def _find(name: str, ids_of: Mapping[bytes, Any], given: list[int], count: int) -> int:
  """Returns the id of the source's next row of these tokens, with or without the last one."""
  for length in (count, count - 1):
    ids = ids_of.get(_digest(given[:length])) if length > 0 else None
    if ids:
      return int(ids.popleft())
  raise ValueError(
    f"{name}: expected the tokens of a row of the source, and each row once, got {count} positions "
    f"of {given[:5]}...: pass the source whose rows the teacher received"
  )


def _digest(tokens: Sequence[int]) -> bytes:
  """Returns a digest of tokens: those of all rows may not fit into memory."""
  return hashlib.blake2b(np.array(tokens, "<i8").tobytes(), digest_size=16).digest()


def _read(path: str | os.PathLike[str], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
  """Yields the values of each row of a file by their meaning."""
  with naming_extras():
    import pyarrow
    import pyarrow.parquet
  try:
    file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{path}: expected a parquet file, got another one: {error}") from error
  with file:
    _check_columns(path, file.schema_arrow.names, names)
    for batch in file.iter_batches(BATCH_ROWS, columns=list(names.values())):
      for values in batch.to_pylist():
        yield {meaning: values[name] for meaning, name in names.items()}


def _check_columns(path: Any, columns: list[str], names: Mapping[str, str]) -> None:
  packed = [name for name in PACKED if name in columns]
  for argument, name in names.items():
    if name in columns:
      continue
    if packed:
      raise ValueError(
        f"{path}: expected lists in {names['indices']!r} and {names['logprobs']!r}, got "
        f"DistillKit's packed {' and '.join(map(repr, packed))}, which only its "
        "compression_config.yaml explains: unpack them with its "
        "LogprobCompressor.decompress_to_sparse and store both results"
      )
    raise ValueError(f"{path}: expected a column {name!r}{suggest(name, columns)} ({argument}=)")


def _array(name: str, column: str, lists: Any) -> np.ndarray:
  """Returns lists of one length as an array [m, K]."""
  try:
    values = np.array(lists)
  except ValueError:
    values = np.empty(0, object)
  if values.ndim != 2 or values.dtype.kind not in "iuf":
    raise ValueError(
      f"{name}: expected lists of one length at all positions in {column!r}, got others: fill up, "
      "or compute the row again"
    )
  return values
