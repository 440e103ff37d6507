"""Defines what to minimize: weighted terms over (student, teacher, batch).

    objective = weighted(
      hard=(0.1, labels()),
      soft=(0.9, logits(losses.kl_divergence, temperature=4.0)),
      hint=(optax.linear_schedule(1.0, 0.0, 1000), features("block2", "block3", losses.hint)),
    )

A training loss of one's own is a `student_loss`. A loss of arrays goes through `logits` or
`features`, one of a few of the teacher's classes through `sparse`, language models through
`tokens`, layers of transformers through `layers`, `attention` and `relations`, feature sequences of
other lengths through `sequences`, CTC networks through `ctc`, `frames` and `ctc_mean`,
transducers through `lattice`, codes of a layer through `codes`. A method
with learned parts or a memory is a term here, under the name of its loss: `vid`, `mgd`, `crd`, ...;
`learned` builds others.
"""

from distill_jax.objectives.before_relu import activation_boundary, ofd, ofd_margin_at
from distill_jax.objectives.codes import codes
from distill_jax.objectives.cross_image import cirkd
from distill_jax.objectives.ctc import ctc
from distill_jax.objectives.factor_transfer import factor_transfer, paraphraser
from distill_jax.objectives.feature_comparisons import features
from distill_jax.objectives.frames import ctc_mean, frames
from distill_jax.objectives.heads import pad, uskd
from distill_jax.objectives.labels import labels
from distill_jax.objectives.lattices import lattice
from distill_jax.objectives.layer_maps import layer_map
from distill_jax.objectives.layers import attention, layers, relations
from distill_jax.objectives.learned import learned, srd, vid, vkd
from distill_jax.objectives.locations import locations
from distill_jax.objectives.logit_comparisons import logits, mutual
from distill_jax.objectives.maps import layer_attention, mgd, review_kd
from distill_jax.objectives.memories import crd, dino, queue_similarity
from distill_jax.objectives.necks import fgd, score_weighted
from distill_jax.objectives.patches import vitkd
from distill_jax.objectives.sequences import sequences
from distill_jax.objectives.sparse import sparse
from distill_jax.objectives.student_losses import student_loss
from distill_jax.objectives.sums import summed
from distill_jax.objectives.terms import Term, weighted
from distill_jax.objectives.tokens import next_tokens, tokens
from distill_jax.objectives.weights import weights

__all__ = [
  "Term",
  "activation_boundary",
  "attention",
  "cirkd",
  "codes",
  "crd",
  "ctc",
  "ctc_mean",
  "dino",
  "factor_transfer",
  "features",
  "fgd",
  "frames",
  "labels",
  "lattice",
  "layer_attention",
  "layer_map",
  "layers",
  "learned",
  "locations",
  "logits",
  "mgd",
  "mutual",
  "next_tokens",
  "ofd",
  "ofd_margin_at",
  "pad",
  "paraphraser",
  "queue_similarity",
  "relations",
  "review_kd",
  "score_weighted",
  "sequences",
  "sparse",
  "srd",
  "student_loss",
  "summed",
  "tokens",
  "uskd",
  "vid",
  "vitkd",
  "vkd",
  "weighted",
  "weights",
]
