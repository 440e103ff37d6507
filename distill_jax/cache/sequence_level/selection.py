"""Chooses one sequence of each row, or none, and stores the choice next to the sequences.

The folder of pseudo labels holds, in addition to the files of `store.shards`:

    kept-DIGEST         the number of each row's sequence, -1 for none, int32, little-endian, in the
                        order of the ids
    kept.json           written last: the names of the functions that chose, how many rows each
                        dropped, and DIGEST; it holds a sha256 of itself
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.cache.function_names import function_name
from distill_jax.cache.sequence_level.candidates import Candidates, Keep
from distill_jax.cache.store import manifest as manifests
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.manifest import Manifest, Mismatch
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.shards import Incomplete
from distill_jax.models.adapters.kinds import wrong_kind

RECORD = "kept.json"
DROPPED = -1


class Selection(NamedTuple):
  """The sequence of each row.

  Attributes:
    numbers: int32 [N], from 0, `DROPPED` for none.
    dropped: number of rows by the reason for which their last usable sequence was left out.
  """

  numbers: np.ndarray
  dropped: Mapping[str, int]

  @property
  def figures(self) -> dict[str, Any]:
    """Number of rows, of those that were kept, and of those that were dropped, by reason."""
    kept = int((self.numbers != DROPPED).sum())
    return {"rows": len(self.numbers), "kept": kept, "dropped": dict(self.dropped)}

  def __str__(self) -> str:
    """Returns the figures in a line."""
    rows, kept, dropped = self.figures.values()
    reasons = "".join(f"; {name} {count:,}" for name, count in dropped.items() if count)
    return f"pseudo labels: kept {kept:,} of {rows:,} rows{reasons}"


def as_rules(keep: Keep | Sequence[Keep]) -> tuple[Keep, ...]:
  """Returns functions as a tuple.

  Raises:
    ValueError: one is none.
  """
  rules = (keep,) if callable(keep) else tuple(keep)
  for rule in rules:
    if not callable(rule):
      raise wrong_kind("keep", "functions Candidates -> bool [N, K]", rule)
  return rules


def select(candidates: Candidates, rules: Sequence[Keep]) -> Selection:
  """Returns the first sequence of each row that all functions keep.

  Raises:
    ValueError: a function returns something else than bool [N, K].
  """
  lengths = candidates.lengths
  usable = candidates.usable
  dropped: dict[str, int] = {}

  def leave(name: str, kept: np.ndarray) -> None:
    nonlocal usable
    before = usable.any(1)
    usable = usable & kept
    dropped[name] = dropped.get(name, 0) + int((before & ~usable.any(1)).sum())

  # A CTC teacher that hears nothing says so; a beam without so many sequences says nothing.
  leave("empty", lengths > 0 if candidates.has_end else ~np.isneginf(candidates.scores))
  if candidates.has_end:
    leave("not ended", lengths < candidates.tokens.shape[-1])
    leave("start token first", candidates.tokens[..., 0] != candidates.start_token)
  leave("too long", lengths + candidates.has_end <= target_length(candidates))
  for rule in rules:
    kept = np.asarray(rule(candidates._replace(usable=usable)))
    name = function_name(rule)
    if kept.dtype != np.bool_ or kept.shape != usable.shape:
      raise ValueError(
        f"keep: expected bool {list(usable.shape)} of {name}, got {kept.dtype} {list(kept.shape)}: "
        "return which sequences of each row may stay"
      )
    leave(name, kept)
  numbers = np.where(usable.any(1), usable.argmax(1), DROPPED).astype(np.int32)
  return Selection(numbers, dropped)


def target_length(candidates: Candidates) -> int:
  """Returns the number T of a target's tokens, with the end token: that of the source's."""
  label = candidates.arrays.get("label")
  sequences = candidates.tokens if label is None or label.ndim != 2 else label
  return sequences.shape[-1]


def store_selection(
  store: Store, manifest: Manifest, candidates: Candidates, rules: Sequence[Keep]
) -> Selection:
  """Chooses the sequence of each row and writes the choice, or reads what an earlier call wrote.

  Args:
    store, manifest: the complete pseudo labels.
    candidates: of all rows, in the order of the manifest.
    rules: functions that choose.

  Raises:
    ValueError: as `select`.
    Mismatch: an earlier call chose by other functions, references or lengths.
    CorruptCache: the stored choice was changed.
  """
  asked = _question(candidates, rules)
  if store.read(RECORD) is None:
    selection = select(candidates, rules)
    data = selection.numbers.astype("<i4").tobytes()
    digest = manifests.digest(data)
    # The numbers are written first, so that a record is never without them.
    store.put(_numbers_key(digest), data)
    dropped = list(selection.dropped.items())
    body = {"manifest": manifest.digest, "asked": asked, "dropped": dropped}
    store.create(RECORD, manifests.seal(body | {"numbers": digest}))
    return selection
  stored = _read_record(store, manifest)["asked"]
  lines = [
    f"\n  {name}: expected {value!r}, got {stored[name]!r} in the file"
    for name, value in asked.items()
    if value != stored[name]
  ]
  if lines:
    raise Mismatch(
      f"the sequences in {store.url} were chosen otherwise: pass keep= to pseudo_labels, which "
      f"chooses again for one run, or delete {RECORD} there to replace the choice:{''.join(lines)}"
    )
  selection = read_selection(store, manifest)
  # Names say neither what a lambda does nor what changed in a function.
  if rules and not np.array_equal(select(candidates, rules).numbers, selection.numbers):
    raise Mismatch(
      f"keep: expected functions that choose the sequences of {store.url}, got others of the same "
      f"names: pass keep= to pseudo_labels, or delete {RECORD} there to replace the choice"
    )
  return selection


def read_selection(store: Store, manifest: Manifest) -> Selection:
  """Returns the stored choice, in the order of the manifest.

  Raises:
    Incomplete: there is none.
    CorruptCache: it was changed.
  """
  body = _read_record(store, manifest)
  key = _numbers_key(body["numbers"])
  data = store.read(key)
  if data is None or manifests.digest(data) != body["numbers"]:
    reason = "is missing" if data is None else "is corrupt"
    raise CorruptCache(f"{store.url}/{key}", reason, f"it and {RECORD}")
  return Selection(np.frombuffer(data, "<i4"), dict(body["dropped"]))


def _read_record(store: Store, manifest: Manifest) -> dict[str, Any]:
  data = store.read(RECORD)
  if data is None:
    raise Incomplete(
      f"{store.url}/{RECORD} is missing: the writer was stopped before it had chosen sequences. "
      "Call seq_kd again: it resumes there."
    )
  body, _ = manifests.unseal(data, f"{store.url}/{RECORD}")
  if body["manifest"] != manifest.digest:
    raise CorruptCache(f"{store.url}/{RECORD}", "is of other pseudo labels")
  return body


def _question(candidates: Candidates, rules: Sequence[Keep]) -> dict[str, Any]:
  """Returns what a choice depends on, next to the sequences."""
  label = candidates.arrays.get("label")
  references = None
  if rules and label is not None:
    references = manifests.digest(np.ascontiguousarray(label).tobytes())
  return {
    "keep": list(map(function_name, rules)),
    "references": references,
    "target_length": target_length(candidates),
  }


def _numbers_key(digest: str) -> str:
  return f"kept-{digest}"
