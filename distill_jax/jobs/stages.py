"""The stages of a job: train the teacher, the student alone, the student distilled; compare. Each can be resumed."""

import json
import time
import warnings
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp

from distill_jax.compression.initialization.provenance import format_origins
from distill_jax.distributed import hosts, sharding
from distill_jax.jobs import cache_stages, data
from distill_jax.jobs.config import ConfigError, Examples, TrainedTeacher
from distill_jax.jobs.plan import (
  EXTRA_STAGES,
  ORIGINS,
  RESULT,
  ROLES,
  STAGES,
  Job,
  Network,
  is_complete,
  networks,
  train_data,
)
from distill_jax.jobs.report_stage import write_report
from distill_jax.models import cast
from distill_jax.models.llm.decoder import with_logits
from distill_jax.storage import files
from distill_jax.storage.student import export_student, load_student
from distill_jax.storage.stablehlo import export_stablehlo
from distill_jax.train import fit
from distill_jax.train.placement import init_on_host
from distill_jax.train.saver import student_of
from distill_jax.types import Model, Variables


def run_stages(job: Job, stages: Collection[str]) -> None:
  """Runs the stages in order; what is complete is skipped, what was interrupted goes on."""
  if job.config.cache and "cache" in stages:
    cache_stages.check_writable(job)
  for stage in STAGES + EXTRA_STAGES:
    if stage not in stages:
      continue
    if stage in ROLES:
      for network in networks(job, stage):
        train(job, network)
    elif stage == "report":
      if hosts.is_first():  # the others need not wait: nothing comes after it
        write_report(job)
    elif job.config.cache:
      _keep(job, stage)
    elif stage != "cache":
      raise ConfigError(f"--stages: {stage} needs a cache: give --config.cache=FOLDER")


def _keep(job: Job, stage: str) -> None:
  """A stage of the cache; the teacher is there, or this is the one that does not need it."""
  if stage != "cache" and not hosts.is_first():
    return
  if stage == "cache_inspect":
    cache_stages.inspect(job)
    return
  students = networks(job, "student")
  student = next((network for network in students if network.cached), students[0])
  trained_teacher = _trained_teacher(
    student, _teacher_variables(job, student), train_data(job, "student")
  )
  if trained_teacher is None:
    raise ConfigError("cache: expected none: the config has no teacher whose outputs could be kept")
  run = {
    "cache": cache_stages.write,
    "cache_estimate": cache_stages.estimate_cost,
    "cache_verify": cache_stages.check,
  }[stage]
  run(job, trained_teacher)


def train(job: Job, network: Network) -> None:
  """Trains one network, exports its best weights, and marks it complete."""
  if hosts.run_on_first(lambda: network.complete):
    if hosts.is_first():
      print(f"{network.name}: complete, skipped", flush=True)
    return
  config, training, started = job.config, network.training, time.time()
  train_set, teacher_variables = train_data(job, network.role), _teacher_variables(job, network)
  trained_teacher = _trained_teacher(network, teacher_variables, train_set)
  cached = cache_stages.open_checked(job, trained_teacher) if network.cached else None
  fitted = fit(
    _started(job, network, train_set),
    cached or network.teacher,
    network.objective(trained_teacher),
    training.optimizer(),
    data.training(config, train_set, training.batch_size, network.own_seed),
    steps=training.steps,
    batch_size=training.batch_size,
    teacher_variables=None if cached else teacher_variables,
    validation=data.evaluation(config, job.splits.validation, training.batch_size),
    best=config.best,
    eval_every=config.eval_every or None,
    log_every=config.log_every,
    folder=network.folder,
    checkpoint_every=config.checkpoint_every or None,
    seed=network.own_seed,
    num_views=config.num_views,
    augment=config.augment(),
    mix=config.mix(),
    on_policy=network.recipe.on_policy,
    microbatches=training.microbatches,
    max_skips=config.max_skips,
    mesh=config.make_mesh(),
    rules=config.rules(network.role),
    teacher_rules=config.teacher_rules(),
    profile_steps=job.profile_steps,
    title=network.name,
  )
  counting = student_of(fitted.state) if network.recipe.export_last else fitted.variables
  exported = sharding.gather_to_host(counting)
  if network.recipe.export_fn is not None:
    exported = network.recipe.export_fn(exported)
  hosts.run_on_first(lambda: _finish(job, network, exported, fitted.history, time.time() - started))


def _finish(job: Job, network: Network, exported: Variables, history, seconds: float) -> None:
  """Exports the weights, then writes the result, with which the network is complete."""
  description = {"role": network.role, "seed": network.seed, "config": job.run["config"]}
  if network.variant:
    description["variant"] = network.variant
  export_student(exported, network.folder, description=description)
  _export_program(job, network, exported)
  name, direction = job.config.best
  scores = [line for line in history if line["phase"] == "validation"]
  best = max if direction == "max" else min
  chosen = scores[-1] if network.recipe.export_last else best(scores, key=lambda line: line[name])
  result = {"seconds": seconds, "steps": network.training.steps, "validation": chosen}
  files.write(network.folder / RESULT, json.dumps(result, indent=2) + "\n")
  before = " before it was exported" if network.recipe.export_fn else ""
  print(
    f"{network.name}: {name} {chosen[name]:.4f} on validation{before}, {seconds:.0f} s", flush=True
  )


def _export_program(job: Job, network: Network, variables: Variables) -> None:
  try:
    example = data.first(job.config, job.splits.train)
    is_language = data.is_language((network.model, variables), example)
    model = with_logits(network.model) if is_language else network.model
    export_stablehlo(model, variables, example, network.folder)
  except (
    ValueError
  ) as error:  # the weights are safe; a network that fixes its batch size is no reason to stop
    warnings.warn(f"{network.name}: no StableHLO program was written: {error}", stacklevel=2)


def _started(job: Job, network: Network, train: Examples) -> Model:
  """What is trained: it starts from another network's weights, and from its teacher's, where its recipe says so."""
  learner, inject = network.train_model, network.recipe.init_from_teacher
  init = learner.init
  if network.init_folder is not None:
    start = _trained(job, network, network.init_folder, learner)

    def init(key, batch):
      return Variables(*jax.tree.map(jnp.copy, tuple(start)))

  if inject is None:
    return learner._replace(init=init)
  trained_teacher = _trained_teacher(network, _own_variables(job, network), train)
  if trained_teacher is None:
    raise ConfigError(
      f"recipe of {network.variant!r}: init_from_teacher: the teacher has no weights that could be given"
    )

  def injected(key, batch):
    variables, origins = inject(init(key, batch), trained_teacher)
    if hosts.is_first():
      network.folder.mkdir(parents=True, exist_ok=True)
      files.write(network.folder / ORIGINS, format_origins(origins) + "\n")
    return variables

  return learner._replace(init=injected)


def _teacher_variables(job: Job, network: Network) -> Variables | None:
  """The weights of a frozen teacher that was trained in this run, or is to have another dtype than its own."""
  found, dtype = _own_variables(job, network), job.config.teacher_dtype
  if dtype and found is None and network.teacher is not None and network.teacher.ema_update is None:
    found = network.teacher.variables
  return cast(found, jnp.dtype(dtype)) if dtype and found is not None else found


def _own_variables(job: Job, network: Network) -> Variables | None:
  """The weights of a frozen teacher that was trained in this run, as they were left."""
  if (
    network.teacher is None
    or network.teacher.ema_update is not None
    or network.teacher_folder is None
  ):
    return None
  return _trained(job, network, network.teacher_folder, network.teacher)


def _trained_teacher(
  network: Network, trained: Variables | None, train: Examples
) -> TrainedTeacher | None:
  if network.teacher is None:
    return None
  variables = trained if trained is not None else network.teacher.variables
  return None if variables is None else TrainedTeacher(network.teacher, variables, train)


def _trained(job: Job, network: Network, folder: Path, model: Model) -> Variables:
  """The weights that an earlier stage left for this one."""
  if not is_complete(folder):
    stage = folder.name.partition("-")[0]
    raise ConfigError(
      f"--stages: {network.name} needs its {stage}, and {folder} holds no finished one: add {stage!r}"
    )
  allow_shrunk = any(
    other.recipe.allow_shrunk for other in networks(job, "student") if other.folder == folder
  )
  with init_on_host(job.config.make_mesh()):
    return load_student(
      folder, model, data.first(job.config, job.splits.train), allow_shrunk=allow_shrunk
    )
