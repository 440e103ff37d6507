"""The stages of a job: train the teacher, distil the student, train it alone, compare. Each can be resumed."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data, metrics, report, sharding
from distill_jax.checkpoint import export_student, load_student
from distill_jax.config import Config, ConfigError, Splits, Training, prefixed
from distill_jax.train import fit, make_init, make_train_step
from distill_jax.types import Model, Objective, Variables

STAGES = ("teacher", "student", "baseline", "report")
RESULT = "result.json"


class Job(NamedTuple):
  """A config with what its stages share.

  Attributes:
    config: validated.
    folder: of the run; each trained network has a folder of its own in it.
    seeds: of the student and the baseline.
    splits: the data.
    run: what identifies the run, for the report.
  """

  config: Config
  folder: Path
  seeds: tuple[int, ...]
  splits: Splits
  run: Mapping[str, Any]


class Network(NamedTuple):
  """One network to train: where, and how."""

  role: str
  seed: int
  folder: Path
  model: Model
  training: Training
  objective: Objective
  taught: bool

  @property
  def name(self) -> str:
    return self.folder.name


def run_stages(job: Job, stages: Iterable[str]) -> None:
  """Runs the stages in order; what is complete is skipped, what was interrupted goes on."""
  for stage in STAGES:
    if stage not in stages:
      continue
    if stage == "report":
      write_report(job)
      continue
    for network in networks(job, stage):
      train(job, network)


def networks(job: Job, role: str) -> list[Network]:
  """The networks of a role; none for a teacher that follows the student or comes with its weights."""
  config = job.config
  if role == "teacher":
    teacher = config.teacher()
    if teacher.follow is not None or teacher.variables is not None:
      return []
    folder = job.folder / "teacher"
    training, objective = config.teacher_training, config.plain_objective()
    return [Network(role, config.teacher_seed, folder, teacher, training, objective, False)]
  taught = role == "student"
  objective = config.objective() if taught else config.plain_objective()
  return [
    Network(role, s, job.folder / f"{role}-{s}", config.student(), config.student_training, objective, taught)
    for s in job.seeds
  ]


def train(job: Job, network: Network) -> None:
  """Trains one network, exports its best weights, and marks it complete."""
  if (network.folder / RESULT).exists():
    print(f"{network.name}: complete, skipped", flush=True)
    return
  config, training, started = job.config, network.training, time.time()
  teacher = config.teacher() if network.taught else None
  fitted = fit(
    network.model,
    teacher,
    network.objective,
    training.optimizer(),
    _source(job, network),
    steps=training.steps,
    batch_size=training.batch_size,
    teacher_variables=_teacher_variables(job, teacher),
    validation=job.splits.validation,
    best=config.best,
    eval_every=config.eval_every or None,
    log_every=config.log_every,
    folder=network.folder,
    checkpoint_every=config.checkpoint_every or None,
    seed=network.seed,
    views=config.views,
    augment=config.augment(),
    mix=config.mix(),
    microbatches=training.microbatches,
    max_skips=config.max_skips,
    mesh=sharding.data_mesh(config.devices or None),
    title=network.name,
  )
  description = {"role": network.role, "seed": network.seed, "config": job.run["config"]}
  export_student(network.folder, fitted.variables, description=description)
  name, direction = config.best
  scores = [line for line in fitted.history if line["phase"] == "validation"]
  chosen = (max if direction == "max" else min)(scores, key=lambda line: line[name])
  seconds = time.time() - started
  _write_json(network.folder / RESULT, {"seconds": seconds, "steps": training.steps, "validation": chosen})
  print(f"{network.name}: {name} {chosen[name]:.4f} on validation, {seconds:.0f} s", flush=True)


def write_report(job: Job) -> Path:
  """Compares the finished networks on the test split, which nothing else reads."""
  entries, seconds, test = [], {}, job.splits.test
  for role in ("teacher", "baseline", "student"):
    for network in networks(job, role):
      if not (network.folder / RESULT).exists():
        continue
      variables = load_student(network.folder, network.model, _example(job))
      batch = {name: values[:256] for name, values in test.arrays.items()}
      cost = metrics.cost(network.model.apply, variables, batch)
      history = [json.loads(line) for line in (network.folder / "metrics.jsonl").read_text().splitlines()]
      logits = predict(network.model, variables, test)
      entries.append(report.Entry(role, network.seed, logits, cost, history))
      seconds[network.name] = json.loads((network.folder / RESULT).read_text())["seconds"]
  if not entries:
    raise ConfigError(f"--stages: nothing to report in {job.folder}: no network has been trained there yet")
  sizes = {name: len(split) for name, split in zip(Splits._fields, job.splits)}
  path = report.write(
    job.folder / "report",
    entries,
    labels=test.arrays["label"],
    images=test.arrays.get("image"),
    ids=test.arrays["id"],
    class_names=test.class_names,
    run={**job.run, "seconds": seconds, "data": {"name": test.name, **sizes}},
  )
  print(f"report: {path}", flush=True)
  return path


def _source(job: Job, network: Network) -> data.Source:
  train = job.splits.train
  return train if network.role == "teacher" else job.config.student_train(train)


def predict(model: Model, variables: Variables, source: data.Source, batch_size: int = 256) -> np.ndarray:
  """Logits [N, C] of all examples, in order."""
  logits = jax.jit(lambda v, batch: model.apply(*v, batch, train=False, key=None)[0]["logits"])
  rows = [
    np.asarray(logits(variables, batch))[batch["where"]] for batch in data.eval_batches(source, batch_size)
  ]
  return np.concatenate(rows)


def describe(job: Job) -> None:
  """Prints shapes, parameters, FLOPs and memory of what would be trained, without training."""
  print("data: " + ", ".join(f"{n} {len(s)}" for n, s in zip(Splits._fields, job.splits)))
  for role in STAGES[:3]:
    for network in networks(job, role)[:1]:
      _describe_network(job, network)


def _describe_network(job: Job, network: Network) -> None:
  config, training, key = job.config, network.training, jax.random.key(0)
  example = {name: values[:1] for name, values in job.splits.train.arrays.items()}
  variables = network.model.init(key, example)
  cost = metrics.cost(network.model.apply, variables, example, repeats=1)
  outputs = jax.eval_shape(lambda v: network.model.apply(*v, example, train=False, key=None)[0], variables)
  print(
    f"{network.role}: {cost['parameters']:,.0f} parameters, {cost['bytes']:,.0f} bytes, "
    f"{cost['flops']:,.0f} FLOPs per example"
  )
  for name, output in outputs.items():
    print(f"  {name}: {('batch', *output.shape[1:])} {output.dtype}")
  teacher = config.teacher() if network.taught else None
  taught_by = jax.eval_shape(teacher.init, key, example) if teacher and not teacher.follow else ()
  batch = next(data.batches(_source(job, network), training.batch_size, seed=0))
  with prefixed(f"{network.role} and its objective"):
    state = make_init(network.model, teacher, network.objective, training.optimizer())(key, batch)
  step = make_train_step(
    network.model,
    teacher,
    network.objective,
    training.optimizer(),
    microbatches=training.microbatches,
    augment=config.augment(),
    mix=config.mix(),
  )
  compiled = jax.jit(step, donate_argnums=0).lower(state, taught_by, batch).compile()
  memory: Any = compiled.memory_analysis()
  print(
    f"  one step of batch {training.batch_size} on one device: "
    f"arguments {memory.argument_size_in_bytes:,} bytes, temporaries {memory.temp_size_in_bytes:,}, "
    f"outputs {memory.output_size_in_bytes:,} (of which {memory.alias_size_in_bytes:,} reuse donated arguments)"
  )


def _teacher_variables(job: Job, teacher: Model | None) -> Variables | None:
  if teacher is None or teacher.follow is not None or teacher.variables is not None:
    return None
  folder = job.folder / "teacher"
  if not (folder / RESULT).exists():
    raise ConfigError(
      f"--stages: the student needs its teacher, and {folder} holds no finished one: add 'teacher'"
    )
  return load_student(folder, teacher, _example(job))


def _example(job: Job) -> dict[str, np.ndarray]:
  return {name: values[:1] for name, values in job.splits.train.arrays.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  new = path.with_suffix(".new")
  new.write_text(json.dumps(content, indent=2) + "\n")
  new.replace(path)
