"""Defines recurrent encoder-decoders (Cho et al. 2014, Luong et al. 2015) and their steps.

config = RecurrentConfig(74, 64, source_vocab_size=29)
make = lambda rngs: RecurrentEncoderDecoder(config, rngs=rngs)
student = from_nnx(make, inputs=("source", "source_segments", "tokens"))
steps = recurrent_steps(make, start_token=2, end_token=3)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.errors import check_integer
from distill_jax.models.adapters.outputs import select_inputs
from distill_jax.models.decoding.steps import DecoderSteps, vary_like
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.token_rows import check_token_rows, embed_tokens
from distill_jax.models.seq2seq.attention import linear
from distill_jax.types import Outputs, Variables

_NO_LIMIT = 2**31 - 1  # A recurrent network has no largest position.


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
  """Sizes of a `RecurrentEncoderDecoder`.

  Attributes:
    vocab_size: number of tokens in the target's vocabulary, and in the source's.
    embed_dim: size of the embeddings.
    hidden_dim: size of the states of encoder and decoder; 0: embed_dim.
    source_vocab_size: number of tokens of a source with a vocabulary, and embeddings, of its own;
      0: source and target share them.
    attention: whether the decoder reads all states of the source; else only the last one, with
      which it begins.
    bidirectional: whether a second network reads the source from its end, and each has half of
      `hidden_dim`.

  Raises:
    ValueError: a size that is no positive integer, or an odd one for two directions.

  Example in `RecurrentEncoderDecoder`.
  """

  vocab_size: int
  embed_dim: int
  hidden_dim: int = 0
  source_vocab_size: int = 0
  attention: bool = True
  bidirectional: bool = True

  def __post_init__(self):
    for field in ("vocab_size", "embed_dim"):
      check_integer(field, getattr(self, field), 1)
    for field in ("hidden_dim", "source_vocab_size"):
      check_integer(field, getattr(self, field), 0)
    object.__setattr__(self, "hidden_dim", self.hidden_dim or self.embed_dim)
    if self.bidirectional and self.hidden_dim % 2:
      raise ValueError(
        f"hidden_dim: expected an even size, half for each direction, got {self.hidden_dim}"
      )


class RecurrentEncoderDecoder(nnx.Module):
  """A gated recurrent network (GRU) that reads the source, and one that writes the target.

  Its outputs, those of an `EncoderDecoder` as far as it has them:

  - `encoded` [B, S, hidden_dim]: the encoder's states.
  - `cross_attention1` [B, 1, T, S], with attention: scores before the softmax, float32, -inf at
    padding.
  - `hidden` [B, T, hidden_dim]: what the head reads: the decoder's states, with attention
    tanh(linear(source's states by attention, state)).
  - `head`: (kernel [hidden_dim, vocab_size], bias, None).

  >>> config = RecurrentConfig(100, 16, source_vocab_size=30)
  >>> network = RecurrentEncoderDecoder(config, rngs=nnx.Rngs(0))
  >>> source = jnp.ones((3, 8), int)
  >>> outputs = network(source, source - 1, jnp.ones((3, 5), int))
  >>> outputs["hidden"].shape, outputs["cross_attention1"].shape
  ((3, 5, 16), (3, 1, 5, 8))
  """

  def __init__(self, config: RecurrentConfig, *, dtype: Any = None, rngs: nnx.Rngs):
    """Builds the layers.

    Args:
      config: sizes.
      dtype: dtype of the computation and the outputs; parameters are float32. None: float32.
      rngs: stream `params`.
    """
    self.config = config
    self.dtype = dtype or jnp.float32
    width = config.hidden_dim
    options = {"dtype": self.dtype, "rngs": rngs}
    self.embed = nnx.Embed(config.vocab_size, config.embed_dim, rngs=rngs)
    source_size = config.source_vocab_size
    self.source_embed = nnx.Embed(source_size, config.embed_dim, rngs=rngs) if source_size else None
    encoder_width = width // 2 if config.bidirectional else width
    self.encoder = GRU(config.embed_dim, encoder_width, **options)
    self.backward = (
      GRU(config.embed_dim, encoder_width, **options) if config.bidirectional else None
    )
    self.decoder = GRU(config.embed_dim, width, **options)
    self.combine = linear(2 * width, width, bias=True, **options) if config.attention else None
    self.head = linear(width, config.vocab_size, bias=True, **options)

  def __call__(
    self, source: jax.Array, source_segments: jax.Array | None, tokens: jax.Array
  ) -> Outputs:
    """Returns the outputs of pairs of a source and a target; arguments as in `EncoderDecoder`.

    An empty source gives a decoder that begins with zeros.

    Raises:
      ValueError: no tokens, or shapes that differ.
    """
    check_token_rows(tokens, _NO_LIMIT)
    encoded, state = self.encode(source, source_segments)
    is_source = None if source_segments is None else source_segments >= 0
    states, _ = self.decoder(embed_tokens(self.embed, tokens, self.dtype), state)
    return {"encoded": encoded, **self.read(states, encoded, is_source)}

  def encode(
    self, source: jax.Array, source_segments: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the states [B, S, hidden_dim] at each token, and those [B, hidden_dim] at the end."""
    check_token_rows(source, _NO_LIMIT, source_segments=source_segments)
    embed = self.embed if self.source_embed is None else self.source_embed
    x = embed_tokens(embed, source, self.dtype)
    is_source = None if source_segments is None else source_segments >= 0
    states, last = self.encoder(x, None, is_source)
    if self.backward is None:
      return states, last
    backward_states, first = self.backward(x, None, is_source, reverse=True)
    return jnp.concatenate([states, backward_states], -1), jnp.concatenate([last, first], -1)

  def read(self, states: jax.Array, encoded: jax.Array, is_source: jax.Array | None) -> Outputs:
    """Returns 'hidden', 'head' and 'cross_attention1' of decoder states [B, T, hidden_dim]."""
    bias: Any = self.head.bias
    head = self.head.kernel[...].astype(self.dtype), bias[...].astype(self.dtype), None
    if self.combine is None:
      return {"hidden": states, "head": head}
    wide = reduce.common_dtype(self.dtype, jnp.float32)
    scores = jnp.einsum("btd,bsd->bts", states, encoded, preferred_element_type=wide)
    scores = finite = scores * self.config.hidden_dim**-0.5
    if is_source is not None:
      # A softmax over nothing but -inf would be NaN, and so would the gradients of all rows.
      finite = jnp.where(is_source[:, None], scores, jnp.finfo(wide).min)
      scores = jnp.where(is_source[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(finite).astype(self.dtype)
    context = jnp.einsum("bts,bsd->btd", weights, encoded)
    hidden = jnp.tanh(self.combine(jnp.concatenate([context, states], -1)))
    return {"hidden": hidden, "head": head, "cross_attention1": scores[:, None]}


class GRU(nnx.Module):
  """The gated recurrent unit of PyTorch: gates r, z, n, each with two biases."""

  def __init__(self, inputs: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
    self.input = linear(inputs, 3 * width, dtype=dtype, rngs=rngs, bias=True)
    self.state = linear(width, 3 * width, dtype=dtype, rngs=rngs, bias=True)
    self.width = width

  def __call__(
    self,
    x: jax.Array,
    state: jax.Array | None,
    is_token: jax.Array | None = None,
    *,
    reverse: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the states [B, L, width] after each of x [B, L, inputs], and the last one.

    Args:
      x: [B, L, inputs].
      state: [B, width], the first one; None: zeros.
      is_token: bool [B, L]; others leave the state as it is. None: all.
      reverse: whether to begin with the last of x.
    """
    inputs = self.input(x)
    if state is None:
      state = vary_like(jnp.zeros((x.shape[0], self.width), inputs.dtype), inputs)
    if is_token is None:
      is_token = jnp.ones(x.shape[:2], bool)

    def step(h, now):
      of_input, keep = now
      h = jnp.where(keep[:, None], self._next(of_input, h), h)
      return h, h

    columns = jnp.moveaxis(inputs, 1, 0), is_token.T
    last, states = jax.lax.scan(step, state, columns, reverse=reverse)
    return jnp.moveaxis(states, 0, 1), last

  def _next(self, of_input: jax.Array, h: jax.Array) -> jax.Array:
    input_r, input_z, input_n = jnp.split(of_input, 3, -1)
    state_r, state_z, state_n = jnp.split(self.state(h), 3, -1)
    r = jax.nn.sigmoid(input_r + state_r)
    z = jax.nn.sigmoid(input_z + state_z)
    return (1 - z) * jnp.tanh(input_n + r * state_n) + z * h


class RecurrentCache(NamedTuple):
  """What a step reads, rows first.

  Attributes:
    state: [B, hidden_dim], the decoder's.
    encoded: [B, S, hidden_dim]; None without attention.
    is_source: bool [B, S], False for padding; None without attention.
  """

  state: jax.Array
  encoded: jax.Array | None
  is_source: jax.Array | None


def recurrent_steps(
  make: Callable[[nnx.Rngs], RecurrentEncoderDecoder], *, start_token: int, end_token: int
) -> DecoderSteps:
  """Returns a `RecurrentEncoderDecoder` as steps, for `models.decoding`.

  Args:
    make: function `(nnx.Rngs) -> RecurrentEncoderDecoder`, as given to `from_nnx`.
    start_token: the first token that the decoder reads.
    end_token: the token that ends a target.

  Returns:
    The steps; they read 'source' and 'source_segments' of a batch. There is no largest length.

  Raises:
    ValueError: a token outside the vocabulary.

  >>> config = RecurrentConfig(9, 8)
  >>> make = lambda rngs: RecurrentEncoderDecoder(config, rngs=rngs)
  >>> steps = recurrent_steps(make, start_token=0, end_token=1)
  >>> variables = Variables(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0)))), {})
  >>> batch = {"source": jnp.ones((2, 5), int), "source_segments": jnp.zeros((2, 5), int)}
  >>> cache = steps.start(variables, batch, 3)
  >>> logits, cache = steps.step(variables, jnp.zeros(2, int), jnp.int32(0), cache)
  >>> logits.shape
  (2, 9)
  """
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  vocab_size = abstract.config.vocab_size
  check_integer("start_token", start_token, 0, vocab_size - 1)
  check_integer("end_token", end_token, 0, vocab_size - 1)

  def start(variables: Variables, batch: Mapping[str, Any], length: int) -> RecurrentCache:
    del length
    source, segments = select_inputs(batch, ("source", "source_segments"))
    network = nnx.merge(graph, variables.params)
    encoded, state = network.encode(source, segments)
    if not network.config.attention:
      return RecurrentCache(state, None, None)
    return RecurrentCache(state, encoded, segments >= 0)

  def step(variables: Variables, tokens: jax.Array, position: jax.Array, cache: RecurrentCache):
    del position
    network = nnx.merge(graph, variables.params)
    x = embed_tokens(network.embed, tokens[:, None], network.dtype)
    states, state = network.decoder(x, cache.state)
    outputs = network.read(states, cache.encoded, cache.is_source)
    return head_logits(outputs)[:, 0], cache._replace(state=state)

  return DecoderSteps(start, step, start_token, end_token, vocab_size, _NO_LIMIT)
