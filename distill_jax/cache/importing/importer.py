"""Checks and encodes imported rows a few at a time."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.codecs.output_errors import check_errors
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.cache.importing.journal import Journal
from distill_jax.cache.importing.row_checks import RowSpec, Targets, check_row, row_name
from distill_jax.cache.shard_filling import progress_bar
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.teacher.lazy_logits import mask_classes
from distill_jax.cache.teacher.predictor import encode_columns
from distill_jax.cache.teacher_inputs import TeacherInputs
from distill_jax.losses import SparseTargets
from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.types import Batch

Row = tuple[int, int, Mapping[str, Any]]
MAX_ROWS = 64  # encoded at once
MAX_BYTES = 2**27  # of the logits that are encoded at once; at least one row
# Where the least listed class has this probability, and all others together less than `NOTHING`,
# the list was probably renormalized.
SOMETHING, NOTHING = 1e-3, 1e-6


class MissingRows(NamedTuple):
  """The rows that an import lacks.

  Attributes:
    source: the examples.
    ids, views: integers [M].
    spec: what the values of every row must be.
  """

  source: Any
  ids: np.ndarray
  views: np.ndarray
  spec: RowSpec


Filler = Callable[[MissingRows], Iterable[Row]]
"""Computes the rows that are missing, in any order."""


class Importer:
  """Checks rows, encodes them a few at a time, and adds them to a journal."""

  def __init__(
    self,
    manifest: Manifest,
    inputs: TeacherInputs,
    spec: RowSpec,
    outputs: Mapping[str, Codec],
    augment: Callable[[Batch], Batch] | None,
    names: Sequence[str],
  ):
    self._manifest = manifest
    self._inputs = inputs
    self._spec = spec
    self._augment = augment
    self._names = names
    self._num_positions = 0
    self._num_closed = 0
    self._encode_logits = jax.jit(_logits_encoder(outputs, spec.classes))
    self._encode_targets = jax.jit(_targets_encoder(outputs, spec.shape))

  def add(self, journal: Journal, rows: Iterable[Row] | Filler, progress: bool) -> None:
    """Adds all rows to the journal.

    Raises:
      ValueError: a row is wrong.
    """
    size = min(MAX_ROWS, max(1, MAX_BYTES // (4 * math.prod(self._spec.shape))))
    missing = np.flatnonzero(~journal.is_stored)
    with contextlib.ExitStack() as stack:
      if callable(rows):
        # Rows that are computed meanwhile are kept one by one: an interruption loses few.
        size = 1
        rows = rows(self._missing_rows(missing)) if len(missing) else ()
        if isinstance(rows, Generator):
          # Its threads must not go on after an error here.
          stack.callback(rows.close)
      elif not isinstance(rows, Iterable):
        raise wrong_kind("rows", "(id, view, values) of each row, or a function", rows)
      total = len(missing)
      bar = stack.enter_context(
        progress_bar(None, "cache: importing", " rows", progress, total=total)
      )
      checked = self._checked(rows)
      for _, group in itertools.groupby(checked, lambda row: isinstance(row[2], Targets)):
        is_left = True
        while is_left:
          chunk: list[tuple[int, int, Any]] = []
          try:
            for row in itertools.islice(group, size):
              chunk.append(row)
          finally:  # Rows that came before an error or an interruption are kept.
            if chunk:
              self._write(journal, chunk, size)
              bar.update(len(chunk))
          is_left = len(chunk) == size
    if self._num_closed > self._num_positions / 2:
      warnings.warn(
        f"rows: expected log-probabilities under the normalizer of all classes, got lists that sum "
        f"to 1 at {self._num_closed:,} of {self._num_positions:,} positions: do not renormalize "
        "them, unless no other class is possible",
        stacklevel=3,
      )

  def _missing_rows(self, numbers: np.ndarray) -> MissingRows:
    views, positions = np.divmod(numbers, len(self._manifest.rows.ids))
    ids = self._manifest.rows.ids[positions]
    return MissingRows(self._inputs.source, ids, views.astype(np.int32), self._spec)

  def _checked(self, rows: Iterable[Row]) -> Iterator[tuple[int, int, Any]]:
    """Yields checked rows; raises ValueError for a row that is unknown or comes twice."""
    index = self._manifest.rows
    known = set(index.ids.tolist())
    is_seen = np.zeros(len(index), bool)
    for row in rows:
      id, view, values = check_row(self._spec, row)
      if id not in known or not 0 <= view < index.num_views:
        raise ValueError(
          f"{row_name(id, view)}: expected one of the source's {len(known):,} ids, from "
          f"{index.ids[0]} to {index.ids[-1]}, and a view from 0 to {index.num_views - 1}: leave "
          "the row out, or pass the source that the teacher received"
        )
      number = index.numbers(np.array([id]), np.array([view]))[0]
      if is_seen[number]:
        raise ValueError(
          f"{row_name(id, view)}: expected each row once, got it twice: leave one out"
        )
      is_seen[number] = True
      yield id, view, values

  def _write(self, journal: Journal, chunk: Sequence[tuple[int, int, Any]], size: int) -> None:
    """Encodes rows of one kind, padded to one size for one program, and appends them."""
    rows = np.minimum(np.arange(size), len(chunk) - 1)
    ids = np.array([chunk[row][0] for row in rows])
    views = np.array([chunk[row][1] for row in rows], np.int32)
    batch = self._inputs.batch(ids, views)
    crcs = self._inputs.checksums(batch, self._names)
    values = jax.tree.map(lambda *x: np.stack(x), *(chunk[row][2] for row in rows))
    if isinstance(values, Targets):
      self._count_closed(values, len(chunk))
      columns = self._encode_targets(values)
    else:
      augmented = batch if self._augment is None else self._augment(batch)
      keys = {name: augmented[name] for name in ("id", "view", "label") if name in augmented}
      columns, errors = self._encode_logits(values, keys)
      for name, row_errors in jax.device_get(errors).items():
        check_errors(name, row_errors[: len(chunk)], ids, views)
    count = len(chunk)
    columns = {name: x[:count] for name, x in jax.device_get(columns).items()}
    journal.append(ids[:count], views[:count], crcs[:count], columns)

  def _count_closed(self, targets: Targets, rows: int) -> None:
    log_odds = targets.log_odds[:rows]
    is_listed = targets.log_probs[:rows, ..., -1] > math.log(SOMETHING)
    self._num_positions += log_odds.size
    self._num_closed += int((is_listed & (log_odds > -math.log(NOTHING))).sum())


def _logits_encoder(outputs: Mapping[str, Codec], classes: int) -> Callable[..., Any]:
  """Returns `(logits, batch) -> (columns, errors)`, as `write_cache` encodes logits."""

  def encode(logits: jax.Array, batch: Batch):
    return encode_columns(outputs, dict.fromkeys(outputs, mask_classes(logits, classes)), batch)

  return encode


def _targets_encoder(outputs: Mapping[str, Codec], shape: tuple[int, ...]) -> Callable[..., Any]:
  """Returns `Targets -> columns`."""

  def encode(targets: Any) -> dict[str, jax.Array]:
    output = jax.ShapeDtypeStruct((len(targets.indices), *shape), jnp.float32)
    columns: dict[str, jax.Array] = {}
    for name, codec in outputs.items():
      assert isinstance(codec, TopK)  # `RowSpec.k` is 0 otherwise
      sparse = SparseTargets(targets.indices, targets.log_probs, targets.log_odds)
      parts = codec.encode_targets(output, sparse, targets.log_odds, targets.label_log_prob)
      columns |= {f"{name}.{part}": x for part, x in parts.items()}
    return columns

  return encode
