"""Checks before anything is trained what a later stage would reject."""

from collections.abc import Collection

import jax
import numpy as np

from distill_jax.cache.store.backend import open_store
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.data import Source
from distill_jax.data.leaks import check_no_shared_cases, check_no_shared_groups
from distill_jax.distributed import partition, sharding
from distill_jax.errors import suggest
from distill_jax.jobs import cache_stages, data
from distill_jax.jobs.config import ConfigError, TrainedTeacher, error_prefix
from distill_jax.jobs.measures import COMPARISONS, job_task
from distill_jax.jobs.plan import ROLES, Job, Network, one_per_variant, train_data
from distill_jax.storage import seal
from distill_jax.train import make_init
from distill_jax.train.generation import check_sample
from distill_jax.train.measure import term_names
from distill_jax.types import Batch, Model, Variables


def check(job: Job, stages: Collection[str]) -> None:
  """Checks a job's groups of examples, labels, batch sizes, cache, objectives, initial weights and
  sharding rules.

  Raises:
    ConfigError: names the field, or the variant.
    ValueError: from what the config builds.
  """
  _check_disjoint(job)
  _check_labeled(job, stages)
  _check_samples(job, stages)
  if job.cache:
    _check_cache(job)
  mesh = job.config.make_mesh()
  for role in ROLES:
    role_networks = one_per_variant(job, role)
    for network in role_networks:
      _check_batch_size(job, network, mesh)
    if role not in stages or not role_networks:
      continue
    if role == "student":
      _check_objectives(job, role_networks)
      _check_best(job, role_networks)
      _check_initial_weights(job, role_networks)
    _check_sharding(job, role_networks[0], mesh)


def _check_disjoint(job: Job) -> None:
  """Checks that no group of examples, and no case of the task, is in two of the three sets."""
  train, validation, test = job.splits
  pairs = (
    (train, validation, "validation"),
    (train, test, "test"),
    (validation, test, "test"),
  )
  for first, second, field in pairs:
    check_no_shared_groups(first, second, field)
  task = job.config.task()
  if task is None:
    return
  for first, second, field in pairs:
    check_no_shared_cases(first, second, task.groups, field)


def _check_labeled(job: Job, stages: Collection[str]) -> None:
  for role in ("teacher", "baseline"):
    if role not in stages or not one_per_variant(job, role):
      continue
    train = train_data(job, role)
    if isinstance(train, Source) and not train.labeled.any():
      raise ConfigError(
        f"{role}_train: expected labels, from which alone the {role} learns, got none: let "
        f"{role}_train return labeled examples, or leave {role!r} out of --stages"
      )


def _check_samples(job: Job, stages: Collection[str]) -> None:
  """Checks that all networks whose text the report scores generate some."""
  task = job.config.task()
  if task is None or not task.generates:
    return
  teacher = job.teacher_model
  if "report" in stages and teacher is not None and teacher.variables is not None:
    with error_prefix("teacher()"):
      check_sample("model", teacher)
  for role in ROLES:
    for network in one_per_variant(job, role):
      with error_prefix(network.variant or ("teacher()" if role == "teacher" else "student()")):
        check_sample("model", network.model)


def _check_cache(job: Job) -> None:
  with error_prefix("cache"):
    open_store(job.cache)
  with error_prefix("cache_batch_size"):
    mesh = sharding.data_mesh(job.config.devices or None)
    sharding.check_divisible(job.config.cache_batch_size, mesh)
  cache_stages.check_num_views(job)


def _check_batch_size(job: Job, network: Network, mesh: jax.sharding.Mesh) -> None:
  training = network.training
  num_examples = len(train_data(job, network.role))
  with error_prefix(_training_field(job, network)):
    sharding.check_divisible(training.batch_size, mesh, microbatches=training.microbatches)
    if training.batch_size > num_examples:
      raise ConfigError(
        f"batch_size: expected at most the {num_examples} examples, got {training.batch_size}"
      )


def _training_field(job: Job, network: Network) -> str:
  """Returns the name of a network's settings, for messages."""
  if network.role == "teacher":
    return "teacher_training"
  return "student_training" if network.training is job.config.student_training else network.name


def _check_objectives(job: Job, students: Collection[Network]) -> None:
  """Checks all variants' objectives and optimizers by shapes: the last one would be rejected hours
  later.
  """
  key, batch = jax.random.key(0), data.first(job.config, job.splits.train)
  for network in students:
    with error_prefix(f"objective of {network.variant!r}" if network.variant else "objective"):
      teacher, _ = _teacher(job, network, key, batch)
      optimizer = network.training.optimizer()
      init = make_init(network.train_model, teacher, network.objective(None), optimizer)
      jax.eval_shape(init, key, batch)


def _check_best(job: Job, students: Collection[Network]) -> None:
  """Checks that every student has the metric that chooses its weights."""
  best = job.config.best
  names = {metric.name for metric in job_task(job).metrics} | set(COMPARISONS)
  if not best or best in names:
    return
  key, batch = jax.random.key(0), data.first(job.config, job.splits.train)
  batch = {"view": np.zeros(len(batch["id"]), np.int32), **batch}
  for network in students:
    teacher, variables = _teacher(job, network, key, batch)
    parts = network.train_model, teacher, network.objective(None)
    state = jax.eval_shape(make_init(*parts, network.training.optimizer()), key, batch)
    terms = {"loss", *term_names(*parts, state, variables, batch)}
    if best not in terms:
      raise ConfigError(
        f"best: expected a metric of the task or a term of the objective, got {best!r}"
        f"{suggest(best, names | terms)}"
      )


def _check_initial_weights(job: Job, students: Collection[Network]) -> None:
  """Checks weights from which students start against their own."""
  key, batch = jax.random.key(0), data.first(job.config, job.splits.train)
  recipes = {network.variant: network.recipe for network in students}
  for network in students:
    init_from = network.recipe.init_from
    with error_prefix(f"recipe of {network.variant!r}" if network.variant else "recipe"):
      if init_from and not (init_from in recipes and recipes[init_from].allow_shrunk):
        model = recipes[init_from].student if init_from in recipes else job.student_model
        layouts = [
          seal.layout(jax.eval_shape(m.init, key, batch)) for m in (network.train_model, model)
        ]
        with error_prefix(f"init_from: {init_from!r} is another network"):
          seal.check_layout(*layouts)
      _check_init_from_teacher(job, network, key, batch)


def _check_init_from_teacher(job: Job, network: Network, key: jax.Array, batch: Batch) -> None:
  """Checks by shapes, on zeros that take no memory until they are read."""
  recipe, teacher = network.recipe, network.teacher
  if recipe.init_from_teacher is None or teacher is None or recipe.allow_shrunk:
    return
  variables = jax.eval_shape(network.train_model.init, key, batch)
  teacher_variables = teacher.variables or jax.eval_shape(teacher.init, key, batch)
  train = train_data(job, "student")
  with error_prefix("init_from_teacher"):
    recipe.init_from_teacher(
      _zeros(variables), TrainedTeacher(teacher, _zeros(teacher_variables), train)
    )


def _zeros(tree: Variables) -> Variables:
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def _check_sharding(job: Job, network: Network, mesh: jax.sharding.Mesh) -> None:
  """Checks rules against the arrays: one that fits nothing would be found when the network is
  made.
  """
  config, training = job.config, network.training
  rules, teacher_rules = config.rules(network.role), config.teacher_rules()
  if not rules and not teacher_rules:
    return
  key, batch = jax.random.key(0), data.first(config, job.splits.train)
  teacher, teacher_variables = _teacher(job, network, key, batch)
  init = make_init(network.train_model, teacher, network.objective(None), training.optimizer())
  with error_prefix(f"rules({network.role!r})"):
    partition.state_specs(jax.eval_shape(init, key, batch), mesh, rules)
  if jax.tree.leaves(teacher_variables):
    with error_prefix("teacher_rules"):
      partition.specs(teacher_variables, mesh, teacher_rules)


def _teacher(
  job: Job, network: Network, key: jax.Array, batch: Batch
) -> tuple[Model | None, Variables]:
  """Returns the teacher of a network of the first generation, from the cache if it reads one, and
  its weights' shapes.
  """
  teacher = network.teacher
  if network.cached and teacher is not None:
    teacher = with_cached_outputs(teacher, job.config.cached_outputs())
  if teacher is None:
    return None, Variables({}, {})
  return teacher, teacher.variables or jax.eval_shape(teacher.init, key, batch)
