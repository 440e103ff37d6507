"""Decodes an `EncoderDecoder` token by token, with cached keys and values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.adapters.outputs import select_inputs
from distill_jax.models.decoding.steps import DecoderSteps
from distill_jax.models.llm.head import head_logits
from distill_jax.models.seq2seq.encoder_decoder import EncoderDecoder, source_visible
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.types import Variables


class Seq2seqCache(NamedTuple):
  """What a step reads, rows first: for each block (keys, values) [B, length, heads, head_dim].

  Attributes:
    target: of the tokens so far.
    source: of the source's tokens, which all steps share.
    is_source: bool [B, S], False for padding.
  """

  target: tuple[tuple[jax.Array, jax.Array], ...]
  source: tuple[tuple[jax.Array, jax.Array], ...]
  is_source: jax.Array


def decoder_steps(
  make: Callable[[nnx.Rngs], EncoderDecoder],
  *,
  start_token: int | None = None,
  end_token: int | None = None,
) -> DecoderSteps:
  """Returns an `EncoderDecoder` as steps, for `models.decoding`: the encoder runs once a source.

  Args:
    make: function `(nnx.Rngs) -> EncoderDecoder`, as given to `from_nnx`.
    start_token: the decoder's first input; None: the config's.
    end_token: the token that ends a target; None: the config's.

  Returns:
    The steps; they read 'source' and 'source_segments' of a batch, and raise a ValueError in
    `start` for more positions than `max_length`.

  Raises:
    ValueError: a token that is None in the config too, or outside the vocabulary.

  >>> config = EncoderDecoderConfig(9, 8, encoder_layers=1, decoder_layers=1, num_heads=2)
  >>> make = lambda rngs: EncoderDecoder(config, rngs=rngs)
  >>> steps = decoder_steps(make, start_token=0, end_token=1)
  >>> variables = Variables(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0)))), {})
  >>> batch = {"source": jnp.ones((2, 5), int), "source_segments": jnp.zeros((2, 5), int)}
  >>> cache = steps.start(variables, batch, 3)
  >>> tokens = jnp.full(2, steps.start_token)
  >>> logits, cache = steps.step(variables, tokens, jnp.int32(0), cache)
  >>> logits.shape
  (2, 9)
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  config = abstract.config
  start_token = _token("start_token", start_token, config)
  end_token = _token("end_token", end_token, config)

  def start(variables: Variables, batch: Mapping[str, Any], length: int) -> Seq2seqCache:
    source, segments = select_inputs(batch, ("source", "source_segments"))
    return _start(nnx.merge(graph, variables.params), source, segments, length)

  def step(variables: Variables, tokens: jax.Array, position: jax.Array, cache: Seq2seqCache):
    return _step(nnx.merge(graph, variables.params), tokens, position, cache)

  return DecoderSteps(start, step, start_token, end_token, config.vocab_size, config.max_length)


def _token(field: str, token: int | None, config: EncoderDecoderConfig) -> int:
  token = getattr(config, field) if token is None else token
  if token is None:
    raise ValueError(f"{field}: expected a token, got None here and in the config: give it to one")
  return check_integer(field, token, 0, config.vocab_size - 1)


def _start(network: EncoderDecoder, source, segments, length: int) -> Seq2seqCache:
  config = network.config
  if length > config.max_length:
    raise ValueError(
      f"length: expected at most max_length={config.max_length} positions, got {length}"
    )
  encoded = network.encode(source, segments)["encoded"]
  shape = (source.shape[0], length, config.num_heads, config.head_dim)
  empty = jnp.zeros(shape, network.dtype)
  blocks = network.decoder.blocks
  return Seq2seqCache(
    target=tuple((empty, empty) for _ in blocks),
    source=tuple(block.cross.keys_values(encoded) for block in blocks),
    is_source=segments >= 0,
  )


def _step(network: EncoderDecoder, tokens, position, cache: Seq2seqCache):
  position = jnp.asarray(position)
  is_source = source_visible(jnp.where(cache.is_source, 0, -1))
  sources = [(*keys_values, is_source) for keys_values in cache.source]
  x = network.embed_target(tokens[:, None], position)
  hidden, target = network.decoder.extend(x, position, cache.target, sources)
  outputs = {"hidden": hidden[:, 0], "head": network.logits_head()}
  logits = head_logits(outputs)
  suppressed = list(network.config.suppressed_tokens)
  if suppressed:
    logits = logits.at[:, jnp.array(suppressed)].set(-jnp.inf)
  return logits, cache._replace(target=target)
