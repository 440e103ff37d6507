"""Names classes in pictures."""

from collections import Counter
from collections.abc import Sequence

from matplotlib.font_manager import FontProperties, findfont, get_font


def names_or_numbers(class_names: Sequence[str], classes: int) -> list[str]:
  """Returns one name per class: `class_names`, or the numbers of the classes where it is empty.

  Raises:
    ValueError: there are names, but not one per class.
  """
  if not len(class_names):
    return [str(number) for number in range(classes)]
  if len(class_names) != classes:
    raise ValueError(f"class_names: expected {classes} names or none, got {len(class_names)}")
  return [str(name) for name in class_names]


def class_labels(names: Sequence[str], limit: int) -> list[str]:
  """Returns names that fit a picture: different ones, of at most `limit` characters.

  A longer name is cut; where cut names are equal they begin with the class number. A name with
  characters that the font lacks becomes its number.
  """
  full = [" ".join(str(name).split()) for name in names]
  labels = [name if len(name) <= limit else name[: limit - 1].rstrip() + "…" for name in full]
  counts = Counter(labels)
  labels = [
    label if counts[label] == 1 else _numbered(number, label, limit)
    for number, label in enumerate(labels)
  ]
  glyphs = get_font(findfont(FontProperties())).get_charmap()
  return [
    label if label and all(ord(character) in glyphs for character in label) else f"class {number}"
    for number, label in enumerate(labels)
  ]


def _numbered(number: int, label: str, limit: int) -> str:
  return f"{number} {label[: limit - len(str(number)) - 2].rstrip('…')}…"
