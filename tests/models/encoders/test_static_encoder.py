"""The smallest encoder: the mean of one vector for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from distill_jax.data import text
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.encoders.static_encoder import StaticEncoder, token_vectors

WORDS = ["[PAD]", "[unused0]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(15))]


@pytest.fixture(scope="module")
def tokenizer():
  words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  words.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
  return text.sentence_tokenizer(words)


def teacher(output="embedding", **options):
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)), jnp.float32)

  def apply(weights, tokens, segments):
    return {output: jnp.where(segments[..., None] >= 0, weights[tokens], 0).sum(1)}

  return from_apply(
    None, apply, **{"variables": weights, "inputs": ("tokens", "segments"), **options}
  )


def test_vectors_are_weighted_components_of_the_teachers_embeddings(tokenizer):
  vectors = token_vectors(teacher(), tokenizer, 5, smoothing=0.01, batch_size=4)
  assert vectors.shape == (20, 5) and vectors.dtype == np.float32
  np.testing.assert_array_equal(vectors[:4], 0)  # Special and unused ones.
  rows = np.asarray(teacher().variables.params, np.float64)
  embeddings = rows[4:] + rows[2] + rows[3]
  centered = embeddings - embeddings.mean(0)
  _, directions = np.linalg.eigh(centered.T @ centered)
  p = 1 / np.arange(2, 18)
  weights = 0.01 / (0.01 + p / p.sum())
  expected = weights[:, None] * (centered @ directions[:, -5:])
  # Signs are free: inner products are not.
  np.testing.assert_allclose(vectors[4:] @ vectors[4:].T, expected @ expected.T, atol=1e-5)


def test_embedding_is_the_mean_of_the_tokens_that_are_not_padding(rng):
  vectors = rng.normal(size=(20, 5))
  inputs = ("tokens", "segments")
  model = from_nnx(lambda rngs: StaticEncoder(vectors, rngs=rngs), inputs=inputs)
  variables = model.init(jax.random.key(0), {})
  batch = {"tokens": rng.integers(0, 20, (3, 6))}
  batch["segments"] = np.where(np.arange(6) < np.array([[6], [2], [1]]), 0, -1)
  embedding = model.apply(*variables, batch, train=False, key=None)[0]["embedding"]
  for row, (tokens, count) in enumerate(zip(batch["tokens"], (6, 2, 1))):
    np.testing.assert_allclose(embedding[row], vectors[tokens[:count]].mean(0), rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "arguments", "field"),
  [
    ({}, {"width": 0}, "width"),
    ({}, {"width": 9}, "width"),
    ({}, {"smoothing": 0}, "smoothing"),
    ({}, {"batch_size": 0}, "batch_size"),
    ({"output": "hidden"}, {}, "teacher"),
  ],
)
def test_what_does_not_fit_is_named(options, arguments, field, tokenizer):
  with pytest.raises(ValueError, match=f"^{field}"):
    token_vectors(teacher(**options), tokenizer, **{"width": 4, **arguments})


def test_teacher_without_weights_raises(tokenizer):
  with pytest.raises(ValueError, match="^teacher"):
    token_vectors(teacher()._replace(variables=None), tokenizer, 4)
