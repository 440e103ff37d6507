"""A run's folder while it is trained in: one trainer, who notices when it is no longer his."""

import json

import jax
import jax.numpy as jnp
import pytest

from distill_jax.storage.lease import NAME, LeaseError
from distill_jax.train.saver import Saver
from distill_jax.types import Skips, TrainState

BEST = ("accuracy", "max")


def make_state(step):
  zero = jnp.zeros((), jnp.int32)
  params = {"student": {"w": jnp.full(3, step, jnp.float32)}, "objective": {}}
  return TrainState(
    zero + step,
    jax.random.key(0),
    params,
    {"student": {}, "objective": {}},
    (),
    (),
    Skips(zero, zero, zero),
  )


def test_a_folder_is_trained_in_once_at_a_time(tmp_path):
  with Saver(tmp_path, BEST, {}) as saver:
    with pytest.raises(LeaseError, match="belongs to process"):
      Saver(tmp_path, BEST, {})
    with Saver(tmp_path / "student-0", BEST, {}):
      saver.save(make_state(1), {"accuracy": 0.5})
  with Saver(tmp_path, BEST, {}) as saver:
    assert int(saver.restore(make_state(0)).step) == 1
  assert not (tmp_path / NAME).exists()


def test_who_lost_the_folder_saves_nothing_more(tmp_path):
  with Saver(tmp_path, BEST, {}) as saver:
    saver.save(make_state(1), None)
    other = {
      "host": "b",
      "pid": 1,
      "since": "now",
      "kernel": None,
      "start": None,
      "token": "theirs",
    }
    (tmp_path / NAME).write_text(json.dumps(other))
    with pytest.raises(LeaseError, match="folder"):
      saver.save(make_state(2), None)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
  assert json.loads((tmp_path / NAME).read_text()) == other


@pytest.mark.parametrize("at, new", [("next_index", '"next_inde'), ("7", "9"), ("{", "[")])
def test_a_corrupt_position_in_the_data_is_not_used(tmp_path, at, new):
  with Saver(tmp_path, BEST, {}) as saver:
    saver.save(make_state(1), None, {"next_index": 7})
    assert saver.position(1) == {"next_index": 7}
    (file,) = tmp_path.glob("data_position_*")
    file.write_text(file.read_text().replace(at, new, 1))
    with pytest.warns(RuntimeWarning, match="data_position.*corrupt"):
      assert saver.position(1) is None


def test_a_folder_that_is_refused_is_given_back(tmp_path):
  with pytest.raises(ValueError, match="best"):
    Saver(tmp_path, ("accuracy", "maximum"), {})
  assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("direction, sign", [("max", 1.0), ("min", -1.0)])
def test_of_equal_scores_the_lower_loss_is_best_with_and_without_a_folder(
  tmp_path, direction, sign, in_folder
):
  scores = {1: (0.1, 0.1), 2: (0.9, 0.3), 3: (0.9, 0.2), 4: (0.9, 0.4), 5: (float("nan"), 0.1)}
  with Saver(tmp_path if in_folder else None, ("score", direction), {}) as saver:
    for step, (score, loss) in scores.items():
      saver.save(make_state(step), {"score": sign * score, "nll": loss})
    best, *_ = saver.best_variables(make_state(6))
  assert best.params["w"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("in_folder", [False, True])
def test_without_a_finite_score_the_last_weights_are_returned_with_a_warning(tmp_path, in_folder):
  with Saver(tmp_path if in_folder else None, BEST, {}) as saver:
    saver.save(make_state(1), {"accuracy": float("nan")})
    with pytest.warns(UserWarning, match="accuracy"):
      best, *_ = saver.best_variables(make_state(6))
  assert best.params["w"].tolist() == [6, 6, 6]
