"""Pairs of layers of transformers: the maps, and their terms against float64 numpy; padding, packing and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import attention, layer_map, layers, relations, weighted
from distill_jax.train import StepOptions, make_init, make_train_step

KEY = jax.random.key(0)
ROWS, LENGTH = 4, 7
PAIRS = ((1, 2), (2, 4))
SEGMENTS = np.array(
  [[0, 0, 0, 1, 1, -1, -1], [2] * 7, [3, 3, 4, 4, 4, 4, 5], [6, 6, 6, 6, 6, -1, -1]]
)
LABEL = np.where(SEGMENTS < 0, -1, 3)
LABEL[1, :2] = LABEL[2, 1] = -1  # a prompt, and an end
WHERE = np.array([True, True, True, False])


@pytest.mark.parametrize(
  "how, depths, expected",
  [
    ("uniform", (4, 12), [3, 6, 9, 12]),
    ("uniform", (6, 12), [2, 4, 6, 8, 10, 12]),
    ("uniform", (3, 7), [2, 4, 7]),
    ("last", (6, 12), [7, 8, 9, 10, 11, 12]),
    ("skip", (6, 12), [1, 3, 5, 7, 9, 11]),
    ("skip", (3, 7), [1, 3, 5]),
    ("skip", (1, 5), [1]),
    *((how, (5, 5), [1, 2, 3, 4, 5]) for how in ("uniform", "last", "skip")),
  ],
)
def test_maps(how, depths, expected):
  assert layer_map(*depths, how) == tuple(enumerate(expected, 1))


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((4, 12, "unifrom"), "no map 'unifrom'; did you mean 'uniform'"),
    ((6, 4), "6 layers cannot be mapped to a teacher of 4: expected 1 to 4"),
    ((0, 4), "0 layers"),
  ],
)
def test_maps_that_do_not_exist_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    layer_map(*arguments)


# Each term in numpy: token by token, head by head


def tokens_that_count():
  return [(b, q) for b in range(ROWS) for q in range(LENGTH) if WHERE[b] and LABEL[b, q] >= 0]


def drawn(rng, *, widths=(6, 10), heads=(2, 2), causal=True):
  """Outputs of a student of 2 layers and a teacher of 4; what does not count is not finite."""
  made = []
  for depth, width, n in zip((2, 4), widths, heads):
    out = {}
    for k in range(1, depth + 1):
      shapes = {"block": (LENGTH, width), "attention": (n, LENGTH, LENGTH)}
      shapes |= dict.fromkeys(("queries", "keys", "values"), (LENGTH, width))
      for name, shape in shapes.items():
        out[f"{name}{k}"] = rng.normal(size=(ROWS, *shape)).astype(np.float32)
        out[f"{name}{k}"][3] = np.nan
      if causal:
        looks = np.tril(np.ones((LENGTH, LENGTH), bool)) & (
          SEGMENTS[:, :, None] == SEGMENTS[:, None]
        )
        out[f"attention{k}"] = np.where(looks[:, None], out[f"attention{k}"], -np.inf)
    made.append(out)
  return made


def related(b, q):
  return [k for k in range(LENGTH) if SEGMENTS[b, k] == SEGMENTS[b, q]]


def kl(p_scores, q_scores):
  p, q = (scipy.special.log_softmax(np.float64(x)) for x in (p_scores, q_scores))
  return (np.exp(p) * (p - q)).sum()


def evaluate(term, student, teacher, batch=None, params=None):
  batch = {"label": LABEL, "segments": SEGMENTS, "where": WHERE} if batch is None else batch
  params = term.init(KEY, student, teacher).params if params is None else params
  value, _ = term.apply(params, {}, student, teacher, batch, step=0, key=KEY, axis_name=None)
  return reduce.mean(*value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("loss", [losses.hint, losses.cosine])
def test_hidden_states_through_a_projection_of_each_pair(rng, loss):
  s, t = drawn(rng)
  term = layers(PAIRS, loss)
  params = term.init(KEY, s, t).params
  assert jax.tree.map(np.shape, params) == {i: {"kernel": (6, 10), "bias": (10,)} for i in "01"}
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  each = []
  for b, q in tokens_that_count():
    total = 0
    for i, (m, g) in enumerate(PAIRS):
      own = s[f"block{m}"][b, q] @ np.float64(params[str(i)]["kernel"]) + params[str(i)]["bias"]
      other = np.float64(t[f"block{g}"][b, q])
      if loss is losses.hint:
        total += ((own - other) ** 2).mean()
      else:
        total += 1 - own @ other / np.linalg.norm(own) / np.linalg.norm(other)
    each.append(total)
  np.testing.assert_allclose(evaluate(term, s, t, params=params), np.mean(each), rtol=1e-5)


def test_equal_widths_learn_nothing(rng):
  s, t = drawn(rng, widths=(6, 6))
  term = layers([(2, 3)], losses.hint)
  assert not jax.tree.leaves(term.init(KEY, s, t))
  expected = np.mean(
    [((s["block2"][at] - t["block3"][at]) ** 2).mean() for at in tokens_that_count()]
  )
  np.testing.assert_allclose(evaluate(term, s, t), expected, rtol=1e-5)


def test_a_loss_that_relates_tokens_gets_those_that_count(rng):
  s, t = drawn(rng, widths=(6, 6))

  def gram(s, t, *, where):
    valid = where[:, None] & where
    return jnp.where(valid, (s @ s.T - t @ t.T) ** 2, 0).sum() / valid.sum()

  own, other = (np.stack([x[at] for at in tokens_that_count()]) for x in (s["block1"], t["block1"]))
  expected = ((own @ own.T - other @ other.T) ** 2).mean()
  np.testing.assert_allclose(evaluate(layers([(1, 1)], gram), s, t), expected, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("loss", [losses.attention_kl, losses.attention_scores_mse])
def test_attention_over_the_keys_of_the_same_document(rng, loss, causal):
  """With models that look anywhere, as one may be whose scores are taken before it masks them."""
  s, t = drawn(rng, causal=causal)
  each = []
  for b, q in tokens_that_count():
    keys, total = [k for k in related(b, q) if k <= q or not causal], 0
    for m, g in PAIRS:
      for h in range(2):
        own, other = (x[b, h, q][keys] for x in (s[f"attention{m}"], t[f"attention{g}"]))
        one = (
          kl(other, own) if loss is losses.attention_kl else ((np.float64(own) - other) ** 2).mean()
        )
        total += one / 2
    each.append(total)
  np.testing.assert_allclose(evaluate(attention(PAIRS, loss), s, t), np.mean(each), rtol=1e-5)


def test_other_numbers_of_heads_are_compared_by_their_mean_map(rng):
  s, t = drawn(rng, heads=(2, 3))
  each, squares = [], []
  for b, q in tokens_that_count():
    keys = [k for k in related(b, q) if k <= q]
    own, other = (
      np.log(np.mean([scipy.special.softmax(np.float64(x[b, h, q][keys])) for h in range(n)], 0))
      for x, n in ((s["attention2"], 2), (t["attention4"], 3))
    )
    each.append(kl(other, own))
    squares.append(((own - other) ** 2).mean())
  term = attention([(2, 4)])
  np.testing.assert_allclose(evaluate(term, s, t), np.mean(each), rtol=1e-5)
  squared = attention([(2, 4)], losses.attention_scores_mse)
  np.testing.assert_allclose(evaluate(squared, s, t), np.mean(squares), rtol=1e-5)

  def of(scores):
    return evaluate(term, {**s, "attention2": scores}, t)

  slope = jax.grad(of)(jnp.asarray(s["attention2"]))
  move = rng.normal(size=slope.shape)
  moved = [of(jnp.asarray(s["attention2"] + e * move, jnp.float32)) for e in (1e-2, -1e-2)]
  assert np.isfinite(slope).all()
  np.testing.assert_allclose((slope * move).sum(), (moved[0] - moved[1]) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize("names", [("queries", "keys", "values"), ("values",)])
def test_relations_within_documents(rng, names):
  s, t = drawn(rng, widths=(6, 12))
  each = []
  for b, q in tokens_that_count():
    total = 0
    for name in names:
      rows = []
      for x in (s[f"{name}2"], t[f"{name}4"]):
        heads = np.float64(x[b]).reshape(LENGTH, 3, -1)
        rows.append(
          np.einsum("hd,khd->hk", heads[q], heads[related(b, q)]) / np.sqrt(heads.shape[-1])
        )
      total += np.mean([kl(other, own) for own, other in zip(*rows)])
    each.append(total)
  term = relations([(2, 4)], relation_heads=3, names=names)
  np.testing.assert_allclose(evaluate(term, s, t), np.mean(each), rtol=1e-5)


def test_whole_rows_are_minilm(rng):
  s, t = ({name: x[:3] for name, x in outputs.items()} for outputs in drawn(rng, widths=(6, 12)))
  names = ("queries", "keys", "values")
  own, other = (tuple(x[f"{name}{k}"] for name in names) for x, k in ((s, 2), (t, 4)))
  expected = losses.minilm_relations(own, other, relation_heads=3).mean()
  found = evaluate(relations([(2, 4)], relation_heads=3), s, t, {"label": np.zeros(3, int)})
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  mask = np.arange(LENGTH) < np.array([7, 3, 5])[:, None]
  padded = losses.minilm_relations(own, other, mask, relation_heads=3)
  found = evaluate(relations([(2, 4)], relation_heads=3), s, t, {"label": np.where(mask, 0, -1)})
  np.testing.assert_allclose(found, (padded * mask.sum(1)).sum() / mask.sum(), rtol=1e-5)


# Whole steps


def decoder(width, depth, heads):
  inputs = ("tokens", "segments")
  return from_nnx(
    lambda rngs: Decoder(11, width, depth, heads, num_kv_heads=2, rngs=rngs), inputs=inputs
  )


def vit(width, depth, heads, *, distilled=False):
  return from_nnx(lambda rngs: ViT(1, 8, 5, width, depth, heads, distilled=distilled, rngs=rngs))


def language_goal():
  return weighted(
    soft=(1.0, objectives.tokens()),
    hidden=(1.0, layers(layer_map(1, 2), losses.hint)),
    looks=(1.0, attention(layer_map(1, 2, "skip"))),
    related=(1.0, relations([(1, 2)], relation_heads=2)),
  )


def documents(rng, rows=16):
  """Two documents a row, padded to 2 rows of LENGTH each, and packed."""
  parts = [rng.integers(0, 11, n + 1) for n in rng.integers(2, LENGTH + 1, 2 * rows)]
  fills = {"tokens": 0, "label": -1, "segments": -1}
  padded = {name: np.full((2 * rows, 2 * LENGTH), fill, np.int32) for name, fill in fills.items()}
  packed = {name: x[:rows].copy() for name, x in padded.items()}
  for i, part in enumerate(parts):
    n, start = len(part) - 1, len(parts[i - 1]) - 1 if i % 2 else 0
    values = {"tokens": part[:-1], "label": part[1:].copy(), "segments": np.full(n, i)}
    values["label"][0] = -1  # nobody asks for it, but it is seen
    for name, value in values.items():
      padded[name][i, :n] = packed[name][i // 2, start : start + n] = value
  return padded, packed


def larger(variables):
  """With attention that is not nearly even, as it is at the start."""
  return variables._replace(
    params=jax.tree_util.tree_map_with_path(
      lambda path, x: 6 * x if "query" in str(path) else x, variables.params
    )
  )


def assert_same_step(expected, found):
  (one, measured), (other, again) = expected, found
  for name in measured:
    np.testing.assert_allclose(
      *map(reduce.value, (measured[name], again[name])), rtol=1e-4, err_msg=name
    )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-3, atol=2e-5), other.params, one.params
  )


def test_padding_packing_accumulation_and_devices_change_nothing(rng, mesh):
  padded, packed = documents(rng)
  parts = decoder(16, 1, 2), decoder(24, 2, 4), language_goal(), optax.sgd(0.1)
  state, teacher_outputs = (
    jax.jit(make_init(*parts))(KEY, padded),
    jax.jit(parts[1].init)(jax.random.key(1), {}),
  )
  state, teacher_outputs = larger(state), larger(teacher_outputs)
  step = jax.jit(make_train_step(*parts))
  expected = step(state, teacher_outputs, padded)
  assert all(reduce.value(expected[1][name]) > 0 for name in ("hidden", "looks", "related"))
  spec = PartitionSpec("data")
  spread = jax.device_put(packed, NamedSharding(mesh, spec))
  assert_same_step(
    expected, jax.jit(make_train_step(*parts, StepOptions(microbatches=2)))(state, teacher_outputs, spread)
  )
  mapped = make_train_step(*parts, StepOptions(axis_name="data"))
  specs = {"in_specs": (PartitionSpec(), PartitionSpec(), spec), "out_specs": PartitionSpec()}
  assert_same_step(
    expected, jax.jit(jax.shard_map(mapped, mesh=mesh, **specs))(state, teacher_outputs, packed)
  )
  nothing = {**padded, "label": np.full_like(padded["label"], -1)}
  new, measured = step(state, teacher_outputs, nothing)
  assert (
    reduce.value(measured["loss"]) == 0
    and measured["empty"][0] == 1
    and measured["nonfinite"][0] == 0
  )
  jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_a_distilled_vit_learns_the_patches_of_one_without_the_token(rng):
  student, teacher, patches = vit(12, 1, 3, distilled=True), vit(16, 2, 2), 4
  pairs = layer_map(1, 2)
  terms = {
    "hidden": layers(pairs, losses.hint, last=patches),
    "looks": attention(pairs, last=patches),
    "related": relations(pairs, relation_heads=4, last=patches),
  }
  batch = {
    "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(0, 5, 16).astype(np.int32),
  }
  parts = (
    student,
    teacher,
    weighted(**{name: (1.0, term) for name, term in terms.items()}),
    optax.adam(1e-2),
  )
  teacher_outputs = jax.jit(teacher.init)(jax.random.key(1), batch)
  state, step, seen = jax.jit(make_init(*parts))(KEY, batch), jax.jit(make_train_step(*parts)), []
  for _ in range(40):
    state, measured = step(state, teacher_outputs, batch)
    seen.append({name: float(reduce.value(measured[name])) for name in terms})
  for name in terms:
    assert seen[-1][name] < 0.8 * seen[0][name], name
  # The mean map of the last tokens, renormalized over them.
  s, t = (
    jax.jit(functools.partial(model.apply, train=False, key=None))(params, {}, batch)[0]
    for model, params in ((student, state.params["student"]), (teacher, teacher_outputs.params))
  )
  own, other = (
    np.log(scipy.special.softmax(np.float64(x)[:, :, -patches:, -patches:], -1).mean(1))
    for x in (s["attention1"], t["attention2"])
  )
  expected = (np.exp(other) * (other - own)).sum(-1).mean()
  np.testing.assert_allclose(
    evaluate(attention(pairs, last=patches), s, t, batch), expected, rtol=1e-4
  )


def shaped(**shapes):
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: layers([], losses.hint), r"pairs: expected \(student layer, teacher layer\)"),
    (lambda: attention([(0, 1)]), r"both from 1, got \[\(0, 1\)\]"),
    (lambda: relations([(1, 2, 3)], relation_heads=2), "pairs"),
    (
      lambda: layers([(1, 1)], losses.hint, last=0),
      "last: expected a number of tokens >= 1, got 0",
    ),
    (lambda: layers([(1, 1)], losses.hint, temprature=2.0), "hyper-parameters of hint"),
    (lambda: attention([(1, 1)], temperature=2.0), "hyper-parameters of attention_kl"),
  ],
)
def test_what_is_wrong_by_itself_is_refused_at_once(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  "term, message",
  [
    (layers([(1, 5)], losses.hint), "the teacher has no output 'block5'; did you mean 'block1'"),
    (attention([(3, 1)]), "the student has no output 'attention3'; did you mean 'attention1'"),
    (layers([(1, 1)], losses.hint), r"block1.*\(2, 5, 6\).*\(2, 4, 8\).*lengths differ"),
    (attention([(1, 1)]), r"\(2, 2, 5, 5\).*\(2, 2, 4, 4\).*`last` compares"),
    (relations([(1, 1)], relation_heads=3), r"queries1.*\(2, 5, 6\).*\(2, 4, 8\)"),
    (
      relations([(1, 1)], relation_heads=3, last=4),
      "relation_heads 3 must divide the teacher's width 8",
    ),
    (attention([(1, 1)], name="queries"), r"'queries1' \(2, 5, 6\): expected 4 axes"),
  ],
)
def test_what_does_not_fit_is_refused_in_init(term, message):
  s = shaped(
    block1=(2, 5, 6),
    queries1=(2, 5, 6),
    keys1=(2, 5, 6),
    values1=(2, 5, 6),
    attention1=(2, 2, 5, 5),
  )
  t = shaped(
    block1=(2, 4, 8),
    queries1=(2, 4, 8),
    keys1=(2, 4, 8),
    values1=(2, 4, 8),
    attention1=(2, 2, 4, 4),
  )
  with pytest.raises(ValueError, match=message):
    term.init(KEY, s, t)


def test_segments_of_another_shape_are_refused(rng):
  s, t = drawn(rng)
  with pytest.raises(ValueError, match=r"segments \(4, 6\) must have .* \(4, 7\)"):
    evaluate(attention([(2, 4)]), s, t, {"label": LABEL, "segments": SEGMENTS[:, :6]})
