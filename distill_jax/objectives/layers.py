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
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, reduce
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import LossCall, outputs_of, prepare
from distill_jax.objectives.feature_comparisons import features
from distill_jax.objectives.hyperparameters import check_at_steps
from distill_jax.objectives.layer_maps import Pairs, check_pairs, last_entries
from distill_jax.objectives.loss_checks import check_loss
from distill_jax.objectives.terms import Term
from distill_jax.objectives.token_masks import Masks, token_masks
from distill_jax.types import Outputs, Variables


def layers(
  pairs: Pairs,
  loss: Callable[..., jax.Array],
  *,
  name: str = "block",
  project: bool = True,
  last: int | None = None,
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
  token_loss = _each_token(loss)
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
    counted = token_masks(batch, shape, last).counted
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
    name: name of the outputs [B, heads, L, L], without the number: scores before the softmax, -inf
      where a query does not attend.
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

  return _query_term(pairs, (name,), scores, call, last, rank=4)


def relations(
  pairs: Pairs,
  *,
  relation_heads: int,
  names: tuple[str, ...] = ("queries", "keys", "values"),
  last: int | None = None,
) -> Term:
  """Compares self-attention relations of pairs of layers: `losses.minilm_relations` by query.

  Weight 1, without other terms, on one pair: the last layers, or the teacher's upper middle one
  (MiniLMv2, Wang et al. 2021). A token without a label is related to no other, unless 'segments'
  mark it as a token.

  Args:
    pairs, last: as in `layers`.
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

  return _query_term(pairs, names, scores, prepare(losses.attention_kl, {}), last, rank=3)


def _query_term(
  pairs: Pairs, names, scores, call: LossCall, last: int | None, *, rank: int
) -> Term:
  """Returns the sum over pairs and names of a loss of scores, with one value a query.

  Args:
    pairs, names, last: as in `relations`.
    scores: `(output, side, exists, same) -> [B, heads, queries, keys]`.
    call: of a loss of scores [N, heads, 1, keys], N queries.
    rank: number of axes of the outputs; 3: [B, L, C], 4: [B, heads, L, L].
  """
  check_pairs(pairs, last)
  s_first, t_first = (f"{names[0]}{layer}" for layer in pairs[0])

  def value(student, teacher, masks: Masks, loss):
    values = []
    for s, t in pairs:
      for name in names:
        outputs = _outputs_of_pair(student, teacher, f"{name}{s}", f"{name}{t}", last, rank)
        sides = zip(outputs, ("student", "teacher"))
        s_scores, t_scores = (scores(x, side, masks.exists, masks.same) for x, side in sides)
        values.append(_loss_per_query(loss, s_scores, t_scores, masks.counted))
    return sum(values[1:], values[0])

  def init(key, student, teacher):
    del key

    def shapes(student, teacher, **hyperparameters):
      x, _ = _outputs_of_pair(student, teacher, s_first, t_first, last, rank)
      every = jnp.ones((x.shape[0], x.shape[rank - 2]), bool)
      loss = functools.partial(call.loss, **hyperparameters)
      return value(student, teacher, Masks(every, every, None), loss)

    check_at_steps(shapes, call.hyperparameters, call.schedules, student, teacher)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key, axis_name
    x = outputs_of(student, s_first, "student")
    masks = token_masks(batch, (x.shape[0], x.shape[rank - 2]), last)
    return (value(student, teacher, masks, call.at(step)), masks.counted), state

  return Term(init, apply)


def _loss_per_query(loss, s_scores, t_scores, counted):
  """Returns the loss [B, queries] of scores [B, heads, queries, keys]."""
  scores = [jnp.where(counted[:, None, :, None], x, 0) for x in (s_scores, t_scores)]
  if s_scores.shape[1] != t_scores.shape[1]:
    scores = [_mean_of_heads(x) for x in scores]
  # [B, heads, queries, keys] -> [B queries, heads, 1, keys]
  rows = [x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, x.shape[3]) for x in scores]
  values = loss(*rows)
  if jnp.shape(values) != (counted.size,):
    raise ValueError(
      f"loss: expected one value a query, {(counted.size,)}, got {jnp.shape(values)}"
    )
  return values.reshape(counted.shape)


def _outputs_of_pair(
  student: Outputs, teacher: Outputs, s_name: str, t_name: str, last: int | None, rank: int
):
  """Returns the outputs of these names, limited to the last tokens."""
  axes = (1,) if rank == 3 else (2, 3)
  s = outputs_of(student, s_name, "student")
  t = outputs_of(teacher, t_name, "teacher")
  for side, name, x in (("student", s_name, s), ("teacher", t_name, t)):
    if x.ndim != rank:
      raise ValueError(f"{name}: expected {rank} axes of the {side}'s output, got {x.shape}")
  s_last = last_entries(s, last, axes)
  t_last = last_entries(t, last, axes)
  if s.shape[0] != t.shape[0] or any(s_last.shape[a] != t_last.shape[a] for a in axes):
    raise ValueError(
      f"last: student {s_name!r} {s.shape} and teacher {t_name!r} {t.shape} differ in rows or "
      "tokens: set last to compare only the last tokens, such as the patches of images"
    )
  return s_last, t_last


def _each_token(loss):
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


def _mean_of_heads(scores):
  """Returns log of the mean over heads of softmax(scores): [B, h, q, k] -> [B, 1, q, k]."""
  log_maps = jax.nn.log_softmax(scores.astype(reduce.common_dtype(scores.dtype, jnp.float32)))
  attended = (log_maps > -jnp.inf).any(1, keepdims=True)
  log_sums = jax.nn.logsumexp(jnp.where(attended, log_maps, 0), 1, keepdims=True)
  return jnp.where(attended, log_sums - jnp.log(scores.shape[1]), -jnp.inf)
