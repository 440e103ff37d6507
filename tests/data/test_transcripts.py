"""Tests rows of recordings and of pictures of lines with their transcripts, and their buckets."""

import numpy as np
import pytest

from distill_jax.data import text

LETTERS = text.character_tokenizer(" abct")


def recordings(*lengths, bands=3):
  return [np.full((n, bands), i + 1.0) for i, n in enumerate(lengths)]


def speech(transcripts=("cat", "", "abba"), lengths=(4, 6, 9), **changes):
  arguments = {"frames": 10, "label_length": 4}
  return text.speech_source(recordings(*lengths), transcripts, LETTERS, **(arguments | changes))


def test_rows_of_recordings():
  source = speech()
  arrays = source.arrays
  assert source.classes == 6 and source.vocabulary == LETTERS.identity
  np.testing.assert_array_equal(arrays["frames"], [4, 6, 9])
  np.testing.assert_array_equal(arrays["features"].sum((1, 2)), [12, 36, 81])
  assert not arrays["features"][0, 4:].any()
  # An empty transcript is a blank, so that its row counts as labeled.
  label = [[4, 2, 5, -1], [0, -1, -1, -1], [2, 3, 3, 2]]
  np.testing.assert_array_equal(arrays["label"], label)
  assert source.labeled.all()
  assert [LETTERS.decode(row) for row in arrays["label"]] == ["cat", "", "abba"]


def test_recordings_without_transcripts():
  source = speech(None)
  assert source.classes is None and "label" not in source.arrays


def test_transcripts_that_do_not_fit_are_reported(capsys):
  # 'abba' needs a blank between both b: five steps.
  speech(lengths=(4, 6, 5))
  assert capsys.readouterr().out == ""
  speech(lengths=(4, 6, 4))
  assert "speech: 1 of 3" in capsys.readouterr().out
  source = speech(lengths=(4, 6, 9), frames_per_step=2, drop_longer=True)
  np.testing.assert_array_equal(source.ids, [1, 2])
  assert "left out 1 of 3" in capsys.readouterr().out


def test_longer_rows_raise_or_are_left_out():
  with pytest.raises(ValueError, match="frames.*rows 2"):
    speech(frames=8)
  with pytest.raises(ValueError, match="label_length.*rows 2"):
    speech(label_length=3)
  source = speech(frames=8, label_length=3, drop_longer=True)
  np.testing.assert_array_equal(source.ids, [0, 1])
  assert source.arrays["features"].shape == (2, 8, 3)
  with pytest.raises(ValueError, match="frames"):
    speech(frames=2, drop_longer=True)


def test_wrong_rows():
  with pytest.raises(ValueError, match="transcripts.*row 1.*'x'"):
    speech(["cat", "tax", "a"])
  with pytest.raises(ValueError, match="transcripts"):
    speech(["cat"])
  with pytest.raises(ValueError, match="features"):
    text.speech_source([], [], LETTERS, frames=2, label_length=2)
  with pytest.raises(ValueError, match="features.*row 1"):
    features = [np.zeros((3, 4)), np.zeros((3, 5))]
    text.speech_source(features, None, LETTERS, frames=3, label_length=2)
  with pytest.raises(ValueError, match="features.*row 0"):
    text.speech_source([np.zeros((0, 4))], None, LETTERS, frames=3, label_length=2)
  symbols = text.symbol_tokenizer("abc")
  with pytest.raises(ValueError, match="transcripts.*blank"):
    text.speech_source(recordings(3), ["a"], symbols, frames=3, label_length=2)


def test_messages_name_the_argument():
  for transcript in (None, 3, b"a"):
    with pytest.raises(ValueError, match="^transcripts.*row 1"):
      speech(["cat", transcript, "a"])
  with pytest.raises(ValueError, match="^frames_per_step"):
    speech(frames_per_step=0)
  image = np.zeros((4, 4))
  with pytest.raises(ValueError, match="^columns_per_step"):
    text.line_source([image], ["a"], LETTERS, width=4, label_length=2, columns_per_step=0)
  # Not of another size than other rows, but empty.
  with pytest.raises(ValueError, match="^features.*at least 1.*row 1"):
    speech(lengths=(4, 0, 9))


def test_decomposed_letters_are_named():
  letters = text.character_tokenizer("abé")
  with pytest.raises(ValueError, match="NFC"):
    letters.encode("be\u0301")
  for other in ("ba\u0301", "bc", "be"):
    with pytest.raises(ValueError, match="^text(?!.*NFC)"):
      letters.encode(other)


def test_rows_of_pictures():
  images = [np.full((4, 9), 255, np.uint8), np.full((4, 5), 51, np.uint8)]
  source = text.line_source(images, ["cat", "a"], LETTERS, width=12, label_length=3)
  assert source.arrays["image"].shape == (2, 4, 12, 1)
  np.testing.assert_allclose(source.arrays["image"].sum((1, 2, 3)), [36, 4], rtol=1e-6)
  np.testing.assert_array_equal(source.arrays["widths"], [9, 5])
  with pytest.raises(ValueError, match="width.*rows 0"):
    text.line_source(images, ["cat", "a"], LETTERS, width=8, label_length=3)
  with pytest.raises(ValueError, match="images.*row 1"):
    text.line_source([images[0], images[1][:3]], None, LETTERS, width=9, label_length=3)


@pytest.mark.parametrize("characters", ["", "aba", ["ab"], [1]])
def test_wrong_alphabets(characters):
  with pytest.raises(ValueError, match="characters"):
    text.character_tokenizer(characters)


def test_tokens_outside_of_the_alphabet_raise():
  with pytest.raises(ValueError, match="tokens"):
    LETTERS.decode([6])
  assert text.character_tokenizer("ab").identity != text.character_tokenizer("ba").identity


def test_buckets_cut_frames_and_nothing_else():
  source = speech(["cat"] * 6, (3, 9, 4, 8, 3, 10), label_length=10)
  buckets = text.LengthBuckets(source, 2, seed=0, lengths=(4, 10))
  seen = []
  for batch, _ in zip(buckets(0), range(3)):
    length = batch["features"].shape[1]
    assert length >= batch["frames"].max()
    expected = source.arrays["features"][batch["id"], :length]
    np.testing.assert_array_equal(batch["features"], expected)
    # Of ten columns as there are frames: padding may go, classes never.
    labels = source.arrays["label"][batch["id"]]
    np.testing.assert_array_equal((batch["label"] >= 0).sum(1), (labels >= 0).sum(1))
    seen += [length]
  assert sorted(seen) == [4, 10, 10]
  with pytest.raises(ValueError, match="lengths"):
    text.LengthBuckets(source, 2, seed=0, lengths=(4, 9))
  with pytest.raises(ValueError, match="lengths"):
    text.LengthBuckets(source, 2, seed=0, lengths=((4, 4), (10, 10)))


def test_a_label_of_every_frame_is_cut_and_a_transcript_is_not():
  batch = {"features": np.zeros((2, 6, 3)), "frames": np.array([2, 3])}
  voiced = np.array([[0, 1, -1, -1, -1, -1], [1, 1, 1, -1, -1, -1]])
  assert text.cut_padding(batch | {"label": voiced}, (3, 6))["label"].shape == (2, 3)
  transcript = np.array([[1, 2, 3, 4, -1, -1], [1, 1, 1, -1, -1, -1]])
  cut = text.cut_padding(batch | {"label": transcript}, (3, 6))
  assert cut["features"].shape == (2, 3, 3)
  np.testing.assert_array_equal(cut["label"], transcript)


def test_buckets_cut_columns():
  images = [np.full((2, n), 255, np.uint8) for n in (3, 7)]
  source = text.line_source(images, ["a", "b"], LETTERS, width=8, label_length=8)
  batches = text.LengthBuckets(source, 1, seed=0, lengths=(4, 8))(0)
  shapes = {next(batches)["image"].shape for _ in range(2)}
  assert shapes == {(1, 2, 4, 1), (1, 2, 8, 1)}


def test_rows_made_elsewhere_are_checked():
  rows = dict(speech().arrays)
  text.check_transcripts(rows)
  padded = np.maximum(rows["label"], 0)  # The blank pads too.
  text.check_transcripts(rows | {"label": padded})
  text.check_transcripts(rows | {"label": padded.astype(np.uint8)})
  for field, change in {
    "frames": {"frames": rows["frames"] + 2},
    "frames: ": {"frames": rows["frames"][:2]},
    "features": {"features": rows["frames"]},
    "label": {"label": np.array([[1, -1, 2], [1, 2, 3], [1, 1, 1]])},
    "label: ": {"label": padded[:2]},
    "label.*bool": {"label": padded > 0},
    "label.*\\[1, 0, 2": {"label": np.array([[1, 0, 2]] * 3, np.uint8)},
    "label.*id 1": {"label": np.array([[1, 2, -1], [1, -100, -100], [1, 1, 1]])},
  }.items():
    with pytest.raises(ValueError, match=f"^{field}"):
      text.check_transcripts(rows | change)
  with pytest.raises(ValueError, match="label"):
    text.check_transcripts({"features": rows["features"], "label": rows["label"]})
  with pytest.raises(ValueError, match="frames"):
    text.cut_padding(rows | {"frames": -rows["frames"]}, (4, 10))


def test_pixels_of_255_are_refused():
  image = np.full((4, 4), 255.0)
  with pytest.raises(ValueError, match="^images: .*float64"):
    text.line_source([image], ["a"], text.character_tokenizer("a"), width=4, label_length=2)
