"""The profiler: which steps a trace holds, and that one that was cut short is kept."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax.train.profile import Profile, parse_steps


@jax.jit
def train_step(x):
  return jnp.tanh(x @ x)


def traced(folder):
  """Numbers of the steps in each of the folder's traces."""
  files = sorted(folder.glob("profile/plugins/profile/*/*.xplane.pb"))
  return [numbers(jax.profiler.ProfileData.from_file(str(file))) for file in files]


def numbers(profile):
  found = (event for plane in profile.planes for line in plane.lines for event in line.events)
  return [dict(event.stats)["step_num"] for event in found if event.name == "train"]


def run(folder, steps, start=1, stop=8):
  x = jnp.ones((4, 4)) / 4
  with Profile(folder, steps) as profile:
    for number in range(start, stop):
      x = profile(number, train_step, x)
  return x


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path):
  x = run(tmp_path, range(3, 6))
  assert traced(tmp_path) == [[3, 4, 5]]
  assert (x == run(None, range(3, 6))).all()


def test_a_trace_is_written_after_its_last_step(tmp_path):
  with Profile(tmp_path, range(1, 3)) as profile:
    profile(1, train_step, jnp.ones((2, 2)))
    assert traced(tmp_path) == []
    profile(2, train_step, jnp.ones((2, 2)))
    assert traced(tmp_path) == [[1, 2]]


@pytest.mark.parametrize("folder, steps", [(True, None), (False, range(2, 3))])
def test_nothing_is_traced_unasked(tmp_path, folder, steps):
  run(tmp_path if folder else None, steps)
  assert not list(tmp_path.iterdir())


def test_steps_that_never_come_are_told(tmp_path):
  with pytest.warns(UserWarning, match="no step of range\\(20, 30\\) was traced"):
    run(tmp_path, range(20, 30))
  assert not (tmp_path / "profile").exists()


def test_a_run_that_goes_on_traces_what_is_left(tmp_path):
  run(tmp_path, range(3, 6), start=5)
  assert traced(tmp_path) == [[5]]


def test_the_last_step_and_errors_end_a_trace(tmp_path):
  run(tmp_path / "a", range(6, 100))
  assert traced(tmp_path / "a") == [[6, 7]]

  def fails(x):
    raise FloatingPointError

  with pytest.raises(FloatingPointError), Profile(tmp_path / "b", range(1, 9)) as profile:
    profile(1, train_step, jnp.ones((2, 2)))
    profile(2, fails, 0)
  assert 1 in traced(tmp_path / "b")[0]


def test_steps_are_read_from_the_command_line():
  assert parse_steps("100:110") == range(100, 110)


@pytest.mark.parametrize("text", ["", "5", "5:", "5:5", "7:5", "0:3", "-1:3", "1:x", "1:2:3"])
def test_what_holds_no_step_is_refused(text):
  with pytest.raises(ValueError, match=f"expected START:STOP .*got {text!r}"):
    parse_steps(text)
