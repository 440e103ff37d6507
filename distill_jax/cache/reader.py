"""A finished cache: what it holds, its rows by example, and the teacher that it stands for."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache import codecs, identity, manifest
from distill_jax.cache.codecs import Codec
from distill_jax.cache.manifest import Manifest, Mismatch
from distill_jax.cache.shards import complete, open_complete
from distill_jax.cache.store import Store, open_store
from distill_jax.cache.table import Table
from distill_jax.data import Source
from distill_jax.types import Batch, Model, Variables

CACHED = "teacher/"


class Cache:
  """A teacher's outputs by (example id, view). Made by `write_cache` or `open_cache`.

  `train.fit` takes it in the place of the teacher. In a loop of your own `join` adds its columns to a batch, and
  `model` is the teacher that reads them there.

  Attributes:
    store: where it lies.
    manifest: what it is.
    outputs: `{name: (codec, ShapeDtypeStruct of one example's output)}`.
    views: of each example.
  """

  def __init__(self, store: Store, made: Manifest):
    self.store, self.manifest, self.table = store, made, Table(store, made)
    self.outputs: dict[str, tuple[Codec, jax.ShapeDtypeStruct]] = {}
    for name, kept in made.identity["outputs"].items():
      codec = codecs.from_spec(
        {field: value for field, value in kept.items() if field not in ("shape", "of")}
      )
      self.outputs[name] = codec, jax.ShapeDtypeStruct(tuple(kept["shape"]), jnp.dtype(kept["of"]))
    self.views = made.rows.views
    self._names = [(column.name, CACHED + column.name) for column in made.columns]

  def __len__(self) -> int:
    return len(self.manifest.rows)

  @property
  def examples(self) -> int:
    """How many examples it holds views of."""
    return len(self.manifest.rows.ids)

  @property
  def model(self) -> Model:
    """A teacher without weights: it decodes the 'teacher/...' columns of a batch."""

    def apply(params, state, batch, *, train, key):
      del params, train, key
      return {name: self._decoded(name, batch) for name in self.outputs}, state

    return Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {}))

  def _decoded(self, name: str, batch: Batch):
    prefix = f"{CACHED}{name}."
    columns = {entry.removeprefix(prefix): x for entry, x in batch.items() if entry.startswith(prefix)}
    if not columns:
      raise ValueError(
        f"the batch has no columns {prefix}...: let `Cache.join` add them; it has {sorted(batch)}"
      )
    codec, one = self.outputs[name]
    rows = next(iter(columns.values())).shape[0]
    return codec.decode(columns, jax.ShapeDtypeStruct((rows, *one.shape), one.dtype))

  def join(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch (host arrays) with the columns 'teacher/OUTPUT.PART' of its examples and views.

    A cache without augmentation has one view, and takes any.

    Raises:
      ValueError: an example or a view is not in the cache.
      Damaged: a row is not what was written; shard and example are named.
    """
    views = batch["view"] if self.augmented else np.zeros_like(batch["view"])
    records = self.table.read(batch["id"], views)
    return {**batch, **{entry: records[name] for name, entry in self._names}}

  def scan(self) -> dict[str, Any]:
    """Reads every byte again and compares all checksums.

    Returns:
      'rows', 'bytes', 'sha256' of the shards, 'manifest'.

    Raises:
      Incomplete, Damaged: shard and example are named.
    """
    return complete(self.store, self.manifest)

  @property
  def augmented(self) -> bool:
    """Whether it holds views of augmented examples."""
    return self.manifest.identity["augmentation"]["name"] != "none"

  def check(
    self,
    source: Source | None = None,
    *,
    augment: Callable[[Batch], Batch] | None = None,
    views: int | None = None,
    mix: Any = None,
  ) -> None:
    """Refuse a run that this cache does not belong to.

    Args:
      source: the run's examples: those of the cache or a part of them, with any labels. None: not compared.
      augment: as the run has it.
      views: as the run has them; a cache without augmentation takes any.
      mix: mixup or cutmix, if the run has it.

    Raises:
      Mismatch: data or augmentation differ; the fields, or the example, are named. It is a ValueError.
      ValueError: the run mixes rows: no cache holds mixtures.
    """
    if mix is not None:
      raise ValueError(
        "mix: a mixed example is a new one in every batch and has no cached output: use a live teacher"
      )
    if source is not None:
      self._check_examples(source)
      held, wanted = self.manifest.identity["augmentation"], identity.augmentation(augment, source.arrays)
      manifest.check(self.store, {"augmentation": held}, {"augmentation": wanted}, identity.same)
    if self.augmented and views is not None and views != self.views:
      raise Mismatch(
        f"views: the cache in {self.store.url} holds {self.views} of each example, the run asks for {views}"
      )

  def _check_examples(self, source: Source) -> None:
    held = self.manifest.identity["data"]
    names = {"name": source.name, "classes": identity.vocabulary(source.class_names)}
    manifest.check(self.store, {"data": {field: held[field] for field in names}}, {"data": names})
    checksums = identity.source_checksums(source.arrays)
    views = np.zeros(len(source), np.int32)
    for first in range(0, len(source), 4096):
      part = slice(first, first + 4096)
      records = self.table.read(source.ids[part], views[part])
      wrong = np.flatnonzero(records["source_crc"] != checksums[part])
      if wrong.size:
        example = int(source.ids[part][wrong[0]])
        raise Mismatch(
          f"example id {example} of {source.name} is not the one that the teacher of the cache in {self.store.url} was "
          "shown: its inputs have changed, or are prepared otherwise"
        )


def open_cache(url: str | os.PathLike[str]) -> Cache:
  """A finished cache. A local folder is mapped into memory; from an object store all of it is read into memory.

  Raises:
    Incomplete: there is none, or it is not finished: `write_cache` goes on with it.
    Damaged: it was changed since it was written.
    OSError: the store cannot be read.
  """
  store = open_store(url)
  return Cache(store, open_complete(store))
