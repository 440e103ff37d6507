"""What a later stage would refuse, refused before anything is trained."""

from collections.abc import Collection

import jax
import numpy as np

from distill_jax.cache.store.backend import open_store
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.data import Source
from distill_jax.distributed import sharding
from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError, TrainedTeacher, error_prefix
from distill_jax.jobs.plan import ROLES, Job, Network, one_per_variant, train_data
from distill_jax.storage import seal
from distill_jax.train import make_init
from distill_jax.types import Batch, Model, Variables


def check(job: Job, stages: Collection[str]) -> None:
  """Raises for labels that are not there, batches that do not fit the devices or the examples, and objectives that do
  not fit the networks.

  Raises:
    ConfigError: names the field, or the variant.
    ValueError: from what the config builds.
  """
  _check_labeled(job, stages)
  if job.config.cache:
    with error_prefix("cache"):
      open_store(job.config.cache)
    with error_prefix("cache_batch_size"):
      sharding.check_divisible(
        job.config.cache_batch_size, sharding.data_mesh(job.config.devices or None)
      )
  mesh = job.config.make_mesh()
  for role in ROLES:
    found = one_per_variant(job, role)
    for network in found:
      training, number = network.training, len(train_data(job, role))
      with error_prefix(_training_of(job, network)):
        sharding.check_divisible(training.batch_size, mesh, microbatches=training.microbatches)
        if training.batch_size > number:
          raise ConfigError(
            f"batch_size: expected at most the {number} examples, got {training.batch_size}"
          )
    if role == "student" and role in stages:
      _check_objectives(job, found)
      _check_starts(job, found)
    if role in stages and found:
      _check_rules(job, found[0], mesh)


def _check_labeled(job: Job, stages: Collection[str]) -> None:
  for role in ("teacher", "baseline"):
    if role not in stages or not one_per_variant(job, role):
      continue
    train = train_data(job, role)
    if isinstance(train, Source) and (train.arrays["label"] < 0).all():
      raise ConfigError(
        f"{role}_train: no example has a label, and the {role} learns from labels alone: let {role}_train give "
        f"labeled examples, or leave {role!r} out of --stages"
      )


def _training_of(job: Job, network: Network) -> str:
  """The name of a network's settings, for messages."""
  if network.role == "teacher":
    return "teacher_training"
  return "student_training" if network.training is job.config.student_training else network.name


def _check_objectives(job: Job, students: Collection[Network]) -> None:
  """All variants against the shapes of the networks' outputs, and their optimizers against those of the parameters: the
  last one would be refused hours later."""
  key, batch = jax.random.key(0), data.first(job.config, job.splits.train)
  for network in students:
    with error_prefix(f"objective of {network.variant!r}" if network.variant else "objective"):
      teacher, _ = _teacher(job, network, key, batch)
      optimizer = network.training.optimizer()
      jax.eval_shape(
        make_init(network.train_model, teacher, network.objective(None), optimizer), key, batch
      )


def _check_starts(job: Job, students: Collection[Network]) -> None:
  """Weights that a student starts from against its own: by shapes, on zeros that take no memory until they are read."""
  key, batch = jax.random.key(0), data.first(job.config, job.splits.train)
  recipes = {n.variant: n.recipe for n in students}
  for network in students:
    recipe, start = network.recipe, network.recipe.init_from
    if not start and recipe.init_from_teacher is None:
      continue
    with error_prefix(f"recipe of {network.variant!r}" if network.variant else "recipe"):
      own = jax.eval_shape(network.train_model.init, key, batch)
      if start and not (start in recipes and recipes[start].allow_shrunk):
        source = recipes[start].student if start in recipes else job.config.student()
        with error_prefix(f"init_from: {start!r} is another network"):
          seal.check_layout(seal.layout(own), seal.layout(jax.eval_shape(source.init, key, batch)))
      if (
        recipe.init_from_teacher is not None
        and network.teacher is not None
        and not recipe.allow_shrunk
      ):
        theirs = network.teacher.variables or jax.eval_shape(network.teacher.init, key, batch)
        with error_prefix("init_from_teacher"):
          recipe.init_from_teacher(
            _zeros(own), TrainedTeacher(network.teacher, _zeros(theirs), train_data(job, "student"))
          )


def _zeros(tree: Variables) -> Variables:
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def _check_rules(job: Job, network: Network, mesh: jax.sharding.Mesh) -> None:
  """A rule that fits nothing, or does not fit, would be found when its network is made."""
  config, training = job.config, network.training
  rules, teacher_rules = config.rules(network.role), config.teacher_rules()
  if not rules and not teacher_rules:
    return
  key, batch = jax.random.key(0), data.first(config, job.splits.train)
  teacher, start = _teacher(job, network, key, batch)
  init = make_init(network.train_model, teacher, network.objective(None), training.optimizer())
  with error_prefix(f"rules({network.role!r})"):
    sharding.state_specs(jax.eval_shape(init, key, batch), mesh, rules)
  if jax.tree.leaves(start):
    with error_prefix("teacher_rules"):
      sharding.specs(start, mesh, teacher_rules)


def _teacher(job: Job, network: Network, key, batch: Batch) -> tuple[Model | None, Variables]:
  """Who teaches a network of the first generation, as its cache would where there is one, and the weights' shapes."""
  teacher = network.teacher
  if network.cached and teacher is not None:
    teacher = with_cached_outputs(teacher, job.config.cached_outputs())
  if teacher is None:
    return None, Variables({}, {})
  return teacher, teacher.variables or jax.eval_shape(teacher.init, key, batch)
