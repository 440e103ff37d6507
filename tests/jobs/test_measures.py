"""Jobs whose data has no labels, whose networks have no logits, or several heads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import Dense
from distill_jax.jobs import checks, stages
from distill_jax.jobs.config import Config, ConfigError, Splits, Training
from distill_jax.jobs.measures import best_of
from distill_jax.jobs.plan import Job, networks
from distill_jax.models import from_apply
from distill_jax.storage.stablehlo import load_stablehlo
from distill_jax.storage.student import read_inputs


def weights(key, x):
  return {
    name: jax.random.normal(jax.random.fold_in(key, size), (4, size))
    for name, size in (("logits", 3), ("kind", 2))
  }


def network(outputs, seed=None):
  """Returns a linear network with outputs `{name: weight}`; with a seed, a frozen one."""

  def apply(w, x):
    return {name: x @ w[weight] for name, weight in outputs.items()} | {"block1": jnp.tanh(x)}

  variables = None if seed is None else weights(jax.random.key(seed), None)
  return from_apply(weights, apply, inputs="x", variables=variables)


def source(seed, labeled):
  x = np.random.default_rng(seed).normal(size=(16, 4)).astype(np.float32)
  arrays = {"id": 100 * seed + np.arange(16), "x": x}
  if labeled:
    arrays |= {"label": x[:, :3].argmax(-1), "kind": (x[:, 3] > 0).astype(np.int32)}
  return data.Source(arrays)


@dataclasses.dataclass
class Toy(Config):
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=4, batch_size=8)
  )
  devices: int = 1
  eval_every: int = 2
  labeled: bool = False

  def data(self):
    return Splits(*(source(seed, self.labeled) for seed in (1, 2, 3)))


class Embeddings(Toy):
  """The student's embedding has another width than the teacher's: a projection is learned."""

  def teacher(self):
    return network({"embedding": "logits"}, seed=1)

  def student(self):
    return network({"embedding": "kind"})

  def objective(self):
    term = objectives.features("embedding", "embedding", losses.hint)
    return objectives.weighted(match=(0.5, term))


class Heads(Toy):
  def teacher(self):
    heads = {"logits": "logits", "kind": "kind"}
    mean = {"logits": "probabilities", "kind": "probabilities"}
    return teachers.ensemble([network(heads, seed) for seed in (1, 2)], mean=mean)

  def student(self):
    return network({"logits": "logits", "kind": "kind"})

  def cached_outputs(self):
    return {"logits": Dense("float32"), "kind": Dense("float32")}

  def objective(self):
    terms = {
      f"soft_{name}": (1.0, objectives.logits(losses.kl_divergence, output=name))
      for name in ("logits", "kind")
    }
    return objectives.weighted(**terms)


@pytest.fixture
def entries(monkeypatch):
  """The entries and the task of a report, which is not written."""
  calls = []

  def write(folder, report_entries, *, task, **options):
    calls.append((report_entries, task))
    return folder

  monkeypatch.setattr("distill_jax.report.write", write)
  monkeypatch.setattr("distill_jax.jobs.report_stage.step_times", lambda job: {})
  monkeypatch.setattr(
    "distill_jax.jobs.report_stage.measure_costs",
    lambda networks, *args, **options: [{} for _ in networks],
  )
  return calls


def run(config, folder, names=("student", "report")):
  job = Job(config, folder, (0,), config.data(), {"config": "toy"})
  config.validate()
  checks.check(job, names)
  stages.run_stages(job, names)
  return job


def test_embeddings_without_labels_are_chosen_and_reported_by_their_term(tmp_path, entries):
  job = run(Embeddings(best="match"), tmp_path)
  ((_, student), task) = entries[0]
  assert [metric.name for metric in task.metrics][:2] == ["match", "loss"]
  lines = map(json.loads, (tmp_path / "student-0" / "metrics.jsonl").read_text().splitlines())
  values = [line["match"] for line in lines if line["phase"] == "validation"]
  result = json.loads((tmp_path / "student-0" / "result.json").read_text())
  assert result["validation"]["match"] == pytest.approx(min(values))
  # The projection is that of the exported step: the score follows from the two files.
  folder = tmp_path / "student-0"
  kernel = load_file(folder / "model.safetensors")["params/kind"].astype(np.float64)
  learned = load_file(folder / "objective" / "model.safetensors").items()
  projection = {name.split("/")[-1]: x.astype(np.float64) for name, x in learned}
  x = job.splits.test.arrays["x"].astype(np.float64)
  teacher = x @ np.asarray(weights(jax.random.key(1), None)["logits"], np.float64)
  embedding = x @ kernel @ projection["kernel"] + projection["bias"]
  expected = ((embedding - teacher) ** 2).mean()
  assert student.scores == pytest.approx({"match": expected, "loss": expected / 2}, rel=1e-5)


def test_heads_of_a_job_are_cached_measured_and_exported(tmp_path, entries):
  config = Heads(labeled=True, cache=str(tmp_path / "cache"), best="kind/accuracy")
  run(config, tmp_path / "run", ("cache", "student"))
  predict = load_stablehlo(tmp_path / "run" / "student-0")
  assert set(predict({"x": np.ones((3, 4), np.float32)})) == {"logits", "kind"}
  assert read_inputs(tmp_path / "run" / "student-0")["entries"]["x"]["shape"] == [4]
  result = json.loads((tmp_path / "run" / "student-0" / "result.json").read_text())
  assert {"accuracy", "kind/accuracy"} <= set(result["validation"])


def test_unknown_best_is_refused_before_training(tmp_path):
  config = Embeddings(best="mach")
  job = Job(config, tmp_path, (0,), config.data(), {})
  with pytest.raises(ConfigError, match="^best: .*'match'"):
    checks.check(job, ("student",))


def test_networks_without_a_teacher_are_chosen_by_labels(tmp_path):
  for best, expected in (("soft_kind", None), ("kind/agreement", None), ("nll", "nll")):
    config = Heads(labeled=True, best=best)
    job = Job(config, tmp_path, (0,), config.data(), {})
    assert best_of(job, networks(job, "baseline")[0]) == expected
    assert best_of(job, networks(job, "student")[0]) == best
