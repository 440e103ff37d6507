"""Clock and timings.jsonl, told by a clock on the wall that the test turns."""

import time
import types

import jax
import numpy as np
import pytest

from distill_jax.storage import sealed_json
from distill_jax.train import clock as module
from distill_jax.train.clock import Clock, device_memory
from distill_jax.train.log import Log


class Wall:
  """Seconds that pass when they are told to."""

  def __init__(self):
    self.now = 1000.0

  def time(self):
    return self.now

  def perf_counter(self):
    return self.now - 900

  def passes(self, seconds):
    self.now += seconds


@pytest.fixture
def wall(monkeypatch):
  wall = Wall()
  monkeypatch.setattr(module, "time", wall)
  return wall


def step(clock, wall, seconds, *, data=0.0):
  with clock.waiting("data"):
    wall.passes(data)
  wall.passes(seconds - data)
  clock.stepped()


def test_goodput_leaves_out_start_evaluation_and_checkpoints(wall):
  clock = Clock(began=wall.now)
  wall.passes(3)
  step(clock, wall, 7)  # compiled meanwhile
  for _ in range(4):
    step(clock, wall, 1)
  first = clock.report(5)
  for name, seconds in (("evaluation", 5), ("checkpoint", 2), ("checkpoint", 1)):
    with clock.waiting(name):
      wall.passes(seconds)
  for _ in range(10):
    step(clock, wall, 0.5)
  second = clock.report(15)
  assert (first["wall"], first["in_steps"], first["goodput"]) == pytest.approx((14, 4, 4 / 14))
  assert first["waited"] == {"start": 10}
  assert (second["wall"], second["in_steps"], second["goodput"]) == pytest.approx((27, 9, 1 / 3))
  assert second["waited"] == {"evaluation": 5, "checkpoint": 3}


def test_device_wait_is_spread_over_the_steps(wall, rng):
  clock = Clock()
  step(clock, wall, 30)
  host = rng.uniform(0, 0.1, 200)
  for seconds in host:
    step(clock, wall, seconds, data=seconds / 2)
  with clock.waiting("device"):
    wall.passes(4)
  line = clock.report(201)
  expected = np.sort(1e3 * (host + 4 / 200))
  for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
    place = q * 199
    low = int(place)
    value = expected[low] + (place - low) * (expected[low + 1] - expected[low])
    assert line["step_ms"][name] == pytest.approx(value)
  assert line["in_steps"] == pytest.approx(host.sum() + 4)
  assert line["waited"] == pytest.approx({"start": 30, "data": host.sum() / 2, "device": 4})


def test_a_late_batch_stands_out(wall):
  clock = Clock()
  step(clock, wall, 1)
  for number in range(100):
    step(clock, wall, 0.01, data=0.002)
    if number == 50:
      step(clock, wall, 5, data=4.9)
  line = clock.report(102)
  assert line["step_ms"] == pytest.approx({"mean": 6000 / 101, "p50": 10, "p90": 10, "p99": 10})
  assert line["in_steps"] == pytest.approx(6)
  assert line["waited"]["data"] == pytest.approx(5.1)


def test_each_report_has_its_own(wall):
  clock = Clock()
  step(clock, wall, 1)
  step(clock, wall, 2, data=1)
  assert clock.report(2)["step_ms"] == {"mean": 2000, "p50": 2000, "p90": 2000, "p99": 2000}
  step(clock, wall, 4)
  line = clock.report(3)
  assert line["step_ms"]["p99"] == 4000 and line["waited"] == {} and line["in_steps"] == 6


def test_a_report_before_the_second_step_has_no_times(wall):
  clock = Clock()
  wall.passes(1)
  assert "step_ms" not in clock.report(0)
  step(clock, wall, 2)
  line = clock.report(1)
  assert "step_ms" not in line and line["in_steps"] == 0 and line["waited"] == {"start": 3}


def log(folder, start=0, **kwargs):
  return Log(folder, start=start, steps=100, title="", progress=False, **kwargs)


def timings(folder):
  return sealed_json.read_lines(folder / "timings.jsonl")


def test_goodput_spans_restarts_and_excludes_lost_steps(wall, tmp_path):
  metrics = {"loss": (1.0, 1.0)}
  with log(tmp_path) as first:
    for number in range(1, 31):
      step(first.clock, wall, 1)
      if number % 10 == 0:
        first.train(number, metrics, 8)
  assert [line["step"] for line in timings(tmp_path)] == [0, 10, 20, 30]
  wall.passes(100)  # nobody was there
  with log(
    tmp_path, start=20, began=wall.now - 4
  ) as second:  # the checkpoint of step 30 was not whole
    for _ in range(21, 31):
      step(second.clock, wall, 1)
    second.train(30, metrics, 8)
  lines = timings(tmp_path)
  assert [(line["step"], line["starts"]) for line in lines] == [
    (0, 1),
    (10, 1),
    (20, 1),
    (20, 2),
    (30, 2),
  ]
  assert lines[-1]["wall"] == pytest.approx(30 + 100 + 10)
  assert lines[-1]["in_steps"] == pytest.approx(19 + 9)  # each start's first step is compiled
  assert lines[-1]["goodput"] == pytest.approx(28 / 140)
  assert lines[-1]["waited"] == {"start": 5}


def test_time_before_the_first_checkpoint_counts(wall, tmp_path):
  log(tmp_path).__exit__()
  wall.passes(50)
  with log(tmp_path) as second:
    step(second.clock, wall, 1)
    step(second.clock, wall, 1)
    second.train(2, {"loss": (1.0, 1.0)}, 8)
  assert [line["wall"] for line in timings(tmp_path)] == pytest.approx([0, 50, 52])
  assert timings(tmp_path)[-1]["starts"] == 2


def test_a_line_that_was_cut_off_is_dropped(wall, tmp_path):
  with log(tmp_path) as first:
    first.train(10, {"loss": (1.0, 1.0)}, 8)
  with (tmp_path / "timings.jsonl").open("a") as file:
    file.write('{"step": 10, "ti')
  log(tmp_path, start=10).__exit__()
  assert [line["step"] for line in timings(tmp_path)] == [0, 10, 10]


def test_speed_is_that_of_steps(wall, tmp_path):
  with log(tmp_path) as one:
    wall.passes(50)
    step(one.clock, wall, 100)  # compiled meanwhile
    one.train(1, {"loss": (2.0, 4.0)}, 8)
    for _ in range(4):
      step(one.clock, wall, 2, data=1)
      with one.clock.waiting("checkpoint"):
        wall.passes(30)
    one.train(5, {"loss": (2.0, 4.0)}, 8)
    with one.clock.waiting("evaluation"):
      wall.passes(70)
    one.validation(5, {"nll": 0.5})
    step(one.clock, wall, 4)
    one.train(6, {"loss": (2.0, 4.0)}, 8)
  assert one.history == [
    {"step": 1, "phase": "train", "loss": 0.5},
    {"step": 5, "phase": "train", "loss": 0.5, "examples_per_second": 4.0},
    {"step": 5, "phase": "validation", "nll": 0.5},
    {"step": 6, "phase": "train", "loss": 0.5, "examples_per_second": 2.0},
  ]


def test_tensorboard_shows_the_times(wall, tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(
    "tensorboardX.SummaryWriter.add_scalar",
    lambda self, name, value, step: shown.update({name: value}),
  )
  monkeypatch.setattr(module, "device_memory", lambda: {"peak": 7})
  with log(tmp_path) as one:
    step(one.clock, wall, 1)
    step(one.clock, wall, 2, data=1)
    one.train(2, {"loss": (1.0, 1.0)}, 8)
  assert shown["time/goodput"] == pytest.approx(2 / 3)
  assert (shown["time/step_ms_p90"], shown["time/waited_data"], shown["time/memory_peak"]) == (
    2000,
    1,
    7,
  )


def test_memory_is_that_of_the_fullest_device(monkeypatch):
  assert device_memory() == {}  # a CPU tells nothing
  told = [
    {"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 10},
    {"bytes_in_use": 7, "peak_bytes_in_use": 8, "bytes_limit": 10},
    None,
  ]
  devices = [types.SimpleNamespace(memory_stats=lambda t=t: t) for t in told]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert device_memory() == {"in_use": 7, "peak": 8, "limit": 10}
  assert Clock().report(0)["memory"] == device_memory()


def test_a_real_clock_tells_seconds():
  clock = Clock(began=time.time())
  for _ in range(10):
    with clock.waiting("data"):
      time.sleep(0.001)
    clock.stepped()
    with clock.waiting("checkpoint"):
      time.sleep(0.001)
  line = clock.report(10)
  assert line["waited"]["data"] >= 0.01 and line["waited"]["checkpoint"] >= 0.01
  assert line["step_ms"]["p50"] >= 1 and 0.009 <= line["in_steps"] < line["wall"]
