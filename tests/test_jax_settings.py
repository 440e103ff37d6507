"""Runs what training traces under JAX's strict settings: promotion of dtypes and ranks, x64, NaN
checks, and Python without assertions.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import Dense, RandomSampling, TopK
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder, DecoderOptions
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.on_policy import generate_on_policy
from distill_jax.models.zoo.vit import ViT
from distill_jax.train import with_replay
from distill_jax.types import Variables

KEY = jax.random.key(0)
STEP = jnp.int32(3)
ROWS, LENGTH, TOKENS = 4, 6, 11


def floats(*shape, dtype=jnp.float32):
  return jnp.ones(shape, dtype)


def counts(*shape):
  return jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)


def decoder(rngs):
  return Decoder(TOKENS, 8, 1, 2, options=DecoderOptions(LENGTH), rngs=rngs)


def text():
  tokens = counts(ROWS, LENGTH) % TOKENS
  batch = {"id": counts(ROWS), "tokens": tokens, "segments": 0 * tokens, "positions": 0 * tokens}
  return batch | {"label": tokens}


def apply(network, name, x):
  model = from_nnx(network, inputs=name)
  return model.apply(*model.init(KEY, x), x, train=True, key=KEY)


def generate():
  model = from_nnx(decoder, inputs=("tokens", "segments", "positions"))
  on_policy = generate_on_policy(decoder, fraction=0.5, prompt=2, temperature=0.7)
  policy = with_replay(on_policy, every=2, buffer_size=8)
  batch = text()
  variables = model.init(KEY, batch)
  return policy.apply(variables, policy.init(batch), STEP, KEY, batch)


def next_tokens(targets, loss, **options):
  """Returns the term's value for a teacher with or without stored targets."""
  head = floats(3, TOKENS), floats(TOKENS, dtype=jnp.bfloat16), 5.0
  outputs = {"hidden": floats(ROWS, LENGTH, 3), "head": head}
  teacher = outputs if targets is None else {"logits": targets(floats(ROWS, LENGTH, TOKENS))}
  term = objectives.tokens(loss, label_weight=optax.linear_schedule(1.0, 0.0, 9), **options)
  term.init(KEY, outputs, teacher)
  return head_logits(outputs), term.apply({}, {}, outputs, teacher, text(), step=STEP, key=KEY)


def learned(name, student, teacher, **arguments):
  """Returns a term's value with its learned parts."""
  batch = {"id": counts(ROWS), "label": counts(ROWS), "boxes": floats(ROWS, 2, 4)}
  batch["boxes_valid"] = floats(ROWS, 2) > 0
  term = getattr(objectives, name)("x", "x", **arguments)
  student, teacher = {"x": student}, {"x": teacher}
  variables = term.init(KEY, student, teacher)
  for leaf in jax.tree.leaves(variables):
    assert leaf.dtype != jnp.float64, leaf
  return term.apply(*variables, student, teacher, batch, step=STEP, key=KEY)


def generate_masked_tokens():
  layers = {"first": floats(ROWS, 5, 6), "last": floats(ROWS, 5, 6)}
  term = objectives.vitkd(("first", "last"), ("first", "last"), prefix_tokens=1)
  variables = term.init(KEY, layers, layers)
  return term.apply(*variables, layers, layers, {}, step=STEP, key=KEY)


def augment():
  crops = data.random_crop(5, scale=(0.5, 2)), data.center_crop(4), data.shift_crop(1)
  transforms = *crops, data.flip(), data.rotate90(), data.brightness(0.2)
  batch = {"image": floats(ROWS, 4, 4, 3, dtype=jnp.bfloat16), "boxes": floats(ROWS, 2, 4)}
  batch |= {"map": counts(ROWS, 4, 4), "id": counts(ROWS), "view": counts(ROWS)}
  entries = {"image": "image", "map": "label_map", "boxes": "boxes"}
  return data.augmentation(*transforms, seed=0, entries=entries)(batch)


def mix(make):
  return make(0.5, 4)(KEY, {"image": floats(ROWS, 4, 4, 3), "label": counts(ROWS)})


def move_average():
  variables = Variables({"w": floats(2, dtype=jnp.bfloat16)}, {"count": counts(1)})
  model = teachers.moving_average(from_nnx(decoder, inputs="tokens"), decay=0.9)
  return model.ema_update(variables, variables, STEP)


def store(codec, dtype=jnp.float32):
  output = floats(ROWS, LENGTH, TOKENS, dtype=dtype)
  batch = text() | {"view": counts(ROWS)}
  return codec.errors(output), codec.decode(codec.encode(output, batch), output)


def schedule(loss=losses.kl_divergence):
  term = objectives.logits(loss, temperature=optax.cosine_decay_schedule(4.0, 9, 0.1))
  outputs = {"logits": floats(ROWS, 5)}
  objective = objectives.weighted(soft=(optax.linear_schedule(0.0, 1.0, 9), term))
  objective.init(KEY, outputs, outputs)
  return objective.apply({"soft": {}}, {"soft": {}}, outputs, outputs, {}, step=STEP, key=KEY)


IMAGES = {"image": floats(ROWS, 8, 8, 2)}
VIT = {"channels": 2, "size": 8, "classes": 5, "embed_dim": 12, "num_layers": 1, "num_heads": 3}
CASES = {
  "decoder": lambda: apply(decoder, ("tokens", "segments"), text()),
  "on_policy": generate,
  "vit": lambda: apply(lambda rngs: ViT(**VIT, patch=4, rngs=rngs), "image", IMAGES),
  "tokens": lambda: next_tokens(None, losses.skew_kl, temperature=2.0),
  "top_k": lambda: next_tokens(lambda z: losses.top_k(z, 3), losses.sparse_kl),
  "sample_k": lambda: next_tokens(
    lambda z: losses.sample_k(KEY, z, 3), losses.sampled_cross_entropy
  ),
  "vitkd": generate_masked_tokens,
  "fgd": lambda: learned("fgd", floats(ROWS, 4, 4, 2), floats(ROWS, 4, 4, 3), stride=2.0),
  "crd": lambda: learned("crd", floats(ROWS, 3), floats(ROWS, 4), examples=9, negatives=3, width=2),
  "activation_boundary": lambda: learned(
    "activation_boundary", floats(ROWS, 4, 4, 2), floats(ROWS, 4, 4, 3)
  ),
  "ofd": lambda: learned("ofd", floats(ROWS, 4, 4, 2), floats(ROWS, 4, 4, 3), margin=floats(3) - 2),
  "factor_transfer": lambda: learned(
    "factor_transfer", floats(ROWS, 4, 4, 2), floats(ROWS, 4, 4, 3)
  ),
  "pad": lambda: learned("pad", floats(ROWS, 3), floats(ROWS, 4)),
  "queue_similarity": lambda: learned("queue_similarity", floats(ROWS, 3), floats(ROWS, 4), size=8),
  "augmentation": augment,
  "mixup": lambda: mix(data.mixup),
  "cutmix": lambda: mix(data.cutmix),
  "moving_average": move_average,
  "dense": lambda: store(Dense("bfloat16")),
  "int8": lambda: store(Dense("int8"), jnp.bfloat16),
  "topk": lambda: store(TopK(3, temperature=2.0)),
  "sampling": lambda: store(RandomSampling(3)),
  "schedules": schedule,
}


@pytest.mark.parametrize("name", CASES)
def test_strict_promotion_of_dtypes_and_ranks(name):
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    with jax.enable_x64(True):  # The defaults then differ from float32 and int32.
      jax.eval_shape(CASES[name])


@pytest.mark.nightly
def test_training_from_a_cache_resumes_under_all_settings(tmp_path):
  settings = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "1",
    "PYTHONOPTIMIZE": "1",
  }
  done = subprocess.run(
    [sys.executable, Path(__file__).with_name("strict_training.py"), tmp_path],
    env=os.environ | settings | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n")[-2] == "4 True (16, 5)"
