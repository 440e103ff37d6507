"""Terms over pairs of layers of transformers: which layer follows which; hidden states, attention, relations.

    pairs = layer_map(4, 12)  # ((1, 3), (2, 6), (3, 9), (4, 12))
    objective = weighted(
      soft=(1.0, tokens()),
      hidden=(1.0, layers(pairs, losses.hint)),
      looks=(1.0, attention(pairs)),
      related=(1.0, relations([(4, 12)], relation_heads=12)),
    )

Each gives one value a token, the sum over the pairs, and the mean is over the tokens that count in the whole batch,
however they are padded, packed, sharded or accumulated. Where the batch's 'label' is the next token, int [B, L], those
count that have one (not negative); elsewhere, as in images, all do. With 'segments', int [B, L], a token is related to
those of its own document alone, and a negative one is no token.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.calls import outputs_of, prepare, valid_rows
from distill_jax.objectives.layer_maps import Pairs, check_pairs, cut
from distill_jax.objectives.terms import Term, features
from distill_jax.types import Batch, Outputs, Variables


def layers(
  pairs: Pairs,
  loss: Callable[..., jax.Array],
  *,
  name: str = "block",
  project: bool = True,
  last: int | None = None,
  **hyperparameters,
) -> Term:
  """A feature loss between the hidden states of pairs of layers, token by token.

  Weight 1 with `losses.hint` (TinyBERT, Jiao et al. 2020, equation 8); DistilBERT's is `losses.cosine`.

  Args:
    pairs: (student layer, teacher layer), from `layer_map` or by hand.
    loss: `(student [N, C], teacher [N, C], **hyperparameters) -> [N]`, N tokens; or a scalar that relates them, with an
      argument `where` for those that count.
    name: of the outputs [B, L, C], without the number.
    project: learn, for each pair whose widths differ, a linear map, as `features` does.
    last: compare the last so many tokens: the patches of images, where the networks' other tokens differ.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, no pairs, or a hyper-parameter that the loss refuses; in init, a layer that does not exist, or
      outputs that cannot be aligned.
  """
  check_pairs(pairs, last)
  own = _each_token(loss)
  terms = [
    features(f"{name}{s}", f"{name}{t}", own, project=project, **hyperparameters) for s, t in pairs
  ]

  def sides(student, teacher):
    return [
      tuple(
        {f"{name}{layer}": cut(outputs_of(outputs, f"{name}{layer}", whose), last, (1,))}
        for outputs, layer, whose in ((student, s, "student"), (teacher, t, "teacher"))
      )
      for s, t in pairs
    ]

  def init(key, student, teacher):
    shapes = jax.eval_shape(sides, student, teacher)
    made = [
      term.init(jax.random.fold_in(key, i), *both)
      for i, (term, both) in enumerate(zip(terms, shapes))
    ]
    return Variables({str(i): variables.params for i, variables in enumerate(made)}, {})

  def apply(params, state, student, teacher, batch, **context):
    counted = _masks(batch, outputs_of(student, f"{name}{pairs[0][0]}", "student").shape[:2], last)[
      0
    ]
    values: list[jax.Array] = []
    for i, (term, both) in enumerate(zip(terms, sides(student, teacher))):
      both = jax.tree.map(lambda x: jnp.where(counted[..., None], x, 0), both)
      value, _ = term.apply(params[str(i)], {}, *both, {**batch, "where": counted}, **context)
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
  **hyperparameters,
) -> Term:
  """A loss between the attention of pairs of layers, query by query.

  Weight 1 with `losses.attention_kl` (MobileBERT, Sun et al. 2020) or `losses.attention_scores_mse` (TinyBERT, Jiao et
  al. 2020, equation 7). Networks with other numbers of heads are compared by the mean of their heads' maps; its
  logarithm stands for the scores.

  Args:
    pairs, last: as in `layers`; of the last tokens both queries and keys are taken.
    loss: `(student, teacher, **hyperparameters) -> [N]` of scores before the softmax [N, heads, 1, keys], N queries.
    name: of the outputs [B, heads, L, L], without the number: scores before the softmax, -inf where a query does not
      look.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, no pairs, or a hyper-parameter that the loss refuses; in init, a layer that does not exist, or
      lengths that differ.
  """
  call = prepare(loss, hyperparameters)

  def scores(x, whose, exists, same):
    del whose
    return x if same is None else jnp.where((same & exists[:, None])[:, None], x, -jnp.inf)

  return _scored(
    pairs, (name,), scores, functools.partial(call.loss, **call.hyperparameters), last, rank=4
  )


def relations(
  pairs: Pairs,
  *,
  relation_heads: int,
  names: tuple[str, ...] = ("queries", "keys", "values"),
  last: int | None = None,
) -> Term:
  """Self-attention relations of pairs of layers, query by query: `losses.minilm_relations` for any batch of tokens.

  Weight 1, alone, of one pair: the last layers, or the teacher's upper middle one (MiniLMv2, Wang et al. 2021). A
  token without a label is related to no other, unless 'segments' say that it exists.

  Args:
    pairs, last: as in `layers`.
    relation_heads: divides all widths, as in the loss; numbers of heads may differ.
    names: of the outputs [B, L, C] that are related with themselves, without the number; `("values",)` beside
      `attention` is MiniLM's first version.

  Raises:
    ValueError: at once, no pairs; in init, a layer that does not exist, lengths that differ, or a width that
      relation_heads does not divide.
  """

  def scores(x, whose, exists, same):
    if relation_heads < 1 or x.shape[-1] % relation_heads:
      raise ValueError(
        f"relation_heads {relation_heads} must divide the {whose}'s width {x.shape[-1]}"
      )
    x = jnp.where(exists[..., None], x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x.reshape(*x.shape[:2], relation_heads, -1)
    products = jnp.einsum("bqhd,bkhd->bhqk", x, x, precision="highest") * x.shape[-1] ** -0.5
    related = exists[:, None] if same is None else same & exists[:, None]
    return jnp.where(related[:, None], products, -jnp.inf)

  return _scored(pairs, names, scores, losses.attention_kl, last, rank=3)


def _scored(pairs: Pairs, names, scores, loss, last, *, rank: int) -> Term:
  """The sum over pairs and names of a loss of `scores(output, whose, exists, same)`, each query a row."""
  check_pairs(pairs, last)

  def value(student, teacher, counted, exists, same):
    values = []
    for s, t in pairs:
      for name in names:
        both = _both(student, teacher, f"{name}{s}", f"{name}{t}", last, rank)
        both = [scores(x, whose, exists, same) for x, whose in zip(both, ("student", "teacher"))]
        both = [jnp.where(counted[:, None, :, None], x, 0) for x in both]
        if both[0].shape[1] != both[1].shape[1]:
          both = [_mean_of_heads(x) for x in both]
        # [B, heads, queries, keys] -> [B queries, heads, 1, keys]
        rows = [x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, x.shape[3]) for x in both]
        values.append(loss(*rows).reshape(counted.shape))
    return sum(values[1:], values[0])

  def init(key, student, teacher):
    del key

    def shapes(student, teacher):
      x, _ = _both(
        student, teacher, f"{names[0]}{pairs[0][0]}", f"{names[0]}{pairs[0][1]}", last, rank
      )
      every = jnp.ones((x.shape[0], x.shape[rank - 2]), bool)
      return value(student, teacher, every, every, None)

    jax.eval_shape(shapes, student, teacher)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, step, key, axis_name
    x = outputs_of(student, f"{names[0]}{pairs[0][0]}", "student")
    masks = _masks(batch, (x.shape[0], x.shape[rank - 2]), last)
    return (value(student, teacher, *masks), masks[0]), state

  return Term(init, apply)


def _both(student: Outputs, teacher: Outputs, s_name: str, t_name: str, last, rank: int):
  """The outputs of these names, cut to the last tokens."""
  axes = (1,) if rank == 3 else (2, 3)
  s, t = outputs_of(student, s_name, "student"), outputs_of(teacher, t_name, "teacher")
  for whose, name, x in (("student", s_name, s), ("teacher", t_name, t)):
    if x.ndim != rank:
      raise ValueError(f"the {whose}'s {name!r} {x.shape}: expected {rank} axes")
  if s.shape[0] != t.shape[0] or any(
    cut(s, last, axes).shape[a] != cut(t, last, axes).shape[a] for a in axes
  ):
    raise ValueError(
      f"student {s_name!r} {s.shape} and teacher {t_name!r} {t.shape}: their numbers of rows or tokens differ; "
      "`last` compares the last tokens alone, such as the patches of images"
    )
  return cut(s, last, axes), cut(t, last, axes)


def _masks(batch: Batch, shape: tuple[int, int], last: int | None):
  """Of the last tokens: which count and which exist, bool [B, L], and pairs of one document [B, L, L] (None: all)."""
  label, segments = batch.get("label"), batch.get("segments")
  labeled = jnp.ones(shape, bool)
  if label is not None and label.shape == shape and jnp.issubdtype(label.dtype, jnp.integer):
    labeled = jnp.asarray(label) >= 0
  if segments is None:
    exists, same = labeled, None
  else:
    if segments.shape != shape:
      raise ValueError(
        f"segments {segments.shape} must have the rows and tokens of the outputs {shape}"
      )
    segments = jnp.asarray(segments)
    exists, same = segments >= 0, cut(segments[:, :, None] == segments[:, None, :], last, (1, 2))
  exists = valid_rows(batch, exists)
  return cut(labeled & exists, last, (1,)), cut(exists, last, (1,)), same


def _each_token(loss):
  """A loss of rows [N, C] as one of hidden states [B, L, C]."""

  @functools.wraps(loss)
  def own(s, t, **arguments):
    if arguments.get("where") is not None:
      where = arguments["where"]
      where = where.reshape(where.shape + (1,) * (s.ndim - 1 - where.ndim))
      arguments["where"] = jnp.broadcast_to(where, s.shape[:-1]).reshape(-1)
    values = loss(s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]), **arguments)
    return values if values.ndim == 0 else values.reshape(s.shape[:-1])

  return own


def _mean_of_heads(scores):
  """[B, heads, queries, keys] -> the logarithm of the mean over heads of the maps, [B, 1, queries, keys]."""
  log_shares = jax.nn.log_softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
  seen = (log_shares > -jnp.inf).any(1, keepdims=True)
  means = jax.nn.logsumexp(jnp.where(seen, log_shares, 0), 1, keepdims=True) - jnp.log(
    scores.shape[1]
  )
  return jnp.where(seen, means, -jnp.inf)
