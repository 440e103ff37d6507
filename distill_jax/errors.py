"""Wording that error messages share."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[object]) -> str:
  """The tail of a message about an unknown name: the nearest known one, or all of them."""
  names = sorted(map(str, known))
  near = difflib.get_close_matches(name, names, n=1)
  return f"; did you mean {near[0]!r}?" if near else f"; there are {names}"
