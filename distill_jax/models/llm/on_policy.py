"""Replaces rows of a batch by text of the student: on-policy distillation of language models.

on_policy = generate_on_policy(make_student, fraction=0.5, prompt=64, stop_token=tokenizer.end)
step = make_train_step(..., on_policy=on_policy)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.data.label_checks import UNLABELED
from distill_jax.models.generated_rows import (
  check_entries,
  check_fraction,
  first_rows,
  rank_rows,
  replace_rows,
  row_keys,
)
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.llm.sampling import generate
from distill_jax.types import Batch, OnPolicy, Variables


def generate_on_policy(
  make: Callable[[nnx.Rngs], Decoder],
  *,
  fraction: float,
  prompt: int | float,
  temperature: float = 1.0,
  stop_token: int | None = None,
) -> OnPolicy:
  """Returns a function that replaces a fraction of a batch's rows by text of the student.

  A replaced row keeps the beginning of its first document, at most `prompt` tokens, and the student
  samples the rest of the row. GKD decides at random for each batch whether it is replaced; here the
  fraction is one of rows, so that every batch costs the same. Rows and tokens are sampled by key
  and id: they do not depend on the devices.
  Source: GKD, Agarwal et al. 2024, algorithm 1.

  Args:
    make: function `(nnx.Rngs) -> Decoder` of the student, as given to `from_nnx`.
    fraction: fraction of the rows to replace, lambda in GKD, in [0, 1]; rounded to a number of
      rows. Equal parts of the batch have equally many of them, so that on a mesh every device
      samples its own.
    prompt: maximum number of prompt tokens, an int >= 1; or a fraction of the row's length in (0,
      1), a float.
    temperature: temperature of the samples; 0 takes the most probable token.
    stop_token: token that ends a document, and with it the row (`Tokenizer.end`); None: rows are
      filled.

  Returns:
    `(student Variables, key, batch) -> batch`, for `make_train_step` and `fit`. It needs 'id' [B],
    'tokens' [B, L] and 'label' [B, L]. Of a replaced row it changes:
      tokens: the prompt, the sample, then 0.
      label: the next token where that is sampled, else `UNLABELED`; the last token has none.
      segments, positions (if the batch has them): those of one document; the segment is -1 after
        its end.
    and it adds:
      generated: bool [B], the replaced rows. Their labels are not the truth: accuracy,
        `objectives.labels`, `next_tokens` and the hard-label part of `tokens` leave them out.
        Divergences that take labels (DKD) do not.
    A row whose first segment is -1 has no document to continue, and stays as it is.

  Raises:
    ValueError: `make` makes no `Decoder`; a number outside its range; when called, a fraction of
      less than half a row, a prompt that is not shorter than the row, rows above the model's
      max_length, or missing entries.
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  if not isinstance(abstract, Decoder):
    raise ValueError(
      f"make: expected a function that returns a Decoder, got a {type(abstract).__name__}"
    )
  _check_arguments(fraction, prompt, temperature, stop_token, abstract.embed.num_embeddings)
  graph = nnx.graphdef(abstract)

  def on_policy(student: Variables, key: jax.Array, batch: Batch) -> Batch:
    check_entries(batch, ("tokens", "label", "segments", "positions"))
    rows, length = batch["tokens"].shape
    ranks, count = rank_rows(key, batch["id"], fraction)
    if not count:
      return {**batch, "generated": jnp.zeros(rows, bool)}
    entries = {name: batch[name] for name in ("id", "tokens", "segments") if name in batch}
    selected = {name: first_rows(x, ranks, count) for name, x in entries.items()}
    prompt_lengths = _prompt_lengths(selected, _max_prompt(prompt, length))
    tokens, ends = generate(
      nnx.merge(graph, student.params),
      selected["tokens"],
      jnp.maximum(prompt_lengths, 1),
      length,
      temperature=temperature,
      key=row_keys(jax.random.fold_in(key, 1), selected["id"]),
      stop_token=stop_token,
    )
    new = _as_rows(tokens, ends, prompt_lengths, selected)
    return {**batch, **replace_rows(batch, new, ranks, count)}

  return on_policy


def _check_arguments(fraction, prompt, temperature, stop_token, vocab_size: int) -> None:
  check_fraction(fraction)
  if isinstance(prompt, float) and not 0 < prompt < 1:
    raise ValueError(
      f"prompt: expected a fraction of the row in (0, 1), or an int of tokens, got {prompt}"
    )
  if prompt < 1 and not isinstance(prompt, float):
    raise ValueError(f"prompt: expected at least 1 token to continue from, got {prompt}")
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
  if stop_token is not None and not 0 <= stop_token < vocab_size:
    raise ValueError(f"stop_token: expected a token below {vocab_size}, got {stop_token}")


def _max_prompt(prompt: int | float, length: int) -> int:
  tokens = max(1, round(prompt * length)) if isinstance(prompt, float) else prompt
  if tokens >= length:
    raise ValueError(
      f"prompt: expected at most {length - 1} tokens of rows of {length}, got {tokens}"
    )
  return tokens


def _prompt_lengths(selected: Mapping[str, Any], max_prompt: int) -> jax.Array:
  """Returns the prompt length of each row's first document; 0 for a row without one."""
  tokens = selected["tokens"]
  segments = selected.get("segments", jnp.zeros_like(tokens))
  same = (segments == segments[:, :1]).astype(jnp.int32)
  lengths = jnp.cumprod(same, 1).sum(1, dtype=jnp.int32)
  return jnp.where(segments[:, 0] >= 0, jnp.minimum(lengths, max_prompt), 0)


def _as_rows(tokens, ends, prompt_lengths, selected: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns the entries of rows with one document of `ends` tokens, sampled after the prompt."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=ends.dtype), tokens.shape)
  inside = positions < ends[:, None]
  next_is_sampled = (positions + 1 >= prompt_lengths[:, None]) & (positions + 1 < ends[:, None])
  segment = selected["segments"][:, :1] if "segments" in selected else 0
  return {
    "tokens": tokens,
    "label": jnp.where(next_is_sampled, jnp.roll(tokens, -1, 1), UNLABELED),
    "segments": jnp.where(inside, segment, -1),
    "positions": jnp.where(inside, positions, 0),
    "generated": prompt_lengths > 0,
  }
