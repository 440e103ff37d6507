"""Numbers as a report writes them."""

from collections.abc import Callable

from distill_jax.report.results import Spread

Show = Callable[[float], str]
MISSING = "–"


def percent(value: float) -> str:
  """A share as per cent, without the sign."""
  return f"{100 * value:.2f}"


def nats(value: float) -> str:
  return f"{value:.4f}"


def whole(value: float) -> str:
  return f"{value:,.0f}"


def thousandths(value: float) -> str:
  return f"{value:.3f}"


def si_prefix(value: float) -> str:
  for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.3g} {prefix}"
  return f"{value:.3g} "


def signed(show: Show, value: float) -> str:
  return ("+" if value >= 0 else "−") + show(abs(value))


def mean(show: Show, spread: Spread | None) -> str:
  """Mean ± deviation; a dash where there is none."""
  return MISSING if spread is None else show(spread.mean) + _plus_minus(show, spread)


def difference(show: Show, spread: Spread | None) -> str:
  """As `mean`, with the sign of the mean."""
  return MISSING if spread is None else signed(show, spread.mean) + _plus_minus(show, spread)


def _plus_minus(show: Show, spread: Spread) -> str:
  return "" if spread.deviation is None else f" ± {show(spread.deviation)}"
