"""Views of texts: what is drawn depends on seed, id, view and position only."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import cache, data, losses, models, objectives
from distill_jax.data.text import mask_tokens
from distill_jax.train import RunOptions, StepOptions, fit

MASK, CLS, SIZE = 99, 1, 50


def texts(rng, rows=64, length=40):
  tokens = rng.integers(2, SIZE, (rows, length))
  tokens[:, 0] = CLS
  segments = np.where(np.arange(length) < rng.integers(20, length + 1, (rows, 1)), 0, -1)
  return {"tokens": tokens, "segments": segments, "id": np.arange(rows)}


def views(batch, view, **options):
  augment = mask_tokens(**{"rate": 0.2, "mask": MASK, "keep": (CLS,), "seed": 3, **options})
  view = np.full(len(batch["id"]), view)
  return np.asarray(augment({**batch, "view": view})["tokens"])


def test_rates_are_those_asked_for_and_special_tokens_stay(rng):
  batch = texts(rng, rows=500)
  seen = views(batch, 0, replace_rate=0.3, vocab_size=SIZE)
  is_text = (batch["segments"] >= 0) & (batch["tokens"] != CLS)
  np.testing.assert_array_equal(seen[~is_text], batch["tokens"][~is_text])
  before, after = batch["tokens"][is_text], seen[is_text]
  count = len(after)
  assert abs((after == MASK).mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / count)
  replaced = (after != before) & (after != MASK)
  rate = 0.3 * (1 - 1 / SIZE)
  assert abs(replaced.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
  assert set(after[replaced]) == set(range(SIZE))


def test_view_is_that_of_seed_id_and_view_alone(rng):
  batch = texts(rng)
  whole = views(batch, 1)
  order = rng.permutation(64)[:16]
  part = {name: x[order] for name, x in batch.items()}
  np.testing.assert_array_equal(views(part, 1), whole[order])
  cut = {**part, "tokens": part["tokens"][:, :24], "segments": part["segments"][:, :24]}
  np.testing.assert_array_equal(views(cut, 1), whole[order, :24])
  renamed = batch | {"id": np.arange(64) + 64}
  for others in (
    views(batch, 2),
    views(batch, 1, seed=4),
    views(renamed, 1),
  ):
    assert (others != whole).any()


def test_student_of_stored_views_equals_that_of_the_live_teacher(rng, tmp_path):
  batch = texts(rng, rows=32)
  source = data.Source({**batch, "label": rng.integers(0, 3, 32)}, classes=3)
  augment = mask_tokens(0.3, mask=SIZE, keep=(CLS,), seed=0)

  def network(variables):
    def apply(weights, tokens):
      return weights[tokens].mean(1)

    return models.from_apply(lambda key: variables, apply, variables=variables, inputs="tokens")

  teacher = network(jnp.asarray(rng.normal(size=(SIZE + 1, 3)), jnp.float32))
  student = network(jnp.zeros((SIZE + 1, 3)))
  stored = cache.write_cache(
    tmp_path,
    teacher,
    source,
    {"logits": cache.Dense("float32")},
    augment=augment,
    num_views=2,
    batch_size=32,
    progress=False,
  )
  objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  weights = []
  for other in (teacher, stored):
    result = fit(
      student,
      other,
      objective,
      optax.sgd(0.5),
      source,
      steps=4,
      batch_size=16,
      step=StepOptions(augment=augment),
      run=RunOptions(num_views=2, progress=False),
    )
    weights.append(result.variables.params)
  np.testing.assert_allclose(*weights, rtol=1e-5, atol=1e-8)
  assert np.any(weights[0])


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"rate": 1.5}, "rate"),
    ({"rate": 0.0}, "rate"),
    ({"rate": 0.7, "replace_rate": 0.5, "vocab_size": 9}, "rate"),
    ({"replace_rate": 0.1}, "vocab_size"),
    ({"mask": -1}, "mask"),
    ({"keep": (-1,)}, "keep"),
    ({"seed": -1}, "seed"),
  ],
)
def test_bad_settings_name_their_field(options, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    views({}, 0, **options)


@pytest.mark.parametrize("name", ["tokens", "id", "view"])
def test_missing_entry_is_named(name, rng):
  batch = {**texts(rng), "view": np.zeros(64, int)}
  del batch[name]
  with pytest.raises(ValueError, match=f"^{name}"):
    mask_tokens(0.1, mask=MASK, keep=(), seed=0)(batch)


def test_labels_are_the_originals_of_changed_tokens(rng):
  batch = {**texts(rng), "view": np.zeros(64, int)}
  augment = mask_tokens(0.3, mask=MASK, keep=(CLS,), seed=0, label="original")
  changed = augment(batch)
  is_hidden = np.asarray(changed["tokens"]) == MASK
  assert is_hidden.any()
  np.testing.assert_array_equal(changed["original"], np.where(is_hidden, batch["tokens"], -1))
