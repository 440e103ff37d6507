"""Describes what follows the first layers of a recognizer: its blocks over frames, and its head."""

import dataclasses

from distill_jax.errors import check_integer, suggest
from distill_jax.models.seq2seq.encoder_decoder_config import LAYOUTS, Layout

LAYERS = ("conformer", "gru")


@dataclasses.dataclass(frozen=True)
class FrameEncoderConfig:
  """Sizes of a `SpeechEncoder` or a `TextLineEncoder`; a student's is
  `dataclasses.replace(config, embed_dim=64)`.

  Attributes:
    vocab_size: number of classes of a frame, with the blank.
    embed_dim: size of the hidden states.
    num_layers: number of blocks.
    layer: 'conformer' (Gulati et al. 2020): self-attention and a convolution between two
      perceptrons; 'gru': two gated recurrent networks, one from each end.
    num_heads: number of attention heads, of 'conformer'.
    head_dim: size of a head; 0: embed_dim / num_heads.
    mlp_dim: size inside the perceptrons, of 'conformer'; 0: 4 embed_dim.
    kernel_size: number of frames that the convolution reads, odd, of 'conformer'.
    dropout: probability that a value that a branch adds is dropped, in training.

  Raises:
    ValueError: a size that is no positive integer or does not divide, an even kernel, an unknown
      layer, or a probability outside [0, 1).

  >>> FrameEncoderConfig(30, 64, 3).mlp_dim
  256
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  layer: str = "conformer"
  num_heads: int = 4
  head_dim: int = 0
  mlp_dim: int = 0
  kernel_size: int = 15
  dropout: float = 0.0

  def __post_init__(self):
    if self.layer not in LAYERS:
      raise ValueError(
        f"layer: expected one of {LAYERS}, got {self.layer!r}{suggest(self.layer, LAYERS)}"
      )
    for field in ("vocab_size", "embed_dim", "num_layers", "num_heads", "kernel_size"):
      check_integer(field, getattr(self, field), 1)
    for field in ("head_dim", "mlp_dim"):
      check_integer(field, getattr(self, field), 0)
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
    self._check_divisors()
    object.__setattr__(self, "head_dim", self.head_dim or self.embed_dim // self.num_heads)
    object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)

  @property
  def layout(self) -> Layout:
    """How attention computes."""
    return LAYOUTS["plain"]

  def _check_divisors(self) -> None:
    if self.layer == "gru":
      if self.embed_dim % 2:
        raise ValueError(
          f"embed_dim: expected an even size, half for each direction, got {self.embed_dim}"
        )
      return
    if not self.head_dim and self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}; or "
        "give head_dim"
      )
    if self.kernel_size % 2 == 0:
      raise ValueError(
        f"kernel_size: expected an odd number, as many frames before as after, got "
        f"{self.kernel_size}"
      )
