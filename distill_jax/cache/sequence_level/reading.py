"""Reads pseudo labels as a source whose targets are a teacher's sequences."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.cache.compatibility import check_run
from distill_jax.cache.reader import Cache
from distill_jax.cache.sequence_level.candidates import COLUMNS, Candidates, Keep
from distill_jax.cache.sequence_level.selection import (
  DROPPED,
  Selection,
  as_rules,
  read_selection,
  select,
  target_length,
)
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import open_store
from distill_jax.cache.store.manifest import Mismatch
from distill_jax.data import UNLABELED, Source


def pseudo_labels(
  url: str | os.PathLike[str],
  source: Source | Mapping[str, Any],
  keep: Keep | Sequence[Keep] | None = None,
) -> Source:
  """Reads the pseudo labels that `seq_kd` wrote, by id.

  Args:
    url: as for `seq_kd`.
    source: the rows that were decoded, or a part of them, with any labels.
    keep: functions that choose among the stored sequences for this source, as for `seq_kd`; nothing
      is stored, and a line says how many rows each dropped. None: the choice that `seq_kd` stored.

  Returns:
    The source with the rows that have a sequence, whose 'tokens' int32 [N, T] are the start token
    and the sequence, and whose 'label' int32 [N, T] is the sequence, the end token, and
    `data.UNLABELED` after it. T is that of the source's 'label'; without one, the sampler's L. All
    other entries, and the ids, stay. Of CTC teachers (`end_token=None`) there are no 'tokens', and
    no end token.

  Raises:
    Incomplete: the file does not exist, or `seq_kd` did not finish it.
    CorruptCache: a row was changed; the message names it.
    Mismatch: the file is of other data, or no file of pseudo labels. It is a ValueError.
    ValueError: an id is not in the file, or no row is left.

  >>> import tempfile
  >>> from distill_jax import cache, data
  >>> from distill_jax.types import Variables
  >>> source = data.Source({"source": np.array([[5, 6], [7, 8]])})
  >>> def beam(variables, batch):  # two sequences of one token each; token 0 is the end
  ...   tokens = np.stack([batch["source"], np.zeros_like(batch["source"])], -1)
  ...   return tokens, np.ones_like(tokens[..., 0]), np.tile([-1.0, -2.0], (len(tokens), 1))
  >>> url, teacher = tempfile.mkdtemp(), Variables({}, {})
  >>> labels = cache.seq_kd(
  ...   url, beam, teacher, source, start_token=1, end_token=0, settings={"beam": 2},
  ...   progress=False)
  >>> labels.arrays["tokens"]
  array([[1, 5],
         [1, 7]], dtype=int32)
  >>> second = cache.pseudo_labels(url, source, keep=cache.sequence_level.nth_best(1))
  pseudo labels: kept 2 of 2 rows
  >>> second.arrays["label"]
  array([[6, 0],
         [8, 0]], dtype=int32)
  """
  opened = _open(url)
  source = source if isinstance(source, Source) else Source(source)
  candidates = read_candidates(opened, source)
  if keep is None:
    selection = read_selection(opened.store, opened.manifest)
    numbers = _stored_numbers(opened, candidates, selection)
  else:
    selection = select(candidates, as_rules(keep))
    print(selection, flush=True)
    numbers = selection.numbers
  return _with_targets(source, candidates, numbers, selection)


def pseudo_label_figures(url: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns how many rows `seq_kd` kept and dropped, for tables.

  Args:
    url: as for `seq_kd`.

  Returns:
    'rows', 'kept', and 'dropped': number of rows by reason, of 'empty', 'not ended', 'start token
    first', 'too long', and the functions of `keep`.

  Raises:
    Incomplete, CorruptCache, Mismatch: as `pseudo_labels`.

  >>> import tempfile
  >>> from distill_jax import cache
  >>> from distill_jax.types import Variables
  >>> def one(variables, key, batch):  # one token, or none
  ...   return np.full((len(batch["id"]), 2), 5), np.asarray(batch["id"]) % 2
  >>> url, teacher = tempfile.mkdtemp(), Variables({}, {})
  >>> arrays = {"source": np.array([[5, 6], [7, 8]])}
  >>> labels = cache.seq_kd(
  ...   url, one, teacher, arrays, start_token=1, end_token=0, settings={"max_length": 2},
  ...   progress=False)
  >>> figures = cache.sequence_level.pseudo_label_figures(url)
  >>> figures["rows"], figures["kept"], figures["dropped"]["empty"]
  (2, 1, 1)
  """
  opened = _open(url)
  return read_selection(opened.store, opened.manifest).figures


def read_candidates(opened: Cache, source: Source) -> Candidates:
  """Returns the stored sequences of a source's rows, in its order, all usable.

  Raises:
    CorruptCache, Mismatch, ValueError: as `pseudo_labels`.
  """
  check_run(opened, source)
  records = opened.row_reader.read(source.ids, np.zeros(len(source), np.int32))
  tokens, lengths, scores = (np.ascontiguousarray(records[name]) for name in COLUMNS)
  decoding = opened.manifest.identity["decoding"]
  special = {name: decoding[name] for name in ("start_token", "end_token")}
  if special["end_token"] is None:
    special = {"start_token": -1, "end_token": decoding["blank"], "has_end": False}
  usable = np.ones(lengths.shape, bool)
  return Candidates(source.ids, tokens, lengths, scores, usable, source.arrays, **special)


def _open(url: str | os.PathLike[str]) -> Cache:
  """Opens a complete file of pseudo labels."""
  store = open_store(url)
  manifest = shards.open_complete(store)
  if "decoding" not in manifest.identity:
    raise Mismatch(
      f"url: expected pseudo labels of seq_kd in {store.url}, got a cache of outputs: open it with "
      "open_cache"
    )
  return Cache(store, manifest)


def _stored_numbers(opened: Cache, candidates: Candidates, selection: Selection) -> np.ndarray:
  """Returns the stored choice for these rows, without sequences that do not fit their targets."""
  ids = candidates.ids
  rows = opened.manifest.rows.numbers(ids, np.zeros(len(ids), np.int32))
  stored = selection.numbers[rows]
  chosen = np.arange(candidates.lengths.shape[1]) == stored[:, None]
  numbers = select(candidates._replace(usable=chosen), ()).numbers
  lost = int((numbers != stored).sum())
  if lost:
    warnings.warn(
      f"label: expected targets as long as those of seq_kd, got {target_length(candidates)}: "
      f"{lost:,} of {len(ids):,} sequences do not fit and are left out",
      stacklevel=3,
    )
  return numbers


def _with_targets(
  source: Source, candidates: Candidates, numbers: np.ndarray, selection: Selection
) -> Source:
  """Returns the rows that have a sequence, with it as their target."""
  rows = np.flatnonzero(numbers != DROPPED)
  if not rows.size:
    raise ValueError(
      f"keep: expected rows of {source.name} that have a sequence, got none of {len(source):,}: "
      f"{selection}"
    )
  end = candidates.end_token
  sequences = candidates.tokens[rows, numbers[rows]]
  lengths = candidates.lengths[rows, numbers[rows], None]
  position = np.arange(target_length(candidates))
  # A sequence is followed by end tokens, and fits: what is cut or added is padding.
  missing = max(0, len(position) - sequences.shape[1])
  padded = np.pad(sequences, ((0, 0), (0, missing)), constant_values=end)[:, : len(position)]
  # At least one: a row of the blank alone is an empty transcript, one of -1 alone has none.
  label = np.where(position < np.maximum(lengths + candidates.has_end, 1), padded, UNLABELED)
  targets = {"label": label}
  if candidates.has_end:
    targets["tokens"] = np.insert(padded[:, :-1], 0, candidates.start_token, axis=1)
  arrays = {name: values[rows] for name, values in source.arrays.items()}
  ignore_label = source.ignore_label if source.classes is None else UNLABELED
  return dataclasses.replace(source, arrays=arrays | targets, ignore_label=ignore_label)
