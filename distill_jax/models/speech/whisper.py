"""Defines Whisper (Radford et al. 2022, arXiv:2212.04356), and its steps for decoding.

    config = read_whisper_config("whisper-tiny.en")
    student = from_nnx(
      lambda rngs: Whisper(dataclasses.replace(config, decoder_layers=2), rngs=rngs),
      inputs=INPUTS,
    )

The objectives of language models take it as it is, as they take an `EncoderDecoder`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.adapters.outputs import select_inputs
from distill_jax.models.decoding.steps import DecoderSteps
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.token_rows import check_token_rows, embed_tokens
from distill_jax.models.remat import check_policy
from distill_jax.models.seq2seq.cached_steps import Seq2seqCache
from distill_jax.models.seq2seq.stack import Stack
from distill_jax.models.speech.whisper_config import WhisperConfig
from distill_jax.types import Outputs, Variables

INPUTS = ("features", "tokens")
"""The entries of a batch that a `Whisper` reads, in order."""

_STRIDE = 2  # Of the second convolution.


class Whisper(nnx.Module):
  """An encoder of log-mel features, and a causal decoder that attends to it.

  Its outputs are those of an `EncoderDecoder`, where S = ceil(T / 2).

  >>> config = WhisperConfig(100, 16, 2, 1, num_heads=2, source_length=20)
  >>> outputs = Whisper(config, rngs=nnx.Rngs(0))(jnp.ones((3, 40, 80)), jnp.ones((3, 5), int))
  >>> outputs["hidden"].shape, outputs["cross_attention1"].shape
  ((3, 5, 16), (3, 2, 5, 20))
  """

  def __init__(self, config: WhisperConfig, *, dtype: Any = None, remat: str = "", rngs: nnx.Rngs):
    """Builds the layers; arguments and errors as in `EncoderDecoder`."""
    check_policy(remat)
    self.config = config
    self.dtype = dtype or jnp.float32
    width = config.embed_dim
    normal = nnx.initializers.normal(width**-0.5)
    options = {"dtype": self.dtype, "remat": remat, "rngs": rngs}
    self.encoder = WhisperEncoder(config, **options)
    self.embed = nnx.Embed(config.vocab_size, width, embedding_init=normal, rngs=rngs)
    self.positions = nnx.Param(normal(rngs.params(), (config.max_length, width), jnp.float32))
    self.decoder = Stack(config.blocks, decoder=True, **options)

  def __call__(self, features: jax.Array, tokens: jax.Array) -> Outputs:
    """Returns the outputs of pairs of sounds and targets.

    Args:
      features: float [B, T, num_features], those of `data.audio.whisper_log_mel`. Whisper has no
        mask: silence up to the end is part of a sound.
      tokens: int [B, L], the decoder's inputs, as in `EncoderDecoder`.

    Raises:
      ValueError: no frames or tokens, more than there are positions, or another shape.
    """
    outputs = self.encode(features)
    return {**outputs, **self.decode(tokens, outputs["encoded"])}

  def encode(self, features: jax.Array) -> Outputs:
    """Returns the encoder's outputs; arguments and errors as in `__call__`."""
    x, named = self.encoder(features)
    return {f"encoder_{name}": value for name, value in named.items()} | {"encoded": x}

  def decode(self, tokens: jax.Array, encoded: jax.Array) -> Outputs:
    """Returns the decoder's outputs for encoded sounds [B, S, embed_dim]."""
    check_token_rows(tokens, self.config.max_length)
    length = tokens.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    x = self.embed_target(tokens, 0)
    x, named = self.decoder(x, visible, encoded, None)
    return {**named, "hidden": x, "head": self.logits_head()}

  def embed_target(self, tokens: jax.Array, position: jax.Array | int) -> jax.Array:
    """Returns what enters the decoder for tokens [B, L], the first of them at `position`."""
    x = embed_tokens(self.embed, tokens, self.dtype)
    table = self.positions[...]
    return x + jax.lax.dynamic_slice_in_dim(table, position, tokens.shape[1]).astype(self.dtype)

  def logits_head(self) -> tuple[jax.Array, None, None]:
    """Returns the output 'head'."""
    return self.embed.embedding[...].T.astype(self.dtype), None, None


class WhisperEncoder(nnx.Module):
  """Two convolutions over time, of which the second halves it, positions, and blocks."""

  def __init__(self, config: WhisperConfig, *, dtype: Any, remat: str, rngs: nnx.Rngs):
    width = config.embed_dim
    options = {"dtype": dtype, "rngs": rngs}
    self.config = config
    self.dtype = dtype
    sizes = ((config.num_features, 1), (width, _STRIDE))
    self.convs = nnx.data(
      [nnx.Conv(n, width, (3,), strides=s, padding=[(1, 1)], **options) for n, s in sizes]
    )
    self.positions = nnx.Param(jnp.asarray(_sinusoids(config.source_length, width)))
    self.stack = Stack(config.blocks, decoder=False, remat=remat, **options)

  def __call__(self, features: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the encoded sounds [B, S, embed_dim] and the named outputs of the blocks."""
    self._check(features)
    x = features.astype(self.dtype)
    for conv in self.convs:
      x = jax.nn.gelu(conv(x), approximate=False)
    x = x + self.positions[...][: x.shape[1]].astype(self.dtype)
    return self.stack(x, None)

  def _check(self, features: jax.Array) -> None:
    config = self.config
    if features.ndim != 3 or features.shape[-1] != config.num_features or not features.shape[1]:
      raise ValueError(
        f"features: expected [batch, frames, num_features={config.num_features}], not empty, got "
        f"{features.shape}"
      )
    most = _STRIDE * config.source_length
    if features.shape[1] > most:
      raise ValueError(
        f"features: expected at most {most} frames, for source_length={config.source_length}, got "
        f"{features.shape}: cut the sounds"
      )


def _sinusoids(length: int, width: int) -> np.ndarray:
  """Returns Whisper's positions [length, width]: the last rate is 1e-4, not nearly so."""
  rates = 10_000.0 ** (-np.arange(width // 2) / max(width // 2 - 1, 1))
  angles = np.arange(length)[:, None] * rates
  return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def whisper_steps(
  make: Callable[[nnx.Rngs], Whisper],
  *,
  prompt: Sequence[int] | None = None,
  end_token: int | None = None,
) -> DecoderSteps:
  """Returns a `Whisper` as steps, for `models.decoding`: the encoder runs once a sound.

  Args:
    make: function `(nnx.Rngs) -> Whisper`, as given to `from_nnx`.
    prompt: the decoder's first inputs, such as those of the start, the language, the task and no
      time stamps; None: the config's start token.
    end_token: the token that ends a target; None: the config's.

  Returns:
    The steps; they read 'features' of a batch. The last token of the prompt is their start token,
    at their position 0.

  Raises:
    ValueError: a token that is None in the config too, or outside the vocabulary; no prompt, or one
      that leaves no position. In `start`: more positions than there are.

  >>> config = WhisperConfig(9, 8, 1, 1, num_heads=2, source_length=5, end_token=1)
  >>> make = lambda rngs: Whisper(config, rngs=rngs)
  >>> steps = whisper_steps(make, prompt=(2, 3))
  >>> variables = Variables(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0)))), {})
  >>> cache = steps.start(variables, {"features": jnp.ones((2, 10, 80))}, 4)
  >>> logits, cache = steps.step(variables, jnp.full(2, steps.start_token), jnp.int32(0), cache)
  >>> logits.shape
  (2, 9)
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  config = abstract.config
  tokens = _prompt(prompt, config)
  end = _end_token(end_token, config)
  before = len(tokens) - 1
  max_length = config.max_length - before

  def start(variables: Variables, batch: Mapping[str, Any], length: int) -> Seq2seqCache:
    if length > max_length:
      raise ValueError(f"length: expected at most {max_length} positions, got {length}")
    network = nnx.merge(graph, variables.params)
    (features,) = select_inputs(batch, "features")
    cache = _start(network, features, length + before)
    for position, token in enumerate(tokens[:-1]):
      row = jnp.full(len(features), token, jnp.int32)
      _, cache = _step(network, row, jnp.int32(position), cache)
    return cache

  def step(variables: Variables, tokens: jax.Array, position: jax.Array, cache: Seq2seqCache):
    network = nnx.merge(graph, variables.params)
    logits, cache = _step(network, tokens, position + before, cache)
    return _suppress(logits, position, config), cache

  return DecoderSteps(start, step, tokens[-1], end, config.vocab_size, max_length)


def _suppress(logits: jax.Array, position: jax.Array, config: WhisperConfig) -> jax.Array:
  """Returns logits [B, vocab_size] of a target's token, -inf where it may not be written."""
  if config.suppressed_tokens:
    logits = logits.at[:, jnp.array(config.suppressed_tokens)].set(-jnp.inf)
  if config.begin_suppressed_tokens:
    at_begin = logits.at[:, jnp.array(config.begin_suppressed_tokens)].set(-jnp.inf)
    logits = jnp.where(position == 0, at_begin, logits)
  return logits


def _prompt(prompt: Sequence[int] | None, config: WhisperConfig) -> tuple[int, ...]:
  if prompt is None:
    if config.start_token is None:
      raise ValueError("prompt: expected tokens, got None here and as start_token of the config")
    prompt = (config.start_token,)
  if not 1 <= len(prompt) <= config.max_length:
    raise ValueError(f"prompt: expected 1 to {config.max_length} tokens, got {len(prompt)}")
  return tuple(check_integer("prompt", token, 0, config.vocab_size - 1) for token in prompt)


def _end_token(token: int | None, config: WhisperConfig) -> int:
  token = config.end_token if token is None else token
  if token is None:
    raise ValueError("end_token: expected a token, got None here and in the config")
  return check_integer("end_token", token, 0, config.vocab_size - 1)


def _start(network: Whisper, features: jax.Array, length: int) -> Seq2seqCache:
  encoded = network.encode(features)["encoded"]
  config = network.config.blocks
  empty = jnp.zeros((len(features), length, config.num_heads, config.head_dim), network.dtype)
  blocks = network.decoder.blocks
  return Seq2seqCache(
    target=tuple((empty, empty) for _ in blocks),
    source=tuple(block.cross.keys_values(encoded) for block in blocks),
    is_source=jnp.ones(encoded.shape[:2], bool),
  )


def _step(network: Whisper, tokens: jax.Array, position: jax.Array, cache: Seq2seqCache):
  position = jnp.asarray(position)
  sources = [(*keys_values, cache.is_source[:, None, None]) for keys_values in cache.source]
  x = network.embed_target(tokens[:, None], position)
  hidden, target = network.decoder.extend(x, position, cache.target, sources)
  outputs = {"hidden": hidden[:, 0], "head": network.logits_head()}
  return head_logits(outputs), cache._replace(target=target)
