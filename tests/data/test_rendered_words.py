"""Tests the set of rendered words."""

import numpy as np
import pytest

from distill_jax.data.sets import rendered_words

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

WORDS = rendered_words.words_of(
  "In the beginning God created the heaven and the earth. And the earth was without form, and void"
)


def test_splits_share_neither_words_nor_faces(tmp_path):
  path = tmp_path / "made" / "words.npz"
  splits = rendered_words.load(path, WORDS, copies=3, held_out=3)
  sides = [{x.text.casefold() for x in part} for part in splits.values()]
  assert sum(map(len, sides)) == len(set.union(*sides)) == len({x.casefold() for x in WORDS})
  for name, pictures in splits.items():
    assert {x.face for x in pictures} <= set(rendered_words.FACES[name])
    copies = 3 if name == "train" else 1
    assert len(pictures) == copies * len({x.text for x in pictures})
    # Each of another face.
    assert len({(x.text, x.face) for x in pictures}) == len(pictures)
  # The file is read again, and only for the same words and arguments.
  again = rendered_words.load(path, WORDS, copies=3, held_out=3)
  for picture, other in zip(splits["train"], again["train"]):
    assert picture[:2] == other[:2]
    np.testing.assert_array_equal(picture.image, other.image)
  for changes in ({"seed": 1}, {"height": 40}, {"copies": 2}):
    with pytest.raises(ValueError, match="path"):
      rendered_words.load(path, WORDS, **({"copies": 3, "held_out": 3} | changes))


def test_pictures_hold_the_whole_word():
  for seed in range(6):
    image = rendered_words.render("Jehoshaphat", "DejaVuSerif-Italic", seed=seed).image
    assert image.shape[0] == 32 and image.dtype == np.uint8
    is_ink = image < (int(image.min()) + int(np.median(image))) // 2
    assert 0.05 < is_ink.mean() < 0.5
    # Paper all around.
    assert not is_ink[0].any() and not is_ink[-1].any()
    assert not is_ink[:, 0].any() and not is_ink[:, -1].any()
  wide = rendered_words.render("mmmm", "DejaVuSans").image.shape[1]
  assert wide > rendered_words.render("iiii", "DejaVuSans").image.shape[1]


def test_pictures_are_a_function_of_the_seed():
  images = [rendered_words.render("and", "DejaVuSans", seed=i).image for i in (1, 1, 2)]
  np.testing.assert_array_equal(images[0], images[1])
  assert images[0].shape != images[2].shape or (images[0] != images[2]).any()


@pytest.mark.parametrize(
  "field, arguments",
  [
    ("faces", {"faces": rendered_words.FACES | {"test": ("DejaVuSans",)}}),
    ("faces", {"faces": {"train": ("DejaVuSans",)}}),
    ("face", {"faces": rendered_words.FACES | {"test": ("Comic",)}}),
    ("height", {"height": 8}),
    ("copies", {"copies": 0}),
    ("seed", {"seed": -1}),
    ("held_out", {"held_out": 2}),
    ("word", {"words": [" "]}),
  ],
)
def test_wrong_arguments_write_no_file(tmp_path, field, arguments):
  path = tmp_path / "words.npz"
  with pytest.raises(ValueError, match=field):
    rendered_words.load(path, **({"words": WORDS, "held_out": 3} | arguments))
  assert not path.exists()


def test_another_file_raises(tmp_path):
  path = tmp_path / "words.npz"
  path.write_text("words")
  with pytest.raises(ValueError, match=f"path.*{path}"):
    rendered_words.load(path, WORDS)
