"""Tests features of sounds, masks and clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import teachers
from distill_jax.cache.identity import augmentation_identity
from distill_jax.data import audio
from distill_jax.models import from_apply

RATE = 8000


def tone(seconds=0.1, rate=RATE, hertz=440.0):
  return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def test_log_mel_equals_librosa():
  """Values of librosa 0.11."""
  features = audio.log_mel(ramp(), RATE, bands=20, normalize=False)
  assert features.shape == (11, 20)
  np.testing.assert_allclose(features[[0, 5, 10]][:, [0, 7, 19]], LIBROSA, atol=1e-4)


def test_whisper_log_mel_equals_transformers():
  features = audio.whisper_log_mel(ramp(), 16000)
  assert features.shape == (3000, 80)
  np.testing.assert_allclose(features[[0, 3, 9]][:, [0, 30, 79]], WHISPER, atol=1e-4)
  with pytest.raises(ValueError, match="rate"):
    audio.whisper_log_mel(ramp(), RATE)


def ramp():
  """Returns 800 samples of rising frequency."""
  time = np.arange(800) / 800
  return (0.5 * np.sin(300 * time**2 + 40 * time)).astype(np.float32)


# /tmp/env_audio/bin/python: np.log(np.maximum(librosa.feature.melspectrogram(y=ramp(), sr=8000,
#   n_fft=200, hop_length=80, n_mels=20, pad_mode="reflect"), 1e-10)).T[[0, 5, 10]][:, [0, 7, 19]]
LIBROSA = [
  [1.288115, -8.139372, -12.38748],
  [-12.280664, -10.372276, -23.02585],
  [-3.333146, 1.099758, -6.731359],
]
# transformers 5.24: WhisperFeatureExtractor()(ramp(), sampling_rate=16000,
#   return_tensors="np").input_features[0].T[[0, 3, 9]][:, [0, 30, 79]]
WHISPER = [
  [1.223317, 0.293107, -0.351468],
  [-0.666449, 1.229837, -0.666449],
  [-0.666449, -0.666449, -0.666449],
]


def test_normalized_features_have_mean_0_and_deviation_1():
  noise = np.random.default_rng(0).normal(size=4000)
  features = audio.log_mel(noise, RATE)
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(features.std(0), 1, atol=1e-4)
  np.testing.assert_allclose(audio.log_mel(noise / 7, RATE), features, atol=1e-4)
  assert not audio.log_mel(np.zeros(400), RATE).any()


def test_a_single_sample_has_a_frame():
  assert audio.log_mel(np.ones(1), RATE).shape == (1, 40)


@pytest.mark.parametrize(
  "field, samples, changes",
  [
    ("samples", np.zeros(0), {}),
    ("samples", np.zeros((2, 800)), {}),
    ("samples", np.zeros(800, np.int16), {}),
    ("samples", np.full(800, np.inf), {}),
    ("bands", np.zeros(800), {"bands": 200}),
    ("high", np.zeros(800), {"high": 5000.0}),
    ("window", np.zeros(800), {"window": 0.0}),
    ("hop", np.zeros(800), {"hop": 1e-6}),
  ],
)
def test_wrong_arguments_of_features(field, samples, changes):
  with pytest.raises(ValueError, match=field):
    audio.log_mel(samples, RATE, **changes)


def speech(rows=64, length=50, bands=12):
  frames = np.where(np.arange(rows) % 2, length, 20).astype(np.int32)
  valid = np.arange(length) < frames[:, None]
  return {
    "features": jnp.asarray(np.where(valid[..., None], 1.0, 0.5), jnp.float32) * jnp.ones(bands),
    "frames": jnp.asarray(frames),
    "id": jnp.arange(rows),
    "view": jnp.zeros(rows, jnp.int32),
  }


def test_masks_hide_frames_and_bands_of_valid_frames_only():
  batch = speech()
  arguments = dict(seed=0, band_masks=1, band_width=3, time_masks=1, time_width=30)
  augment = jax.jit(audio.spec_augment(**arguments, time_fraction=0.5))
  masked = np.asarray(augment(batch)["features"])
  valid = np.arange(50) < np.asarray(batch["frames"])[:, None]
  np.testing.assert_array_equal(masked[~valid], 0.5)
  is_hidden = (masked == 0) & valid[..., None]
  bands = (is_hidden | ~valid[..., None]).all(1).sum(1)
  times = is_hidden.all(2).sum(1)
  # Every width occurs, and none that is larger.
  assert set(bands) == {0, 1, 2, 3}
  assert times[::2].max() == 10 and 20 <= times[1::2].max() <= 25 and times.min() == 0
  for row, hidden in enumerate(is_hidden.all(2)):
    places = np.flatnonzero(hidden)
    assert not len(places) or places[-1] - places[0] + 1 == times[row]


def test_masks_are_a_function_of_seed_id_and_view():
  batch = speech(8)
  augment = jax.jit(audio.spec_augment(seed=1))
  part = jax.tree.map(lambda x: x[3:5], batch)
  masked = augment(batch)["features"]
  np.testing.assert_array_equal(augment(part)["features"], masked[3:5])
  other_view = augment({**batch, "view": batch["view"] + 1})["features"]
  other_seed = jax.jit(audio.spec_augment(seed=2))(batch)["features"]
  assert (other_view != masked).any() and (other_seed != masked).any()
  half = augment({**batch, "features": batch["features"].astype(jnp.bfloat16)})["features"]
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(half == 0, masked == 0)


def scale(variables=None):
  """Returns a network of one weight, which scales the features."""
  return from_apply(
    lambda key, x: jnp.ones(()),
    lambda w, x: {"scaled": x * w},
    inputs="features",
    variables=variables,
  )


def test_student_reads_masked_features_and_teacher_clean_ones():
  student = teachers.read_entries(scale(), {"features": "masked"})
  teacher = scale(jnp.ones(()))
  batch = speech(4)
  masked = jax.jit(audio.spec_augment(seed=0, time_masks=0, into="masked"))(batch)
  scaled = predict(student, masked)
  assert (scaled != batch["features"]).any()
  np.testing.assert_array_equal(scaled, masked["masked"])
  np.testing.assert_array_equal(predict(teacher, masked), batch["features"])
  # Without augmentation, as in evaluation, both read the same.
  np.testing.assert_array_equal(predict(student, batch), batch["features"])
  with pytest.raises(ValueError, match="entries"):
    teachers.read_entries(teacher, {})


def test_cache_is_of_clean_features_where_the_masked_ones_have_their_own_entry():
  arrays = {"features": np.zeros((4, 5, 3), np.float32)}

  def name(augment):
    return augmentation_identity(augment, arrays, ["features"])["name"]

  assert name(lambda batch: {**batch, "masked": 2 * batch["features"]}) == "none"
  assert name(lambda batch: {**batch, "features": 2 * batch["features"]}) != "none"


def predict(model, batch):
  variables = model.variables or model.init(None, batch)
  return model.apply(*variables, batch, train=False, key=None)[0]["scaled"]


def test_wrong_arguments_of_masks():
  for name, value in {"seed": -1, "band_masks": -1, "time_width": 1.5, "time_fraction": 2}.items():
    with pytest.raises(ValueError, match=name):
      audio.spec_augment(**({"seed": 0} | {name: value}))
  with pytest.raises(ValueError, match="view"):
    audio.spec_augment(seed=0)({"features": jnp.zeros((1, 2, 3)), "id": jnp.zeros(1, int)})
  with pytest.raises(ValueError, match="features"):
    audio.spec_augment(seed=0)(speech() | {"features": jnp.zeros((64, 50))})


def test_clips_are_stored(tmp_path):
  path = tmp_path / "folder" / "clips.npz"
  clips = [
    audio.Clip(str(i), "é, it's", f"voice {i}", samples, RATE)
    for i, samples in enumerate([tone(), 2 * tone(0.05)])
  ]
  audio.save_clips(path, clips)
  stored = audio.load_clips(path, RATE)
  assert [x[:3] for x in stored] == [x[:3] for x in clips]
  np.testing.assert_allclose(stored[0].samples, clips[0].samples, atol=2**-15)
  np.testing.assert_allclose(stored[1].samples, np.clip(clips[1].samples, -1, 1), atol=2**-14)
  with pytest.raises(ValueError, match="rate"):
    audio.load_clips(path, 16000)
  with pytest.raises(ValueError, match="clips"):
    audio.save_clips(path, [clips[0], clips[1]._replace(rate=16000)])
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match=f"path.*{path}"):
    audio.load_clips(path)
