"""configs/fashion_mnist_methods.py: every method builds, fits the networks and takes a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distill_jax import data, objectives
from distill_jax.data import Source
from distill_jax.jobs import checks, plan
from distill_jax.jobs import data as job_data
from distill_jax.jobs.config import ConfigError, Splits, TrainedTeacher
from distill_jax.jobs.overrides import load_config
from distill_jax.objectives import parts

PATH = "configs/fashion_mnist_methods.py"
ROWS = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """The whole config on random images."""
  training = [f"{role}_training.batch_size={ROWS}" for role in ("student", "teacher")]
  config = load_config(PATH, [*training, "student_training.steps=5", "images=24", "devices=1"])
  rng = np.random.default_rng(0)
  arrays = {"image": rng.random((32, 28, 28, 1), np.float32), "label": rng.integers(0, 10, 32)}
  source = Source(arrays, 10)
  folder = tmp_path_factory.mktemp("methods")
  return plan.Job(config, folder, (0,), Splits(source, source, source), {"config": PATH})


def leaves(tree):
  """What must not change over a step, or it would be compiled twice and could not be restored."""
  return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@pytest.mark.integration
def test_methods_fit_the_networks_and_keep_state_types(job):
  checks.check(job, ["student"])
  students = plan.one_per_variant(job, "student")
  assert len(students) == 40 and students[0].variant == job.config.reference
  train = plan.train_data(job, "student")
  assert train.ids.tolist() == list(range(24))
  batch, key = next(data.batches(train, ROWS, seed=0)), jax.random.key(0)
  student, teacher = (
    jax.eval_shape(lambda m=m: m.apply(*m.init(key, batch), batch, train=False, key=None)[0])
    for m in (job.config.student(), job.config.teacher())
  )
  for network in students:
    objective = network.objective(None)
    params, state = jax.eval_shape(objective.init, key, student, teacher)
    step = functools.partial(objective.apply, step=0)
    terms, new = jax.eval_shape(
      lambda *inputs, step=step: step(*inputs, key=key), params, state, student, teacher, batch
    )
    assert leaves(new) == leaves(state), network.variant
    assert not any(weak for _, _, weak in leaves((params, state))), network.variant
    assert "hard" in terms or network.variant == "logit_mse"
    for _, value in terms.values():
      assert (value[0] if isinstance(value, tuple) else value).shape in ((ROWS,), ()), (
        network.variant
      )


@pytest.fixture(scope="module")
def outputs(job):
  """A batch, the outputs of the untrained student and teacher on it, and the teacher's weights."""
  key, batch = jax.random.key(1), job_data.first(job.config, plan.train_data(job, "student"), ROWS)
  found = []
  for model in (job.config.student(), job.config.teacher()):
    variables = jax.jit(model.init)(key, batch)
    found.append(
      jax.jit(lambda v, m=model: m.apply(*v, batch, train=False, key=None)[0])(variables)
    )
  return batch, *found, variables


# The others are tested where they are made; these are put together in the config.
@pytest.mark.parametrize(
  "name",
  [
    "mlkd",
    "crd",
    *(
      pytest.param(name, marks=pytest.mark.nightly)
      for name in ("standardized_kd", "ofa", "fsp", "ofd", "activation_boundary")
    ),
  ],
)
def test_combined_objectives_have_finite_gradients(job, outputs, name):
  batch, student, teacher, _ = outputs
  objective, key = job.config.variant_objective(name), jax.random.key(2)
  learned = objective.init(key, student, teacher)

  @jax.jit
  @jax.value_and_grad
  def loss(trained):
    student, params = trained
    context = {"step": jnp.asarray(0), "key": key}
    terms, _ = objective.apply(params, learned.state, student, teacher, batch, **context)
    return sum(
      weight * (v[0].mean() if isinstance(v, tuple) else v) for weight, v in terms.values()
    )

  value, grads = loss((student, learned.params))
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert any(np.any(g != 0) for g in jax.tree.leaves(grads))


def test_what_must_know_the_trained_teacher_gets_it(job, outputs):
  config, key = job.config, jax.random.key(2)
  batch, student, teacher, variables = outputs
  trained_teacher = TrainedTeacher(config.teacher(), variables, plan.train_data(job, "student"))
  memory = (
    config.variant_objective("crd", trained_teacher).init(key, student, teacher).state["embedding"]
  )
  assert memory.student.shape[0] == 24

  found = (
    config.variant_objective("factor_transfer", trained_teacher)
    .init(key, student, teacher)
    .state["maps"]
  )
  term = objectives.paraphraser("block3")
  untrained = term.init(
    jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0), student, teacher
  ).params
  kernels = [np.asarray(tree["encoder"]["0"]["kernel"]) for tree in (found, untrained)]
  assert kernels[0].shape == kernels[1].shape == (3, 3, 64, 64)
  assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.0011  # one step of Adam at 1e-3

  before = variables.params["blocks"][2][1]["norm"]
  before["scale"], before["bias"] = jnp.full(64, 2.0), jnp.full(64, 1.0)
  ofd = config.variant_objective("ofd", trained_teacher)
  learned = ofd.init(key, student, teacher)
  low = {**teacher, "before3": jnp.full_like(teacher["before3"], -1e3)}
  terms, _ = ofd.apply(*learned, student, low, batch, step=jnp.asarray(0), key=key)
  z = stats.truncnorm(
    -np.inf, -0.5, loc=1.0, scale=2.0
  ).mean()  # of what a normal number is below 0
  params = learned.params["before3"]
  mapped = parts.connector(params, student["before3"])
  expected = np.where(np.asarray(mapped) > z, (np.asarray(mapped) - z) ** 2, 0).sum((1, 2, 3))
  np.testing.assert_allclose(terms["before3"][1][0], expected, rtol=1e-4)
  assert [terms[f"before{i}"][0] for i in (3, 2, 1)] == [1e-3, 5e-4, 2.5e-4]


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("methods=kd_t4,dkdd", "methods"),
    ("methods=dkd", "reference"),
    ("images=0", "images"),
    ("student_widths=(16,32)", "student_widths"),
  ],
)
def test_what_cannot_be_run_is_refused(override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(PATH, [override])
