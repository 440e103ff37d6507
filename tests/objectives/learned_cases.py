"""Terms with learned parts, each next to its loss called by hand on numpy's layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.special

from distill_jax import losses, objectives, reduce

KEY = jax.random.key(3)
ROWS, EXAMPLES, QUEUE = 16, 40, 24
WHERE = np.arange(ROWS) % 5 != 2
MARGIN = -np.linspace(0.1, 1, 10).astype(np.float32)


@functools.cache
def outputs():
  """Student and teacher outputs, and the batch; rows that do not count are NaN."""
  rng = np.random.default_rng(0)

  def rows(*shape):
    x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    return np.where(WHERE.reshape(-1, *[1] * len(shape)), x, np.float32(np.nan))

  student = {"one": rows(8, 8, 6), "two": rows(4, 4, 12), "flat": rows(12), "views": rows(3, 7)}
  teacher = {"one": rows(4, 4, 10), "two": rows(4, 4, 12), "flat": rows(9), "views": rows(2, 7)}
  boxes = rng.uniform(0, 8, (ROWS, 3, 2))
  batch = {
    "id": rng.permutation(EXAMPLES)[:ROWS].astype(np.int32),
    "where": WHERE,
    "boxes": np.concatenate([boxes, boxes + rng.uniform(0, 6, boxes.shape)], -1).astype(np.float32),
    "boxes_valid": rng.random((ROWS, 3)) > 0.3,
    "label": rng.integers(0, 12, ROWS).astype(np.int32),
    "classes": rng.choice([0, 1, 255], (ROWS, 8, 8)).astype(np.int32),
  }
  student |= {"first": rows(5, 6), "last": rows(5, 6)}
  teacher |= {"first": rows(5, 9), "last": rows(5, 9)}
  return student, teacher, batch


# The same in numpy


def loss(name, *arrays, **options):
  """A loss of arrays, compiled: eager, each of its operations would be."""
  return jax.jit(functools.partial(getattr(losses, name), **options))(*arrays)


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
  distance = abs(np.arange(8) - (2 * np.arange(4)[:, None] + 0.5))
  matrix = np.maximum(0, 1 - distance / 2)
  matrix /= matrix.sum(1, keepdims=True)
  return np.einsum("bhwc,ih,jw->bijc", x, matrix, matrix).astype(np.float32)


def leaky(x):
  return np.where(x > 0, x, 0.1 * x)


def vid(p, state, s, t, batch):
  x = dense(p["regressor"]["0"], halved(s["one"]))
  x = dense(p["regressor"]["1"], np.maximum(x, 0))
  return loss("vid", dense(p["regressor"]["2"], np.maximum(x, 0)), t["one"], p["raw_scale"]), state


def vid_flat(p, state, s, t, batch):
  x = dense(p["regressor"]["0"], s["flat"])
  x = dense(p["regressor"]["1"], np.maximum(x, 0))
  return loss("vid", dense(p["regressor"]["2"], np.maximum(x, 0)), t["flat"], p["raw_scale"]), state


def pad(p, state, s, t, batch):
  log_variance = connect(p["head"], s["one"].mean((1, 2)))[:, 0]
  return loss("pad", halved(dense(p["align"], s["one"])), t["one"], log_variance), state


def uskd(p, state, s, t, batch):
  weak = dense(p, s["two"].mean((1, 2)))
  rows = (x[WHERE] for x in (s["flat"], weak, batch["label"]))
  return loss("uskd", *rows, alpha=0.5, mu=0.1), state


def vitkd(p, state, s, t, batch):
  first, last = (
    dense(p["align"][str(i)], s[name])[:, 1:] for i, name in enumerate(("first", "last"))
  )
  rank = np.argsort(np.argsort(jax.random.uniform(KEY, (ROWS, 4))))
  masked = rank >= 2
  x = np.where(masked[..., None], p["mask_token"], last).reshape(ROWS, 2, 2, 9)
  x = conv(p["generator"]["1"], np.maximum(conv(p["generator"]["0"], x), 0)).reshape(ROWS, 4, 9)
  sides = (first[:, None], x), (t["first"][:, None, 1:], t["last"][:, 1:])
  return loss("vitkd", *sides, masked, beta=1e-4), state


def srd(p, state, s, t, batch):
  return loss("srd", dense(p, s["flat"])[WHERE], t["flat"][WHERE]), state


def vkd(p, state, s, t, batch):
  raw = np.asarray(p["raw"], np.float64)
  rotation = scipy.linalg.expm(raw - raw.T)
  np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-12)
  return loss("vkd", dense({"kernel": rotation[:, :9]}, s["flat"]), t["flat"]), state


def ofd(p, state, s, t, batch):
  return loss("ofd", connect(p, halved(s["one"])), t["one"], MARGIN), state


def boundary(p, state, s, t, batch):
  return loss("activation_boundary", connect(p, halved(s["one"])), t["one"], margin=0.5), state


def mgd(shape, fraction, p, state, s, t, batch):
  x = dense(p["align"], s["one"])  # the projection comes before the resizing, as in `features`
  masked = halved(x) * np.asarray(jax.random.bernoulli(KEY, 1 - fraction, shape))
  x = conv(p["generator"]["1"], np.maximum(conv(p["generator"]["0"], masked), 0))
  return loss("mgd", x, t["one"]), state


def review(p, state, s, t, batch):
  deep = connect(p["1"]["narrow"], s["two"])
  value = loss("review_kd", connect(p["1"]["widen"], deep), t["two"])
  shallow = connect(p["0"]["narrow"], s["one"])
  deep = np.repeat(np.repeat(deep, 2, 1), 2, 2)
  gate = scipy.special.expit(dense(p["0"]["attend"], np.concatenate([shallow, deep], -1)))
  fused = (shallow * gate[..., :1] + deep * gate[..., 1:])[:, 1::2, 1::2]  # the nearest of four
  return value + loss("review_kd", connect(p["0"]["widen"], fused), t["one"]), state


def encode(p, x):
  for i in range(3):
    x = leaky(conv(p[str(i)], x))
  return x


def paraphrase(p, state, s, t, batch):
  x = encode(p["encoder"], t["one"])
  for i in range(3):
    x = conv(p["decoder"][str(i)], leaky(x) if i else x)
  return loss("hint", x, t["one"]), state


def factor(p, state, s, t, batch):
  x = halved(s["one"])
  for i in range(3):
    x = leaky(connect(p[str(i)], x))
  return loss("factor_transfer", x, encode(paraphraser_params()["encoder"], t["one"])), state


def cirkd(p, state, s, t, batch):
  maps = [np.nan_to_num(x) for x in (halved(s["one"]), t["one"])]
  hidden = np.maximum(connect(p["first"], maps[0]), 0)
  arrays = (*maps, dense(p["last"], hidden), batch["classes"], KEY, state)
  return loss("cirkd", *arrays, where=WHERE, **CIRKD)


def attention(p, state, s, t, batch):
  return loss("layer_attention", [s["one"], s["two"]], [t["two"], t["one"]], p), state


def fgd(p, state, s, t, batch):
  foreground = loss("box_weights", batch["boxes"] / 3.0, batch["boxes_valid"], height=4, width=4)
  s = halved(dense(p["align"], s["one"]))
  return loss("fgd", s, t["one"], foreground, p["context"], alpha=0.1, relation=0.2), state


def crd(p, state, s, t, batch):
  others = []
  for i in batch["id"]:
    samples = np.asarray(jax.random.randint(jax.random.fold_in(KEY, i), (6,), 0, EXAMPLES - 1))
    others.append(np.delete(np.arange(EXAMPLES), i)[samples])
  embedded = dense(p["student"], s["flat"]), dense(p["teacher"], t["two"].reshape(ROWS, -1))
  return loss("crd", *embedded, batch["id"], np.stack(others), state, where=WHERE)


def queue(p, state, s, t, batch):
  head = dense(p["1"], np.maximum(dense(p["0"], s["flat"]), 0))
  rows = np.array(state["queue"])
  for row in t["flat"][WHERE]:
    rows = np.concatenate([rows[1:], row[None]])
  return loss("queue_similarity", head, t["flat"], state["queue"]), rows


def dino(p, state, s, t, batch):
  views = s["views"].swapaxes(0, 1), t["views"].swapaxes(0, 1)
  value, _ = loss("dino", *views, state["center"], teacher_temperature=0.055)
  return value, {"center": 0.1 * t["views"][WHERE].mean((0, 1)) + 0.9 * state["center"]}


def paraphraser_params():
  term = objectives.paraphraser("one", rate=0.5)
  return term.init(jax.random.key(9), {}, {"one": outputs()[1]["one"]}).params


CIRKD = {"ignore_label": 255, "samples": (7, 3), "pixels_per_class": 2, "pixel_weight": 0.5}
WARM = optax.linear_schedule(0.04, 0.07, 10)
CASES = {
  "vid": (lambda: objectives.vid("one", "one"), vid),
  "vid_flat": (lambda: objectives.vid("flat", "flat"), vid_flat),
  "pad": (lambda: objectives.pad("one", "one"), pad),
  "uskd": (lambda: objectives.uskd("two", output="flat", alpha=0.5, mu=0.1), uskd),
  "vitkd": (
    lambda: objectives.vitkd(("first", "last"), ("first", "last"), prefix_tokens=1, beta=1e-4),
    vitkd,
  ),
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
    lambda: objectives.mgd("one", "one", mask_fraction=0.15, over="channels"),
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
  "fgd": (
    lambda: objectives.fgd("one", "one", stride=3.0, valid="boxes_valid", alpha=0.1, relation=0.2),
    fgd,
  ),
  "crd": (lambda: objectives.crd("flat", "two", EXAMPLES, negatives=6, width=5), crd),
  "queue_similarity": (lambda: objectives.queue_similarity("flat", "flat", size=QUEUE), queue),
  "cirkd": (
    lambda: objectives.cirkd("one", "one", 2, label="classes", pixels=40, regions=20, **CIRKD),
    cirkd,
  ),
  "dino": (lambda: objectives.dino("views", "views", teacher_temperature=WARM), dino),
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
    state = jax.jit(lambda key: term.init(key, student, teacher).state)(jax.random.key(1))
  rng = np.random.default_rng(1)

  def normal(x):
    scale = np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.5
    return rng.normal(size=x.shape).astype(np.float32) * np.float32(scale)

  params = jax.tree.map(normal, shapes)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def evaluate(params, student, state):
    value, state = term.apply(params, state, student, teacher, batch, step=jnp.int32(5), key=KEY)
    return reduce.mean(*value) if isinstance(value, tuple) else value, (value, state)

  return term, params, state, evaluate
