"""Builds rows of teacher outputs as others compute them."""

import jax
import numpy as np


def lists_of(logits, k, temperature=1.0):
  """Returns 'indices' and 'logprobs' [..., k] of logits [..., V], as a float32 program has them."""
  log_probs = np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float32) / temperature))
  indices = np.argsort(-log_probs, axis=-1, kind="stable")[..., :k]
  return {"indices": indices, "logprobs": np.take_along_axis(log_probs, indices, -1)}


def columns_of(cache, source, part="teacher/"):
  """Returns the stored columns of all examples of a source."""
  batch = cache.add_columns({"id": np.sort(source.ids)})
  return {name: x for name, x in batch.items() if name.startswith(part)}


def prompt_logprobs(logits, label, k):
  """Returns vLLM's entries for a row of logits [L, V] whose next tokens are the labels [L]."""
  lists = lists_of(logits, logits.shape[-1])
  entries = [None]
  for indices, log_probs, token in zip(
    lists["indices"].tolist(), lists["logprobs"].tolist(), label
  ):
    ranked = list(zip(indices, log_probs, range(1, len(indices) + 1)))
    # The prompt's own token is first, also where it is none of the k.
    own = [item for item in ranked if item[0] == token]
    listed = {number: (x, rank) for number, x, rank in own + ranked[:k]}
    entries.append({str(n): {"logprob": x, "rank": rank} for n, (x, rank) in listed.items()})
  return entries


def answers(teacher, source, k):
  """Returns for each id of a text the prompt and its `prompt_logprobs`, as vLLM answers."""
  arrays = dict(source.arrays)
  outputs = teacher.apply(*teacher.variables, arrays, train=False, key=None)[0]["logits"]
  by_id = {}
  for at, id in enumerate(source.ids.tolist()):
    label = arrays["label"][at]
    count = int((label >= 0).sum())  # labels of `text.pack` end where the row is filled up
    prompt = [*arrays["tokens"][at, :count].tolist(), int(label[count - 1])]
    entries = prompt_logprobs(np.asarray(outputs)[at, :count], label[:count].tolist(), k)
    by_id[id] = prompt, entries
  return by_id
