"""Subsets of a source, chosen by a hash of the example's id: stable, and independent of order."""

import dataclasses
import hashlib
from collections.abc import Collection
from typing import TypeVar

import numpy as np

from distill_jax.data.checks import UNLABELED, check_seed
from distill_jax.data.images import Images
from distill_jax.data.source import Source

Examples = TypeVar("Examples", Source, Images)


def split(source: Examples, fraction: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
  """Hold examples out for validation.

  Whether an example is held out depends on its id, `fraction` and `seed` alone: not on its row, nor on what
  else is in the source. The held-out part is therefore about `fraction` of the examples, and one for a
  smaller fraction lies inside one for a larger fraction.

  Returns:
    `(rest, held_out)`, each in the source's order.

  Raises:
    ValueError: `fraction` is not inside (0, 1), or one part would be empty.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction must be more than 0 and less than 1, got {fraction}")
  held_out = uniform(source.ids, seed, "split") < fraction
  if held_out.all() or not held_out.any():
    raise ValueError(
      f"fraction {fraction} of {len(source)} examples of {source.name} leaves one part empty "
      f"({held_out.sum()} held out): choose one nearer 0.5, or another seed"
    )
  return source.take(~held_out), source.take(held_out)


def label_fraction(source: Source, fraction: float, seed: int = 0) -> Source:
  """Keep the labels of a fraction of each class, at least one; the other examples become `UNLABELED`.

  All examples stay: a teacher teaches on those without a label too. Labels kept for a smaller fraction are
  kept for a larger one.

  Raises:
    ValueError: `fraction` is not inside (0, 1]; for no labels at all there is `unlabeled`.
  """
  if not 0 < fraction <= 1:
    raise ValueError(
      f"fraction must be more than 0 and at most 1, got {fraction}: for no labels, use unlabeled()"
    )
  label = source.arrays["label"]
  kept = stratified(label, uniform(source.arrays["id"], seed, "label_fraction"), fraction)
  return _with_labels(source, np.where(kept, label, UNLABELED))


def unlabeled(source: Source) -> Source:
  """The same examples without any label."""
  return _with_labels(source, np.full_like(source.arrays["label"], UNLABELED))


def leave_out_classes(source: Source, classes: Collection[int]) -> Source:
  """Remove the examples of some classes: the student never sees one (Hinton et al. 2015, section 3).

  The number of classes stays, so that the teacher can still teach about those left out.

  Raises:
    ValueError: a class does not exist, nothing is left, or there are examples without a label (they may
      belong to these classes: leave classes out first, then remove labels).
  """
  label = source.arrays["label"]
  unknown = sorted(c for c in classes if not 0 <= c < source.classes)
  if unknown:
    raise ValueError(
      f"class {unknown[0]} does not exist: {source.name} has 0 to {source.classes - 1}"
    )
  if classes and (label == UNLABELED).any():
    raise ValueError(
      f"{(label == UNLABELED).sum()} examples of {source.name} have no label and may belong to classes "
      f"{sorted(classes)}: leave classes out before removing labels"
    )
  kept = ~np.isin(label, list(classes))
  if not kept.any():
    raise ValueError(f"leaving out classes {sorted(classes)} leaves no example of {source.name}")
  return source.take(kept)


def uniform(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
  """One number in [0, 1) per id. Each purpose has its own: what is held out says nothing about labels."""
  check_seed(seed)
  digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
  x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
    int.from_bytes(digest, "little")
  )
  # The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words.
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def stratified(label: np.ndarray, rank: np.ndarray, fraction: float) -> np.ndarray:
  """Mask of the lowest-ranked `fraction` of each class, rounded, at least one."""
  chosen = np.zeros(len(label), bool)
  for c in np.unique(label):
    rows = np.flatnonzero(label == c)
    rows = rows[np.argsort(rank[rows], kind="stable")]
    chosen[rows[: max(1, round(fraction * len(rows)))]] = True
  return chosen


def _with_labels(source: Source, label: np.ndarray) -> Source:
  return dataclasses.replace(
    source, arrays={**source.arrays, "label": label}, ignore_label=UNLABELED
  )
