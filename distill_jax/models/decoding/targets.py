"""Turns generated sequences into targets, and scores given targets."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.data.label_checks import UNLABELED
from distill_jax.models.llm.head import head_logits
from distill_jax.types import Batch, Model, Outputs, Sample, Variables


def sequence_log_probs(outputs: Outputs, label: jax.Array, *, memory: int = 2**26) -> jax.Array:
  """Returns the log-probability of each token of given targets.

  A sequence's log-probability is the sum over its tokens; its negative is the NLL by which pseudo
  labels are filtered. The logits of all tokens are never in memory together, also in the backward
  pass.

  Args:
    outputs: of a model that read the targets: 'logits' [B, T, V], or 'hidden' [B, T, D] and 'head'
      (kernel [D, V], bias or None, softcap or None).
    label: int [B, T], the next tokens; negative where there is none (`data.UNLABELED`).
    memory: bytes that logits may take at once.

  Returns:
    float32 [B, T] (float64 of such outputs); 0 where there is no label, NaN for a label outside of
    the vocabulary.

  Raises:
    ValueError: neither logits nor hidden states with a head, or another shape than the labels'.

  >>> label = jnp.array([[3, 0, -1]])
  >>> sequence_log_probs({"logits": jnp.zeros((1, 3, 4))}, label).round(2)
  Array([[-1.39, -1.39,  0.  ]], dtype=float32)
  """
  tokens = _tokens_of(outputs, label)
  length = label.shape[1]
  vocab_size = tokens.shape[-1] if "logits" in outputs else outputs["head"][0].shape[-1]
  # By time, not by row: rows may be sharded.
  size = min(length, max(1, memory // (4 * vocab_size * max(1, len(label)))))

  def chunks(x):
    x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def score(part):
    rows, label = part
    z = rows
    if "logits" not in outputs:
      z = head_logits({"hidden": rows, "head": outputs["head"]})
    z = z.astype(reduce.common_dtype(z.dtype, jnp.float32))
    index = jnp.maximum(label, 0)[..., None]
    picked = jnp.take_along_axis(z, index, -1, mode="fill", fill_value=jnp.nan)[..., 0]
    return jnp.where(label >= 0, picked - jax.nn.logsumexp(z, -1), 0)

  values = jax.lax.map(score, (chunks(tokens), chunks(label)))
  return jnp.moveaxis(values, 0, 1).reshape(len(label), -1)[:, :length]


def target_rows(
  tokens: jax.Array, lengths: jax.Array, *, start_token: int, end_token: int
) -> tuple[jax.Array, jax.Array]:
  """Returns generated sequences as a decoder's inputs and labels.

  Args:
    tokens: int [B, L], without start token, as a `types.Sample` returns them.
    lengths: int [B], numbers of tokens before the end token; L: the sequence has not ended.
    start_token, end_token: of the decoder.

  Returns:
    The inputs int32 [B, L]: the start token, then the sequence (the end token at padding); and the
    labels int32 [B, L]: the sequence and its end token, then `data.UNLABELED`. A sequence that has
    not ended has no end token.

  >>> inputs, label = target_rows(
  ...   jnp.array([[5, 6, 0]]), jnp.array([2]), start_token=1, end_token=0)
  >>> inputs.tolist(), label.tolist()
  ([[1, 5, 6]], [[5, 6, 0]])
  """
  tokens = tokens.astype(jnp.int32)
  positions = jnp.arange(tokens.shape[1])[None]
  ended = jnp.where(positions < lengths[:, None], tokens, end_token)
  first = jnp.full((len(tokens), 1), start_token, jnp.int32)
  inputs = jnp.concatenate([first, ended[:, :-1]], 1)
  return inputs, jnp.where(positions <= lengths[:, None], ended, UNLABELED)


def decoding_model(sample: Sample, *, sample_key: jax.Array | None = None) -> Model:
  """Returns a Model whose outputs are the sequences that are generated for a batch.

  It decodes sets of any size by `train.predict(model, variables, examples)`: batches of any lengths
  (one compilation for each), a last one that is filled up, rows over all devices of the variables'
  mesh. Wrap the batches in `tqdm` for a progress bar.

  Args:
    sample: `(Variables, key, batch) -> (tokens [B, L], lengths [B])`, such as a `sampler`'s.
    sample_key: of the samples; None: `sample` draws none.

  Returns:
    The Model; its outputs are 'tokens' int32 [B, L] and 'lengths' int32 [B]. It has no weights of
    its own: give `predict` those of the network.

  >>> from distill_jax.train import predict
  >>> def sample(variables, key, batch):  # says the source
  ...   return batch["source"], jnp.full(len(batch["source"]), 2)
  >>> batch = {"source": np.array([[3, 4]])}
  >>> predict(decoding_model(sample), Variables({}, {}), batch)["tokens"].tolist()
  [[3, 4]]
  """

  def init(key: jax.Array, batch: Batch) -> Variables:
    del key, batch
    raise ValueError(
      "variables: expected those of the network that generates, got none: pass them to predict"
    )

  def apply(params, state, batch, *, train: bool, key: Any) -> tuple[Outputs, Any]:
    del train, key
    tokens, lengths = sample(Variables(params, state), sample_key, batch)
    return {"tokens": tokens, "lengths": lengths}, state

  return Model(init, apply)


def _tokens_of(outputs: Outputs, label: jax.Array) -> jax.Array:
  """Returns what there is one of for each token: logits [B, T, V], or hidden states [B, T, D]."""
  if "logits" not in outputs and not {"hidden", "head"} <= outputs.keys():
    raise ValueError(
      f"outputs: expected 'logits', or 'hidden' and 'head', got {sorted(outputs)}: pass the "
      "outputs of the network that reads the targets"
    )
  tokens = outputs["logits"] if "logits" in outputs else outputs["hidden"]
  if label.ndim != 2 or tokens.shape[:-1] != label.shape:
    raise ValueError(
      f"label: expected [B, T] of outputs {tokens.shape}, got {label.shape}: one label for each "
      "token that the decoder reads"
    )
  return tokens
