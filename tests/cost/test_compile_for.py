"""Train steps compiled for 8 devices of this machine have the bytes and FLOPs of the formulas."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from networks import ROWS, job, parameters

from distill_jax import cost, data, objectives
from distill_jax.cost import compile_for
from distill_jax.cost.analysis import total_flops
from distill_jax.cost.compiling import Compiled, Memory, from_json, parse_memory_error, to_json
from distill_jax.cost.flops import product_flops
from distill_jax.models import cast, from_apply
from distill_jax.teachers import moving_average
from distill_jax.train import StepOptions

MIX = StepOptions(mix=data.mixup(1.0, 10))


@pytest.fixture(scope="module")
def distilled():
  return compile_for("cpu", *job(), options=MIX, parts=True)


def total(analysis, kind):
  return sum(c.bytes for c in analysis.step.collectives if c.kind == kind)


def test_gradients_and_loss_are_all_reduced(distilled):
  # The loss is the only metric.
  assert distilled.parameters == parameters(8)
  assert total(distilled, "all-reduce") == 4 * parameters(8) + 4
  # Mixing takes the last row of the previous device: one image.
  assert total(distilled, "collective-permute") == 4 * 32 * 32 * 3
  assert {c.kind for c in distilled.step.collectives} == {"all-reduce", "collective-permute"}
  assert all(c.exact for c in distilled.step.collectives)


def test_statistics_of_batch_norm_are_all_reduced():
  # Mean and variance, forward and backward, in training; the teacher's are not computed.
  step = compile_for("cpu", *job(norm=nnx.BatchNorm), options=MIX)
  assert total(step, "all-reduce") > 4 * parameters(8) + 4


def test_step_has_the_flops_of_its_parts(distilled):
  assert 0.99 <= distilled.ratio <= 1.01
  # The convolutions of 2 rows a device: two FLOPs for a product and its sum, no tap on the border.
  taps = ROWS // 8 * 2 * 94 * 94
  teacher = taps * (3 * 16 + 16 * 16)
  assert teacher < distilled.parts.teacher.flops < 1.1 * teacher
  # There is no gradient with respect to the image.
  student = taps * (2 * 3 * 8 + 3 * 8 * 8)
  assert student < distilled.parts.student.flops < 1.35 * student


def test_donated_state_is_updated_in_place(distilled):
  memory = distilled.step.memory
  state = distilled.sizes["train state"]
  # Adam's moments too; its count, the step and its key, the skips.
  assert state == 3 * 4 * parameters(8) + 4 + 4 + 8 + 3 * 4
  assert memory.aliased == state
  assert distilled.sizes["teacher"] == 4 * parameters(16)
  local_batch = distilled.sizes["batch"] // 8
  assert memory.arguments == pytest.approx(state + 4 * parameters(16) + local_batch, rel=0.02)
  assert distilled.fits and distilled.step.needed == sum(memory) - 2 * memory.aliased


def test_bfloat16_teacher_halves_and_student_keeps_its_bytes(distilled):
  student, teacher, *rest = job(dtype=jnp.bfloat16)
  wide = jax.eval_shape(teacher.init, jax.random.key(0), rest[-1])
  narrow = teacher._replace(variables=cast(wide, jnp.bfloat16))
  step = compile_for("cpu", student, narrow, *rest, options=MIX)
  assert step.sizes["train state"] == step.step.memory.aliased == distilled.sizes["train state"]
  assert step.sizes["teacher"] == 2 * parameters(16)
  assert step.step.memory.arguments == distilled.step.memory.arguments - 2 * parameters(16)


def test_table_has_devices_parameters_and_communication(distilled):
  text = str(distilled)
  for part in (
    "cpu: 8 x devices, mesh: data 8; 16 images a step",
    f"{parameters(8):,} parameters",
    f"{4 * parameters(8) + 4:,} bytes",
    "x (teacher forward",
    "no lower bound",
  ):
    assert part in text


def test_without_parts_and_the_process_stays_unchanged():
  state = jax.config.values, dict(os.environ), jax.default_backend()
  step = compile_for("cpu", *job())
  assert (jax.config.values, dict(os.environ), jax.default_backend()) == state
  assert total(step, "all-reduce") == 4 * parameters(8) + 4
  assert step.parts is None and step.ratio is None


def test_moving_average_teachers_and_microbatches_compile():
  student, _, objective, optimizer, rows = job()
  step = compile_for(
    "cpu",
    student,
    moving_average(student),
    objective,
    optimizer,
    rows,
    options=StepOptions(microbatches=2),
    parts=True,
  )
  assert step.sizes["teacher"] == 0 and step.parts.teacher.flops > 0


def test_step_without_teacher_has_no_parts():
  student, _, _, optimizer, rows = job()
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  step = compile_for("cpu", student, None, objective, optimizer, rows, parts=True)
  assert step.parts is None and "teacher" not in str(step).replace("teacher 0", "")


def test_axes_and_rules_split_arrays_as_in_training(distilled):
  kernels = [(r"params/.*conv2/kernel", P(None, None, "fsdp"))]
  axes = {"data": 2, "fsdp": -1}
  step = compile_for(
    "cpu",
    *job(),
    options=MIX,
    axes=axes,
    rules=kernels,
    teacher_rules=kernels[:1],
    parts=True,
  )
  assert step.axes == {"data": 2, "fsdp": 4}
  # A quarter of the second convolutions: the student's with Adam's moments, and the teacher's.
  saved = 4 * 9 * (3 * 8 * 8 + 16 * 16) * 3 // 4
  assert step.step.memory.arguments == distilled.step.memory.arguments - saved
  assert step.step.memory.aliased == distilled.step.memory.aliased - 4 * 9 * 3 * 8 * 8 * 3 // 4
  assert total(step, "all-gather") > 0


def scanned(w, x):
  h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x.reshape(len(x), -1), w)[0]
  return h[:, :10]


def test_loops_with_products_are_reported():
  deep = from_apply(lambda key, x: jnp.zeros((6, 3072, 3072)), scanned)
  _, teacher, objective, optimizer, rows = job()
  step = compile_for("cpu", deep, teacher, objective, optimizer, rows, parts=True)
  assert sorted(loop.trips for loop in step.step.loops if loop.products) == [6, 6]
  assert (
    step.ratio is None
    and "NOTE         loops with matrix products or convolutions (2 x 6 trips)" in str(step)
  )
  # Of 2 images: six layers forward, and backward for weights and inputs; the teacher's convolutions
  # and head.
  layers, teacher_outputs = 3 * 6 * 3072**2, 32 * 32 * 9 * (3 * 16 + 16 * 16) + 16 * 10
  assert step.step.products == 2 * 2 * (layers + teacher_outputs)
  # Adam's FLOPs, of 57 million parameters, come in addition.
  assert total_flops(step.step) == step.step.flops > step.step.products
  assert total_flops(step.step._replace(flops=1.0)) == step.step.products


def test_without_loops_flops_are_those_of_xla(distilled):
  assert total_flops(distilled.step) == distilled.step.flops
  # Before compilation taps on the border count too, and operations without products do not.
  assert 0.95 < distilled.step.products / distilled.step.flops < 1.05


def test_products_count_as_often_as_they_run():
  x, w = jnp.ones((8, 16)), jnp.ones((3, 16, 16))

  def net(w, x):
    # Nothing depends on this product.
    x @ x.T
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x.T, lambda: jnp.zeros((8, 8)))

  forward = 3 * 2 * 8 * 16 * 16
  assert product_flops(jax.make_jaxpr(jax.jit(net))(w, x)) == forward
  # Twice in the backward pass, and once again for the checkpoint.
  assert product_flops(jax.make_jaxpr(jax.grad(net, (0, 1)))(w, x)) == 4 * forward
  assert product_flops(jax.make_jaxpr(branch)(x)) == 2 * 8 * 8 * 16


@pytest.mark.parametrize(
  "options, message",
  [
    ({"axes": {"data": 3}}, r"mesh: .*\[1, 2, 4, 8\]"),
    ({"axes": {"rows": 8}}, "mesh: .*rows"),
    ({"rules": [("conv3", P("data"))]}, "rules: .*'conv3'"),
    ({"options": StepOptions(microbatches=3)}, "batch_size: .*24"),
  ],
)
def test_arguments_that_do_not_fit_raise(options, message):
  with pytest.raises(ValueError, match=message):
    compile_for("cpu", *job(), **options)


@pytest.mark.parametrize(
  "message, needed, available",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (74.53G) exceeds available HBM (15.75G).",
      74.53,
      15.75,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
      "hbm. Used 28.70G of 15.75G hbm. Exceeded hbm capacity by 12.95G.",
      28.70,
      15.75,
    ),
  ],
)
def test_memory_error_is_parsed(message, needed, available):
  assert parse_memory_error(message) == (int(needed * 2**30), int(available * 2**30))
  with pytest.raises(RuntimeError, match=r"INTERNAL"):
    parse_memory_error(message.replace("RESOURCE_EXHAUSTED", "INTERNAL"))


def test_table_of_a_step_that_does_not_fit():
  chip = cost.CHIPS["v5e"]
  step = Compiled(1.0, 20 * 2**30, int(15.75 * 2**30))
  analysis = cost.Analysis(
    "v5e:4x4", chip, {"data": 16}, (64, "images"), 7, {"teacher": 2**30}, step
  )
  assert not analysis.fits
  assert analysis.lower_bound is None and analysis.hours(10) is None
  assert "needed       20.00 of 15.75: does not fit, 4.25 too much" in str(analysis)


def test_lower_bounds_are_those_of_the_peaks():
  chip = cost.CHIPS["v5e"]
  memory = Memory(int(819e6), 0, 0, 0, 0)
  step = Compiled(1.0, 1, None, memory, 3 * 197e9, 5 * 819e6)
  analysis = cost.Analysis("v5e:4x4", chip, {"data": 16}, (600, "images"), 7, {}, step)
  assert analysis.lower_bounds == pytest.approx({"compute": 3e-3, "memory": 1e-3})
  assert (analysis.lower_bound, analysis.traffic, analysis.hours(1200)) == pytest.approx(
    (3e-3, 5e-3, 1e-3)
  )
  assert "lower bound  3 ms: 200,000 images/s, 12,500 a chip" in str(analysis)
  assert "traffic      5 ms" in str(analysis)


def test_results_survive_json(distilled):
  assert from_json(json.loads(json.dumps(to_json(distilled.step)))) == distilled.step
