"""The config of the digits with networks that compile in no time: for tests of what is done
with any networks.
"""

from pathlib import Path

_VGG = "VGG(1, 11, 10, width=self.teacher_width, rngs=rngs)"


def write(folder, *others):
  """Writes folder/quick_digits.py, whose teacher has 64 * teacher_width hidden units; others are
  configs that then build on it."""
  text = Path("configs/digits.py").read_text()
  assert text.count(_VGG) == 1
  perceptron = "MLP(64, (round(64 * self.teacher_width),), 10, rngs=rngs)"
  (folder / "quick_digits.py").write_text(text.replace(_VGG, perceptron))
  for name in others:
    text = Path("configs", name).read_text()
    assert text.count("from digits import") == 1
    (folder / name).write_text(text.replace("from digits import", "from quick_digits import"))
  return folder / "quick_digits.py"
