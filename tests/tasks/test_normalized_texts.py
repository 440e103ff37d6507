"""Texts that are compared after a normalizer."""

import numpy as np
import pytest

from distill_jax import tasks


def test_normalizer():
  for normalizer, expected in ((tasks.normalize_transcript, 0), (None, 1)):
    task = tasks.transcription(lambda ids: ["A,", "a  "][ids[0]], blank=9, normalizer=normalizer)
    predictions = {"tokens": np.array([[0]]), "label": np.array([[1, 9]])}
    assert task.evaluate_predictions(predictions, {})["wer"] == expected


@pytest.mark.parametrize(
  "text, expected",
  [
    ("Don't don’t don‘t donʼt 60's", "don't don't don't don't 60's"),
    ("‘quoted’ 'quoted' “quoted”", "quoted quoted quoted"),
    ("rock 'n' roll, rock ’n’ roll", "rock n roll rock n roll"),
    ("the dogs' '' it'", "the dogs it"),
    ("co\u00adop zero\u200b\u200c\u200dwidth \ufeffdon\u200b’t", "coop zerowidth don't"),
    ("e\u200d\u0301té l\u2019e\u0301te\u0301", "été l'été"),
    ("क्षि'क", "क्षि'क"),  # A mark is a part of its letter.
    ("don´t ¨a¸ 3.14", "don t a 3 14"),  # NFKC makes a mark of an accent that stands alone.
    ("I ❤️ you 1️⃣ go\ta\x00b", "i you 1 go ab"),
    ("", ""),
  ],
)
def test_normalized_apostrophes_and_invisible_characters(text, expected):
  assert tasks.normalize_transcript(text) == expected
  assert tasks.normalize_transcript(expected) == expected
