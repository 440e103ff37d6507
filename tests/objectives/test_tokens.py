"""Language models: terms from hidden states, against unfused losses in every layout of the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import data, losses, reduce
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.objectives import next_tokens, tokens, weighted
from distill_jax.train import Evaluation, RunOptions, StepOptions, fit, make_init, make_train_step

KEY = jax.random.key(0)
VOCABULARY, LENGTH, ROWS = 24, 6, 16
BY_TOKENS, BY_CLASSES = 2**26, 1  # bytes of memory that lead to each way of computing


def network(width):
  """A language model that sees one token back."""

  def init(key, tokens):
    del tokens
    keys = jax.random.split(key, 3)
    return {
      "here": jax.random.normal(keys[0], (VOCABULARY, width)) / 4,
      "before": jax.random.normal(keys[1], (VOCABULARY, width)) / 4,
      "head": jax.random.normal(keys[2], (width, VOCABULARY)) / 4,
    }

  def apply(w, tokens):
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    hidden = jnp.tanh(w["here"][tokens] + w["before"][before])
    return {"hidden": hidden, "head": (w["head"], None, 5.0)}

  return from_apply(init, apply, inputs="tokens")


STUDENT, TEACHER = network(8), network(16)


@functools.cache
def variables():
  """Student and teacher variables."""
  batch = {"tokens": jnp.zeros((1, LENGTH), jnp.int32)}
  inits = (jax.jit(functools.partial(model.init, batch=batch)) for model in (STUDENT, TEACHER))
  return tuple(init(jax.random.key(i)) for i, init in enumerate(inits))


@pytest.fixture
def batch(rng):
  sequences = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
  label = sequences[:, 1:].copy()
  label[rng.random(label.shape) < 0.3] = -1
  return {
    "id": np.arange(ROWS, dtype=np.int32),
    "tokens": sequences[:, :-1],
    "label": label,
    "where": rng.random(ROWS) > 0.2,
  }


def logits_of(outputs):
  kernel, _, softcap = outputs["head"]
  return softcap * jnp.tanh(outputs["hidden"] @ kernel / softcap)


def outputs_of(batch):
  """Student and teacher outputs, and the logits of both."""

  @jax.jit
  def apply(student, teacher):
    outputs = (
      STUDENT.apply(*student, batch, train=True, key=None)[0],
      TEACHER.apply(*teacher, batch, train=False, key=None)[0],
    )
    return outputs, tuple(map(logits_of, outputs))

  return apply(*variables())


@functools.partial(jax.jit, static_argnames=("k", "samples"))
def stored_of(logits, *, k, samples=False):
  """What a cache stores of logits: the top k, or random samples, at temperature 2."""
  if samples:
    return losses.sample_k(KEY, logits, k, temperature=2.0)
  return losses.top_k(logits, k, temperature=2.0)


def mean_of(term, outputs, teacher_outputs, batch):
  value, _ = jax.jit(functools.partial(term.apply, step=0, key=None))(
    {}, {}, outputs, teacher_outputs, batch
  )
  return reduce.mean(*value)


def log_softmax64(z):
  z = np.float64(z)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def counted(batch):
  return (batch["label"] >= 0) & batch["where"][:, None]


LIVE = {
  losses.kl_divergence: {},
  losses.reverse_kl: {},
  losses.jensen_shannon: {"teacher_weight": 0.2},
  losses.skew_kl: {"alpha": 0.3},
  losses.skew_reverse_kl: {"alpha": 0.3},
}


@pytest.mark.parametrize("loss", LIVE)
def test_live_teacher_gives_the_unfused_loss(batch, loss):
  (s, t), (z_s, z_t) = outputs_of(batch)
  options = LIVE[loss] | {"temperature": 2.0}
  expected = jax.jit(functools.partial(loss, **options))(z_s, z_t)
  expected = reduce.mean(expected, counted(batch))
  term = tokens(loss, **options)
  term.init(KEY, s, t)
  np.testing.assert_allclose(mean_of(term, s, t, batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
  "loss", [losses.sparse_kl, losses.sparse_kl_conditional, losses.sampled_cross_entropy]
)
def test_cached_teacher_gives_the_unfused_loss(batch, loss):
  (s, _), (z_s, z_t) = outputs_of(batch)
  stored = stored_of(z_t, k=5, samples=loss is losses.sampled_cross_entropy)
  exists = np.arange(VOCABULARY) < 20
  term = tokens(loss, targets="logits@5", class_mask=exists)
  term.init(KEY, s, {"logits@5": stored})
  expected = jax.jit(functools.partial(loss, class_mask=exists))(z_s, stored)
  expected = reduce.mean(expected, counted(batch))
  mean = mean_of(term, s, {"logits@5": stored}, batch)
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_cache_of_hidden_states_and_logits_serves_losses_of_both(batch):
  (s, t), (_, z_t) = outputs_of(batch)
  both = {**t, "logits": stored_of(z_t, k=5)}
  for loss, alone in (
    (losses.kl_divergence, t),
    (losses.sparse_kl, {"logits": both["logits"]}),
  ):
    term = tokens(loss)
    term.init(KEY, s, both)
    assert mean_of(term, s, both, batch) == mean_of(term, s, alone, batch) != 0


def test_step_moves_by_the_gradient_of_the_unfused_means(batch):
  goal = weighted(
    both=(1.0, tokens(losses.reverse_kl, label_weight=0.5, temperature=2.0)),
    hard=(0.25, next_tokens()),
  )
  parts = STUDENT, TEACHER, goal, optax.sgd(0.5)
  _, teacher = variables()
  state = jax.jit(make_init(*parts))(KEY, batch)
  where = counted(batch)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    z = logits_of(STUDENT.apply(params, {}, batch, train=True, key=None)[0])
    t = logits_of(TEACHER.apply(*teacher, batch, train=False, key=None)[0])
    soft = losses.reverse_kl(z, t, temperature=2.0)
    hard = optax.softmax_cross_entropy_with_integer_labels(z, np.maximum(batch["label"], 0))
    return jnp.where(where, soft + 0.75 * hard, 0).sum() / where.sum()

  expected, gradients = loss(state.params["student"])
  new, metrics = jax.jit(make_train_step(*parts))(state, teacher, batch)
  np.testing.assert_allclose(reduce.value(metrics["loss"]), expected, rtol=1e-5)
  moved = jax.tree.map(lambda p, g: p - 0.5 * g, state.params["student"], gradients)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, new.params["student"], moved)


@functools.cache
def compiled(memory):
  """The parts of a step, its first state, and the step compiled for one device."""
  goal = weighted(
    soft=(1.0, tokens(label_weight=0.5, memory=memory)),
    hard=(0.5, next_tokens(memory=memory)),
  )
  parts = STUDENT, TEACHER, goal, optax.sgd(0.5)
  state = jax.jit(make_init(*parts))(KEY, {"tokens": jnp.zeros((ROWS, LENGTH), jnp.int32)})
  return parts, state, jax.jit(make_train_step(*parts))


@pytest.mark.parametrize(
  ("layout", "memory"),
  [
    ("sharded", BY_TOKENS),
    ("pmap", BY_TOKENS),
    ("checked", BY_TOKENS),
    ("unchecked", BY_CLASSES),
  ],
)
def test_mean_does_not_depend_on_the_layout(batch, mesh, layout, memory):
  """Microbatches of padded rows on eight devices give what one batch gives on one."""
  batch["generated"] = np.arange(ROWS) % 3 == 1
  _, teacher = variables()
  parts, state, step = compiled(memory)
  expected, expected_metrics = step(state, teacher, batch)
  padded = {
    **batch,
    "tokens": np.pad(batch["tokens"], ((0, 0), (0, 2))),
    "label": np.pad(batch["label"], ((0, 0), (0, 2)), constant_values=-1),
  }
  if layout == "sharded":
    split = make_train_step(*parts, StepOptions(microbatches=2))
    rows = jax.device_put(padded, jax.NamedSharding(mesh, P("data")))
    new, metrics = jax.jit(split)(state, teacher, rows)
  elif layout == "pmap":
    mapped = make_train_step(*parts, StepOptions(axis_name="data"))
    rows = {name: x.reshape(8, 2, *x.shape[1:]) for name, x in batch.items()}
    over_rows = jax.pmap(mapped, "data", in_axes=(None, None, 0), out_axes=None)
    new, metrics = over_rows(state, teacher, rows)
  else:
    mapped = make_train_step(*parts, StepOptions(axis_name="data", microbatches=2))
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    over_rows = jax.shard_map(mapped, mesh=mesh, check_vma=layout == "checked", **specs)
    new, metrics = jax.jit(over_rows)(state, teacher, padded)
  for name in ("loss", "soft", "hard"):
    values = (reduce.value(m[name]) for m in (metrics, expected_metrics))
    np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, new.params, expected.params)


@pytest.mark.parametrize("memory", [BY_TOKENS, BY_CLASSES])
@pytest.mark.parametrize("masked", ["label", "where", "generated"])
def test_term_without_valid_tokens_is_empty_and_0(batch, memory, masked):
  batch["generated"] = np.full(ROWS, masked == "generated")
  if masked == "label":
    batch["label"] = np.full((ROWS, LENGTH), -1, np.int32)
  if masked == "where":
    batch["where"] = np.zeros(ROWS, bool)
  _, teacher = variables()
  _, state, step = compiled(memory)
  new, metrics = step(state, teacher, batch)
  assert metrics["empty"][0] == 1 and metrics["nonfinite"][0] == 0
  assert reduce.value(metrics["hard"]) == 0
  if masked == "generated":  # Only the divergence of generated rows counts.
    assert reduce.value(metrics["soft"]) > 0
  else:
    assert reduce.value(metrics["loss"]) == reduce.value(metrics["soft"]) == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_mean_does_not_depend_on_packing(rng):
  """Rows of one document each, and the same documents two a row, some of them generated."""
  lengths = (7, 5, 4, 8)
  padded = {"label": np.full((4, 12), -1), "hidden": np.full((4, 12, 6), np.nan, np.float32)}
  packed = {name: x[:2].copy() for name, x in padded.items()}
  for i, n in enumerate(lengths):
    start = i % 2 * (12 - n)
    label = rng.integers(0, VOCABULARY, n)
    label[0] = -1
    hidden = rng.normal(size=(n, 6))
    for rows, row, at in ((padded, i, 0), (packed, i // 2, start)):
      rows["label"][row, at : at + n] = label
      rows["hidden"][row, at : at + n] = hidden
  s_kernel, t_kernel = rng.normal(size=(2, 6, VOCABULARY)).astype(np.float32)
  generated = np.array([True, True, False, False])

  @functools.partial(jax.jit, static_argnames="term")
  @jax.value_and_grad
  def mean(kernel, hidden, batch, *, term):
    student = {"hidden": hidden, "head": (kernel, None, None)}
    teacher = {"hidden": -hidden, "head": (t_kernel, None, None)}
    value, _ = term.apply({}, {}, student, teacher, batch, step=0, key=None)
    return reduce.mean(*value)

  for term in (tokens(label_weight=0.5), next_tokens()):
    results = [
      mean(s_kernel, rows["hidden"], {"label": rows["label"], "generated": flags}, term=term)
      for rows, flags in ((padded, generated), (packed, generated[::2]))
    ]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    assert np.isfinite(results[0][0])
    jax.tree.map(close, *results)


def test_generated_rows_count_only_in_the_divergence(batch):
  batch["generated"] = np.arange(ROWS) % 2 == 1
  (s, t), (z_s, z_t) = outputs_of(batch)
  where = counted(batch)
  labeled = where & ~batch["generated"][:, None]
  log_q, log_p = log_softmax64(z_s), log_softmax64(z_t)
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  hard = -np.take_along_axis(log_q, np.maximum(batch["label"], 0)[..., None], -1)[..., 0]
  expected = (kl * where + 0.5 * hard * labeled).sum() / where.sum()
  np.testing.assert_allclose(mean_of(tokens(label_weight=0.5), s, t, batch), expected, rtol=1e-5)
  for term in (next_tokens(), tokens(None)):
    np.testing.assert_allclose(mean_of(term, s, {}, batch), hard[labeled].mean(), rtol=1e-5)
  for invalid in (batch["generated"].astype(np.int32), where):
    with pytest.raises(ValueError, match="^generated: "):
      mean_of(next_tokens(), s, t, {**batch, "generated": invalid})


def test_rows_without_labels_may_be_nan(batch):
  batch["label"][5] = -1
  (s, t), _ = outputs_of(batch)

  @jax.jit
  @jax.value_and_grad
  def loss(kernel, teacher_hidden):
    student = {"hidden": s["hidden"], "head": (kernel, None, 5.0)}
    teacher = {"hidden": teacher_hidden, "head": t["head"]}
    term = tokens(label_weight=0.5)
    return reduce.mean(*term.apply({}, {}, student, teacher, batch, step=0, key=None)[0])

  kernel = s["head"][0]
  expected = loss(kernel, t["hidden"])
  results = loss(kernel, t["hidden"].at[5].set(jnp.nan))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, results, expected)


@pytest.mark.integration
def test_decoder_learns_from_decoder():
  rng = np.random.default_rng(0)
  sequences = np.cumsum(rng.integers(1, 3, (96, 13)), 1).astype(np.int32) % VOCABULARY
  arrays = {"id": np.arange(96), "tokens": sequences[:, :-1], "label": sequences[:, 1:]}
  source = data.Source(arrays, classes=VOCABULARY, name="counting")

  def decoder(width):
    return from_nnx(lambda rngs: Decoder(VOCABULARY, width, 1, 2, rngs=rngs), inputs="tokens")

  settings = dict(
    steps=60,
    batch_size=16,
    evaluation=Evaluation(source, every=60, best="nll"),
    run=RunOptions(progress=False),
  )
  baseline = weighted(hard=(1.0, next_tokens()))
  teacher = fit(decoder(32), None, baseline, optax.adam(1e-2), source, **settings)
  student = fit(
    decoder(16),
    decoder(32),
    weighted(soft=(1.0, tokens())),
    optax.adam(1e-2),
    source,
    teacher_variables=teacher.variables,
    **settings,
  )
  for fitted in (teacher, student):
    assert fitted.history[-1]["perplexity"] < 6  # 24 at the start, 2 at best


# what does not fit


def heads(rng):
  """Outputs of a student, and logits of a teacher."""
  hidden = rng.standard_normal((2, 3, 4), np.float32)
  kernel = rng.standard_normal((4, 9), np.float32)
  return {"hidden": hidden, "head": (kernel, None, None)}, hidden @ kernel


def test_networks_that_do_not_fit_raise_in_init(rng):
  student, _ = heads(rng)
  for teacher, field in (
    ({"hidden": student["hidden"], "head": (np.ones((4, 30)), None, None)}, "head: .*30.*9"),
    ({"block1": student["hidden"]}, "hidden"),
    ({"hidden": student["hidden"][0], "head": student["head"]}, "hidden"),
  ):
    with pytest.raises(ValueError, match=f"^{field}"):
      tokens().init(KEY, student, teacher)
  for name in ("hidden", "head"):
    with pytest.raises(ValueError, match=f"^{name}"):
      next_tokens().init(KEY, {n: x for n, x in student.items() if n != name}, {})


@pytest.mark.parametrize(
  ("arguments", "field"),
  [
    ({"loss": "kl"}, "loss: .*kl_divergence.*sparse_kl.*'kl'"),
    ({"loss": losses.hint}, "loss: .*kl_divergence.*sparse_kl.*'hint'"),
    ({"loss": losses.sparse_kl_smoothed}, "loss"),
    ({"label_weight": -1}, "label_weight"),
    ({"label_weight": float("nan")}, "label_weight"),
    ({"targets": None}, "targets"),
    ({"memory": 0}, "memory: .*got 0"),
    ({"clas_mask": None}, "clas_mask: .*'class_mask'"),
    ({"alpha": 0.2}, "alpha: .*kl_divergence"),
    ({"loss": losses.jensen_shannon, "normalize": True}, "normalize: .*linear_kl"),
    ({"loss": None, "temperature": 2.0}, "temperature"),
    ({"loss": None, "label_weight": 0.5}, "label_weight"),
    ({"loss": None, "class_mask": np.ones(9, bool)}, "class_mask"),
  ],
)
def test_invalid_argument_raises_at_once(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    tokens(**arguments)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_out_of_range_raises(rng, temperature):
  student, logits = heads(rng)
  stored = stored_of(logits, k=2)
  for loss, teacher in ((losses.kl_divergence, student), (losses.sparse_kl, {"logits": stored})):
    with pytest.raises(ValueError, match="^temperature"):
      tokens(loss, temperature=temperature).init(KEY, student, teacher)


def test_cached_teacher_accepts_only_its_temperature_and_kind(rng):
  student, logits = heads(rng)
  top = {"logits": stored_of(logits, k=2)}
  samples = {"logits": stored_of(logits, k=2, samples=True)}
  tokens(losses.sparse_kl, temperature=2.0).init(KEY, student, top)
  with pytest.raises(ValueError, match="^temperature: .*2.0.*got 4.0"):
    tokens(losses.sparse_kl, temperature=4.0).init(KEY, student, top)
  for loss, teacher, supported in (
    (losses.sparse_kl, samples, "sampled_cross_entropy"),
    (losses.sampled_cross_entropy, top, "sparse_kl, sparse_kl_conditional"),
    (losses.kl_divergence, top, "sparse_kl"),
    (losses.sparse_kl, student, "kl_divergence"),
  ):
    with pytest.raises(ValueError, match=f"^loss: expected .*{supported}.*got {loss.__name__}"):
      tokens(loss).init(KEY, student, teacher)


@pytest.mark.parametrize("term", [tokens(losses.kl_divergence), next_tokens()])
def test_a_network_that_returns_logits_is_told_its_terms(term):
  z = {"logits": np.ones((2, 3, 5), np.float32)}
  with pytest.raises(ValueError, match=r"^hidden: .*labels\(\)"):
    term.init(KEY, z, z)
