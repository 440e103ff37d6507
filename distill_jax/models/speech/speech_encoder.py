"""Defines recognizers of speech: convolutions that shorten, and blocks over frames.

config = FrameEncoderConfig(30, 144, 4)
make = lambda rngs: SpeechEncoder(config, rngs=rngs)
teacher = from_nnx(make, inputs=("features", "frames"))
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.remat import check_policy
from distill_jax.models.seq2seq.attention import linear
from distill_jax.models.speech.frame_blocks import FrameStack
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.zoo.sequence import blank_steps
from distill_jax.types import Outputs

INPUTS = ("features", "frames")
"""The entries of a batch that a `SpeechEncoder` reads, in order."""

_STAGES = {1: (1,), 2: (2,), 4: (2, 2)}
"""Strides of the convolutions, for each factor by which they shorten."""


class SpeechEncoder(nnx.Module):
  """Convolutions over time, blocks over frames and a head, for CTC (Graves et al. 2006).

  Its outputs are `logits` [B, T', vocab_size], `lengths` int32 [B], `block{k}` and, of 'conformer',
  `attention{k}`, as in `FrameStack`; T' = ceil(T / subsampling).

  >>> config = FrameEncoderConfig(30, 16, 2)
  >>> network = SpeechEncoder(config, rngs=nnx.Rngs(0))
  >>> outputs = network(jnp.ones((3, 50, 80)), jnp.array([50, 20, 1]))
  >>> outputs["logits"].shape, outputs["lengths"].tolist()
  ((3, 13, 30), [13, 5, 1])
  """

  def __init__(
    self,
    config: FrameEncoderConfig,
    *,
    num_features: int = 80,
    subsampling: int = 4,
    dtype: Any = None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      config: sizes of the blocks and the head.
      num_features: number of features of a frame.
      subsampling: factor by which the convolutions shorten: 1, 2 or 4.
      dtype: dtype of the computation and the hidden states. Parameters are float32, and norms and
        softmax are computed in it. None: float32.
      remat: policy for what a block stores for the backward pass, see `rematerialized`; empty:
        everything.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: another factor, or an unknown policy.
    """
    check_policy(remat)
    if subsampling not in _STAGES:
      raise ValueError(f"subsampling: expected one of {tuple(_STAGES)}, got {subsampling!r}")
    self.config = config
    self.num_features = num_features
    self.dtype = dtype or jnp.float32
    width = config.embed_dim
    options = {"dtype": self.dtype, "rngs": rngs}
    strides = _STAGES[subsampling]
    sizes = (num_features, *(width for _ in strides))
    self.stages = nnx.data(
      [StridedConv(a, width, stride=s, **options) for a, s in zip(sizes, strides)]
    )
    self.input = linear(width, width, bias=True, **options)
    self.stack = FrameStack(config, remat=remat, **options)

  def __call__(self, features: jax.Array, frames: jax.Array | None = None) -> Outputs:
    """Returns the outputs of rows of frames.

    Args:
      features: [B, T, num_features], such as log-mel, about 0 on average and of variance 1.
      frames: int [B], number of valid frames; more than T count as T. None: all are valid.

    Raises:
      ValueError: shapes that differ.
    """
    x, lengths = check_frames(features, frames, self.num_features)
    x = x.astype(self.dtype)
    for stage in self.stages:
      x, lengths = stage(x, lengths)
    return self.stack(self.input(x), lengths)


class StridedConv(nnx.Module):
  """A convolution of 3 frames over time and a ReLU, of every frame or every second one."""

  def __init__(self, inputs: int, outputs: int, *, stride: int, dtype: Any, rngs: nnx.Rngs):
    he = nnx.initializers.he_normal()
    self.stride = stride
    self.linear = nnx.Linear(3 * inputs, outputs, kernel_init=he, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns [B, ceil(T / stride), outputs] of x [B, T, inputs], and the valid lengths."""
    steps = x.shape[1]
    x = blank_steps(x, jnp.arange(steps) < lengths[:, None])
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = [x[:, i : i + steps : self.stride] for i in range(3)]
    x = nnx.relu(self.linear(jnp.concatenate(taps, -1)))
    return x, (lengths + self.stride - 1) // self.stride


def check_frames(
  features: jax.Array, frames: jax.Array | None, num_features: int
) -> tuple[jax.Array, jax.Array]:
  """Returns features [B, T, num_features] and the number of valid frames, int32 [B], at most T.

  Raises:
    ValueError: they have another shape.
  """
  if features.ndim != 3 or features.shape[-1] != num_features:
    raise ValueError(
      f"features: expected [batch, frames, num_features={num_features}], got {features.shape}"
    )
  batch, count, _ = features.shape
  if frames is None:
    return features, jnp.full(batch, count, jnp.int32)
  if frames.shape != (batch,):
    raise ValueError(f"frames: expected one number for each row, {(batch,)}, got {frames.shape}")
  return features, jnp.clip(frames, 0, count).astype(jnp.int32)
