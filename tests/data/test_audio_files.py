"""Tests reading and resampling sounds."""

import builtins

import numpy as np
import pytest

from distill_jax.data import audio

RATE = 8000


def tone(seconds=0.1, rate=RATE, hertz=440.0):
  return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.fixture
def write(tmp_path):
  soundfile = pytest.importorskip("soundfile")

  def write_file(samples, name="sound.wav", rate=RATE, **kwargs):
    path = tmp_path / name
    soundfile.write(path, samples, rate, **kwargs)
    return path

  return write_file


@pytest.mark.parametrize(
  "subtype, step", [("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 0), ("PCM_U8", 2**-7)]
)
def test_read_returns_the_samples(write, subtype, step):
  samples = tone() / 2
  clip = audio.read(write(samples, subtype=subtype))
  assert clip.rate == RATE and clip.samples.dtype == np.float32
  np.testing.assert_allclose(clip.samples, samples, atol=step + 1e-7)


def test_read_resamples_only_to_a_stated_rate(write):
  pytest.importorskip("soxr")
  path = write(tone(0.5, 22050), rate=22050)
  assert audio.read(path).rate == 22050
  clip = audio.read(path, rate=RATE)
  assert clip.rate == RATE and clip.samples.shape == (4000,)
  # The filter leaves its traces at both ends.
  np.testing.assert_allclose(clip.samples[400:-400], tone(0.5)[400:-400], atol=2e-3)
  with pytest.raises(ValueError, match="path.*short.wav"):
    audio.read(write(np.ones(2), "short.wav"), rate=RATE // 8)


def test_several_channels_raise_or_are_averaged(write):
  path = write(np.stack([tone(), 0 * tone()], 1), subtype="FLOAT")
  with pytest.raises(ValueError, match=f"path.*2 in {path}"):
    audio.read(path)
  np.testing.assert_allclose(audio.read(path, average=True).samples, tone() / 2, atol=1e-7)


def test_broken_files_raise_with_their_name(write, tmp_path):
  def check(path, error=ValueError):
    with pytest.raises(error, match=f"path.*{path}"):
      audio.read(path)

  check(write(np.array([0, np.nan, 0]), "nan.wav", subtype="FLOAT"))
  check(write(np.zeros(0), "empty.wav"))
  (tmp_path / "text.wav").write_text("no sound")
  check(tmp_path / "text.wav")
  check(tmp_path / "missing.wav", FileNotFoundError)


@pytest.mark.parametrize(
  "kind, subtype, endian",
  [
    ("WAV", "PCM_24", None),
    ("WAV", "FLOAT", "BIG"),
    ("AIFF", "PCM_24", None),
    ("AIFF", "PCM_16", "LITTLE"),
    ("AIFF", "FLOAT", None),
    ("AU", "FLOAT", None),
    ("AU", "PCM_16", "LITTLE"),
    ("W64", "PCM_24", None),
    ("RF64", "FLOAT", None),
    ("FLAC", "PCM_24", None),
    ("OGG", "VORBIS", None),
    ("MP3", "MPEG_LAYER_III", None),
  ],
)
def test_truncated_files_raise(write, kind, subtype, endian):
  samples = np.random.default_rng(0).normal(size=40001) / 9
  path = write(samples, format=kind, subtype=subtype, endian=endian)
  content = path.read_bytes()
  tag = b"ID3\x04\0\0\0\0\x02\1" + bytes(257)
  for before in (b"", tag) if kind in ("MP3", "FLAC") else (b"",):
    # Chunks behind the sound are no fault; libsndfile takes those of W64 for samples.
    for behind in (b"", b"LIST\4\0\0\0abcd"):
      path.write_bytes(before + content + behind)
      assert 0 <= len(audio.read(path).samples) - 40001 <= len(behind)
    last_page = len(content) - content.rfind(b"OggS") if kind == "OGG" else 1
    for missing in (1, 2, last_page, 2001, len(content) // 2):
      path.write_bytes(before + content[:-missing])
      with pytest.raises(ValueError, match=f"path.*{path}"):
        audio.read(path)


@pytest.mark.parametrize(
  "kind, start, size",
  [
    ("WAV", 4, b"\xff" * 4),
    ("AIFF", 4, b"\x7f\0\0\x2e"),
    ("AU", 8, b"\xff" * 4),
    ("RF64", 20, b"\xff" * 8),
  ],
)
def test_size_of_a_stream_is_unknown(write, kind, start, size):
  path = write(tone(), format=kind)
  content = bytearray(path.read_bytes())
  content[start : start + len(size)] = size
  path.write_bytes(content)
  assert len(audio.read(path).samples) == 800


def test_length_of_a_stream_of_flac_is_unknown(write):
  path = write(tone(), format="FLAC")
  content = bytearray(path.read_bytes())
  # 36 bits, the last 4 of a byte first.
  content[21] &= 0xF0
  content[22:26] = bytes(4)
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"path.*{path}"):
    audio.read(path)


def test_missing_package_is_named(monkeypatch, tmp_path):
  def fail(name, *args, **kwargs):
    if name == "soxr":
      raise ModuleNotFoundError("no soxr", name="soxr")
    return real(name, *args, **kwargs)

  real = builtins.__import__
  monkeypatch.setattr(builtins, "__import__", fail)
  with pytest.raises(ModuleNotFoundError, match="soxr.*audio"):
    audio.resample(tone(), RATE, 16000)


@pytest.mark.parametrize(
  "samples",
  [
    np.zeros(0),
    np.zeros((800, 2)),
    np.zeros(800, np.int16),
    np.full(800, np.nan),
    np.ones(2),  # A third of a sample.
  ],
)
def test_wrong_samples_are_not_resampled(samples):
  pytest.importorskip("soxr")
  with pytest.raises(ValueError, match="^samples"):
    audio.resample(samples, 6 * RATE, RATE)
