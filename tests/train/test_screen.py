"""What a person sees of a training at a terminal of some width, and in a file."""

import io
import re
import sys

import pytest
from tqdm import tqdm

from distill_jax.train import screen as screen_module
from distill_jax.train.screen import Screen

METRICS = {
  "loss": 3.1684,
  "accuracy": 0.58981,
  "learning_rate": 4.8127e-3,
  "examples_per_second": 12345.6,
}


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def terminal(monkeypatch):
  """A function that returns what a terminal of a number of columns gets."""

  def text(columns, title, steps=2000):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(screen_module, "tqdm", _of_width(columns))
    screen = Screen(title, 0, steps, main="accuracy", progress=True)
    screen.train(1400, METRICS)
    screen.validation(1400, {"loss": 1.5, "accuracy": 0.75})
    screen.close()
    return stream.getvalue()

  return text


def _of_width(columns):
  class Bar(tqdm):
    @property
    def format_dict(self):
      return super().format_dict | {"ncols": columns}

  return Bar


@pytest.mark.parametrize(
  "columns, title, shown",
  [
    (80, "student-0", ["loss 3.168", "accuracy 0.5898", "lr 0.00481"]),
    (80, "student-tail_bucket.16-0", ["loss 3.168", "accuracy 0.5898"]),
    (60, "student-0", ["loss 3.168"]),
    (160, "student-0", ["loss 3.168", "accuracy 0.5898", "lr 0.00481", "12,346 examples/s"]),
  ],
)
def test_bar_shows_whole_metrics_in_one_line(terminal, columns, title, shown):
  lines = re.split(r"[\r\n]+", terminal(columns, title))
  bar = next(line for line in lines if "loss 3" in line)
  assert len(bar) <= columns and "1400/2000" in bar
  assert bar[bar.index(", ") + 2 : bar.index("]")].split("  ") == shown


def test_evaluations_stay_on_the_screen(terminal):
  lines = re.split(r"[\r\n]+", terminal(80, "student-0"))
  line = "student-0 1400/2000  val loss 1.5  val accuracy 0.75"
  assert line in lines and len(line) <= 80


def test_file_has_training_and_validation_in_one_line(capsys):
  screen = Screen("student-0", 0, 2000, main="accuracy", progress=True)
  screen.train(1400, METRICS)
  screen.validation(1400, {"loss": 1.5, "accuracy": 0.75})
  output, error = capsys.readouterr()
  assert error == "" and output.count("\n") == 1
  for text in ("loss 3.168", "accuracy 0.5898", "lr 0.00481", "examples/s", "val accuracy 0.75"):
    assert text in output


def test_line_has_the_speed_since_the_last_line(capsys):
  screen = Screen("student-0", 100, 2000, main="accuracy", progress=True)
  for step, speed in ((110, 100.0), (140, 900.0), (150, 50.0)):
    screen.train(step, METRICS | {"examples_per_second": speed})
    if step != 110:
      screen.validation(step, {})
  first, second = capsys.readouterr().out.splitlines()
  assert "  300 examples/s" in first  # 40 steps: 10 of 100 and 30 of 900
  assert "  50 examples/s" in second


def test_nothing_is_shown_without_progress(capsys):
  screen = Screen("student-0", 0, 2000, main="accuracy", progress=False)
  screen.train(1400, METRICS)
  screen.validation(1400, METRICS)
  screen.print("stopped")
  assert capsys.readouterr() == ("", "")
