"""Text files as packed rows of tokens."""

import itertools
import os

import numpy as np
import pytest

from distill_jax import data
from distill_jax.data import text
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.text import BYTES

DOCUMENTS = [[7, 8, 9], [], [1, 2, 3, 4, 5, 6]]


def test_packed_rows_match_hand_written_ones():
  source = text.pack(DOCUMENTS, length=4)
  a = source.arrays
  end, none = 256, UNLABELED
  assert a["tokens"].tolist() == [[end, 7, 8, 9], [end, end, 1, 2], [3, 4, 5, 6]]
  assert a["label"].tolist() == [[7, 8, 9, end], [end, 1, 2, 3], [4, 5, 6, end]]
  assert a["segments"].tolist() == [[0, 0, 0, 0], [1, 2, 2, 2], [2, 2, 2, 2]]
  assert a["positions"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3]]
  filled = text.pack(DOCUMENTS, length=8).arrays
  assert filled["tokens"][1].tolist() == [3, 4, 5, 6] + [end] * 4
  assert filled["label"][1].tolist() == [4, 5, 6, end] + [none] * 4
  assert filled["segments"][1].tolist() == [2] * 4 + [-1] * 4
  assert source.classes == 257 and source.arrays["id"].tolist() == [0, 1, 2]


def test_each_document_can_begin_a_row():
  packed = text.pack([[1, 2], [3, 4, 5, 6], []], length=4, row_per_document=True)
  end = BYTES.end
  assert {name: x.tolist() for name, x in packed.arrays.items() if name != "id"} == {
    "tokens": [[end, 1, 2, end], [end, 3, 4, 5], [6, end, end, end], [end, end, end, end]],
    "label": [[1, 2, end, -1], [3, 4, 5, 6], [end, -1, -1, -1], [end, -1, -1, -1]],
    "segments": [[0, 0, 0, -1], [1, 1, 1, 1], [1, -1, -1, -1], [2, -1, -1, -1]],
    "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]],
  }


@pytest.mark.parametrize("length", [2, 3, 7, 64])
def test_every_token_is_predicted_once_in_its_document(length, rng):
  documents = [rng.integers(0, 256, n) for n in rng.integers(0, 20, 30)]
  a = text.pack(documents, length=length).arrays
  flat = {name: values.ravel() for name, values in a.items() if name != "id"}
  for number, document in enumerate(documents):
    here = flat["segments"] == number
    assert flat["label"][here].tolist() == [*document, 256]
    assert flat["tokens"][here].tolist() == [256, *document]
  for segments, positions in zip(a["segments"], a["positions"]):
    for _, part in itertools.groupby(zip(segments, positions), key=lambda pair: pair[0]):
      count = [position for segment, position in part if segment >= 0]
      assert count == list(range(len(count)))
  assert (flat["label"][flat["segments"] < 0] == UNLABELED).all()


def test_files_of_any_bytes_are_read_in_path_order(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "x.txt").write_bytes(b"\xff\x00z")
  (tmp_path / "a.txt").write_text("naïve")
  (tmp_path / "note.md").write_text("no")
  source = text.load(tmp_path, length=16)
  tokens = source.arrays["tokens"][0]
  assert tokens.tolist() == [256, *"naïve".encode(), 256, 255, 0, 122] + [256] * 5
  assert BYTES.decode(tokens[1:7]) == "naïve" and BYTES.decode([65, 256, 255]) == "A\ufffd\ufffd"
  assert source.name == tmp_path.name
  assert text.load(tmp_path / "a.txt", length=16).arrays["tokens"].shape == (1, 16)


def test_pipes_and_broken_links_are_named(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  pipe = tmp_path / "b.txt"
  os.mkfifo(pipe)
  with pytest.raises(ValueError, match=r"^path: .*b\.txt"):
    text.load(tmp_path, length=4)
  with pytest.raises(ValueError, match=r"b\.txt"):
    text.bpe(pipe)
  pipe.unlink()
  pipe.symlink_to(tmp_path / "absent")
  with pytest.raises(ValueError, match=r"^path: .*b\.txt"):
    text.load(tmp_path, length=4)


def test_separator_splits_a_file_into_documents(tmp_path):
  (tmp_path / "all.txt").write_text("one\n\ntwo\n\n\n\nthree\n\n")
  a = text.load(tmp_path / "all.txt", length=20, separator="\n\n").arrays
  assert a["segments"].tolist() == [[0] * 4 + [1] * 4 + [2] * 6 + [-1] * 6]


def test_batches_follow_from_the_step(tmp_path, rng):
  (tmp_path / "a.txt").write_bytes(rng.integers(0, 256, 999, np.uint8).tobytes())
  source = text.load(tmp_path, length=16)
  stream, later = data.batches(source, 8, seed=1), data.batches(source, 8, seed=1, start=9)
  for _ in range(9):
    next(stream)
  for _ in range(3):
    a, b = next(stream), next(later)
    assert all((a[name] == b[name]).all() for name in a)
    assert a["tokens"].shape == (8, 16) and a["tokens"].dtype == np.int32
    assert (source.arrays["tokens"][a["id"]] == a["tokens"]).all()


@pytest.mark.parametrize(
  "documents, length, field",
  [
    ([], 4, "documents"),
    ([[1]], 1, "length"),
    ([[1], [257]], 4, "documents: .*document 1"),
    ([[-1]], 4, "documents: .*document 0"),
    ([[0.5]], 4, "documents: .*document 0"),
  ],
)
def test_documents_that_cannot_be_packed_raise(documents, length, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    text.pack(documents, length=length)


def test_missing_text_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    text.load(tmp_path / "nowhere", length=4)
  with pytest.raises(ValueError, match=r"^suffix:"):
    text.load(tmp_path, length=4)
  (tmp_path / "a.txt").write_text("")
  with pytest.raises(ValueError, match=r"^path:"):
    text.load(tmp_path, length=4)


WORDS = "the quick brown fox jumps over the lazy dog, then the quick fox naps. naïve 日本\n" * 20


def test_bpe_decodes_its_tokens(tmp_path):
  pytest.importorskip("tokenizers")
  (tmp_path / "a.txt").write_text(WORDS)
  trained = text.train_bpe(tmp_path, size=300)
  tokenizer = text.bpe(trained)
  assert tokenizer.size == 300 and tokenizer.end == 0
  source = text.load(tmp_path, length=32, tokenizer=tokenizer)
  tokens = source.arrays["label"][source.arrays["segments"] == 0]
  assert tokens[-1] == 0 and tokenizer.decode(tokens[:-1]) == WORDS
  assert len(tokens) < 0.5 * len(WORDS.encode()) and source.classes == 300
  trained.save(str(tmp_path / "tokenizer.json"))
  again = text.bpe(tmp_path / "tokenizer.json")
  assert (
    again.identity == tokenizer.identity != text.bpe(text.train_bpe(tmp_path, size=290)).identity
  )
  assert (again.encode(WORDS.encode()) == tokenizer.encode(WORDS.encode())).all()


def test_invalid_text_and_tokenizers_raise(tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  (tmp_path / "a.txt").write_text(WORDS)
  tokenizer = text.bpe(text.train_bpe(tmp_path, size=257))
  (tmp_path / "b.txt").write_bytes(b"abc\xff")
  with pytest.raises(ValueError, match=r"b\.txt: .*UTF-8.* at 3"):
    text.load(tmp_path, length=8, tokenizer=tokenizer)
  with pytest.raises(ValueError, match=r"b\.txt: .*UTF-8.* at 3"):
    text.train_bpe(tmp_path, size=300)
  with pytest.raises(ValueError, match=r"^size:"):
    text.train_bpe(tmp_path, size=99)
  with pytest.raises(ValueError, match=r"^source:"):
    text.bpe(tmp_path / "a.txt")
  with pytest.raises(ValueError, match=r"^end:"):
    text.bpe(tokenizers.Tokenizer(tokenizers.models.BPE()))
