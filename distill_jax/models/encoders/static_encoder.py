"""Defines the smallest encoder of sentences: the mean of one vector for each token.

    vectors = token_vectors(teacher, tokenizer, 128)
    student = from_nnx(
      lambda rngs: StaticEncoder(vectors, rngs=rngs), inputs=("tokens", "segments")
    )

It is a student as any other: `fit` trains the vectors further.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.data.text.sentences import SentenceTokenizer
from distill_jax.errors import check_integer
from distill_jax.models.llm.token_rows import check_token_rows, embed_tokens, mean_of_tokens
from distill_jax.types import Model, Outputs

_UNUSED = re.compile(r"\[unused\d+\]")


class StaticEncoder(nnx.Module):
  """The mean of the tokens' vectors, as output 'embedding' [B, width].

  >>> encoder = StaticEncoder(np.eye(3), rngs=nnx.Rngs(0))
  >>> encoder(jnp.array([[0, 1, 2]]), jnp.array([[0, 0, -1]]))["embedding"]
  Array([[0.5, 0.5, 0. ]], dtype=float32)
  """

  def __init__(self, vectors: np.ndarray, *, rngs: nnx.Rngs):
    """Copies the vectors, such as `token_vectors` returns, [vocabulary, width]."""
    self.embed = nnx.Embed(*np.shape(vectors), rngs=rngs)
    self.embed.embedding[...] = jnp.asarray(vectors, jnp.float32)

  def __call__(self, tokens: jax.Array, segments: jax.Array | None = None) -> Outputs:
    """Returns the embedding of each row.

    Args:
      tokens: int [B, L]; a token outside of the vocabulary makes its row NaN.
      segments: int [B, L], negative for padding; None: there is none.
    """
    check_token_rows(tokens, tokens.shape[-1], segments=segments)
    vectors = embed_tokens(self.embed, tokens, jnp.float32)
    return {"embedding": mean_of_tokens(vectors, segments)}


def token_vectors(
  teacher: Model,
  tokenizer: SentenceTokenizer,
  width: int,
  *,
  smoothing: float = 1e-4,
  batch_size: int = 256,
) -> np.ndarray:
  """Returns a vector of each token, float32 [tokenizer.size, width], from a teacher alone.

  The teacher embeds each token as a sentence. The principal components of these embeddings, times
  a / (a + p) (Arora et al. 2017, section 3), are the vectors, as in model2vec. There is no text to
  count, so that the probability p of a token is that of Zipf's law: its number in the vocabulary
  stands for its rank, as vocabularies begin with frequent tokens. Special tokens get zeros.

  Args:
    teacher: has `variables`, reads 'tokens', 'segments' and 'token_types' at most, and outputs
      'embedding' [B, D].
    tokenizer: the teacher's.
    width: number of principal components, at most D.
    smoothing: a, above 0; the smaller it is, the less frequent tokens count.
    batch_size: tokens that the teacher embeds at once.

  Raises:
    ValueError: a teacher without variables or with another output, or a number out of its range.
  """
  from sklearn.decomposition import PCA

  check_integer("width", width, 1)
  if not smoothing > 0:
    raise ValueError(f"smoothing: expected a number above 0, got {smoothing}")
  if teacher.variables is None:
    raise ValueError("teacher: expected a Model with variables, got none: load its weights")
  words = tokenizer.tokenizer
  added = words.get_added_tokens_decoder().items()
  special = {tokenizer.pad, *(i for i, token in added if token.special)}
  numbers = [
    i
    for i in range(tokenizer.size)
    if i not in special and not _UNUSED.fullmatch(words.id_to_token(i) or "")
  ]
  around = words.encode("").ids  # [CLS] and [SEP], if it adds them.
  rows = [[*around[:1], i, *around[1:]] for i in numbers]
  embeddings = _embed(teacher, np.array(rows, np.int32), batch_size)
  if not width <= min(embeddings.shape):
    raise ValueError(f"width: expected at most {min(embeddings.shape)}, got {width}")
  inverse = 1 / np.arange(2, len(numbers) + 2)
  weights = smoothing / (smoothing + inverse / inverse.sum())
  components = PCA(width, svd_solver="covariance_eigh").fit_transform(embeddings)
  vectors = np.zeros((tokenizer.size, width), np.float32)
  vectors[numbers] = weights[:, None] * components
  return vectors


def _embed(teacher: Model, rows: np.ndarray, batch_size: int) -> np.ndarray:
  """Returns the teacher's embeddings of rows of tokens, float64; all batches have one size."""

  @jax.jit
  def run(variables, tokens):
    zeros = jnp.zeros_like(tokens)
    batch = {"tokens": tokens, "segments": zeros, "token_types": zeros}
    return teacher.apply(*variables, batch, train=False, key=None)[0]

  parts = []
  for start in range(0, len(rows), check_integer("batch_size", batch_size, 1)):
    part = rows[start : start + batch_size]
    outputs = run(teacher.variables, np.resize(part, (batch_size, rows.shape[1])))
    if "embedding" not in outputs or outputs["embedding"].ndim != 2:
      raise ValueError(
        f"teacher: expected the output 'embedding' [rows, width], got {sorted(outputs)}"
      )
    parts.append(np.asarray(outputs["embedding"], np.float64)[: len(part)])
  return np.concatenate(parts)
