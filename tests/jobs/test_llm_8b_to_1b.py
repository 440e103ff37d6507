"""configs/llm_8b_to_1b.py: its step is compiled, small for this machine and whole for TPUs; it
reads released files.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from distill_jax.jobs.compile_ahead import compile_config
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.overrides import load_config

PATH = "configs/llm_8b_to_1b.py"
HEADS = {"num_heads": 4, "num_kv_heads": 2}
TEACHER = {"embed_dim": 64, "num_layers": 2, "mlp_dim": 96} | HEADS
STUDENT = {"embed_dim": 32, "num_layers": 1, "mlp_dim": 64} | HEADS
VOCABULARY, LENGTH, ROWS = 640, 64, 8
SMALL = [
  *(f"teacher_shape.{name}={value}" for name, value in TEACHER.items()),
  *(f"student_shape.{name}={value}" for name, value in STUDENT.items()),
  *(f"vocab_size={VOCABULARY}", f"length={LENGTH}", "k=8", f"student_training.batch_size={ROWS}"),
]


def parameters(embed_dim, num_layers, mlp_dim, num_heads, num_kv_heads):
  """Of a network whose head is its embedding."""
  blocks = 2 * embed_dim**2 * (1 + num_kv_heads / num_heads)
  blocks += 3 * embed_dim * mlp_dim + 2 * embed_dim
  return int(num_layers * blocks + embed_dim + VOCABULARY * embed_dim)


def forward(embed_dim, num_layers, mlp_dim, num_heads, num_kv_heads):
  """FLOPs of all blocks, for the batch; scores of all pairs of tokens are computed."""
  attention = 2 * embed_dim**2 * (1 + num_kv_heads / num_heads)
  weights = num_layers * (attention + 3 * embed_dim * mlp_dim)
  return 2 * ROWS * LENGTH * (weights + num_layers * 2 * embed_dim * LENGTH)


@pytest.fixture(scope="module")
def steps():
  return {
    how: compile_config("cpu", load_config(PATH, SMALL + more))
    for how, more in {"online": [], "cached": ["cache=gs://bucket/nothing"]}.items()
  }


def test_the_step_is_what_it_must_be(steps):
  student, teacher = (
    parameters(**STUDENT),
    parameters(**TEACHER) + VOCABULARY * TEACHER["embed_dim"],
  )
  for how, step in steps.items():
    assert step.parameters == student and step.items == (ROWS * LENGTH, "tokens")
    assert step.sizes["teacher"] == (2 * teacher if how == "online" else 0)  # in bfloat16
  # Of a token: 8 classes of 10 and of 8 bits in words of 32, and two numbers.
  kept = steps["cached"].sizes["batch"] - steps["online"].sizes["batch"]
  assert kept == ROWS * LENGTH * 4 * (3 + 2 + 1 + 1)


def test_its_products_are_those_of_the_networks(steps):
  # The student's blocks: forward, again up to the last product, and backward with twice as many. So
  # few logits are made once.
  token = 2 * ROWS * LENGTH
  student = 4 * forward(**STUDENT) - token * STUDENT["embed_dim"] * STUDENT["mlp_dim"]
  student += 3 * token * VOCABULARY * STUDENT["embed_dim"]
  teacher = forward(**TEACHER) + token * VOCABULARY * TEACHER["embed_dim"]
  for how, expected in (("cached", student), ("online", student + teacher)):
    assert steps[how].step.products * 8 == expected


@pytest.fixture
def folder(rng, tmp_path):
  config = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
  }
  shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
  shapes |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16)}
  shapes |= {"mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
  shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
  shapes |= {"model.embed_tokens": (40, 16), "model.norm": (16,), "lm_head": (40, 16)}
  arrays = {
    f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  return tmp_path


def test_a_released_teacher_teaches(folder):
  config = load_config(PATH, [*SMALL, f"teacher_folder={folder}", "k=4", "vocab_size=40"])
  teacher = config.teacher()
  assert {x.dtype for x in jax.tree.leaves(teacher.variables)} == {jnp.dtype("bfloat16")}
  step = compile_config("cpu", config)
  assert step.sizes["teacher"] == 2 * sum(x.size for x in jax.tree.leaves(teacher.variables.params))


def test_without_weights_or_text_nothing_is_trained():
  with pytest.raises(
    ConfigError, match="teacher_folder, text: expected .*got '' and ''.*--compile_for"
  ):
    load_config(PATH).data()


@pytest.mark.parametrize(
  "override, message",
  [
    ("length=1", "length"),
    ("k=128257", "k"),
    ("remat=dots", "remat"),
  ],
)
def test_what_cannot_be_run_is_refused(override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(PATH, [override])


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra `tpu`"
)
@pytest.mark.nightly  # Compiling takes seven minutes of processor time.
@pytest.mark.parametrize("how", ["", "gs://bucket/nothing"])
def test_the_whole_fits_on_eight_chips(how):
  step = compile_config(
    "v5p:2x2x2", load_config(PATH, ["student_training.batch_size=8", f"cache={how}"])
  )
  assert step.fits and step.step.needed < 40 * 2**30 and step.parameters == 1_235_814_400
  # Weights are sent, three times; heads that are gather_to_host for each part of the vocabulary are
  # 3.7e12 bytes.
  assert sum(c.bytes for c in step.step.collectives) < 6e10
