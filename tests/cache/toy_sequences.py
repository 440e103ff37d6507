"""Builds rows of tokens, toy teachers that generate sequences, and their pseudo labels."""

import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.cache import seq_kd
from distill_jax.types import Variables

START, END, VOCAB, ROWS, WIDTH = 1, 0, 20, 40, 6
WEIGHTS = Variables({"shift": jnp.asarray(3)}, {})


def pairs(width=WIDTH, rows=ROWS):
  """Returns sources of 1 to 4 tokens whose references are the sources; ids have gaps."""
  rng = np.random.default_rng(0)
  ids = rng.permutation(200)[:rows]
  lengths = 1 + np.arange(rows) % 4
  source = rng.integers(2, VOCAB - 8, (rows, 4))
  inside = np.arange(4) < lengths[:, None]
  source = np.where(inside, source, END)
  label = np.full((rows, width), data.UNLABELED)
  label[:, :4][inside] = source[inside]
  label[np.arange(rows), lengths] = END
  arrays = {
    "id": ids,
    "source": source,
    "source_segments": np.where(inside, 0, -1),
    "tokens": np.insert(label[:, :-1], 0, START, axis=1).clip(0),
    "label": label,
  }
  return data.Source(arrays, VOCAB, name="toy", ignore_label=data.UNLABELED)


def shifted(variables, key, batch):
  """A teacher whose target is the source, each token larger by its weight."""
  lengths = (np.asarray(batch["source_segments"]) == 0).sum(1)
  tokens = np.asarray(batch["source"]) + int(variables.params["shift"])
  tokens = np.pad(tokens, ((0, 0), (0, WIDTH - 4)))
  return np.where(np.arange(WIDTH) < lengths[:, None], tokens, END), lengths


def beams(variables, batch):
  """Returns `shifted`, one token shorter, and as the source is, best first."""
  tokens, lengths = shifted(variables, None, batch)
  copies = np.where(tokens > 0, tokens - int(variables.params["shift"]), END)
  scores = np.tile(np.float32([-1, -2, -3]), (len(tokens), 1))
  return (
    np.stack([tokens, tokens, copies], 1),
    np.stack([lengths, lengths - 1, lengths], 1),
    scores,
  )


def written(url, source, sampler=shifted, **options):
  options = dict(settings={"length": WIDTH}, batch_size=8, progress=False) | options
  return seq_kd(url, sampler, WEIGHTS, source, **(dict(start_token=START, end_token=END) | options))


def targets(labels):
  """Returns the tokens of each target by id, without the end token."""
  rows = zip(labels.ids.tolist(), labels.arrays["label"])
  return {id: label[label >= 0][:-1].tolist() for id, label in rows}


def texts(source, shift=0):
  """Returns the tokens of each source by id, each larger by a number."""
  arrays = source.arrays
  inside = arrays["source_segments"] == 0
  rows = zip(arrays["id"].tolist(), arrays["source"], inside)
  return {id: (tokens[mask] + shift).tolist() for id, tokens, mask in rows}
