"""Writes a cache: computes a teacher's outputs once for every example and view."""

import datetime
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.arguments import check_count, check_part
from distill_jax.cache.codecs.codec import Codec, check_outputs
from distill_jax.cache.reader import Cache, open_cache
from distill_jax.cache.shard_filling import fill_missing, progress_bar
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.format import Column
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.rows import RowIndex
from distill_jax.cache.teacher.lm_head import has_head, head_of, write_head
from distill_jax.cache.teacher.predictor import make_predictor, tokenizer_size
from distill_jax.cache.teacher.variables import teacher_variables_of
from distill_jax.cache.teacher_inputs import ImageInputs, TeacherInputs, make_teacher_inputs
from distill_jax.data import Source
from distill_jax.data.batch_functions import check_augment
from distill_jax.data.crops import Crop
from distill_jax.data.image_checks import check_images
from distill_jax.data.text.tokenized import PackedText
from distill_jax.data.videos import Streamed
from distill_jax.distributed import sharding
from distill_jax.models.input_errors import name_network
from distill_jax.models.logits import ROWS, check_logits
from distill_jax.models.networks import as_model
from distill_jax.models.variables import check_weights
from distill_jax.teachers.host_function import raising_host_errors
from distill_jax.trees import batch_specs
from distill_jax.types import Batch, Model, Variables
from distill_jax.version import __version__

SHARD_BYTES = 2**25
SHARD_BATCHES = 256  # at most, which a killed writer loses


@raising_host_errors()
def write_cache(
  url: str | os.PathLike[str],
  teacher: Any,
  source: Source | Streamed | PackedText | Mapping[str, Any],
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
  """Writes a teacher's outputs for every example, or resumes an earlier call, and opens the cache.

  A finished cache of the same teacher, data, augmentation and outputs is opened as it is. Several
  processes may write one cache at once, the hosts of one run or any others: each begins with its
  part, then helps with what is missing, and reads all of it back.

  Args:
    url: a folder, or `gs://`, `s3://`, `file://`, `memory://` (`store.open_store`).
    teacher: a frozen Model, or a network as it is, as in `train.fit`.
    source: the examples of later students, labeled or not; a dict of arrays is made a `Source`, and
      `data.from_iterable(batches).load()` makes one of batches. `Images` and `Videos` are read and
      cropped on demand, a `PackedText` is read on demand.
    outputs: the teacher's outputs to store, each with its codec; None:
      `{"logits": Dense("float16")}`. Of dense maps `Dense("float16", size=(H // 4, W // 4))` takes
      a sixteenth. 'logits@top8' stores 'logits' under another name, so that one
      output may be stored in several ways. Of a language model that returns 'hidden' and 'head'
      instead of logits: 'logits' with `TopK` or `RandomSampling`, or 'hidden' with `Dense`, which
      also stores the head, once (`teacher.lm_head`).
    teacher_variables: its weights; None: those that the Model carries.
    description: plain values that identify the teacher further. Of a language model
      `{"vocabulary": cache.vocabulary(words)}`, because stored classes are numbers of its
      tokenizer's words.
    crop: of `Images` or `Videos`, that of the `data.stream.Stream` in the student's run, e.g.
      `random_resized_crop(224, seed=0)`.
    augment: `batch -> batch`, a function of 'id' and 'view' (`data.augmentation`), as in the
      student's run.
    num_views: number of augmented views, or crops, of each example. A run from the cache reads view
      `epoch mod num_views`. One is stored where the augmentation changes nothing that the teacher
      reads.
    batch_size: rows that the teacher takes at once, over all devices; as many as fit.
    part: (index, count) of this process; None: that of the JAX process.
    mesh: devices of this process to use, one axis `data`; None: all of them.
    progress: whether to print the bytes of an example and of all before anything is written, and to
      show a progress bar on a terminal, a line at the end elsewhere.

  Raises:
    ValueError: an output that the teacher does not return, 'logits' that are probabilities, uint8
      images that the teacher reads, more views than augmentation or crop make, an output that is
      not finite or overflows its codec (the message names the example; its shard is not written).
    Mismatch: another cache is there; the message names each field that differs. It is a ValueError.
    OSError: the folder cannot be written, or is full; written shards remain, and the same call
      resumes there.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from distill_jax import cache, data, models
  >>> arrays = {"x": np.eye(4, dtype=np.float32), "label": np.arange(4)}
  >>> source = data.Source(arrays, classes=4)
  >>> linear = lambda w, x: x @ w
  >>> teacher = models.from_apply(None, linear, variables=3 * jnp.eye(4), inputs="x")
  >>> codecs = {"logits": cache.Dense("float16")}
  >>> folder = tempfile.mkdtemp()
  >>> outputs = cache.write_cache(folder, teacher, source, codecs, progress=False)
  >>> outputs.num_examples
  4
  """
  store = open_store(url)
  inputs = make_teacher_inputs(source, crop)
  teacher = as_model("teacher", teacher, inputs.shapes)
  variables = sharding.gather_to_host(teacher_variables_of(teacher, teacher_variables))
  outputs = check_outputs(outputs)
  check_part(part)
  check_augment(augment)
  check_views(num_views, inputs, augment)
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  check_weights(teacher, variables, inputs.shapes)
  predictor = make_predictor(
    teacher, variables, outputs, augment, mesh, tokenizer_size(inputs.source)
  )
  example = _example_spec(inputs)
  with name_network("teacher", example, predictor.output_shapes):
    shapes = predictor.output_shapes(example)
  names = identity.teacher_entries(teacher, variables, outputs, inputs.shapes, augment)
  views = {
    "data": inputs.identity(names),
    "augmentation": identity.augmentation_identity(augment, inputs.shapes, names),
  }
  # What the student alone reads may have any number of views.
  num_views = num_views if identity.has_views(views) else 1
  planned = plan(outputs, shapes, inputs, num_views, batch_size)
  if isinstance(inputs.source, Source):
    rows = {name: x[:ROWS] for name, x in inputs.source.arrays.items()}
    check_images(rows, lambda: names)
  wanted = Manifest(
    {
      "teacher": identity.teacher_identity(teacher, variables, outputs, inputs.shapes, description),
      **views,
      "outputs": {name: identity.output_identity(outputs[name], shapes[name]) for name in outputs},
    },
    planned.columns,
    planned.rows,
    planned.rows_per_shard,
    _provenance(batch_size),
  )
  manifest = shards.begin(store, wanted, identity.same_value)
  _write_head(store, manifest, teacher, variables, inputs)
  missing = shards.missing_shards(store, manifest)
  if missing:
    if progress:
      print(f"cache: {_size_text(manifest)} in {store.url}", flush=True)
    _check_logits(teacher, variables, inputs, augment)
    store.probe_writable(sum(manifest.header(shard).size for shard in missing))
    fill_missing(
      store, manifest, inputs, predictor, batch_size=batch_size, part=part, progress=progress
    )
  if missing or store.read(shards.COMPLETE) is None:
    shards.complete(
      store, manifest, lambda n: progress_bar(n, "cache: reading back", " shard", progress)
    )
  return open_cache(url)


def plan(
  outputs: Mapping[str, Codec],
  output_shapes: Mapping[str, Any],
  inputs: TeacherInputs,
  num_views: int,
  batch_size: int,
) -> Manifest:
  """Returns columns, rows and shards of a cache, without an identity.

  Args:
    outputs: the outputs to store, each with its codec.
    output_shapes: name -> array or `ShapeDtypeStruct` [B, ...].
    inputs: the examples.
    num_views, batch_size: as for `write_cache`.
  """
  columns = tuple(
    Column(f"{name}.{part}", dtype, shape)
    for name, codec in outputs.items()
    for part, (dtype, shape) in codec.columns(output_shapes[name]).items()
  )
  rows = RowIndex(np.sort(inputs.source.ids), num_views)
  row_bytes = Manifest({}, columns, rows, 1).header(0).record_dtype.itemsize
  batches = min(max(1, SHARD_BYTES // (batch_size * row_bytes)), SHARD_BATCHES)
  return Manifest({}, columns, rows, min(batches * batch_size, len(rows)))


def check_views(
  num_views: int, inputs: TeacherInputs, augment: Callable[[Batch], Batch] | None
) -> None:
  """Raises ValueError for more views than augmentation or crop make."""
  if check_count("num_views", num_views) == 1 or augment is not None:
    return
  if not isinstance(inputs, ImageInputs):
    raise ValueError(f"num_views: expected 1 without augmentation, got {num_views}")
  if not identity.crop_varies(inputs.identity(["image"])):
    raise ValueError(
      f"num_views: expected 1 with a crop that is the same for every view, got {num_views}"
    )


def _size_text(manifest: Manifest) -> str:
  """Returns the bytes of an example, of each of its outputs and of all."""
  num_views = manifest.rows.num_views
  outputs: dict[str, int] = {}
  for column in manifest.columns:
    name = column.name.rpartition(".")[0]
    num_bytes = num_views * np.dtype(column.dtype).itemsize * math.prod(column.shape)
    outputs[name] = outputs.get(name, 0) + num_bytes
  example_bytes = num_views * manifest.header(0).record_dtype.itemsize
  views = f" in {num_views} views" if num_views > 1 else ""
  parts = ", ".join(f"{name} {num_bytes:,}" for name, num_bytes in outputs.items())
  return f"{example_bytes:,} bytes an example{views} ({parts}), {manifest.size:,} bytes in all"


def _example_spec(inputs: TeacherInputs) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch of one example."""
  return batch_specs(inputs.shapes, rows=1) | {"view": jax.ShapeDtypeStruct((1,), np.int32)}


def _check_logits(
  teacher: Model, variables: Variables, inputs: TeacherInputs, augment: Callable | None
) -> None:
  ids = inputs.source.ids[:ROWS]
  batch: Batch = inputs.batch(ids, np.zeros(len(ids), np.int32))
  check_logits("teacher", teacher, variables, batch if augment is None else augment(batch))


def _write_head(
  store: Store, manifest: Manifest, teacher: Model, variables: Variables, inputs: TeacherInputs
) -> None:
  """Writes the teacher's head where the manifest has one and it is missing."""
  head_identity = manifest.identity["teacher"].get("head")
  if head_identity is None or has_head(store, head_identity):
    return
  head = head_of(teacher, variables, manifest.identity["outputs"], inputs.shapes)
  assert head is not None  # the identity describes it
  write_head(store, head, head_identity)


def _provenance(batch_size: int) -> dict[str, Any]:
  return {
    "jax": jax.__version__,
    "distill_jax": __version__,
    "device": jax.devices()[0].device_kind,
    "batch_size": batch_size,
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }
