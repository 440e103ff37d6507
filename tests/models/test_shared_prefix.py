"""A student whose first layers are the teacher's: frozen, run once, part of the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import small_seq2seq
from fitting import fit_with
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data, export_student, load_student, losses, objectives
from distill_jax.cache import Dense, write_cache
from distill_jax.distributed import sharding
from distill_jax.models import cohort, from_apply, from_nnx, shared_prefix, whole_variables
from distill_jax.train import StepOptions, make_init, make_train_step, predict
from distill_jax.types import Variables

KEY = jax.random.key(0)
CLASSES = 5


class Network(nnx.Module):
  """First layers with a batch norm and dropout, and further ones."""

  def __init__(self, depth, rngs):
    self.first = nnx.Sequential(
      nnx.Linear(6, 8, rngs=rngs),
      nnx.BatchNorm(8, rngs=rngs),
      nnx.Dropout(0.5, rngs=rngs),
      nnx.relu,
    )
    self.rest = nnx.data([nnx.Linear(8, 8, rngs=rngs) for _ in range(depth)])
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, CLASSES, rngs=rngs)

  def __call__(self, x):
    encoded = self.first(x)
    return {"encoded": encoded, "logits": self.decode(encoded)}

  def decode(self, x):
    for layer in self.rest:
      x = nnx.relu(layer(x))
    return self.head(self.norm(x))


def network(depth, *, seed=None):
  """A Model, and one of its further layers; with weights if a seed is given."""
  build = (lambda rngs: Network(depth, rngs)) if seed is None else Network(depth, nnx.Rngs(seed))
  call = lambda net, x, train: net.decode(x)  # noqa: E731
  return from_nnx(build), from_nnx(build, inputs="encoded", call=call)


def moved(model):
  """The model with other batch statistics than those of a new network."""
  state = jax.tree.map(lambda x: x + 0.3 if x.dtype == jnp.float32 else x, model.variables.state)
  return model._replace(variables=model.variables._replace(state=state))


TEACHER = moved(network(3, seed=1)[0])
WHOLE, REST = network(1)
STUDENT = shared_prefix(WHOLE, TEACHER, "^first/", rest=REST)
OBJECTIVE = objectives.weighted(
  hard=(0.5, objectives.labels()),
  soft=(1.0, objectives.logits(losses.kl_divergence, temperature=2.0)),
)
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.05, momentum=0.9))


def examples(rng, rows=16):
  image = rng.normal(size=(rows, 6)).astype(np.float32)
  return {"image": image, "label": rng.integers(0, CLASSES, rows).astype(np.int32)}


def run(batch, student=STUDENT, teacher=TEACHER, steps=3, **options):
  """The state and the losses after some steps on one batch."""
  state = make_init(student, teacher, OBJECTIVE, OPTIMIZER)(KEY, batch)
  step = jax.jit(make_train_step(student, teacher, OBJECTIVE, OPTIMIZER, StepOptions(**options)))
  values = []
  for _ in range(steps):
    state, metrics = step(state, teacher.variables, batch)
    values.append(metrics["loss"][0])
  return state, np.stack(values)


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_first_layers_stay_the_teachers_and_have_no_optimizer_state(rng):
  state, values = run(examples(rng))
  assert values[-1] < values[0]
  assert state.params["student"]["first"]["layers"][0] == {"bias": None, "kernel": None}
  trained = jax.tree.leaves(state.params)
  assert len(jax.tree.leaves(state.opt_state[1][0].trace)) == len(trained) == 6
  whole = whole_variables(Variables(*(x["student"] for x in (state.params, state.model_state))))
  for own, given in zip(whole, TEACHER.variables):
    assert_same(own["first"], given["first"], rtol=0)
  assert not np.array_equal(whole.state["norm"]["mean"], np.zeros(8))  # Those of later layers move.


def test_generates_with_all_layers():
  whole = WHOLE._replace(sample=lambda variables, key, batch: variables.params["first"])
  student = shared_prefix(whole, TEACHER, "^first/", rest=REST)
  variables = student.init(KEY, examples(np.random.default_rng(0)))
  assert_same(student.sample(variables, None, {}), TEACHER.variables.params["first"], rtol=0)
  assert STUDENT.sample is None


def test_equals_the_step_of_the_rest_on_the_teachers_outputs(rng):
  """Written by hand: a student of the further layers alone, whose input is the teacher's output."""
  batch = examples(rng)
  outputs, _ = TEACHER.apply(*TEACHER.variables, batch, train=False, key=None)
  start = make_init(STUDENT, TEACHER, OBJECTIVE, OPTIMIZER)(KEY, batch)
  params, state = whole_variables(Variables(start.params["student"], start.model_state["student"]))
  first, rest = params["first"], {k: v for k, v in params.items() if k != "first"}

  def loss(rest, state):
    result, state = REST.apply(
      {**rest, "first": first}, state, {"encoded": outputs["encoded"]}, train=True, key=KEY
    )
    logits, label = result["logits"], batch["label"]
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    soft = losses.kl_divergence(logits, outputs["logits"], temperature=2.0).mean()
    return 0.5 * hard + soft, state

  opt_state = OPTIMIZER.init(rest)
  for _ in range(3):
    (_, state), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(rest, state)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, rest)
    rest = optax.apply_updates(rest, updates)
  trained, _ = run(batch)
  result = whole_variables(Variables(trained.params["student"], trained.model_state["student"]))
  assert_same(result, Variables({**rest, "first": first}, state), rtol=1e-4, atol=1e-6)


def test_whole_network_evaluates_alike_and_is_exported(rng, tmp_path):
  batch = examples(rng)
  state, _ = run(batch)
  variables = Variables(state.params["student"], state.model_state["student"])
  encoded = TEACHER.apply(*TEACHER.variables, batch, train=False, key=None)[0]["encoded"]
  continued = batch | {"teacher/encoded": encoded}
  expected = STUDENT.apply(*variables, continued, train=False, key=None)[0]["logits"]
  folder = export_student(whole_variables(variables), tmp_path / "whole", description={})
  whole = load_student(folder, WHOLE, batch)
  for model, weights in ((STUDENT, variables), (WHOLE, whole)):
    assert_same(predict(model, weights, batch)["logits"], expected, rtol=1e-5)
  folder = export_student(variables, tmp_path / "split", description={})
  assert_same(load_student(folder, STUDENT, batch), variables, rtol=0)


def test_without_a_teacher_the_student_runs_its_own_first_layers(rng):
  """In evaluation mode: no dropout, and the statistics of the batch norm stay."""
  batch = examples(rng)
  variables = STUDENT.init(KEY, batch)
  outputs = [STUDENT.apply(*variables, batch, train=True, key=jax.random.key(k)) for k in range(2)]
  (first, state), (second, _) = outputs
  encoded = TEACHER.apply(*TEACHER.variables, batch, train=False, key=None)[0]["encoded"]
  for result in (first, second):
    assert_same(result["encoded"], encoded, rtol=1e-6)
  assert_same(state["state"]["first"], TEACHER.variables.state["first"], rtol=0)


# An encoder-decoder

PAIRS_TEACHER = small_seq2seq.models(seed=1)[0]
PAIRS_STUDENT = shared_prefix(
  small_seq2seq.models()[0], PAIRS_TEACHER, "^encoder/", rest=small_seq2seq.models()[1]
)
WORDS = objectives.weighted(
  word=(1.0, objectives.tokens(losses.kl_divergence, temperature=2.0, label_weight=0.8))
)


def fit_pairs(source, teacher, steps, folder=None):
  optimizer = optax.adamw(0.1, weight_decay=0.5)
  every = None if folder is None else 2
  networks = PAIRS_STUDENT, teacher, WORDS, optimizer, source
  return fit_with(*networks, steps=steps, batch_size=8, folder=folder, checkpoint_every=every)


@pytest.mark.slow  # Three runs of `fit`, and a cache.
def test_resumed_run_and_run_from_a_cache_end_alike(rng, tmp_path):
  """The cache stores what the encoder gives, too: its layers run for neither network."""
  source = data.Source(
    small_seq2seq.pairs(rng, 16), small_seq2seq.VOCABULARY, ignore_label=-1, name="pairs"
  )
  outputs = {name: Dense("float32") for name in ("hidden", "encoded")}
  cached = write_cache(
    tmp_path / "cache", PAIRS_TEACHER, source, outputs, batch_size=8, progress=False
  )
  straight = fit_pairs(source, PAIRS_TEACHER, 4)
  fit_pairs(source, PAIRS_TEACHER, 2, tmp_path / "run")
  resumed = fit_pairs(source, PAIRS_TEACHER, 4, tmp_path / "run")
  assert int(resumed.state.step) == 4
  assert_same(resumed.variables, straight.variables, rtol=0)
  assert_same(fit_pairs(source, cached, 4).variables, straight.variables, rtol=1e-5, atol=1e-6)
  encoder = whole_variables(straight.variables).params["encoder"]
  assert_same(encoder, PAIRS_TEACHER.variables.params["encoder"], rtol=0)


def test_loss_of_distil_whisper_on_devices_and_microbatches(rng):
  """0.8 CE + 1.0 T^2 KL(teacher || student) at T = 2 over the labeled tokens, in float64."""
  batch = small_seq2seq.pairs(rng, 32)
  arguments = PAIRS_STUDENT, PAIRS_TEACHER, WORDS, optax.sgd(0.1)
  state = make_init(*arguments)(KEY, batch)
  placed, results = batch, []
  for microbatches in (1, 2):
    step = jax.jit(make_train_step(*arguments, StepOptions(microbatches=microbatches)))
    results.append(step(state, PAIRS_TEACHER.variables, placed))
    mesh = sharding.make_mesh(8)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  (one, metrics), (parts, parts_metrics) = results
  label, logits = batch["label"], []
  variables = whole_variables(PAIRS_STUDENT.init(jax.random.fold_in(KEY, 0), batch))
  for weights in (variables, PAIRS_TEACHER.variables):
    outputs, _ = PAIRS_TEACHER.apply(*weights, batch, train=False, key=None)
    hidden, kernel = (np.asarray(x, np.float64) for x in (outputs["hidden"], outputs["head"][0]))
    logits.append((hidden @ kernel)[label >= 0])
  s, t = (scipy.special.log_softmax(x / 2, -1) for x in logits)
  nll = -scipy.special.log_softmax(logits[0], -1)[np.arange((label >= 0).sum()), label[label >= 0]]
  expected = 0.8 * nll.mean() + 2**2 * (np.exp(t) * (t - s)).sum(-1).mean()
  np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-5)
  assert_same(parts.params, one.params, rtol=1e-4, atol=1e-6)
  assert_same(parts_metrics["loss"], metrics["loss"], rtol=1e-5)


# Wrong arguments


def changed(model):
  params = model.variables.params
  kernel = params["first"]["layers"][0]["kernel"] + 1e-3
  layers = {**params["first"]["layers"], 0: {**params["first"]["layers"][0], "kernel": kernel}}
  params = {**params, "first": {**params["first"], "layers": layers}}
  return model._replace(variables=model.variables._replace(params=params))


@pytest.mark.parametrize(
  ("arguments", "field"),
  [
    ((WHOLE, WHOLE, "^first/"), "teacher: .*none"),
    ((changed(TEACHER), TEACHER, "^first/"), "student: .*first/layers/0/kernel"),
    ((WHOLE, TEACHER, "^frist/"), "prefix: .*frist"),
    ((WHOLE, TEACHER, "^first/layers/0/"), "prefix: .*first/layers/1"),
    ((WHOLE, TEACHER, {"^rest/0": "rest/7"}), r"prefix: (.|\n)*rest/7"),
    ((WHOLE, TEACHER, {"^head/kernel": "rest/0/kernel"}), r"prefix: (.|\n)*head/kernel .*\[8, 8\]"),
  ],
)
def test_other_first_layers_raise(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    student = shared_prefix(*arguments, rest=REST)
    student.init(KEY, {"image": jnp.ones((2, 6))})


def test_equal_variables_are_taken(rng):
  student = shared_prefix(TEACHER, TEACHER, "^first/", rest=network(3)[1])
  assert_same(whole_variables(student.variables), TEACHER.variables, rtol=0)
  assert_same(student.init(KEY, examples(rng)), student.variables, rtol=0)


@pytest.mark.parametrize("seed", [2, None])
def test_teacher_of_other_first_layers_is_rejected_before_training(rng, seed):
  source = data.Source(small_seq2seq.pairs(rng, 8), small_seq2seq.VOCABULARY, ignore_label=-1)
  teacher = PAIRS_TEACHER if seed is None else small_seq2seq.models(seed)[0]
  if seed is None:  # One that does not return what the student reads.

    def apply(*args, **kwargs):
      outputs, state = PAIRS_TEACHER.apply(*args, **kwargs)
      return {name: outputs[name] for name in ("hidden", "head")}, state

    teacher = teacher._replace(apply=apply)
  with pytest.raises(ValueError, match="^teacher: .*'encoded'"):
    fit_pairs(source, teacher, 1)


def test_a_cohort_generates_and_reads_as_its_members_do():
  def member(weight, reads):
    network = from_apply(None, lambda w, x: w * x, variables=jnp.int32(weight), inputs="x")

    def sample(variables, key, batch):
      return (variables.params * batch["x"], batch["x"])

    return network._replace(sample=sample, reads=reads)

  model = cohort([member(2, ("a",)), member(3, ("b", "a"))])
  assert model.reads == ("a", "b")
  x = jnp.arange(3)
  np.testing.assert_array_equal(model.sample(model.variables, None, {"x": x})[0], 2 * x)
