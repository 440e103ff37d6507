"""Packs text into rows of tokens: in memory, or from a file that is read while training.

>>> pack([BYTES.encode(b"to be"), BYTES.encode(b"or not")], length=8).arrays["tokens"].shape
(2, 8)
"""

from distill_jax.data.text.bpe import END, bpe, train_bpe
from distill_jax.data.text.documents import read_documents
from distill_jax.data.text.packed import load, pack
from distill_jax.data.text.tokenizer import BYTES, Tokenizer, check_same_tokenizer

__all__ = [
  "BYTES",
  "END",
  "Tokenizer",
  "bpe",
  "check_same_tokenizer",
  "load",
  "pack",
  "read_documents",
  "train_bpe",
]
