"""Tests the vision transformer: outputs against float64 NumPy, sizes, gradients and devices."""

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

SMALL = {
  "channels": 2,
  "size": 8,
  "classes": 5,
  "embed_dim": 12,
  "num_layers": 2,
  "num_heads": 3,
  "patch": 4,
}


def small(**options):
  return from_nnx(lambda rngs: ViT(**{**SMALL, **options}, rngs=rngs))


def random_params(rng, model):
  """Returns parameters far from their initial values."""

  def value(path, leaf):
    values = 0.3 * rng.normal(size=leaf.shape) + ("scale" in jax.tree_util.keystr(path))
    return values.astype(np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0), {}).params
  return jax.tree_util.tree_map_with_path(value, shapes)


def random_images(rng):
  return rng.normal(size=(3, 8, 8, 2)).astype(np.float32)


def affine(p, x):
  return x @ np.float64(p["kernel"]) + p["bias"]


def norm(p, x):
  centered = x - x.mean(-1, keepdims=True)
  return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def reference(p, image, patch, heads, extra):
  """Returns every output, computed one patch, one head and one image at a time."""
  out, images = {}, np.float64(image)
  side, width = images.shape[1] // patch, p["tokens"].shape[-1]
  rows = []
  for single in images:
    patches = [
      single[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
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
    patches = [x[:, extra + i * side : extra + (i + 1) * side] for i in range(side)]
    out[f"map{k}"] = np.stack(patches, 1)
  x = norm(p["norm"], x)
  out |= {"embedding": x[:, 0], "class": affine(p["head"], x[:, 0])}
  if extra == 2:
    out["distillation"] = affine(p["distilled"], x[:, 1])
  return out


@pytest.mark.parametrize(
  "options", [{}, {"distilled": True, "patch": 2, "mlp_ratio": 1.5}], ids=["class", "distilled"]
)
def test_equals_numpy_in_training_and_evaluation(rng, options):
  model = small(**options)
  params = random_params(rng, model)
  image = random_images(rng)
  distilled = "distilled" in options

  @jax.jit
  def run(params, image):
    return [
      model.apply(params, {}, {"image": image}, train=train, key=None)[0] for train in (True, False)
    ]

  expected = reference(params, image, options.get("patch", 4), 3, 1 + distilled)
  class_logits = expected.pop("class")
  mean = (class_logits + expected["distillation"]) / 2 if distilled else class_logits
  for actual, logits in zip(run(params, image), (class_logits, mean)):
    assert set(actual) == {*expected, "logits"}
    for name, value in {**expected, "logits": logits}.items():
      tolerance = 2e-5 * abs(value).max()
      np.testing.assert_allclose(actual[name], value, rtol=2e-4, atol=tolerance, err_msg=name)


def test_number_of_parameters_is_that_of_deit_tiny():
  # timm's deit_tiny_patch16_224, and the distilled one.
  for distilled, published in ((False, 5_717_416), (True, 5_910_800)):
    options = {"patch": 16, "distilled": distilled}
    # All blocks are alike: two networks of few layers give the size of any depth.
    sizes = []
    for num_layers in (1, 2):
      net = nnx.eval_shape(
        lambda n=num_layers, o=options: ViT(3, 224, 1000, 192, n, 3, **o, rngs=nnx.Rngs(0))
      )
      sizes.append(sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param))))
    assert sizes[0] + 11 * (sizes[1] - sizes[0]) == published


def test_gradients_reach_every_parameter(rng):
  model = small(distilled=True)
  image = random_images(rng)

  def loss(params, key):
    outputs, state = model.apply(params, {}, {"image": image}, train=True, key=key)
    assert not jax.tree.leaves(state)  # Nothing is carried from step to step.
    squares = [(jax.nn.log_softmax(outputs[n]) ** 2).sum() for n in ("logits", "distillation")]
    return jnp.stack(squares).sum()

  params = random_params(rng, model)
  assert "random_bits" not in str(jax.make_jaxpr(loss)(params, jax.random.key(1)))
  grads = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params, None))
  # A bias of the keys adds one number to all scores of a query, which the softmax removes.
  largest = max(float(abs(g).max()) for _, g in grads)
  untouched = [jax.tree_util.keystr(path) for path, g in grads if abs(g).max() < 1e-5 * largest]
  assert untouched == [f"['blocks'][{k}]['key']['bias']" for k in range(2)]


def test_low_precision_computes_low_and_stores_float32(rng):
  model = small(distilled=True, dtype=jnp.bfloat16)
  params = jax.eval_shape(model.init, jax.random.key(0), {}).params
  outputs = jax.eval_shape(
    lambda p, x: model.apply(p, {}, {"image": x}, train=True, key=None)[0],
    params,
    random_images(rng),
  )
  dtypes = {name: x.dtype for name, x in outputs.items()}
  assert {dtypes.pop(f"attention{k}") for k in (1, 2)} == {jnp.dtype("float32")}
  assert set(dtypes.values()) == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def train(sharding=None):
  """Returns the parameters after five steps, and the loss of each."""
  rng = np.random.default_rng(0)
  student = small(distilled=True, num_layers=1)
  teacher = small(num_layers=1)
  objective = objectives.weighted(
    hard=(0.5, objectives.labels()),
    soft=(
      0.5,
      objectives.features("distillation", "logits", losses.hard_distillation, project=False),
    ),
  )
  batch = {
    "id": np.arange(16, dtype=np.int32),
    "image": rng.normal(size=(16, 8, 8, 2)).astype(np.float32),
    "label": rng.integers(0, 5, 16).astype(np.int32),
  }
  teacher_variables = jax.jit(teacher.init)(jax.random.key(5), {})
  parts = student, teacher, objective, optax.sgd(0.1)
  state = jax.jit(make_init(*parts))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(*parts))
  if sharding is not None:
    batch = jax.device_put(batch, sharding)
  values = []
  for _ in range(5):
    state, metrics = step(state, teacher_variables, batch)
    values.append(float(reduce.value(metrics["loss"])))
  return state.params, values


def test_distilled_student_learns():
  _, values = train()
  assert values[-1] < values[0] - 0.05


@pytest.mark.integration
def test_distilled_student_trains_alike_on_one_device_and_eight(mesh):
  one, _ = train()
  eight, _ = train(NamedSharding(mesh, PartitionSpec("data")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda r: ViT(**SMALL | {"num_heads": 5}, rngs=r), "num_heads: .* 5; nearest is 4"),
    (lambda r: ViT(**SMALL | {"patch": 3}, rngs=r), "patch: .* 3; nearest: 2"),
    (lambda r: ViT(**SMALL, rngs=r)(jnp.zeros((2, 8, 8, 3))), "images"),
    (lambda r: ViT(**SMALL, rngs=r)(jnp.zeros((2, 8, 12, 2))), "images"),
  ],
)
def test_invalid_arguments_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
