"""The vision transformer against float64 numpy, its shapes and sizes, both modes, gradients, eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.train import make_init, make_train_step

SMALL = {"channels": 2, "size": 8, "classes": 5, "width": 12, "depth": 2, "heads": 3, "patch": 4}


def small(**options):
  return from_nnx(lambda rngs: ViT(**{**SMALL, **options}, rngs=rngs))


def built(rng, **options):
  """A model, parameters far from their beginnings, and images."""
  model = small(**options)
  params = jax.tree.map(
    lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32),
    model.init(jax.random.key(0), {}).params,
  )
  return model, params, rng.normal(size=(3, 8, 8, 2)).astype(np.float32)


def run(model, params, image, train=False):
  return jax.jit(lambda p, x: model.apply(p, {}, {"image": x}, train=train, key=None)[0])(
    params, image
  )


# The same in numpy


def affine(p, x):
  return x @ np.float64(p["kernel"]) + p["bias"]


def norm(p, x):
  centered = x - x.mean(-1, keepdims=True)
  return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def reference(p, image, patch, heads, own):
  """Every output, one patch, one head and one image at a time."""
  out, images = {}, np.float64(image)
  side, width = images.shape[1] // patch, p["tokens"].shape[-1]
  rows = []
  for one in images:
    patches = [
      one[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
      for i in range(side)
      for j in range(side)
    ]
    rows.append(
      np.concatenate([p["tokens"], affine(p["embed"], np.stack(patches))]) + p["positions"]
    )
  x = out["embedded"] = np.stack(rows)
  for k, block in enumerate(p["blocks"].values(), 1):
    normed = norm(block["attention_norm"], x)
    q, key, v = (affine(block[name], normed) for name in ("query", "key", "value"))
    out |= {f"queries{k}": q, f"keys{k}": key, f"values{k}": v}
    d = width // heads
    parts = [slice(h * d, (h + 1) * d) for h in range(heads)]
    scores = np.stack([q[..., h] @ key[..., h].swapaxes(1, 2) / np.sqrt(d) for h in parts], 1)
    mixed = [scipy.special.softmax(scores[:, h], -1) @ v[..., part] for h, part in enumerate(parts)]
    out[f"attention{k}"] = scores
    x = x + affine(block["output"], np.concatenate(mixed, -1))
    y = affine(block["up"], norm(block["inner_norm"], x))
    x = x + affine(block["down"], y * (1 + scipy.special.erf(y / np.sqrt(2))) / 2)
    out[f"block{k}"] = x
    out[f"map{k}"] = np.stack([x[:, own + i * side : own + (i + 1) * side] for i in range(side)], 1)
  x = norm(p["norm"], x)
  out |= {"embedding": x[:, 0], "class": affine(p["head"], x[:, 0])}
  if own == 2:
    out["distillation"] = affine(p["distilled"], x[:, 1])
  return out


@pytest.mark.parametrize(
  "options", [{}, {"distilled": True, "patch": 2, "ratio": 1.5}], ids=["class", "distilled"]
)
def test_equals_numpy_in_training_and_evaluation(rng, options):
  model, params, image = built(rng, **options)
  distilled = "distilled" in options
  expected = reference(params, image, options.get("patch", 4), 3, 1 + distilled)
  alone = expected.pop("class")
  both = (alone + expected["distillation"]) / 2 if distilled else alone
  for train, logits in ((True, alone), (False, both)):
    out = run(model, params, image, train)
    assert set(out) == {*expected, "logits"}
    for name, value in {**expected, "logits": logits}.items():
      np.testing.assert_allclose(
        out[name], value, rtol=2e-4, atol=2e-5 * abs(value).max(), err_msg=name
      )


def test_the_number_of_parameters_is_that_of_deit_tiny():
  """5,717,416 in timm's deit_tiny_patch16_224, and 5,910,800 in the distilled one."""
  for distilled, published in ((False, 5_717_416), (True, 5_910_800)):
    model = from_nnx(
      lambda rngs, d=distilled: ViT(3, 224, 1000, 192, 12, 3, patch=16, distilled=d, rngs=rngs)
    )
    params = jax.eval_shape(model.init, jax.random.key(0), {}).params
    assert sum(x.size for x in jax.tree.leaves(params)) == published


def test_nothing_is_drawn_and_there_is_no_state(rng):
  model, params, image = built(rng, distilled=True)
  variables = model.init(jax.random.key(0), {})
  assert not jax.tree.leaves(variables.state)
  first = run(model, params, image, train=True)
  again = model.apply(params, {}, {"image": image}, train=True, key=jax.random.key(1))[0]
  for name, value in first.items():
    np.testing.assert_allclose(value, again[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_gradients_reach_every_parameter(rng):
  model, params, image = built(rng, distilled=True)

  def loss(params):
    out = model.apply(params, {}, {"image": image}, train=True, key=None)[0]
    return jnp.stack(
      [(jax.nn.log_softmax(out[name]) ** 2).sum() for name in ("logits", "distillation")]
    ).sum()

  grads = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
  # A bias of the keys adds one number to all scores of a query, which the softmax removes.
  largest = max(float(abs(g).max()) for _, g in grads)
  untouched = [jax.tree_util.keystr(path) for path, g in grads if abs(g).max() < 1e-5 * largest]
  assert untouched == [f"['blocks'][{k}]['key']['bias']" for k in range(2)]


def test_low_precision_computes_low_and_stores_float32(rng):
  model, params, image = built(rng, distilled=True, dtype=jnp.bfloat16)
  out = jax.eval_shape(
    lambda p: model.apply(p, {}, {"image": image}, train=True, key=None)[0], params
  )
  kinds = {name: x.dtype for name, x in out.items()}
  assert {kinds.pop(f"attention{k}") for k in (1, 2)} == {jnp.dtype("float32")}
  assert set(kinds.values()) == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(model.init(jax.random.key(0), {}))} == {
    jnp.dtype("float32")
  }


def test_a_distilled_student_trains_alike_on_one_device_and_eight(rng, mesh):
  student, teacher = small(distilled=True), small(width=24)
  teacher_outputs = teacher.init(jax.random.key(5), {})
  batch = {
    "id": np.arange(16, dtype=np.int32),
    "image": rng.normal(size=(16, 8, 8, 2)).astype(np.float32),
    "label": rng.integers(0, 5, 16).astype(np.int32),
  }
  goal = objectives.weighted(
    hard=(0.5, objectives.labels()),
    teacher_outputs=(
      0.5,
      objectives.features("distillation", "logits", losses.hard_distillation, project=False),
    ),
  )
  parts = student, teacher, goal, optax.sgd(0.1)
  step = jax.jit(make_train_step(*parts))
  one = eight = make_init(*parts)(jax.random.key(0), batch)
  spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  losses_seen = []
  for _ in range(5):
    one, measured = step(one, teacher_outputs, batch)
    eight, _ = step(eight, teacher_outputs, spread)
    losses_seen.append(float(reduce.value(measured["loss"])))
  assert losses_seen[-1] < losses_seen[0] - 0.1
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), eight.params, one.params
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda r: ViT(**{**SMALL, "heads": 5}, rngs=r),
      "heads=5 must divide width=12; the nearest: 4",
    ),
    (lambda r: ViT(**{**SMALL, "patch": 3}, rngs=r), "patch=3 must divide size=8; the nearest: 2"),
    (lambda r: ViT(**SMALL, rngs=r)(jnp.zeros((2, 8, 8, 3))), r"channels=2.*\(2, 8, 8, 3\)"),
    (lambda r: ViT(**SMALL, rngs=r)(jnp.zeros((2, 8, 12, 2))), r"size=8.*\(2, 8, 12, 2\)"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(nnx.Rngs(0))
