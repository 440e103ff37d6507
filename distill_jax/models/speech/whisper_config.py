"""Describes a `Whisper`: its sizes, and the tokens that it does not write."""

import dataclasses

from distill_jax.errors import check_integer
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
  """Sizes of a `Whisper`.

  Attributes:
    vocab_size, embed_dim, encoder_layers, decoder_layers, num_heads, mlp_dim, max_length: as in
      `EncoderDecoderConfig`; `max_length` is of the target.
    num_features: number of log-mel features of a frame.
    source_length: number of positions of the encoder, half the largest number of frames.
    start_token, end_token: as in `EncoderDecoderConfig`.
    suppressed_tokens: tokens that `whisper_steps` never writes, such as brackets of noises.
    begin_suppressed_tokens: tokens that a target does not begin with, such as its end.

  Raises:
    ValueError: as `EncoderDecoderConfig`.

  >>> WhisperConfig(100, 16, encoder_layers=4, decoder_layers=1, num_heads=2).blocks.mlp_dim
  64
  """

  vocab_size: int
  embed_dim: int
  encoder_layers: int
  decoder_layers: int
  num_heads: int
  mlp_dim: int = 0
  num_features: int = 80
  source_length: int = 1500
  max_length: int = 448
  start_token: int | None = None
  end_token: int | None = None
  suppressed_tokens: tuple[int, ...] = ()
  begin_suppressed_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    for field in ("num_features", "source_length"):
      check_integer(field, getattr(self, field), 1)
    for field in ("suppressed_tokens", "begin_suppressed_tokens"):
      tokens = tuple(getattr(self, field))  # As a network's settings they are hashed.
      for token in tokens:
        check_integer(field, token, 0, self.vocab_size - 1)
      object.__setattr__(self, field, tokens)
    object.__setattr__(self, "mlp_dim", self.blocks.mlp_dim)

  @property
  def blocks(self) -> EncoderDecoderConfig:
    """The blocks of encoder and decoder, which are those of the family 'plain'."""
    shared = {f.name for f in dataclasses.fields(EncoderDecoderConfig)}
    sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in shared}
    return EncoderDecoderConfig(**sizes, activation="gelu")
