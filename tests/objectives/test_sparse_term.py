"""The term of teachers kept as K of V classes: cached and live, masked, accumulated, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, objectives, reduce
from distill_jax.cache import RandomSampling, TopK
from distill_jax.models import from_apply
from distill_jax.train import StepOptions
from distill_jax.train.step import make_init, make_train_step
from distill_jax.types import Model, Variables

KEY = jax.random.key(0)
V = 12
ONE, EVERY = jax.P(), jax.P("data")
TOP_K = [losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed]


def evaluate(term, student, teacher, batch, key=KEY):
  variables = term.init(KEY, {"logits": student}, {"logits": teacher})
  assert variables == Variables({}, {})

  @jax.jit
  def apply(student, teacher, batch, key):
    outputs = {"logits": student}, {"logits": teacher}
    return term.apply({}, {}, *outputs, batch, step=jnp.int32(0), key=key, axis_name=None)[0]

  return apply(student, teacher, batch, key)


@pytest.fixture
def pair(rng):
  return (2 * rng.normal(size=(2, 16, V))).astype(np.float32)


@pytest.mark.parametrize("loss", TOP_K)
def test_a_live_teacher_and_its_targets_give_one_value(pair, loss):
  s, t = pair
  targets = losses.top_k(t, 4, temperature=2.0)
  expected = loss(s, targets)
  live, _ = evaluate(objectives.sparse(loss, k=4, temperature=2.0), s, t, {})
  np.testing.assert_allclose(live, expected, rtol=1e-6)
  for term in (objectives.sparse(loss), objectives.sparse(loss, k=4, temperature=2.0)):
    np.testing.assert_array_equal(evaluate(term, s, targets, {})[0], expected)


def test_hyper_parameters_masks_and_other_outputs_reach_the_loss(rng):
  s, t = rng.normal(size=(2, 3, 5, V)).astype(np.float32)
  mask = np.arange(V) < 9
  token, rows = rng.random((3, 5)) > 0.4, np.array([True, False, True])
  term = objectives.sparse(losses.sparse_kl, k=3, output="words", valid="token", class_mask=mask)
  outputs = {"words": s}, {"words": t}
  term.init(KEY, *outputs)
  batch = {"token": token, "where": rows}
  value, _ = term.apply({}, {}, *outputs, batch, step=0, key=KEY, axis_name=None)
  expected = np.asarray(losses.sparse_kl(s, losses.top_k(t, 3), class_mask=mask))
  np.testing.assert_allclose(reduce.mean(*value), expected[token & rows[:, None]].mean(), rtol=1e-5)


def test_live_draws_are_a_function_of_the_key_and_the_id(pair):
  s, t = np.zeros_like(pair[0]), np.tile(pair[1][:1], (16, 1))
  s += np.arange(V)
  term = objectives.sparse(losses.sampled_cross_entropy, k=3)
  ids = np.arange(16)
  values = np.asarray(evaluate(term, s, t, {"id": ids})[0])
  assert len(set(values.tolist())) > 4
  np.testing.assert_array_equal(evaluate(term, s, t, {"id": ids[::-1]})[0], values[::-1])
  assert (evaluate(term, s, t, {"id": ids}, jax.random.key(1))[0] != values).any()
  with pytest.raises(ValueError, match="batch"):
    evaluate(term, s, t, {"label": ids})


def test_live_draws_are_right_on_average(pair):
  s, t = (np.tile(z[:1], (4000, 1)) for z in pair)
  values = evaluate(
    objectives.sparse(losses.sampled_cross_entropy, k=5, temperature=2.0),
    s,
    t,
    {"id": np.arange(4000)},
  )[0]
  exact = losses.soft_cross_entropy(s[0], t[0], temperature=2.0)
  assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(4000)


# what does not fit


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"k": 0}, "k: expected an integer >= 1, got 0"),
    ({"k": 2, "temperature": 0.0}, "temperature: expected a finite number > 0, got 0"),
    ({"k": 2, "temperatur": 2.0}, "temperatur'; "),
  ],
)
def test_arguments_are_checked_at_once(arguments, message):
  with pytest.raises(ValueError, match=message):
    objectives.sparse(losses.sparse_kl, **arguments)


def test_targets_that_are_kept_otherwise_are_refused(pair):
  s, targets = pair[0], losses.top_k(pair[1], 4, temperature=2.0)
  for arguments, message in [
    ({"k": 5}, "k: the cached teacher 'logits' keeps 4 of its classes, got 5"),
    ({"temperature": 1.0}, "temperature: the cached teacher 'logits' is kept at 2.0, got 1.0"),
  ]:
    with pytest.raises(ValueError, match=message):
      evaluate(objectives.sparse(losses.sparse_kl, **arguments), s, targets, {})
  with pytest.raises(ValueError, match="targets"):
    objectives.sparse(losses.sparse_kl).init(KEY, {"logits": s[1:]}, {"logits": targets})


@pytest.mark.parametrize("loss", [*TOP_K, losses.sampled_cross_entropy])
def test_draws_and_the_most_probable_classes_are_not_mistaken_for_one_another(pair, loss):
  s, t = pair
  batch = {"id": np.arange(16), "view": np.zeros(16, np.int32)}
  takes_draws = loss is losses.sampled_cross_entropy
  for codec in (TopK(4), RandomSampling(4)):
    kept = codec.decode(codec.encode(jnp.asarray(t), batch), t)
    if isinstance(codec, RandomSampling) == takes_draws:
      assert np.isfinite(evaluate(objectives.sparse(loss), s, kept, batch)[0]).all()
      continue
    message = (
      "most probable classes .top_k.: their loss is sparse_kl"
      if takes_draws
      else "loss is sampled_cross_entropy"
    )
    with pytest.raises(ValueError, match=message):
      objectives.sparse(loss).init(KEY, {"logits": s}, {"logits": kept})


def test_a_live_teacher_that_does_not_fit_is_refused(pair):
  s, t = pair
  with pytest.raises(ValueError, match=r"k: teacher 'logits' \(16, 12\) is live: say how many"):
    evaluate(objectives.sparse(losses.sparse_kl), s, t, {})
  with pytest.raises(ValueError, match=r"\bk\b"):
    evaluate(objectives.sparse(losses.sparse_kl, k=13), s, t, {})
  with pytest.raises(
    ValueError, match=r"teacher 'logits' \(16, 11\) must be SparseTargets, or .*\(16, 12\)"
  ):
    evaluate(objectives.sparse(losses.sparse_kl, k=2), s, t[:, 1:], {})
  with pytest.raises(ValueError, match="teacher has no output 'logits'; did you mean 'logit'"):
    objectives.sparse(losses.sparse_kl, k=2).init(KEY, {"logits": s}, {"logit": t})


@pytest.mark.parametrize(
  "term",
  [objectives.logits(losses.kl_divergence), objectives.features("logits", "logits", losses.hint)],
)
def test_terms_that_need_every_class_say_so(pair, term):
  with pytest.raises(
    ValueError, match=r"teacher's 'logits' keeps 4 of its classes .*objectives.sparse"
  ):
    evaluate(term, pair[0], losses.top_k(pair[1], 4), {})


# the train step


CODECS = {"logits": TopK(4, 2.0), "drawn": RandomSampling(6)}


def student_and_batch(rng, rows=16):
  """A student with its logits twice, and a batch with what each codec keeps of one teacher."""
  x, z = (
    rng.normal(size=(rows, 6)).astype(np.float32),
    (2 * rng.normal(size=(rows, V))).astype(np.float32),
  )

  def apply(w, x):
    return x @ w, {"drawn": x @ w}

  student = from_apply(lambda key, x: jax.random.normal(key, (6, V)) / 4, apply)
  batch = {
    "image": x,
    "id": np.arange(rows),
    "view": np.zeros(rows, np.int32),
    "where": rng.random(rows) > 0.3,
  }
  columns = {
    f"teacher/{output}/{name}": np.asarray(x)
    for output, codec in CODECS.items()
    for name, x in jax.jit(codec.encode)(z, batch).items()
  }
  return student, batch | columns


def cached():
  """A teacher whose columns ride in the batch."""

  def columns(batch, output):
    start = f"teacher/{output}/"
    return {name.removeprefix(start): x for name, x in batch.items() if name.startswith(start)}

  def apply(params, state, batch, *, train, key):
    full = jax.ShapeDtypeStruct((1, V), jnp.float32)
    return {
      output: codec.decode(columns(batch, output), full) for output, codec in CODECS.items()
    }, state

  return Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {}))


SPARSE = objectives.sparse(losses.sparse_kl)
DRAWN = objectives.sparse(losses.sampled_cross_entropy, output="drawn")


def trained(student, teacher, terms, batch, mesh=None, **how):
  """The student's weights after two steps, and the terms' values in the second."""
  objective, optimizer = (
    objectives.weighted(**{name: (1.0, term) for name, term in terms.items()}),
    optax.sgd(0.5),
  )
  state = make_init(student, teacher, objective, optimizer)(KEY, batch)
  step = make_train_step(student, teacher, objective, optimizer, StepOptions(**how))
  if mesh is not None:
    batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, EVERY))
  if "axis_name" in how:
    step = jax.shard_map(step, mesh=mesh, in_specs=(ONE, ONE, EVERY), out_specs=ONE)
  step = jax.jit(step)
  for _ in range(2):
    state, metrics = step(state, teacher.variables, batch)
  assert metrics["nonfinite"][0] == 0
  return np.asarray(state.params["student"]), [float(reduce.value(metrics[name])) for name in terms]


def check_same(results):
  (weights, value), *others = results
  for other, same in others:
    np.testing.assert_allclose(other, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(same, value, rtol=1e-5)


def test_masks_microbatches_and_devices_change_nothing(rng, mesh):
  student, batch = student_and_batch(rng)
  run = functools.partial(trained, student, cached(), {"soft": SPARSE, "drawn": DRAWN})
  rows = np.flatnonzero(batch["where"])
  sliced = run({name: x[rows] for name, x in batch.items()})
  check_same(
    [
      run(batch),
      sliced,
      run(batch, microbatches=2),
      run(batch, mesh),
      run(batch, mesh, axis_name="data"),
    ]
  )


def test_live_draws_of_eight_devices_are_those_of_one(rng, mesh):
  student, batch = student_and_batch(rng)
  weights = rng.normal(size=(6, V)).astype(np.float32)
  teacher = from_apply(None, lambda w, x: x @ w, variables=weights)
  terms = {"soft": objectives.sparse(losses.sampled_cross_entropy, k=2)}
  run = functools.partial(trained, student, teacher, terms, batch)
  check_same([run(), run(mesh, axis_name="data")])


def test_an_index_that_is_no_class_skips_the_update(rng):
  student, batch = student_and_batch(rng)
  batch["where"][:] = True
  batch["teacher/logits/indices"] = batch["teacher/logits/indices"] | 0xFF  # two of class 15 of 12
  teacher, objective, optimizer = cached(), objectives.weighted(soft=(1.0, SPARSE)), optax.sgd(0.5)
  state = make_init(student, teacher, objective, optimizer)(KEY, batch)
  step = jax.jit(make_train_step(student, teacher, objective, optimizer))
  after, metrics = step(state, teacher.variables, batch)
  assert metrics["nonfinite"][0] == 1
  np.testing.assert_array_equal(after.params["student"], state.params["student"])
