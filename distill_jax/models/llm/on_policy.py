"""Sequences of the student's own making, for a teacher to judge: on-policy distillation of language models.

step = make_train_step(..., on_policy=generate_on_policy(make_student, share=0.5, prompt=64, stop=tokenizer.end))
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.data.checks import UNLABELED
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.llm.sampling import generate
from distill_jax.types import Batch, OnPolicy, Variables


def generate_on_policy(
  make: Callable[[nnx.Rngs], Decoder],
  *,
  share: float,
  prompt: int | float,
  temperature: float = 1.0,
  stop: int | None = None,
) -> OnPolicy:
  """Replaces a share of a batch's rows by what the student writes (GKD, Agarwal et al. 2024, algorithm 1).

  A row that is replaced keeps the beginning of its first document, at most `prompt` tokens, and the student samples
  the rest of the row. GKD draws for a whole batch whether it is replaced; here the share is one of rows, so that every
  batch costs the same. The rows and their tokens are drawn by key and id: they do not depend on the devices.

  Args:
    make: of the student, as given to `from_nnx`.
    share: of the rows that are replaced, lambda in GKD, in [0, 1]; rounded to a whole number of rows. Equal parts of
      the batch have equally many of them, so that on a mesh every device samples its own.
    prompt: tokens that are kept at most, an int >= 1; or a share of the row in (0, 1), a float.
    temperature: 0 takes the most probable token.
    stop: the token that ends a document, where a row ends (`Tokenizer.end`); None: rows are filled.

  Returns:
    `(student Variables, key, batch) -> batch`, for `make_train_step` and `fit`. Of the batch it needs 'id' [B] and
    'tokens' [B, L], and changes, where a row is replaced:
      tokens: prompt, sample, then 0.
      label: the next token, where it is sampled; else `UNLABELED`. The last token's is not known.
      segments, positions (if the batch has them): those of one document; the segment is -1 behind its end.
      sampled: bool [B], new: the rows that were replaced. Their labels are no truth: accuracy, `objectives.labels`,
        `next_tokens` and the hard-label part of `tokens` leave them out. Divergences that take labels (DKD) do not.
    A row whose first segment is -1 has no document to go on with, and stays as it is.

  Raises:
    ValueError: `make` makes no `Decoder`; a number outside its range; when called, a share of less than half a row, a
      prompt that is not shorter than the row, rows longer than the model's length, or entries that are missing.
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  if not isinstance(abstract, Decoder):
    raise ValueError(
      f"make: expected a function that makes a Decoder, got a {type(abstract).__name__}"
    )
  _check_numbers(share, prompt, temperature, stop, abstract.embed.num_embeddings)
  graph = nnx.graphdef(abstract)

  def on_policy(student: Variables, key: jax.Array, batch: Batch) -> Batch:
    _check_entries(batch)
    rows, length = batch["tokens"].shape
    ranks, count = _ranked(key, batch["id"], share)
    if not count:
      return {**batch, "generated": jnp.zeros(rows, bool)}
    named = {name: batch[name] for name in ("id", "tokens", "segments") if name in batch}
    chosen = {name: _first(x, ranks, count) for name, x in named.items()}
    prompts = _prompt_lengths(chosen, _kept(prompt, length))
    made = generate(
      nnx.merge(graph, student.params),
      chosen["tokens"],
      jnp.maximum(prompts, 1),
      length,
      temperature=temperature,
      key=_keys(jax.random.fold_in(key, 1), chosen["id"]),
      stop=stop,
    )
    new = _as_rows(*made, prompts, chosen)
    return {**batch, **_replaced(batch, new, ranks, count)}

  return on_policy


def _check_numbers(share, prompt, temperature, stop, vocabulary: int) -> None:
  if not 0 <= share <= 1:
    raise ValueError(
      f"share: expected a number in [0, 1], got {share}; nearest is {min(max(share, 0), 1)}"
    )
  if isinstance(prompt, float) and not 0 < prompt < 1:
    raise ValueError(
      f"prompt: a float is a share of the row, in (0, 1), got {prompt}; tokens are an int"
    )
  if prompt < 1 and not isinstance(prompt, float):
    raise ValueError(
      f"prompt: expected at least 1 token for the student to go on from, got {prompt}"
    )
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
  if stop is not None and not 0 <= stop < vocabulary:
    raise ValueError(f"stop: token {stop} is outside the vocabulary of {vocabulary}")


def _check_entries(batch: Batch) -> None:
  for name in ("id", "tokens", "label"):
    if name not in batch:
      raise ValueError(
        f"the batch has no entry {name!r}: on-policy rows need it; there are {sorted(batch)}"
      )
  shapes = {
    name: batch[name].shape
    for name in ("tokens", "label", "segments", "positions")
    if name in batch
  }
  if len(shapes["tokens"]) != 2 or len(set(shapes.values())) > 1:
    raise ValueError(f"on-policy rows: expected entries of one shape [rows, length], got {shapes}")


def _kept(prompt: int | float, length: int) -> int:
  kept = max(1, round(prompt * length)) if isinstance(prompt, float) else prompt
  if kept >= length:
    raise ValueError(
      f"prompt: {kept} tokens leave nothing to sample of rows of {length}; at most {length - 1}"
    )
  return kept


def _keys(key, ids):
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _ranked(key, ids, share: float) -> tuple[jax.Array, int]:
  """A random rank of every row in its group, [groups, rows of a group], and how many of each group are chosen.

  As many groups as share the chosen rows evenly: choosing them moves no rows between devices that hold whole groups.
  """
  rows = len(ids)
  total = round(share * rows)
  if share and not total:
    raise ValueError(f"share: {share} of {rows} rows is not one row; nearest is {1 / rows:.3g}")
  groups = math.gcd(total, rows)
  drawn = jax.vmap(jax.random.uniform)(_keys(jax.random.fold_in(key, 0), ids)).reshape(groups, -1)
  return drawn.argsort(1).argsort(1), total // groups


def _first(x, ranks, count: int):
  """The rows of [B, ...] that have the first ranks of their groups, in the order of ranks."""
  return _take(x.reshape(*ranks.shape, *x.shape[1:]), ranks.argsort(1)[:, :count])


def _take(grouped, places):
  places = places.reshape(*places.shape, *(1,) * (grouped.ndim - 2))
  taken = jnp.take_along_axis(grouped, places, 1)
  return taken.reshape(-1, *taken.shape[2:])


def _prompt_lengths(chosen: Mapping[str, Any], kept: int) -> jax.Array:
  """Of each row's first document; 0 where there is none."""
  tokens = chosen["tokens"]
  segments = chosen.get("segments", jnp.zeros_like(tokens))
  begun = jnp.cumprod(segments == segments[:, :1], 1).sum(1)
  return jnp.where(segments[:, 0] >= 0, jnp.minimum(begun, kept), 0)


def _as_rows(tokens, ends, prompts, chosen: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The entries of rows that hold one document of `ends` tokens, whose first `prompts` are not sampled."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = places < ends[:, None]
  sampled = (places + 1 >= prompts[:, None]) & (places + 1 < ends[:, None])
  return {
    "tokens": tokens,
    "label": jnp.where(sampled, jnp.roll(tokens, -1, 1), UNLABELED),
    "segments": jnp.where(inside, chosen["segments"][:, :1] if "segments" in chosen else 0, -1),
    "positions": jnp.where(inside, places, 0),
    "generated": prompts > 0,
  }


def _replaced(
  batch: Batch, new: Mapping[str, jax.Array], ranks, count: int
) -> dict[str, jax.Array]:
  """The entries of the batch with the new rows in the places of the chosen ones."""
  old = {name: batch[name] for name in new if name in batch} | {
    "generated": jnp.zeros(ranks.size, bool)
  }
  place = jnp.minimum(ranks, count - 1)

  def put(name):
    grouped = new[name].reshape(-1, count, *new[name].shape[1:])
    return _take(grouped, place).astype(old[name].dtype)

  made = {name: put(name) for name in old}
  taken = (ranks < count).reshape(-1) & made["generated"]
  keep = {n: taken.reshape(-1, *(1,) * (x.ndim - 1)) for n, x in made.items()}
  return {name: jnp.where(keep[name], made[name], old[name]) for name in old}
