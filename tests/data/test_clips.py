"""Clips of videos: frames by (seed, id, view), fixed views for evaluation, and short videos."""

import itertools

import numpy as np
import pytest

from distill_jax.data.clips import random_clip, uniform_clips


def ramp(frames, height=5, width=7):
  """Returns a video whose channels are the numbers of frame, row and column."""
  return np.stack(np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij"), -1) * 1.0


def sampled(crop, video, n=300):
  """Returns (first frame, stride, top, left) of the clips of n ids."""
  clips = [crop(video, id, 3) for id in range(n)]
  return {
    tuple(map(int, (c[0, 0, 0, 0], c[1, 0, 0, 0] - c[0, 0, 0, 0], *c[0, 0, 0, 1:]))) for c in clips
  }


def test_clip_is_a_function_of_seed_id_and_view():
  video = ramp(30)
  crop = random_clip(4, seed=1, strides=(1, 2), size=3)
  clip = crop(video, 7, 2)
  assert clip.dtype == np.float32 and clip.shape == (4, 3, 3, 3)
  np.testing.assert_array_equal(clip, random_clip(4, seed=1, strides=(1, 2), size=3)(video, 7, 2))
  others = [crop(video, 8, 2), crop(video, 7, 3), random_clip(4, seed=2, size=3)(video, 7, 2)]
  assert all((other != clip).any() for other in others)


def test_all_frames_show_one_square_and_keep_their_distance():
  for id in range(20):
    clip = random_clip(4, seed=0, strides=(3,), size=3)(ramp(12), id, 0)
    assert set(np.diff(clip[:, 0, 0, 0])) == {3}
    np.testing.assert_array_equal(clip[..., 1:], np.broadcast_to(clip[:1, ..., 1:], (4, 3, 3, 2)))
    assert set(np.diff(clip[0, :, 0, 1])) == set(np.diff(clip[0, 0, :, 2])) == {1}


def test_every_clip_that_fits_is_sampled():
  starts = [(start, stride) for stride in (1, 2) for start in range(8 - 3 * stride)]
  corners = list(itertools.product(range(2), range(3)))
  expected = {(*clip, *corner) for clip, corner in itertools.product(starts, corners)}
  crop = random_clip(4, seed=0, strides=(1, 2), size=4)
  assert sampled(crop, ramp(8, 5, 6), 800) == expected


def test_stride_that_does_not_fit_is_not_sampled():
  clips = sampled(random_clip(4, seed=0, strides=(1, 5)), ramp(9))
  assert {stride for _, stride, *_ in clips} == {1}


def test_uniform_clips_reach_both_ends_and_all_thirds():
  views = uniform_clips(3, clips=5, crops=3, stride=2, size=5)(ramp(21), 0, 0)
  assert views.shape == (15, 3, 5, 5, 3)
  corners = [tuple(map(int, view[0, 0, 0])) for view in views]
  starts = np.linspace(0, 21 - 5, 5)
  assert corners == [(start, 0, left) for start in starts for left in (0, 1, 2)]
  tall = uniform_clips(3, clips=1, crops=3, size=5)(ramp(4, 9, 6), 0, 0)
  assert [tuple(map(int, view[0, 0, 0])) for view in tall] == [(0, top, 0) for top in (0, 2, 4)]
  np.testing.assert_array_equal(uniform_clips(3, clips=1)(ramp(9), 5, 1), ramp(9)[3:6])


def test_bytes_become_floats_of_0_to_1():
  video = np.array([[[[0]]], [[[51]]], [[[255]]]], np.uint8)
  clip = uniform_clips(3, clips=1)(video, 0, 0)
  np.testing.assert_array_equal(clip.ravel(), np.float32([0, 0.2, 1]))
  np.testing.assert_array_equal(random_clip(3, seed=0)(video / 255.0, 0, 0), clip)


def test_series_have_clips_too():
  series = np.arange(20.0).reshape(10, 2)
  assert random_clip(4, seed=0)(series, 0, 0).shape == (4, 2)
  np.testing.assert_array_equal(
    uniform_clips(4, clips=2)(series, 0, 0), [series[:4], series[6:].astype(np.float32)]
  )


@pytest.mark.parametrize("crop", [random_clip(5, seed=0), uniform_clips(5)])
def test_short_video_is_refused_with_its_id(crop):
  with pytest.raises(ValueError, match="length: .*id 31"):
    crop(ramp(4), 31, 0)


def test_short_video_is_looped_or_padded_when_asked():
  looped = random_clip(5, seed=0, short="loop")(ramp(2), 0, 0)
  np.testing.assert_array_equal(looped[:, 0, 0, 0], [0, 1, 0, 1, 0])
  padded = random_clip(5, seed=0, short="pad")(ramp(2), 0, 0)
  np.testing.assert_array_equal(padded["image_valid"], [True, True, False, False, False])
  np.testing.assert_array_equal(padded["image"][:2], ramp(2))
  assert not padded["image"][2:].any()
  views = uniform_clips(5, clips=2, stride=3, short="pad")(ramp(7), 0, 0)
  assert views["image"].shape == (2, 5, 5, 7, 3)
  np.testing.assert_array_equal(views["image_valid"], [[True, True, True, False, False]] * 2)
  assert uniform_clips(5, short="pad")(ramp(9), 0, 0)["image_valid"].all()


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda: random_clip(0, seed=0), "length"),
    (lambda: random_clip(2, seed=-1), "seed"),
    (lambda: random_clip(2, seed=0, strides=()), "strides"),
    (lambda: random_clip(2, seed=0, strides=(1, 0)), "strides"),
    (lambda: random_clip(2, seed=0, size=0), "size"),
    (lambda: random_clip(2, seed=0, short="cut"), "short"),
    (lambda: uniform_clips(2, clips=0), "clips"),
    (lambda: uniform_clips(2, crops=2, size=4), "crops"),
    (lambda: uniform_clips(2, crops=3), "crops"),
    (lambda: random_clip(2, seed=0, size=6)(ramp(3), 4, 0), "size: .*id 4"),
    (lambda: uniform_clips(2, size=3)(np.zeros((3, 2)), 4, 0), "size: .*id 4"),
  ],
)
def test_bad_argument_is_named(call, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    call()
