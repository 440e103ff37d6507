"""Callbacks get what metrics.jsonl gets, once; a logger of metrax is such a callback."""

import pytest
from test_loop import run

from distill_jax.train import RunOptions


def test_callbacks_get_each_line_of_the_history_once(tmp_path):
  calls, steps = [], []
  callbacks = [lambda *call: calls.append(call), lambda step, scores: steps.append(step)]
  run(tmp_path, steps=5, callbacks=callbacks)
  history = run(tmp_path, steps=10, log_every=2, callbacks=callbacks).history
  assert steps == [5, 5, 6, 8, 10, 10]
  for (step, scores), line in zip(calls, history, strict=True):
    values = {name: value for name, value in line.items() if name not in ("step", "phase")}
    assert step == line["step"]
    assert scores == {f"{line['phase']}/{name}": value for name, value in values.items()}
  assert {"train/loss", "train/soft", "validation/accuracy"} <= {*calls[0][1], *calls[1][1]}


def test_error_in_a_callback_ends_the_run():
  def fail(step, scores):
    raise OSError(f"full at step {step}")

  with pytest.raises(OSError, match="full at step 2"):
    run(steps=4, log_every=2, validation=None, callbacks=[fail])


@pytest.mark.parametrize(
  "callbacks", [abs, [print, 3], [lambda step: None], [lambda step, scores, more: None], "log"]
)
def test_callbacks_that_cannot_be_called_are_rejected(callbacks):
  with pytest.raises(ValueError, match="callbacks"):
    RunOptions(callbacks=callbacks)


def test_metrax_logger_as_a_callback(tmp_path):
  logging = pytest.importorskip("metrax.logging")
  logger = logging.TensorboardBackend(str(tmp_path))

  def log(step, scores):
    for name, value in scores.items():
      logger.log_scalar(name, value, step=step)

  run(steps=4, log_every=2, callbacks=[log])
  logger.close()
  (file,) = tmp_path.iterdir()
  assert b"train/loss" in file.read_bytes() and b"validation/accuracy" in file.read_bytes()
