"""Writes the sequences that a teacher generates as pseudo labels, and reads them as a source.

This is sequence-level distillation (Kim & Rush 2016). It belongs to the cache: pseudo labels are
outputs of a teacher by example id, stored once, in the same files and under the same checks; `data`
must not import what decodes.

`cache.seq_kd` decodes every row of a source, and `cache.pseudo_labels` reads the rows with the
teacher's sequences as targets. All sequences of a beam are stored; `keep` chooses one for each row,
or none, by functions of `Candidates`: `nth_best`, `nearest_to_reference`, `at_least`, `below` and
`without_worst`, which take a score such as `sentence_bleu`, `word_error_rate` and
`backward_cross_entropy`. A mixture of real and pseudo labels is `data.mix_labels`, or
`data.concatenate`.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.cache.sequence_level.candidates import Candidates
  from distill_jax.cache.sequence_level.reading import pseudo_label_figures
  from distill_jax.cache.sequence_level.rules import (
    at_least,
    below,
    nearest_to_reference,
    nth_best,
    without_worst,
  )
  from distill_jax.cache.sequence_level.scores import (
    backward_cross_entropy,
    reference_score,
    sentence_bleu,
    word_error_rate,
  )

__all__ = [
  "Candidates",
  "at_least",
  "backward_cross_entropy",
  "below",
  "nearest_to_reference",
  "nth_best",
  "pseudo_label_figures",
  "reference_score",
  "sentence_bleu",
  "without_worst",
  "word_error_rate",
]
