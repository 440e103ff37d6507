"""Decodes encoder-decoders of any kind: greedily, by sampling and by beam search, under jit.

A network describes itself by `DecoderSteps`. The functions here turn them into pure functions that
compile once for each length of the source: `types.Sample`s, which all code that needs sequences
takes.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.models.decoding.beams import Beams, beam_sampler, beam_search
  from distill_jax.models.decoding.sampling import sampler
  from distill_jax.models.decoding.steps import DecoderSteps

__all__ = [
  "Beams",
  "DecoderSteps",
  "beam_sampler",
  "beam_search",
  "sampler",
]
