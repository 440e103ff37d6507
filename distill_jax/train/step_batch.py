"""Prepares a batch inside the step: blank rows, augmentation, mixing and generated rows."""

from typing import Any

import jax

from distill_jax import reduce
from distill_jax.train.options import StepOptions
from distill_jax.train.replay import Replay
from distill_jax.types import Batch, OnPolicy, TrainState, Variables


def check_no_cached_outputs(batch: Batch) -> None:
  """Checks that a batch has no cached teacher outputs, which do not cover rows generated in the
  step.

  Raises:
    ValueError: it has some.
  """
  cached = sorted(name for name in batch if name.startswith("teacher/"))
  if cached:
    raise ValueError(
      f"on_policy: expected a live teacher, got cached outputs ({cached[0]!r}), which do not cover "
      "generated rows: pass the teacher's Model"
    )


def prepare_batch(state: TrainState, batch: Batch, options: StepOptions) -> tuple[Batch, Any, dict]:
  """Returns the batch as the networks see it, the student's and the objective's keys, and a new
  replay buffer.
  """
  step_key = jax.random.fold_in(state.key, state.step)
  mix_key, student_key, objective_key = jax.random.split(step_key, 3)
  if options.axis_name is not None:
    # Devices draw different dropout masks; what the objective draws (negatives, masks) is the same
    # on all.
    device = jax.lax.axis_index(options.axis_name)
    mix_key, student_key = (jax.random.fold_in(key, device) for key in (mix_key, student_key))
  # NaN times zero is NaN in the weights' gradients.
  batch = reduce.blank(batch.get("where"), batch)
  if options.augment is not None:
    batch = options.augment(batch)
  if options.mix is not None:
    batch = options.mix(mix_key, batch)
  batch, replay = _generate(state, jax.random.fold_in(step_key, 3), batch, options.on_policy)
  return batch, (student_key, objective_key), replay


def _generate(
  state: TrainState, key: jax.Array, batch: Batch, on_policy: OnPolicy | Replay | None
) -> tuple[Batch, dict[str, Any]]:
  """Returns the batch with rows that the student generated, and the replay buffer if there is
  one.
  """
  if on_policy is None:
    return batch, {}
  check_no_cached_outputs(batch)
  variables = Variables(state.params["student"], state.model_state["student"])
  if not isinstance(on_policy, Replay):
    return on_policy(variables, key, batch), {}
  if "replay" not in state.model_state:
    raise ValueError(
      "on_policy: expected a replay buffer in the train state, got none: give make_init the same "
      "on_policy"
    )
  batch, buffer = on_policy.apply(variables, state.model_state["replay"], state.step, key, batch)
  return batch, {"replay": buffer}
