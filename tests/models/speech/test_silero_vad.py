"""The released detector of voice against its package's formula, and a small detector."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from scipy.special import expit

from distill_jax.models.speech.silero_vad import CHUNK, SileroVAD, load_silero_vad
from distill_jax.models.speech.voice_detector import VoiceDetector

SPEC = importlib.util.find_spec("silero_vad")


def sounds(rows=2, samples=3 * 8 * CHUNK + 100):
  """Tones with overtones that come and go in noise, which the network partly takes for voice."""
  rng = np.random.default_rng(0)
  time = np.arange(samples) / 16_000
  pitch = np.array([[140.0], [210.0]])[:rows]
  tone = sum(np.sin(2 * np.pi * k * pitch * time + k) / k for k in range(1, 20))
  loud = np.sin(2 * np.pi * 3 * time) > 0
  return (0.1 * tone * loud + 0.01 * rng.normal(size=tone.shape)).astype(np.float32)


def chunk_probability(weights, chunk, hidden, cell):
  """Returns the package's `tinygrad_model.py` in float64: probability and state of one chunk."""
  chunk = np.pad(chunk, ((0, 0), (0, 64)), mode="reflect")
  windows = np.stack([chunk[:, i : i + 256] for i in range(0, 385, 128)], 1)
  real, imaginary = np.split(
    np.einsum("bti,oi->bot", windows, weights["stft_conv.weight"][:, 0]), 2, 1
  )
  x = np.sqrt(real**2 + imaginary**2)
  for number, stride in zip("1234", (1, 2, 2, 1)):
    x = np.pad(x, ((0, 0), (0, 0), (1, 1)))
    starts = range(0, x.shape[2] - 2, stride)
    taps = np.stack([x[..., i : i + 3] for i in starts], 1)
    x = np.einsum("btik,oik->bot", taps, weights[f"conv{number}.weight"])
    x = np.maximum(x + weights[f"conv{number}.bias"][:, None], 0)
  gates = x[..., 0] @ weights["lstm_cell.weight_ih"].T + weights["lstm_cell.bias_ih"]
  gates = gates + hidden @ weights["lstm_cell.weight_hh"].T + weights["lstm_cell.bias_hh"]
  i, f, g, o = np.split(gates, 4, 1)
  cell = expit(f) * cell + expit(i) * np.tanh(g)
  hidden = expit(o) * np.tanh(cell)
  z = np.maximum(hidden, 0) @ weights["final_conv.weight"][..., 0].T + weights["final_conv.bias"]
  return expit(z[:, 0]), hidden, cell


@pytest.mark.skipif(SPEC is None, reason="silero-vad is not installed: pip install --no-deps")
def test_probabilities_equal_those_of_the_released_network_in_float64():
  path = pathlib.Path(SPEC.submodule_search_locations[0]) / "data/silero_vad_16k.safetensors"
  weights = {k: x.astype(float) for k, x in safetensors.numpy.load_file(path).items()}
  model = load_silero_vad(path)
  audio = sounds()
  outputs = jax.jit(lambda: model.apply(*model.variables, {"audio": audio}, train=False, key=None))
  logits = outputs()[0]["logits"]
  count = -(-audio.shape[1] // CHUNK)
  padded = np.pad(audio, ((0, 0), (64, count * CHUNK - audio.shape[1]))).astype(float)
  expected, hidden, cell = [], np.zeros((2, 128)), np.zeros((2, 128))
  for i in range(count):
    chunk = padded[:, i * CHUNK : (i + 1) * CHUNK + 64]
    probability, hidden, cell = chunk_probability(weights, chunk, hidden, cell)
    expected.append(probability)
  expected = np.stack(expected, 1)
  np.testing.assert_allclose(jax.nn.softmax(logits)[..., 1], expected, atol=1e-5)
  expected = np.log(expected / (1 - expected))
  assert np.ptp(expected) > 3
  np.testing.assert_allclose(logits[..., 1] - logits[..., 0], expected, atol=1e-3)


@pytest.mark.slow
def test_silence_has_finite_gradients_and_the_future_changes_nothing():
  graph, state = nnx.split(SileroVAD(rngs=nnx.Rngs(0)))

  @jax.jit
  def run(audio):
    def loss(state):
      logits = nnx.merge(graph, state)(audio)["logits"]
      return jnp.sin(logits).sum(), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(state)
    return logits, gradient

  audio = np.zeros((1, 4 * CHUNK), np.float32)
  logits, gradient = run(audio)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  audio[:, 2 * CHUNK :] = 0.3
  later, _ = run(audio)
  np.testing.assert_array_equal(later[:, :2], logits[:, :2])
  assert np.abs(later[:, 2] - logits[:, 2]).max() > 0


def test_detector_decides_once_per_four_frames_from_earlier_ones():
  network = VoiceDetector(5, 8, num_layers=2, rngs=nnx.Rngs(0))
  features = np.random.default_rng(0).normal(size=(2, 18, 5)).astype(np.float32)
  apply = jax.jit(network)
  outputs = apply(features)
  assert outputs["logits"].shape == (2, 4, 2)
  assert outputs["block3"].shape == (2, 4, 8)
  features[:, 8:] += 1
  later = apply(features)["logits"]
  np.testing.assert_array_equal(later[:, :2], outputs["logits"][:, :2])
  assert (later[:, 2] != outputs["logits"][:, 2]).all()


@pytest.mark.parametrize(
  "field, make",
  [
    ("audio", lambda: SileroVAD(rngs=nnx.Rngs(0))(jnp.zeros(9))),
    ("audio", lambda: SileroVAD(rngs=nnx.Rngs(0))(jnp.zeros((1, 600), jnp.int16))),
    ("width", lambda: VoiceDetector(5, 0, rngs=nnx.Rngs(0))),
    ("features", lambda: VoiceDetector(5, 8, rngs=nnx.Rngs(0))(jnp.zeros((2, 9, 6)))),
  ],
)
def test_detector_errors_name_the_field(field, make):
  with pytest.raises(ValueError, match=f"^{field}:"):
    make()
