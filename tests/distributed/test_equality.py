"""Processes that were given different values learn which field, and who differs."""

import json

import numpy as np
import pytest
from jax.experimental import multihost_utils

from distill_jax.distributed import equality


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ({"x": "a" * 200, "y": 1}, {"x": "a" * 200, "y": 2}, (("y",), 1, 2)),
    ({"x": {"y": [1, 2]}}, {"x": {"y": [1, 3]}}, (("x", "y", "1"), 2, 3)),
    ({"x": 1}, {}, (("x",), 1, "nothing")),
    ({}, {"z": None}, (("z",), "nothing", None)),
    ([1], [1, 2], ((), [1], [1, 2])),
    (1, "1", ((), 1, "1")),
  ],
)
def test_first_difference_of_two_values(a, b, expected):
  assert equality.first_difference(a, b) == expected


def test_one_process_compares_nothing():
  equality.assert_equal("seed", 3)


@pytest.mark.parametrize(
  ("values", "field", "processes"),
  [
    ([0, 1], "run", "process 1:"),
    ([{"a": {"b": 1}, "c": 0}, {"a": {"b": 2}, "c": 1}], "run.a.b", "process 1:"),
    ([{"a": 0}, {"a": 0}, {"a": 1}, {"a": 2}, {"a": 1}], "run.a", "processes 2, 4:"),
    ([{"a": 0}, {}], "run.a", "process 1:"),
  ],
)
def test_inequality_names_field_and_processes(values, field, processes):
  text = equality.inequality("run", values)
  assert text.startswith(f"{field}: ") and processes in text


@pytest.mark.parametrize("length", [10, 100, 5000])
def test_texts_that_begin_alike_are_told_apart(length):
  first, second = "a" * length + "x" * 500, "a" * length + "y" * 500
  text = equality.inequality("run", [first, second])
  got, other = text.partition("got ")[2].split(" on process 0 and ")
  assert got != other.partition(" on process")[0] and len(text) < 400


def test_gathered_texts_of_other_lengths(monkeypatch):
  """Three processes, of which this is the first: their digests, lengths and texts are compared."""
  texts = [json.dumps(value).encode() for value in ({"s": "é"}, {"s": "é" * 300}, {"s": "é"})]

  def gather(x):
    if x.ndim == 0:
      return np.array([len(text) for text in texts], np.int32)
    if x.shape == (32,) and gather.calls == 0:
      gather.calls += 1
      return np.stack([x, x ^ 1, x])
    return np.stack([np.frombuffer(text.ljust(len(x), b"\0"), np.uint8) for text in texts])

  gather.calls = 0
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(equality.jax, "process_count", lambda: 3)
  with pytest.raises(ValueError, match=r"^run\.s: .*process 1:"):
    equality.assert_equal("run", {"s": "é"})
