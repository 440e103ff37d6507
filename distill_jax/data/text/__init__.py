"""Turns text into rows of tokens: packed documents for decoders, padded sentences for encoders,
pairs for encoder-decoder networks, recordings and pictures of lines with their transcripts.

Documents are packed in memory, or from a file that is read while training.

>>> pack([BYTES.encode(b"to be"), BYTES.encode(b"or not")], length=8).arrays["tokens"].shape
(2, 8)
"""

from distill_jax.data.text.bpe import END, bpe, train_bpe
from distill_jax.data.text.buckets import LengthBuckets, cut_padding
from distill_jax.data.text.documents import read_documents
from distill_jax.data.text.masked_tokens import mask_tokens
from distill_jax.data.text.packed import load, pack
from distill_jax.data.text.pairs import check_pairs, pair_rows, pair_source
from distill_jax.data.text.sentences import SentenceTokenizer, sentence_tokenizer
from distill_jax.data.text.sequences import (
  SequenceTokenizer,
  sequence_tokenizer,
  symbol_tokenizer,
  train_pair_bpe,
)
from distill_jax.data.text.tokenizer import BYTES, Tokenizer, check_same_tokenizer
from distill_jax.data.text.transcript_checks import check_transcripts
from distill_jax.data.text.transcripts import character_tokenizer, line_source, speech_source

__all__ = [
  "BYTES",
  "END",
  "LengthBuckets",
  "SentenceTokenizer",
  "SequenceTokenizer",
  "Tokenizer",
  "bpe",
  "character_tokenizer",
  "check_pairs",
  "check_same_tokenizer",
  "check_transcripts",
  "cut_padding",
  "line_source",
  "load",
  "mask_tokens",
  "pack",
  "pair_rows",
  "pair_source",
  "read_documents",
  "sentence_tokenizer",
  "sequence_tokenizer",
  "speech_source",
  "symbol_tokenizer",
  "train_bpe",
  "train_pair_bpe",
]
