"""Opens a finished cache: its rows by example, and a teacher that decodes them."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.codecs import codec as codecs
from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.manifest import Manifest, Mismatch, flatten
from distill_jax.cache.store.row_reader import MEMORY, RowReader
from distill_jax.cache.teacher.lm_head import LMHead, check_has_head, head_bytes, read_head
from distill_jax.cache.teacher_inputs import UNDECODABLE
from distill_jax.types import CACHED, Batch, Model, Variables


class Cache:
  """A teacher's outputs by (example id, view), from `write_cache` or `open_cache`.

  `train.fit` takes it instead of the teacher. In your own loop `add_columns` adds the rows to a
  batch, and `model` is the teacher that decodes them there.

  Attributes:
    store: location of the cache.
    manifest: what the cache is.
    row_reader: reads the rows.
    outputs: `{name: (codec, ShapeDtypeStruct of one example's output)}`.
    num_views: number of views of each example.
    has_views: whether the views of an example differ: it is augmented or cropped at random.
    is_streamed: whether the examples are images that are cropped on demand.

  Example in `open_cache`.
  """

  def __init__(self, store: Store, manifest: Manifest, memory: int = MEMORY):
    self.store = store
    self.manifest = manifest
    self.row_reader = RowReader(store, manifest, memory)
    self.outputs: dict[str, tuple[Codec, jax.ShapeDtypeStruct]] = {}
    for name, values in manifest.identity["outputs"].items():
      output = jax.ShapeDtypeStruct(tuple(values["shape"]), jnp.dtype(values["dtype"]))
      self.outputs[name] = codecs.from_json(values["codec"]), output
    self.num_views = manifest.rows.num_views
    self.is_streamed = "crop" in manifest.identity["data"]
    self.has_views = identity.has_views(manifest.identity)
    self._head_identity = manifest.identity["teacher"].get("head")
    self._column_entries = [(column.name, CACHED + column.name) for column in manifest.columns]

  def __len__(self) -> int:
    return len(self.manifest.rows)

  def __repr__(self) -> str:
    """Returns location, size and identity, one line each."""
    manifest = self.manifest
    row_bytes = manifest.header(0).record_dtype.itemsize
    lines = [
      f"cache in {self.store.url}",
      f"  {len(self):,} rows: {self.num_examples:,} examples x {self.num_views} views, "
      f"{row_bytes:,} bytes a row, {manifest.size:,} bytes in {len(manifest.plan)} shards",
    ]
    if self._head_identity is not None:
      lines.append(f"  and the teacher's head, {head_bytes(self._head_identity):,} bytes")
    fields = flatten(manifest.identity)
    return "\n".join(lines + [f"  {name}: {_short(value)}" for name, value in fields.items()])

  @property
  def num_examples(self) -> int:
    """Number of examples, without their views."""
    return len(self.manifest.rows.ids)

  @property
  def digest(self) -> str:
    """Digest of identity and views; the same for the same rows in other shards."""
    content = json.dumps([self.manifest.identity, self.num_views], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]

  @functools.cached_property
  def head(self) -> LMHead | None:
    """The teacher's head, where its hidden states are stored.

    Raises:
      Incomplete, CorruptCache: it is missing or was changed.
    """
    return None if self._head_identity is None else read_head(self.store, self._head_identity)

  @property
  def model(self) -> Model:
    """A teacher that decodes the 'teacher/...' columns of a batch; its weights are the head."""
    head = self.head
    variables = Variables({} if head is None else {"head": head.arrays}, {})

    def apply(params: Any, state: Any, batch: Batch, *, train: bool, key: Any):
      del train, key
      outputs: dict[str, Any] = {name: self.decode(name, batch) for name in self.outputs}
      if head is not None:
        if "head" not in params:
          raise ValueError("params: expected the head, got none: pass Cache.model.variables")
        outputs["head"] = params["head"]["kernel"], params["head"].get("bias"), head.softcap
      return outputs, state

    return Model(lambda key, batch: variables, apply, variables)

  def decode(self, name: str, batch: Batch) -> Any:
    """Returns the output that is stored under a name, of a batch with its columns.

    Raises:
      ValueError: the batch has no such columns.
    """
    prefix = f"{CACHED}{name}."
    columns = {
      entry.removeprefix(prefix): x for entry, x in batch.items() if entry.startswith(prefix)
    }
    if not columns:
      raise ValueError(
        f"batch: expected columns {prefix}..., got {sorted(batch)}: add them with Cache.add_columns"
      )
    codec, output = self.outputs[name]
    rows = next(iter(columns.values())).shape[0]
    return codec.decode(columns, jax.ShapeDtypeStruct((rows, *output.shape), output.dtype))

  def add_columns(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the batch of host arrays with the columns 'teacher/OUTPUT.PART' of its rows.

    A cache without augmentation has one view and accepts any 'view', or none. Rows that are False
    in 'where' [B] only pad the batch: whatever their ids, they get the first example's outputs.

    Raises:
      ValueError: the batch has no 'id' or 'view', or an example or a view is not in the cache.
      CorruptCache: a row is not as it was written; the message names shard and example.
    """
    records = self.row_reader.read(*self._row_keys(batch))
    if self.is_streamed and (records["source_crc"] == UNDECODABLE).any():
      id = records["id"][records["source_crc"] == UNDECODABLE][0]
      raise ValueError(
        f"id: expected images that the teacher received, got example id {id}, which could not be "
        f"decoded when the cache in {self.store.url} was written: leave it out"
      )
    return {**batch, **{entry: records[name] for name, entry in self._column_entries}}

  def valid_rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Returns for ids [B] and views [B] whether the teacher received the example, bool [B].

    It received all but the streamed images that could not be decoded.
    """
    if not self.is_streamed:
      return np.ones(len(ids), bool)
    return self.row_reader.read(ids, views)["source_crc"] != UNDECODABLE

  def check_checksums(self) -> dict[str, Any]:
    """Reads every byte again, the head's too, and compares all checksums.

    Returns:
      'rows', 'bytes', 'sha256' of the shards, 'manifest'.

    Raises:
      Incomplete, CorruptCache: the message names shard and example.
    """
    record = shards.complete(self.store, self.manifest)
    if self._head_identity is not None:
      read_head(self.store, self._head_identity)
    return record

  def _row_keys(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and views of a batch's rows."""
    ids = key_entry(self, "id", batch)
    views = key_entry(self, "view", batch) if self.has_views else np.zeros(len(ids), np.int32)
    where = row_mask(batch)
    if where is None:
      return ids, views
    return np.where(where, ids, self.manifest.rows.ids[0]), np.where(where, views, 0)


def open_cache(url: str | os.PathLike[str], *, memory: int = MEMORY) -> Cache:
  """Opens a finished cache.

  Args:
    url: as for `write_cache`. The files of a local folder are memory-mapped; shards of an object
      store are read on demand, and those of the next view ahead of time.
    memory: bytes that the shards of an object store may take in this process: those of two views
      at least, better all.

  Raises:
    Incomplete: there is none, or it is not finished: `write_cache` resumes it.
    CorruptCache: it was changed since it was written.
    Mismatch: it holds pseudo labels, which `pseudo_labels` reads.
    OSError: the store cannot be read.

  >>> import tempfile
  >>> from distill_jax import cache, models
  >>> arrays = {"x": np.eye(4, dtype=np.float32), "label": np.arange(4)}
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> folder = tempfile.mkdtemp()
  >>> outputs = cache.write_cache(folder, teacher, arrays, progress=False)
  >>> batch = cache.open_cache(folder).add_columns({"id": np.array([2, 0])})
  >>> batch["teacher/logits.values"]
  array([[0., 0., 3., 0.],
         [3., 0., 0., 0.]], dtype=float16)
  """
  store = open_store(url)
  manifest = shards.open_complete(store)
  if "decoding" in manifest.identity:
    raise Mismatch(
      f"url: expected a cache of outputs in {store.url}, got pseudo labels: read them "
      "with cache.pseudo_labels"
    )
  head = manifest.identity["teacher"].get("head")
  if head is not None:
    check_has_head(store, head)
  return Cache(store, manifest, memory)


def row_mask(batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
  """Returns which rows of a batch count, bool [B]; None: all."""
  where = batch.get("where")
  return None if where is None or np.ndim(where) != 1 else np.asarray(where, bool)


def key_entry(cache: Cache, name: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns the entry 'id' or 'view' of a batch, integers [B].

  Raises:
    ValueError: it is missing, or has another shape or dtype.
  """
  if name not in batch:
    keys = "'id' and 'view'" if cache.has_views else "'id'"
    raise ValueError(
      f"batch: expected {keys}, the keys of the cache in {cache.store.url}, got no {name!r} in "
      f"{sorted(batch)}"
    )
  values = np.asarray(batch[name])
  if values.ndim != 1 or values.dtype.kind not in "iu":
    raise ValueError(f"{name}: expected integers [B], got {values.dtype} {list(values.shape)}")
  return values


def _short(value: Any) -> str:
  """Returns a text without most of a long list's items."""
  if isinstance(value, list) and len(value) > 4:
    return f"[{', '.join(map(str, value[:3]))}, ... {len(value)} in all]"
  return str(value)
