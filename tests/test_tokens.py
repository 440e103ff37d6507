"""Language models: terms and evaluation from hidden states, against unfused losses; a student that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import data, losses, metrics, objectives, reduce
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.decoder import Decoder
from distill_jax.train import fit, make_init, make_train_step
from distill_jax.types import Variables

VOCABULARY, LENGTH = 24, 12


def network(width, **kwargs):
  """Looks one token back."""

  def init(key, tokens):
    del tokens
    keys = jax.random.split(key, 3)
    shapes = (VOCABULARY, width), (VOCABULARY, width), (width, VOCABULARY)
    return {name: jax.random.normal(k, s) / 4 for name, k, s in zip(("here", "before", "head"), keys, shapes)}

  def apply(w, tokens):
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    hidden = jnp.tanh(w["here"][tokens] + w["before"][before])
    return {"hidden": hidden, "head": (w["head"], None, 5.0)}

  return from_apply(init, apply, inputs="tokens", **kwargs)


def logits_of(outputs):
  kernel, bias, softcap = outputs["head"]
  z = outputs["hidden"] @ kernel + (0 if bias is None else bias)
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def batch(rng, rows=16):
  tokens = rng.integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
  label = tokens[:, 1:].copy()
  label[rng.random(label.shape) < 0.3] = -1
  return {
    "id": np.arange(rows, dtype=np.int32),
    "tokens": tokens[:, :-1],
    "label": label,
    "where": rng.random(rows) > 0.2,
  }


def setup(goal, **kwargs):
  student, teacher = network(8), network(16)
  taught = Variables(*teacher.init(jax.random.key(1), {"tokens": jnp.zeros((1, LENGTH), jnp.int32)}))
  parts = student, teacher, goal, optax.sgd(0.5)
  return student, teacher, taught, make_init(*parts), make_train_step(*parts, **kwargs)


def test_terms_are_the_unfused_means_over_the_labelled_tokens(rng):
  b = batch(rng)
  goal = objectives.weighted(
    both=(1.0, objectives.tokens("reverse_kl", label_weight=0.5, temperature=2.0)),
    hard=(0.25, objectives.next_tokens()),
  )
  student, teacher, taught, init, step = setup(goal)
  state = init(jax.random.key(0), b)
  known = (b["label"] >= 0) & b["where"][:, None]

  def loss(params):
    z = logits_of(student.apply(params, {}, b, train=True, key=None)[0])
    t = logits_of(teacher.apply(*taught, b, train=False, key=None)[0])
    soft = losses.reverse_kl(z, t, temperature=2.0)
    hard = optax.softmax_cross_entropy_with_integer_labels(z, np.maximum(b["label"], 0))
    return (jnp.where(known, soft + 0.75 * hard, 0)).sum() / known.sum()

  expected, grads = jax.value_and_grad(loss)(state.params["student"])
  new, measured = jax.jit(step)(state, taught, b)
  np.testing.assert_allclose(reduce.value(measured["loss"]), expected, rtol=1e-5)
  moved = jax.tree.map(lambda p, g: p - 0.5 * g, state.params["student"], grads)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), new.params["student"], moved
  )


@pytest.mark.parametrize("how", ["microbatches", "shards", "mapped", "padding"])
def test_the_mean_does_not_depend_on_accumulation_sharding_or_padding(rng, mesh, how):
  b, goal = batch(rng), objectives.weighted(soft=(1.0, objectives.tokens(label_weight=0.5)))
  _, _, taught, init, step = setup(goal)
  state = init(jax.random.key(0), b)
  expected, measured = jax.jit(step)(state, taught, b)
  if how == "microbatches":
    step = setup(goal, microbatches=4)[4]
  elif how == "shards":
    b = jax.device_put(b, jax.NamedSharding(mesh, P("data")))
  elif how == "padding":
    pads = {"tokens": 0, "label": -1}
    b = {n: np.pad(x, ((0, 0), (0, 4)), constant_values=pads[n]) if n in pads else x for n, x in b.items()}
  else:
    mapped = setup(goal, axis_name="data")[4]
    step = jax.shard_map(mapped, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=True)
  found, again = jax.jit(step)(state, taught, b)
  np.testing.assert_allclose(*(reduce.value(m["loss"]) for m in (measured, again)), rtol=1e-5)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), found.params, expected.params
  )


def test_targets_of_a_few_tokens_are_learned_from(rng):
  b = batch(rng)
  student, teacher, taught, _, _ = setup(objectives.weighted(soft=(1.0, objectives.tokens())))
  t = logits_of(teacher.apply(*taught, b, train=False, key=None)[0])
  kept = {"logits": losses.top_k(t, 5)}
  params = student.init(jax.random.key(0), b).params
  outputs = student.apply(params, {}, b, train=True, key=None)[0]
  term = objectives.tokens("bucket")
  term.init(jax.random.key(0), outputs, kept)
  (values, where), _ = term.apply({}, {}, outputs, kept, b, step=0, key=None, axis_name=None)
  expected = losses.sparse_kl(logits_of(outputs), kept["logits"])
  np.testing.assert_allclose(reduce.mean(values, where), reduce.mean(expected, where), rtol=1e-5)


def test_perplexity_is_that_of_the_labelled_tokens(rng):
  b = batch(rng)
  student = network(8)
  params = student.init(jax.random.key(0), b).params
  outputs = student.apply(params, {}, b, train=False, key=None)[0]
  counts = metrics.token_counts(outputs["hidden"], outputs["head"], b["label"], b["where"])
  known = (b["label"] >= 0) & b["where"][:, None]
  log_q = np.asarray(jax.nn.log_softmax(logits_of(outputs)), np.float64)
  nll = -np.take_along_axis(log_q, np.maximum(b["label"], 0)[..., None], -1)[..., 0][known].mean()
  assert metrics.summary(counts) == {
    "nll": pytest.approx(nll, rel=1e-5),
    "perplexity": pytest.approx(np.exp(nll), rel=1e-5),
  }


def test_a_decoder_learns_from_a_decoder():
  rng = np.random.default_rng(0)
  tokens = np.cumsum(rng.integers(1, 3, (96, LENGTH + 1)), 1).astype(np.int32) % VOCABULARY
  arrays = {"id": np.arange(96), "tokens": tokens[:, :-1], "label": tokens[:, 1:]}
  source = data.Source(arrays, classes=VOCABULARY, name="counting")

  def decoder(width):
    return from_nnx(lambda rngs: Decoder(VOCABULARY, width, 1, 2, rngs=rngs), inputs="tokens")

  settings = dict(
    steps=60, batch_size=16, validation=source, best=("nll", "min"), eval_every=60, progress=False
  )
  alone = objectives.weighted(hard=(1.0, objectives.next_tokens()))
  teacher = fit(decoder(32), None, alone, optax.adam(1e-2), source, **settings)
  goal = objectives.weighted(soft=(1.0, objectives.tokens()))
  student = fit(
    decoder(16), decoder(32), goal, optax.adam(1e-2), source, teacher_variables=teacher.variables, **settings
  )
  for fitted in (teacher, student):
    assert fitted.history[-1]["perplexity"] < 6  # 24 at the start, 2 at best


def test_vocabularies_that_differ_are_refused(rng):
  b = batch(rng)
  student = network(8)
  outputs = student.apply(student.init(jax.random.key(0), b).params, {}, b, train=True, key=None)[0]
  other = {"hidden": outputs["hidden"], "head": (jnp.ones((8, 30)), None, None)}
  with pytest.raises(ValueError, match="30 tokens and the student's 24.*uld"):
    objectives.tokens().init(jax.random.key(0), outputs, other)
  with pytest.raises(ValueError, match="the teacher has no output 'hidden'"):
    objectives.tokens().init(jax.random.key(0), outputs, {"block1": outputs["hidden"]})
  with pytest.raises(ValueError, match="label_weight"):
    objectives.tokens(label_weight=-1)
