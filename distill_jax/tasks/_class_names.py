"""Checks the names of classes, which are names of scores."""

from collections.abc import Sequence


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
  """Returns the names as text.

  Raises:
    ValueError: two classes have one name.
  """
  names = tuple(map(str, names))
  doubled = sorted({name for name in names if names.count(name) > 1})
  if doubled:
    raise ValueError(
      f"class_names: expected a different name for each class, got {doubled[0]!r} twice: rename one"
    )
  return names
