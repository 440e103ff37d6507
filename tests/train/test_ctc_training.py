"""Trains CTC networks on transcripts that do not fit."""

import warnings

import numpy as np
import optax
import pytest
import small_ctc
from fitting import fit_with

from distill_jax import losses
from distill_jax.objectives import ctc, frames, weighted
from distill_jax.tasks import transcription


def train(objective, source):
  options = {"steps": 2, "batch_size": small_ctc.ROWS, "log_every": 1}
  return fit_with(small_ctc.network(), None, objective, optax.sgd(0.1), source, **options)


def test_transcripts_that_never_fit_are_no_silent_zero():
  objective = weighted(ctc=(1.0, ctc()))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    label = np.tile(np.int32([1, 1, 2]), (small_ctc.ROWS, 1))
    source = small_ctc.source(frames=np.full(small_ctc.ROWS, 2, np.int32), label=label)
    result = train(objective, source)
  assert any("trained nothing" in str(warning.message) for warning in caught)
  lines = [line for line in result.history if line["phase"] == "train"]
  assert all("ctc" not in line and line["ctc/too_long"] == 1 for line in lines)
  no_label = small_ctc.source(label=np.full((small_ctc.ROWS, small_ctc.U), -1, np.int32))
  with pytest.raises(ValueError, match="label"):
    train(objective, no_label)


def test_labels_beyond_the_alphabet_are_refused():
  label = np.full((small_ctc.ROWS, small_ctc.U), small_ctc.V, np.int32)
  with pytest.raises(ValueError, match="label"):
    train(weighted(ctc=(1.0, ctc())), small_ctc.source(label=label))


@pytest.mark.parametrize("entry", ["label", "transcript"])
def test_padding_of_transcripts_is_not_declared(entry):
  arrays = dict(small_ctc.source().arrays)
  arrays["frames"] = np.full_like(arrays["frames"], small_ctc.T)  # All transcripts fit.
  label = arrays.pop("label")
  objective = weighted(ctc=(1.0, ctc(entry=entry)))
  losses = []
  for pad in (0, -1):  # Of the blank, row 1 has an empty transcript; of -1, none.
    padded = np.where((label == 0) & (np.arange(len(label))[:, None] != 1), pad, label)
    result = train(objective, arrays | {entry: padded})
    losses.append([line["ctc"] for line in result.history])
  assert losses[0] == losses[1]
  with pytest.raises(ValueError, match=entry):
    train(objective, arrays | {entry: np.where(label == 0, -100, label)})


def test_evaluated_transcripts_are_padded_too():
  """The objective reads none: the task tells what pads them."""
  arrays = dict(small_ctc.source().arrays)
  arrays["label"] = np.where(arrays["label"] == 0, -1, arrays["label"])
  result = fit_with(
    small_ctc.network(),
    small_ctc.frozen(),
    weighted(frames=(1.0, frames(losses.kl_divergence))),
    optax.sgd(0.1),
    arrays,
    steps=1,
    batch_size=small_ctc.ROWS,
    task=transcription(lambda ids: "".join(map(str, ids)), decides="nll"),
    validation=arrays,
    eval_every=1,
  )
  assert "nll" in result.history[-1]


def test_transcripts_are_padded_next_to_labels_with_a_mark():
  arrays = dict(small_ctc.source().arrays)
  arrays["frames"] = np.full_like(arrays["frames"], small_ctc.T)
  transcript = np.where(arrays["label"] == 0, -1, arrays["label"])
  arrays |= {"transcript": transcript, "label": np.full(small_ctc.ROWS, 255)}
  objective = weighted(ctc=(1.0, ctc(entry="transcript")))
  options = {"steps": 1, "batch_size": small_ctc.ROWS, "ignore_label": 255}
  fit_with(small_ctc.network(), None, objective, optax.sgd(0.1), arrays, **options)
