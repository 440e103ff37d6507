"""How the students of one run come about: assistants, starts, injected weights, smaller
exports, live or cached.
"""

import json
import pathlib
import textwrap

import jax
import numpy as np
import pytest

from distill_jax.jobs import plan, report_stage, stages
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.identity import hash_code
from distill_jax.jobs.overrides import load_config
from distill_jax.storage.student import load_student

JOB = textwrap.dedent("""
  import dataclasses
  import optax
  from digits import Digits
  from distill_jax import tasks
  from distill_jax.cache import Dense
  from distill_jax.compression.pruning.groups import groups_of, under
  from distill_jax.compression.pruning.channels import prune_channels
  from distill_jax.compression.initialization.teacher import init_from_teacher, sliced
  from distill_jax.compression.pruning.masks import PolynomialSchedule
  from distill_jax.compression.pruning.shrink import shrink
  from distill_jax.jobs.config import Training
  from distill_jax.models import from_nnx
  from distill_jax.models.zoo.cnn import CNN

  def as_threes(train, trained_teacher, folder):
    assert trained_teacher.variables is not None
    assert folder.parent.joinpath("teacher").is_dir()
    arrays = train.arrays | {"label": 0 * train.arrays["label"] + 3}
    return dataclasses.replace(train, arrays=arrays, name="threes")

  @dataclasses.dataclass
  class Pruned(Training):
    steps: int = 2
    def optimizer(self):
      groups = lambda params: under("student", groups_of(params["student"]))
      return prune_channels(super().optimizer(), groups, PolynomialSchedule(1, 1, 1), sparsity=0.5)

  @dataclasses.dataclass
  class Job(Digits):
    pruned: Pruned = dataclasses.field(default_factory=Pruned)
    teacher_of_last: str = "assistant"
    start_of_last: str = ""
    relabels_cached: bool = False
    width: int = 4
    best: str = "nll"
    names: tuple[str, ...] = (
      "assistant", "via", "injected", "pruned", "tuned", "relabeled", "last"
    )

    def task(self):  # The highest loss is best: an earlier evaluation than the last one.
      task = tasks.classification()
      highest = lambda m: dataclasses.replace(m, better="max") if m.name == "nll" else m
      return task._replace(metrics=tuple(map(highest, task.metrics)))

    def teacher(self):
      return from_nnx(lambda rngs: CNN(1, (8,), 10, rngs=rngs))

    def student(self):
      return from_nnx(lambda rngs: CNN(1, (self.width,), 10, rngs=rngs))

    def cached_outputs(self):
      return {"logits": Dense("float32")}

    def variants(self):
      return self.names

    def recipe(self, variant):
      made = super().recipe(variant)
      match variant:
        case "assistant":
          wide = from_nnx(lambda rngs: CNN(1, (6,), 10, rngs=rngs))
          return made._replace(student=wide, cached=False)
        case "via":
          return made._replace(teacher="assistant")
        case "injected":
          init = lambda own, teacher: init_from_teacher(own, teacher.variables, fit=sliced)
          return made._replace(init_from_teacher=init)
        case "pruned":
          small = lambda v: shrink(v, groups_of(v.params))
          return made._replace(
            training=self.pruned, init_from="injected", export_fn=small, allow_shrunk=True,
            export_last=True,
          )
        case "tuned":
          return made._replace(init_from="pruned", allow_shrunk=True, teacher="")
        case "relabeled":
          return made._replace(relabel=as_threes, cached=self.relabels_cached)
        case "last":
          return made._replace(teacher=self.teacher_of_last, init_from=self.start_of_last)

    def variant_objective(self, variant, trained_teacher=None):
      return self.baseline_objective() if variant == "tuned" else self.objective()

  def get_config():
    return Job()
""")
SMALL = [
  "--config.teacher_training.steps=2",
  "--config.student_training.steps=2",
  "--config.eval_every=1",
  "--config.devices=1",
]


@pytest.fixture
def job(tmp_path):
  return written(tmp_path)


def written(folder):
  """The path of the config in a folder."""
  (folder / "digits.py").write_text(pathlib.Path("configs/digits.py").read_text())
  (folder / "job.py").write_text(JOB)
  return str(folder / "job.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run: its folder, what `fit` was given and gave by title, and its config."""
  folder = tmp_path_factory.mktemp("recipes")
  job = written(folder)
  fitted, fit = {}, stages.fit

  def recorded(student, teacher, objective, *rest, **options):
    start = student.init(
      jax.random.key(options["seed"]), {"image": np.zeros((1, 8, 8, 1), np.float32)}
    )
    fitted[options["run"].title] = (
      start,
      teacher,
      options,
      rest[1],
      fit(student, teacher, objective, *rest, **options),
    )
    return fitted[options["run"].title][-1]

  without = [
    "--config.names=assistant,via,injected,pruned,tuned,relabeled",
    "--stages=teacher,cache,student,report",
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stages, "fit", recorded)
    patch.setattr(
      report_stage, "step_times", lambda job: {}
    )  # it would compile every step once more
    cache = f"--config.cache={folder / 'cache'}"
    main([f"--config={job}", *SMALL, *without, cache, f"--workdir={folder / 'run'}"])
  return folder / "run", fitted, job


@pytest.mark.integration
def test_students_follow_their_recipes(run):
  folder, fitted, job = run
  config = load_config(job)
  load = {
    name: load_student(
      folder / f"student-{name}-0", config.recipe(name).student, BATCH, allow_shrunk=True
    )
    for name in config.names[:-1]
  }
  given = {name: fitted[f"student-{name}-0"] for name in load}
  # Teachers: the live one with its weights, the cache without, the assistant with its own.
  assert (
    type(given["injected"][1]).__name__ == "Cache"
    and given["injected"][2]["teacher_variables"] is None
  )
  assert kernel(given["assistant"][2]["teacher_variables"]).shape[-1] == 8
  np.testing.assert_array_equal(
    kernel(given["via"][2]["teacher_variables"]), kernel(load["assistant"])
  )
  assert given["tuned"][1] is None and given["tuned"][2]["teacher_variables"] is None
  # Starts: the teacher's slices, the injected student's weights, the small one's.
  teacher = load_student(folder / "teacher", config.teacher(), BATCH)
  np.testing.assert_array_equal(kernel(given["injected"][0]), kernel(teacher)[..., [0, 2, 4, 6]])
  np.testing.assert_array_equal(kernel(given["pruned"][0]), kernel(load["injected"]))
  np.testing.assert_array_equal(kernel(given["tuned"][0]), kernel(load["pruned"]))
  assert [kernel(load[name]).shape[-1] for name in ("assistant", "pruned", "tuned")] == [6, 2, 2]
  # Labels: of one student only.
  labels = {name: set(given[name][3].arrays["label"].tolist()) for name in ("via", "relabeled")}
  assert labels["relabeled"] == {3} and labels["via"] > {3}


@pytest.mark.nightly
def test_report_has_shrunk_sizes_and_origins_of_weights(run):
  folder = run[0]
  results = json.loads((folder / "report" / "results.json").read_text())
  parameters = {e["variant"]: e["scores"]["parameters"] for e in results["entries"]}
  assert (
    parameters["pruned"] == parameters["tuned"] < parameters["injected"] < parameters["assistant"]
  )
  report = (folder / "report" / "report.md").read_text()
  assert (
    "First weights: " in report and "sliced from params/blocks/0/conv/kernel [3, 3, 1, 8]" in report
  )
  assert not (folder / "student-via-0" / "origins.txt").exists()


def test_recipe_that_cannot_be_followed_is_rejected(job):
  for option, message in (
    ("teacher_of_last=asistant", "recipe of 'last'.teacher: "),
    ("start_of_last=last", "recipe of 'last'.init_from: "),
    ("pruned.steps=0", "recipe of 'pruned'.training.steps: "),
    ("teacher_of_last=tuned", "recipe of 'last'.teacher: "),
    ("start_of_last=pruned", "recipe of 'last'.allow_shrunk: "),
    ("relabels_cached=True", "recipe of 'relabeled'.relabel: "),
  ):
    config = load_config(job, [option, "cache=c"])
    with pytest.raises(ConfigError, match=message):
      config.recipes()


@pytest.mark.parametrize(
  "option, message",
  [
    ("start_of_last=assistant", "recipe of 'last'.init_from"),
    ("width=12", "recipe of 'injected'.init_from_teacher"),
  ],
)
def test_initial_weights_that_do_not_fit_are_rejected_first(job, tmp_path, option, message):
  with pytest.raises(ConfigError, match=message):
    main(
      [
        f"--config={job}",
        *SMALL,
        f"--config.{option}",
        "--dry_run",
        f"--workdir={tmp_path / 'run'}",
      ]
    )


@pytest.mark.integration
def test_export_last_exports_the_pruned_weights(run):
  folder, fitted, _ = run
  exported = load_student(
    folder / "student-pruned-0", load_config(run[2]).student(), BATCH, allow_shrunk=True
  )
  result = fitted["student-pruned-0"][-1]
  state, chosen = result.state.params["student"], result.variables
  last, best = (np.asarray(p["blocks"][0]["conv"]["kernel"]) for p in (state, chosen.params))
  assert not np.array_equal(last, best)
  np.testing.assert_array_equal(
    kernel(exported), last[..., np.flatnonzero(np.abs(last).sum((0, 1, 2)))]
  )


@pytest.mark.integration
def test_sparsity_is_among_the_scores(run):
  history = {name: parts[-1].history[-1] for name, parts in run[1].items()}
  assert 0.2 < history["student-pruned-0"]["sparsity"] < 0.9
  assert "sparsity" not in history["student-injected-0"]


def test_imported_configs_are_part_of_the_identity(job, tmp_path):
  before = hash_code(pathlib.Path(job))
  file = tmp_path / "digits.py"
  file.write_text(file.read_text().replace('"""', '"""Other words. ', 1))
  assert hash_code(pathlib.Path(job)) == before
  file.write_text(file.read_text() + "\nMORE = 1\n")
  assert hash_code(pathlib.Path(job)) != before


def test_cache_without_a_reader_is_rejected(job, tmp_path):
  config = load_config(job, [f"cache={tmp_path}"])
  known = config.recipe
  config.recipe = lambda variant: known(variant)._replace(cached=False)
  with pytest.raises(ConfigError, match="cache: "):
    config.recipes()


def test_assistant_is_never_read_from_the_cache(job, tmp_path):
  config = load_config(job, [f"cache={tmp_path}", "student_training.steps=2"])
  made = plan.networks(plan.Job(config, tmp_path, (0, 1), None, {}), "student")
  cached = {network.name: network.cached for network in made}
  assert (
    cached["student-injected-1"]
    and not cached["student-via-1"]
    and not cached["student-assistant-1"]
  )
  assert {n.teacher_folder.name for n in made if n.variant == "via"} == {
    "student-assistant-0",
    "student-assistant-1",
  }


BATCH = {"image": np.zeros((1, 8, 8, 1), np.float32)}


def kernel(variables):
  return variables.params["blocks"][0]["conv"]["kernel"]
