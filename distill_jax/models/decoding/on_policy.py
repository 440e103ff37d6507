"""Replaces targets of a batch by the student's own: on-policy distillation of encoder-decoders."""

import jax
import jax.numpy as jnp

from distill_jax.data.label_checks import UNLABELED
from distill_jax.models.decoding.targets import target_rows
from distill_jax.models.generated_rows import (
  check_entries,
  check_fraction,
  first_rows,
  rank_rows,
  replace_rows,
)
from distill_jax.types import Batch, OnPolicy, Sample, Variables


def sample_on_policy(
  sample: Sample, *, fraction: float, start_token: int, end_token: int
) -> OnPolicy:
  """Returns a function that replaces the targets of a fraction of a batch's rows by the student's.

  The teacher then scores what the student generates for a source, such as a translation. Rows are
  chosen by key and id, equally many in equal parts of the batch, so that on a mesh every device
  samples its own; what they become does not depend on the devices.
  Source: GKD, Agarwal et al. 2024, algorithm 1.

  Args:
    sample: the student's sampler, `(Variables, key, batch) -> (tokens [B, L], lengths [B])`: a
      `sampler` at temperature 1, or a function of your own for any network. It sees the chosen
      rows of all entries.
    fraction: fraction of the rows to replace, lambda in GKD, in [0, 1]; rounded to a number of
      rows.
    start_token, end_token: of the decoder.

  Returns:
    `(student Variables, key, batch) -> batch`, for `make_train_step` and `fit`. It needs 'id' [B],
    'tokens' [B, T] and 'label' [B, T]. A replaced row gets the start token and the sample as
    'tokens', cut to T, and the sample and its end token, then `data.UNLABELED`, as 'label'. The
    batch gets 'generated', bool [B], the replaced rows: their labels are not the truth, so that
    accuracy, `objectives.labels`, `next_tokens` and the hard-label part of `tokens` leave them out.
    Rows that 'where' leaves out stay as they are.

  Raises:
    ValueError: a fraction out of range; when called, a fraction of less than half a row, or missing
      entries.

  >>> def sample(variables, key, batch):
  ...   return jnp.full((len(batch["id"]), 2), 7), jnp.full(len(batch["id"]), 1)
  >>> on_policy = sample_on_policy(sample, fraction=0.5, start_token=1, end_token=0)
  >>> batch = {"id": jnp.arange(2), "tokens": jnp.full((2, 3), 4), "label": jnp.full((2, 3), 4)}
  >>> new = on_policy(Variables({}, {}), jax.random.key(0), batch)
  >>> row = int(new["generated"].argmax())
  >>> new["tokens"][row].tolist(), new["label"][row].tolist()
  ([1, 7, 0], [7, 0, -1])
  """
  check_fraction(fraction)

  def on_policy(student: Variables, key: jax.Array, batch: Batch) -> Batch:
    check_entries(batch, ("tokens", "label"))
    rows, length = batch["tokens"].shape
    ranks, count = rank_rows(key, batch["id"], fraction)
    if not count:
      return {**batch, "generated": jnp.zeros(rows, bool)}
    selected = {name: first_rows(x, ranks, count) for name, x in batch.items()}
    sequences = sample(student, jax.random.fold_in(key, 1), selected)
    tokens, label = target_rows(*sequences, start_token=start_token, end_token=end_token)
    new = {
      "tokens": _with_length(tokens, length, end_token),
      "label": _with_length(label, length, UNLABELED),
      "generated": selected.get("where", jnp.ones(len(tokens), bool)),
    }
    return {**batch, **replace_rows(batch, new, ranks, count)}

  return on_policy


def _with_length(x: jax.Array, length: int, fill: int) -> jax.Array:
  """Returns rows [B, L] with `length` entries, cut or filled up."""
  return jnp.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1]))), constant_values=fill)
