"""Suggests names in error messages."""

import difflib
from collections.abc import Iterable


def suggest(name: str, candidates: Iterable[object]) -> str:
  """Returns the end of a message about an unknown name: the nearest candidate, or all of them.

  >>> suggest("lable", ["label", "image"])
  "; did you mean 'label'?"
  """
  names = sorted(map(str, candidates))
  nearest = difflib.get_close_matches(name, names, n=1)
  return f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {names}"
