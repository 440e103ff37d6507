"""Writes a cache of teacher outputs that others computed."""

import contextlib
import datetime
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.codec import Codec, check_outputs, output_of
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.cache.identity import augmentation_identity, output_identity, same_value
from distill_jax.cache.importing.importer import MAX_ROWS, Filler, Importer, Row
from distill_jax.cache.importing.journal import Journal
from distill_jax.cache.importing.row_checks import RowSpec
from distill_jax.cache.reader import Cache, open_cache
from distill_jax.cache.shard_filling import progress_bar
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.teacher.predictor import tokenizer_size
from distill_jax.cache.teacher_inputs import TeacherInputs, make_teacher_inputs
from distill_jax.cache.writer import check_views, plan
from distill_jax.data import Source
from distill_jax.data.batch_functions import check_augment
from distill_jax.data.crops import Crop
from distill_jax.data.text.tokenized import PackedText
from distill_jax.data.videos import Streamed
from distill_jax.errors import join_first, suggest
from distill_jax.storage import files
from distill_jax.storage.lease import Lease
from distill_jax.types import Batch, input_names
from distill_jax.version import __version__


def import_rows(
  url: str | os.PathLike[str],
  rows: Iterable[Row] | Filler,
  source: Source | Streamed | PackedText | Mapping[str, Any],
  outputs: Mapping[str, Codec] | None = None,
  *,
  identity: str | Path | Sequence[Path],
  shape: tuple[int, ...] | None = None,
  inputs: Sequence[str] | None = None,
  crop: Crop | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  num_views: int = 1,
  progress: bool = True,
) -> Cache:
  """Writes teacher outputs that others computed as a cache, or resumes, and opens the cache.

  Rows are checked and kept as they arrive: after an interruption, a wrong row, or an error because
  rows are missing, call it again, with the same rows or with the missing ones only. Nothing can be
  read before every row is there and was read back. A finished cache of the same identity is opened
  as it is.

  Args:
    url: as for `write_cache`. An unfinished import into an object store keeps its rows in a
      temporary file of this process, so it begins again.
    rows: `(id, view, values)` in any order, `view` 0 without augmentation. The values are
      `{"logits": floating [..., V]}`, or lists `{"indices": integers [..., K], "logprobs": floating
      [..., K]}` of at least the k most probable classes: natural logarithms, at the temperature of
      the codec, under the normalizer of the full vocabulary; the probability of all other classes
      is what remains to 1. Next to a list may stand 'label_logprobs' [...], those of the source's
      labels, NaN where unknown, and 'temperature', which is then compared with the codec's. Or a
      function that computes missing rows, such as `server_rows`.
    source: the examples of later students, as for `write_cache`.
    outputs: codecs of 'logits', or of 'logits@name'; lists need `TopK`. None:
      `{"logits": Dense("float16")}`.
    identity: who computed the rows, such as the model's name, revision and dtype; or files whose
      content says so, such as weights, which are hashed.
    shape: of one example's logits, (..., V). None: the labels' shape and the source's classes.
    inputs: entries of the source that the teacher received: a run with other values in one of them
      is rejected. None: all but ids and labels.
    crop, augment, num_views: as for `write_cache`; the rows are those of the augmented views.
    progress: whether to show a progress bar on a terminal, a line at the end elsewhere.

  Raises:
    ValueError: a row is doubled, unknown or wrong (the message names its id, view and position), or
      rows are missing; or an argument is wrong.
    Mismatch: another cache is there.
    LeaseError: another process imports into this folder.
    OSError: the folder cannot be written, or is full.

  >>> import tempfile
  >>> from distill_jax import cache, data
  >>> arrays = {"x": np.eye(3, dtype=np.float32), "label": np.array([0, 1, 2])}
  >>> source = data.Source(arrays, classes=3)
  >>> rows = [(id, 0, {"logits": 5 * np.eye(3)[id]}) for id in (2, 0, 1)]
  >>> folder = tempfile.mkdtemp()
  >>> outputs = cache.import_rows(folder, rows, source, identity="by hand", progress=False)
  >>> outputs.add_columns({"id": np.array([2])})["teacher/logits.values"]
  array([[0., 0., 5.]], dtype=float16)
  """
  store = open_store(url)
  teacher_inputs = make_teacher_inputs(source, crop)
  outputs = _check_codecs(outputs)
  check_augment(augment)
  check_views(num_views, teacher_inputs, augment)
  names = _input_names(teacher_inputs, inputs)
  spec = _row_spec(teacher_inputs, outputs, shape)
  output = jax.ShapeDtypeStruct((1, *spec.shape), jnp.float32)
  planned = plan(outputs, dict.fromkeys(outputs, output), teacher_inputs, num_views, MAX_ROWS)
  wanted = Manifest(
    {
      "teacher": {"imported": _teacher_identity(identity)},
      "data": teacher_inputs.identity(names),
      "augmentation": augmentation_identity(augment, teacher_inputs.shapes, names),
      "outputs": {name: output_identity(codec, output) for name, codec in outputs.items()},
    },
    planned.columns,
    planned.rows,
    planned.rows_per_shard,
    {
      "distill_jax": __version__,
      "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    },
  )
  with _working_folder(store) as folder:
    manifest = shards.begin(store, wanted, same_value)
    if store.read(shards.COMPLETE) is None:
      importer = Importer(manifest, teacher_inputs, spec, outputs, augment, names)
      journal = Journal(folder, manifest)
      with contextlib.closing(journal):
        store.probe_writable(manifest.size + journal.missing_bytes)
        importer.add(journal, rows, progress)
        _check_all_stored(journal, store)
        journal.write_shards(store)
      shards.complete(
        store, manifest, lambda n: progress_bar(n, "cache: reading back", " shard", progress)
      )
      journal.remove()
      if progress:
        print(f"cache: imported {len(manifest.rows):,} rows into {store.url}", flush=True)
  return open_cache(url)


def _check_codecs(outputs: Mapping[str, Codec] | None) -> dict[str, Codec]:
  outputs = check_outputs(outputs)
  others = [name for name in outputs if output_of(name) != "logits"]
  if others:
    raise ValueError(
      f"outputs: expected 'logits' or 'logits@name', got {others[0]!r}: other outputs are written "
      "by write_cache from a teacher"
    )
  return outputs


def _input_names(inputs: TeacherInputs, names: Sequence[str] | None) -> list[str]:
  known = input_names(inputs.shapes)
  if names is None:
    return sorted(known)
  for name in names:
    if name not in known:
      raise ValueError(
        f"inputs: expected entries of the source, got {name!r}{suggest(name, known)}"
      )
  return sorted(names)


def _row_spec(
  inputs: TeacherInputs, outputs: Mapping[str, Codec], shape: tuple[int, ...] | None
) -> RowSpec:
  """Returns what rows must be: lists can be stored by `TopK` of one k and one temperature."""
  if shape is None:
    label = inputs.shapes.get("label")
    tokens = () if label is None or label.dtype.kind != "i" else label.shape[1:]
    classes = len(inputs.source.class_names)
    if not classes:
      raise ValueError(
        "shape: expected the shape of one example's logits for a source without classes, got None: "
        "pass such as shape=(1000,)"
      )
    shape = (*tokens, classes)
  classes = min(tokenizer_size(inputs.source) or shape[-1], shape[-1])
  codecs = list(outputs.values())
  kinds = {(codec.k, codec.temperature) if isinstance(codec, TopK) else None for codec in codecs}
  kind = kinds.pop()
  if kind is None or kinds:
    return RowSpec(tuple(shape), classes, 0)
  return RowSpec(tuple(shape), classes, *kind)


def _teacher_identity(identity: Any) -> Any:
  """Returns a text, or the digests of files by name."""
  if isinstance(identity, str):
    if not identity.strip():
      raise ValueError("identity: expected who computed the rows, got '': name model and revision")
    return identity
  paths = [identity] if isinstance(identity, Path) else list(identity or ())
  if not paths or not all(isinstance(path, Path) for path in paths):
    raise ValueError(
      f"identity: expected a text or Paths of files, got {identity!r}: name model and revision"
    )
  digests = {}
  for path in paths:
    if not path.is_file() or path.name in digests:
      reason = "another one of this name" if path.is_file() else "no such file"
      raise ValueError(f"identity: expected files of different names, got {path}: {reason}")
    digests[path.name] = files.digest(path)
  return digests


@contextlib.contextmanager
def _working_folder(store: Store) -> Iterator[Path]:
  """Yields the folder of the journal: that of the cache, leased, or a temporary one."""
  if store.folder is None:
    with tempfile.TemporaryDirectory(prefix="distill_jax_import") as folder:
      yield Path(folder)
  else:
    with Lease(store.folder):
      yield store.folder


def _check_all_stored(journal: Journal, store: Store) -> None:
  missing = np.flatnonzero(~journal.is_stored)
  if missing.size:
    index = journal.manifest.rows
    views, positions = np.divmod(missing, len(index.ids))
    first = join_first(f"({index.ids[at]}, {view})" for at, view in zip(positions, views))
    raise ValueError(
      f"rows: expected {len(index):,} rows, got {len(index) - missing.size:,}: "
      f"{missing.size:,} are missing, (id, view) {first}: call import_rows again with them; those "
      f"that came are kept in {store.url}"
    )
