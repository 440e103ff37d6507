"""Prepares what a network's recipe asks for before its training: labels and first weights."""

import jax
import jax.numpy as jnp

from distill_jax.compression.initialization.provenance import format_origins
from distill_jax.distributed import hosts
from distill_jax.jobs.config import ConfigError, Examples, TrainedTeacher
from distill_jax.jobs.plan import ORIGINS, PSEUDO_LABELS, Job, Network
from distill_jax.jobs.trained import load_trained, trained_teacher_of, trained_variables
from distill_jax.storage import files
from distill_jax.types import Model, Variables


def relabeled(
  job: Job, network: Network, train: Examples, trained_teacher: TrainedTeacher | None
) -> Examples:
  """Returns the examples, with new labels where the network's recipe asks for them."""
  if network.recipe.relabel is None:
    return train
  if trained_teacher is None:
    raise ConfigError(
      f"recipe of {network.variant!r}: relabel: expected a teacher with weights, got none"
    )
  return network.recipe.relabel(train, trained_teacher, job.folder / PSEUDO_LABELS)


def with_initial_weights(job: Job, network: Network, train: Examples) -> Model:
  """Returns the Model that is trained, which starts from the weights that its recipe names."""
  model, init_from_teacher = network.train_model, network.recipe.init_from_teacher
  init = model.init
  if network.init_folder is not None:
    start = load_trained(job, network, network.init_folder, model)

    def init(key, batch):
      return Variables(*jax.tree.map(jnp.copy, tuple(start)))

  if init_from_teacher is None:
    return model._replace(init=init, variables=None)
  trained_teacher = trained_teacher_of(network, trained_variables(job, network), train)
  if trained_teacher is None:
    raise ConfigError(
      f"recipe of {network.variant!r}: init_from_teacher: expected a teacher with weights, got none"
    )

  def init_with_origins(key, batch):
    variables, origins = init_from_teacher(init(key, batch), trained_teacher)
    if hosts.is_first():
      network.folder.mkdir(parents=True, exist_ok=True)
      files.write(network.folder / ORIGINS, format_origins(origins) + "\n")
    return variables

  return model._replace(init=init_with_origins, variables=None)
