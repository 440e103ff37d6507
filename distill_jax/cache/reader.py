"""A finished cache: what it holds, its rows by example, and the teacher that it stands for."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.codecs import dense
from distill_jax.cache.codecs.dense import Codec
from distill_jax.cache.examples import BAD, examples_of
from distill_jax.cache.runs import CHUNK, check_examples, check_fields
from distill_jax.cache.store import manifest
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.manifest import Manifest, Mismatch
from distill_jax.cache.store.shards import complete, open_complete
from distill_jax.cache.store.table import MEMORY, Table
from distill_jax.cache.teacher import heads
from distill_jax.cache.teacher.heads import Head
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.text.tokenized import PackedText
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.teachers import CACHED
from distill_jax.types import Batch, Model, Variables


class Cache:
  """A teacher's outputs by (example id, view). Made by `write_cache` or `open_cache`.

  `train.fit` takes it in the place of the teacher. In a loop of your own `join` adds its columns to a batch, and
  `model` is the teacher that reads them there.

  Attributes:
    store: where it lies.
    manifest: what it is.
    outputs: `{name: (codec, ShapeDtypeStruct of one example's output)}`.
    num_views: of each example.
  """

  def __init__(self, store: Store, made: Manifest, memory: int = MEMORY):
    self.store, self.manifest, self.table = store, made, Table(store, made, memory)
    self.outputs: dict[str, tuple[Codec, jax.ShapeDtypeStruct]] = {}
    for name, kept in made.identity["outputs"].items():
      codec = dense.from_spec(
        {field: value for field, value in kept.items() if field not in ("shape", "of")}
      )
      self.outputs[name] = codec, jax.ShapeDtypeStruct(tuple(kept["shape"]), jnp.dtype(kept["of"]))
    self.num_views = made.rows.num_views
    self._streamed, self._head = (
      "crop" in made.identity["data"],
      made.identity["teacher"].get("head"),
    )
    self._names = [(column.name, CACHED + column.name) for column in made.columns]

  def __len__(self) -> int:
    return len(self.manifest.rows)

  def __repr__(self) -> str:
    """Where it lies, its size, and what it was made from."""
    made = self.manifest
    size, record = made.size, made.header(0).record.itemsize
    lines = [
      f"cache in {self.store.url}",
      f"  {len(self):,} rows: {self.examples:,} examples x {self.num_views} views, {record:,} bytes a row, {size:,} bytes "
      f"in {len(made.plan)} shards",
    ]
    if self._head is not None:
      lines.append(f"  and the teacher's head, {heads.size(self._head):,} bytes")
    return "\n".join(
      lines + [f"  {name}: {_short(value)}" for name, value in manifest.flat(made.identity).items()]
    )

  @property
  def examples(self) -> int:
    """How many examples it holds views of."""
    return len(self.manifest.rows.ids)

  @functools.cached_property
  def head(self) -> Head | None:
    """The teacher's, where its hidden states are kept.

    Raises:
      Incomplete, CorruptCache: it is not there, or was changed.
    """
    return None if self._head is None else heads.read(self.store, self._head)

  @property
  def model(self) -> Model:
    """A teacher that decodes the 'teacher/...' columns of a batch; its weights are the head, if there is one."""
    head = self.head
    variables = Variables({} if head is None else {"head": head.arrays}, {})

    def apply(params, state, batch, *, train, key):
      del train, key
      outputs: dict[str, Any] = {name: self.decoded(name, batch) for name in self.outputs}
      if head is not None:
        if "head" not in params:
          raise ValueError(
            "the head of this cache's teacher is among its weights: pass `Cache.model.variables`"
          )
        outputs["head"] = params["head"]["kernel"], params["head"].get("bias"), head.softcap
      return outputs, state

    return Model(lambda key, batch: variables, apply, variables)

  def decoded(self, name: str, batch: Batch):
    """The output kept under a name, of a batch with its columns.

    Raises:
      ValueError: it has none.
    """
    prefix = f"{CACHED}{name}."
    columns = {
      entry.removeprefix(prefix): x for entry, x in batch.items() if entry.startswith(prefix)
    }
    if not columns:
      raise ValueError(
        f"the batch has no columns {prefix}...: let `Cache.join` add them; it has {sorted(batch)}"
      )
    codec, one = self.outputs[name]
    rows = next(iter(columns.values())).shape[0]
    return codec.decode(columns, jax.ShapeDtypeStruct((rows, *one.shape), one.dtype))

  def join(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch (host arrays) with the columns 'teacher/OUTPUT.PART' of its examples and views.

    A cache without augmentation has one view, and takes any, or none. Rows that are False in 'where' [B] only fill up
    the batch: whatever their ids, they get the first example's outputs.

    Raises:
      ValueError: the batch has no 'id' or 'view', or an example or a view is not in the cache.
      CorruptCache: a row is not what was written; shard and example are named.
    """
    records = self.table.read(*self._keys(batch))
    if self._streamed and (records["source_crc"] == BAD).any():
      raise ValueError(
        f"example id {records['id'][records['source_crc'] == BAD][0]}: the image could not be decoded when the cache "
        f"in {self.store.url} was written, so the teacher has not seen it; leave it out"
      )
    return {**batch, **{entry: records[name] for name, entry in self._names}}

  def shown(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Which of these rows the teacher gave, bool [B]: all, but for streamed images that could not be decoded."""
    if not self._streamed:
      return np.ones(len(ids), bool)
    return self.table.read(ids, views)["source_crc"] != BAD

  def _keys(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The ids and views of a batch's rows."""
    ids = self._entry("id", batch)
    views = self._entry("view", batch) if self.augmented else np.zeros(len(ids), np.int32)
    valid = _valid(batch)
    if valid is not None:
      ids, views = np.where(valid, ids, self.manifest.rows.ids[0]), np.where(valid, views, 0)
    return ids, views

  def _entry(self, name: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in batch:
      found_by = "'id' and 'view'" if self.augmented else "'id'"
      raise ValueError(
        f"the batch has no {name!r}: rows of the cache in {self.store.url} are found by {found_by}; it has "
        f"{sorted(batch)}"
      )
    values = np.asarray(batch[name])
    if values.ndim != 1 or values.dtype.kind not in "iu":
      raise ValueError(f"{name}: expected integers [B], got {values.dtype} {list(values.shape)}")
    return values

  def scan(self) -> dict[str, Any]:
    """Reads every byte again and compares all checksums, the head's too.

    Returns:
      'rows', 'bytes', 'sha256' of the shards, 'manifest'.

    Raises:
      Incomplete, CorruptCache: shard and example are named.
    """
    record = complete(self.store, self.manifest)
    if self._head is not None:
      heads.read(self.store, self._head)
    return record

  @property
  def augmented(self) -> bool:
    """Whether it holds views of examples that are augmented, or cropped at random."""
    made = self.manifest.identity
    return made["augmentation"]["name"] != "none" or identity.varies(made["data"])

  @property
  def digest(self) -> str:
    """Of what it was made from; the same for the same rows in other shards."""
    return hashlib.sha256(
      json.dumps([self.manifest.identity, self.num_views], sort_keys=True).encode()
    ).hexdigest()[:32]

  def check(
    self,
    source: Source | Images | PackedText | Mapping[str, np.ndarray],
    *,
    crop: Crop | None = None,
    augment: Callable[[Batch], Batch] | None = None,
    num_views: int | None = None,
    mix: Any = None,
  ) -> None:
    """Refuse a run that this cache does not belong to.

    Args:
      source: the run's examples: those of the cache or a part of them, with any labels. Of a pipeline of one's own, or
        a `data.Stream`, a batch: its examples are compared, and the set's name is not.
      crop: as the run has it, with `Images`.
      augment: as the run has it.
      num_views: as the run has them; a cache without augmentation takes any.
      mix: mixup or cutmix, if the run has it.

    Raises:
      Mismatch: data or augmentation differ; the fields, or the example, are named. It is a ValueError.
      ValueError: the run mixes rows: no cache holds mixtures.
    """
    if mix is not None:
      raise ValueError(
        "mix: a mixed example is a new one in every batch and has no cached output: use a live teacher"
      )
    arrays = source if isinstance(source, Mapping) else examples_of(source, crop).shapes
    check_fields(self.table, source, crop, arrays)
    if isinstance(source, Images):
      self.manifest.rows.numbers(source.ids, np.zeros(len(source), np.int32))
    elif isinstance(source, PackedText):
      for first in range(0, len(source), CHUNK):
        self._check_examples(source.rows(source.ids[first : first + CHUNK]))
    else:
      self._check_examples(source.arrays if isinstance(source, Source) else source)
    self._compare({"augmentation": identity.augmentation(augment, arrays)})
    if self.augmented and num_views is not None and num_views != self.num_views:
      raise Mismatch(
        f"num_views: the cache in {self.store.url} holds {self.num_views} of each example, the run asks for {num_views}"
      )

  def check_teacher(
    self,
    teacher: Model,
    variables: Variables,
    outputs: Mapping[str, Codec],
    arrays: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
  ) -> None:
    """Refuse a cache of another teacher, or of other outputs; arguments as for `write_cache`, `arrays` of examples.

    Raises:
      Mismatch: the fields are named.
    """
    said = self.manifest.identity["outputs"]
    held = {
      name: {f: v for f, v in kept.items() if f not in ("shape", "of")}
      for name, kept in said.items()
    }
    wanted = {name: dense.spec(codec) for name, codec in outputs.items()}
    manifest.check(self.store, {"outputs": held}, {"outputs": wanted})
    self._compare({"teacher": identity.teacher(teacher, variables, outputs, arrays, description)})

  def check_weights(self, variables: Variables) -> None:
    """Refuse a cache of other weights.

    Raises:
      Mismatch: both fingerprints are named.
    """
    held = self.manifest.identity["teacher"]["weights"]
    manifest.check(
      self.store, {"teacher.weights": held}, {"teacher.weights": fingerprint(tuple(variables))}
    )

  def _check_examples(self, arrays: Mapping[str, np.ndarray]) -> None:
    ids, valid = self._entry("id", arrays), _valid(arrays)
    views = (
      self._entry("view", arrays)
      if self._streamed and self.augmented
      else np.zeros(len(ids), np.int32)
    )
    if valid is not None:
      ids, views = ids[valid], views[valid]
      arrays = {name: np.asarray(values)[valid] for name, values in arrays.items()}
    check_examples(self.table, ids, views, arrays)

  def _compare(self, part: Mapping[str, Any]) -> None:
    manifest.check(
      self.store, {name: self.manifest.identity[name] for name in part}, part, identity.same
    )


def _valid(batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
  """Which rows count, bool [B]; None: all."""
  where = batch.get("where")
  return None if where is None or np.ndim(where) != 1 else np.asarray(where, bool)


def _short(value: Any) -> str:
  """Without most of a long list's numbers."""
  if isinstance(value, list) and len(value) > 4:
    return f"[{', '.join(map(str, value[:3]))}, ... {len(value)} in all]"
  return str(value)


def open_cache(url: str | os.PathLike[str], *, memory: int = MEMORY) -> Cache:
  """A finished cache.

  Args:
    url: as for `write_cache`. The files of a local folder are mapped into memory; from an object store shards are read
      when they are needed, and those of the next view ahead of time.
    memory: bytes that the shards of an object store may take here: two views' at least, better all.

  Raises:
    Incomplete: there is none, or it is not finished: `write_cache` goes on with it.
    CorruptCache: it was changed since it was written.
    OSError: the store cannot be read.
  """
  store = open_store(url)
  made = open_complete(store)
  described = made.identity["teacher"].get("head")
  if described is not None:
    heads.check_there(store, described)
  return Cache(store, made, memory)
