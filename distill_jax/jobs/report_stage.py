"""Writes the report of a job: its finished networks on the test split."""

from typing import Any, NamedTuple

import jax

from distill_jax import report, tasks
from distill_jax.compression.sizes import disk_bytes, layer_zeros
from distill_jax.cost.runtime import measure_costs
from distill_jax.data import Source
from distill_jax.data.batches import permutation
from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError, Examples, Splits
from distill_jax.jobs.lineage import check_lineage, read_result, train_digest
from distill_jax.jobs.measures import is_labeled, job_task, measure_terms
from distill_jax.jobs.plan import ORIGINS, ROLES, STOPPED, Job, Network, networks
from distill_jax.jobs.step_times import step_times
from distill_jax.jobs.stored_report import FOLDER
from distill_jax.storage import sealed_json
from distill_jax.storage.student import load_student
from distill_jax.train.evaluation import Evaluated, evaluate_models
from distill_jax.train.leave_out import PARTS
from distill_jax.types import Batch, Model, Task, Variables


class _Finished(NamedTuple):
  """A network of the report: one that was trained here, or a teacher that came with its weights."""

  role: str
  seed: int
  model: Model
  variables: Variables
  network: Network | None


def write_report(job: Job) -> str:
  """Compares the finished networks on the test split, which nothing else reads; returns the outcome
  in words.

  Raises:
    ConfigError: no network has been trained yet.
  """
  complete = [n for role in ROLES for n in networks(job, role) if n.complete]
  if not complete:
    raise ConfigError(
      f"--stages: expected a trained network in {job.folder}, got none: run the other stages first"
    )
  digests = {role: train_digest(job, role) for role in {network.role for network in complete}}
  for network in complete:
    check_lineage(job, network, digests[network.role])
  test, finished = job.splits.test, _load(job, complete)
  task, results = _measure(job, finished)
  sizes = {name: len(split) for name, split in zip(Splits._fields, job.splits)}
  names = tuple(dict.fromkeys(("id", *task.references, *task.figure_references)))
  entries = _entries(job, finished, results)
  stored = {n.name: read_result(n) for n in complete}
  report.write(
    job.folder / FOLDER,
    entries,
    task=task,
    references=data.references(data.evaluation(job.config, _shuffled(test)), names),
    class_names=test.class_names,
    run={
      **job.run,
      "seconds": {name: result["seconds"] for name, result in stored.items()},
      "stopped": {
        name: f"after step {result['steps']}: {result[STOPPED]}"
        for name, result in stored.items()
        if result.get(STOPPED)
      },
      "data": {"name": test.name, **sizes, "digest": data.digest(test)},
    },
  )
  return report.outcome(entries, task.metrics[0], len(test))


def _entries(job: Job, finished: list[_Finished], results: list[Evaluated]) -> list[report.Entry]:
  has_students = any(one.role == "student" for one in finished)
  ratios = step_times(job) if has_students else {}
  batch = data.first(job.config, job.splits.test, 256)
  programs = [_program(one.model, one.variables, batch) for one in finished]
  # Networks that differ in their weights only cost the same.
  different = {program: (one.model, one.variables) for program, one in zip(programs, finished)}
  measured = measure_costs(list(different.values()), batch, batch_sizes=(report.BATCH,))
  costs = dict(zip(different, measured))
  entries = []
  for one, result, program in zip(finished, results, programs):
    variant = "" if one.network is None else one.network.variant
    ratio = ratios.get((one.role, variant))
    cost = costs[program] | ({} if ratio is None else {"step_ratio": ratio})
    entries.append(_entry(job, one, result, cost))
  return entries


def _load(job: Job, complete: list[Network]) -> list[_Finished]:
  config = job.config
  teacher = job.teacher_model
  finished = []
  if teacher is not None and teacher.variables is not None:  # It came with its weights.
    finished.append(_Finished("teacher", config.teacher_seed, teacher, teacher.variables, None))
  example = data.first(config, job.splits.train)
  for network in complete:
    variables = load_student(
      network.folder, network.model, example, allow_shrunk=network.recipe.allow_shrunk
    )
    finished.append(_Finished(network.role, network.seed, network.model, variables, network))
  return finished


def _measure(job: Job, finished: list[_Finished]) -> tuple[Task, list[Evaluated]]:
  """Returns the scores of all networks; where no example has a label, those of the students'
  objectives.
  """
  if is_labeled(job, job.splits.test):
    task = _led_by_best(job, job_task(job))
    return task, _evaluate(job, finished, task)
  results = [
    Evaluated({}, None, {}, {})
    if one.network is None or one.role != "student"
    else measure_terms(job, one.network, one.variables, job.splits.test)
    for one in finished
  ]
  terms = {name for result in results for name in (result.statistics or {}).get("terms", ())}
  return _led_by_best(job, tasks.objective_terms(sorted(terms))), results


def _evaluate(job: Job, finished: list[_Finished], task: Task) -> list[Evaluated]:
  """Evaluates all networks in one pass, the students next to the teacher."""
  test = job.splits.test
  # A part of the examples, of which the report's intervals need many, is at least a batch.
  batch_size = max(1, min(256, len(test) // PARTS))
  examples = data.evaluation(job.config, _shuffled(test), batch_size)
  teachers = [one for one in finished if one.role == "teacher"]
  students = [one for one in finished if one.role != "teacher"]
  teacher = (teachers[0].model, teachers[0].variables) if teachers else None
  predict = task.figures is not None
  results = []
  for group, reference in ((teachers, None), (students, teacher)):
    models = [(one.model, one.variables) for one in group]
    if models:
      results += evaluate_models(
        models,
        examples,
        task,
        teacher=reference,
        predict=predict,
        leave_out=True,
        batch_size=batch_size,
      )
  return results


def _entry(
  job: Job, finished: _Finished, result: Evaluated, cost: dict[str, float]
) -> report.Entry:
  network, variables = finished.network, finished.variables
  zeros = layer_zeros(variables.params)
  disk = disk_bytes(variables)
  size = {
    "nonzeros": sum(layer.parameters - layer.zeros for layer in zeros),
    "disk": disk.dense,
    "compressed": disk.compressed,
  }
  text = job.config.report_text(finished.model, variables)
  return report.Entry(
    finished.role,
    finished.seed,
    scores=result.scores,
    cost=cost | size,
    history=[] if network is None else _history(network),
    variant="" if network is None else _variant(job, network),
    statistics=result.statistics,
    predictions=result.predictions,
    text=text if network is None else "\n\n".join(filter(None, [text, _origins(network)])),
    layers=zeros,
    leave_out=result.leave_out,
  )


def _led_by_best(job: Job, task: Task) -> Task:
  """Returns the task, led by the metric that chooses the exported weights."""
  ordered = sorted(task.metrics, key=lambda metric: metric.name != job.config.best)
  return task._replace(metrics=tuple(ordered))


def _shuffled(test: Examples) -> Examples:
  """Returns the examples in a fixed random order, so that a batch is a random part of them.

  Streamed images stay in their order: their parts differ more where they are sorted by class, and
  the intervals are wider.
  """
  if not isinstance(test, Source):
    return test
  return test.take(permutation(0, 0, len(test)))


def _history(network: Network) -> list[dict[str, Any]]:
  return sealed_json.read_lines(network.folder / "metrics.jsonl")


def _origins(network: Network) -> str:
  """Returns which of its first weights came from where, if some came from the teacher."""
  path = network.folder / ORIGINS
  return f"First weights: {path.read_text().rstrip()}" if path.exists() else ""


def _variant(job: Job, network: Network) -> str:
  by_generation = network.role == "student" and job.config.generations > 1
  return f"generation {network.generation}" if by_generation else network.variant


def _program(model: Model, variables: Variables, batch: Batch) -> str:
  """Returns what the network computes, as text: equal programs cost the same."""

  def run(variables: Variables, batch: Batch) -> Any:
    outputs = model.apply(*variables, batch, train=False, key=None)[0]
    sample = model.sample
    return outputs, None if sample is None else sample(variables, jax.random.key(0), batch)

  return str(jax.make_jaxpr(run)(variables, batch))
