"""configs/digit_motion.py and configs/watch_activity.py: their data, and whole jobs on toy data."""

import io
import json
import pickle

import digit_motion
import numpy as np
import pytest
import watch_activity
from digit_motion import MOTIONS, SIDE, move_digits, render

from distill_jax import data
from distill_jax.data.videos import Videos
from distill_jax.jobs import cli
from distill_jax.jobs.config import ConfigError, Splits
from distill_jax.jobs.overrides import load_config

STEPS = [
  f"--config.{role}_training.{option}"
  for role in ("teacher", "student")
  for option in ("steps=2", "batch_size=8")
]


def backgrounds():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (100, 30, width), np.uint8) for width in (30, 40)]


def figures(n=8, first=0):
  image = np.zeros((n, 8, 8, 1), np.float32)
  image[:, 2:6, 3:5] = 1
  return data.Source(
    {"id": np.arange(first, first + n), "image": image, "label": np.arange(n) % 10}, 10
  )


@pytest.mark.parametrize("motion", MOTIONS)
def test_digit_moves_as_its_label_says(motion):
  """Compares the center and the area of what is drawn, frame after frame."""
  video = render(figures(1).arrays["image"][0, ..., 0], motion, 10, np.random.default_rng(1))
  assert video.shape == (10, SIDE, SIDE) and video.min() == 0 and 0.9 < video.max() <= 1
  area = video.sum((1, 2))
  rows, columns = ((video * grid).sum((1, 2)) / area for grid in np.mgrid[:SIDE, :SIDE])
  turning = np.diff(columns)[:-1] * np.diff(rows)[1:] - np.diff(rows)[:-1] * np.diff(columns)[1:]
  moves = {
    "left": -np.diff(columns),
    "right": np.diff(columns),
    "up": -np.diff(rows),
    "down": np.diff(rows),
    "clockwise": turning,
    "counterclockwise": -turning,
    "growing": np.diff(area),
    "shrinking": -np.diff(area),
  }
  assert (moves[motion] > 0.05).all()
  if motion in ("left", "right", "up", "down"):
    straight = {"left": rows, "right": rows}.get(motion, columns)
    assert np.ptp(straight) < 1e-4


def test_videos_are_of_their_digit_and_their_part_of_the_time():
  clips = [np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[:, None, None], (100, 30, 30))]
  videos = move_digits(figures(first=40), clips, (0.5, 0.8), copies=2)
  assert videos.ids.tolist() == list(range(80, 96))
  label = videos.examples.arrays["label"]
  assert np.bincount(label).tolist() == [2] * 8 and (label == videos.ids % 8).all()
  assert all(10 <= len(video) <= 16 for video in videos.frames)
  corners = [video[:, 0, 0, 0].astype(int) for video in videos.frames]  # of the background
  assert all((np.diff(x) == 1).all() and x[0] >= 50 and x[-1] < 80 for x in corners)
  assert len({x[0] for x in corners}) > 5
  again = move_digits(figures(n=2, first=43), clips, (0.5, 0.8), copies=2)
  np.testing.assert_array_equal(again.frames[0], videos.frames[6])


def change_data(monkeypatch, splits):
  """Lets configs read other data from now on."""
  load = cli.load_config

  def changed(*arguments):
    config = load(*arguments)
    monkeypatch.setattr(type(config), "data", lambda self: splits)
    return config

  monkeypatch.setattr(cli, "load_config", changed)


def scores(folder):
  results = json.loads((folder / "report" / "results.json").read_text())
  return {(e["role"], e.get("variant", "")): e["scores"]["accuracy"] for e in results["entries"]}


@pytest.mark.nightly
def test_motion_job_runs_from_its_cache(tmp_path, monkeypatch):
  digits = figures(16)
  parts = [digits.take(slice(0, 8)), digits.take(slice(8, 12)), digits.take(slice(12, 16))]
  change_data(monkeypatch, Splits(*(move_digits(p, backgrounds(), (0, 1), 2) for p in parts)))
  small = ["teacher_widths=(4,4,4)", "student_widths=(4,4,4)", "shift=0.25", "length=3", "size=8"]
  flags = [f"--config.{setting}" for setting in (*small, "devices=1")]
  cli.main(["--config=configs/digit_motion.py", *STEPS, *flags, f"--workdir={tmp_path}"])
  found = scores(tmp_path)
  assert {variant for role, variant in found if role == "student"} == set(digit_motion.METHODS)
  assert all(0 <= score <= 1 for score in found.values()) and len(found) == 6
  assert (tmp_path / "cache").exists()


def series(people=(1, 2, 3), lengths=(7, 9, 12)):
  rng = np.random.default_rng(0)
  label = np.arange(2 * len(people)) % 2
  person = np.repeat(people, 2)
  examples = data.Source({"label": label, "person": person}, 7, groups="person", name="toy")
  frames = [rng.normal(size=(n, 6)) + y for n, y in zip(np.repeat(lengths, 2), label)]
  return Videos(frames, examples)


def test_windows_are_those_of_their_recording():
  recordings = series()
  cut = watch_activity.windows(recordings, 4, 3, np.zeros(6), np.full(6, 2.0))
  assert cut.ids.tolist() == [0, 1, 1000, 1001, 2000, 2001, 3000, 3001, *range(4000, 4003)] + [
    *range(5000, 5003)
  ]
  for id, x, label, person in zip(cut.ids, *(cut.arrays[n] for n in ("x", "label", "person"))):
    row, start = id // 1000, 3 * (id % 1000)
    np.testing.assert_allclose(x, recordings.frames[row][start : start + 4] / 2, rtol=1e-6)
    assert (label, person) == (row % 2, row // 2 + 1)
  with pytest.raises(ValueError, match="length: .*id 0"):
    watch_activity.windows(recordings, 8, 3, 0, 1)


def test_person_on_both_sides_is_refused(tmp_path, monkeypatch):
  parts = [watch_activity.windows(series(p), 4, 2, 0, 1) for p in ((1, 2), (3, 4), (2, 5))]
  change_data(monkeypatch, Splits(*parts))
  with pytest.raises(ValueError, match="^test: .*'person'"):
    run_watch(tmp_path, "--dry_run")


@pytest.mark.nightly
def test_watch_job_compares_kd_and_hint(tmp_path, monkeypatch):
  parts = [watch_activity.windows(series(p), 4, 2, 0, 1) for p in ((1, 2, 3), (4, 5), (6, 7))]
  change_data(monkeypatch, Splits(*parts))
  run_watch(tmp_path)
  found = scores(tmp_path)
  assert {variant for role, variant in found if role == "student"} == {"kd", "hint"}


def run_watch(folder, *more):
  small = ["teacher_widths=(4,8)", "student_widths=(4,)", "window=4", "devices=1"]
  flags = [f"--config.{setting}" for setting in small]
  cli.main(["--config=configs/watch_activity.py", *STEPS, *flags, f"--workdir={folder}", *more])


def write_npy(path, values):
  """Writes an .npy file of one pickled object, as numpy does."""
  with path.open("wb") as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    file.write(values)
  return path


class Attack:
  def __reduce__(self):
    return print, ("code ran",)


def test_pickle_with_code_is_refused(tmp_path, capsys):
  path = write_npy(tmp_path / "bad.npy", pickle.dumps(Attack()))
  with pytest.raises(ValueError, match="^file: .*print"):
    watch_activity.read_arrays(path)
  assert "code ran" not in capsys.readouterr().out


def test_pickled_arrays_are_read(tmp_path):
  values = {"X": [np.arange(3.0)], "names": ["a"]}
  buffer = io.BytesIO()
  pickle.Pickler(buffer, protocol=2).dump(values)
  # Files of before numpy 2 name its modules otherwise.
  text = buffer.getvalue().replace(b"numpy._core", b"numpy.core")
  found = watch_activity.read_arrays(write_npy(tmp_path / "good.npy", text))
  np.testing.assert_array_equal(found["X"][0], values["X"][0])
  assert found["names"] == ["a"]


@pytest.mark.parametrize(
  "config, override, field",
  [
    ("digit_motion", "methods=kd,hnt", "methods"),
    ("digit_motion", "length=0", "length"),
    ("digit_motion", "temperature=0", "temperature"),
    ("watch_activity", "methods=crd", "methods"),
    ("watch_activity", "window=1", "window"),
    ("watch_activity", "hard_weight=2", "hard_weight"),
  ],
)
def test_bad_setting_is_named(config, override, field):
  with pytest.raises(ConfigError, match=field):
    load_config(f"configs/{config}.py", [override])


@pytest.mark.parametrize("module", [digit_motion, watch_activity])
def test_missing_package_is_named(module, monkeypatch):
  monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
  read = digit_motion.background if module is digit_motion else watch_activity.recordings
  with pytest.raises(ConfigError, match="pip install"):
    read()
