"""Compares pairs of layers of transformers: hidden states, attention, relations.

    pairs = layer_map(4, 12)  # ((1, 3), (2, 6), (3, 9), (4, 12))
    objective = weighted(
      soft=(1.0, tokens()),
      hidden=(1.0, layers(pairs, losses.hint)),
      attention=(1.0, attention(pairs)),
      relations=(1.0, relations([(4, 12)], relation_heads=12)),
    )

Each term gives one value a token, the sum over the pairs. The mean is over the tokens of the
global batch that count, however they are padded, packed, sharded or accumulated. Where the batch's
'label' is the next token, int [B, L], tokens with a label (not negative) count; elsewhere, as in
images, all do. With 'segments', int [B, L], a token is related only to those of its document, and
a negative segment is no token.

Outputs of an encoder-decoder whose name begins with 'encoder_' are of the source: tokens whose
'source_segments', int [B, S], are not negative count. They are also the keys of 'cross_attention'
[B, heads, T, S], and the tokens with a label, [B, T], its queries.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, reduce
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import outputs_of, prepare
from distill_jax.objectives.feature_comparisons import features
from distill_jax.objectives.layer_maps import Pairs, check_pairs, last_entries
from distill_jax.objectives.loss_checks import check_loss
from distill_jax.objectives.query_terms import query_term
from distill_jax.objectives.terms import Term
from distill_jax.objectives.token_masks import segment_entries, token_masks
from distill_jax.types import Variables


def layers(
  pairs: Pairs,
  loss: Callable[..., jax.Array],
  *,
  name: str = "block",
  project: bool = True,
  last: int | None = None,
  segments: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Compares the hidden states of pairs of layers, token by token.

  Weight 1 with `losses.hint` (TinyBERT, Jiao et al. 2020, eq. 8); DistilBERT's is `losses.cosine`.

  Args:
    pairs: (student layer, teacher layer), from `layer_map` or by hand.
    loss: `(student [N, C], teacher [N, C], **hyperparameters) -> [N]`, N tokens; or a scalar that
      relates them, with an argument `where` for those that count.
    name: name of the outputs [B, L, C], without the number.
    project: learn, for each pair whose widths differ, a linear map, as `features` does.
    last: number of last tokens that are compared, such as the patches of images, where the
      networks' other tokens differ; None: all.
    segments: name of the batch's entry [B, L] with the tokens that count: bool, or not negative;
      "": all do. None: 'source_segments' for a name that begins with 'encoder_', and else those
      with a label, as above.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, no pairs, or a hyper-parameter that the loss does not have; in init, a
      value that the loss rejects, a layer that does not exist, or outputs that cannot be aligned.

  >>> from distill_jax import losses, objectives
  >>> term = objectives.layers([(1, 3)], losses.hint)
  >>> student, teacher = {"block1": jnp.zeros((2, 3, 4))}, {"block3": jnp.ones((2, 3, 4))}
  >>> (values, _), _ = term.apply({"0": {}}, {}, student, teacher, {}, step=0, key=None)
  >>> values  # one value a token
  Array([[1., 1., 1.],
         [1., 1., 1.]], dtype=float32)
  """
  check_pairs(pairs, last)
  check_loss(loss)
  entries = segment_entries(name, segments)
  token_loss = each_token(loss)
  terms = [
    features(f"{name}{s}", f"{name}{t}", token_loss, project=project, **hyperparameters)
    for s, t in pairs
  ]

  def outputs_per_pair(student, teacher):
    def select(outputs, layer, side):
      x = outputs_of(outputs, f"{name}{layer}", side)
      return {f"{name}{layer}": last_entries(x, last, (1,))}

    return [(select(student, s, "student"), select(teacher, t, "teacher")) for s, t in pairs]

  def init(key, student, teacher):
    shapes = jax.eval_shape(outputs_per_pair, student, teacher)
    params = {}
    for i, (term, outputs) in enumerate(zip(terms, shapes)):
      params[str(i)] = term.init(jax.random.fold_in(key, i), *outputs).params
    return Variables(params, {})

  def apply(params, state, student, teacher, batch, **context):
    shape = outputs_of(student, f"{name}{pairs[0][0]}", "student").shape[:2]
    counted = token_masks(batch, shape, shape, last, entries).counted
    batch = {**batch, "where": counted}
    values: list[jax.Array] = []
    for i, (term, outputs) in enumerate(zip(terms, outputs_per_pair(student, teacher))):
      outputs = jax.tree.map(lambda x: jnp.where(counted[..., None], x, 0), outputs)
      value, _ = term.apply(params[str(i)], {}, *outputs, batch, **context)
      values.append(value[0] if isinstance(value, tuple) else value)
    total = sum(values[1:], values[0])
    return (total if total.ndim == 0 else (total, counted)), state

  return Term(init, apply)


def attention(
  pairs: Pairs,
  loss: Callable[..., jax.Array] = losses.attention_kl,
  *,
  name: str = "attention",
  last: int | None = None,
  segments: str | None = None,
  key_segments: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Compares the attention of pairs of layers, query by query.

  Weight 1 with `losses.attention_kl` (MobileBERT, Sun et al. 2020) or
  `losses.attention_scores_mse` (TinyBERT, Jiao et al. 2020, equation 7). Networks with different
  numbers of heads are compared by the mean of their heads' maps; its log replaces the scores.

  Args:
    pairs, last: as in `layers`; queries and keys are both limited to the last tokens.
    loss: `(student, teacher, **hyperparameters) -> [N]` of scores before the softmax
      [N, heads, 1, keys], N queries.
    name: name of the outputs [B, heads, queries, keys], without the number: scores before the
      softmax, -inf where a query does not attend. 'encoder_attention' and 'cross_attention' are
      those of an encoder-decoder.
    segments, key_segments: names of the batch's entries [B, queries] and [B, keys] with the tokens
      that exist, as in `layers`; key_segments None: 'source_segments' for a name that begins with
      'cross_', and else those of the queries.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, no pairs, or a hyper-parameter that the loss does not have; in init, a
      value that the loss rejects, a layer that does not exist, or lengths that differ.

  >>> from distill_jax import objectives
  >>> term = objectives.attention([(1, 3)])
  >>> scores = np.zeros((1, 2, 3, 3))  # 2 heads, 3 queries, 3 keys
  >>> student, teacher = {"attention1": scores}, {"attention3": scores}
  >>> apply = lambda s, t: term.apply({}, {}, s, t, {}, step=0, key=None)[0]
  >>> jax.eval_shape(apply, student, teacher)[0].shape  # one value a query
  (1, 3)
  """
  call = prepare(loss, hyperparameters)

  def scores(x, side, exists, same):
    del side
    return x if same is None else jnp.where((same & exists[:, None])[:, None], x, -jnp.inf)

  entries = segment_entries(name, segments, key_segments)
  return query_term(pairs, (name,), scores, call, last, entries, rank=4)


def relations(
  pairs: Pairs,
  *,
  relation_heads: int,
  names: tuple[str, ...] = ("queries", "keys", "values"),
  last: int | None = None,
  segments: str | None = None,
) -> Term:
  """Compares self-attention relations of pairs of layers: `losses.minilm_relations` by query.

  Weight 1, without other terms, on one pair: the last layers, or the teacher's upper middle one
  (MiniLMv2, Wang et al. 2021). A token without a label is related to no other, unless 'segments'
  mark it as a token.

  Args:
    pairs, last, segments: as in `layers`; the first of `names` decides.
    relation_heads: number of heads that divides all widths, as in the loss; the networks' numbers
      of heads may differ.
    names: names of the outputs [B, L, C] that are related with themselves, without the number;
      `("values",)` next to `attention` is MiniLM's first version.

  Raises:
    ValueError: at once, no pairs; in init, a layer that does not exist, lengths that differ, or a
      width that relation_heads does not divide.

  >>> from distill_jax import objectives
  >>> term = objectives.relations([(2, 6)], relation_heads=2, names=("values",))
  >>> student, teacher = {"values2": np.zeros((1, 3, 4))}, {"values6": np.zeros((1, 3, 8))}
  >>> apply = lambda s, t: term.apply({}, {}, s, t, {}, step=0, key=None)[0]
  >>> jax.eval_shape(apply, student, teacher)[0].shape  # one value a token
  (1, 3)
  """
  check_integer("relation_heads", relation_heads, 1)

  def scores(x, side, exists, same):
    if x.shape[-1] % relation_heads:
      raise ValueError(
        f"relation_heads: expected a divisor of the {side}'s width {x.shape[-1]}, "
        f"got {relation_heads}"
      )
    x = jnp.where(exists[..., None], x, 0).astype(reduce.common_dtype(x.dtype, jnp.float32))
    x = x.reshape(*x.shape[:2], relation_heads, -1)
    products = jnp.einsum("bqhd,bkhd->bhqk", x, x, precision="highest") * x.shape[-1] ** -0.5
    related = exists[:, None] if same is None else same & exists[:, None]
    return jnp.where(related[:, None], products, -jnp.inf)

  call = prepare(losses.attention_kl, {})
  entries = segment_entries(names[0], segments)
  return query_term(pairs, names, scores, call, last, entries, rank=3)


def each_token(loss):
  """Returns a loss of rows [N, C] as one of hidden states [B, L, C]."""

  @functools.wraps(loss)
  def token_loss(s, t, **arguments):
    if arguments.get("where") is not None:
      where = arguments["where"]
      where = where.reshape(where.shape + (1,) * (s.ndim - 1 - where.ndim))
      arguments["where"] = jnp.broadcast_to(where, s.shape[:-1]).reshape(-1)
    values = loss(s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]), **arguments)
    return values if values.ndim == 0 else values.reshape(s.shape[:-1])

  return token_loss
