"""configs/speech_words.py, voice_activity.py and read_words.py on few clips and small networks."""

import importlib.util
import json

import numpy as np
import pytest
from read_words import ReadWords
from speech_words import SpeechWords
from voice_activity import VoiceActivity

from distill_jax.cost import runtime
from distill_jax.data import audio
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError, check_config

TEXTS = [f"{x} {y}" for x in ("one", "two", "red", "sour") for y in ("apples", "pears", "plums")]
LONGER = [f"{text} {number}" for text in TEXTS for number in ("four", "five", "six")]
WORDS = "the and lord god unto shall thou king israel house people land day hand children".split()
STEPS = ("steps=4", "batch_size=8", "warmup_steps=1")


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
  """Released teachers are slow: the report times them once."""
  monkeypatch.setattr(runtime, "MOST_SECONDS", 0)
  monkeypatch.setattr(runtime, "FEWEST_REPEATS", 1)


def run(name, folder, *options):
  """Returns the scores of the report, by variant."""
  flags = [f"student_training.{x}" for x in STEPS] + ["eval_every=4", "devices=1", *options]
  workdir = folder / "run"
  config = f"--config=configs/{name}.py"
  main([config, *(f"--config.{flag}" for flag in flags), f"--workdir={workdir}"])
  results = json.loads((workdir / "report/results.json").read_text())
  return {entry["variant"] or entry["role"]: entry["scores"] for entry in results["entries"]}


def clips_of(texts, rate, seconds):
  """Returns a clip of noise for each text."""
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(len(texts), int(seconds * rate))).astype(np.float32) / 8
  return [audio.Clip(f"c{i}", text, "v", x, rate) for i, (text, x) in enumerate(zip(texts, noise))]


@pytest.mark.integration
def test_speech_runs_its_methods(tmp_path):
  pytest.importorskip("espeakng_loader")
  prompts, voices = tmp_path / "prompts.npz", tmp_path / "voices.npz"
  audio.save_clips(prompts, clips_of(LONGER, 8000, 1.5))
  options = [f"teacher_training.{x}" for x in STEPS] + ["teacher_width=8", "student_width=8"]
  options += ["teacher_layers=1", "student_layers=1", "strings=2", "frames=250", "library=True"]
  options += ["methods=frames,mean,pseudo", "label_fraction=0.5", f"cache={tmp_path / 'cache'}"]
  scores = run("speech_words", tmp_path, f"prompts={prompts}", f"voices={voices}", *options)
  assert {"frames", "mean", "pseudo"} <= set(scores)
  assert all({"wer", "cer", "nll"} <= scores[name].keys() for name in ("teacher", "frames"))
  assert "data:audio/wav" in (tmp_path / "run/report/report.html").read_text()


@pytest.mark.integration
@pytest.mark.parametrize("released", [False, True])
def test_words_are_read(released, tmp_path):
  if released and importlib.util.find_spec("rapidocr_onnxruntime") is None:
    pytest.skip("needs pip install --no-deps rapidocr-onnxruntime")
  text = tmp_path / "kjv.txt"
  text.write_text(" ".join(a + b for a in WORDS for b in WORDS[:2]))
  options = [f"text={text}", f"pictures={tmp_path / 'words.npz'}", "student_widths=4,4,4,4"]
  options += ["student_width=8", "width=192", "buckets=192"]
  options += (
    ["released=True", f"cache={tmp_path / 'cache'}"] if released else ["methods=frames,mean"]
  )
  if not released:
    options += [f"teacher_training.{x}" for x in STEPS]
    options += ["teacher_widths=4,4,4,4", "teacher_width=8"]
  else:
    options += ["label_fraction=0.5"]
  scores = run("read_words", tmp_path, *options)
  assert {"wer", "cer", "exact"} <= scores["frames"].keys()
  assert not released or scores["teacher"]["cer"] < 0.2


@pytest.mark.integration
def test_voice_is_detected(tmp_path):
  if importlib.util.find_spec("silero_vad") is None:
    pytest.skip("needs pip install --no-deps silero-vad")
  prompts = tmp_path / "prompts.npz"
  audio.save_clips(prompts, clips_of(LONGER, 16_000, 0.5))
  options = [f"prompts={prompts}", "scenes=40,8,8", "label_fraction=0.5", "width=4"]
  scores = run("voice_activity", tmp_path, *options)
  assert {"noisy", "clean"} <= set(scores)
  assert {"accuracy", "macro_f1"} <= scores["noisy"].keys()


@pytest.mark.parametrize(
  ("config", "field", "value"),
  [
    (SpeechWords, "methods", ("frame",)),
    (SpeechWords, "teacher_width", 5),
    (SpeechWords, "strings", -1),
    (SpeechWords, "most_errors", 0.0),
    (SpeechWords, "label_fraction", 0.0),
    (ReadWords, "width", 62),
    (ReadWords, "student_width", 5),
    (ReadWords, "label_fraction", 0.0),
    (ReadWords, "released", True),
    (VoiceActivity, "scenes", (0, 1, 1)),
    (VoiceActivity, "width", 0),
  ],
)
def test_fields_that_cannot_be_run_are_refused(config, field, value):
  with pytest.raises(ConfigError, match="cache" if field == "released" else field):
    check_config(config(**{field: value}))


def test_missing_packages_are_named(tmp_path):
  for config in (
    SpeechWords(prompts=str(tmp_path / "p.npz"), packages=str(tmp_path)),
    VoiceActivity(prompts=str(tmp_path / "p.npz"), packages=str(tmp_path)),
  ):
    with pytest.raises(ConfigError, match="packages.*asterisk"):
      config.data()
