"""Decodes encoder-decoders and CTC networks of any kind: greedily and by beam search, under jit.

An encoder-decoder describes itself by `DecoderSteps`. `sampler` and `beam_sampler` turn them into
pure functions that compile once for each length of the source: `types.Sample`s, which all code that
needs sequences takes; `beam_search` returns several sequences of each row, with scores.
`ctc_sampler` and `ctc_nbest` do the same for networks that return CTC frames, by `ctc_greedy` and
`ctc_beam_search`.

`decoding_model` decodes whole sets, `sequence_log_probs` scores given targets, `target_rows` turns
sequences into targets, and `sample_on_policy` puts any `Sample` on-policy.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.models.decoding.beams import Beams, beam_sampler, beam_search
  from distill_jax.models.decoding.ctc import ctc_greedy, ctc_nbest, ctc_sampler
  from distill_jax.models.decoding.ctc_prefixes import ctc_beam_search
  from distill_jax.models.decoding.on_policy import sample_on_policy
  from distill_jax.models.decoding.sampling import sampler
  from distill_jax.models.decoding.steps import DecoderSteps
  from distill_jax.models.decoding.targets import (
    decoding_model,
    sequence_log_probs,
    target_rows,
  )

__all__ = [
  "Beams",
  "DecoderSteps",
  "beam_sampler",
  "beam_search",
  "ctc_beam_search",
  "ctc_greedy",
  "ctc_nbest",
  "ctc_sampler",
  "decoding_model",
  "sample_on_policy",
  "sampler",
  "sequence_log_probs",
  "target_rows",
]
