"""Records which of a student's weights came from where."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Origin(NamedTuple):
  """The source of one leaf of the student.

  Attributes:
    shape: shape of the student's leaf.
    source: path in the teacher; None: the leaf is not from the teacher.
    source_shape: shape of the teacher's leaf; None as for `source`.
    how: 'copied', 'sliced', 'factorized', ... by the name of the function; '' without a source.
  """

  shape: tuple[int, ...]
  source: str | None = None
  source_shape: tuple[int, ...] | None = None
  how: str = ""


Provenance = dict[str, Origin]
"""The origin of each leaf, by its path."""


def combine_origins(*steps: Mapping[str, Origin]) -> Provenance:
  """Returns the origins after several steps on the same student: the last source of each leaf."""
  origins: Provenance = {}
  for step in steps:
    origins |= {
      name: origin
      for name, origin in step.items()
      if name not in origins or origin.source is not None
    }
  return origins


def format_origins(origins: Mapping[str, Origin]) -> str:
  """Formats how many values came from the teacher, and a line for the origin of each leaf.

  >>> stem = Origin((2, 2), "stem/0", (4, 2), "sliced")
  >>> print(format_origins({"head": Origin((2, 3)), "stem": stem}))
  1 of 2 arrays and 4 of 10 values (40.0 %) come from the teacher
    head [2, 3]  not from the teacher
    stem [2, 2]  sliced from stem/0 [4, 2]
  """
  from_teacher = [origin for origin in origins.values() if origin.source is not None]
  values = sum(math.prod(origin.shape) for origin in from_teacher)
  total = sum(math.prod(origin.shape) for origin in origins.values())
  leaves = {f"{name} {list(origin.shape)}": origin for name, origin in origins.items()}
  width = max(map(len, leaves), default=0)
  lines = [
    f"{len(from_teacher)} of {len(origins)} arrays and {values:,} of {total:,} values "
    f"({100 * values / max(1, total):.1f} %) come from the teacher"
  ]
  for leaf, origin in leaves.items():
    source = "not from the teacher"
    if origin.source:
      source = f"{origin.how} from {origin.source} {list(origin.source_shape or ())}"
    lines.append(f"  {leaf:{width}}  {source}")
  return "\n".join(lines)
