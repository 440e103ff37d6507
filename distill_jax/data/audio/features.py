"""Computes log-mel features of samples, equal to librosa's and to those of Whisper."""

import functools

import numpy as np

from distill_jax.data.audio.files import check_samples
from distill_jax.errors import check_integer

_HERTZ_PER_MEL = 200 / 3
"""Slaney's scale (Auditory Toolbox, 1998): linear up to `_LINEAR` Hz, then by `_LOG_STEP`."""
_LINEAR = 1000.0
_LOG_STEP = np.log(6.4) / 27
_SMALLEST = 1e-10


def log_mel(
  samples: np.ndarray,
  rate: int,
  *,
  bands: int = 40,
  window: float = 0.025,
  hop: float = 0.01,
  low: float = 0.0,
  high: float | None = None,
  normalize: bool = True,
) -> np.ndarray:
  """Returns log(max(mel, 1e-10)) of the power spectrum, a frame every `hop` seconds.

  Frame i is centered at sample i * hop, with reflected samples at both ends, under a periodic Hann
  window. The transform has as many points as the window. Equal to the natural logarithm of
  `librosa.feature.melspectrogram`.

  Args:
    samples: floats [N], N > 0.
    rate: samples per second.
    bands: number of bands, F.
    window: seconds of a window.
    hop: seconds between two frames.
    low: lowest frequency in Hz.
    high: highest frequency in Hz; None: half of the rate.
    normalize: whether each band then has mean 0 and standard deviation 1 over the clip's frames, so
      that loudness and microphone cancel out and 0 is a good padding. A band that is constant, as
      in silence, is 0.

  Returns:
    float32 [1 + N // hop in samples, F].

  Raises:
    ValueError: no samples, another shape, or a number is out of its range.

  >>> sound = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
  >>> features = log_mel(sound, 8000, normalize=False)
  >>> features.shape, int(features[50].argmax())
  ((101, 40), 7)
  """
  points, step = _samples("window", window, rate), _samples("hop", hop, rate)
  mel = _mel_power(samples, rate, bands, points, step, low, high)
  features = np.log(np.maximum(mel, _SMALLEST))
  if normalize:
    features = features - features.mean(0)
    features = features / np.maximum(features.std(0), 1e-5)
  return features.astype(np.float32)


def whisper_log_mel(
  samples: np.ndarray, rate: int, *, bands: int = 80, seconds: float = 30.0
) -> np.ndarray:
  """Returns the features of Whisper (Radford et al. 2022): equal to its feature extractor.

  The samples are cut or filled up with zeros to `seconds`. Then (max(log10(mel), m - 8) + 4) / 4
  with the clip's largest log10(mel), m, of windows of 400 samples every 160, without the last.

  Args:
    samples: floats [N].
    rate: samples per second, which must be 16,000: `resample` others.
    bands: 80, or 128 for large-v3.
    seconds: length of what the network reads.

  Returns:
    float32 [100 * seconds, bands]; the network's `input_features` are its transpose.

  Raises:
    ValueError: another rate, no samples, or another shape.

  >>> whisper_log_mel(np.zeros(16000), 16000, seconds=2).shape
  (200, 80)
  """
  if rate != 16000:
    raise ValueError(
      f"rate: expected 16000, got {rate}: write audio.resample(samples, {rate}, 16000)"
    )
  length = _samples("seconds", seconds, rate)
  samples = check_samples(samples)[:length]
  padded = np.pad(samples, (0, length - len(samples)))
  mel = _mel_power(padded, rate, bands, 400, 160, 0.0, None)[:-1]
  features = np.log10(np.maximum(mel, _SMALLEST))
  features = np.maximum(features, features.max() - 8)
  return ((features + 4) / 4).astype(np.float32)


@functools.lru_cache
def mel_filters(
  rate: int, points: int, bands: int, low: float = 0.0, high: float | None = None
) -> np.ndarray:
  """Returns triangular filters on Slaney's mel scale, of equal area, as `librosa.filters.mel`.

  Args:
    rate: samples per second.
    points: length of the Fourier transform.
    bands: number of filters, F.
    low, high: as of `log_mel`.

  Returns:
    float64 [F, points // 2 + 1], read-only.

  Raises:
    ValueError: a number is out of its range, or so many bands that one has no frequency.

  >>> mel_filters(16000, 400, 80).shape
  (80, 201)
  """
  high = rate / 2 if high is None else high
  if not 0 <= low < high <= rate / 2:
    raise ValueError(f"low, high: expected 0 <= low < high <= {rate / 2}, got {low} and {high}")
  check_integer("bands", bands, 1)
  frequencies = np.arange(points // 2 + 1) * rate / points
  edges = _to_hertz(np.linspace(_to_mel(low), _to_mel(high), bands + 2))
  widths = np.diff(edges)[:, None]
  rising = (frequencies - edges[:-2, None]) / widths[:-1]
  falling = (edges[2:, None] - frequencies) / widths[1:]
  filters = np.maximum(0, np.minimum(rising, falling))
  filters *= 2 / (edges[2:] - edges[:-2])[:, None]
  empty = np.flatnonzero(~filters.any(1))
  if len(empty):
    raise ValueError(
      f"bands: expected each to hold one of the frequencies 0, {rate / points:g}, ..., got none in "
      f"band {empty[0]} of {bands}: take fewer bands or a longer window"
    )
  filters.flags.writeable = False
  return filters


def _mel_power(samples, rate: int, bands: int, points: int, step: int, low, high) -> np.ndarray:
  """Returns the mel power spectrum, float64 [frames, bands]."""
  filters = mel_filters(rate, points, bands, low, high)
  padded = np.pad(check_samples(samples).astype(np.float64), points // 2, mode="reflect")
  frames = np.lib.stride_tricks.sliding_window_view(padded, points)[::step]
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(points) / points)
  power = np.abs(np.fft.rfft(frames * hann)) ** 2
  return power @ filters.T


def _to_mel(hertz: float) -> float:
  if hertz < _LINEAR:
    return hertz / _HERTZ_PER_MEL
  return float(_LINEAR / _HERTZ_PER_MEL + np.log(hertz / _LINEAR) / _LOG_STEP)


def _to_hertz(mel: np.ndarray) -> np.ndarray:
  linear_end = _LINEAR / _HERTZ_PER_MEL
  logarithmic = _LINEAR * np.exp(_LOG_STEP * (mel - linear_end))
  return np.where(mel < linear_end, mel * _HERTZ_PER_MEL, logarithmic)


def _samples(name: str, seconds: float, rate: int) -> int:
  check_integer("rate", rate, 1)
  count = round(seconds * rate)
  if count < 1:
    raise ValueError(f"{name}: expected seconds of at least one sample, got {seconds} at {rate} Hz")
  return count
