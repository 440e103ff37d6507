"""Terms that learn a head on one of the student's features, which weighs or replaces the teacher.

The head trains with the student and is not exported.
"""

import jax

from distill_jax import losses
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.parts import align, align_init, connector, connector_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def pad(student: str, teacher: str) -> Term:
  """Prime-aware adaptive distillation: `losses.pad` with a learned log-variance per example.

  The head is a linear map of the feature's mean over space and batch norm, as in torchdistill;
  channels and size are aligned as in `features`. Weight 1 (Zhang et al. 2020, arXiv:2008.01458).

  Args:
    student, teacher: names of outputs of one rank, [B, ..., C].

  Raises:
    ValueError: in init, ranks, rows or lengths differ.
  """

  def init(key, s, t):
    check_pair(s, t)
    align_key, head_key = jax.random.split(key)
    head = connector_init(head_key, s.shape[-1], 1)
    return Variables({"align": align_init(align_key, s, t), "head": head}, {})

  def apply(params, state, s, t, *, where, axis_name):
    mean = s.reshape(s.shape[0], -1, s.shape[-1]).mean(1)
    log_variance = connector(params["head"], mean, where=where, axis_name=axis_name)[:, 0]
    return losses.pad(align(params["align"], s, t), t, log_variance), state

  return learned(student, teacher, init, apply)
