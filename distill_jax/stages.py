"""The stages of a job: train the teacher, the student alone, the student distilled; compare. Each can be resumed."""

import json
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data, metrics, report, sharding
from distill_jax.checkpoint import export_student, load_student
from distill_jax.config import Config, ConfigError, Splits, Training, prefixed
from distill_jax.deploy import export_stablehlo
from distill_jax.export import DESCRIPTION, WEIGHTS
from distill_jax.train import fit, make_init, make_train_step
from distill_jax.types import Model, Objective, Variables

STAGES = ("teacher", "baseline", "student", "report")  # a student may start from its baseline
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
  """One network to train: where, how, and taught by whom.

  Attributes:
    model: what is exported, evaluated and compared.
    learner: what is trained: `model`, or for a student what the config says.
    teacher: None for a network that has none.
    teacher_folder: where the teacher's weights are, if it does not carry them.
    generation: of a student, from 1; each is initialised anew.
  """

  role: str
  seed: int
  folder: Path
  model: Model
  learner: Model
  training: Training
  objective: Objective
  teacher: Model | None = None
  teacher_folder: Path | None = None
  generation: int = 1

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def own_seed(self) -> int:
    """Of the first generation, the seed, as for the baseline; of each further one, another that follows from it."""
    if self.generation == 1:
      return self.seed
    return int(np.random.SeedSequence([self.seed, self.generation]).generate_state(1)[0])


def run_stages(job: Job, stages: Collection[str]) -> None:
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
  """The networks of a role, students by generation; no teacher where none has to be trained."""
  config = job.config
  if role == "student":
    return [_student(job, seed, number) for number in range(1, config.generations + 1) for seed in job.seeds]
  if role == "baseline":
    model, training = config.student(), config.student_training
    return [_untaught(job, role, seed, f"{role}-{seed}", model, training) for seed in job.seeds]
  teacher = config.teacher()
  if not _to_be_trained(teacher):
    return []
  return [_untaught(job, role, config.teacher_seed, role, teacher, config.teacher_training)]


def _untaught(job: Job, role: str, seed: int, name: str, model: Model, training: Training) -> Network:
  return Network(role, seed, job.folder / name, model, model, training, job.config.plain_objective())


def _student(job: Job, seed: int, generation: int) -> Network:
  config = job.config
  folders = [job.folder / "teacher", job.folder / f"student-{seed}"]
  folders += [job.folder / f"student-{seed}-gen{number}" for number in range(2, generation + 1)]
  teacher = config.teacher() if generation == 1 else config.student()
  trained_here = generation > 1 or _to_be_trained(teacher)
  return Network(
    "student",
    seed,
    folders[generation],
    config.student(),
    config.learner(),
    config.student_training,
    config.objective(),
    teacher,
    folders[generation - 1] if trained_here else None,
    generation,
  )


def _to_be_trained(teacher: Model | None) -> TypeGuard[Model]:
  return teacher is not None and teacher.follow is None and teacher.variables is None


def train(job: Job, network: Network) -> None:
  """Trains one network, exports its best weights, and marks it complete."""
  if _complete(network.folder):
    print(f"{network.name}: complete, skipped", flush=True)
    return
  config, training, started = job.config, network.training, time.time()
  fitted = fit(
    _started(job, network),
    network.teacher,
    network.objective,
    training.optimizer(),
    _source(job, network),
    steps=training.steps,
    batch_size=training.batch_size,
    teacher_variables=_teacher_variables(job, network),
    validation=job.splits.validation,
    best=config.best,
    eval_every=config.eval_every or None,
    log_every=config.log_every,
    folder=network.folder,
    checkpoint_every=config.checkpoint_every or None,
    seed=network.own_seed,
    views=config.views,
    augment=config.augment(),
    mix=config.mix(),
    microbatches=training.microbatches,
    max_skips=config.max_skips,
    mesh=sharding.data_mesh(config.devices or None),
    title=network.name,
  )
  description = {"role": network.role, "seed": network.seed, "config": job.run["config"]}
  exported = config.exported(fitted.variables) if network.role == "student" else fitted.variables
  export_student(network.folder, exported, description=description)
  _export_program(job, network, exported)
  name, direction = config.best
  scores = [line for line in fitted.history if line["phase"] == "validation"]
  chosen = (max if direction == "max" else min)(scores, key=lambda line: line[name])
  seconds = time.time() - started
  _write_json(network.folder / RESULT, {"seconds": seconds, "steps": training.steps, "validation": chosen})
  print(f"{network.name}: {name} {chosen[name]:.4f} on validation, {seconds:.0f} s", flush=True)


def _export_program(job: Job, network: Network, variables: Variables) -> None:
  try:
    export_stablehlo(network.folder, network.model, variables, _example(job))
  except (
    ValueError
  ) as error:  # the weights are safe; a network that fixes its batch size is no reason to stop
    warnings.warn(f"{network.name}: no StableHLO program was written: {error}", stacklevel=2)


def write_report(job: Job) -> Path:
  """Compares the finished networks on the test split, which nothing else reads."""
  trained = [n for role in STAGES[:3] for n in networks(job, role) if _complete(n.folder)]
  if not trained:
    raise ConfigError(f"--stages: nothing to report in {job.folder}: no network has been trained there yet")
  test, seconds = job.splits.test, {}
  costs: dict[str, dict[str, float]] = {}
  entries, teacher = [], job.config.teacher()
  if teacher is not None and teacher.variables is not None:  # it came with its weights
    logits, cost = predict(teacher, teacher.variables, test), _cost(teacher, teacher.variables, test)
    entries.append(report.Entry("teacher", job.config.teacher_seed, logits, cost, []))
  for network in trained:
    variables = load_student(network.folder, network.model, _example(job))
    shapes = str(
      jax.tree.map(jnp.shape, variables)
    )  # one cost for networks that differ in their weights only
    costs[shapes] = costs.get(shapes) or _cost(network.model, variables, test)
    history = [json.loads(line) for line in (network.folder / "metrics.jsonl").read_text().splitlines()]
    logits = predict(network.model, variables, test)
    several = network.role == "student" and job.config.generations > 1
    variant = f"generation {network.generation}" if several else ""
    entries.append(report.Entry(network.role, network.seed, logits, costs[shapes], history, variant))
    seconds[network.name] = json.loads((network.folder / RESULT).read_text())["seconds"]
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


def _cost(model: Model, variables: Variables, source: data.Source) -> dict[str, float]:
  return metrics.cost(model.apply, variables, {name: values[:256] for name, values in source.arrays.items()})


def _source(job: Job, network: Network) -> data.Source:
  config = job.config
  own = {"teacher": config.teacher_train, "baseline": config.baseline_train, "student": config.student_train}
  return own[network.role](job.splits.train)


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
  source = _source(job, network)
  labelled = np.count_nonzero(source.arrays["label"] >= 0)
  print(f"  trained on {len(source):,} examples of {source.name}, {labelled:,} with a label")
  teacher = network.teacher
  taught_by = jax.eval_shape(teacher.init, key, example) if teacher and not teacher.follow else ()
  batch = next(data.batches(source, training.batch_size, seed=0))
  with prefixed(f"{network.role} and its objective"):
    state = make_init(network.learner, teacher, network.objective, training.optimizer())(key, batch)
  step = make_train_step(
    network.learner,
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


def check(job: Job, stages: Collection[str]) -> None:
  """Refuses before anything is trained what a later stage would refuse: labels that are not there, batches that do
  not fit the devices or the examples."""
  _check_labelled(job, stages)
  mesh = sharding.data_mesh(job.config.devices or None)
  for role in STAGES[:3]:
    for network in networks(job, role)[:1]:
      training, examples = network.training, len(_source(job, network))
      with prefixed("teacher_training" if role == "teacher" else "student_training"):
        sharding.check_divisible(training.batch_size, mesh, microbatches=training.microbatches)
        if training.batch_size > examples:
          raise ConfigError(
            f"batch_size: expected at most the {examples} examples, got {training.batch_size}"
          )


def _complete(folder: Path) -> bool:
  return all((folder / name).exists() for name in (RESULT, WEIGHTS, DESCRIPTION))


def _check_labelled(job: Job, stages: Collection[str]) -> None:
  """Refuses before anything is trained what could only learn from labels that are not there."""
  for role in ("teacher", "baseline"):
    for network in networks(job, role)[:1] if role in stages else ():
      if (_source(job, network).arrays["label"] < 0).all():
        raise ConfigError(
          f"{role}_train: no example has a label, and the {role} learns from labels alone: let {role}_train give "
          f"labelled examples, or leave {role!r} out of --stages"
        )


def _started(job: Job, network: Network) -> Model:
  """What is trained: a student starts from its baseline's weights where the config says so."""
  if network.role != "student" or not job.config.init_from:
    return network.learner
  start = _trained(job, network, job.folder / f"baseline-{network.seed}", network.learner)
  return network.learner._replace(init=lambda key, batch: Variables(*jax.tree.map(jnp.copy, tuple(start))))


def _teacher_variables(job: Job, network: Network) -> Variables | None:
  if network.teacher is None or network.teacher_folder is None:
    return None
  return _trained(job, network, network.teacher_folder, network.teacher)


def _trained(job: Job, network: Network, folder: Path, model: Model) -> Variables:
  """The weights that an earlier stage left for this one."""
  if not _complete(folder):
    stage = folder.name.partition("-")[0]
    raise ConfigError(
      f"--stages: {network.name} needs its {stage}, and {folder} holds no finished one: add {stage!r}"
    )
  return load_student(folder, model, _example(job))


def _example(job: Job) -> dict[str, np.ndarray]:
  return {name: values[:1] for name, values in job.splits.train.arrays.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  new = path.with_suffix(".new")
  new.write_text(json.dumps(content, indent=2) + "\n")
  new.replace(path)
