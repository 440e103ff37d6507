"""Checks pseudo labels of real decoders, word-level teachers on them, and wrong samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_sequences import END, START, VOCAB, WEIGHTS, WIDTH, pairs, shifted, targets, written

from distill_jax import data, losses, objectives, reduce
from distill_jax.cache import Mismatch, TopK, check_run, pseudo_labels, seq_kd, write_cache
from distill_jax.cache.sequence_level import nth_best
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.models.decoding import DecoderSteps, beam_search, sampler
from distill_jax.types import Variables

BUCKETS = 31
STEPS = DecoderSteps(
  start=lambda variables, batch, length: batch["source"].sum(-1),
  step=lambda variables, tokens, position, state: (
    variables.params["table"][(7 * state + tokens) % BUCKETS],
    (7 * state + tokens) % BUCKETS,
  ),
  start_token=START,
  end_token=END,
  vocab_size=VOCAB,
  max_length=WIDTH,
)
"""A network that looks up its logits by a hash of the source and the tokens so far."""


def network(seed, width=8):
  """Returns a network with hidden states and a head that reads source and target."""
  rng = np.random.default_rng(seed)
  table = jnp.float32(rng.normal(size=(VOCAB, width)))

  def apply(w, source, tokens):
    return {"hidden": w[tokens] + w[source].mean(1, keepdims=True), "head": (w.T, None, None)}

  return from_apply(None, apply, variables=table, inputs=["source", "tokens"])


@pytest.fixture(scope="module")
def teacher():
  """Weights of `STEPS`, whose sequences have about three tokens."""
  table = np.random.default_rng(0).normal(size=(BUCKETS, VOCAB)) * 2
  table[:, END] += 3
  return Variables({"table": jnp.float32(table)}, {})


@pytest.fixture(scope="module")
def beam_labels(tmp_path_factory, teacher):
  url = tmp_path_factory.mktemp("beams") / "labels"
  search = jax.jit(beam_search(STEPS, max_length=WIDTH, beam_size=3))
  labels = seq_kd(
    url,
    search,
    teacher,
    pairs(),
    start_token=START,
    end_token=END,
    settings={"beam_size": 3, "max_length": WIDTH},
    batch_size=16,
    progress=False,
  )
  return url, search, labels


def test_beams_of_a_beam_search(teacher, beam_labels):
  url, search, labels = beam_labels
  source = pairs()
  beams = jax.device_get(search(teacher, {**source.arrays}))
  number = (beams.lengths > 0) & (beams.lengths < WIDTH) & (beams.tokens[..., 0] != START)
  expected = {}
  for row, id in enumerate(source.ids.tolist()):
    if number[row].any():
      best = number[row].argmax()
      expected[id] = beams.tokens[row, best, : beams.lengths[row, best]].tolist()
  assert len(expected) > 10 and targets(labels) == expected
  third = pseudo_labels(url, source, nth_best(2))
  assert 0 < len(third) and targets(third) != expected


def test_word_level_targets_of_pseudo_labels_are_cached(tmp_path, beam_labels):
  """Sequence-level and word-level distillation together: live and cached teachers agree."""
  labels = beam_labels[2]
  teacher, student = network(0), network(1)
  outputs = write_cache(
    tmp_path,
    teacher,
    labels,
    {"logits": TopK(VOCAB - 1)},  # with the mass of the one that is left, all of the distribution
    batch_size=16,
    mesh=sharding.data_mesh(1),
    progress=False,
  )
  batch = outputs.add_columns(labels.arrays)

  def gradient(loss, model):
    term = objectives.tokens(loss, label_weight=0.5)

    def mean(params):
      student_outputs, _ = student.apply(params, {}, batch, train=False, key=None)
      teacher_outputs, _ = model.apply(*model.variables, batch, train=False, key=None)
      pair = student_outputs, teacher_outputs
      (values, where), _ = term.apply({}, {}, *pair, batch, step=0, key=None)
      return reduce.mean(values, where)

    return jax.jit(jax.value_and_grad(mean))(student.variables.params)

  live, cached = gradient(losses.kl_divergence, teacher), gradient(losses.sparse_kl, outputs.model)
  np.testing.assert_allclose(cached[0], live[0], rtol=1e-3)  # stored as float16
  np.testing.assert_allclose(cached[1], live[1], atol=1e-3 * float(jnp.abs(live[1]).max()))
  real = {**pairs().take(np.isin(pairs().ids, labels.ids)).arrays}
  with pytest.raises(Mismatch, match="tokens"):
    check_run(outputs, real)


def test_samples_of_a_sampler(tmp_path, teacher):
  draw = jax.jit(sampler(STEPS, max_length=WIDTH, temperature=1.0))
  options = dict(start_token=START, end_token=END, settings={"temperature": 1.0}, progress=False)
  first, second = (
    seq_kd(
      tmp_path / name,
      draw,
      teacher,
      pairs(),
      key=jax.random.key(seed),
      batch_size=8,
      **options,
    )
    for name, seed in (("first", 0), ("second", 1))
  )
  assert len(first) > 10 and targets(first) != targets(second)


def returns(tokens, lengths, *scores):
  return lambda variables, key, batch: (tokens, lengths, *scores)


TOKENS = np.full((8, 4), 5)
LENGTHS = np.full(8, 3)
BEAM = np.full((8, 2, 4), 5)


def changed(values, index, value):
  values = values.copy()
  values[index] = value
  return values


@pytest.mark.parametrize(
  ("field", "sampler"),
  [
    ("sampler", lambda variables, key, batch: TOKENS),
    ("sampler", returns(TOKENS, LENGTHS, LENGTHS, LENGTHS)),
    ("sampler", "greedy"),
    ("tokens", returns(TOKENS[:7], LENGTHS[:7])),
    ("tokens", returns(TOKENS[:, :0], LENGTHS)),
    ("tokens", returns(BEAM, np.full((8, 2), 3))),
    ("tokens", returns(TOKENS, LENGTHS, -1.0 * LENGTHS)),
    ("tokens", returns(TOKENS + 0.5, LENGTHS)),
    ("lengths", returns(TOKENS, LENGTHS[:, None])),
    ("lengths", returns(TOKENS, 1.0 * LENGTHS)),
    ("lengths.*id {id}", returns(TOKENS, changed(LENGTHS, 2, 5))),
    ("lengths.*id {id}", returns(TOKENS, changed(LENGTHS, 2, -1))),
    ("lengths.*id {id}", returns(changed(TOKENS, (2, 1), END), LENGTHS)),
    ("tokens.*id {id}", returns(changed(TOKENS, (2, 1), VOCAB), LENGTHS)),
    ("tokens.*id {id}", returns(changed(TOKENS, (2, 1), -1), LENGTHS)),
    ("scores", returns(BEAM, np.full((8, 2), 3), np.ones((8, 2), int))),
    (
      "scores.*id {id}, sequence 1",
      returns(BEAM, np.full((8, 2), 3), changed(np.zeros((8, 2)), (2, 1), np.nan)),
    ),
    (
      "scores.*id {id}, sequence 1",
      returns(BEAM, np.full((8, 2), 3), changed(np.zeros((8, 2)), (2, 1), 1.0)),
    ),
  ],
)
def test_wrong_samplers_raise(tmp_path, field, sampler):
  source = pairs()
  with pytest.raises(ValueError, match=field.format(id=np.sort(source.ids)[2])):
    written(tmp_path, source, sampler)
  assert not list(tmp_path.glob("shard-*"))


def test_a_beam_search_with_an_option_gets_no_key(tmp_path):
  def search(variables, batch, penalty=1.0):
    assert "source" in batch
    return BEAM, np.full((8, 2), 3), np.float32([[-penalty, -2.0]] * 8)

  assert len(written(tmp_path, pairs(rows=8), search)) == 8


def test_a_missing_sequence_of_a_beam_is_none(tmp_path):
  scores = np.float32([[-1, -np.inf]] * 8)
  garbage = np.concatenate([BEAM[:, :1], np.full((8, 1, 4), 10 * VOCAB)], 1)
  labels = written(tmp_path, pairs(rows=8), returns(garbage, np.full((8, 2), 3), scores))
  assert set(map(tuple, targets(labels).values())) == {(5, 5, 5)}
  with pytest.raises(ValueError, match="keep"):
    pseudo_labels(tmp_path, pairs(rows=8), nth_best(1))


def test_the_first_wrong_row_of_a_later_batch_leaves_the_others(tmp_path, monkeypatch):
  from distill_jax.cache.sequence_level import writing

  monkeypatch.setattr(writing, "SHARD_BATCHES", 1)
  source = pairs()

  def late(variables, key, batch):
    tokens, lengths = shifted(variables, key, batch)
    tokens[np.asarray(batch["id"]) == np.sort(source.ids)[20], 0] = 10 * VOCAB
    return tokens, lengths

  with pytest.raises(ValueError, match=f"tokens.*id {np.sort(source.ids)[20]}"):
    written(tmp_path, source, late)
  assert len(list(tmp_path.glob("shard-*"))) == 2
  assert len(written(tmp_path, source)) == len(source)


@pytest.mark.parametrize(
  ("field", "options"),
  [
    ("settings", {"settings": {}}),
    ("settings", {"settings": {"beam": np.arange(3)}}),
    ("start_token", {"start_token": -1}),
    ("end_token", {"end_token": VOCAB}),
    ("inputs.*sourec", {"inputs": ["sourec"]}),
    ("keep", {"keep": ["nearest"]}),
    ("batch_size", {"batch_size": 0}),
    ("variables", {"variables": {"shift": 3}}),
  ],
)
def test_wrong_arguments_raise(tmp_path, field, options):
  options = dict(variables=WEIGHTS, settings={"length": WIDTH}, start_token=START) | options
  with pytest.raises(ValueError, match=field):
    seq_kd(tmp_path, shifted, source=pairs(), **(dict(end_token=END, batch_size=8) | options))
  assert not list(tmp_path.iterdir())


def test_sources_without_what_the_sampler_reads_raise(tmp_path):
  source = pairs()
  without = {name: x for name, x in source.arrays.items() if name != "source"}
  with pytest.raises(ValueError, match="^source: .*'source'"):
    written(tmp_path, data.Source(without, VOCAB, ignore_label=-1))
  with pytest.raises(ValueError, match="^source_segments: "):
    written(tmp_path, source, inputs=["source"])

  def repeat(variables, key, batch):
    return batch["tokens"][:, 1:], np.ones(8, int)

  assert len(written(tmp_path, source, repeat, inputs=["tokens"])) > 0
