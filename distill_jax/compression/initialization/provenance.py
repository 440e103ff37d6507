"""Which of a student's weights came from where."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Origin(NamedTuple):
  """Where a leaf of the student came from.

  Attributes:
    shape: of the student's leaf.
    source: path in the teacher; None: the student's own.
    source_shape: of the teacher's leaf; None: the student's own.
    how: 'copied', 'sliced', 'factorized', ... by the name of the function; '' for the student's own.
  """

  shape: tuple[int, ...]
  source: str | None = None
  source_shape: tuple[int, ...] | None = None
  how: str = ""


Provenance = dict[str, Origin]


def joined(*steps: Mapping[str, Origin]) -> Provenance:
  """The origins after several steps on the same student: of each leaf the last that came from the teacher."""
  found: Provenance = {}
  for step in steps:
    found |= {
      n: origin for n, origin in step.items() if n not in found or origin.source is not None
    }
  return found


def format_origins(origins: Mapping[str, Origin]) -> str:
  """Lines of text: how much came from the teacher, and for each leaf from where.

  >>> print(format_origins({"head": Origin((2, 3)), "stem": Origin((2, 2), "stem/0", (4, 2), "sliced")}))
  1 of 2 arrays and 4 of 10 numbers (40.0 %) come from the teacher
    head [2, 3]  its own
    stem [2, 2]  sliced from stem/0 [4, 2]
  """
  taken = [origin for origin in origins.values() if origin.source is not None]
  numbers, own = (sum(math.prod(o.shape) for o in found) for found in (taken, origins.values()))
  leaves = {f"{name} {list(origin.shape)}": origin for name, origin in origins.items()}
  width = max(map(len, leaves), default=0)
  lines = [
    f"{len(taken)} of {len(origins)} arrays and {numbers:,} of {own:,} numbers ({100 * numbers / max(1, own):.1f} %) "
    "come from the teacher"
  ]
  for leaf, origin in leaves.items():
    source = (
      f"{origin.how} from {origin.source} {list(origin.source_shape or ())}"
      if origin.source
      else "its own"
    )
    lines.append(f"  {leaf:{width}}  {source}")
  return "\n".join(lines)
