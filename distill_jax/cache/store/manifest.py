"""What a cache is: the manifest that its first writer creates and that all others are held to."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.format import VERSION, Column, Header, normal_columns
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.rows import Plan, Rows

KEY = "manifest.json"
Same = Callable[[str, Any, Any], bool]
"""`(field, old, new)` -> whether the two count as equal; fields of nested mappings are dotted."""


class Mismatch(ValueError):
  """The cache is not the one that is wanted; each field that differs is named, old and new."""


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
  """What a cache is.

  Attributes:
    identity: plain values that json can hold: all that must be equal for the rows to be of use.
    columns: what each row holds.
    rows: of which examples, and how many views of each.
    rows_per_shard: how many are written at once.
    provenance: plain values that are written down and compared with nothing.
    plan: which shard holds which rows.
    body: all of it but provenance, as json has it.
    digest: 32 hexadecimal digits that stand for `body`; every shard holds them.

  Raises:
    ValueError: a column cannot be stored, `rows_per_shard` is less than 1, json cannot hold a value.
  """

  identity: Mapping[str, Any]
  columns: tuple[Column, ...]
  rows: Rows
  rows_per_shard: int
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plan: Plan = dataclasses.field(init=False)
  body: Mapping[str, Any] = dataclasses.field(init=False)
  digest: str = dataclasses.field(init=False)

  def __post_init__(self):
    def derive(field, value):
      object.__setattr__(self, field, value)  # the class is frozen for everybody else

    derive("columns", normal_columns(self.columns))
    derive("plan", Plan(len(self.rows), self.rows_per_shard))
    body = {
      "format": VERSION,
      "identity": self.identity,
      "columns": self.columns,
      "examples": len(self.rows.ids),
      "num_views": self.rows.num_views,
      "rows_per_shard": self.rows_per_shard,
      "ids": digest(self.ids),
    }
    derive("body", json.loads(_json(body)))
    derive("digest", digest(_json(self.body)))

  @property
  def ids(self) -> bytes:
    """The examples' ids as they are stored."""
    return self.rows.ids.astype("<i8").tobytes()

  @property
  def size(self) -> int:
    """Bytes of all shards."""
    return sum(self.header(shard).size for shard in range(len(self.plan)))

  def header(self, shard: int) -> Header:
    """What a shard must say of itself."""
    first, last = self.plan.span(shard)
    return Header(self.digest, shard, first, last - first, self.columns)


def load(store: Store) -> Manifest | None:
  """The manifest of a cache, None where there is none.

  Raises:
    CorruptCache: it was changed.
    Mismatch: another version wrote it.
    StoreError: it cannot be read.
  """
  data = store.read(KEY)
  if data is None:
    return None
  body, provenance = unseal(data, f"{store.url}/{KEY}")
  if body["format"] != VERSION:
    raise Mismatch(
      f"the cache in {store.url} has format version {body['format']}, expected {VERSION}"
    )
  key = ids_key(body["ids"])
  ids = store.read(key)
  if ids is None or digest(ids) != body["ids"]:
    raise CorruptCache(
      f"{store.url}/{key}", "is missing" if ids is None else "is damaged", f"it and {KEY}"
    )
  rows = Rows(np.frombuffer(ids, "<i8"), body["num_views"])
  columns = tuple(Column(name, dtype, tuple(shape)) for name, dtype, shape in body["columns"])
  return Manifest(body["identity"], columns, rows, body["rows_per_shard"], provenance)


def check(
  store: Store, old: Mapping[str, Any], new: Mapping[str, Any], same: Same | None = None
) -> None:
  """Refuse a cache that differs from what is wanted. How its rows are divided into shards is no difference.

  Args:
    old, new: bodies of manifests.
    same: what counts as equal; None: `==`.

  Raises:
    Mismatch: with a line for each field.
  """
  before, now = flat(old), flat(json.loads(_json(new)))
  absent, lines = "(absent)", []
  for field in sorted({**before, **now}.keys() - {"rows_per_shard"}):
    name, was, wanted = (
      field.removeprefix("identity."),
      before.get(field, absent),
      now.get(field, absent),
    )
    if not (was == wanted if same is None or absent in (was, wanted) else same(name, was, wanted)):
      lines.append(f"\n  {name}: {was!r} in the cache, {wanted!r} wanted")
  if lines:
    raise Mismatch(
      f"the cache in {store.url} is another one; name another folder or delete it:{''.join(lines)}"
    )


def seal(body: Any, provenance: Mapping[str, Any] | None = None) -> bytes:
  """JSON that `unseal` finds every change in."""
  content = {"body": body} | ({} if provenance is None else {"provenance": provenance})
  return _json(content | {"sha256": hashlib.sha256(_json(content)).hexdigest()}, indent=1)


def unseal(data: bytes, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Body and provenance.

  Raises:
    CorruptCache: a bit was changed.
  """
  try:
    content = json.loads(data)
    body, provenance = content["body"], content.get("provenance")
    whole = (
      seal(body, provenance) == data
    )  # bytes, not values: json reads some texts alike (1e5 and 1E5)
  except (ValueError, KeyError, TypeError, AttributeError):
    whole = False
  if not whole:
    raise CorruptCache(key, "is damaged: it is not what was written")
  return body, provenance or {}


def ids_key(ids_digest: str) -> str:
  """Name of the ids in the store: no other ids have it, so that they can be written before the manifest."""
  return f"ids-{ids_digest}"


def digest(data: bytes) -> str:
  """32 hexadecimal digits."""
  return hashlib.sha256(data).hexdigest()[:32]


def _json(values: Any, indent: int | None = None) -> bytes:
  return json.dumps(values, sort_keys=True, allow_nan=False, indent=indent).encode()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{'a': {'b': 1}}` -> `{'a.b': 1}`."""
  found: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      found |= flat(value, f"{prefix}{name}.")
    else:
      found[f"{prefix}{name}"] = value
  return found
