"""Recognizers are exported for any number of rows."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.speech.silero_vad import SileroVAD
from distill_jax.models.speech.speech_encoder import SpeechEncoder
from distill_jax.models.speech.text_line import TextLineEncoder
from distill_jax.models.speech.voice_detector import VoiceDetector

RNGS = nnx.Rngs(0)
GRU = FrameEncoderConfig(5, 8, 1, layer="gru")
NETWORKS = {
  "conformer": (SpeechEncoder(FrameEncoderConfig(5, 8, 1), num_features=4, rngs=RNGS), (12, 4)),
  "gru": (SpeechEncoder(GRU, num_features=4, rngs=RNGS), (12, 4)),
  "line": (TextLineEncoder(GRU, widths=(4, 4), height=8, rngs=RNGS), (8, 12, 1)),
  "detector": (VoiceDetector(4, 8, rngs=RNGS), (12, 4)),
  "silero": (SileroVAD(rngs=RNGS), (1024,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_may_be_of_any_number(name):
  network, shape = NETWORKS[name]
  network.eval()  # A batch norm has no averages to update.
  graph, state = nnx.split(network)
  (rows,) = export.symbolic_shape("rows")
  inputs = [jax.ShapeDtypeStruct((rows, *shape), jnp.float32)]
  if name in ("conformer", "gru", "line"):
    inputs.append(jax.ShapeDtypeStruct((rows,), jnp.int32))
  program = export.export(jax.jit(lambda *x: nnx.merge(graph, state)(*x)["logits"]))(*inputs)
  assert program.out_avals[0].shape[0] == rows
