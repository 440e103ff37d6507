"""configs/imagenet_patient.py: it is built without data, and updates as the authors' optimizer
does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.overrides import load_config
from distill_jax.train import StepOptions, make_init, make_train_step

PATH = "configs/imagenet_patient.py"
SMALL = [
  "teacher_depth=26",
  "teacher_width=0.5",
  "student_depth=26",
  "student_width=0.5",
  "size=32",
]


@pytest.fixture(scope="module")
def config():
  return load_config(PATH, SMALL)


def test_the_step_is_built_without_data_or_weights(config):
  student, teacher, objective = config.student(), config.teacher(), config.objective()
  optimizer, batch = config.student_training.optimizer(), config.abstract_batch(8)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(make_init(student, teacher, objective, optimizer), key, batch)
  step = make_train_step(
    student, teacher, objective, optimizer, StepOptions(augment=config.augment(), mix=config.mix())
  )
  after, metrics = jax.eval_shape(step, state, jax.eval_shape(teacher.init, key, batch), batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert set(metrics) == {"loss", "soft", "grad_norm", "nonfinite", "empty"}  # no label is seen
  assert not jax.tree.leaves(state.model_state)


def test_the_schedule_is_the_papers():
  training = load_config(PATH).student_training
  assert (training.batch_size, training.steps) == (4096, 1200 * 306)
  assert float(training.schedule()(5000)) == pytest.approx(0.03)


def test_an_update_is_the_authors(config, rng):
  # big_vision: updates = -schedule (rate * adam + decay * kernels), of gradients clipped to norm 1.
  training = config.student_training
  training.warmup_steps = 0
  params = {
    "student": {"kernel": rng.normal(size=(3, 2)), "scale": rng.normal(size=2)},
    "objective": {},
  }
  grads = {
    "student": {"kernel": rng.normal(size=(3, 2)), "scale": rng.normal(size=2)},
    "objective": {},
  }
  params, grads = jax.tree.map(jnp.float32, (params, grads))
  optimizer = training.optimizer()
  updates = optimizer.update(grads, optimizer.init(params), params)[0]["student"]
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  for name, decay in (("kernel", 3e-4), ("scale", 0.0)):
    g = np.asarray(grads["student"][name]) / norm
    adam = g / (np.abs(g) + 1e-8)  # of the first step: both moments are debiased to the gradient
    expected = -(0.03 * adam + decay * np.asarray(params["student"][name]))
    np.testing.assert_allclose(updates[name], expected, rtol=2e-2)


def test_pixels_have_the_range_of_released_networks(config):
  network = config.student()
  batch = {"image": jnp.full((1, 32, 32, 3), 0.5)}
  variables = jax.tree.map(jnp.ones_like, jax.eval_shape(network.init, jax.random.key(0), batch))
  # Half gray is 0 there: after the first convolution, nothing is left of it.
  stem = jax.jit(lambda v: network.apply(*v, batch, train=False, key=None)[0]["stem"])(variables)
  assert not stem.any()


@pytest.mark.parametrize(
  "override, message",
  [
    ("dtype=float16", "dtype"),
    ("remat=dots", "remat"),
    ("temperature=0", "temperature"),
    ("size=16", "size"),
    ("student_training.clip=0", "student_training.clip"),
  ],
)
def test_what_cannot_be_run_is_refused(override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(PATH, [override])


def test_the_student_alone_computes_again(config):
  again = load_config(PATH, [*SMALL, "remat=nothing_saveable"])
  batch = config.abstract_batch(2)

  def remats(network):
    variables = jax.eval_shape(network.init, jax.random.key(0), batch)
    apply = functools.partial(network.apply, train=True, key=None)
    return str(jax.make_jaxpr(apply)(*variables, batch)).count(" = remat2[")

  assert remats(config.student()) == remats(again.teacher()) == 0
  assert remats(again.student()) == 8  # its units


def test_weights_that_are_not_there_are_named(tmp_path):
  config = load_config(PATH, [*SMALL, f"teacher_weights={tmp_path}/R152x2_T_224.npz"])
  with pytest.raises(FileNotFoundError, match="R152x2_T_224.npz"):
    config.teacher()
