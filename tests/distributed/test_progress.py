"""What is written while a bar is shown can be read above it, whoever writes it, and whereto."""

import io
import logging
import sys
import warnings

from tqdm import tqdm

from distill_jax.distributed.progress import writing_above


class Terminal(io.StringIO):
  """A stream of a terminal.

  Attributes:
    lines: what a person sees: a carriage return goes back to the beginning of the line.
  """

  def isatty(self):
    return True

  @property
  def lines(self):
    lines = []
    for written in self.getvalue().split("\n"):
      line = ""
      for part in written.split("\r"):
        line = part + line[len(part) :]
      lines.append(line.rstrip())
    return lines


def show_bar():
  return tqdm(total=9, bar_format="{desc}: {n_fmt}/{total_fmt} of a long bar", desc="student")


def warn(text):
  """Writes as `warnings.warn` does, whose texts pytest takes for itself."""
  sys.stderr.write(warnings.formatwarning(text, RuntimeWarning, "callback.py", 3, line=""))


def test_lines_are_above_the_bar(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setattr(sys, "stderr", terminal)
  logger = logging.Logger("user")
  logger.addHandler(logging.StreamHandler())  # before the bar, as `logging.basicConfig` does
  with show_bar() as bar, writing_above(bar):
    bar.update(3)
    warn("look")
    logger.error("logged")
    print("printed", "by a callback", "on two\nlines")
    sys.stdout.write("by parts: ")
    bar.refresh()
    sys.stdout.write("done\nnever ended")
    shown = terminal.lines
  assert shown == [
    "callback.py:3: RuntimeWarning: look",
    "logged",
    "printed by a callback on two",
    "lines",
    "by parts: done",
    "student: 3/9 of a long bar",
  ]
  print("after the bar")
  assert terminal.lines[5:] == ["never ended", "student: 3/9 of a long bar", "after the bar", ""]


def test_a_file_gets_no_bar(monkeypatch):
  terminal, file = Terminal(), io.StringIO()
  monkeypatch.setattr(sys, "stdout", file)
  monkeypatch.setattr(sys, "stderr", terminal)
  with show_bar() as bar, writing_above(bar):
    print("printed")
    warn("look")
  assert file.getvalue() == "printed\n"
  assert terminal.lines[0] == "callback.py:3: RuntimeWarning: look"
