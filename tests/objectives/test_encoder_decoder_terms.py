"""Terms over the outputs of encoder-decoders, against float64 numpy on slices without padding."""

import jax
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, reduce
from distill_jax.objectives import attention, layers, relations, weighted

KEY = jax.random.key(0)
ROWS, TARGET = 4, 6
SOURCE_LENGTHS = [3, 6, 0, 4]
LABEL = np.array([[3, 3, -1, -1, -1, -1], [-1, 3, 3, 3, 3, -1], [3, 3, 3, -1, -1, -1], [3] * 6])
WHERE = np.array([True, True, True, False])
GOAL = weighted(
  states=(1.0, layers([(1, 2)], losses.hint, name="encoder_block")),
  maps=(1.0, attention([(1, 2)], name="encoder_attention")),
  cross=(1.0, attention([(1, 2)], name="cross_attention")),
  scores=(1.0, attention([(1, 2)], losses.attention_scores_mse, name="cross_attention")),
  relations=(1.0, relations([(1, 2)], relation_heads=2, names=("encoder_values",))),
)


def outputs(rng, layer, length, *, fill):
  """Outputs of one network, with a value where nothing may be read: padding and row 3."""
  shapes = {
    "encoder_block": (length, 4),
    "encoder_values": (length, 4),
    "encoder_attention": (2, length, length),
    "cross_attention": (2, TARGET, length),
  }
  exists = np.arange(length) < np.array(SOURCE_LENGTHS)[:, None]
  masks = {
    "encoder_block": exists[:, :, None],
    "encoder_values": exists[:, :, None],
    "encoder_attention": (exists[:, :, None] & exists[:, None])[:, None],
    "cross_attention": ((LABEL >= 0)[:, :, None] & exists[:, None])[:, None],
  }
  network = {}
  for name, shape in shapes.items():
    x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    read = masks[name] & WHERE.reshape(-1, *[1] * len(shape))
    network[f"{name}{layer}"] = np.where(read, x, np.float32(fill))
  return network


def kl(t, s):
  p, q = (scipy.special.log_softmax(np.float64(x)) for x in (t, s))
  return (np.exp(p) * (p - q)).sum()


def relation(x, q):
  heads = np.float64(x).reshape(len(x), 2, -1)
  return np.einsum("hd,khd->hk", heads[q], heads) / np.sqrt(heads.shape[-1])


def by_hand(s, t):
  values = {name: [] for name in ("states", "maps", "cross", "scores", "relations")}
  for b in range(ROWS):
    n = SOURCE_LENGTHS[b]
    if not WHERE[b] or not n:
      continue
    for q in range(n):
      difference = np.float64(s["encoder_block1"][b, q]) - t["encoder_block2"][b, q]
      values["states"].append((difference**2).mean())
      pairs = zip(t["encoder_attention2"][b, :, q, :n], s["encoder_attention1"][b, :, q, :n])
      values["maps"].append(np.mean([kl(*pair) for pair in pairs]))
      both = (relation(x[b, :n], q) for x in (t["encoder_values2"], s["encoder_values1"]))
      values["relations"].append(np.mean([kl(*pair) for pair in zip(*both)]))
    for q in np.flatnonzero(LABEL[b] >= 0):
      t_x, s_x = (x[b, :, q, :n] for x in (t["cross_attention2"], s["cross_attention1"]))
      values["cross"].append(np.mean([kl(*pair) for pair in zip(t_x, s_x)]))
      values["scores"].append(((np.float64(s_x) - t_x) ** 2).mean())
  return {name: np.mean(x) for name, x in values.items()}


@jax.jit
def evaluate(student, teacher, batch):
  def loss(student):
    variables = GOAL.init(KEY, student, teacher)
    terms, _ = GOAL.apply(*variables, student, teacher, batch, step=0, key=KEY)
    means = {name: reduce.mean(*value) for name, (_, value) in terms.items()}
    return sum(means.values()), means

  return jax.grad(loss, has_aux=True)(student)


def batch_of(length):
  source = np.where(np.arange(length) < np.array(SOURCE_LENGTHS)[:, None], 0, -1)
  return {"label": LABEL, "where": WHERE, "source_segments": source}


@pytest.mark.parametrize("length", [7, TARGET])
def test_tokens_of_the_source_and_of_the_target_count(rng, length):
  """Also where source and target are of one length, and in a row without a source."""
  batch = batch_of(length)
  state = rng.bit_generator.state
  results = []
  for fill in (np.nan, 9.0):
    rng.bit_generator.state = state
    student, teacher = (outputs(rng, layer, length, fill=fill) for layer in (1, 2))
    results.append(evaluate(student, teacher, batch))
  (grads, means), (same_grads, same_means) = results
  expected = by_hand(student, teacher)
  for name, value in expected.items():
    np.testing.assert_allclose(means[name], value, rtol=1e-5, err_msg=name)
  assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in grads.values())
  jax.tree.map(np.testing.assert_array_equal, (grads, means), (same_grads, same_means))


def test_any_entry_says_which_tokens_count(rng):
  student, teacher = (outputs(rng, layer, 7, fill=9.0) for layer in (1, 2))
  batch = batch_of(7)
  mask = batch | {"is_text": batch["source_segments"] >= 0}
  everything = {"label": LABEL, "source_segments": np.zeros((ROWS, 7), int)}

  def values(batch, **entries):
    terms = [
      layers([(1, 2)], losses.hint, name="encoder_block", **entries),
      attention([(1, 2)], name="encoder_attention", **entries),
    ]
    return [t.apply({"0": {}}, {}, student, teacher, batch, step=0, key=KEY)[0] for t in terms]

  jax.tree.map(np.testing.assert_array_equal, values(batch), values(mask, segments="is_text"))
  unpadded = values({"label": LABEL}, segments="")
  jax.tree.map(np.testing.assert_array_equal, values(everything), unpadded)
  cross = attention([(1, 2)], name="cross_attention", segments="is_target", key_segments="is_text")
  named = cross.apply({}, {}, student, teacher, mask | {"is_target": LABEL >= 0}, step=0, key=KEY)
  default = attention([(1, 2)], name="cross_attention")
  expected = default.apply({}, {}, student, teacher, batch, step=0, key=KEY)
  jax.tree.map(np.testing.assert_array_equal, named, expected)


@pytest.mark.parametrize(
  ("term", "batch", "field"),
  [
    (attention([(1, 2)], name="cross_attention"), {"label": LABEL}, "source_segments"),
    (attention([(1, 2)], name="cross_attention"), batch_of(6), r"source_segments: .*\(4, 7\)"),
    (layers([(1, 2)], losses.hint, name="encoder_block", segments="mask"), batch_of(7), "mask: "),
  ],
)
def test_masks_that_are_missing_or_do_not_fit_raise(rng, term, batch, field):
  student, teacher = (outputs(rng, layer, 7, fill=0.0) for layer in (1, 2))
  with pytest.raises(ValueError, match=f"^{field}"):
    term.apply({"0": {}}, {}, student, teacher, batch, step=0, key=KEY)
