"""Puts the examples of each case together, and scores the whole volumes: Dice and HD95."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.tasks._class_maps import no_class
from distill_jax.tasks._surface_distance import hausdorff95
from distill_jax.types import Metric


@dataclasses.dataclass(frozen=True)
class Cases:
  """Which examples are parts of one case, such as a patient's volume.

      cases = tasks.Cases(position="slice", spacing=(3.0, 0.8, 0.8))
      task = tasks.segmentation(cases=cases, include_background=False)

  Attributes:
    entry: the batch's entry with the number of each example's case, int [B]. A run raises where
      a case is in training and evaluation: pass it to `data.split` as `groups`.
    position: the entry with the first voxel of each example in its case: int [B], the position of a
      slice [H, W] along the first axis; or int [B, axes], that of a patch of as many axes (or of
      one less: a part of a slice). None: each case is one example.
    spacing: the size of a voxel along each axis of the case, in mm: numbers, or the entry with
      them, float [B, axes]. None: distances are in voxels.

  Raises:
    ValueError: a spacing is not above 0.

  >>> from distill_jax import tasks
  >>> tasks.Cases("patient", position="slice").spacing is None
  True
  """

  entry: str = "case"
  position: str | None = None
  spacing: str | Sequence[float] | None = None

  def __post_init__(self):
    if self.spacing is not None and not isinstance(self.spacing, str):
      sizes = np.asarray(self.spacing, float)
      _check_spacing(sizes, sizes.size if sizes.ndim else 3)

  @property
  def references(self) -> tuple[str, ...]:
    """Returns the names of the batch's entries that are read."""
    names = (self.entry, self.position, self.spacing)
    return tuple(name for name in names if isinstance(name, str))

  @property
  def metrics(self) -> tuple[Metric, ...]:
    """Returns what is scored."""
    unit = "voxels" if self.spacing is None else "mm"
    return (
      Metric("case_dice", "mean Dice per case", "%", "max", ".2%", short="Dice per case"),
      Metric("hd95", "HD95 (95th percentile of border distances)", unit, "min", ".2f", "HD95"),
      Metric("unmatched", "regions in label or prediction only", "", "min", ".0f", detail=2),
    )


class _Volume(NamedTuple):
  """A case: class numbers of prediction and label, and the size of a voxel along each axis."""

  predicted: np.ndarray
  label: np.ndarray
  spacing: np.ndarray


class _Score(NamedTuple):
  """A class of a case that is in label or prediction; `is_matched`: in both."""

  dice: float
  distance: float
  is_matched: bool


def case_scores(
  predictions: Mapping[str, np.ndarray],
  references: Mapping[str, np.ndarray],
  cases: Cases,
  names: Sequence[str],
  include_background: bool,
) -> dict[str, float]:
  """Returns the scores over all cases.

  Args:
    predictions: compact maps 'class' and 'label' [N, ...].
    references: the entries of `cases.references`.
    cases: which examples belong together.
    names: of the classes; empty: their numbers.
    include_background: whether class 0 is part of the means.

  Raises:
    ValueError: parts of a case are missing, overlap with other labels, or have no position.
  """
  maps, labels = predictions["class"], predictions["label"]
  names = names or [str(number) for number in range(_num_classes(maps, labels))]
  scores: dict[str, list[_Score]] = {name: [] for name in names}
  has_nan = bool(((maps == no_class(maps)) & (labels != no_class(labels))).any())
  for volume in _volumes(maps, labels, references, cases):
    for number, name in enumerate(names):
      score = _score(volume, number)
      if score is not None:
        scores[name].append(score)
  by_class = {name: found for name, found in scores.items() if found}
  counted = [name for name in by_class if include_background or name != names[0]]
  dice = {name: float(np.mean([x.dice for x in found])) for name, found in by_class.items()}
  hd95 = {name: float(np.mean([x.distance for x in found])) for name, found in by_class.items()}
  result = {f"case_dice/{name}": value for name, value in dice.items()}
  result |= {f"hd95/{name}": value for name, value in hd95.items()}
  if counted:
    result["case_dice"] = float(np.mean([dice[name] for name in counted]))
    result["hd95"] = float(np.mean([hd95[name] for name in counted]))
    result["unmatched"] = float(sum(not x.is_matched for name in counted for x in by_class[name]))
  return dict.fromkeys(result, np.nan) if has_nan else result


def _num_classes(*maps: np.ndarray) -> int:
  """Returns the largest class number of compact maps plus 1."""
  return 1 + max(int(x.max(initial=0, where=x != no_class(x))) for x in maps)


def _score(volume: _Volume, number: int) -> _Score | None:
  counted = volume.label != no_class(volume.label)
  predicted, true = (counted & (x == number) for x in (volume.predicted, volume.label))
  size = int(predicted.sum() + true.sum())
  if not size:
    return None
  if not predicted.any() or not true.any():
    return _Score(0.0, float(np.linalg.norm(volume.spacing * true.shape)), False)
  dice = 2 * int((predicted & true).sum()) / size
  return _Score(dice, hausdorff95(predicted, true, volume.spacing), True)


def _volumes(
  maps: np.ndarray, labels: np.ndarray, references: Mapping[str, np.ndarray], cases: Cases
) -> Iterator[_Volume]:
  numbers = np.asarray(references[cases.entry])
  if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
    raise ValueError(
      f"{cases.entry}: expected the number of each example's case, integers [{len(maps)}], got "
      f"{numbers.dtype} {list(numbers.shape)}: number them, np.unique(names, return_inverse=True)"
    )
  for number in np.unique(numbers):
    rows = np.flatnonzero(numbers == number)
    title = f"case {number}"
    starts = _starts(title, rows, references, cases, maps.ndim - 1)
    parts = maps[rows], labels[rows]
    if starts.shape[1] == maps.ndim:  # Parts of slices are thin parts of the volume.
      parts = parts[0][:, None], parts[1][:, None]
    predicted, label = _joined(title, *parts, starts, cases.position or "")
    yield _Volume(predicted, label, _spacing(title, rows, references, cases, label.ndim))


def _starts(
  title: str,
  rows: np.ndarray,
  references: Mapping[str, np.ndarray],
  cases: Cases,
  axes: int,
) -> np.ndarray:
  """Returns the first voxel of each part, int [parts, axes of the case], from 0 on."""
  if cases.position is None:
    if len(rows) > 1:
      raise ValueError(
        f"position: expected the entry with the position of each slice or patch, got None where "
        f"{title} has {len(rows)} examples: pass Cases(position=), or give each its own case"
      )
    return np.zeros((1, axes), int)
  starts = np.asarray(references[cases.position])
  starts = starts.reshape(len(starts), -1)
  if starts.shape[1] == 1 and axes == 2:
    starts = np.pad(starts, ((0, 0), (0, 2)))
  is_integer = np.issubdtype(starts.dtype, np.integer)
  # No case has four axes: one number for each patch of a volume is not where it lies.
  if not is_integer or starts.shape[1] not in ((axes, axes + 1) if axes < 3 else (axes,)):
    slices = f"[{len(starts)}] or [{len(starts)}, 3] for slices, or " if axes == 2 else ""
    raise ValueError(
      f"{cases.position}: expected integers, {slices}[{len(starts)}, {axes}] for label maps of "
      f"{axes} axes, got {starts.dtype} {list(np.shape(references[cases.position]))}: give the "
      "index of each example's first voxel"
    )
  starts = starts[rows].astype(np.int64)
  unique, counts = np.unique(starts, axis=0, return_counts=True)
  if (counts > 1).any():
    raise ValueError(
      f"{cases.position}: expected another position for each example of {title}, got "
      f"{unique[counts.argmax()].tolist()} {counts.max()} times: evaluate each part once"
    )
  return starts - starts.min(0)


def _joined(
  title: str, maps: np.ndarray, labels: np.ndarray, starts: np.ndarray, position: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the case's prediction and label; where parts overlap, the one of the highest position
  counts.
  """
  shape = (starts + maps.shape[1:]).max(0)
  voxels = int(np.prod(shape))
  covered = np.zeros(shape if voxels <= maps.size else 0, bool)
  predicted, label = (np.full(covered.shape, no_class(x), x.dtype) for x in (maps, labels))
  for row in np.lexsort(starts.T[::-1]) if covered.size else ():
    box = tuple(slice(a, a + n) for a, n in zip(starts[row], maps.shape[1:]))
    labeled = labels[row] != no_class(labels)
    both = labeled & (label[box] != no_class(label))
    if (label[box] != labels[row])[both].any():
      raise ValueError(
        f"{position}: expected equal labels where examples of {title} overlap, got other ones at "
        f"{starts[row].tolist()}: give the index of each example's first voxel"
      )
    predicted[box][labeled] = maps[row][labeled]
    label[box][labeled] = labels[row][labeled]
    covered[box] = True
  if not covered.size or not covered.all():
    raise ValueError(
      f"{position}: expected the examples of {title} to cover it without gaps, got parts of "
      f"{list(maps.shape[1:])} in a volume of {shape.tolist()}: evaluate all of them, and number "
      "slices 0, 1, 2, ..."
    )
  return predicted, label


def _spacing(
  title: str, rows: np.ndarray, references: Mapping[str, np.ndarray], cases: Cases, axes: int
) -> np.ndarray:
  if cases.spacing is None:
    return np.ones(axes)
  if not isinstance(cases.spacing, str):
    return _check_spacing(np.asarray(cases.spacing, float), axes)
  values = np.asarray(references[cases.spacing], float)[rows].reshape(len(rows), -1)
  if (values != values[0]).any():
    raise ValueError(
      f"{cases.spacing}: expected one spacing for all examples of {title}, got "
      f"{np.unique(values, axis=0).tolist()}: give each its own case"
    )
  return _check_spacing(values[0], axes, cases.spacing)


def _check_spacing(values: np.ndarray, axes: int, name: str = "spacing") -> np.ndarray:
  if values.shape != (axes,) or not (np.isfinite(values) & (values > 0)).all():
    raise ValueError(
      f"{name}: expected {axes} sizes above 0, one per axis of a case, got {values.tolist()}: give "
      "the distance of slices first"
    )
  return values
