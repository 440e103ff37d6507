"""The teacher goes over the data once, and its outputs are written down."""

import datetime
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from distill_jax.cache import identity
from distill_jax.cache.codecs import dense, faults
from distill_jax.cache.codecs.dense import Codec
from distill_jax.cache.examples import BAD, Examples, Streamed, examples_of
from distill_jax.cache.reader import Cache, open_cache
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.format import Column
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.rows import Rows, share
from distill_jax.cache.teacher import heads
from distill_jax.cache.teacher.checks import (
  check_count,
  check_outputs,
  check_part,
  check_teacher,
  check_weights,
)
from distill_jax.cache.teacher.predictor import Predictor, make_predictor, words_of
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.text.tokenized import PackedText
from distill_jax.distributed import sharding
from distill_jax.types import Batch, Model, Variables

SHARD_BYTES = 2**25
SHARD_BATCHES = 256  # what a killed writer loses at most


def write_cache(
  url: str | os.PathLike[str],
  teacher: Model,
  source: Source | Images | PackedText,
  outputs: Mapping[str, Codec] | None = None,
  *,
  teacher_variables: Variables | None = None,
  description: Mapping[str, Any] | None = None,
  crop: Crop | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  num_views: int = 1,
  batch_size: int = 256,
  part: tuple[int, int] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  progress: bool = True,
) -> Cache:
  """Writes what a teacher says of every example, or goes on where an earlier call stopped, and opens the cache.

  A finished cache of the same teacher, data, augmentation and outputs is opened as it is. Several processes may write
  one cache at once, the hosts of one run or any others: each begins with its part, then helps with what is missing,
  and reads all of it back.

  Args:
    url: a folder, or `gs://`, `s3://`, `file://`, `memory://` (`store.open_store`).
    teacher: a frozen Model.
    source: the examples that students may see later, labeled or not; `Images` are read and cropped on the way, and a
      `PackedText` is read.
    outputs: the teacher's outputs to keep, and how; None: `{"logits": Dense("float16")}`. 'logits@top8' keeps 'logits'
      under a name of its own, beside others. Of a language model that gives 'hidden' and 'head' in the place of logits:
      'logits' with `TopK` or `RandomSampling`, or 'hidden' with `Dense`, and then the head is kept too, once (`heads`).
    teacher_variables: its weights, if the Model does not carry them.
    description: what else tells this teacher from others, plain values; part of the cache's identity. Of a language
      model `{"vocabulary": cache.vocabulary(words)}`: kept classes are numbers of its tokenizer's words.
    crop: of `Images`, the `data.Stream`'s of the student's run: `random_resized_crop(224, seed=0)`.
    augment: `batch -> batch`, a function of 'id' and 'view' (`data.augmentation`), as the student's run has it.
    num_views: augmented views, or crops, of each example. A run from the cache sees view `epoch mod views`.
    batch_size: rows that the teacher takes at once, over all devices; as many as fit.
    part: (index, count) of this process; None: that of the JAX process.
    mesh: devices of this process to use, one axis `data`; None: all of them.
    progress: a progress bar on a terminal, a line at the end elsewhere.

  Returns:
    The open cache.

  Raises:
    ValueError: what does not fit: an output that the teacher does not give, more views than augmentation or crop make,
      an output that is not finite or too large for its codec (the example is named; its shard is not written).
    Mismatch: another cache is there; each field that differs is named. It is a ValueError.
    OSError: the place cannot be written, or is full; the shards before stay, and the same call goes on from there.
  """
  store, examples = open_store(url), examples_of(source, crop)
  variables, kept = (
    sharding.gather_to_host(check_teacher(teacher, teacher_variables)),
    check_outputs(outputs),
  )
  check_part(part)
  _check_views(num_views, examples, augment)
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  check_weights(teacher, variables, examples.shapes)
  predictor = make_predictor(teacher, variables, kept, augment, mesh, words_of(source))
  given = output_shapes(predictor, examples)
  planned = plan(kept, given, examples, num_views, batch_size)
  wanted = Manifest(
    {
      "teacher": identity.teacher(teacher, variables, kept, examples.shapes, description),
      "data": examples.about(),
      "augmentation": identity.augmentation(augment, examples.shapes),
      "outputs": {
        name: dense.spec(codec)
        | {"shape": list(given[name].shape[1:]), "of": str(given[name].dtype)}
        for name, codec in kept.items()
      },
    },
    planned.columns,
    planned.rows,
    planned.rows_per_shard,
    _provenance(batch_size),
  )
  found = shards.begin(store, wanted, identity.same)
  described = found.identity["teacher"].get("head")
  if described is not None and not heads.is_there(store, described):
    head = heads.head_of(teacher, variables, kept, examples.shapes)
    assert head is not None  # it has been described
    heads.write(store, head, described)
  left = shards.missing(store, found)
  if left:
    store.probe_writable(sum(found.header(shard).size for shard in left))
    _fill(store, found, examples, predictor, batch_size, part, progress)
  if left or store.read(shards.COMPLETE) is None:
    shards.complete(store, found, _track("reading back", "shard", progress))
  return open_cache(url)


def output_shapes(predictor: Predictor, examples: Examples) -> dict[str, jax.ShapeDtypeStruct]:
  """What the teacher gives for one example, [1, ...]."""
  one = {
    name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in examples.shapes.items()
  }
  return predictor.shapes(one | {"view": jax.ShapeDtypeStruct((1,), np.int32)})


def plan(
  outputs: Mapping[str, Codec],
  given: Mapping[str, Any],
  examples: Examples,
  num_views: int,
  batch_size: int,
) -> Manifest:
  """What a cache of these outputs, of these shapes [B, ...], would hold, and in which shards; without an identity."""
  columns = tuple(
    Column(f"{name}.{part}", dtype, shape)
    for name, codec in outputs.items()
    for part, (dtype, shape) in codec.columns(given[name]).items()
  )
  rows = Rows(np.sort(examples.source.ids), num_views)
  record = Manifest({}, columns, rows, 1).header(0).record.itemsize
  batches = min(max(1, SHARD_BYTES // (batch_size * record)), SHARD_BATCHES)
  return Manifest({}, columns, rows, min(batches * batch_size, len(rows)))


def _check_views(num_views: int, examples: Examples, augment) -> None:
  if check_count("num_views", num_views) > 1 and augment is None:
    if not isinstance(examples, Streamed):
      raise ValueError(f"num_views: expected 1 without augmentation, got {num_views}")
    if not identity.varies(examples.about()):
      raise ValueError(
        f"num_views: expected 1, got {num_views}: crop makes the same view of an image every time"
      )


def _provenance(batch_size: int) -> dict[str, Any]:
  return {
    "jax": jax.__version__,
    "distill_jax": importlib.metadata.version("distill-jax"),
    "device": jax.devices()[0].device_kind,
    "batch_size": batch_size,
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }


def _fill(
  store: Store, made: Manifest, examples: Examples, predictor: Predictor, batch_size, part, progress
) -> None:
  """Writes the shards that are missing: this process' part, then whatever is still missing."""
  left = shards.missing(store, made)
  with tqdm(
    total=_rows(made, left), unit=" rows", desc="cache", disable=None if progress else True
  ) as bar:
    mine = share(left, *(part or (jax.process_index(), jax.process_count())))
    while left:
      for number in mine:
        batches = _batches(examples, *made.rows.at(*made.plan.span(number)), batch_size)
        crcs, columns = _gathered(predictor, examples, batches, bar.update)
        shards.write_shard(store, made, number, crcs, columns)
      left = shards.missing(store, made)
      mine = left[
        -1:
      ]  # the others go through theirs from the first on: help, one by one, from the last
  if progress:
    print(f"cache: {len(made.rows):,} rows written to {store.url}", flush=True)


def _rows(made: Manifest, numbers: Iterable[int]) -> int:
  spans = [made.plan.span(number) for number in numbers]
  return sum(last - first for first, last in spans)


def _batches(examples: Examples, ids, views, batch_size) -> Iterator[tuple[Batch, int]]:
  """Batches of one size, so that one program makes all of them, and how many rows of each count."""
  for first in range(0, len(ids), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(ids) - 1)
    yield examples.batch(ids[rows], views[rows]), min(batch_size, len(ids) - first)


def _gathered(
  predictor, examples: Examples, batches, report
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Checksums and columns of all batches; the device works on one while the host takes the one before."""
  crcs: list[np.ndarray] = []
  parts: list[dict[str, np.ndarray]] = []

  def take(batch, count, answer):
    columns, found = jax.device_get(answer)
    crcs.append(examples.checksums(batch)[:count])
    for name, wrong in found.items():
      shown = crcs[-1] != BAD  # what a teacher says of no image is nobody's
      faults.check(name, wrong[:count] * shown, batch["id"], batch["view"])
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
  return np.concatenate(crcs), {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }


def _track(title: str, unit: str, progress: bool):
  return lambda numbers: tqdm(
    numbers, desc=f"cache: {title}", unit=f" {unit}", disable=None if progress else True
  )
