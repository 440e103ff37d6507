"""`fit` measures the tasks of language next to a live teacher, and chooses by their first score."""

import jax
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import data, losses, objectives, tasks
from distill_jax.models import from_apply

VOCAB, LENGTH, ROWS = 9, 5, 24


def tags(w, tokens):
  return {"logits": w[tokens]}


def spans(w, tokens):
  return {"start": w[tokens][..., 0], "end": w[tokens][..., 1]}


def embedding(w, tokens):
  return {"embedding": w[tokens].mean(1)}


@pytest.mark.parametrize(
  ("network", "task", "term", "compared"),
  [
    (tags, tasks.tagging(), objectives.logits(losses.kl_divergence, ignore_label=-1), "agreement"),
    (
      spans,
      tasks.spans(max_length=2),
      objectives.logits(losses.kl_divergence, output="start"),
      "agreement",
    ),
    (
      embedding,
      tasks.embedding(group="group", k=2),
      objectives.features("embedding", "embedding", losses.hint),
      "neighbors",
    ),
  ],
)
def test_tasks_of_language_choose_and_compare(network, task, term, compared):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
  entries = {
    tags: {"label": np.where(tokens % 4 > 0, tokens % 3, -1)},
    spans: {"start": tokens.argmax(1), "end": tokens.argmax(1)},
    embedding: {"group": tokens[:, 0]},
  }
  classes = dict(classes=3, ignore_label=-1) if network is tags else {}
  source = data.Source({"tokens": tokens} | entries[network], **classes)
  student, teacher = (
    from_apply(lambda key, x, n=n: jax.random.normal(key, (VOCAB, n)), network, inputs="tokens")
    for n in (3, 3 if network is tags else 4)
  )
  teacher = teacher._replace(variables=teacher.init(jax.random.key(1), {"tokens": tokens[:1]}))
  result = fit_with(
    student, teacher, objectives.weighted(term=(1.0, term)), optax.sgd(0.1), source, steps=2,
    batch_size=8, validation=source, eval_every=1, task=task,
  )  # fmt: skip
  lines = [line for line in result.history if line["phase"] == "validation"]
  assert result.best.name == task.metrics[0].name
  assert all(0 <= line[compared] < 1 for line in lines)
