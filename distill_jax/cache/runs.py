"""Does a run's data belong to a cache?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.store import manifest
from distill_jax.cache.store.manifest import Mismatch
from distill_jax.cache.store.table import Table
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.text.tokenized import PackedText

CHUNK = 4096


def check_fields(
  table: Table,
  source: Source | Images | PackedText | Mapping[str, np.ndarray],
  crop: Crop | None,
  arrays: Mapping[str, Any],
) -> None:
  """Refuses data of another name, kind, cut or shape; arguments as for `Cache.check`, `arrays` its examples.

  Raises:
    Mismatch: each field that differs is named.
  """
  held, mine = table.manifest.identity["data"], identity.inputs(arrays)
  found: dict[str, Any] = {"inputs": {name: mine.get(name, "(absent)") for name in held["inputs"]}}
  if not isinstance(source, Mapping):
    found |= {"name": source.name, "classes": identity.vocabulary(source.class_names)}
  if isinstance(source, Source | PackedText) and (source.vocabulary or "vocabulary" in held):
    found["vocabulary"] = source.vocabulary or "(absent)"
  if isinstance(source, Images) and crop is not None:
    found |= {"content": source.content, "crop": identity.cropping(crop, source.channels)}
  of_cache = {field: held.get(field, "(absent)") for field in found}
  manifest.check(table.store, {"data": of_cache}, {"data": found}, identity.same)


def check_examples(
  table: Table, ids: np.ndarray, views: np.ndarray, arrays: Mapping[str, np.ndarray]
) -> None:
  """Refuses examples whose inputs are not those that the teacher was shown.

  Args:
    ids, views: integers [N].
    arrays: their inputs, [N, ...].

  Raises:
    Mismatch: the first example that differs is named.
    ValueError: an example or a view is not in the cache.
  """
  checksums = identity.source_checksums(
    {**arrays, "id": ids}, table.manifest.identity["data"]["inputs"]
  )
  for first in range(0, len(ids), CHUNK):
    part = slice(first, first + CHUNK)
    records = table.read(ids[part], views[part])
    wrong = np.flatnonzero(records["source_crc"] != checksums[part])
    if wrong.size:
      raise Mismatch(
        f"example id {int(ids[part][wrong[0]])} is not the one that the teacher of the cache in {table.store.url} was "
        "shown: its inputs have changed, or are prepared otherwise"
      )
