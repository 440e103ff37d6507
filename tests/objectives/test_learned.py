"""Terms that own learned parts and state: against their losses called by hand on numpy's layers; gradients;
training; what is remembered, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.special
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.vgg import VGG
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import weighted
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.train import make_init, make_train_step
from distill_jax.types import Variables

KEY = jax.random.key(3)
ROWS, EXAMPLES, QUEUE = 16, 40, 24
WHERE = np.arange(ROWS) % 5 != 2
MARGIN = -np.linspace(0.1, 1, 10).astype(np.float32)


@functools.cache
def outputs():
  """Student and teacher outputs, and the batch; what is not valid is large."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    return np.where(WHERE.reshape(-1, *[1] * len(shape)), x, 100)

  student = {"one": draw(8, 8, 6), "two": draw(4, 4, 12), "flat": draw(12), "num_views": draw(3, 7)}
  teacher = {"one": draw(4, 4, 10), "two": draw(4, 4, 12), "flat": draw(9), "num_views": draw(2, 7)}
  boxes = rng.uniform(0, 8, (ROWS, 3, 2))
  batch = {
    "id": rng.permutation(EXAMPLES)[:ROWS].astype(np.int32),
    "where": WHERE,
    "boxes": np.concatenate([boxes, boxes + rng.uniform(0, 6, boxes.shape)], -1).astype(np.float32),
    "boxes_valid": rng.random((ROWS, 3)) > 0.3,
  }
  return student, teacher, batch


# The same in numpy


def dense(p, x):
  y = np.einsum("...c,cd->...d", np.asarray(x, np.float64), np.asarray(p["kernel"], np.float64))
  return (y + np.asarray(p.get("bias", 0))).astype(np.float32)


def conv(p, x):
  """A 3x3 convolution as a sum over its window."""
  height, width = x.shape[1:3]
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  kernel = np.asarray(p["kernel"], np.float64)
  window = [(i, j) for i in range(3) for j in range(3)]
  y = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in window)
  return (y + np.asarray(p.get("bias", 0))).astype(np.float32)


def connect(p, x):
  """A layer and the batch norm of its valid rows."""
  x = conv(p["layer"], x) if p["layer"]["kernel"].ndim == 4 else dense(p["layer"], x)
  rows = np.float64(x[WHERE]).reshape(-1, x.shape[-1])
  normal = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
  return (normal * p["norm"]["scale"] + p["norm"]["bias"]).astype(np.float32)


def halved(x):
  """Half of the size: a triangle of width 4 along each axis, as `jax.image.resize` antialiases."""
  if x.shape[1] == 4:
    return x
  place = np.arange(8) - (2 * np.arange(4)[:, None] + 0.5)
  matrix = np.maximum(0, 1 - abs(place) / 2)
  matrix /= matrix.sum(1, keepdims=True)
  return np.einsum("bhwc,ih,jw->bijc", x, matrix, matrix).astype(np.float32)


def leaky(x):
  return np.where(x > 0, x, 0.1 * x)


def vid(p, state, s, t, batch):
  x = dense(p["regressor"]["0"], halved(s["one"]))
  x = dense(p["regressor"]["1"], np.maximum(x, 0))
  return losses.vid(dense(p["regressor"]["2"], np.maximum(x, 0)), t["one"], p["raw_scale"]), state


def vid_flat(p, state, s, t, batch):
  x = dense(p["regressor"]["0"], s["flat"])
  x = dense(p["regressor"]["1"], np.maximum(x, 0))
  return losses.vid(dense(p["regressor"]["2"], np.maximum(x, 0)), t["flat"], p["raw_scale"]), state


def srd(p, state, s, t, batch):
  return losses.srd(dense(p, s["flat"])[WHERE], t["flat"][WHERE]), state


def vkd(p, state, s, t, batch):
  raw = np.asarray(p["raw"], np.float64)
  rotation = scipy.linalg.expm(raw - raw.T)
  np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-12)
  return losses.vkd(dense({"kernel": rotation[:, :9]}, s["flat"]), t["flat"]), state


def ofd(p, state, s, t, batch):
  return losses.ofd(connect(p, halved(s["one"])), t["one"], MARGIN), state


def boundary(p, state, s, t, batch):
  return losses.activation_boundary(connect(p, halved(s["one"])), t["one"], margin=0.5), state


def mgd(shape, share, p, state, s, t, batch):
  x = dense(p["align"], s["one"])  # the projection comes before the resizing, as in `features`
  seen = halved(x) * np.asarray(jax.random.bernoulli(KEY, 1 - share, shape))
  x = conv(p["generator"]["1"], np.maximum(conv(p["generator"]["0"], seen), 0))
  return losses.mgd(x, t["one"]), state


def review(p, state, s, t, batch):
  deep = connect(p["1"]["narrow"], s["two"])
  value = losses.review_kd(connect(p["1"]["widen"], deep), t["two"])
  shallow, deep = connect(p["0"]["narrow"], s["one"]), np.repeat(np.repeat(deep, 2, 1), 2, 2)
  gate = scipy.special.expit(dense(p["0"]["attend"], np.concatenate([shallow, deep], -1)))
  fused = (shallow * gate[..., :1] + deep * gate[..., 1:])[:, 1::2, 1::2]  # the nearest of four
  return value + losses.review_kd(connect(p["0"]["widen"], fused), t["one"]), state


def encode(p, x):
  for i in range(3):
    x = leaky(conv(p[str(i)], x))
  return x


def paraphrase(p, state, s, t, batch):
  x = encode(p["encoder"], t["one"])
  for i in range(3):
    x = conv(p["decoder"][str(i)], leaky(x) if i else x)
  return losses.hint(x, t["one"]), state


def factor(p, state, s, t, batch):
  x = halved(s["one"])
  for i in range(3):
    x = leaky(connect(p[str(i)], x))
  return losses.factor_transfer(x, encode(paraphraser_params()["encoder"], t["one"])), state


def attention(p, state, s, t, batch):
  return losses.layer_attention([s["one"], s["two"]], [t["two"], t["one"]], p), state


def fgd(p, state, s, t, batch):
  foreground = losses.box_weights(batch["boxes"] / 3.0, batch["boxes_valid"], height=4, width=4)
  s = halved(dense(p["align"], s["one"]))
  return losses.fgd(s, t["one"], foreground, p["context"], alpha=0.1, relation=0.2), state


def crd(p, state, s, t, batch):
  others = []
  for i in batch["id"]:
    drawn = np.asarray(jax.random.randint(jax.random.fold_in(KEY, i), (6,), 0, EXAMPLES - 1))
    others.append(np.delete(np.arange(EXAMPLES), i)[drawn])
  embedded = dense(p["student"], s["flat"]), dense(p["teacher"], t["two"].reshape(ROWS, -1))
  return losses.crd(*embedded, batch["id"], np.stack(others), state, where=WHERE)


def queue(p, state, s, t, batch):
  head = dense(p["1"], np.maximum(dense(p["0"], s["flat"]), 0))
  kept = np.array(state["queue"])
  for row in t["flat"][WHERE]:
    kept = np.concatenate([kept[1:], row[None]])
  return losses.queue_similarity(head, t["flat"], state["queue"]), kept


def dino(p, state, s, t, batch):
  views = s["num_views"].swapaxes(0, 1), t["num_views"].swapaxes(0, 1)
  value, _ = losses.dino(*views, state["center"], teacher_temperature=0.055)
  return value, {"center": 0.1 * t["num_views"][WHERE].mean((0, 1)) + 0.9 * state["center"]}


def paraphraser_params():
  term = objectives.paraphraser("one", rate=0.5)
  return term.init(jax.random.key(9), {}, {"one": outputs()[1]["one"]}).params


WARM = optax.linear_schedule(0.04, 0.07, 10)
CASES = {
  "vid": (lambda: objectives.vid("one", "one"), vid),
  "vid_flat": (lambda: objectives.vid("flat", "flat"), vid_flat),
  "srd": (lambda: objectives.srd("flat", "flat"), srd),
  "vkd": (lambda: objectives.vkd("flat", "flat"), vkd),
  "ofd": (lambda: objectives.ofd("one", "one", MARGIN), ofd),
  "activation_boundary": (
    lambda: objectives.activation_boundary("one", "one", margin=0.5),
    boundary,
  ),
  "mgd_space": (
    lambda: objectives.mgd("one", "one"),
    functools.partial(mgd, (ROWS, 4, 4, 1), 0.65),
  ),
  "mgd_channels": (
    lambda: objectives.mgd("one", "one", share=0.15, over="channels"),
    functools.partial(mgd, (ROWS, 1, 1, 10), 0.15),
  ),
  "review_kd": (lambda: objectives.review_kd(("one", "two"), ("one", "two")), review),
  "paraphraser": (lambda: objectives.paraphraser("one"), paraphrase),
  "factor_transfer": (
    lambda: objectives.factor_transfer("one", "one", paraphraser_params()),
    factor,
  ),
  "layer_attention": (
    lambda: objectives.layer_attention(("one", "two"), ("two", "one"), width=8),
    attention,
  ),
  "fgd": (lambda: objectives.fgd("one", "one", stride=3.0, alpha=0.1, relation=0.2), fgd),
  "crd": (lambda: objectives.crd("flat", "two", EXAMPLES, negatives=6, width=5), crd),
  "queue_similarity": (lambda: objectives.queue_similarity("flat", "flat", size=QUEUE), queue),
  "dino": (lambda: objectives.dino("num_views", "num_views", teacher_temperature=WARM), dino),
}
# Without a learned part, or without a student.
NO_PARAMS, NO_STUDENT = {"dino"}, {"paraphraser"}


@functools.cache
def problem(name):
  """A term, its state, parameters without zeros, and its value and gradients, compiled."""
  term = CASES[name][0]()
  student, teacher, batch = outputs()
  shapes, state = jax.eval_shape(lambda key: term.init(key, student, teacher), jax.random.key(1))
  if state:
    state = term.init(jax.random.key(1), student, teacher).state
  rng = np.random.default_rng(1)

  def draw(x):
    scale = np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.5
    return rng.normal(size=x.shape).astype(np.float32) * np.float32(scale)

  params = jax.tree.map(draw, shapes)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def evaluate(params, student, state):
    value, state = term.apply(
      params, state, student, teacher, batch, step=jnp.int32(5), key=KEY, axis_name=None
    )
    return reduce.mean(*value) if isinstance(value, tuple) else value, (value, state)

  return term, params, state, evaluate


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loss_by_hand(name):
  _, params, state, evaluate = problem(name)
  student, teacher, batch = outputs()
  (_, (value, after)), _ = evaluate(params, student, state)
  expected, expected_state = CASES[name][1](params, state, student, teacher, batch)
  if isinstance(value, tuple):
    np.testing.assert_array_equal(value[1], WHERE)
    value, expected = value[0][WHERE], expected[WHERE]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=2e-4)
  if name == "queue_similarity":  # a ring: the oldest row is at `next`
    after = np.roll(after["queue"], -int(after["next"]), 0)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, expected_state
  )


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_learned_parts_and_the_valid_rows(name):
  _, params, state, evaluate = problem(name)
  _, (to_params, to_student) = evaluate(params, outputs()[0], state)
  assert bool(jax.tree.leaves(params)) != (name in NO_PARAMS)
  for path, leaf in jax.tree_util.tree_leaves_with_path(to_params):
    assert np.isfinite(leaf).all() and (leaf != 0).any(), path
  reached = [x for x in to_student.values() if (x != 0).any()]
  assert bool(reached) != (name in NO_STUDENT)
  for x in reached:
    rows = (x != 0).any(tuple(range(1, x.ndim)))
    np.testing.assert_array_equal(rows, WHERE)


@pytest.mark.parametrize("name", CASES)
def test_training_lowers_the_term(name):
  _, params, state, evaluate = problem(name)
  variables, values = (params, outputs()[0]), []
  for _ in range(4):
    (value, _), gradients = evaluate(*variables, state)
    values.append(float(value))
    variables = jax.tree.map(lambda x, g: x - np.float32(0.003) * np.sign(g), variables, gradients)
  assert values[3] < values[0], values


@pytest.mark.parametrize("name", CASES)
def test_features_in_bfloat16_are_compared_in_float32(name):
  term, params, state, evaluate = problem(name)
  low = [{key: jnp.asarray(x, jnp.bfloat16) for key, x in side.items()} for side in outputs()[:2]]
  apply = functools.partial(term.apply, axis_name=None)
  context = {"step": jnp.int32(5), "key": KEY}
  value, after = jax.eval_shape(apply, params, state, *low, outputs()[2], **context)
  assert jax.tree.leaves(value)[0].dtype == jnp.float32
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
  if name == "ofd":
    value, _ = apply(params, state, *low, outputs()[2], **context)
    np.testing.assert_allclose(
      reduce.mean(*value), evaluate(params, outputs()[0], state)[0][0], rtol=0.03
    )


# What is remembered


@pytest.mark.parametrize("kind", ["vgg to cnn", "vit to vit"])
def test_attention_over_layers_learns_which_stages_to_follow(kind):
  """On real networks, whose maps may be larger or smaller than the teacher's; one teacher map is the student's own."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(8, 8, 8, 1)).astype(np.float32)
  if kind == "vgg to cnn":
    teacher = from_nnx(lambda rngs: VGG(1, 11, 3, width=1 / 16, rngs=rngs))
    student = from_nnx(lambda rngs: CNN(1, (4, 6), 3, rngs=rngs))
    names = ("block1", "block2"), tuple(f"block{k}" for k in range(1, 6))
  else:
    teacher = from_nnx(lambda rngs: ViT(1, 8, 3, 12, 3, 2, patch=2, rngs=rngs))
    student = from_nnx(lambda rngs: ViT(1, 8, 3, 8, 2, 2, patch=2, distilled=True, rngs=rngs))
    names = ("map1", "map2"), ("map1", "map2", "map3")
  run = {"train": False, "key": None}
  s, t = (
    jax.jit(lambda key, m=model: m.apply(*m.init(key, {}), {"image": image}, **run)[0])(
      jax.random.key(i)
    )
    for i, model in enumerate((student, teacher))
  )
  t[names[1][-1]] = s[names[0][1]]
  term = objectives.layer_attention(*names, width=4)
  params = term.init(KEY, s, t).params

  def mean(params, term=term):
    return reduce.mean(*term.apply(params, {}, s, t, {}, step=0, key=KEY, axis_name=None)[0])

  evaluate, values = jax.jit(jax.value_and_grad(mean)), []
  for _ in range(60):
    value, gradients = evaluate(params)
    values.append(float(value))
    params = jax.tree.map(lambda x, g: x - 0.3 * np.sign(g) * (np.abs(g) > 0), params, gradients)
  assert values[-1] < values[0]
  # What it chose for the teacher's last map is the map itself.
  alone = objectives.layer_attention(names[0], names[1][-1:], width=4)
  last = {name: getattr(params, name)[-1:] for name in ("queries", "bilinear", "teacher_position")}
  params = params._replace(**last)
  compare = jax.jit(functools.partial(mean, term=alone))
  chosen, evenly = compare(params), compare(jax.tree.map(jnp.zeros_like, params))
  assert chosen < 0.1 * evenly


def test_a_long_batch_leaves_its_last_rows_in_the_queue():
  term = objectives.queue_similarity("flat", "flat", size=5)
  student, teacher, batch = outputs()
  params, state = term.init(KEY, student, teacher)
  context = dict(step=0, key=KEY, axis_name=None)
  _, state = term.apply(params, state, student, teacher, batch, **context)
  _, state = term.apply(params, state, student, teacher, batch, **context)
  rows = teacher["flat"][WHERE]
  np.testing.assert_array_equal(np.roll(state["queue"], -int(state["next"]), 0), rows[-5:])
  assert state["next"] == 2 * len(rows) % 5
  # A batch with no valid row leaves it as it is.
  _, same = term.apply(params, state, student, teacher, {"where": np.zeros(ROWS, bool)}, **context)
  jax.tree.map(np.testing.assert_array_equal, state, same)


def test_ids_outside_the_memory_are_not_finite_and_leave_it_alone():
  term, params, state, _ = problem("crd")
  student, teacher, batch = outputs()
  inside = np.arange(ROWS) % 4 != 0
  ids = np.where(inside, batch["id"], np.array([EXAMPLES, -1])[np.arange(ROWS) // 4 % 2])
  (values, _), after = term.apply(
    params, state, student, teacher, {"id": ids}, step=0, key=KEY, axis_name=None
  )
  np.testing.assert_array_equal(np.isfinite(values), inside)
  touched = (np.asarray(after.student) != state.student).any(1)
  np.testing.assert_array_equal(touched, np.isin(np.arange(EXAMPLES), ids[inside]))


def test_negatives_cover_all_but_the_positive():
  from distill_jax.objectives.memories import _others

  drawn = np.asarray(
    jax.vmap(lambda i: _others(jax.random.fold_in(KEY, i), i, 500, 5))(jnp.arange(5))
  )
  for own, row in enumerate(drawn):
    assert set(row) == set(range(5)) - {own}
  counts = np.bincount(drawn.ravel(), minlength=5)
  assert (abs(counts - 500) < 100).all()


def both(mesh, how, function, whole, rows):
  """A function of replicated and of row-sharded arguments, on 8 devices; its results are replicated."""
  spec, everywhere = PartitionSpec("data"), PartitionSpec()
  if how == "jit":
    args = (
      jax.device_put(whole, NamedSharding(mesh, everywhere)),
      jax.device_put(rows, NamedSharding(mesh, spec)),
    )
    return jax.jit(functools.partial(function, axis_name=None))(*args)
  mapped = functools.partial(function, axis_name="data")
  if how == "pmap":
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), rows)
    return jax.pmap(mapped, axis_name="data", in_axes=(None, 0), out_axes=None)(whole, split)
  return jax.jit(
    jax.shard_map(
      mapped,
      mesh=mesh,
      in_specs=(everywhere, spec),
      out_specs=everywhere,
      check_vma=how == "checked",
    )
  )(whole, rows)


GOAL = {name: (1.0, CASES[name][0]()) for name in ("crd", "queue_similarity", "dino", "srd", "ofd")}


def evaluate_goal(whole, rows, *, axis_name):
  """Values, gradients and state, and how far apart the devices' own states are: their mean would hide it."""
  (params, state), (student, teacher, batch) = whole, rows
  count, devices = reduce.total(batch["where"], axis_name=axis_name)[0], 1
  if axis_name is not None:
    params, devices = jax.lax.pcast(params, axis_name, to="varying"), jax.lax.axis_size(axis_name)

  def loss(params):
    terms, after = weighted(**GOAL).apply(
      params, state, student, teacher, batch, step=0, key=KEY, axis_name=axis_name
    )
    values = {
      name: devices * reduce.total(*value)[0] / count if isinstance(value, tuple) else value
      for name, (_, value) in terms.items()
    }
    return sum(values.values()), (values, after)

  gradients, (values, after) = jax.grad(loss, has_aux=True)(params)
  if axis_name is None:
    return (values, gradients, after), ()
  low, high = jax.lax.pmin(after, axis_name), jax.lax.pmax(after, axis_name)
  return jax.lax.pmean((values, gradients, after), axis_name), jax.tree.map(
    lambda a, b: (b - a).max(), low, high
  )


@functools.cache
def goal_on_one_device():
  student, teacher, batch = outputs()
  variables = weighted(**GOAL).init(jax.random.key(1), student, teacher)
  args = tuple(variables), (student, teacher, batch)
  return args, jax.jit(functools.partial(evaluate_goal, axis_name=None))(*args)[0]


@pytest.mark.parametrize("how", ["jit", "pmap", "checked", "unchecked"])
def test_one_device_and_eight_agree(mesh, how):
  """With one key for all devices: value, gradient and state of terms that remember or relate rows."""
  args, alone = goal_on_one_device()
  results, apart = both(mesh, how, evaluate_goal, *args)
  assert not any(jax.tree.leaves(apart))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), results, alone)


# In the train step


def network(sizes):
  """A tiny CNN with the outputs that the terms name."""

  def init(key, x):
    wide = {"one": (3, 3, 2, sizes["one"]), "two": (3, 3, sizes["one"], sizes["two"])}
    flat = {
      "flat": (sizes["two"], sizes["flat"]),
      "num_views": (sizes["two"], sizes["num_views"] * 7),
    }
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), shape) / np.prod(shape[:-1]) ** 0.5
      for i, (name, shape) in enumerate((wide | flat).items())
    }

  def apply(p, x):
    layers = ("NHWC", "HWIO", "NHWC")
    one = jax.lax.conv_general_dilated(x, p["one"], (1, 1), "SAME", dimension_numbers=layers)
    two = jax.lax.conv_general_dilated(
      jax.nn.relu(one), p["two"], (2, 2), "SAME", dimension_numbers=layers
    )
    mean = two.mean((1, 2))
    views = (mean @ p["num_views"]).reshape(len(x), -1, 7)
    return {
      "one": one,
      "two": two,
      "flat": mean @ p["flat"],
      "num_views": views,
      "logits": mean @ p["flat"],
    }

  return from_apply(init, apply)


STUDENT = network({"one": 3, "two": 4, "flat": 4, "num_views": 3})
TEACHER = network({"one": 4, "two": 5, "flat": 6, "num_views": 2})


def images(seed):
  rng = np.random.default_rng(seed)
  return {
    "id": rng.permutation(EXAMPLES)[:ROWS].astype(np.int32),
    "image": rng.normal(size=(ROWS, 4, 4, 2)).astype(np.float32),
    "where": rng.permutation(WHERE),
  }


def steps(goal, optimizer, **kwargs):
  init = jax.jit(make_init(STUDENT, TEACHER, goal, optimizer))
  state = init(jax.random.key(0), images(0))
  return state, make_train_step(STUDENT, TEACHER, goal, optimizer, **kwargs), teacher_outputs()


@functools.cache
def teacher_outputs():
  return TEACHER.init(jax.random.key(5), images(0))


STATEFUL = {
  "queue": (0.1, objectives.queue_similarity("flat", "flat", size=QUEUE)),
  "dino": (0.1, objectives.dino("num_views", "num_views")),
  "boundary": (0.01, objectives.activation_boundary("one", "one")),
}


@functools.cache
def jitted_steps():
  state, step, teacher = steps(weighted(**STATEFUL), optax.sgd(0.05))
  step = jax.jit(step)
  for seed in range(3):
    state, measured = step(state, teacher, images(seed))
  return state, measured


@pytest.mark.parametrize("check_vma", [True, False])
def test_mapped_steps_equal_the_jitted_one(mesh, check_vma):
  expected, measured = jitted_steps()
  state, step, teacher = steps(weighted(**STATEFUL), optax.sgd(0.05), axis_name="data")
  spec, whole = PartitionSpec("data"), PartitionSpec()
  mapped = jax.jit(
    jax.shard_map(
      step, mesh=mesh, in_specs=(whole, whole, spec), out_specs=whole, check_vma=check_vma
    )
  )
  for seed in range(3):
    state, got = mapped(state, teacher, images(seed))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, state.params, expected.params)
  jax.tree.map(close, state.model_state, expected.model_state)
  for name in STATEFUL:
    close(reduce.value(got[name]), reduce.value(measured[name]))


def test_state_passes_from_microbatch_to_microbatch():
  state, step, teacher = steps(weighted(queue=STATEFUL["queue"]), optax.sgd(0.0), microbatches=2)
  batch = images(1)
  after, _ = jax.jit(step)(state, teacher, batch)
  rows = np.concatenate([np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)])
  valid = rows[batch["where"][rows]]
  taught_rows = TEACHER.apply(*teacher, batch, train=False, key=None)[0]["flat"][valid]
  queue = after.model_state["objective"]["queue"]
  assert queue["next"] == len(valid)
  np.testing.assert_allclose(queue["queue"][: len(valid)], taught_rows, rtol=1e-5)


def test_what_is_learned_and_remembered_is_checkpointed(tmp_path):
  goal = weighted(
    crd=(0.8, objectives.crd("flat", "flat", EXAMPLES, negatives=4, width=3)),
    queue=STATEFUL["queue"],
    layers=(1.0, objectives.layer_attention(("one", "two"), ("one",), width=2)),
    pairs=(1.0, objectives.features(("two", "two"), ("two", "two"), losses.fsp)),
  )
  init = make_init(STUDENT, TEACHER, goal, optax.sgd(0.1, momentum=0.9))
  shapes = jax.eval_shape(init, KEY, images(0))._replace(key=jnp.zeros(()))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  state = state._replace(key=KEY)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    restored = checkpoints.restore(state)
  jax.tree.map(np.testing.assert_array_equal, restored._replace(key=0), state._replace(key=0))


# Building terms


def test_margins_are_found_by_the_path_of_the_batch_norm():
  params = {
    "blocks": [{"norm": {"scale": jnp.ones(2), "bias": jnp.array([0.0, 9.0])}, "conv": jnp.ones(1)}]
  }
  expected = [-np.sqrt(2 / np.pi), -3]
  np.testing.assert_allclose(objectives.ofd_margin_at(params, "blocks/0/norm"), expected, rtol=1e-5)
  with pytest.raises(ValueError, match="at 'blocks/0/nrom'; did you mean 'blocks/0/norm'"):
    objectives.ofd_margin_at(params, "blocks/0/nrom")


def test_without_a_paraphraser_the_map_itself_is_the_factor():
  term = objectives.factor_transfer("one", "one")
  student, teacher, _ = outputs()
  params, _ = jax.eval_shape(lambda key: term.init(key, student, teacher), KEY)
  assert params["2"]["layer"]["kernel"].shape[-1] == teacher["one"].shape[-1]
  params, _ = jax.eval_shape(
    lambda key: CASES["factor_transfer"][0]().init(key, student, teacher), KEY
  )
  assert params["2"]["layer"]["kernel"].shape[-1] == teacher["one"].shape[-1] // 2


def test_learned_takes_whole_trees_of_outputs():
  def init(key, s, t):
    return Variables({}, {"steps": jnp.zeros((), jnp.int32)})

  def apply(params, state, s, t, *, step):
    return losses.weight_alignment(s, t) + 0 * step, {"steps": state["steps"] + 1}

  term = objectives.learned("weights", "weights", init, apply)
  s, t = ({"weights": {"q": np.full((3, 3), x, np.float32)}} for x in (1, 3))
  params, state = term.init(KEY, s, t)
  value, state = term.apply(params, state, s, t, {}, step=4, key=KEY, axis_name=None)
  assert value == 4 and state == {"steps": 1}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: objectives.mgd("one", "one", over="rows"),
      "over: expected 'space' or 'channels', got 'rows'",
    ),
    (lambda: objectives.mgd("one", "one", share=1.0), "share: expected"),
    (lambda: objectives.review_kd("one", ("one",)), "tuples of as many names"),
    (lambda: objectives.review_kd(("one", "two"), ("one",)), "tuples of as many names"),
    (lambda: objectives.paraphraser("one", rate=0), "rate: expected"),
    (lambda: objectives.layer_attention("one", "two"), "tuples of names"),
    (lambda: objectives.fgd("one", "one", stride=0), "stride: expected"),
    (lambda: objectives.crd("flat", "flat", 1), "examples=1"),
    (lambda: objectives.queue_similarity("flat", "flat", size=0), "size: expected"),
  ],
)
def test_what_is_out_of_range_is_refused_at_once(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: objectives.vid("one", "flat"),
      r"'one' \(16, 8, 8, 6\) and teacher 'flat' \(16, 9\).*ranks",
    ),
    (lambda: objectives.mgd("flat", "flat"), r"'flat' \(16, 12\).*expected 4 axes"),
    (lambda: objectives.ofd("one", "one", MARGIN[:3]), "margin .*one value a channel"),
    (lambda: objectives.srd("flat", "flat", power=0.5), "power"),
    (lambda: objectives.vkd("falt", "flat"), "did you mean 'flat'"),
    (lambda: objectives.factor_transfer("two", "two", paraphraser_params()), "paraphraser"),
    (lambda: objectives.layer_attention(("flat",), ("one",)), "4"),
    (lambda: objectives.dino("flat", "flat"), r"\[B, V, K\]"),
    (lambda: objectives.queue_similarity("one", "flat"), r"\[B, C\]"),
    (lambda: objectives.activation_boundary("one", "one", margin=-1.0), "margin"),
  ],
)
def test_what_does_not_fit_is_refused_in_init(make, message):
  with pytest.raises(ValueError, match=message):
    weighted(term=(1.0, make())).init(KEY, *outputs()[:2])


def test_entries_that_the_batch_lacks_are_named():
  for name, entry in (("crd", "id"), ("fgd", "boxes")):
    term, params, state, _ = problem(name)
    with pytest.raises(ValueError, match=f"the batch has no '{entry}'"):
      term.apply(params, state, *outputs()[:2], {"image": 0}, step=0, key=KEY, axis_name=None)
