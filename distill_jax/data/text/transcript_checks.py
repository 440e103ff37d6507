"""Checks rows of recordings or pictures of lines that were made elsewhere."""

from collections.abc import Mapping

import numpy as np

from distill_jax.data.checks import example_name
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.text import frame_rows


def check_transcripts(arrays: Mapping[str, np.ndarray], *, blank: int = 0) -> None:
  """Checks rows for CTC networks, such as those of `speech_source` and `line_source`.

  Args:
    arrays: has 'features' [N, T, F] and 'frames' [N], or 'image' [N, H, W, C] and 'widths' [N];
      'label' int [N, U]; and maybe 'id', which errors name then.
    blank: class of the blank. A label ends in `UNLABELED` or blanks.

  Raises:
    ValueError: an entry is missing or of another shape, a number of frames or columns is negative
      or larger than there are, or a label has classes behind its padding.

  >>> from distill_jax.data import text
  >>> rows = {"features": np.zeros((1, 4, 2)), "frames": np.array([3])}
  >>> text.check_transcripts({**rows, "label": np.array([[2, 1, -1]])})
  """
  counts = frame_rows.sizes(arrays)
  if counts is None or "label" not in arrays:
    raise ValueError(
      "label: expected 'features' and 'frames', or 'image' and 'widths', and 'label', got only "
      f"{sorted(arrays)}"
    )
  label = np.asarray(arrays["label"])
  if label.ndim != 2 or label.dtype.kind not in "iu" or len(label) != len(counts):
    raise ValueError(
      f"label: expected integers [{len(counts)}, U], got {label.dtype} {list(label.shape)}"
    )
  is_class = (label >= 0) & (label != blank)
  is_late = is_class[:, 1:] & ~is_class[:, :-1]
  is_other = label < UNLABELED
  invalid = is_late.any(1) | is_other.any(1)
  if invalid.any():
    row = int(invalid.argmax())
    raise ValueError(
      f"label: expected classes, then padding of {UNLABELED} or the blank {blank}, got "
      f"{label[row].tolist()} in {example_name(arrays.get('id'), row)}"
    )
