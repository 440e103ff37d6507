"""Equality with numbers of published code that is in no package, in golden_repositories.json.

make_golden_repositories.py writes the file. Comments state where the code differs from the loss.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from compiled_losses import quick_compilation
from peer_cases import repository_inputs

from distill_jax import losses

PAGE = json.loads((pathlib.Path(__file__).parent / "golden_repositories.json").read_text())
FLOAT32 = {
  "cirkd_pixel_memory",
  "cirkd_region_memory",
  "dskd_adaptive_kl",
  "lmops_single_step",
  "structure_kd_pair_wise",
}


def values(inputs):
  student, weak, labels = inputs["labeled"]
  tokens, sampled = inputs["tokens"][:2], inputs["tokens"][2]
  maps, pixels = inputs["maps"][:2], inputs["maps"][2]
  single_step = losses.minillm_single_step(*tokens, sampled, teacher_mixing=0.0)
  softer = losses.minillm_single_step(*tokens, sampled, teacher_mixing=0.0, temperature=2.0)
  # Pixels without a class count as equal.
  fraction = (pixels[:, ::2, ::2] != 255).mean((1, 2))
  weights = {"alpha": 0.5, "beta": 0.0, "mu": 0.1}
  return {
    "repdistiller_correlation": losses.correlation(*inputs["rows"]),
    "repdistiller_kdsvd": losses.kdsvd(*inputs["layers"], k=2).mean(),
    "rkd_dark_rank": losses.dark_rank(*inputs["rows"], alpha=0.1, length=3),
    # Neither DSKD nor TRL multiplies by T^2.
    "dskd_adaptive_kl": losses.adaptive_kl(*tokens, temperature=2.0).mean() / 4,
    "modelopt_mft": losses.minifinetuning(student, weak, labels, temperature=2.0).mean(),
    "lmops_single_step": single_step.mean(),
    "trl_single_step": softer.mean() / 4,
    "trl_top_k_jensen_shannon": losses.sparse_jensen_shannon(
      student, losses.top_k(weak, 3), teacher_weight=0.1
    ).mean(),
    "textbrewer_attention": losses.attention_cross_entropy(*inputs["scores"]).mean(),
    "ifvd_ifv": (losses.ifv(*maps, pixels, num_classes=3, ignore_label=255) * fraction).mean(),
    "structure_kd_pair_wise": losses.pairwise_similarity(*maps).mean(),
    "emkd_importance_maps": losses.importance_map(*maps).mean(),
    "emkd_region_affinity": losses.region_affinity(*maps, inputs["regions"], num_classes=2).mean(),
    **cirkd(inputs),
    # The label is last in the code's ranks, and the other classes are in our order.
    "cls_kd_uskd": losses.uskd(*inputs["rarest"]),
    "cls_kd_uskd_without_others": losses.uskd(student, weak, labels, **weights),
    "cls_kd_vitkd": vitkd(inputs),
  }


def cirkd(inputs):
  """Returns the three parts of the loss, each alone."""
  student, teacher, pixels = inputs["maps"]
  memories = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in inputs["memory"])
  state = losses.CirkdState(*memories, *np.zeros((2, 3), np.int32))

  def value(s, pixel_weight=0.0, region_weight=0.0):
    weights = {"pixel_weight": pixel_weight, "region_weight": region_weight}
    arrays = s, teacher, student, pixels, jax.random.key(0), state
    return losses.cirkd(*arrays, ignore_label=255, **weights)[0]

  return {
    "cirkd_mini_batch": value(student),
    "cirkd_pixel_memory": value(teacher, pixel_weight=1.0),
    "cirkd_region_memory": value(teacher, region_weight=1.0),
  }


def vitkd(inputs):
  (shallow, deep), teacher = inputs["vit"]
  masked = inputs["masked"]
  generated = jnp.where(masked[..., None], 0, deep)  # The mask token is 0 at first.
  return losses.vitkd((shallow, generated), teacher, masked, alpha=0.3, beta=0.2).mean()


def test_equals_published_code_up_to_definitions():
  inputs = repository_inputs()
  with jax.enable_x64(True), quick_compilation():
    actual = jax.device_get(jax.jit(lambda inputs: values(inputs))(inputs))
  assert set(actual) == set(PAGE["values"])
  for name, value in PAGE["values"].items():
    rtol = 1e-5 if name in FLOAT32 else 1e-6
    np.testing.assert_allclose(actual[name], value, rtol=rtol, err_msg=name)
