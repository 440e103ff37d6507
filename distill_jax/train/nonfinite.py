"""Finds what is not finite in a batch."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.train.arguments import Arguments
from distill_jax.train.gradients import interleave
from distill_jax.train.loss_fn import apply_teacher, as_dict, make_loss_of_outputs
from distill_jax.train.step_batch import prepare_batch
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, TrainState

MAX_NAMES = 5
_KINDS = ("entry", "teacher output", "student output", "term", "gradient of")


def find_nonfinite(
  arguments: Arguments, state: TrainState, teacher_variables: Any, batch: Batch
) -> list[str]:
  """Returns what is not finite, causes first: entries, outputs, terms, or the gradient's parts.

  Args:
    arguments: of `fit`.
    state: with the parameters of before a skipped update.
    teacher_variables: of a frozen teacher, else `()`.
    batch: as it is placed.
  """
  teacher, options = arguments.teacher, arguments.step
  loss_of_outputs = make_loss_of_outputs(arguments.student, arguments.objective)
  if teacher is not None and teacher.ema_update is not None:
    teacher_variables = state.average

  @jax.jit
  def flags(state, teacher_variables, batch, part):
    batch, keys, _ = prepare_batch(state, as_dict(batch), options)
    rows = {name: interleave(x, options.microbatches)[part] for name, x in batch.items()}
    outputs = apply_teacher(teacher, teacher_variables, rows)

    def loss(params):
      return loss_of_outputs(params, state.model_state, outputs, rows, step=state.step, keys=keys)

    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    terms = {name: pair[0] for name, pair in aux.terms.items()}
    return {
      "entry": _flags(rows, allow_missing=True),
      "teacher output": _flags(dict(outputs), allow_missing=True),
      "student output": _flags(aux.outputs, allow_missing=True),
      "term": _flags(terms),
      "gradient of": _flags(grads),
    }

  names: dict[str, None] = {}
  for part in range(options.microbatches):
    leaves = jax.device_get(flags(state, teacher_variables, batch, part))
    for kind in _KINDS:  # In the order of computation: jit has sorted them.
      if kind != "gradient of" or not names:
        names |= {f"{kind} {name!r}": None for name, is_bad in leaves[kind].items() if is_bad}
  return list(names)[:MAX_NAMES]


def _flags(tree: Any, *, allow_missing: bool = False) -> dict[str, jax.Array]:
  """Returns by path whether an array has values that are not finite.

  Args:
    tree: arrays; those of integers are left out.
    allow_missing: take -inf, the logit of a class that is missing, as finite.
  """
  flags = {}
  for name, x in named_leaves(tree):
    if jnp.issubdtype(x.dtype, jnp.floating):
      is_bad = ~jnp.isfinite(x) & (x != -jnp.inf) if allow_missing else ~jnp.isfinite(x)
      flags[name] = is_bad.any()
  return flags
