"""Terms that learn a head on a feature of the student: a variance, or logits instead of a teacher.

The head trains with the student and is not exported.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.hyperparameters import at_step, check_at_steps
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.loss_checks import check_options
from distill_jax.objectives.parts import (
  align,
  align_init,
  connector,
  connector_init,
  layer,
  layer_init,
)
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

  >>> from distill_jax import objectives
  >>> term = objectives.pad("pooled", "pooled")
  >>> student, teacher = {"pooled": np.zeros((2, 4))}, {"pooled": np.zeros((2, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> params["head"]["layer"]["kernel"].shape  # one log-variance an example
  (4, 1)
  """

  def init(key, s, t):
    check_pair(s, t)
    align_key, head_key = jax.random.split(key)
    head = connector_init(head_key, s.shape[-1], 1)
    return Variables({"align": align_init(align_key, s, t), "head": head}, {})

  def apply(params, state, s, t, *, where, axis_name):
    rows = {"where": where, "axis_name": axis_name}
    log_variance = connector(params["head"], _mean_over_space(s), **rows)[:, 0]
    return losses.pad(align(params["align"], s, t), t, log_variance), state

  return learned(student, teacher, init, apply)


def uskd(
  feature: str, *, output: str = "logits", entry: str = "label", **hyperparameters: Any
) -> Term:
  """Universal self-knowledge distillation: `losses.uskd` with a weak head on a middle feature.

  It needs no teacher. The head is a linear map of the feature's mean over space. Weight 1 next to
  `labels()` (Yang et al. 2023, arXiv:2303.13005).

  Args:
    feature: name of the student's middle feature, [B, ..., C].
    output: name of the student's logits, [B, classes].
    entry: name of the batch's integer labels [B]; rows with a negative one do not count.
    **hyperparameters: `alpha`, `beta`, `mu` of the loss, each a number or a schedule of the step.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have; in init, an unknown name,
      logits that are not [B, classes], a feature of fewer than 2 axes, or a hyper-parameter that
      the loss rejects; in a step, labels that do not fit or that the batch lacks.

  >>> from distill_jax import objectives
  >>> term = objectives.uskd("block2")
  >>> student = {"logits": np.zeros((2, 10)), "block2": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, {})
  >>> params["kernel"].shape  # the weak head, from block2 to the classes
  (8, 10)
  """
  schedules = check_options(losses.uskd, {"labels"}, hyperparameters)

  def init(key, s, t):
    del t
    logits, middle = s
    if len(logits.shape) != 2 or len(middle.shape) < 2:
      raise ValueError(
        f"feature: expected logits [B, classes] and a feature [B, ..., C], got {logits.shape} and "
        f"{middle.shape}"
      )
    logits = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    labels = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    check_at_steps(losses.uskd, hyperparameters, schedules, logits, logits, labels)
    return Variables(layer_init(key, middle.shape[-1], logits.shape[-1]), {})

  def apply(params, state, s, t, *, labels, where, step, axis_name):
    del t
    options = {name: at_step(value, step) for name, value in hyperparameters.items()}
    logits, middle = s
    labeled = labels >= 0
    rows = {"where": labeled if where is None else where & labeled, "axis_name": axis_name}
    weak = layer(params, _mean_over_space(middle))
    return losses.uskd(logits, weak, labels, **rows, **options), state

  return learned((output, feature), (), init, apply, entries={"labels": entry})


def _mean_over_space(x: jax.Array) -> jax.Array:
  """Returns [B, C] of features [B, ..., C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1]).mean(1)
