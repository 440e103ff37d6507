"""Writes, reads and compares the manifest: what a cache is, as its first writer defined it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.format import VERSION, Column, Header, normalize_columns
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.rows import RowIndex, ShardPlan

KEY = "manifest.json"
_ABSENT = "(absent)"
Same = Callable[[str, Any, Any], bool]
"""`(field, old, new)` -> whether the two count as equal; fields of nested mappings are dotted."""


class Mismatch(ValueError):
  """A cache that differs from the expected one; the message names each field, old and new.

  Example in `check_run`.
  """


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
  """What a cache is.

  Attributes:
    identity: plain JSON values: all that must be equal for the rows to be of use.
    columns: of each row.
    rows: index of the examples and views.
    rows_per_shard: number of rows that are written at once.
    provenance: plain JSON values that are recorded and never compared.
    plan: division of the rows into shards.
    body: the manifest without provenance, as JSON stores it.
    digest: 32 hexadecimal digits of `body`; every shard holds them.

  Raises:
    ValueError: a column cannot be stored, `rows_per_shard` is less than 1, or JSON cannot hold a
      value.
  """

  identity: Mapping[str, Any]
  columns: tuple[Column, ...]
  rows: RowIndex
  rows_per_shard: int
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plan: ShardPlan = dataclasses.field(init=False)
  body: Mapping[str, Any] = dataclasses.field(init=False)
  digest: str = dataclasses.field(init=False)

  def __post_init__(self):
    self._set("columns", normalize_columns(self.columns))
    self._set("plan", ShardPlan(len(self.rows), self.rows_per_shard))
    body = {
      "format": VERSION,
      "identity": self.identity,
      "columns": self.columns,
      "examples": len(self.rows.ids),
      "num_views": self.rows.num_views,
      "rows_per_shard": self.rows_per_shard,
      "ids": digest(self.ids),
    }
    self._set("body", json.loads(_json(body)))
    self._set("digest", digest(_json(self.body)))

  def _set(self, field: str, value: Any) -> None:
    # The class is frozen for its callers.
    object.__setattr__(self, field, value)

  @property
  def ids(self) -> bytes:
    """The examples' ids as they are stored."""
    return self.rows.ids.astype("<i8").tobytes()

  @property
  def size(self) -> int:
    """Number of bytes of all shards."""
    return sum(self.header(shard).size for shard in range(len(self.plan)))

  def header(self, shard: int) -> Header:
    """Returns the header that a shard must have."""
    first, last = self.plan.span(shard)
    return Header(self.digest, shard, first, last - first, self.columns)


def load(store: Store) -> Manifest | None:
  """Returns the manifest of a cache; None without one.

  Raises:
    CorruptCache: it or the ids were changed.
    Mismatch: it has another format version.
    StoreError: it cannot be read.
  """
  data = store.read(KEY)
  if data is None:
    return None
  body, provenance = unseal(data, f"{store.url}/{KEY}")
  if body["format"] != VERSION:
    raise Mismatch(
      f"format: expected version {VERSION}, got {body['format']} in {store.url}: "
      "write the cache again"
    )
  rows = RowIndex(_read_ids(store, body["ids"]), body["num_views"])
  columns = tuple(Column(name, dtype, tuple(shape)) for name, dtype, shape in body["columns"])
  return Manifest(body["identity"], columns, rows, body["rows_per_shard"], provenance)


def check_equal(
  store: Store, stored: Mapping[str, Any], expected: Mapping[str, Any], same: Same | None = None
) -> None:
  """Checks that a stored manifest is the expected one, however its rows are divided into shards.

  Args:
    store: for the message.
    stored, expected: bodies of manifests, or parts of them.
    same: what counts as equal; None: `==`. A field that only one side has is never equal.

  Raises:
    Mismatch: with a line for each field that differs.
  """
  old_fields = flatten(stored)
  new_fields = flatten(json.loads(_json(expected)))
  lines = []
  for field in sorted({**old_fields, **new_fields}.keys() - {"rows_per_shard"}):
    name = field.removeprefix("identity.")
    old = old_fields.get(field, _ABSENT)
    new = new_fields.get(field, _ABSENT)
    one_sided = _ABSENT in (old, new)
    is_equal = old == new if same is None or one_sided else same(name, old, new)
    if not is_equal:
      lines.append(f"\n  {name}: expected {new!r}, got {old!r} in the cache")
  if lines:
    raise Mismatch(
      f"the cache in {store.url} is another one: name another folder or delete it:{''.join(lines)}"
    )


def seal(body: Any, provenance: Mapping[str, Any] | None = None) -> bytes:
  """Returns JSON with a sha256 of itself, so that `unseal` detects every change."""
  content = {"body": body} | ({} if provenance is None else {"provenance": provenance})
  return _json(content | {"sha256": hashlib.sha256(_json(content)).hexdigest()}, indent=1)


def unseal(data: bytes, location: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns body and provenance of sealed JSON.

  Raises:
    CorruptCache: a bit was changed.
  """
  try:
    content = json.loads(data)
    body = content["body"]
    provenance = content.get("provenance")
    # Bytes are compared, not values: JSON reads some texts alike (1e5 and 1E5).
    is_valid = seal(body, provenance) == data
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    is_valid = False
  if not is_valid:
    raise CorruptCache(location, "is corrupt: its bytes are not those that were written")
  return body, provenance or {}


def ids_key(ids_digest: str) -> str:
  """Returns the key of the ids; it is unique to them, so that they precede the manifest."""
  return f"ids-{ids_digest}"


def digest(data: bytes) -> str:
  """Returns 32 hexadecimal digits of a sha256."""
  return hashlib.sha256(data).hexdigest()[:32]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested mappings as one: `{'a': {'b': 1}}` -> `{'a.b': 1}`."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _read_ids(store: Store, ids_digest: str) -> np.ndarray:
  key = ids_key(ids_digest)
  data = store.read(key)
  if data is None or digest(data) != ids_digest:
    reason = "is missing" if data is None else "is corrupt"
    raise CorruptCache(f"{store.url}/{key}", reason, f"it and {KEY}")
  return np.frombuffer(data, "<i8")


def _json(values: Any, indent: int | None = None) -> bytes:
  return json.dumps(values, sort_keys=True, allow_nan=False, indent=indent).encode()
