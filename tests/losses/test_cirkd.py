"""What enters the memory of `cirkd` from volumes, and which labels and arguments it rejects."""

import functools

import jax
import numpy as np
import pytest
from compiled_losses import quick_compilation
from jax.sharding import PartitionSpec

from distill_jax import losses

KEY = jax.random.key(0)
ROWS = 8  # The first two are valid, of most tests.
LABELS = np.array([[[0, 0, 0], [0, 1, 255]], [[1, 1, 255], [0, -1, 1]]] * 4)
WHERE = np.arange(ROWS) < 2
OPTIONS = {"ignore_label": 255, "samples": (3, 3), "pixels_per_class": 2}


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def maps():
  return np.random.default_rng(0).normal(size=(ROWS, 2, 3, 4)).astype(np.float32)


def run(teacher, labels, where, state, axis_name=None):
  """Returns value and next state of volumes [B, 1, 2, 3, 4]."""
  volumes = teacher[:, None]
  arrays = (abs(volumes), volumes, volumes, labels[:, None], KEY, state)
  value, state = losses.cirkd(*arrays, where=where, axis_name=axis_name, **OPTIONS)
  return value if axis_name is None else jax.lax.pmean(value, axis_name), state


@functools.cache
def step():
  """Returns `(labels, state, where) -> (value, state)` of maps with rows that are not finite."""
  teacher = np.where(WHERE[:, None, None, None], maps(), np.float32(np.nan))
  compiled = jax.jit(run)
  return lambda labels, state, where: compiled(teacher, labels, where, state)


def first_state():
  return jax.device_get(losses.cirkd_state(KEY, 3, 4, pixels=5, regions=2))


def test_memory_takes_pixels_and_means_of_each_class():
  before = first_state()
  value, after = jax.device_get(step()(LABELS, before, WHERE))
  assert np.isfinite(value) and value > 0
  directions = unit(maps())
  counts = {0: (2, 1), 1: (1, 2)}  # At most two pixels of each image.
  for c, (first, second) in counts.items():
    assert after.next_pixel[c] == 3 and after.next_region[c] == 0  # 2 in a ring of 2
    parts = after.pixels[c][:first], after.pixels[c][first : first + second]
    for pixels, x, y in zip(parts, directions, LABELS):
      distances = np.linalg.norm(pixels[:, None] - x[y == c], axis=-1)
      assert (distances.min(1) < 1e-6).all()
      assert len(set(distances.argmin(1))) == len(pixels), "a pixel entered twice"
    np.testing.assert_array_equal(after.pixels[c][3:], before.pixels[c][3:])
  for c in (0, 1):
    means = [unit(x[y == c].mean(0)) for x, y in zip(directions[:2], LABELS[:2])]
    np.testing.assert_allclose(after.regions[c], means, atol=1e-6)
  for x, y in zip(after, before):  # Class 2 is absent.
    np.testing.assert_array_equal(x[2], y[2])


def test_oldest_entries_are_replaced_first():
  _, first = step()(LABELS, first_state(), WHERE)
  _, second = jax.device_get(step()(LABELS, first, WHERE))
  assert second.next_pixel.tolist() == [1, 1, 0]  # 6 pixels in a ring of 5
  first = jax.device_get(first)
  np.testing.assert_array_equal(second.pixels[0][[3, 4, 0]], first.pixels[0][:3])
  np.testing.assert_array_equal(second.pixels[0][1:3], first.pixels[0][1:3])


def test_nothing_valid_changes_nothing():
  state = first_state()
  value, after = step()(LABELS, state, np.zeros(ROWS, bool))
  assert value == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), state)
  value, after = step()(np.full_like(LABELS, 255), state, WHERE)
  assert np.isfinite(value) and value > 0  # The relations among images need no labels.
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), state)


def test_label_that_is_no_class_is_nan_and_does_not_enter():
  labels = LABELS.copy()
  labels[1, 0, 0] = 3  # The other pixels of the row have a class.
  value, after = step()(labels, first_state(), WHERE)
  _, expected = step()(LABELS, first_state(), np.arange(ROWS) < 1)
  assert np.isnan(value)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((after, expected)))


def test_eight_devices_keep_the_memory_of_one(mesh):
  """Which pixels enter depends on the row's position in the batch of all devices."""
  where, row, everywhere = np.arange(ROWS) % 3 != 1, PartitionSpec("data"), PartitionSpec()
  mapped = jax.shard_map(
    functools.partial(run, axis_name="data"),
    mesh=mesh,
    in_specs=(row, row, row, everywhere),
    out_specs=(everywhere, everywhere),
  )
  with quick_compilation():
    results = jax.jit(mapped)(maps(), LABELS, where, first_state())
    expected = jax.jit(run)(maps(), LABELS, where, first_state())
  for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("student", {"teacher": np.ones((ROWS, 3, 2, 4))}),
    ("projected", {"projected": np.ones((ROWS, 2, 3, 5))}),
    ("labels", {"labels": LABELS.astype(float)}),
    ("labels", {"labels": LABELS[:2]}),
    ("state", {"state": losses.CirkdState(*np.ones((2, 3, 2, 5)), *np.ones((2, 3), int))}),
    ("samples", {"samples": (3,)}),
    ("samples", {"samples": (3, 0)}),
    ("pixels_per_class", {"pixels_per_class": 0}),
    ("temperature", {"temperature": 0.0}),
  ],
)
def test_argument_that_does_not_fit_raises(field, change):
  x = maps()
  arguments = {"student": x, "teacher": x, "projected": x, "labels": LABELS, "key": KEY}
  with pytest.raises(ValueError, match=f"^{field}: "):
    jax.eval_shape(lambda: losses.cirkd(**arguments | {"state": first_state()} | change))
  with pytest.raises(ValueError, match="^regions: "):
    losses.cirkd_state(KEY, 3, 4, regions=0)
