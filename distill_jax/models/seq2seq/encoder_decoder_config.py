"""Describes an `EncoderDecoder`: its sizes, and the family that fixes how its blocks compute."""

import dataclasses

from distill_jax.errors import check_integer, suggest

ACTIVATIONS = ("relu", "gelu", "swish", "gated_gelu")


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
    attention_scale: whether scores are divided by sqrt(head_dim).
    bias: whether linear layers and norms have biases.
    key_bias: whether keys have one too; softmax cancels it.
    head_bias: whether the logits have a bias.
  """

  norm_first: bool
  rms_norm: bool
  positions: str
  embed_scale: bool
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
    attention_scale=True,
    bias=True,
    key_bias=False,
    head_bias=False,
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
    activation: of the perceptrons: 'relu', 'gelu', 'swish' or 'gated_gelu'.
    norm_eps: epsilon of the norms.
    family: 'plain': norms before each part, sinusoidal positions.

  Raises:
    ValueError: a size that is no positive integer or does not divide, or an unknown name.

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

  def __post_init__(self):
    for field, names in (("family", LAYOUTS), ("activation", ACTIVATIONS)):
      name = getattr(self, field)
      if name not in names:
        raise ValueError(
          f"{field}: expected one of {tuple(names)}, got {name!r}{suggest(name, names)}"
        )
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
    object.__setattr__(self, "head_dim", self.head_dim or self.embed_dim // self.num_heads)
    object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)

  @property
  def layout(self) -> Layout:
    """How the blocks compute, by the family."""
    return LAYOUTS[self.family]
