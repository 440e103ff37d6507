"""Prints what a job would train; trains and writes nothing."""

from typing import Any

import jax

from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.cost.runtime import measure_cost
from distill_jax.data import Source
from distill_jax.jobs import data
from distill_jax.jobs.config import Examples, Splits, error_prefix
from distill_jax.jobs.plan import ROLES, Job, Network, one_per_variant, train_data
from distill_jax.train import make_init, make_train_step


def print_plan(job: Job) -> None:
  """Prints shapes, parameters, FLOPs and memory of each network, and of a step of each variant."""
  print("data: " + ", ".join(f"{n} {len(s)}" for n, s in zip(Splits._fields, job.splits)))
  for role in ROLES:
    networks = one_per_variant(job, role)
    printed: set[str] = set()
    for network in networks:
      printed |= _print_model(job, network, printed)
    if networks:
      _print_examples(train_data(job, role))
    for network in networks:
      _print_step(job, network)


def _print_model(job: Job, network: Network, printed: set[str]) -> set[str]:
  """Prints a network unless one of its shapes was printed before; returns its shapes."""
  key, example = jax.random.key(0), data.first(job.config, job.splits.train)
  shapes = str(jax.tree.map(lambda x: x.shape, jax.eval_shape(network.model.init, key, example)))
  if shapes in printed:
    return set()
  variables = network.model.init(key, example)
  cost = measure_cost(network.model, variables, example, repeats=1)
  outputs = jax.eval_shape(
    lambda v, b: network.model.apply(*v, b, train=False, key=None)[0], variables, example
  )
  print(
    f"{network.role}: {cost['parameters']:,.0f} parameters, {cost['bytes']:,.0f} bytes, "
    f"{cost['flops']:,.0f} FLOPs per example"
  )
  for name, output in outputs.items():
    if hasattr(output, "shape"):
      print(f"  {name}: {('batch', *output.shape[1:])} {output.dtype}")
    else:  # It has no row per example: a head, weights.
      print(f"  {name}: {[leaf.shape for leaf in jax.tree.leaves(output)]}")
  return {shapes}


def _print_examples(train: Examples) -> None:
  labeled = int(train.labeled.sum()) if isinstance(train, Source) else len(train)
  print(f"  trained on {len(train):,} examples of {train.name}, {labeled:,} with a label")


def _print_step(job: Job, network: Network) -> None:
  config, training, teacher, key = job.config, network.training, network.teacher, jax.random.key(0)
  batch = next(data.training_batches(config, train_data(job, network.role), training.batch_size))
  teacher_variables = (
    jax.eval_shape(teacher.init, key, batch) if teacher and not teacher.ema_update else ()
  )
  if network.cached and teacher is not None:
    teacher = with_cached_outputs(teacher, config.cached_outputs())
  parts = network.train_model, teacher, network.objective(None), training.optimizer()
  on_policy = network.recipe.on_policy
  with error_prefix(f"{network.role} and its objective"):
    state = make_init(*parts, on_policy=on_policy)(key, batch)
  step = make_train_step(*parts, config.step_options(training, on_policy))
  compiled = jax.jit(step, donate_argnums=0).lower(state, teacher_variables, batch).compile()
  memory: Any = compiled.memory_analysis()
  variant = f" with {network.variant}" if network.variant else ""
  print(
    f"  one step{variant} of batch {training.batch_size} on one device: "
    f"arguments {memory.argument_size_in_bytes:,} bytes, temporaries "
    f"{memory.temp_size_in_bytes:,}, "
    f"outputs {memory.output_size_in_bytes:,} (of which {memory.alias_size_in_bytes:,} reuse "
    "donated arguments)"
  )
