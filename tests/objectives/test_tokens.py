"""Language models: terms and evaluation from hidden states, against unfused losses; a student that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import data, losses, metrics, objectives, reduce
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.train import fit, make_init, make_train_step
from distill_jax.types import Variables

VOCABULARY, LENGTH = 24, 12


def network(width, **kwargs):
  """Looks one token back."""

  def init(key, tokens):
    del tokens
    keys = jax.random.split(key, 3)
    shapes = (VOCABULARY, width), (VOCABULARY, width), (width, VOCABULARY)
    return {
      name: jax.random.normal(k, s) / 4
      for name, k, s in zip(("here", "before", "head"), keys, shapes)
    }

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
  teacher_outputs = Variables(
    *teacher.init(jax.random.key(1), {"tokens": jnp.zeros((1, LENGTH), jnp.int32)})
  )
  parts = student, teacher, goal, optax.sgd(0.5)
  return student, teacher, teacher_outputs, make_init(*parts), make_train_step(*parts, **kwargs)


def test_terms_are_the_unfused_means_over_the_labeled_tokens(rng):
  b = batch(rng)
  goal = objectives.weighted(
    both=(1.0, objectives.tokens("reverse_kl", label_weight=0.5, temperature=2.0)),
    hard=(0.25, objectives.next_tokens()),
  )
  student, teacher, teacher_outputs, init, step = setup(goal)
  state = init(jax.random.key(0), b)
  known = (b["label"] >= 0) & b["where"][:, None]

  def loss(params):
    z = logits_of(student.apply(params, {}, b, train=True, key=None)[0])
    t = logits_of(teacher.apply(*teacher_outputs, b, train=False, key=None)[0])
    soft = losses.reverse_kl(z, t, temperature=2.0)
    hard = optax.softmax_cross_entropy_with_integer_labels(z, np.maximum(b["label"], 0))
    return (jnp.where(known, soft + 0.75 * hard, 0)).sum() / known.sum()

  expected, grads = jax.value_and_grad(loss)(state.params["student"])
  new, measured = jax.jit(step)(state, teacher_outputs, b)
  np.testing.assert_allclose(reduce.value(measured["loss"]), expected, rtol=1e-5)
  moved = jax.tree.map(lambda p, g: p - 0.5 * g, state.params["student"], grads)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
    new.params["student"],
    moved,
  )


BY_TOKENS, BY_CLASSES = 2**26, 1  # bytes of memory that lead to each


@pytest.mark.parametrize(
  "how, memory",
  [
    ("microbatches", BY_TOKENS),
    ("shards", BY_TOKENS),
    ("padding", BY_TOKENS),
    ("pmap", BY_TOKENS),
    ("checked", BY_TOKENS),
    ("unchecked", BY_TOKENS),
    ("microbatches", BY_CLASSES),
    ("checked", BY_CLASSES),
    ("unchecked", BY_CLASSES),
  ],
)
def test_the_mean_does_not_depend_on_accumulation_sharding_or_padding(rng, mesh, how, memory):
  b = {**batch(rng), "generated": np.arange(16) % 3 == 1}
  goal = objectives.weighted(
    soft=(1.0, objectives.tokens(label_weight=0.5, memory=memory)),
    hard=(0.5, objectives.next_tokens(memory=memory)),
  )
  _, _, teacher_outputs, init, step = setup(goal)
  state = init(jax.random.key(0), b)
  expected, measured = jax.jit(step)(state, teacher_outputs, b)
  if how == "microbatches":
    step = setup(goal, microbatches=4)[4]
  elif how == "shards":
    b = jax.device_put(b, jax.NamedSharding(mesh, P("data")))
  elif how == "padding":
    pads = {"tokens": 0, "label": -1}
    b = {
      n: np.pad(x, ((0, 0), (0, 4)), constant_values=pads[n]) if n in pads else x
      for n, x in b.items()
    }
  else:
    step = setup(goal, axis_name="data")[4]
  if how == "pmap":
    b = {n: x.reshape(8, 2, *x.shape[1:]) for n, x in b.items()}
    found, again = jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None)(
      state, teacher_outputs, b
    )
  else:
    if how in ("checked", "unchecked"):
      specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
      step = jax.shard_map(step, mesh=mesh, check_vma=how == "checked", **specs)
    found, again = jax.jit(step)(state, teacher_outputs, b)
  for name in ("loss", "soft", "hard"):
    np.testing.assert_allclose(
      *(reduce.value(m[name]) for m in (measured, again)), rtol=1e-5, err_msg=name
    )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
    found.params,
    expected.params,
  )


def test_the_mean_does_not_depend_on_packing(rng):
  """Documents one a row and filled up, and the same ones packed, some of them by the student."""
  documents = [rng.integers(0, VOCABULARY, n + 1) for n in (7, 5, 4, 8)]
  arrays = {
    name: np.full((4, LENGTH), fill)
    for name, fill in (("tokens", 0), ("label", -1), ("segments", -1))
  }
  packed = {name: x[:2].copy() for name, x in arrays.items()}
  for i, document in enumerate(documents):
    n, start = len(document) - 1, i % 2 * (LENGTH - len(documents[i]) + 1)
    for rows, row, place in ((arrays, i, 0), (packed, i // 2, start)):
      parts = {"tokens": document[:-1], "label": document[1:], "segments": np.full(n, i)}
      for name, part in parts.items():
        rows[name][row, place : place + n] = part
  sampled = np.array([True, True, False, False])
  batches = ({**arrays, "generated": sampled}, {**packed, "generated": sampled[::2]})

  def decoder(width):
    return from_nnx(
      lambda rngs: Decoder(VOCABULARY, width, 1, 2, rngs=rngs), inputs=("tokens", "segments")
    )

  goal = objectives.weighted(
    soft=(1.0, objectives.tokens(label_weight=0.5)), hard=(0.5, objectives.next_tokens())
  )
  student, teacher = decoder(16), decoder(32)
  parts = student, teacher, goal, optax.sgd(0.5)
  state, teacher_outputs = (
    make_init(*parts)(jax.random.key(0), batches[0]),
    teacher.init(jax.random.key(1), {}),
  )
  step = jax.jit(make_train_step(*parts))
  (one, expected), (other, found) = (step(state, teacher_outputs, b) for b in batches)
  for name in ("loss", "soft", "hard"):
    np.testing.assert_allclose(
      *(reduce.value(m[name]) for m in (expected, found)), rtol=1e-5, err_msg=name
    )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-6), other.params, one.params
  )


def test_sampled_rows_count_in_the_divergence_alone(rng):
  b = {**batch(rng), "generated": rng.random(16) > 0.5}
  student, teacher, teacher_outputs, _, _ = setup(
    objectives.weighted(soft=(1.0, objectives.tokens()))
  )
  params = student.init(jax.random.key(0), b).params
  outputs = student.apply(params, {}, b, train=True, key=None)[0]
  t = teacher.apply(*teacher_outputs, b, train=False, key=None)[0]

  def mean(term, batch):
    (values, where), _ = term.apply({}, {}, outputs, t, batch, step=0, key=None, axis_name=None)
    return reduce.mean(values, where)

  known = (b["label"] >= 0) & b["where"][:, None]
  true = known & ~b["generated"][:, None]
  log_q, log_p = (np.float64(jax.nn.log_softmax(logits_of(x))) for x in (outputs, t))
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  hard = -np.take_along_axis(log_q, np.maximum(b["label"], 0)[..., None], -1)[..., 0]
  expected = (kl * known + 0.5 * hard * true).sum() / known.sum()
  np.testing.assert_allclose(mean(objectives.tokens(label_weight=0.5), b), expected, rtol=1e-5)
  np.testing.assert_allclose(mean(objectives.next_tokens(), b), hard[true].mean(), rtol=1e-5)
  for wrong in (b["generated"].astype(np.int32), known):
    with pytest.raises(ValueError, match=r"sampled: expected rows, bool \(16,\), got"):
      mean(objectives.next_tokens(), {**b, "generated": wrong})


@pytest.mark.parametrize("memory", [BY_TOKENS, BY_CLASSES])
@pytest.mark.parametrize("nothing", ["label", "where", "generated"])
def test_nothing_that_counts_is_an_empty_term_of_value_0(rng, memory, nothing):
  rows = {
    "label": np.full((16, LENGTH), -1, np.int32),
    "where": np.zeros(16, bool),
    "generated": np.ones(16, bool),
  }
  b = {**batch(rng), nothing: rows[nothing]}
  terms = {"hard": (0.5, objectives.next_tokens(memory=memory))}
  if nothing != "generated":
    terms["soft"] = 1.0, objectives.tokens(label_weight=0.5, memory=memory)
  _, _, teacher_outputs, init, step = setup(objectives.weighted(**terms))
  state = init(jax.random.key(0), b)
  new, measured = jax.jit(step)(state, teacher_outputs, b)
  assert measured["empty"][0] == 1 and measured["nonfinite"][0] == 0
  assert all(reduce.value(measured[name]) == 0 for name in ("loss", *terms))
  jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_rows_without_labels_may_hold_anything(rng):
  b = batch(rng)
  b["label"][5] = -1
  student, teacher, teacher_outputs, _, _ = setup(
    objectives.weighted(soft=(1.0, objectives.tokens()))
  )
  params = student.init(jax.random.key(0), b).params
  t = dict(teacher.apply(*teacher_outputs, b, train=False, key=None)[0])
  bad = {**t, "hidden": t["hidden"].at[5].set(jnp.nan)}

  def loss(params, t):
    outputs = student.apply(params, {}, b, train=True, key=None)[0]
    term = objectives.tokens(label_weight=0.5)
    return reduce.mean(*term.apply({}, {}, outputs, t, b, step=0, key=None, axis_name=None)[0])

  good, found = (jax.value_and_grad(loss)(params, x) for x in (t, bad))
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7), found, good)


def test_targets_of_a_few_tokens_are_learned_from(rng):
  b = batch(rng)
  student, teacher, teacher_outputs, _, _ = setup(
    objectives.weighted(soft=(1.0, objectives.tokens()))
  )
  t = logits_of(teacher.apply(*teacher_outputs, b, train=False, key=None)[0])
  kept = {"logits": losses.top_k(t, 5)}
  params = student.init(jax.random.key(0), b).params
  outputs = student.apply(params, {}, b, train=True, key=None)[0]
  term = objectives.tokens("bucket")
  term.init(jax.random.key(0), outputs, kept)
  (values, where), _ = term.apply({}, {}, outputs, kept, b, step=0, key=None, axis_name=None)
  expected = losses.sparse_kl(logits_of(outputs), kept["logits"])
  np.testing.assert_allclose(reduce.mean(values, where), reduce.mean(expected, where), rtol=1e-5)


def test_perplexity_is_that_of_the_labeled_tokens(rng):
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
    decoder(16),
    decoder(32),
    goal,
    optax.adam(1e-2),
    source,
    teacher_variables=teacher.variables,
    **settings,
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


def test_what_no_teacher_has_is_refused_at_once():
  for options, message in (
    ({"divergence": "reverse_kll"}, "there is no 'reverse_kll'; did you mean 'reverse_kl'"),
    ({"label_weight": float("nan")}, "label_weight: expected a finite number"),
    ({"memory": 0}, "memory: expected a number of bytes >= 1, got 0"),
    ({"clas_mask": None}, "clas_mask: neither .* did you mean 'class_mask'"),
  ):
    with pytest.raises(ValueError, match=message):
      objectives.tokens(**options)


def test_a_cached_teachers_temperature_and_kind_are_its_own(rng):
  hidden, kernel = (
    rng.standard_normal((2, 3, 4), np.float32),
    rng.standard_normal((4, 9), np.float32),
  )
  student = {"hidden": jnp.asarray(hidden), "head": (jnp.asarray(kernel), None, None)}
  kept = losses.top_k(jnp.asarray(hidden @ kernel), 2, temperature=2.0)
  drawn = losses.sample_k(jax.random.key(0), jnp.asarray(hidden @ kernel), 2, temperature=2.0)
  key = jax.random.key(0)
  objectives.tokens("bucket", temperature=2.0).init(key, student, {"logits": kept})
  with pytest.raises(
    ValueError, match="temperature: the cached teacher's 'logits' has 2.0, got 4.0"
  ):
    objectives.tokens("bucket", temperature=4.0).init(key, student, {"logits": kept})
  with pytest.raises(ValueError, match=r"draws \(sample_k\): expected 'sampled', got 'bucket'"):
    objectives.tokens("bucket").init(key, student, {"logits": drawn})
  with pytest.raises(
    ValueError, match=r"\(top_k\): expected 'bucket' or 'conditional', got 'sampled'"
  ):
    objectives.tokens("sampled").init(key, student, {"logits": kept})
