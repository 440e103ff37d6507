"""Computes and writes the missing shards of a cache."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from distill_jax.cache.codecs.output_errors import check_errors
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.rows import shards_of_process
from distill_jax.cache.teacher.predictor import Predictor
from distill_jax.cache.teacher_inputs import UNDECODABLE, TeacherInputs
from distill_jax.distributed.progress import writing_above
from distill_jax.types import Batch


def fill_missing(
  store: Store,
  manifest: Manifest,
  inputs: TeacherInputs,
  predictor: Predictor,
  *,
  batch_size: int,
  part: tuple[int, int] | None,
  progress: bool,
) -> None:
  """Writes this process' part of the missing shards, then helps with the others.

  Args:
    store, manifest: the cache.
    inputs: the examples.
    predictor: computes the columns of a batch.
    batch_size: rows that the teacher takes at once.
    part: (index, count) of this process; None: that of the JAX process.
    progress: whether to show a progress bar.
  """
  missing = shards.missing_shards(store, manifest)
  names = tuple(manifest.identity["data"]["inputs"])
  checksum = functools.partial(inputs.checksums, names=names)
  index, count = part or (jax.process_index(), jax.process_count())
  rows = _num_rows(manifest, missing)
  bar = progress_bar(None, "cache", " rows", progress, total=rows)
  with bar, writing_above(bar):
    todo = shards_of_process(missing, index, count)
    while missing:
      for number in todo:
        ids_and_views = manifest.rows.ids_and_views(*manifest.plan.span(number))
        batches = _batches(inputs, *ids_and_views, batch_size)
        checksums, columns = _compute_columns(predictor, checksum, batches, bar.update)
        shards.write_shard(store, manifest, number, checksums, columns)
      missing = shards.missing_shards(store, manifest)
      # The other processes go through their shards from the first on: help from the last.
      todo = missing[-1:]
  if progress:
    print(f"cache: wrote {len(manifest.rows):,} rows to {store.url}", flush=True)


def progress_bar(
  items: Iterable[Any] | None, title: str, unit: str, progress: bool, **options: Any
) -> tqdm:
  """Returns a bar on a terminal, a line at the end elsewhere, or nothing."""
  return tqdm(items, desc=title, unit=unit, disable=None if progress else True, **options)


def _num_rows(manifest: Manifest, numbers: Iterable[int]) -> int:
  spans = [manifest.plan.span(number) for number in numbers]
  return sum(last - first for first, last in spans)


def _batches(
  inputs: TeacherInputs, ids: np.ndarray, views: np.ndarray, batch_size: int
) -> Iterator[tuple[Batch, int]]:
  """Yields batches of one size, for one program, and how many rows of each count."""
  for first in range(0, len(ids), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(ids) - 1)
    yield inputs.batch(ids[rows], views[rows]), min(batch_size, len(ids) - first)


def _compute_columns(
  predictor: Predictor,
  checksum: Callable[[Batch], np.ndarray],
  batches: Iterable[tuple[Batch, int]],
  report: Callable[[int], Any],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns checksums and columns of all batches.

  The device computes a batch while the host copies the one before.
  """
  checksums: list[np.ndarray] = []
  parts: list[dict[str, np.ndarray]] = []

  def copy_to_host(batch: Batch, count: int, result: Any) -> None:
    columns, errors = jax.device_get(result)
    checksums.append(checksum(batch)[:count])
    for name, row_errors in errors.items():
      # The outputs for an undecodable image are never read, so they may have errors.
      row_errors = row_errors[:count] * (checksums[-1] != UNDECODABLE)
      check_errors(name, row_errors, batch["id"], batch["view"])
    parts.append({name: x[:count] for name, x in columns.items()})
    report(count)

  pending = None
  for batch, count in batches:
    result = predictor.run(batch)
    if pending is not None:
      copy_to_host(*pending)
    pending = batch, count, result
  if pending is not None:
    copy_to_host(*pending)
  columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  return np.concatenate(checksums), columns
