"""The report of a job: its finished networks on the test split."""

import json
from pathlib import Path

import jax

from distill_jax import metrics, report
from distill_jax.compression.sizes import disk_bytes, layer_zeros
from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError, Splits
from distill_jax.jobs.plan import ORIGINS, RESULT, ROLES, Job, Network, networks
from distill_jax.jobs.step_times import step_times
from distill_jax.storage.student import load_student
from distill_jax.types import Batch, Model, Variables


def write_report(job: Job) -> Path:
  """Compares the finished networks on the test split, which nothing else reads."""
  trained = [n for role in ROLES for n in networks(job, role) if n.complete]
  if not trained:
    raise ConfigError(
      f"--stages: nothing to report in {job.folder}: no network has been trained there yet"
    )
  test = job.splits.test
  known = data.known(data.evaluation(job.config, test))
  sizes = {name: len(split) for name, split in zip(Splits._fields, job.splits)}
  path = report.write(
    job.folder / "report",
    _entries(job, trained),
    labels=known.labels,
    images=known.images,
    ids=known.ids,
    class_names=test.class_names,
    run={**job.run, "seconds": _seconds(trained), "data": {"name": test.name, **sizes}},
  )
  print(f"report: {path}", flush=True)
  return path


def _entries(job: Job, trained: list[Network]) -> list[report.Entry]:
  config = job.config
  batch, example = data.first(config, job.splits.test, 256), data.first(config, job.splits.train)
  teacher, trained_teacher = config.teacher(), None
  entries: list[report.Entry] = []
  if teacher is not None and teacher.variables is not None:  # it came with its weights
    trained_teacher = teacher, teacher.variables
    cost = _cost(*trained_teacher, batch)
    entries.append(_entry(job, "teacher", config.teacher_seed, trained_teacher, None, cost, []))
  ratios = step_times(job) if any(n.role == "student" for n in trained) else {}
  costs: dict[str, dict[str, float]] = {}  # of networks that differ in their weights only, once
  for network in trained:
    own = (
      network.model,
      load_student(
        network.folder, network.model, example, allow_shrunk=network.recipe.allow_shrunk
      ),
    )
    program = _program(*own, batch)
    costs[program] = costs.get(program) or _cost(*own, batch)
    timed = (network.role, network.variant)
    cost = costs[program] | ({"step_ratio": ratios[timed]} if timed in ratios else {})
    history = [
      json.loads(line) for line in (network.folder / "metrics.jsonl").read_text().splitlines()
    ]
    entry = _entry(job, network.role, network.seed, own, trained_teacher, cost, history)
    text = "\n\n".join(filter(None, [entry.text, _origins(network)]))
    entries.append(entry._replace(variant=_variant(job, network), text=text))
    if network.role == "teacher":
      trained_teacher = own
  return entries


def _entry(
  job: Job, role: str, seed: int, network: data.Trained, teacher: data.Trained | None, cost, history
) -> report.Entry:
  """What a network says about the test split; a language model beside its teacher."""
  config, test = job.config, data.evaluation(job.config, job.splits.test)
  logits = counts = None
  if data.is_language(network, data.first(config, job.splits.test)):
    counts = data.token_scores(network, test, teacher)
  else:
    logits = data.predict(*network, test)
  zeros = layer_zeros(network[1].params)
  disk = disk_bytes(network[1])
  size = {
    "nonzeros": sum(layer.parameters - layer.zeros for layer in zeros),
    "disk": disk.dense,
    "compressed": disk.compressed,
  }
  return report.Entry(
    role,
    seed,
    logits,
    cost | size,
    history,
    counts=counts,
    text=config.shown(*network),
    layers=zeros,
  )


def _origins(network: Network) -> str:
  """Which of its first weights came from where, if some came from the teacher."""
  path = network.folder / ORIGINS
  return f"First weights: {path.read_text().rstrip()}" if path.exists() else ""


def _variant(job: Job, network: Network) -> str:
  several = network.role == "student" and job.config.generations > 1
  return f"generation {network.generation}" if several else network.variant


def _program(model: Model, variables: Variables, batch: Batch) -> str:
  """What the network computes: equal programs cost as much."""
  return str(
    jax.make_jaxpr(lambda v, b: model.apply(*v, b, train=False, key=None)[0])(variables, batch)
  )


def _cost(model: Model, variables: Variables, batch: Batch) -> dict[str, float]:
  return metrics.cost(model.apply, variables, batch, batch_sizes=(report.BATCH,))


def _seconds(trained: list[Network]) -> dict[str, float]:
  return {n.name: json.loads((n.folder / RESULT).read_text())["seconds"] for n in trained}
