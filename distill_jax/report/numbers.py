"""Writes numbers as text: scores by their `Metric`, costs, spreads and differences."""

import dataclasses
from collections.abc import Callable

from distill_jax.report.entries import Spread
from distill_jax.types import Metric

Formatter = Callable[[float], str]
MISSING = "–"


def is_percent(metric: Metric) -> bool:
  """Returns whether the metric is written times 100."""
  return metric.format.endswith("%")


def format_value(metric: Metric, value: float) -> str:
  """Returns the value in the metric's format, without its unit: '91.25' for 0.9125 and '.2%'."""
  return format(value, metric.format).removesuffix("%").replace("-", "−")


def formatter(metric: Metric) -> Formatter:
  """Returns `format_value` of one metric."""
  return lambda value: format_value(metric, value)


def unit(metric: Metric) -> str:
  """Returns the unit of the metric's values; empty where there is none."""
  return "%" if is_percent(metric) else metric.unit


def difference_unit(metric: Metric) -> str:
  """Returns the unit of differences: 'points' for percentages."""
  return "points" if is_percent(metric) else metric.unit


def scale(metric: Metric) -> int:
  """Returns the factor between a value and its position on an axis: 100 for percentages, else 1."""
  return 100 if is_percent(metric) else 1


def axis_label(metric: Metric) -> str:
  """Returns the label of an axis: 'accuracy, %', 'perplexity'."""
  return ", ".join(filter(None, [metric.title, unit(metric)]))


def capitalized(title: str) -> str:
  """Returns the title as the start of a sentence; letters after the first keep their case."""
  return title[:1].upper() + title[1:]


def row_title(metric: Metric, *, first: bool) -> str:
  """Returns the title of a table's row: 'Test accuracy, % ↑' (`first`), 'Macro F1, % ↑'."""
  title = axis_label(metric)
  return f"{capitalized(f'test {title}' if first else title)} {arrow(metric)}"


def column_title(metric: Metric, *, first: bool) -> str:
  """Returns `row_title` with the metric's short title."""
  return row_title(dataclasses.replace(metric, title=metric.short or metric.title), first=first)


def arrow(metric: Metric) -> str:
  """Returns ↑ where higher is better, ↓ where lower is better."""
  return "↑" if metric.better == "max" else "↓"


def integer(value: float) -> str:
  """Returns the value rounded to an integer, with commas between thousands."""
  return f"{value:,.0f}"


def three_decimals(value: float) -> str:
  """Returns the value with three decimals."""
  return f"{value:.3f}"


def si_prefix(value: float) -> str:
  """Returns three significant digits and a prefix (k, M, G, T), for a unit to follow: '2.5 M'."""
  for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.3g} {prefix}"
  return f"{value:.3g} "


def signed(write: Formatter, value: float) -> str:
  """Returns the value with its sign."""
  return ("+" if value >= 0 else "−") + write(abs(value))


def mean(write: Formatter, spread: Spread | None) -> str:
  """Returns mean ± deviation; a dash for None."""
  return MISSING if spread is None else write(spread.mean) + _plus_minus(write, spread)


def difference(write: Formatter, spread: Spread | None) -> str:
  """Returns the signed mean and its interval, or ± deviation without one; a dash for None."""
  if spread is None:
    return MISSING
  if spread.interval is None:
    return signed(write, spread.mean) + _plus_minus(write, spread)
  return f"{signed(write, spread.mean)} ({limits(write, spread.interval)})"


def limits(write: Formatter, interval: tuple[float, float]) -> str:
  """Returns an interval of differences: '+0.61 to +1.25'."""
  low, high = (signed(write, limit) for limit in interval)
  return f"{low} to {high}"


def _plus_minus(write: Formatter, spread: Spread) -> str:
  return "" if spread.deviation is None else f" ± {write(spread.deviation)}"
