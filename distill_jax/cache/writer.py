"""The teacher goes over the data once, and its outputs are written down."""

import datetime
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from distill_jax import sharding
from distill_jax.cache import codecs, faults, identity, manifest, shards
from distill_jax.cache.checks import (
  check_count,
  check_outputs,
  check_part,
  check_source,
  check_teacher,
  check_weights,
)
from distill_jax.cache.codecs import Codec
from distill_jax.cache.format import Column
from distill_jax.cache.manifest import Manifest
from distill_jax.cache.reader import Cache, open_cache
from distill_jax.cache.rows import Rows, share
from distill_jax.cache.store import Store, open_store
from distill_jax.data import Source
from distill_jax.errors import suggest
from distill_jax.types import Batch, Model, Variables

SHARD_BYTES = 2**25
SHARD_BATCHES = 256  # what a killed writer loses at most


def write_cache(
  url: str | os.PathLike[str],
  teacher: Model,
  source: Source,
  outputs: Mapping[str, Codec] | None = None,
  *,
  teacher_variables: Variables | None = None,
  description: Mapping[str, Any] | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  views: int = 1,
  batch_size: int = 256,
  part: tuple[int, int] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  progress: bool = True,
) -> Cache:
  """Writes what a teacher says of every example, or goes on where an earlier call stopped, and opens the cache.

  A finished cache of the same teacher, data, augmentation and outputs is opened as it is. Several processes may write
  one cache at once: each begins with its part, then helps with what is missing.

  Args:
    url: a folder, or `gs://`, `s3://`, `file://`, `memory://` (`store.open_store`).
    teacher: a frozen Model.
    source: the examples that students may see later, labelled or not.
    outputs: the teacher's outputs to keep, and how; None: `{"logits": Dense("float16")}`.
    teacher_variables: its weights, if the Model does not carry them.
    description: what else tells this teacher from others, plain values; part of the cache's identity.
    augment: `batch -> batch`, a function of 'id' and 'view' (`data.augmentation`), as the student's run has it.
    views: augmented views of each example. A run from the cache sees view `epoch mod views`.
    batch_size: rows that the teacher takes at once, over all devices; as many as fit.
    part: (index, count) of this process; None: that of the JAX process.
    mesh: devices to use, one axis `data`; None: all local ones.
    progress: a progress bar on a terminal, a line at the end elsewhere.

  Returns:
    The open cache.

  Raises:
    ValueError: what does not fit: an output that the teacher does not give, more views than augmentation makes, an
      output that is not finite or too large for its codec (the example is named; its shard is not written).
    Mismatch: another cache is there; each field that differs is named. It is a ValueError.
    OSError: the place cannot be written, or is full; the shards before stay, and the same call goes on from there.
  """
  store = open_store(url)
  variables, kept = check_teacher(teacher, teacher_variables), check_outputs(outputs)
  check_source(source)
  check_part(part)
  if check_count("views", views) > 1 and augment is None:
    raise ValueError(f"views: expected 1 without augmentation, got {views}")
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  check_weights(teacher, variables, source.arrays)
  predictor = make_predictor(teacher, variables, kept, augment, mesh)
  given = predictor.shapes(rows_of(source, np.zeros(batch_size, int), 0))
  wanted = _manifest(store, teacher, source, kept, given, variables, description, augment, views, batch_size)
  found = shards.begin(store, wanted, identity.same)
  if shards.missing(store, found):
    store.probe_writable()
    _fill(store, found, source, predictor, batch_size, part, progress)
  if store.read(shards.COMPLETE) is None:
    shards.complete(store, found, _track("reading back", "shard", progress))
  return open_cache(url)


class Predictor(NamedTuple):
  """A teacher that gives columns.

  Attributes:
    run: `batch -> (columns, faults)`; a jitted call with the weights bound.
    shapes: `batch -> {output: ShapeDtypeStruct}` of the outputs that are kept.
  """

  run: Callable[[Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]
  shapes: Callable[[Batch], dict[str, jax.ShapeDtypeStruct]]


def make_predictor(
  teacher: Model, variables: Variables, outputs: Mapping[str, Codec], augment, mesh: jax.sharding.Mesh
) -> Predictor:
  """The teacher, jitted with its codecs, its rows spread over the mesh."""

  taught = make_answers(teacher, outputs, augment)

  def predict(variables, batch):
    said, batch = taught(variables, batch)
    columns = {
      f"{name}.{part}": x
      for name, codec in outputs.items()
      for part, x in codec.encode(said[name], batch).items()
    }
    return columns, {name: codec.faults(said[name]) for name, codec in outputs.items()}

  compiled = jax.jit(
    predict, in_shardings=(None, sharding.by_rows(mesh)), out_shardings=sharding.by_rows(mesh)
  )
  placed = sharding.replicate(variables, mesh)
  return Predictor(
    lambda batch: compiled(placed, batch),
    lambda batch: jax.eval_shape(lambda b: taught(variables, b)[0], batch),
  )


def make_answers(teacher: Model, outputs: Iterable[str], augment):
  """`(variables, batch) -> (what the teacher says under these names, the batch as it saw it)`."""

  def answers(variables, batch):
    batch = batch if augment is None else augment(batch)
    said = teacher.apply(*variables, batch, train=False, key=None)[0]
    for name in outputs:
      if name not in said:
        raise ValueError(f"outputs: the teacher gives no {name!r}{suggest(name, said)}")
    return {name: said[name] for name in outputs}, batch

  return answers


def places_of(source: Source, ids: np.ndarray) -> np.ndarray:
  """Where the examples of these ids are in the source; some place or other for an id that is not there."""
  order = np.argsort(source.ids)
  return order[np.searchsorted(source.ids[order], ids) % len(order)]


def rows_of(source: Source, places: np.ndarray, views) -> dict[str, np.ndarray]:
  """A batch of the examples at these places; `views` are numbers [rows], or one."""
  batch = {name: values.take(places, axis=0) for name, values in source.arrays.items()}
  return batch | {"view": np.broadcast_to(np.asarray(views, np.int32), len(places)).copy()}


def _manifest(
  store, teacher, source, outputs, given, variables, description, augment, views, batch_size
) -> Manifest:
  columns = tuple(
    Column(f"{name}.{part}", dtype, shape)
    for name, codec in outputs.items()
    for part, (dtype, shape) in codec.columns(given[name]).items()
  )
  inputs = identity.inputs(source.arrays)
  checksums = identity.source_checksums(source.arrays, inputs)
  what = {
    "teacher": identity.teacher(teacher, variables, outputs, source.arrays, description),
    "data": {
      "inputs": inputs,
      "name": source.name,
      "examples": identity.digest(source.ids, checksums),
      "classes": identity.vocabulary(source.class_names),
    },
    "augmentation": identity.augmentation(augment, source.arrays),
    "outputs": {
      name: codecs.spec(codec) | {"shape": list(given[name].shape[1:]), "of": str(given[name].dtype)}
      for name, codec in outputs.items()
    },
  }
  old = manifest.load(store)
  provenance = {
    "jax": jax.__version__,
    "distill_jax": importlib.metadata.version("distill-jax"),
    "device": jax.devices()[0].device_kind,
    "batch_size": batch_size,
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }
  rows = Rows(np.sort(source.ids), views)
  made = Manifest(what, columns, rows, 1)
  record = made.header(0).record.itemsize
  batches = min(max(1, SHARD_BYTES // (batch_size * record)), SHARD_BATCHES)
  per_shard = old.rows_per_shard if old is not None else min(batches * batch_size, len(rows))
  return Manifest(what, columns, rows, per_shard, provenance)


def _fill(
  store: Store, made: Manifest, source: Source, predictor: Predictor, batch_size, part, progress
) -> None:
  """Writes the shards that are missing: this process' part, then whatever is still missing."""
  places = np.argsort(source.ids)  # the rows' ids are sorted
  checksums = identity.source_checksums(source.arrays, identity.inputs(source.arrays))[places]
  left = shards.missing(store, made)
  with tqdm(total=_rows(made, left), unit=" rows", desc="cache", disable=None if progress else True) as bar:
    mine = share(left, *(part or (jax.process_index(), jax.process_count())))
    while left:
      for number in mine:
        first, last = made.plan.span(number)
        views, at = np.divmod(np.arange(first, last), len(made.rows.ids))
        batches = _batches(source, places[at], views, batch_size)
        columns = _gathered(predictor, batches, bar.update)
        shards.write_shard(store, made, number, checksums[at], columns)
      left = shards.missing(store, made)
      mine = left[:1]  # others are at work: help, one by one
  if progress:
    print(f"cache: {len(made.rows):,} rows written to {store.url}", flush=True)


def _rows(made: Manifest, numbers: Iterable[int]) -> int:
  spans = [made.plan.span(number) for number in numbers]
  return sum(last - first for first, last in spans)


def _batches(source, places, views, batch_size) -> Iterator[tuple[Batch, int]]:
  """Batches of one size, so that one program makes all of them, and how many rows of each count."""
  for first in range(0, len(places), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(places) - 1)
    yield rows_of(source, places[rows], views[rows]), min(batch_size, len(places) - first)


def _gathered(predictor, batches, report) -> dict[str, np.ndarray]:
  """The columns of all batches; the device works on one while the host takes the one before."""
  parts: list[dict[str, np.ndarray]] = []

  def take(batch, count, answer):
    columns, found = jax.device_get(answer)
    for name, rows in found.items():
      faults.check(name, rows[:count], batch["id"], batch["view"])
    parts.append({name: x[:count] for name, x in columns.items()})
    report(count)

  running = None
  for batch, count in batches:
    answer = predictor.run(batch)
    if running is not None:
      take(*running)
    running = batch, count, answer
  if running is not None:
    take(*running)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _track(title: str, unit: str, progress: bool):
  return lambda numbers: tqdm(
    numbers, desc=f"cache: {title}", unit=f" {unit}", disable=None if progress else True
  )
