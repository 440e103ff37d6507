"""Steps compiled by libtpu for absent chips; skipped where it is not installed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from networks import batch, job, parameters

from distill_jax import cost, data
from distill_jax.cost import child, compile_for
from distill_jax.models import cast
from distill_jax.train import StepOptions

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra `tpu`"
)


def test_without_libtpu_the_error_has_the_command(monkeypatch):
  monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"'\.\[tpu\]'"):
    compile_for("v5e:2x2", *job())


@needs_libtpu
@pytest.mark.parametrize(
  "topology, chips",
  [
    pytest.param("v5e:2x2", 4, marks=pytest.mark.slow),
    pytest.param("v4:2x2x1", 4, marks=pytest.mark.nightly),
    pytest.param("v5p:2x2x1", 4, marks=pytest.mark.nightly),
    pytest.param("v6e:1x1", 1, marks=pytest.mark.nightly),
  ],
)
def test_step_for_one_to_four_chips(topology, chips):
  *models, rows = job(dtype=jnp.bfloat16)
  parts = topology == "v5e:2x2"
  step = compile_for(
    topology, *models, batch(64, 64), options=StepOptions(mix=data.mixup(1.0, 10)), parts=parts
  )
  assert step.fits and step.chips == chips and step.step.needed < step.available
  assert not parts or step.ratio <= 1.01
  reduced = sum(c.bytes for c in step.step.collectives if c.kind == "all-reduce")
  # Gradients in what the network computes in, and the loss.
  assert reduced == (2 * parameters(8) + 4 if chips > 1 else 0)
  assert step.step.memory.aliased >= step.sizes["train state"]
  assert 0 < step.lower_bound < 1


@needs_libtpu
@pytest.mark.slow
def test_bfloat16_weights_of_a_teacher_stay_bfloat16():
  student, teacher, *rest = job(dtype=jnp.bfloat16)
  variables = jax.eval_shape(teacher.init, jax.random.key(0), rest[-1])
  memory = [
    compile_for("v5e:2x2", student, teacher._replace(variables=v), *rest).step.memory
    for v in (variables, cast(variables, jnp.bfloat16))
  ]
  # Padded to tiles, so less than half is saved.
  assert memory[1].arguments < memory[0].arguments
  assert memory[1].temporaries <= memory[0].temporaries


@needs_libtpu
@pytest.mark.slow
def test_step_that_does_not_fit_has_its_size():
  *models, rows = job()
  step = compile_for("v5e:1x1", *models, batch(100_000, 128))
  assert not step.fits and step.step.needed > step.available == cost.CHIPS["v5e"].memory
  assert "does not fit" in str(step)


@needs_libtpu
def test_unknown_slice_raises():
  with pytest.raises(ValueError, match=r"topology: .*'v5e:3x3'"):
    compile_for("v5e:3x3", *job()[:4], batch(9))
