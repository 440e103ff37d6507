"""What the jobs of encoder-decoders share: batches of similar lengths, and their objectives."""

import dataclasses

from distill_jax import losses, objectives
from distill_jax.jobs.config import Config

HEAD = 16
"""Values of an attention head."""
WORD_LEVEL = ("word", "both")
"""Variants that compare with the teacher token by token."""


@dataclasses.dataclass
class SequenceJob(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    length: number of tokens of a row, of both sides; longer pairs are left out.
    buckets: numbers of tokens of a batch, of both sides, next to `length`.
  """

  length: int = 32
  buckets: tuple[int, ...] = (8, 12, 16, 24)

  def lengths(self):
    return tuple((n, n) for n in self.buckets if n < self.length) + ((self.length, self.length),)

  def variant_objective(self, variant, trained_teacher=None):
    if variant not in WORD_LEVEL:
      return self.baseline_objective()
    term = objectives.tokens(losses.kl_divergence, label_weight=1.0)
    return objectives.weighted(tokens=(0.5, term))

  def baseline_objective(self):
    return objectives.weighted(hard=(1.0, objectives.next_tokens()))
