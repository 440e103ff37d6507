"""Reads sound files, and turns samples into features for networks of speech.

    clip = audio.read("hello.wav", rate=16000)
    features = audio.log_mel(clip.samples, clip.rate)  # [frames, bands]

`text.speech_source` makes rows of features and transcripts, `spec_augment` masks them in training.

>>> log_mel(np.zeros(800, np.float32), 8000, bands=8).shape
(11, 8)
"""

from distill_jax.data.audio.clips import Clip, load_clips, save_clips
from distill_jax.data.audio.features import log_mel, mel_filters, whisper_log_mel
from distill_jax.data.audio.files import Audio, read, resample
from distill_jax.data.audio.masks import spec_augment

__all__ = [
  "Audio",
  "Clip",
  "load_clips",
  "log_mel",
  "mel_filters",
  "read",
  "resample",
  "save_clips",
  "spec_augment",
  "whisper_log_mel",
]
