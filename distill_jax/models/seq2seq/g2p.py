"""Loads the released network of PyPI's g2p-en 2.1.0, which pronounces English words.

    pip install --no-deps g2p-en  (Apache-2; the package itself downloads data: do not import it)

    teacher = load_g2p(folder / "checkpoint20.npz")
    sample = beam_sampler(g2p_steps(), max_length=28, beam_size=4)

It is a GRU encoder-decoder of 834,890 parameters without attention. Its vocabularies are
`data.sets.pronunciations.GRAPHEMES`, where '</s>' ends a word, and `PHONES`. It was trained on
cmudict: words of that dictionary are not new to it. On 4,096 of them it has a phone error rate of
10.1 % by greedy decoding.
"""

import os

from distill_jax.data.sets.pronunciations import GRAPHEMES, PHONES
from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.decoding.steps import DecoderSteps
from distill_jax.models.seq2seq.encoder_decoder import INPUTS
from distill_jax.models.seq2seq.recurrent import (
  RecurrentConfig,
  RecurrentEncoderDecoder,
  recurrent_steps,
)
from distill_jax.models.weights import Origin, pretrained, torch_kernel
from distill_jax.types import Model

CONFIG = RecurrentConfig(
  len(PHONES), 256, source_vocab_size=len(GRAPHEMES), attention=False, bidirectional=False
)
_SIDES = {"encoder": "enc", "decoder": "dec"}
_PARTS = {"input": "ih", "state": "hh"}
NAMES: dict[str, Origin] = {
  "params/source_embed/embedding": "enc_emb",
  "params/embed/embedding": "dec_emb",
  "params/head/kernel": ("fc_w", torch_kernel),
  "params/head/bias": "fc_b",
  **{
    f"params/{side}/{part}/kernel": (f"{prefix}_w_{name}", torch_kernel)
    for side, prefix in _SIDES.items()
    for part, name in _PARTS.items()
  },
  **{
    f"params/{side}/{part}/bias": f"{prefix}_b_{name}"
    for side, prefix in _SIDES.items()
    for part, name in _PARTS.items()
  },
}
"""The entries of the file, for `models.pretrained` and `save_weights`."""


def load_g2p(path: str | os.PathLike) -> Model:
  """Returns the released network with its weights; it reads the entries of `INPUTS`.

  Args:
    path: checkpoint20.npz of the package.

  Raises:
    FileNotFoundError, ValueError: as `models.pretrained`.

  >>> teacher = load_g2p("g2p_en/checkpoint20.npz")  # doctest: +SKIP
  """
  return pretrained(from_nnx(_make, inputs=INPUTS), path, {}, names=NAMES)


def g2p_steps() -> DecoderSteps:
  """Returns the steps of the network of `load_g2p`, for `models.decoding`.

  >>> steps = g2p_steps()
  >>> steps.vocab_size, PHONES[steps.start_token], PHONES[steps.end_token]
  (74, '<s>', '</s>')
  """
  return recurrent_steps(_make, start_token=PHONES.index("<s>"), end_token=PHONES.index("</s>"))


def _make(rngs):
  return RecurrentEncoderDecoder(CONFIG, rngs=rngs)
