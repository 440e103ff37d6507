"""Targets that the student generates, against its sampler; and in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_steps import END, sources, split_rows, steps_of, table

from distill_jax import losses, objectives, reduce
from distill_jax.data import UNLABELED
from distill_jax.models import from_apply
from distill_jax.models.decoding import sample_on_policy, sampler, target_rows
from distill_jax.train import StepOptions, make_init, make_train_step
from distill_jax.types import Variables

LENGTH = 6
KEY = jax.random.key(3)
sample = sampler(steps_of(5), max_length=LENGTH, temperature=1.0)


def pairs(rows=16):
  """Returns a batch of sources and of targets that no network generates."""
  tokens = np.full((rows, LENGTH), 4)
  return {**sources(rows), "tokens": jnp.asarray(tokens), "label": jnp.asarray(tokens)}


def policy(fraction=0.5, sample=sample):
  return sample_on_policy(sample, fraction=fraction, start_token=1, end_token=END)


def test_replaced_rows_are_samples_of_their_sources():
  variables, batch = table(5), pairs()
  new = jax.jit(policy())(variables, KEY, batch)
  replaced = np.asarray(new["generated"])
  assert replaced.sum() == 8
  sequences = jax.jit(sample)(variables, jax.random.fold_in(KEY, 1), batch)
  assert len(set(sequences[1].tolist())) > 2
  for name, rows in zip(("tokens", "label"), target_rows(*sequences, start_token=1, end_token=END)):
    np.testing.assert_array_equal(new[name], np.where(replaced[:, None], rows, batch[name]))
  split = jax.jit(policy())(variables, KEY, split_rows(batch))
  jax.tree.map(np.testing.assert_array_equal, split, new)
  other = jax.jit(policy())(variables, jax.random.key(4), batch)
  assert (other["generated"] != new["generated"]).any()


def test_padding_stays_and_samples_fit_the_rows():
  def numbers(variables, key, batch):
    """Says 5, 6, 7, 8, which ends for even ids only."""
    tokens = jnp.broadcast_to(jnp.arange(5, 9), (len(batch["id"]), 4))
    return tokens, jnp.where(batch["id"] % 2 == 0, 3, 4)

  batch = pairs(4) | {"where": jnp.array([True, True, True, False])}
  new = jax.jit(policy(1.0, numbers))(table(5), KEY, batch)
  assert new["generated"].tolist() == [True, True, True, False]
  assert new["tokens"].tolist() == [
    [1, 5, 6, 7, END, END],
    [1, 5, 6, 7, END, END],
    [1, 5, 6, 7, END, END],
    [4] * 6,
  ]
  none = [UNLABELED] * 2
  assert new["label"].tolist() == [
    [5, 6, 7, END, *none],
    [5, 6, 7, 8, *none],
    [5, 6, 7, END, *none],
    [4] * 6,
  ]
  short = {name: x[:, :2] if name in ("tokens", "label") else x for name, x in batch.items()}
  new = policy(1.0, numbers)(table(5), KEY, short)
  assert new["tokens"][0].tolist() == [1, 5] and new["label"][0].tolist() == [5, 6]
  unchanged = policy(0.0)(table(5), KEY, batch)
  assert not unchanged["generated"].any()
  np.testing.assert_array_equal(unchanged["tokens"], batch["tokens"])


def lookup(table, tokens):
  return {"logits": table[tokens]}


STUDENT = from_apply(lambda key, *_: table(5).params, lookup, inputs="tokens")
TEACHER = from_apply(lambda key, *_: table(5, seed=1).params, lookup, inputs="tokens")
OBJECTIVE = objectives.weighted(soft=(1.0, objectives.logits(losses.reverse_kl)))
PARTS = STUDENT, TEACHER, OBJECTIVE, optax.sgd(0.1)


@pytest.mark.parametrize("how", ["jit", pytest.param("shard_map", marks=pytest.mark.nightly)])
def test_step_trains_on_what_the_student_generates(how, mesh):
  batch = pairs()
  state = make_init(*PARTS)(KEY, batch)
  teacher = table(5, seed=1)
  key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 3)
  replaced = jax.jit(policy())(Variables(state.params["student"], {}), key, batch)
  expected, metrics = jax.jit(make_train_step(*PARTS))(state, teacher, replaced)
  if how == "jit":
    step = make_train_step(*PARTS, StepOptions(on_policy=policy()))
  else:
    spec = jax.sharding.PartitionSpec
    step = jax.shard_map(
      make_train_step(*PARTS, StepOptions(on_policy=policy(), axis_name="data")),
      mesh=mesh,
      in_specs=(spec(), spec(), spec("data")),
      out_specs=spec(),
      check_vma=True,
    )
  found, found_metrics = jax.jit(step)(state, teacher, batch)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.params, expected.params
  )
  values = [float(reduce.value(m["loss"])) for m in (found_metrics, metrics)]
  np.testing.assert_allclose(*values, rtol=1e-5)


def test_what_cannot_go_on_policy_is_refused_by_name():
  with pytest.raises(ValueError, match="fraction"):
    policy(1.5)
  for name in ("id", "tokens", "label"):
    batch = {key: x for key, x in pairs().items() if key != name}
    with pytest.raises(ValueError, match=name):
      policy()(table(5), KEY, batch)
  with pytest.raises(ValueError, match="fraction"):
    policy(0.01)(table(5), KEY, pairs())
