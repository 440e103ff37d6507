"""Styles pictures: one color, line and marker per role and variant.

All pictures of a report use the same ones, except those of `series`, where a curve joins several
variants.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report.document import Picture
from distill_jax.report.entries import Group
from distill_jax.report.numbers import is_percent
from distill_jax.types import Metric

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
  """Color, line style (a name of matplotlib's, or (offset, dashes)) and marker of a group."""

  color: str
  line: Any
  marker: str

  @property
  def points(self) -> dict[str, Any]:
    """Returns keywords for markers without a line."""
    return {"color": self.color, "marker": self.marker, "linestyle": "none"}


# Okabe and Ito's palette: readers with any color vision can distinguish its colors. Dashes and
# markers differ as well.
LOOKS = {
  "teacher": Look("#3d3d3d", ":", "s"),
  "baseline": Look("#d55e00", "--", "^"),
  "student": Look("#0072b2", "-", "o"),
}
_FURTHER = (  # looks of distilled students after the first
  Look("#009e73", "-.", "D"),
  Look("#cc79a7", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
  Look("#e69f00", (0, (8, 2)), "P"),
  Look("#56b4e9", (0, (3, 1, 1, 1)), "X"),
)
STUDENTS = 1 + len(_FURTHER)  # distilled students with looks of their own
PAGE = 10.0  # inches: width of a page
PHONE = 4.4  # inches: width of a page on a phone, where panels are one under the other


def looks(groups: Sequence[Group]) -> dict[Group, Look]:
  """Returns the look of each group of a run; the sixth distilled student looks like the second."""
  students = [group for group in groups if group.role == "student"]
  result = {group: LOOKS[group.role] for group in groups}
  for index, group in enumerate(students[1:]):
    result[group] = _FURTHER[index % len(_FURTHER)]
  return result


def context() -> AbstractContextManager:
  """Returns a context with this module's style, whatever the user's own settings are."""
  return matplotlib.style.context(["default", _RC])


def figure(width: float, height: float) -> Figure:
  """Returns a figure in inches that needs no backend: pyplot neither knows nor keeps it."""
  return Figure(figsize=(width, height), layout="constrained")


def columns_of(panels: int, page: float) -> int:
  """Returns how many of a figure's panels stand side by side: all, or one on a phone."""
  return 1 if page < PAGE else panels


def legend(drawing: Figure, handles: Mapping[str, Any], columns: int = 3) -> None:
  """Draws a legend {text: artist} below a figure, in fewer columns where it is narrow."""
  columns = min(columns, 1 + int(drawing.get_figwidth() // PHONE))
  artists = list(handles.values())
  drawing.legend(artists, list(handles), loc="outside lower center", ncols=columns)


def pictures(
  name: str, title: str, caption: str, draw: Callable[[float], Figure | None]
) -> list[Picture]:
  """Returns a figure as one block of a document, in the file `name`.png; none without a figure.

  Args:
    name: name of the file, without suffix.
    title: text in place of the picture.
    caption: text below it.
    draw: maps a page's width in inches, `PAGE` or `PHONE`, to a figure that is not wider.
  """
  wide, narrow = draw(PAGE), draw(PHONE)
  if wide is None or narrow is None:
    return []
  inches = wide.get_figwidth()
  return [Picture(f"{name}.png", title, caption, to_png(wide), inches, to_png(narrow))]


def to_png(drawing: Figure) -> bytes:
  """Returns the drawing as a PNG that does not name the software's version."""
  buffer = io.BytesIO()
  drawing.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
  return buffer.getvalue()


def limit_percent(axes: Axes, metric: Metric, highest: float) -> None:
  """Ends the y axis at 101 where scores are percentages and the `highest` is at most 1 (100 %)."""
  if is_percent(metric) and highest <= 1:
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))
