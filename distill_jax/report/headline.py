"""The one score that says how good the networks of a report are."""

from collections.abc import Sequence
from typing import NamedTuple

from distill_jax.report.numbers import Show, percent, thousandths
from distill_jax.report.results import Measured


class Headline(NamedTuple):
  """The score that says how good a network is: its name in `scores`, in words, how it is written, in which unit, and
  whether more is better."""

  score: str
  name: str
  show: Show
  unit: str
  more: bool

  @property
  def title(self) -> str:
    """For the head of a column."""
    return f"Test {self.name}{', %' if self.score == 'accuracy' else ''}"

  @property
  def arrow(self) -> str:
    return "↑" if self.more else "↓"

  @property
  def axis(self) -> tuple[str, int]:
    """A picture's label, and the factor of the values."""
    return (f"{self.name}, %", 100) if self.score == "accuracy" else (self.name, 1)


ACCURACY = Headline("accuracy", "accuracy", percent, "points", True)
PERPLEXITY = Headline("perplexity", "perplexity", thousandths, "", False)


def headline(measured: Sequence[Measured]) -> Headline:
  """Perplexity where a network has one, else accuracy."""
  return PERPLEXITY if any("perplexity" in m.scores for m in measured) else ACCURACY
