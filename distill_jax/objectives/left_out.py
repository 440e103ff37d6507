"""Reports how much of a batch a term leaves out: metrics of the objective next to its terms."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

TOO_LONG = "too_long"
"""Transcripts that need more frames than there are; 'ctc/too_long' of a term 'ctc'."""
_NAMES = (TOO_LONG,)

Fractions = dict[str, tuple[jax.Array, jax.Array]]

_collected: ContextVar[Fractions | None] = ContextVar("_collected", default=None)
_prefix: ContextVar[str] = ContextVar("_prefix", default="")


@contextlib.contextmanager
def collect_left_out() -> Iterator[Fractions]:
  """Collects what terms report inside, as (flags, where) by name, while they are traced."""
  fractions: Fractions = {}
  token = _collected.set(fractions)
  try:
    yield fractions
  finally:
    _collected.reset(token)


@contextlib.contextmanager
def name_term(name: str) -> Iterator[None]:
  """Puts the term's name in front of what is reported inside."""
  token = _prefix.set(_prefix.get() + name + "/")
  try:
    yield
  finally:
    _prefix.reset(token)


def report_left_out(name: str, flags: jax.Array, where: jax.Array) -> None:
  """Adds a metric: the fraction of the rows of `where` [B] that are flagged, bool [B]."""
  fractions = _collected.get()
  if fractions is not None:
    fractions[_prefix.get() + name] = flags, where


def is_fraction(name: str) -> bool:
  """Returns whether a metric of an objective is what a term leaves out, not a term."""
  return name.endswith(tuple(f"/{end}" for end in _NAMES))
