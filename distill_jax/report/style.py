"""How pictures look: one color, line and marker per role and variant, and text that can be drawn.

They are the same in all pictures but those of `series`, where a curve is of several variants.
"""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from distill_jax.report.results import Group

_RC = {
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 10.5,
  "figure.titlesize": 11.5,
  "font.size": 9.5,
  "grid.color": "#e3e6ea",
  "legend.frameon": False,
}


class Look(NamedTuple):
  color: str
  line: Any  # matplotlib's name, or (offset, dashes)
  marker: str

  @property
  def points(self) -> dict[str, Any]:
    """Keywords of markers that no line joins."""
    return {"color": self.color, "marker": self.marker, "linestyle": "none"}


LOOKS = {  # of Okabe & Ito's palette, told apart by all kinds of color vision, and by dashes and markers
  "teacher": Look("#3d3d3d", ":", "s"),
  "baseline": Look("#d55e00", "--", "^"),
  "student": Look("#0072b2", "-", "o"),
}

_FURTHER = (  # distilled students after the first
  Look("#009e73", "-.", "D"),
  Look("#cc79a7", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
  Look("#e69f00", (0, (8, 2)), "P"),
  Look("#56b4e9", (0, (3, 1, 1, 1)), "X"),
)
STUDENTS = 1 + len(_FURTHER)  # that have looks of their own


def looks(groups: Sequence[Group]) -> dict[Group, Look]:
  """The look of each group of one run; the sixth distilled student looks like the second."""
  students = [group for group in groups if group.role == "student"]
  found = {group: LOOKS[group.role] for group in groups}
  return found | {group: _FURTHER[n % len(_FURTHER)] for n, group in enumerate(students[1:])}


def context():
  """Draw inside this: matplotlib's defaults with our changes, whatever the user's own settings are."""
  return matplotlib.style.context(["default", _RC])


def figure(width: float, height: float) -> Figure:
  """A figure in inches, unknown to pyplot: it needs no backend and goes with its last reference."""
  return Figure(figsize=(width, height), layout="constrained")


def to_png(picture: Figure) -> bytes:
  buffer = io.BytesIO()
  picture.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
  return buffer.getvalue()


def class_labels(names: Sequence[str], limit: int) -> list[str]:
  """Names that fit a picture: at most `limit` characters, all different, none that the font cannot draw.

  A longer name is cut; where cut names agree they begin with the class number. A name in a script that the
  font lacks becomes its number.
  """
  whole = [" ".join(str(name).split()) for name in names]
  labels = [name if len(name) <= limit else name[: limit - 1].rstrip() + "…" for name in whole]
  often = Counter(labels)
  labels = [
    label if often[label] == 1 else f"{number} {label[: limit - len(str(number)) - 2].rstrip('…')}…"
    for number, label in enumerate(labels)
  ]
  glyphs = get_font(findfont(FontProperties())).get_charmap()
  return [
    label if label and all(ord(character) in glyphs for character in label) else f"class {number}"
    for number, label in enumerate(labels)
  ]
