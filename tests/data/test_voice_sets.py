"""Tests the sets of recorded prompts and of synthetic voices, on small folders of packages."""

import gzip
import stat

import numpy as np
import pytest

from distill_jax.data import audio
from distill_jax.data.sets import synthetic_voices, voice_prompts

TRANSCRIPTS = """; Core Asterisk Sounds in English

added: Added.
beep: [this is a simple beep tone]
digits/1: One
join: <beep ascending>
missing: This has no recording.
press: Press 1, then #:  or "hang up".
"""
# Copies the sound of a voice, and lists voices as espeak-ng does.
PROGRAM = """#!/bin/sh
if [ "$1" = --voices ]; then
  echo "Pty Language Age/Gender VoiceName File Other"
  echo " 5  en-us  --/M  English gmw/en-US (en 2)"
  echo " 5  en-gb  --/M  English gmw/en (en 2)"
  exit
fi
test -d "$ESPEAK_DATA_PATH/espeak-ng-data" || exit 1
case "$LD_LIBRARY_PATH" in *-gnu:*/pulseaudio:*) ;; *) exit 1 ;; esac
test "$6" != fail || exit 2
cp "{sounds}/$2.wav" "$4"
"""
VOICES = {"train": ("en-us", "en-us+f10"), "validation": ("en-gb",), "test": ("en-gb+f10",)}
# Of every split, by `split_of`.
TEXTS = [f"{x} {y}" for x in ("one", "two", "red", "sour") for y in ("apples", "pears", "plums")]


def write_sound(path, samples, rate=8000):
  soundfile = pytest.importorskip("soundfile")
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, samples, rate)


@pytest.fixture
def prompts_root(tmp_path):
  docs = tmp_path / "usr/share/doc/asterisk-core-sounds-en"
  docs.mkdir(parents=True)
  (docs / "core-sounds-en.txt.gz").write_bytes(gzip.compress(TRANSCRIPTS.encode()))
  sounds = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
  for i, name in enumerate(("added", "beep", "digits/1", "join", "press")):
    write_sound(sounds / f"{name}.wav", np.full(80, i / 8))
  return tmp_path


@pytest.fixture
def espeak_root(tmp_path):
  pytest.importorskip("soundfile")
  pytest.importorskip("soxr")
  program = tmp_path / "usr/bin/espeak-ng"
  program.parent.mkdir(parents=True)
  program.write_text(PROGRAM.replace("{sounds}", str(tmp_path)))
  for voice in (voice for names in VOICES.values() for voice in names):
    write_sound(tmp_path / f"{voice}.wav", np.full(2205, len(voice) / 32), 22050)
  program.chmod(program.stat().st_mode | stat.S_IXUSR)
  variants = tmp_path / "usr/lib/x86_64-linux-gnu/espeak-ng-data/voices/!v"
  variants.mkdir(parents=True)
  (variants / "f10").touch()
  return tmp_path


def test_prompts_are_those_with_speech(prompts_root, tmp_path):
  path = tmp_path / "made" / "prompts.npz"
  clips = voice_prompts.load(path, prompts_root)
  expected = {"added": "Added.", "digits/1": "One", "press": 'Press 1, then #:  or "hang up".'}
  assert {clip.name: clip.text for clip in clips} == expected
  np.testing.assert_allclose([clip.samples[0] for clip in clips], [0, 2 / 8, 4 / 8], atol=1e-4)
  assert {clip.rate for clip in clips} == {8000}
  # The packages are not read again.
  again = voice_prompts.load(path, tmp_path / "nowhere")
  np.testing.assert_array_equal(again[2].samples, clips[2].samples)
  with pytest.raises(ValueError, match="rate"):
    voice_prompts.load(path, rate=16000)


def test_prompts_without_packages_name_them(tmp_path):
  with pytest.raises(FileNotFoundError, match="folder.*asterisk-core-sounds-en-wav"):
    voice_prompts.load(tmp_path / "prompts.npz", tmp_path)
  assert not (tmp_path / "prompts.npz").exists()


def test_split_keeps_a_sentence_on_one_side():
  texts = [*TEXTS, *(x.upper() + "!" for x in TEXTS)]
  clips = [audio.Clip(str(i), x, "", np.zeros(1), 8000) for i, x in enumerate(texts)]
  splits = voice_prompts.split(clips, held_out=3)
  sides = [{voice_prompts.plain_text(clip.text) for clip in part} for part in splits.values()]
  assert sum(map(len, splits.values())) == 24 and sum(map(len, sides)) == 12
  with pytest.raises(ValueError, match="clips"):
    voice_prompts.split(clips[:1])
  with pytest.raises(ValueError, match="held_out"):
    voice_prompts.split(clips, held_out=2)


@pytest.mark.parametrize(
  "text, plain",
  [
    ("Press 10 or #.", "press one zero or pound"),
    ("star: *", "star star"),
    ("'Hello,' don’t & can't -- O'Neil's", "hello don't can't o'neil's"),
    ("... ?", ""),
  ],
)
def test_plain_text(text, plain):
  assert voice_prompts.plain_text(text) == plain
  assert set(plain) <= set(voice_prompts.CHARACTERS)
  assert voice_prompts.plain_text(voice_prompts.spell_out(text)) == plain


def test_voices_speak_the_sentences_of_their_split(espeak_root, tmp_path):
  path = tmp_path / "voices.npz"
  splits = synthetic_voices.load(path, TEXTS, espeak_root, voices=VOICES, held_out=3)
  for name, clips in splits.items():
    texts = [x for x in TEXTS if voice_prompts.split_of(x, 3) == name]
    assert texts and {(x.text, x.voice) for x in clips} == {
      (text, voice) for text in texts for voice in VOICES[name]
    }
  for clip in splits["train"]:
    # 22,050 Hz are resampled.
    assert len(clip.samples) == 800 and clip.rate == 8000
    assert clip.samples[400] == pytest.approx(len(clip.voice) / 32, abs=1e-3)
  again = synthetic_voices.load(path, TEXTS, "/nowhere", voices=VOICES, held_out=3)
  assert [x.name for x in again["test"]] == [x.name for x in splits["test"]]
  with pytest.raises(ValueError, match="texts"):
    synthetic_voices.load(path, TEXTS[1:], voices=VOICES, held_out=3)


def test_wrong_voices(espeak_root, tmp_path):
  def load(texts=TEXTS, root=espeak_root, **changes):
    path = tmp_path / "voices.npz"
    synthetic_voices.load(path, texts, root, voices=VOICES | changes, held_out=3)

  # espeak-ng itself would take its default voice.
  for voice in ("en-us+f11", "en-au"):
    with pytest.raises(ValueError, match=f"^voices.*{voice[-3:]}"):
      load(validation=(voice,))
  with pytest.raises(ValueError, match="voices.*en-us"):
    load(validation=("en-us",))
  with pytest.raises(ValueError, match="voices.*test"):
    load(test=())
  with pytest.raises(ValueError, match="texts.*fail"):
    load([*TEXTS, "fail"])
  with pytest.raises(FileNotFoundError, match="folder.*espeak-ng"):
    load(root=tmp_path / "usr")
  # As where a package is missing that the program depends on.
  (espeak_root / "usr/bin/espeak-ng").write_text("#!/bin/sh\necho no libpulse.so.0 >&2\nexit 127")
  with pytest.raises(ValueError, match="^folder.*libpulse.*folder=None"):
    load()
  assert not (tmp_path / "voices.npz").exists()


def test_the_library_of_pypi_speaks(tmp_path):
  pytest.importorskip("espeakng_loader")
  path = tmp_path / "voices.npz"
  splits = synthetic_voices.load(path, TEXTS[:4], None, held_out=3)
  for clip in (clip for clips in splits.values() for clip in clips):
    assert clip.rate == 8000 and 0.2 < len(clip.samples) / 8000 < 10
    assert 0.05 < np.abs(clip.samples).max() <= 1
  for voice in ("en-us+f11", "en-au"):
    voices = {"train": (voice,), "validation": ("en-gb",), "test": ("en-us",)}
    with pytest.raises(ValueError, match=f"voices.*{voice[-3:]}"):
      synthetic_voices.load(tmp_path / "x.npz", TEXTS, None, voices=voices, held_out=3)
