"""Defines a small detector of voice on log-mel features, which decides some frames at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.seq2seq.attention import linear
from distill_jax.models.seq2seq.recurrent import GRU
from distill_jax.models.speech.speech_encoder import check_frames
from distill_jax.types import Outputs


class VoiceDetector(nnx.Module):
  """A layer over some frames side by side, gated recurrent networks over them, and a head.

  With features every 128 samples, 8 ms at 16 kHz, and 4 frames to a decision it decides when
  `SileroVAD` does, if the samples are a multiple of 512, and takes its place: `logits` are of
  silence and voice. No decision depends on later frames; features that are normalized over a clip
  (`log_mel(normalize=True)`) do.

      student = from_nnx(lambda rngs: VoiceDetector(40, 32, rngs=rngs), inputs="features")

  Its outputs, where T' = floor(T / frames_per_decision):

  - `block{k}` [B, T', width]: `block1` of the layer, the others of the recurrent networks.
  - `logits` [B, T', 2], float32.

  >>> network = VoiceDetector(40, 32, rngs=nnx.Rngs(0))
  >>> network(jnp.zeros((2, 101, 40)))["logits"].shape
  (2, 25, 2)
  """

  def __init__(
    self,
    num_features: int,
    width: int,
    *,
    num_layers: int = 1,
    frames_per_decision: int = 4,
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      num_features: number of features of a frame.
      width: size of the layer and of the states.
      num_layers: number of recurrent networks, one on top of the other.
      frames_per_decision: number of frames that one decision reads first.
      dtype: dtype of the computation; parameters are float32. None: float32.
      rngs: stream `params`.

    Raises:
      ValueError: a size that is no positive integer.
    """
    sizes = {"num_features": num_features, "width": width}
    counts = {"num_layers": num_layers, "frames_per_decision": frames_per_decision}
    for field, size in (sizes | counts).items():
      check_integer(field, size, 1)
    self.num_features = num_features
    self.frames_per_decision = frames_per_decision
    self.dtype = dtype or jnp.float32
    options = {"dtype": self.dtype, "rngs": rngs}
    self.input = linear(frames_per_decision * num_features, width, bias=True, **options)
    self.layers = nnx.data([GRU(width, width, **options) for _ in range(num_layers)])
    self.head = linear(width, 2, bias=True, **options)

  def __call__(self, features: jax.Array) -> Outputs:
    """Returns the outputs of features [B, T, num_features]; frames of no whole decision are left
    out.

    Raises:
      ValueError: features of another shape.
    """
    features, _ = check_frames(features, None, self.num_features)
    batch, frames, _ = features.shape
    count = frames // self.frames_per_decision
    x = features[:, : count * self.frames_per_decision].reshape(batch, count, -1)
    x = nnx.relu(self.input(x.astype(self.dtype)))
    outputs = {"block1": x}
    for k, layer in enumerate(self.layers, 2):
      x, _ = layer(x, None)
      outputs[f"block{k}"] = x
    return {**outputs, "logits": self.head(x).astype(jnp.float32)}
