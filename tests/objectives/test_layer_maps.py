"""Pairs of layers of transformers: maps, and terms against float64 numpy; packing and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from terms_by_hand import shaped

from distill_jax import losses, reduce
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import attention, layer_map, layers, relations, weighted

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
  ("arguments", "field"),
  [
    ((4, 12, "unifrom"), "how: .*'uniform'"),
    ((6, 4), "student_depth: .*1 to 4.*got 6"),
    ((0, 4), "student_depth: .*got 0"),
  ],
)
def test_invalid_map_raises(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    layer_map(*arguments)


# Each term in numpy: token by token, head by head


def tokens_that_count():
  return [(b, q) for b in range(ROWS) for q in range(LENGTH) if WHERE[b] and LABEL[b, q] >= 0]


def outputs(rng, *, widths=(6, 10), heads=(2, 2), causal=True):
  """Outputs of a student of 2 layers and a teacher of 4; rows that do not count are NaN."""
  attends = np.tril(np.ones((LENGTH, LENGTH), bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
  networks = []
  for depth, width, num_heads in zip((2, 4), widths, heads):
    network = {}
    for k in range(1, depth + 1):
      for name in ("block", "attention", "queries", "keys", "values"):
        attention_map = name == "attention"
        shape = (num_heads, LENGTH, LENGTH) if attention_map else (LENGTH, width)
        x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
        x[3] = np.nan
        network[f"{name}{k}"] = (
          np.where(attends[:, None], x, -np.inf) if attention_map and causal else x
        )
    networks.append(network)
  return networks


def related(b, q):
  return [k for k in range(LENGTH) if SEGMENTS[b, k] == SEGMENTS[b, q]]


def kl(p_scores, q_scores):
  p, q = (scipy.special.log_softmax(np.float64(x)) for x in (p_scores, q_scores))
  return (np.exp(p) * (p - q)).sum()


def evaluate(term, student, teacher, batch=None, params=None):
  batch = {"label": LABEL, "segments": SEGMENTS, "where": WHERE} if batch is None else batch
  params = term.init(KEY, student, teacher).params if params is None else params

  @jax.jit
  def mean(params, student, teacher, batch):
    value, _ = term.apply(params, {}, student, teacher, batch, step=0, key=KEY)
    return reduce.mean(*value) if isinstance(value, tuple) else value

  return mean(params, student, teacher, batch)


@pytest.mark.parametrize("loss", [losses.hint, losses.cosine])
def test_each_pair_of_hidden_states_has_a_projection(rng, loss):
  s, t = outputs(rng)
  term = layers(PAIRS, loss)
  params = term.init(KEY, s, t).params
  assert jax.tree.map(np.shape, params) == {i: {"kernel": (6, 10), "bias": (10,)} for i in "01"}
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  each = []
  for b, q in tokens_that_count():
    total = 0
    for i, (m, g) in enumerate(PAIRS):
      s_x = s[f"block{m}"][b, q] @ np.float64(params[str(i)]["kernel"]) + params[str(i)]["bias"]
      t_x = np.float64(t[f"block{g}"][b, q])
      if loss is losses.hint:
        total += ((s_x - t_x) ** 2).mean()
      else:
        total += 1 - s_x @ t_x / np.linalg.norm(s_x) / np.linalg.norm(t_x)
    each.append(total)
  np.testing.assert_allclose(evaluate(term, s, t, params=params), np.mean(each), rtol=1e-5)


def test_equal_widths_learn_nothing(rng):
  s, t = outputs(rng, widths=(6, 6))
  term = layers([(2, 3)], losses.hint)
  assert not jax.tree.leaves(term.init(KEY, s, t))
  expected = np.mean(
    [((s["block2"][at] - t["block3"][at]) ** 2).mean() for at in tokens_that_count()]
  )
  np.testing.assert_allclose(evaluate(term, s, t), expected, rtol=1e-5)


def test_loss_that_relates_tokens_gets_those_that_count(rng):
  s, t = outputs(rng, widths=(6, 6))

  def gram(s, t, *, where):
    valid = where[:, None] & where
    return jnp.where(valid, (s @ s.T - t @ t.T) ** 2, 0).sum() / valid.sum()

  s_x, t_x = (np.stack([x[at] for at in tokens_that_count()]) for x in (s["block1"], t["block1"]))
  expected = ((s_x @ s_x.T - t_x @ t_x.T) ** 2).mean()
  np.testing.assert_allclose(evaluate(layers([(1, 1)], gram), s, t), expected, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("loss", [losses.attention_kl, losses.attention_scores_mse])
def test_attention_is_over_keys_of_the_same_document(rng, loss, causal):
  """With models that look anywhere, as one may be whose scores are taken before it masks them."""
  s, t = outputs(rng, causal=causal)
  each = []
  for b, q in tokens_that_count():
    keys, total = [k for k in related(b, q) if k <= q or not causal], 0
    for m, g in PAIRS:
      for h in range(2):
        s_x, t_x = (x[b, h, q][keys] for x in (s[f"attention{m}"], t[f"attention{g}"]))
        squares = (np.float64(s_x) - t_x) ** 2
        total += (kl(t_x, s_x) if loss is losses.attention_kl else squares.mean()) / 2
    each.append(total)
  np.testing.assert_allclose(evaluate(attention(PAIRS, loss), s, t), np.mean(each), rtol=1e-5)


def test_different_numbers_of_heads_compare_their_mean_map(rng):
  s, t = outputs(rng, heads=(2, 3))
  each, squares = [], []
  for b, q in tokens_that_count():
    keys = [k for k in related(b, q) if k <= q]
    s_x, t_x = (
      np.log(np.mean([scipy.special.softmax(np.float64(x[b, h, q][keys])) for h in range(n)], 0))
      for x, n in ((s["attention2"], 2), (t["attention4"], 3))
    )
    each.append(kl(t_x, s_x))
    squares.append(((s_x - t_x) ** 2).mean())
  term = attention([(2, 4)])
  np.testing.assert_allclose(evaluate(term, s, t), np.mean(each), rtol=1e-5)
  squared = attention([(2, 4)], losses.attention_scores_mse)
  np.testing.assert_allclose(evaluate(squared, s, t), np.mean(squares), rtol=1e-5)

  batch = {"label": LABEL, "segments": SEGMENTS, "where": WHERE}

  @jax.jit
  @jax.value_and_grad
  def mean(scores):
    value, _ = term.apply({}, {}, {"attention2": scores}, t, batch, step=0, key=KEY)
    return reduce.mean(*value)

  _, slope = mean(s["attention2"])
  slope = np.asarray(slope)
  move = rng.normal(size=slope.shape)
  moved = [mean(np.float32(s["attention2"] + e * move))[0] for e in (1e-2, -1e-2)]
  assert np.isfinite(slope).all()
  np.testing.assert_allclose((slope * move).sum(), (moved[0] - moved[1]) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize("names", [("queries", "keys", "values"), ("values",)])
def test_relations_within_documents(rng, names):
  s, t = outputs(rng, widths=(6, 12))
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
      total += np.mean([kl(t_x, s_x) for s_x, t_x in zip(*rows)])
    each.append(total)
  term = relations([(2, 4)], relation_heads=3, names=names)
  np.testing.assert_allclose(evaluate(term, s, t), np.mean(each), rtol=1e-5)


def test_full_rows_are_minilm_relations(rng):
  s, t = ({name: x[:3] for name, x in network.items()} for network in outputs(rng, widths=(6, 12)))
  names = ("queries", "keys", "values")
  stacks = tuple(tuple(x[f"{name}{k}"] for name in names) for x, k in ((s, 2), (t, 4)))
  mask = np.arange(LENGTH) < np.array([7, 3, 5])[:, None]
  loss = jax.jit(functools.partial(losses.minilm_relations, relation_heads=3))
  term = relations([(2, 4)], relation_heads=3)
  for exists in (np.ones((3, LENGTH), bool), mask):
    expected = (np.asarray(loss(*stacks, exists)) * exists.sum(1)).sum() / exists.sum()
    mean = evaluate(term, s, t, {"label": np.where(exists, 0, -1)})
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(layers, PAIRS, losses.hint),
    functools.partial(attention, PAIRS),
    functools.partial(relations, PAIRS, relation_heads=3),
  ],
)
def test_last_compares_only_the_last_tokens(rng, make):
  """The student has two tokens more in front, as a vision transformer with class tokens."""
  networks = outputs(rng, widths=(6, 6), causal=False)
  s, t = ({name: x[:3] for name, x in network.items()} for network in networks)
  longer = {}
  for name, x in s.items():
    token_axes = (1,) if x.ndim == 3 else (2, 3)
    longer[name] = np.pad(x, [(2 * (axis in token_axes), 0) for axis in range(x.ndim)])

  def end(x):
    return x[:, -3:] if x.ndim == 3 else x[:, :, -3:, -3:]

  expected = evaluate(make(), jax.tree.map(end, s), jax.tree.map(end, t), {})
  np.testing.assert_allclose(evaluate(make(last=3), longer, t, {}), expected, rtol=1e-5)


def test_last_fits_the_patches_of_vision_transformers():
  """With and without DeiT's distillation token, whose outputs have other lengths."""
  batch = {"image": jnp.zeros((2, 8, 8, 1))}

  def vit(width, depth, heads, *, distilled=False):
    model = from_nnx(lambda rngs: ViT(1, 8, 5, width, depth, heads, distilled=distilled, rngs=rngs))
    variables = jax.eval_shape(model.init, KEY, batch)
    apply = functools.partial(model.apply, train=False, key=None)
    return jax.eval_shape(apply, *variables, batch)[0]

  student, teacher = vit(12, 1, 3, distilled=True), vit(16, 2, 2)
  pairs = layer_map(1, 2)
  for make in (
    functools.partial(layers, pairs, losses.hint),
    functools.partial(attention, pairs),
    functools.partial(relations, pairs, relation_heads=4),
  ):
    make(last=4).init(KEY, student, teacher)
    with pytest.raises(ValueError, match="lengths|last"):
      make().init(KEY, student, teacher)


# Packing, accumulation and devices


def documents(rng, lengths, width):
  """Outputs and batch of one document a row, and of the same documents two a row."""
  rows, size = len(lengths), max(lengths) * 2
  batches = []
  for count in (rows, rows // 2):
    shapes = dict.fromkeys(("block1", "queries1", "keys1", "values1"), (count, size, width))
    outputs = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    outputs["attention1"] = np.full((count, 2, size, size), -np.inf, np.float32)
    batch = {name: np.full((count, size), -1) for name in ("label", "segments")}
    batches.append((outputs, batch))
  for i, n in enumerate(lengths):
    values = {name: rng.normal(size=(n, width)) for name in batches[0][0] if name != "attention1"}
    causal = np.tril(np.ones((n, n), bool))
    scores = np.where(causal, rng.normal(size=(2, n, n)), -np.inf)
    start = lengths[i - 1] if i % 2 else 0
    for (outputs, batch), row, at in ((batches[0], i, 0), (batches[1], i // 2, start)):
      span = slice(at, at + n)
      for name, x in values.items():
        outputs[name][row, span] = x
      outputs["attention1"][row, :, span, span] = scores
      batch["segments"][row, span] = i
      batch["label"][row, at + 1 : at + n] = 3  # The first has no label, but others attend to it.
  return batches


def test_packing_accumulation_and_devices_change_nothing(rng):
  """Packed rows have the same mean and gradient, and a token's value needs no other row."""
  lengths = rng.integers(2, 6, 8).tolist()
  state = rng.bit_generator.state
  student = documents(rng, lengths, 6)
  rng.bit_generator.state = state
  teacher = documents(rng, lengths, 6)
  teacher = [(jax.tree.map(lambda x: x**3, outputs), batch) for outputs, batch in teacher]
  goal = weighted(
    hidden=(1.0, layers([(1, 1)], losses.hint)),
    attention=(1.0, attention([(1, 1)])),
    relations=(1.0, relations([(1, 1)], relation_heads=2)),
  )
  (padded, packed), (t_padded, t_packed) = student, teacher
  variables = goal.init(KEY, padded[0], t_padded[0])

  def scaled(x, scale):
    finite = jnp.isfinite(x)
    return jnp.where(finite, scale * jnp.where(finite, x, 0), x)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def evaluate_goal(scale, student, teacher, batch):
    student = jax.tree.map(lambda x: scaled(x, scale), student)
    terms, _ = goal.apply(*variables, student, teacher, batch, step=0, key=KEY)
    values = {name: value for name, (_, value) in terms.items()}
    means = {name: reduce.mean(*value) for name, value in values.items()}
    return sum(means.values()), (means, values)

  (loss, (means, values)), slope = evaluate_goal(0.7, padded[0], t_padded[0], padded[1])
  assert all(mean > 0.01 for mean in means.values()) and np.isfinite(slope)
  packed_loss, packed_slope = evaluate_goal(0.7, packed[0], t_packed[0], packed[1])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  jax.tree.map(close, packed_loss[1][0], means)
  close(packed_slope, slope)
  rows = jax.tree.map(lambda x: x[:4], (padded[0], t_padded[0], padded[1]))
  (_, (_, few)), _ = evaluate_goal(0.7, *rows)
  for name, (few_values, where) in few.items():
    close(few_values[where], values[name][0][:4][where], err_msg=name)
  unlabeled = padded[1] | {"label": np.full_like(padded[1]["label"], -1)}
  (loss, (_, values)), slope = evaluate_goal(0.7, padded[0], t_padded[0], unlabeled)
  assert loss == slope == 0 and not any(where.any() for _, where in values.values())


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (lambda: layers([], losses.hint), "pairs"),
    (lambda: attention([(0, 1)]), r"pairs: .*\(0, 1\)"),
    (lambda: relations([(1, 2, 3)], relation_heads=2), "pairs"),
    (lambda: layers([(1, 1)], losses.hint, last=0), "last: .*got 0"),
    (lambda: layers([(1, 1)], losses.hint, temprature=2.0), "temprature: .*hint"),
    (lambda: attention([(1, 1)], temperature=2.0), "temperature: .*attention_kl"),
  ],
)
def test_invalid_argument_raises_at_once(make, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    make()


@pytest.mark.parametrize(
  ("term", "field"),
  [
    (layers([(1, 5)], losses.hint), "block5: .*teacher.*'block1'"),
    (attention([(3, 1)]), "attention3: .*student.*'attention1'"),
    (layers([(1, 1)], losses.hint), r".*block1.*\(2, 5, 6\).*\(2, 4, 8\)"),
    (attention([(1, 1)]), r"last: .*\(2, 2, 5, 5\).*\(2, 2, 4, 4\)"),
    (relations([(1, 1)], relation_heads=3), r"last: .*queries1.*\(2, 5, 6\).*\(2, 4, 8\)"),
    (relations([(1, 1)], relation_heads=3, last=4), "relation_heads: .*teacher.*8.*3"),
    (attention([(1, 1)], name="queries"), r"queries1: .*4 axes.*\(2, 5, 6\)"),
  ],
)
def test_outputs_that_do_not_fit_raise_in_init(term, field):
  def network(tokens, width):
    rows = dict.fromkeys(("block1", "queries1", "keys1", "values1"), (2, tokens, width))
    return shaped(**rows, attention1=(2, 2, tokens, tokens))

  with pytest.raises(ValueError, match=f"^{field}"):
    term.init(KEY, network(5, 6), network(4, 8))


def test_hyperparameter_out_of_range_raises_in_init():
  outputs = shaped(block1=(2, 5, 6), logits=(2, 5, 6))
  term = layers([(1, 1)], losses.kl_divergence, temperature=0.0)
  with pytest.raises(ValueError, match="temperature"):
    term.init(KEY, outputs, outputs)


def test_segments_of_another_shape_raise(rng):
  s, t = outputs(rng)
  with pytest.raises(ValueError, match=r"^segments: .*\(4, 7\).*\(4, 6\)"):
    evaluate(attention([(2, 4)]), s, t, {"label": LABEL, "segments": SEGMENTS[:, :6]})
