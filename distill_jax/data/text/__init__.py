"""Text as rows of tokens: packed in memory, tokenized once into a file, or streamed while training.

>>> pack([BYTES.encode(b"to be"), BYTES.encode(b"or not")], length=8).arrays["tokens"].shape
(2, 8)
"""

from distill_jax.data.text.packed import (
  BYTES,
  END,
  Tokenizer,
  bpe,
  check_same,
  documents_of,
  load,
  pack,
  train_bpe,
)

__all__ = [
  "BYTES",
  "END",
  "Tokenizer",
  "bpe",
  "check_same",
  "documents_of",
  "load",
  "pack",
  "train_bpe",
]
