"""Rows that the student samples, against the uncached network and a row-by-row reading of the
rules; and in a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data, losses, objectives, reduce
from distill_jax.data import text
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder, DecoderOptions
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.on_policy import generate_on_policy
from distill_jax.train import StepOptions, make_init, make_train_step
from distill_jax.types import Variables

VOCABULARY, LENGTH, END = 16, 12, 15
INPUTS = ("tokens", "segments", "positions")


def make(rngs, width=8, **options):
  return Decoder(VOCABULARY, width, 1, 2, options=DecoderOptions(LENGTH), **options, rngs=rngs)


STUDENT = from_nnx(make, inputs=INPUTS)
TEACHER = from_nnx(lambda rngs: make(rngs, 16), inputs=INPUTS)


@functools.cache
def far(model, seed):
  """Weights far from their small beginnings: every token has its own probabilities."""
  leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(seed), {}))
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    structure, [x + jax.random.normal(k, x.shape) / 2 for k, x in zip(keys, leaves)]
  )


def packed(rows=16, seed=0):
  """Documents of 2 to 20 tokens in rows of 12; the last row is filled up."""
  rng = np.random.default_rng(seed)
  documents = [rng.integers(0, END, rng.integers(2, 21)) for _ in range(2 * rows)]
  tokenizer = text.BYTES._replace(size=VOCABULARY, end=END)
  source = text.pack(documents, length=LENGTH, tokenizer=tokenizer)
  return {name: x[-rows:].copy() for name, x in source.arrays.items()}


@jax.jit
def uncached(student, batch):
  return head_logits(STUDENT.apply(*student, batch, train=False, key=None)[0])


def by_hand(student, batch, new, prompt, stop):
  """What the rules say of the row, told from its tokens: segments, positions, labels; and that
  they are greedy.
  """
  tokens, segments = new["tokens"], batch["segments"]
  kept = min(prompt, next((i for i, s in enumerate(segments) if s != segments[0]), LENGTH))
  np.testing.assert_array_equal(tokens[:kept], batch["tokens"][:kept])
  end = next((i + 1 for i in range(kept, LENGTH) if tokens[i] == stop), LENGTH)
  places = np.arange(LENGTH)[None]
  whole = {"tokens": tokens[None], "segments": np.zeros((1, LENGTH), int), "positions": places}
  greedy = np.asarray(uncached(student, whole))[0].argmax(-1)
  np.testing.assert_array_equal(tokens[kept:end], greedy[kept - 1 : end - 1])
  label = [-1] * (kept - 1) + list(tokens[kept:end]) + [-1] * (LENGTH - end + 1)
  np.testing.assert_array_equal(new["label"], label)
  np.testing.assert_array_equal(new["segments"], [segments[0]] * end + [-1] * (LENGTH - end))
  np.testing.assert_array_equal(new["positions"], [*range(end)] + [0] * (LENGTH - end))
  return end


@pytest.mark.parametrize("prompt", [1, 0.5])
def test_rows_are_those_that_the_rules_tell(prompt):
  student, batch = far(STUDENT, 3), packed()
  on_policy = generate_on_policy(make, fraction=0.75, prompt=prompt, temperature=0, stop_token=4)
  new = jax.device_get(jax.jit(on_policy)(student, jax.random.key(0), batch))
  assert new["generated"].sum() == 12 and set(new) == {*batch, "generated"}
  ends = []
  for i in range(16):
    old, now = ({n: x[i] for n, x in rows.items()} for rows in (batch, new))
    if new["generated"][i]:
      ends.append(by_hand(student, old, now, 1 if prompt == 1 else LENGTH // 2, stop=4))
    else:
      jax.tree.map(np.testing.assert_array_equal, old, {n: now[n] for n in old})
  assert min(ends) < LENGTH == max(ends)


def test_tokens_follow_the_student_and_the_key():
  student, rows = far(STUDENT, 3), 4096
  batch = {
    "id": np.arange(rows),
    "tokens": np.full((rows, 3), 7, np.int32),
    "label": np.zeros((rows, 3), int),
  }
  on_policy = jax.jit(generate_on_policy(make, fraction=1, prompt=2, temperature=2.0))
  new = on_policy(student, jax.random.key(0), batch)
  segments = {"segments": np.zeros((1, 2), int), "positions": np.arange(2)[None]}
  expected = jax.nn.softmax(
    uncached(student, {"tokens": np.full((1, 2), 7), **segments})[0, -1] / 2
  )
  share = np.bincount(new["tokens"][:, 2], minlength=VOCABULARY) / rows
  np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / rows))
  order = np.random.default_rng(0).permutation(rows)
  shuffled = on_policy(student, jax.random.key(0), {n: x[order] for n, x in batch.items()})
  np.testing.assert_array_equal(shuffled["tokens"], new["tokens"][order])  # drawn by id
  other = on_policy(student, jax.random.key(1), batch)
  assert (other["tokens"] != new["tokens"]).any()


def test_every_row_is_chosen_as_often_as_the_share_says():
  batch, chosen = packed(6), jnp.zeros(6)
  on_policy = jax.jit(generate_on_policy(make, fraction=1 / 3, prompt=1))
  student = far(STUDENT, 3)
  for i in range(200):
    chosen += on_policy(student, jax.random.key(i), batch)["generated"]
  assert chosen.sum() == 400
  np.testing.assert_allclose(chosen / 200, 1 / 3, atol=4 * np.sqrt(2 / 9 / 200))


def test_rows_without_a_document_and_fraction_0_stay():
  student, batch = far(STUDENT, 3), packed()
  batch["segments"][[2, 5]] = -1
  new = jax.jit(generate_on_policy(make, fraction=1.0, prompt=3))(student, jax.random.key(0), batch)
  np.testing.assert_array_equal(np.flatnonzero(~new["generated"]), [2, 5])
  np.testing.assert_array_equal(new["tokens"][jnp.array([2, 5])], batch["tokens"][[2, 5]])
  none = generate_on_policy(make, fraction=0, prompt=3)(student, jax.random.key(0), batch)
  assert not none.pop("generated").any()
  jax.tree.map(np.testing.assert_array_equal, none, batch)


def parts():
  goal = objectives.weighted(
    soft=(1.0, objectives.tokens(losses.jensen_shannon, label_weight=0.3)),
    own=(0.5, objectives.next_tokens()),
  )
  return STUDENT, TEACHER, goal, optax.sgd(0.1)


def setup(**kwargs):
  student, teacher_outputs = far(STUDENT, 3), far(TEACHER, 4)
  on_policy = generate_on_policy(make, fraction=0.5, prompt=4, stop_token=END)
  state = make_init(*parts())(jax.random.key(0), packed())
  state = state._replace(params={**state.params, "student": student.params})
  return (
    state,
    teacher_outputs,
    make_train_step(*parts(), StepOptions(on_policy=on_policy, **kwargs)),
    on_policy,
  )


def same(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


STEP = jax.jit(setup()[2])


@pytest.fixture(scope="module")
def one():
  """A step on one device."""
  state, teacher_outputs, *_ = setup()
  return STEP(state, teacher_outputs, packed())


def test_the_step_is_gkd_and_labels_of_samples_do_not_count(one):
  state, teacher_outputs, _, on_policy = setup()
  student = Variables(state.params["student"], {})
  key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 3)
  batch = jax.jit(on_policy)(student, key, packed())
  known, true = batch["label"] >= 0, ~batch["generated"][:, None]

  def loss(params):
    z = head_logits(STUDENT.apply(params, {}, batch, train=True, key=None)[0])
    t = head_logits(TEACHER.apply(*teacher_outputs, batch, train=False, key=None)[0])
    soft = losses.jensen_shannon(z, t)
    hard = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(batch["label"], 0))
    both = jnp.where(known, soft + 0.3 * jnp.where(true, hard, 0), 0).sum() / known.sum()
    return both + 0.5 * jnp.where(known & true, hard, 0).sum() / (known & true).sum()

  expected, grads = jax.jit(jax.value_and_grad(loss))(student.params)
  new, measured = one
  np.testing.assert_allclose(reduce.value(measured["loss"]), expected, rtol=1e-5)
  same(new.params["student"], jax.tree.map(lambda p, g: p - 0.1 * g, student.params, grads))


@pytest.mark.parametrize(
  "how",
  [
    "sharded",
    *(pytest.param(how, marks=pytest.mark.nightly) for how in ("shard_map", "microbatches")),
  ],
)
def test_devices_and_microbatches_sample_the_same(one, mesh, how):
  state, teacher_outputs, step, _ = setup()
  batch = packed()
  if how == "sharded":
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  elif how == "shard_map":
    whole, rows = PartitionSpec(), PartitionSpec("data")
    step = jax.shard_map(
      setup(axis_name="data")[2],
      mesh=mesh,
      in_specs=(whole, whole, rows),
      out_specs=whole,
      check_vma=True,
    )
  else:
    step = setup(microbatches=2)[2]
  found, again = jax.jit(step)(state, teacher_outputs, batch)
  same(found.params, one[0].params)
  same(*(reduce.value(m["loss"]) for m in (again, one[1])))


def train(folder=None, steps=2, **arrays):
  source = data.Source(
    {**packed(32), "id": np.arange(32), **arrays},
    VOCABULARY,
    name="text",
    ignore_label=data.UNLABELED,
  )
  settings = {
    "steps": steps,
    "batch_size": 16,
    "folder": folder,
    "checkpoint_every": 1,
  }
  on_policy = generate_on_policy(make, fraction=0.5, prompt=4, stop_token=END)
  return fit_with(
    *parts(),
    source,
    teacher_variables=far(TEACHER, 4),
    on_policy=on_policy,
    **settings,
  ), source


def test_resumed_run_generates_what_one_device_does(tmp_path):
  train(tmp_path, steps=1)
  fitted, source = train(tmp_path)
  batches = data.batches(source, 16, seed=0)
  state = make_init(*parts())(jax.random.key(0), next(batches))
  for batch, _ in zip(data.batches(source, 16, seed=0), range(2)):
    state, _ = STEP(state, far(TEACHER, 4), {n: x for n, x in batch.items() if n != "view"})
  same(fitted.state.params, state.params)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"fraction": 1.5}, "fraction"),
    ({"fraction": float("nan")}, "fraction"),
    ({"fraction": 0.02}, "fraction"),
    ({"prompt": 0}, "prompt"),
    ({"prompt": 12}, "prompt"),
    ({"prompt": 1.0}, "prompt"),
    ({"temperature": -1.0}, "temperature"),
    ({"stop_token": 16}, "stop_token"),
    ({"make": lambda rngs: nnx.Linear(2, 3, rngs=rngs)}, "make"),
    (
      {"make": lambda rngs: Decoder(16, 8, 1, 2, options=DecoderOptions(8), rngs=rngs)},
      "max_length=8",
    ),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  settings = {"make": make, "fraction": 0.5, "prompt": 4, **change}
  with pytest.raises(ValueError, match=message):
    generate_on_policy(settings.pop("make"), **settings)(
      far(STUDENT, 3), jax.random.key(0), packed()
    )


def test_incomplete_batches_and_cached_teachers_are_rejected():
  state, teacher_outputs, step, on_policy = setup()
  batch = packed()
  with pytest.raises(ValueError, match="batch"):
    on_policy(far(STUDENT, 3), jax.random.key(0), {n: x for n, x in batch.items() if n != "id"})
  with pytest.raises(ValueError, match="batch: "):
    on_policy(far(STUDENT, 3), jax.random.key(0), {**batch, "label": batch["label"][:, 0]})
  with pytest.raises(ValueError, match="on_policy"):
    step(state, teacher_outputs, {**batch, "teacher/logits": np.zeros((16, LENGTH, 3))})
  with pytest.raises(ValueError, match="on_policy"):
    make_train_step(
      STUDENT, None, objectives.next_tokens(), optax.sgd(1), StepOptions(on_policy=on_policy)
    )
  with pytest.raises(ValueError, match="on_policy"):
    train(**{"teacher/logits": np.zeros((32, LENGTH, 3), np.float32)})
