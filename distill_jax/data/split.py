"""Selects subsets of a source by a hash of the example's id: stable, and independent of order."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from distill_jax.data.arrays import to_batch
from distill_jax.data.box_checks import check_no_boxes
from distill_jax.data.checks import check_fraction, check_number, check_seed
from distill_jax.data.groups import group_entry
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.videos import Streamed, Videos


def split(
  source: Any,
  fraction: float = 0.1,
  seed: int = 0,
  *,
  stratify: str | None = None,
  groups: str | None = None,
) -> tuple[Any, Any]:
  """Holds examples out for validation.

  Whether an example is held out depends on its id, `fraction` and `seed` only: not on its row or
  label, nor on the other examples of the source. So about `fraction` of the examples are held out,
  and those of a smaller fraction are among those of a larger one.

  Args:
    source: a `Source`, with or without classes, `Images`, `Videos`, or a dict of arrays as in
      `fit`.
    fraction: the expected fraction of held-out examples, in (0, 1).
    seed: from 0 to 2^32 - 1.
    stratify: the entry of class numbers [N], e.g. 'label', of each of which the fraction is held
      out, at least one example; the only example of a class stays in `rest`. Whether an example is
      held out then depends on the other examples of its class, too.
    groups: the entry of integers [N], e.g. a patient's number, whose examples stay together; None:
      that of the source's `groups`, if it has one. With
      `stratify` groups are held out one by one, in the order of their hash, where that brings the
      numbers of all classes nearer to the fraction; a class of one group stays in `rest`.

  Returns:
    `(rest, held_out)`, each in the source's order.

  Raises:
    ValueError: `fraction` is not in (0, 1), one part would be empty, or an entry does not exist or
      holds no integers [N].

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> train, validation = data.split(source, 0.2, stratify="label")
  >>> len(train), len(validation)
  (8, 2)
  """
  source = _as_examples("split", source)
  check_fraction(fraction)
  groups = groups or group_entry(source)
  ids = source.ids if groups is None else _integers(source, "groups", groups)
  ranks = hash_ids(ids, seed, "split")
  held_out = ranks < fraction
  if stratify is not None:
    strata = _integers(source, "stratify", stratify)
    if groups is None:
      held_out = stratified_mask(strata, ranks, fraction, leave_one=True)
    else:
      held_out = _stratified_groups(strata, ids, ranks, fraction)
  if held_out.all() or not held_out.any():
    raise ValueError(
      f"fraction: expected two parts that hold examples, got {held_out.sum()} of the {len(source)} "
      f"of {source.name} held out with {fraction}: choose one nearer 0.5, or another seed"
    )
  return source.take(~held_out), source.take(held_out)


def label_fraction(source: Source, fraction: float, seed: int = 0) -> Source:
  """Keeps the labels of a fraction of each class, at least one; the others become `UNLABELED`.

  Labels of several numbers, such as label maps [N, H, W], are kept or removed whole.

  All examples stay: a teacher also has outputs for those without a label. The labels of a smaller
  fraction are among those of a larger one.

  Args:
    source: examples with class numbers [N, ...] as labels.
    fraction: fraction of each class that keeps its labels, in (0, 1].
    seed: from 0 to 2^32 - 1.

  Raises:
    ValueError: the source has no classes, or has boxes; or `fraction` is not in (0, 1]: `unlabeled`
      removes all labels.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> few_labels = data.label_fraction(source, 0.4)
  >>> np.sum(few_labels.arrays["label"] >= 0).item()  # of 10
  4
  """
  source = _as_examples("label_fraction", source)
  label = _class_numbers(source, "label_fraction")
  check_number("fraction", fraction)
  if not 0 < fraction <= 1:
    raise ValueError(
      f"fraction: expected a number in (0, 1], got {fraction}: for no labels, use data.unlabeled"
    )
  ranks = hash_ids(source.arrays["id"], seed, "label_fraction")
  strata = label if label.ndim == 1 else np.zeros(len(label), int)
  has_label = stratified_mask(strata, ranks, fraction)
  few_labels = label.copy()
  few_labels[~has_label] = UNLABELED
  return _with_labels(source, few_labels)


def unlabeled(source: Source) -> Source:
  """Removes all labels: they become `UNLABELED`; a source without classes loses its 'label'.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> set(data.unlabeled(source).arrays["label"].tolist())
  {-1}
  """
  source = _as_examples("unlabeled", source)
  if source.classes is None:
    arrays = {name: values for name, values in source.arrays.items() if name != "label"}
    return dataclasses.replace(source, arrays=arrays)
  return _with_labels(source, np.full_like(_class_numbers(source, "unlabeled"), UNLABELED))


def leave_out_classes(source: Source, classes: Collection[int]) -> Source:
  """Removes the examples of some classes from training (Hinton et al. 2015, section 3).

  The number of classes stays, so that the teacher still has outputs for those left out.

  Args:
    source: examples with class numbers [N] as labels.
    classes: the class numbers to leave out.

  Raises:
    ValueError: the source has no classes, a class does not exist, nothing is left, or there are
      examples without a label (they may belong to these classes: leave classes out first, then
      remove labels).

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> len(data.leave_out_classes(source, {1}))
  5
  """
  source = _as_examples("leave_out_classes", source)
  label = _class_numbers(source, "leave_out_classes")
  if label.ndim > 1:
    raise ValueError(
      f"label: expected one class number per example for leave_out_classes, got "
      f"{list(label.shape)}: set the pixels of these classes to -1"
    )
  _check_collection(classes)
  num_classes = source.classes or 0
  unknown = sorted(c for c in classes if not 0 <= c < num_classes)
  if unknown:
    raise ValueError(
      f"classes: expected classes of {source.name}, 0 to {num_classes - 1}, got {unknown[0]}"
    )
  if classes and (label == UNLABELED).any():
    raise ValueError(
      f"label: expected one for all examples of {source.name}, got {(label == UNLABELED).sum()} "
      f"without, which may belong to classes {sorted(classes)}: leave classes out before removing "
      "labels"
    )
  remaining = ~np.isin(label, list(classes))
  if not remaining.any():
    raise ValueError(
      f"classes: expected some to remain in {source.name}, got {sorted(classes)}, which are all"
    )
  return source.take(remaining)


def hash_ids(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
  """Returns a number in [0, 1) per id, float64 [N]; those of two purposes are independent."""
  check_seed(seed)
  digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
  offset = np.uint64(int.from_bytes(digest, "little"))
  x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + offset
  # The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words.
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def stratified_mask(
  label: np.ndarray, ranks: np.ndarray, fraction: float, *, leave_one: bool = False
) -> np.ndarray:
  """Returns a bool mask [N] of the lowest-ranked `fraction` of each class, at least one.

  With `leave_one` at least one of each class is not in it, which comes first.
  """
  mask = np.zeros(len(label), bool)
  for c in np.unique(label):
    rows = np.flatnonzero(label == c)
    rows = rows[np.argsort(ranks[rows], kind="stable")]
    count = max(1, round(fraction * len(rows)))
    mask[rows[: min(count, len(rows) - leave_one)]] = True
  return mask


def _stratified_groups(
  strata: np.ndarray, groups: np.ndarray, ranks: np.ndarray, fraction: float
) -> np.ndarray:
  """Returns a bool mask [N] of whole groups that hold about `fraction` of each class.

  Greedy, as scikit-learn's StratifiedGroupKFold: groups that differ most in their classes come
  first, and each is held out where the squared error of the classes' fractions is less then.
  """
  _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  _, class_of = np.unique(strata, return_inverse=True)
  counts = np.zeros((len(sizes), class_of.max() + 1))
  np.add.at(counts, (group_of, class_of), 1)
  group_ranks = np.zeros(len(sizes))
  group_ranks[group_of] = ranks
  counts /= counts.sum(0)
  left = (counts > 0).sum(0)  # Groups with examples of a class that are not held out.
  held_out = np.zeros(len(sizes), bool)
  missing = np.zeros(len(left))  # What is to be held out of the groups up to here.
  for group in np.lexsort((group_ranks, -counts.std(1))):
    missing += fraction * counts[group]
    is_last = (counts[group] > 0) & (left == 1)
    is_nearer = ((missing - counts[group]) ** 2).sum() < (missing**2).sum()
    if is_nearer and not is_last.any():
      held_out[group] = True
      left -= counts[group] > 0
      missing -= counts[group]
  return held_out[group_of]


def _as_examples(function: str, examples: Any) -> Any:
  """Returns a dict of arrays as a `Source`; a `Source`, and what `split` can take, as they are."""
  if isinstance(examples, Source) or (function == "split" and isinstance(examples, Streamed)):
    return examples
  if isinstance(examples, Mapping):
    return Source(to_batch(examples))
  hint = f'write data.{function}({{"image": images, "label": labels}}, ...)'
  if hasattr(examples, "load"):
    hint = f"write data.{function}(examples.load(), ...)"
  raise ValueError(
    f"source: expected a Source or a dict of arrays, got {type(examples).__name__}: {hint}"
  )


def _check_collection(classes: Any) -> None:
  """Checks that `classes` is a collection of class numbers."""
  if isinstance(classes, int | np.integer):
    raise ValueError(f"classes: expected several class numbers, got {classes}: write [{classes}]")
  names = [] if isinstance(classes, str) else list(classes)
  others = [c for c in names if not isinstance(c, int | np.integer)]
  if isinstance(classes, str) or others:
    name = classes if isinstance(classes, str) else others[0]
    raise ValueError(
      f"classes: expected class numbers, got {name!r}: write "
      f"[source.class_names.index({str(name)!r})]"
    )


def _integers(source: Source | Streamed, argument: str, name: str) -> np.ndarray:
  """Returns the entry that an argument of `split` names."""
  if isinstance(source, Source | Videos):
    return source.integers(argument, name)
  raise ValueError(
    f"{argument}: expected None for Images, whose entries are read with each image, got {name!r}: "
    "split images.load(size=...), or drop it"
  )


def _class_numbers(source: Source, function: str) -> np.ndarray:
  """Returns the labels of a source, class numbers."""
  if source.classes is None:
    raise ValueError(
      f"classes: expected a number for {function}, got None in {source.name}: give Source classes="
    )
  check_no_boxes(source.arrays, function)
  label = source.arrays["label"]
  if not np.issubdtype(label.dtype, np.integer):
    raise ValueError(
      f"label: expected class numbers for {function}, got {label.dtype} {list(label.shape)}: write "
      "label.argmax(-1), or (label > 0.5) of one probability"
    )
  return label


def _with_labels(source: Source, label: np.ndarray) -> Source:
  arrays = {**source.arrays, "label": label}
  return dataclasses.replace(source, arrays=arrays, ignore_label=UNLABELED)
