"""Teachers of which K of V classes are stored: cached and live, masked, accumulated, on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import losses, objectives, reduce
from distill_jax.cache import RandomSampling, TopK
from distill_jax.types import Variables

KEY = jax.random.key(0)
V = 12
TOP_K = [losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed]


def evaluate(term, student, teacher, batch, key=KEY):
  """Returns the term's values and which of them count."""
  variables = term.init(KEY, {"logits": student}, {"logits": teacher})
  assert variables == Variables({}, {})

  @jax.jit
  def apply(student, teacher, batch, key):
    outputs = {"logits": student}, {"logits": teacher}
    return term.apply({}, {}, *outputs, batch, step=jnp.int32(0), key=key)[0]

  return apply(student, teacher, batch, key)


@pytest.fixture
def pair(rng):
  return (2 * rng.normal(size=(2, 16, V))).astype(np.float32)


@functools.cache
def stored(codec):
  """What a codec stores of fixed logits [16, V], and the logits."""
  z = (2 * np.random.default_rng(1).normal(size=(16, V))).astype(np.float32)
  batch = {"id": np.arange(16), "view": np.zeros(16, np.int32)}
  return jax.jit(lambda z: codec.decode(codec.encode(z, batch), z))(z)


@pytest.mark.parametrize("loss", TOP_K)
def test_live_teacher_and_its_targets_give_one_value(pair, loss):
  s, t = pair
  targets = jax.jit(lambda t: losses.top_k(t, 4, temperature=2.0))(t)
  expected = jax.jit(loss)(s, targets)
  term = objectives.sparse(loss, k=4, temperature=2.0)
  live, _ = evaluate(term, s, t, {})
  np.testing.assert_allclose(live, expected, rtol=1e-6)
  for cached_term in (term, objectives.sparse(loss)):
    np.testing.assert_array_equal(evaluate(cached_term, s, targets, {})[0], expected)


def test_options_masks_and_other_outputs_reach_the_loss(rng):
  s, t = rng.normal(size=(2, 3, 5, V)).astype(np.float32)
  mask = np.arange(V) < 9
  token = rng.random((3, 5)) > 0.4
  rows = np.array([True, False, True])
  term = objectives.sparse(losses.sparse_kl, k=3, output="words", valid="token", class_mask=mask)
  outputs = {"words": s}, {"words": t}
  term.init(KEY, *outputs)
  apply = jax.jit(functools.partial(term.apply, step=0, key=KEY))
  value, _ = apply({}, {}, *outputs, {"token": token, "where": rows})
  expected = jax.jit(lambda s, t: losses.sparse_kl(s, losses.top_k(t, 3), class_mask=mask))(s, t)
  expected = np.asarray(expected)[token & rows[:, None]].mean()
  np.testing.assert_allclose(reduce.mean(*value), expected, rtol=1e-5)


def test_live_samples_are_a_function_of_the_key_and_the_id(pair):
  s = np.broadcast_to(np.arange(V, dtype=np.float32), pair[0].shape)
  t = np.tile(pair[1][:1], (16, 1))
  term = objectives.sparse(losses.sampled_cross_entropy, k=3)

  @jax.jit
  def apply(ids, key):
    return term.apply({}, {}, {"logits": s}, {"logits": t}, {"id": ids}, step=0, key=key)[0][0]

  ids = np.arange(16)
  values = np.asarray(apply(ids, KEY))
  assert len(set(values.tolist())) > 4
  np.testing.assert_array_equal(apply(ids[::-1], KEY), values[::-1])
  assert (apply(ids, jax.random.key(1)) != values).any()
  with pytest.raises(ValueError, match="^id: "):
    term.apply({}, {}, {"logits": s}, {"logits": t}, {"label": ids}, step=0, key=KEY)


def test_live_samples_give_the_mean_of_the_full_loss(pair):
  s, t = (np.tile(z[:1], (4000, 1)) for z in pair)
  term = objectives.sparse(losses.sampled_cross_entropy, k=5, temperature=2.0)
  values = np.asarray(evaluate(term, s, t, {"id": np.arange(4000)})[0])
  exact = losses.soft_cross_entropy(s[0], t[0], temperature=2.0)
  assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(4000)


# what does not fit


@pytest.mark.parametrize(
  ("arguments", "field"),
  [
    ({"k": 0}, "k: .*got 0"),
    ({"k": 2, "temperature": 0.0}, "temperature: .*got 0"),
    ({"k": 2, "temperatur": 2.0}, "temperatur: "),
  ],
)
def test_invalid_argument_raises_at_once(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    objectives.sparse(losses.sparse_kl, **arguments)


def test_targets_of_another_k_or_temperature_raise(pair):
  targets = losses.top_k(pair[1], 4, temperature=2.0)
  outputs = {"logits": pair[0]}, {"logits": targets}
  for arguments, field in (({"k": 5}, "k: .*4.*5"), ({"temperature": 1.0}, "temperature: .*2.*1")):
    with pytest.raises(ValueError, match=f"^{field}"):
      objectives.sparse(losses.sparse_kl, **arguments).init(KEY, *outputs)
  with pytest.raises(ValueError, match=r"\(15, 12\)"):
    objectives.sparse(losses.sparse_kl).init(KEY, {"logits": pair[0][1:]}, outputs[1])


@pytest.mark.parametrize("loss", [*TOP_K, losses.sampled_cross_entropy])
def test_samples_and_top_k_need_their_own_losses(pair, loss):
  for codec in (TopK(4), RandomSampling(4)):
    outputs = {"logits": pair[0]}, {"logits": stored(codec)}
    if isinstance(codec, RandomSampling) == (loss is losses.sampled_cross_entropy):
      objectives.sparse(loss).init(KEY, *outputs)
    else:
      with pytest.raises(ValueError, match="targets"):
        objectives.sparse(loss).init(KEY, *outputs)


def test_live_teacher_that_does_not_fit_raises(pair):
  s, t = ({"logits": x} for x in pair)
  for k, teacher, field in (
    (None, t, r"k: .*\(16, 12\)"),
    (13, t, r"k\b"),
    (2, {"logits": pair[1][:, 1:]}, r"logits: .*\(16, 12\).*\(16, 11\)"),
    (2, {"logit": pair[1]}, "logits: .*'logit'"),
  ):
    with pytest.raises(ValueError, match=f"^{field}"):
      objectives.sparse(losses.sparse_kl, k=k).init(KEY, s, teacher)


@pytest.mark.parametrize(
  "term",
  [objectives.logits(losses.kl_divergence), objectives.features("logits", "logits", losses.hint)],
)
def test_term_that_needs_all_classes_names_sparse(pair, term):
  with pytest.raises(ValueError, match="^logits: .*teacher.*got 4 .*objectives.sparse"):
    term.init(KEY, {"logits": pair[0]}, {"logits": losses.top_k(pair[1], 4)})


def test_one_device_and_eight_agree(pair, mesh):
  """Values and gradients of each row, of cached teachers and of random samples of a live one."""
  terms = {
    "top_k": objectives.sparse(losses.sparse_kl, output="top_k"),
    "samples": objectives.sparse(losses.sampled_cross_entropy, output="samples"),
    "live": objectives.sparse(losses.sampled_cross_entropy, output="live", k=2),
  }
  teacher = {
    "top_k": stored(TopK(4, 2.0)),
    "samples": stored(RandomSampling(6)),
    "live": pair[1],
  }

  def evaluate_rows(s, teacher, batch):
    def total(s):
      values = {}
      for name, term in terms.items():
        value, _ = term.apply({}, {}, {name: s}, teacher, batch, step=0, key=KEY)
        np.testing.assert_equal(value[1].shape, s.shape[:1])
        values[name] = value[0]
      return sum(x.sum() for x in values.values()), values

    gradients, values = jax.grad(total, has_aux=True)(s)
    return gradients, values

  batch = {"id": np.arange(16), "where": np.arange(16) % 3 != 1}
  expected = jax.jit(evaluate_rows)(pair[0], teacher, batch)
  mapped = jax.shard_map(evaluate_rows, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))
  results = jax.jit(mapped)(pair[0], teacher, batch)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, results, expected)


def test_index_that_is_no_class_gives_nan(rng):
  z = rng.normal(size=(16, V)).astype(np.float32)
  codec = TopK(4)
  batch = {"id": np.arange(16), "view": np.zeros(16, np.int32)}
  columns = jax.jit(lambda z: codec.encode(z, batch))(z)
  indices = np.array(columns["indices"])
  indices[3] |= 0xFF  # two of class 15 of 12
  targets = jax.jit(lambda columns: codec.decode(columns, z))(columns | {"indices": indices})
  values, _ = evaluate(objectives.sparse(losses.sparse_kl), z, targets, {})
  np.testing.assert_array_equal(np.isnan(values), np.arange(16) == 3)
