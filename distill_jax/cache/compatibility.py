"""Checks that a run's data, augmentation and teacher are those of a cache."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.codecs import codec as codecs
from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.reader import Cache, key_entry, row_mask
from distill_jax.cache.store.manifest import Mismatch, check_equal
from distill_jax.cache.teacher_inputs import TEXT_ROWS, make_teacher_inputs
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.text.tokenized import PackedText
from distill_jax.data.videos import Streamed
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.teachers.host_function import raising_host_errors
from distill_jax.types import Batch, Model, Variables

CHUNK = 4096  # rows that are read at once
_ABSENT = "(absent)"
RunData = Source | Streamed | PackedText | Mapping[str, np.ndarray]


def check_run(
  cache: Cache,
  source: RunData,
  *,
  crop: Crop | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  num_views: int | None = None,
  mix: Any = None,
) -> None:
  """Checks that a run may read a cache.

  Args:
    cache: of the run.
    source: the run's examples: those of the cache or a part of them, with any labels. Of any other
      pipeline, or a `data.stream.Stream`, a batch: its examples are compared, but not the set's
      name.
    crop: of the run, with `Images` or `Videos`.
    augment: of the run.
    num_views: of the run; a cache without augmentation accepts any.
    mix: mixup or CutMix of the run.

  Raises:
    Mismatch: data or augmentation differ; the message names fields or example. It is a ValueError.
    ValueError: the run mixes rows, and no cache holds mixtures.

  >>> import tempfile
  >>> from distill_jax import cache, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> arrays = {"id": np.arange(4), "x": np.eye(4, dtype=np.float32)}
  >>> outputs = cache.write_cache(tempfile.mkdtemp(), teacher, arrays, progress=False)
  >>> cache.check_run(outputs, arrays)
  >>> cache.check_run(outputs, {**arrays, "x": -arrays["x"]})  # doctest: +IGNORE_EXCEPTION_DETAIL
  Traceback (most recent call last):
  Mismatch: data: expected the inputs that the teacher ... received, got others in 'x' ...
  """
  if mix is not None:
    raise ValueError(
      "mix: expected None with a cache, which has no outputs of mixed examples: use a live teacher"
    )
  if isinstance(source, Mapping):
    arrays: Mapping[str, Any] = source
  else:
    arrays = make_teacher_inputs(source, crop).shapes
  _check_data_fields(cache, source, crop, arrays)
  _check_examples(cache, source)
  inputs = cache.manifest.identity["data"]["inputs"]
  augmentation = identity.augmentation_identity(augment, arrays, inputs)
  _check_identity(cache, {"augmentation": augmentation})
  if cache.has_views and num_views is not None and num_views != cache.num_views:
    raise Mismatch(
      f"num_views: expected {cache.num_views}, as in the cache in {cache.store.url}, "
      f"got {num_views}"
    )


@raising_host_errors()
def check_teacher(
  cache: Cache,
  teacher: Model,
  variables: Variables,
  outputs: Mapping[str, Codec],
  arrays: Mapping[str, Any],
  description: Mapping[str, Any] | None = None,
) -> None:
  """Checks that a cache holds these outputs of this teacher.

  Args:
    cache: to check.
    teacher, variables, outputs, description: as for `write_cache`.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    Mismatch: the message names the fields.

  >>> import tempfile
  >>> from distill_jax import cache, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> arrays, codecs = {"x": np.eye(4, dtype=np.float32)}, {"logits": cache.Dense("float16")}
  >>> outputs = cache.write_cache(tempfile.mkdtemp(), teacher, arrays, codecs, progress=False)
  >>> cache.check_teacher(outputs, teacher, teacher.variables, codecs, arrays)
  >>> codecs = {"logits": cache.Dense("int8")}
  >>> cache.check_teacher(  # doctest: +IGNORE_EXCEPTION_DETAIL
  ...   outputs, teacher, teacher.variables, codecs, arrays
  ... )
  Traceback (most recent call last):
  Mismatch: the cache in ... is another one: name another folder or delete it:
    outputs.logits.codec.dtype: expected 'int8', got 'float16' in the cache
  """
  stored_outputs = cache.manifest.identity["outputs"]
  stored = {name: {"codec": values["codec"]} for name, values in stored_outputs.items()}
  outputs = codecs.check_outputs(outputs)
  expected = {name: {"codec": codecs.to_json(codec)} for name, codec in outputs.items()}
  check_equal(cache.store, {"outputs": stored}, {"outputs": expected})
  part = identity.teacher_identity(teacher, variables, outputs, arrays, description)
  _check_identity(cache, {"teacher": part})


def check_teacher_weights(cache: Cache, variables: Variables) -> None:
  """Checks that a cache was written with these weights.

  Raises:
    Mismatch: the message has both fingerprints; or the rows were imported.

  >>> import tempfile
  >>> from distill_jax import cache, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> arrays = {"x": np.eye(4, dtype=np.float32)}
  >>> outputs = cache.write_cache(tempfile.mkdtemp(), teacher, arrays, progress=False)
  >>> cache.check_teacher_weights(outputs, teacher.variables)
  >>> other = teacher.variables._replace(params=jnp.eye(4))
  >>> cache.check_teacher_weights(outputs, other)  # doctest: +IGNORE_EXCEPTION_DETAIL
  Traceback (most recent call last):
  Mismatch: the cache in ... is another one: name another folder or delete it:
    teacher.weights: expected '99abf2d5...', got 'cac1423a...' in the cache
  """
  teacher = cache.manifest.identity["teacher"]
  if "imported" in teacher:
    raise Mismatch(
      f"teacher_variables: expected None with the rows in {cache.store.url}, which were imported "
      f"and computed by {teacher['imported']!r}, got weights: leave them out"
    )
  stored = teacher["weights"]
  expected = fingerprint(tuple(variables))
  check_equal(cache.store, {"teacher.weights": stored}, {"teacher.weights": expected})


def _check_identity(cache: Cache, part: Mapping[str, Any]) -> None:
  stored = {name: cache.manifest.identity[name] for name in part}
  check_equal(cache.store, stored, part, identity.same_value)


def _check_data_fields(
  cache: Cache, source: RunData, crop: Crop | None, arrays: Mapping[str, Any]
) -> None:
  """Compares the data's name, tokenizer, crop and shapes as far as the run knows them."""
  stored = cache.manifest.identity["data"]
  inputs = dict.fromkeys(stored["inputs"], _ABSENT)
  inputs |= identity.input_specs(arrays, inputs.keys() & arrays.keys())
  fields: dict[str, Any] = {"inputs": inputs}
  if not isinstance(source, Mapping):
    fields |= {"name": source.name, "classes": identity.vocabulary(source.class_names)}
  if isinstance(source, Source | PackedText) and (source.vocabulary or "vocabulary" in stored):
    fields["vocabulary"] = source.vocabulary or _ABSENT
  if isinstance(source, Streamed) and crop is not None:
    crop_identity = identity.crop_identity(crop, source)
    fields |= {"content": source.content, "crop": crop_identity}
  stored_fields = {field: stored.get(field, _ABSENT) for field in fields}
  check_equal(cache.store, {"data": stored_fields}, {"data": fields}, identity.same_value)


def _check_examples(cache: Cache, source: RunData) -> None:
  """Compares the checksums of the run's examples; of images, which are not read yet, the ids."""
  if isinstance(source, Streamed):
    cache.manifest.rows.numbers(source.ids, np.zeros(len(source), np.int32))
  elif isinstance(source, PackedText):
    for first in range(0, len(source), TEXT_ROWS):
      _check_batch(cache, source.rows(source.ids[first : first + TEXT_ROWS]))
  else:
    _check_batch(cache, source.arrays if isinstance(source, Source) else source)


def _check_batch(cache: Cache, arrays: Mapping[str, np.ndarray]) -> None:
  """Compares the checksums of examples with those that the teacher received.

  Raises:
    Mismatch: the message names the first example that differs.
    ValueError: an example or a view is not in the cache.
  """
  ids = key_entry(cache, "id", arrays)
  # Each crop has a checksum of its own; other augmentation comes after the checksum.
  is_cropped = cache.is_streamed and cache.has_views
  views = key_entry(cache, "view", arrays) if is_cropped else np.zeros(len(ids), np.int32)
  where = row_mask(arrays)
  if where is not None:
    ids = ids[where]
    views = views[where]
    arrays = {name: np.asarray(values)[where] for name, values in arrays.items()}
  inputs = cache.manifest.identity["data"]["inputs"]
  checksums = identity.input_checksums({**arrays, "id": ids}, inputs)
  for first in range(0, len(ids), CHUNK):
    rows = slice(first, first + CHUNK)
    records = cache.row_reader.read(ids[rows], views[rows])
    different = np.flatnonzero(records["source_crc"] != checksums[rows])
    if different.size:
      raise Mismatch(
        f"data: expected the inputs that the teacher of the cache in {cache.store.url} received, "
        f"got others in {_changed_inputs(cache, arrays, ids)} for example id "
        f"{int(ids[rows][different[0]])}: they were changed, or are prepared otherwise"
      )


def _changed_inputs(cache: Cache, arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> str:
  """Returns the names of the inputs that differ; of a part of the cache's examples, of all."""
  data = cache.manifest.identity["data"]
  inputs = sorted(data["inputs"])
  if np.array_equal(np.sort(ids), cache.manifest.rows.ids) and len(inputs) > 1:
    checksums = {name: identity.entry_checksums(arrays[name]) for name in inputs}
    digests = identity.examples_digests(ids, checksums)
    inputs = [name for name in inputs if digests[name] != data["examples"].get(name)]
  return ", ".join(map(repr, inputs))
