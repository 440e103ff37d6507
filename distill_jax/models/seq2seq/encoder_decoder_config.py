"""Describes an `EncoderDecoder`: its sizes, and the family that fixes how its blocks compute."""

import dataclasses

from distill_jax.errors import check_integer, suggest

ACTIVATIONS = ("relu", "gelu", "swish", "gated_gelu")


@dataclasses.dataclass(frozen=True)
class RelativePositions:
  """How T5 numbers distances between tokens; the values are those of the released networks.

  Attributes:
    num_buckets: number of ranges of distances; half of them hold one distance each, and in an
      encoder each half is split again between earlier and later tokens.
    max_distance: the distance from which on all are in the last bucket; the ranges up to it grow.

  Raises:
    ValueError: fewer than 4 buckets, or a distance that half of them reach already.
  """

  num_buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    # An encoder halves the buckets twice: fewer would leave no exact distance, a logarithm of 0.
    check_integer("num_buckets", self.num_buckets, 4)
    check_integer("max_distance", self.max_distance, self.num_buckets // 2 + 1)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the blocks of a family compute.

  Attributes:
    norm_first: whether a branch reads its normalized input, and the stack ends with a norm; else
      each sum is normalized.
    rms_norm: whether norms only scale, by the root mean square.
    positions: 'sinusoidal': added to the embeddings; 'relative': a number for each head and
      distance, added to the scores of self-attention in all blocks.
    embed_scale: whether embeddings are multiplied by sqrt(embed_dim).
    head_scale: whether a head that is the transposed embedding is divided by sqrt(embed_dim).
    attention_scale: whether scores are divided by sqrt(head_dim).
    bias: whether linear layers and norms have biases.
    key_bias: whether keys have one too; softmax cancels it.
    head_bias: whether the logits have a bias.
  """

  norm_first: bool
  rms_norm: bool
  positions: str
  embed_scale: bool
  head_scale: bool
  attention_scale: bool
  bias: bool
  key_bias: bool
  head_bias: bool


LAYOUTS = {
  "plain": Layout(
    norm_first=True,
    rms_norm=False,
    positions="sinusoidal",
    embed_scale=True,
    head_scale=False,
    attention_scale=True,
    bias=True,
    key_bias=False,
    head_bias=False,
  ),
  "t5": Layout(
    norm_first=True,
    rms_norm=True,
    positions="relative",
    embed_scale=False,
    head_scale=True,
    attention_scale=False,
    bias=False,
    key_bias=False,
    head_bias=False,
  ),
  "marian": Layout(
    norm_first=False,
    rms_norm=False,
    positions="sinusoidal",
    embed_scale=True,
    head_scale=False,
    attention_scale=True,
    bias=True,
    key_bias=True,
    head_bias=True,
  ),
}


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
  """Sizes of an `EncoderDecoder`; a student's is `dataclasses.replace(config, decoder_layers=1)`.

  Attributes:
    vocab_size: number of tokens in the target's vocabulary, and in the source's.
    embed_dim: size of the hidden states.
    encoder_layers: number of blocks that read the source.
    decoder_layers: number of blocks that write the target; each token to write runs all of them.
    num_heads: number of attention heads.
    head_dim: size of a head; 0: embed_dim / num_heads.
    mlp_dim: size inside the perceptrons; 0: 4 embed_dim.
    source_vocab_size: number of tokens of a source with a vocabulary, and embeddings, of its own;
      0: source and target share them.
    tie_embeddings: whether the head is the transposed embedding of the target.
    max_length: number of positions of the source, and of the target.
    activation: of the perceptrons: 'relu', 'gelu', 'swish', or 'gated_gelu', by tanh as in T5 v1.1.
    norm_eps: epsilon of the norms.
    family: 'plain': layer norms before each part, sinusoidal positions. 't5' (Raffel et al. 2020):
      RMS norms before each part, relative positions, no biases; v1.1 is 'gated_gelu' without tied
      embeddings. 'marian' (Junczys-Dowmunt et al. 2018): layer norms after each part, sinusoidal
      positions, and a bias of the logits.
    relative: of 't5'; None: `RelativePositions()`.
    start_token: the decoder's first input, if `decoder_steps` and released files are to know it; it
      also pads. None: they are told, or raise.
    end_token: the token that ends a target, alike.
    suppressed_tokens: tokens that `decoder_steps` never writes, such as the padding of released
      Marian networks, whose logits were not trained.

  Raises:
    ValueError: a size that is no positive integer or does not divide, an unknown name, a token
      outside the vocabulary, or relative positions in another family.

  >>> EncoderDecoderConfig(100, 16, encoder_layers=6, decoder_layers=1, num_heads=2).mlp_dim
  64
  """

  vocab_size: int
  embed_dim: int
  encoder_layers: int
  decoder_layers: int
  num_heads: int
  head_dim: int = 0
  mlp_dim: int = 0
  source_vocab_size: int = 0
  tie_embeddings: bool = True
  max_length: int = 512
  activation: str = "relu"
  norm_eps: float = 1e-5
  family: str = "plain"
  relative: RelativePositions | None = None
  start_token: int | None = None
  end_token: int | None = None
  suppressed_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    for field, names in (("family", LAYOUTS), ("activation", ACTIVATIONS)):
      name = getattr(self, field)
      if name not in names:
        raise ValueError(
          f"{field}: expected one of {tuple(names)}, got {name!r}{suggest(name, names)}"
        )
    self._check_sizes()
    for field in ("start_token", "end_token"):
      if getattr(self, field) is not None:
        check_integer(field, getattr(self, field), 0, self.vocab_size - 1)
    for token in self.suppressed_tokens:
      check_integer("suppressed_tokens", token, 0, self.vocab_size - 1)
    is_relative = self.layout.positions == "relative"
    if not is_relative and self.relative is not None:
      raise ValueError(
        f"relative: expected None for the family {self.family!r}, got {self.relative}: write "
        "family='t5'"
      )
    if is_relative:
      object.__setattr__(self, "relative", self.relative or RelativePositions())
    object.__setattr__(self, "head_dim", self.head_dim or self.embed_dim // self.num_heads)
    object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)

  @property
  def layout(self) -> Layout:
    """How the blocks compute, by the family."""
    return LAYOUTS[self.family]

  def _check_sizes(self) -> None:
    for field in ("vocab_size", "embed_dim", "encoder_layers", "decoder_layers", "num_heads"):
      check_integer(field, getattr(self, field), 1)
    for field in ("head_dim", "mlp_dim", "source_vocab_size"):
      check_integer(field, getattr(self, field), 0)
    check_integer("max_length", self.max_length, 1)
    if not self.head_dim and self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}; or "
        "give head_dim"
      )
    if self.layout.positions == "sinusoidal" and self.embed_dim % 2:
      raise ValueError(
        f"embed_dim: expected an even size, half sines and half cosines, got {self.embed_dim}"
      )
