"""Distillation losses: pure functions of arrays that import jax and nothing else.

`f(student, teacher, ..., *, hyperparameters)`: logits, never probabilities; channels last. A loss
returns one value per example or token, for `distill_jax.reduce.mean(values, where)` after
`distill_jax.reduce.blank(where, student, teacher)`; a loss that relates the rows of a batch returns
a scalar and takes `where=` and `axis_name=`. Low-precision inputs are computed in float32.
README.md in this folder is a table of all losses.
"""

from distill_jax.losses.attention import (
  attention_cross_entropy,
  attention_kl,
  attention_scores_mse,
  minilm_relations,
  weight_alignment,
)
from distill_jax.losses.batch_logits import batch_gram, class_gram, dist
from distill_jax.losses.contrastive import dino, info_nce, queue_similarity
from distill_jax.losses.cross_image import CirkdState, cirkd, cirkd_state
from distill_jax.losses.ctc import ctc_frames, ctc_mean, is_blank_frame
from distill_jax.losses.dense import cwd, importance_map, localization, pearson, score_weighted
from distill_jax.losses.features import (
  attention_transfer,
  cosine,
  factor_transfer,
  fsp,
  hint,
  inter_channel,
  nst,
)
from distill_jax.losses.focal import Context, box_weights, fgd, fgd_init
from distill_jax.losses.grids import resize_logits
from distill_jax.losses.labels import dkd, nkd, ofa, wsld
from distill_jax.losses.layers import LayerAttention, layer_attention, layer_attention_init
from distill_jax.losses.linear import linear_cross_entropy, linear_kl, linear_sparse_kl
from distill_jax.losses.logits import (
  kl_divergence,
  reverse_kl,
  soft_cross_entropy,
  standardize,
  total_variation,
  uld,
)
from distill_jax.losses.memory import CrdState, crd, crd_state
from distill_jax.losses.mixtures import adaptive_kl, jensen_shannon, skew_kl, skew_reverse_kl
from distill_jax.losses.neighbors import correlation, dark_rank
from distill_jax.losses.pointwise import l1, pad, vitkd
from distill_jax.losses.positions import affinity, pairwise_similarity
from distill_jax.losses.preactivations import activation_boundary, ofd, ofd_margin
from distill_jax.losses.projected import mgd, review_kd, srd, vid, vid_raw_scale, vkd
from distill_jax.losses.raw_logits import binary_kl, hard_distillation, logit_mse, margin_mse
from distill_jax.losses.regions import ifv, region_affinity
from distill_jax.losses.relations import (
  correlation_congruence,
  pkt,
  rkd_angle,
  rkd_distance,
  similarity_preserving,
)
from distill_jax.losses.self_distillation import uskd
from distill_jax.losses.sequence import rnnt_three_way
from distill_jax.losses.singular import kdsvd
from distill_jax.losses.sparse import (
  sampled_cross_entropy,
  sparse_jensen_shannon,
  sparse_kl,
  sparse_kl_conditional,
  sparse_kl_smoothed,
)
from distill_jax.losses.targets import SparseTargets, sample_k, top_k
from distill_jax.losses.token_labels import minifinetuning, minillm_single_step

__all__ = [
  "CirkdState",
  "Context",
  "CrdState",
  "LayerAttention",
  "SparseTargets",
  "activation_boundary",
  "adaptive_kl",
  "affinity",
  "attention_cross_entropy",
  "attention_kl",
  "attention_scores_mse",
  "attention_transfer",
  "batch_gram",
  "binary_kl",
  "box_weights",
  "cirkd",
  "cirkd_state",
  "class_gram",
  "correlation",
  "correlation_congruence",
  "cosine",
  "crd",
  "crd_state",
  "ctc_frames",
  "ctc_mean",
  "cwd",
  "dark_rank",
  "dino",
  "dist",
  "dkd",
  "factor_transfer",
  "fgd",
  "fgd_init",
  "fsp",
  "hard_distillation",
  "hint",
  "ifv",
  "importance_map",
  "info_nce",
  "is_blank_frame",
  "inter_channel",
  "jensen_shannon",
  "kdsvd",
  "kl_divergence",
  "l1",
  "layer_attention",
  "layer_attention_init",
  "linear_cross_entropy",
  "linear_kl",
  "linear_sparse_kl",
  "localization",
  "logit_mse",
  "margin_mse",
  "mgd",
  "minifinetuning",
  "minilm_relations",
  "minillm_single_step",
  "nkd",
  "nst",
  "ofa",
  "ofd",
  "ofd_margin",
  "pad",
  "pairwise_similarity",
  "pearson",
  "pkt",
  "queue_similarity",
  "region_affinity",
  "resize_logits",
  "review_kd",
  "reverse_kl",
  "rkd_angle",
  "rkd_distance",
  "rnnt_three_way",
  "sample_k",
  "sampled_cross_entropy",
  "score_weighted",
  "similarity_preserving",
  "skew_kl",
  "skew_reverse_kl",
  "soft_cross_entropy",
  "sparse_jensen_shannon",
  "sparse_kl",
  "sparse_kl_conditional",
  "sparse_kl_smoothed",
  "srd",
  "standardize",
  "top_k",
  "total_variation",
  "uld",
  "uskd",
  "vid",
  "vid_raw_scale",
  "vitkd",
  "vkd",
  "weight_alignment",
  "wsld",
]
