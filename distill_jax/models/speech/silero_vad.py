"""Loads the released detector of voice of PyPI's silero-vad 6, for sounds of 16 kHz.

    pip install --no-deps silero-vad  (MIT; the package itself needs torch: do not import it)

    folder = importlib.util.find_spec("silero_vad").submodule_search_locations[0]
    teacher = load_silero_vad(Path(folder) / "data/silero_vad_16k.safetensors")

It has 309,633 parameters and decides once per 512 samples, 32 ms. Its outputs are those of a
tagger with the classes silence and voice: `tasks.tagging` measures it, and the objectives of
classes take it as it is.

The weights of version 6.2.3 in this file are not those of the package's .onnx and .jit files, whose
probabilities differ. The network is the same: with the weights of silero_vad.jit it equals
silero_vad_16k_op15.onnx to 1e-6.
"""

import os

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.decoding.steps import vary_like
from distill_jax.models.weights import Origin, pretrained, torch_kernel
from distill_jax.types import Model, Outputs

RATE = 16_000
"""Sampling rate of the sounds that it reads, Hz."""
CHUNK = 512
"""Number of samples of a decision."""

_CONTEXT = 64  # Samples before a chunk that it also reads.
_REFLECTED = 64  # Samples that are mirrored at the end of a chunk.
_WINDOW = 256
_HOP = 128
_BANDS = _WINDOW // 2 + 1
_WIDTH = 128
_CONVS = ((_BANDS, 128, 1), (128, 64, 2), (64, 64, 2), (64, _WIDTH, 1))
"""Inputs, outputs and stride of the convolutions over the frames of a chunk."""
_TINY = 1e-12  # The derivative of a square root at 0 is infinite.

NAMES: dict[str, Origin] = {
  "params/transform": ("stft_conv.weight", lambda weight: weight[:, 0].T),
  "params/lstm/input/kernel": ("lstm_cell.weight_ih", torch_kernel),
  "params/lstm/input/bias": "lstm_cell.bias_ih",
  "params/lstm/state/kernel": ("lstm_cell.weight_hh", torch_kernel),
  "params/lstm/state/bias": "lstm_cell.bias_hh",
  "params/head/kernel": ("final_conv.weight", lambda weight: weight[..., 0].T),
  "params/head/bias": "final_conv.bias",
  **{f"params/convs/{i}/kernel": (f"conv{i + 1}.weight", torch_kernel) for i in range(len(_CONVS))},
  **{f"params/convs/{i}/bias": f"conv{i + 1}.bias" for i in range(len(_CONVS))},
}
"""The entries of the file, for `models.pretrained`."""


class SileroVAD(nnx.Module):
  """A Fourier transform, convolutions inside of each chunk, and a recurrent network over chunks.

  Its outputs, where T = ceil(N / 512); no chunk depends on later ones:

  - `block1` [B, T, 128]: the last convolution's.
  - `block2` [B, T, 128]: the states of the recurrent network.
  - `logits` [B, T, 2], float32, of silence and voice: -z / 2 and z / 2, where sigmoid(z) is the
    probability of voice that the package gives.

  >>> network = SileroVAD(rngs=nnx.Rngs(0))
  >>> network(jnp.zeros((2, 1100)))["logits"].shape
  (2, 3, 2)
  """

  def __init__(self, *, rngs: nnx.Rngs):
    """Builds the layers; `rngs` has the stream `params`."""
    normal = nnx.initializers.normal(_WINDOW**-0.5)
    self.transform = nnx.Param(normal(rngs.params(), (_WINDOW, 2 * _BANDS), jnp.float32))
    self.convs = nnx.data(
      [
        nnx.Conv(inputs, outputs, (3,), strides=stride, padding=[(1, 1)], rngs=rngs)
        for inputs, outputs, stride in _CONVS
      ]
    )
    self.lstm = LSTM(_WIDTH, _WIDTH, rngs=rngs)
    self.head = nnx.Linear(_WIDTH, 1, rngs=rngs)

  def __call__(self, audio: jax.Array) -> Outputs:
    """Returns the outputs of sounds.

    Args:
      audio: float [B, N], samples from -1 to 1 at 16 kHz; zeros complete the last chunk.

    Raises:
      ValueError: no samples, another shape, or integers.
    """
    chunks = _chunks(audio)
    batch, count = chunks.shape[:2]
    x = self._magnitudes(chunks.reshape(batch * count, -1))
    for conv in self.convs:
      x = nnx.relu(conv(x))
    encoded = x.reshape(batch, count, _WIDTH)
    states = self.lstm(encoded)
    z = self.head(nnx.relu(states)).astype(jnp.float32)
    logits = jnp.concatenate([-z, z], -1) / 2
    return {"block1": encoded, "block2": states, "logits": logits}

  def _magnitudes(self, chunks: jax.Array) -> jax.Array:
    """Returns the spectrum [rows, 4, 129] of chunks [rows, 576]."""
    chunks = jnp.pad(chunks, ((0, 0), (0, _REFLECTED)), mode="reflect")
    starts = range(0, chunks.shape[1] - _WINDOW + 1, _HOP)
    windows = jnp.stack([chunks[:, i : i + _WINDOW] for i in starts], 1)
    real, imaginary = jnp.split(windows @ self.transform[...], 2, -1)
    return jnp.sqrt(jnp.maximum(real**2 + imaginary**2, _TINY))


class LSTM(nnx.Module):
  """The recurrent network of PyTorch's LSTM: gates i, f, g, o, each with two biases."""

  def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
    self.input = nnx.Linear(inputs, 4 * width, rngs=rngs)
    self.state = nnx.Linear(width, 4 * width, rngs=rngs)
    self.width = width

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the states [B, T, width] after each of x [B, T, inputs]; it starts with zeros."""
    inputs = self.input(x)

    def step(carry, now):
      hidden, cell = carry
      i, f, g, o = jnp.split(now + self.state(hidden), 4, -1)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
      return (hidden, cell), hidden

    zeros = vary_like(jnp.zeros((x.shape[0], self.width), inputs.dtype), inputs)
    _, states = jax.lax.scan(step, (zeros, zeros), jnp.moveaxis(inputs, 1, 0))
    return jnp.moveaxis(states, 0, 1)


def load_silero_vad(path: str | os.PathLike) -> Model:
  """Returns the released network with its weights; it reads the entry 'audio'.

  Args:
    path: silero_vad_16k.safetensors of the package.

  Raises:
    FileNotFoundError, ValueError: as `models.pretrained`.

  >>> load_silero_vad("silero_vad_16k.safetensors")  # doctest: +SKIP
  """
  model = from_nnx(lambda rngs: SileroVAD(rngs=rngs), inputs="audio")
  return pretrained(model, path, {}, names=NAMES)


def _chunks(audio: jax.Array) -> jax.Array:
  """Returns the chunks [B, T, 576] of sounds [B, N], each with what precedes it."""
  if audio.ndim != 2 or not audio.shape[1]:
    raise ValueError(f"audio: expected [batch, samples], not empty, got {audio.shape}")
  if not jnp.issubdtype(audio.dtype, jnp.floating):
    raise ValueError(
      f"audio: expected floats from -1 to 1, got {audio.dtype}: divide 16-bit samples by 32768"
    )
  count = -(-audio.shape[1] // CHUNK)
  audio = jnp.pad(audio, ((0, 0), (_CONTEXT, count * CHUNK - audio.shape[1])))
  chunks = audio[:, _CONTEXT:].reshape(audio.shape[0], count, CHUNK)
  before = audio[:, : count * CHUNK].reshape(audio.shape[0], count, CHUNK)[..., :_CONTEXT]
  return jnp.concatenate([before, chunks], -1)
