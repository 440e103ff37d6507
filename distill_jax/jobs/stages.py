"""Runs the stages of a job: trains teacher, baseline and students; caches; compares. Each can be
resumed.
"""

import functools
import time
import warnings
from collections.abc import Collection
from typing import Any

import jax

from distill_jax.data import Source
from distill_jax.distributed import hosts, sharding
from distill_jax.jobs import cache_stages, data
from distill_jax.jobs.config import ConfigError, Examples
from distill_jax.jobs.lineage import LINEAGE, check_lineage, lineage, train_digest
from distill_jax.jobs.measures import OBJECTIVE, best_of, is_labeled
from distill_jax.jobs.plan import (
  EXTRA_STAGES,
  RESULT,
  ROLES,
  STAGES,
  STOPPED,
  Job,
  Network,
  networks,
  train_data,
)
from distill_jax.jobs.preparation import relabeled, with_initial_weights
from distill_jax.jobs.stored_report import (
  FOLDER,
  report_digest,
  store_outcome,
  stored_outcome,
)
from distill_jax.jobs.trained import teacher_variables_of, trained_teacher_of
from distill_jax.models.batch_dependencies import entries_read
from distill_jax.models.llm.head import with_logits
from distill_jax.storage import files, sealed_json
from distill_jax.storage.inputs import describe_inputs
from distill_jax.storage.stablehlo import export_stablehlo
from distill_jax.storage.student import export_student
from distill_jax.train import CheckpointOptions, Evaluation, FitResult, RunOptions, fit
from distill_jax.train.saver import all_variables
from distill_jax.types import Batch, Model, Task, Variables


def run_stages(job: Job, stages: Collection[str]) -> None:
  """Runs the stages in order; skips what is complete, resumes what was interrupted.

  Raises:
    ConfigError: a stage of the cache without a cache, or one that needs an earlier stage.
  """
  if job.cache and "cache" in stages:
    cache_stages.check_writable(job)
  for stage in STAGES + EXTRA_STAGES:
    if stage not in stages:
      continue
    if stage in ROLES:
      members = networks(job, stage)
      digest = train_digest(job, stage) if members else ""
      for network in members:
        train(job, network, digest)
    elif stage == "report":
      if hosts.is_first():  # The others need not wait: nothing comes after it.
        _report(job, is_alone=list(stages) == [stage])
    elif job.cache:
      _run_cache_stage(job, stage)
    elif stage != "cache":
      raise ConfigError(f"--stages: {stage} needs a cache: give --config.cache=FOLDER")


def _report(job: Job, *, is_alone: bool) -> None:
  """Writes the report, unless the same one is there and other stages were asked for as well."""
  digest = report_digest(job)
  outcome = None if is_alone else stored_outcome(job, digest)
  if outcome is not None:
    print("report: complete, skipped; --stages=report writes it again", flush=True)
  else:
    print("report: comparing the networks on the test set", flush=True)
    # The report's libraries take a second to load.
    from distill_jax.jobs.report_stage import write_report

    outcome = write_report(job)
    store_outcome(job, digest, outcome)
  print(f"\n{outcome}\n\nreport: {job.folder / FOLDER / 'report.html'}", flush=True)


def train(job: Job, network: Network, digest: str) -> None:
  """Trains one network, exports its best weights, and marks it complete.

  Args:
    job, network: what is trained.
    digest: `train_digest` of its role.
  """
  if hosts.run_on_first(lambda: network.complete):
    hosts.run_on_first(lambda: check_lineage(job, network, digest))
    if hosts.is_first():
      print(f"{network.name}: complete, skipped", flush=True)
    return
  if hosts.is_first():
    steps, batch_size = network.training.steps, network.training.batch_size
    print(f"{network.name}: {steps:,} steps of {batch_size:,} rows", flush=True)
  started = time.time()
  result = _fit(job, network)
  variables, learned = result.variables, result.objective_variables
  if network.recipe.export_last:
    variables, learned = all_variables(result.state)
  exported = sharding.gather_to_host(variables)
  if network.recipe.export_fn is not None:
    exported = network.recipe.export_fn(exported)
  if network.role == "student" and not is_labeled(job, job.splits.test):
    _export_objective(network, sharding.gather_to_host(learned))
  seconds = time.time() - started
  hosts.run_on_first(lambda: _finish(job, network, exported, result, seconds, digest))


def _fit(job: Job, network: Network) -> FitResult:
  config, training = job.config, network.training
  train_set = train_data(job, network.role)
  teacher_variables = teacher_variables_of(job, network)
  trained_teacher = trained_teacher_of(network, teacher_variables, train_set)
  train_set = relabeled(job, network, train_set, trained_teacher)
  cache = cache_stages.open_checked(job, trained_teacher) if network.cached else None
  validation = data.evaluation(config, job.splits.validation, training.batch_size)
  with warnings.catch_warnings():
    # A variant may have the teacher's outputs for its scores only.
    warnings.filterwarnings("ignore", "teacher: expected a term that reads its outputs")
    return fit(
      with_initial_weights(job, network, train_set),
      cache or network.teacher,
      network.objective(trained_teacher),
      training.optimizer(),
      data.training(config, train_set, training.batch_size, network.train_seed),
      steps=training.steps,
      batch_size=training.batch_size,
      seed=network.train_seed,
      teacher_variables=None if cache else teacher_variables,
      task=config.task(),
      evaluation=Evaluation(
        validation, config.eval_every or None, best_of(job, network), config.patience or None
      ),
      checkpoints=CheckpointOptions(network.folder, config.checkpoint_every or None),
      step=config.step_options(training, network.recipe.on_policy),
      run=RunOptions(
        num_views=config.num_views,
        balance=config.balance or None,
        mesh=config.make_mesh(),
        rules=config.rules(network.role),
        teacher_rules=config.teacher_rules(),
        learning_rate=training.logged_schedule(),
        log_every=config.log_every,
        max_skips=config.max_skips,
        profile_steps=job.profile_steps,
        callbacks=config.callbacks(network.name),
        title=network.name,
      ),
    )


def _finish(
  job: Job,
  network: Network,
  exported: Variables,
  result: FitResult,
  seconds: float,
  digest: str,
) -> None:
  """Exports the weights, then writes the result, which marks the network complete."""
  description = {"role": network.role, "seed": network.seed, "config": job.run["config"]}
  if network.variant:
    description["variant"] = network.variant
  inputs = _describe_inputs(job, train_data(job, network.role))
  export_student(exported, network.folder, description=description, inputs=inputs)
  _export_program(job, network, exported, result.task)
  metric = result.best
  evaluations = {line["step"]: line for line in result.history if line["phase"] == "validation"}
  step = max(evaluations) if network.recipe.export_last else result.best_step
  scores = evaluations[step]
  record = {
    "seconds": seconds,
    "steps": int(result.state.step),
    STOPPED: result.stop_reason,
    "validation": scores,
    LINEAGE: lineage(job, network, digest),
  }
  files.write(network.folder / RESULT, sealed_json.dumps(record, indent=2) + "\n")
  when = " before it was exported" if network.recipe.export_fn else ""
  score = f"{metric.name} {scores[metric.name]:.4f} on validation{when}"
  print(f"{network.name}: {score}, {seconds:.0f} s", flush=True)


def _describe_inputs(job: Job, train_set: Examples) -> dict[str, Any]:
  """Returns the description of what a network was trained on; of text without the vocabulary."""
  in_memory = isinstance(train_set, Source)
  examples = train_set if in_memory else data.first(job.config, train_set, rows=256)
  is_text = bool(getattr(train_set, "vocabulary", ""))
  return describe_inputs(examples, () if is_text else train_set.class_names)


def _export_objective(network: Network, learned: Variables) -> None:
  """Exports the objective's variables, with which the report measures its terms."""
  if jax.tree.leaves(learned):
    folder = network.folder / OBJECTIVE
    hosts.run_on_first(lambda: export_student(learned, folder, description={}))


def _export_program(job: Job, network: Network, variables: Variables, task: Task) -> None:
  example = data.first(job.config, job.splits.train)
  model = with_logits(network.model)
  try:
    heads = _heads(task, model, variables, example)
    export_stablehlo(model, variables, example, network.folder, outputs=heads)
  except ValueError as error:
    # The weights are safe: a network that fixes its batch size is no reason to stop.
    warnings.warn(f"{network.name}: no StableHLO program was written: {error}", stacklevel=2)


def _heads(task: Task, model: Model, variables: Variables, batch: Batch) -> list[str] | None:
  """Returns the names of the outputs that the task reads; None where it does not fit the model."""
  apply = functools.partial(model.apply, train=False, key=None)
  outputs = jax.eval_shape(lambda v, b: apply(*v, b)[0], variables, batch)
  arrays = {name: x for name, x in outputs.items() if hasattr(x, "shape")}

  predict = None if task.generates else task.predict  # Generated text is no output.

  def measure(_, outputs):
    return task.statistics(outputs, batch, None), predict and predict(outputs, batch)

  try:
    return sorted(entries_read(measure, (), arrays)) or None
  except ValueError:
    return None


def _run_cache_stage(job: Job, stage: str) -> None:
  """Runs one cache stage; all but `cache_inspect` need a trained teacher."""
  if stage != "cache" and not hosts.is_first():
    return
  if stage == "cache_inspect":
    cache_stages.inspect(job)
    return
  students = networks(job, "student")
  student = next((network for network in students if network.cached), students[0])
  variables = teacher_variables_of(job, student)
  trained_teacher = trained_teacher_of(student, variables, train_data(job, "student"))
  if trained_teacher is None:
    raise ConfigError(
      "cache: expected a teacher whose outputs can be stored, got none: leave cache empty"
    )
  stages = {
    "cache": cache_stages.write,
    "cache_estimate": cache_stages.estimate_cost,
    "cache_verify": cache_stages.check,
  }
  stages[stage](job, trained_teacher)
