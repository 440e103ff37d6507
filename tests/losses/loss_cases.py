"""The cases of test_contract.py: one per public loss, with arguments and a float64 reference."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import logit_references as logit
import map_references as maps
import model_references as models
import numpy as np

from distill_jax import losses, reduce


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A loss, its arguments and its properties.

  Attributes:
    name: name of the loss in `distill_jax.losses`.
    make: `rng -> positional arguments` in float64, student and teacher (arrays or trees) first.
    reference: the same loss of NumPy arrays in float64.
    kwargs: hyper-parameters.
    kind: 'logits' for softmax losses over the last axis, which a constant added to a row does not
      change; else 'features'.
    scalar: returns one scalar, not one value a row.
    relational: takes where= and axis_name=.
    ordered: depends on the order of the rows.
    least: value at student = teacher; None: not the least value, or not a constant.
    smooth: the gradient at student = teacher is 0.
    positive: is never negative.
    class_mask: takes class_mask=.
    derivatives: number of first arguments whose gradient is the derivative; the others are
      constants.
    shared: positions of the arguments without a batch axis.
    batch_axis: axis of the rows.
    invalid: changes of the teacher that must raise.
    loss: a function of (student, teacher, ...) where the public one has other arguments.
    label: tells two cases of one loss apart.
  """

  name: str
  make: Callable
  reference: Callable
  kwargs: dict = dataclasses.field(default_factory=dict)
  kind: str = "features"
  scalar: bool = False
  relational: bool = False
  ordered: bool = False
  least: float | None = 0.0
  smooth: bool = True
  positive: bool = True
  class_mask: bool = False
  derivatives: int = 2
  shared: tuple[int, ...] = ()
  batch_axis: int = 0
  invalid: tuple[str, ...] = ("batch", "width", "rank")
  loss: Callable | None = None
  label: str = ""

  @property
  def id(self):
    return f"{self.name}-{self.label}" if self.label else self.name

  def __call__(self, *args, **kwargs):
    """Returns the loss without the state that some return with it."""
    out = (self.loss or getattr(losses, self.name))(*args, **self.kwargs, **kwargs)
    return out if isinstance(out, jax.Array) else out[0]


def pair(*shape):
  return lambda rng: tuple(2 * rng.normal(size=(2, *shape)))


def two(first, second):
  return lambda rng: (2 * rng.normal(size=first), 2 * rng.normal(size=second))


def labeled(rng):
  return (*pair(4, 5)(rng), rng.choice([0, 1, 3], size=4))


def spikes(rng):
  """Returns frames of which the teacher's second one is blank, class 1."""
  student, teacher = pair(4, 5)(rng)
  return student, np.where(np.arange(5) == 1, np.array([[-3], [5], [-3], [-3]]), teacher)


def soft(name, label="", make=None, **options):
  """A softmax loss of [4, 5] logits that takes class_mask; unknown options are the loss's."""
  fields = {f.name for f in dataclasses.fields(Case)}
  kwargs = {key: options.pop(key) for key in list(options) if key not in fields}
  make = make or pair(4, 5)
  return Case(
    name, make, getattr(logit, name), kwargs, "logits", class_mask=True, label=label, **options
  )


def related(name, reference, **options):
  """A relational loss of features of any width."""
  make = two((5, 3), (5, 2, 2))
  return Case(name, make, reference, scalar=True, relational=True, invalid=("batch",), **options)


def sparse(name, tail):
  k = {"k": 2, "temperature": 3.0}
  reference = functools.partial(logit.sparse, tail=tail, **k)

  def loss(student, teacher):
    return getattr(losses, name)(student, losses.top_k(teacher, **k))

  least = None if tail == "smoothed" else 0.0
  return Case(
    name, pair(4, 5), reference, kind="logits", loss=loss, least=least, invalid=("batch", "rank")
  )


def from_samples(student, teacher):
  """Returns `sampled_cross_entropy` of the samples 0, 0, 1, 2 with the teacher's weights."""
  targets = losses.SparseTargets(
    jnp.tile(jnp.array([0, 0, 1, 2]), (4, 1)), jnp.log(teacher), jnp.full(4, -jnp.inf), 2.0
  )
  return losses.sampled_cross_entropy(student, targets)


def sampled_reference(s, t):
  p = np.zeros((4, 5))
  for i, c in enumerate([0, 0, 1, 2]):
    p[:, c] += t[:, i]
  return -4 * (p * np.log(logit.softmax(s, 2.0))).sum(-1)


def from_hidden(student, teacher, **options):
  """Returns `linear_kl` of logits: hidden states under the identity."""
  kernel = jnp.eye(5)
  return losses.linear_kl(student, kernel, teacher, kernel, **options)


def from_hidden_sparse(student, teacher):
  return losses.linear_sparse_kl(student, jnp.eye(5), losses.top_k(teacher, k=2, temperature=3.0))


def mean_of(reference):
  return lambda *args, **kwargs: reference(*args, **kwargs).mean()


def label_entropy(hidden, kernel, labels):
  return -np.log(np.take_along_axis(logit.softmax(hidden @ kernel, 1.0), labels[:, None], 1)).mean()


def two_maps(rng):
  return tuple(tuple(rng.normal(size=(3, *hw, c)) for c in (2, 4)) for hw in ((2, 3), (3, 2)))


def with_classes(rng, shape):
  """Returns labels with 0 and 3 in every image, 255 (ignored), and -1 in some; never 2."""
  labels = rng.choice([0, 1, 3, 255, -1], size=shape)
  labels[:, ..., 0, 0], labels[:, ..., -1, -1] = 0, 3
  return labels


def adjacent_maps(rng):
  """Returns maps of two layers for the student, and for the teacher."""
  channels = (6, 5)
  return tuple(tuple(2 * rng.normal(size=(3, *hw, c)) for c in channels) for hw in ((2, 3), (3, 3)))


def vit_tokens(rng):
  student, teacher = ((rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(3, 4, 5))) for _ in range(2))
  return student, teacher, rng.permuted(np.tile([True, True, False, True], (3, 1)), axis=1)


def uskd_of_rarest(student, weak, **options):
  """Returns `uskd` with the label that the weak head gives the least probability."""
  return losses.uskd(student, weak, jnp.argmin(weak, -1), **options)


def memory(rng):
  student, teacher = pair(3, 4)(rng)
  state = losses.CrdState(rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), np.array([50.0, 70.0]))
  return student, teacher, np.array([1, 8, 3]), rng.integers(0, 9, size=(3, 6)), state


def cirkd_of_rows(student, teacher, **options):
  """Returns `cirkd` of rows as maps of two pixels, one of each class, with a small memory."""
  s, t = (jnp.asarray(x).reshape(len(x), 2, 1, -1) for x in (student, teacher))
  labels = jnp.broadcast_to(jnp.array([[0], [1]]), s.shape[:3])
  state = losses.CirkdState(*models.class_memory(s.shape[-1]), *np.zeros((2, 2), np.int32))
  return losses.cirkd(s, t, jnp.roll(s, 1, -1), labels, jax.random.key(0), state, **options)


def score_weighted_of_first(student, teacher, **options):
  """Returns `score_weighted` where the teacher's first channel is the logit of its scores."""
  logits = jax.lax.stop_gradient(jnp.asarray(teacher)[..., 0])
  scores = jax.nn.sigmoid(logits.astype(reduce.common_dtype(logits.dtype, jnp.float32)))
  return losses.score_weighted(student, teacher, scores, **options)


def relations(rng):
  student, teacher = (tuple(rng.normal(size=(3, 3, 5, w))) for w in (4, 6))
  return student, teacher, np.arange(5) < np.array([[5], [3], [2]])


def layers(rng):
  student = [rng.normal(size=(2, 4, 4, 3)), rng.normal(size=(2, 2, 2, 5))]
  teacher = [rng.normal(size=(2, 2, 2, 6)), rng.normal(size=(2, 1, 1, 4))]
  params = losses.layer_attention_init(
    jax.random.key(int(rng.integers(9))), [3, 5], [6, 4], width=3
  )
  return student, teacher, jax.tree.map(np.asarray, params)


def boxes(rng):
  student, teacher = pair(2, 3, 4, 6)(rng)
  foreground = rng.random(size=(2, 3, 4)) * (rng.random(size=(2, 3, 4)) > 0.5)
  context = losses.fgd_init(jax.random.key(0), 6)
  return (
    student,
    teacher,
    foreground,
    jax.tree.map(lambda x: np.asarray(x) + rng.normal(size=x.shape) / 3, context),
  )


def trees(rng):
  return tuple({"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(4,))} for _ in range(2))


MASK = np.arange(3) < np.array([3, 2])[:, None, None, None]
HELPERS = {
  "CirkdState",
  "Context",
  "cirkd_state",
  "CrdState",
  "LayerAttention",
  "SparseTargets",
  "box_weights",
  "crd_state",
  "fgd_init",
}
HELPERS |= {
  "is_blank_frame",
  "layer_attention_init",
  "ofd_margin",
  "resize_logits",
  "sample_k",
  "standardize",
  "top_k",
  "vid_raw_scale",
}

LOGITS = [
  soft("kl_divergence", temperature=3.0),
  soft("reverse_kl", temperature=3.0),
  soft("soft_cross_entropy", least=None, temperature=3.0),
  soft("jensen_shannon", teacher_weight=0.1, temperature=3.0),
  soft("jensen_shannon", "normalized", teacher_weight=0.7, normalize=True),
  soft("skew_kl", alpha=0.1, temperature=3.0),
  soft("skew_reverse_kl", alpha=0.1, temperature=3.0),
  soft("adaptive_kl", head_mass=0.5, temperature=3.0, derivatives=0),
  soft("total_variation", temperature=3.0),
  soft("hard_distillation", least=None, label_smoothing=0.1),
  soft("ctc_frames", blank=1, temperature=3.0),
  soft("ctc_frames", "collapsed", make=spikes, blank=1, mode="collapsed", temperature=3.0),
  soft("dkd", make=labeled, alpha=1.0, beta=8.0, temperature=4.0),
  soft("nkd", make=labeled, least=None, gamma=1.5, temperature=2.0),
  soft("wsld", make=labeled, least=None, derivatives=0, temperature=2.0),
  soft("ofa", make=labeled, least=None, eps=1.5),
  soft("minifinetuning", make=labeled, least=None, threshold=0.2, temperature=2.0),
  soft("minillm_single_step", make=labeled, derivatives=0, teacher_mixing=0.2, temperature=2.0),
  soft("dist", scalar=True, relational=True, beta=2.0, gamma=1.0, temperature=3.0),
  soft("class_gram", scalar=True, relational=True, temperature=3.0),
  soft("batch_gram", scalar=True, relational=True, temperature=3.0),
  Case("logit_mse", pair(4, 5), logit.logit_mse, class_mask=True),
  Case("margin_mse", pair(4, 5), logit.margin_mse, kind="logits", class_mask=True),
  Case("binary_kl", pair(4, 5), logit.binary_kl, {"temperature": 3.0}, class_mask=True),
  Case("uld", two((4, 5), (4, 7)), logit.uld, kind="logits", invalid=("batch", "rank")),
  Case(
    "uskd",
    pair(4, 5),
    lambda s, w, **options: logit.uskd(s, w, w.argmin(-1), **options),
    {"alpha": 0.5, "beta": 0.2, "mu": 0.1},
    kind="logits",
    scalar=True,
    relational=True,
    least=None,
    derivatives=0,
    loss=uskd_of_rarest,
  ),
  sparse("sparse_kl", "bucket"),
  sparse("sparse_kl_conditional", "conditional"),
  sparse("sparse_kl_smoothed", "smoothed"),
  Case(
    "sparse_jensen_shannon",
    pair(4, 5),
    functools.partial(logit.sparse_jensen_shannon, k=2, temperature=3.0),
    {"teacher_weight": 0.1},
    kind="logits",
    loss=lambda s, t, **options: losses.sparse_jensen_shannon(
      s, losses.top_k(t, k=2, temperature=3.0), **options
    ),
    invalid=("batch", "rank"),
  ),
  Case(
    "sampled_cross_entropy",
    lambda rng: (pair(4, 5)(rng)[0], rng.dirichlet(np.ones(4), size=4)),
    sampled_reference,
    loss=from_samples,
    least=None,
    positive=False,
    invalid=("batch", "rank"),
  ),
]
LINEAR = [
  Case(
    "linear_kl",
    pair(4, 5),
    mean_of(getattr(logit, reference)),
    {"temperature": 3.0, **options},
    kind="logits",
    scalar=True,
    derivatives=1,
    loss=functools.partial(from_hidden, divergence=name),
    label=name,
  )
  for name, reference, options in [
    ("kl", "kl_divergence", {}),
    ("reverse_kl", "reverse_kl", {}),
    ("jensen_shannon", "jensen_shannon", {"teacher_weight": 0.1}),
    ("skew_kl", "skew_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", "skew_reverse_kl", {"alpha": 0.1}),
  ]
] + [
  Case(
    "linear_sparse_kl",
    pair(4, 5),
    mean_of(functools.partial(logit.sparse, tail="bucket", k=2, temperature=3.0)),
    kind="logits",
    scalar=True,
    derivatives=1,
    loss=from_hidden_sparse,
    invalid=("batch", "rank"),
  ),
  Case(
    "linear_cross_entropy",
    lambda rng: (*two((4, 3), (3, 5))(rng), rng.choice(5, size=4)),
    label_entropy,
    scalar=True,
    least=None,
    shared=(1,),
    invalid=("batch", "rank"),
  ),
]
MAPS = [
  Case("hint", pair(4, 3, 2), maps.hint),
  Case("l1", pair(4, 3, 2), maps.l1, smooth=False),
  Case("cosine", pair(4, 3, 5), maps.cosine),
  Case(
    "attention_transfer",
    two((3, 2, 3, 4), (3, 2, 3, 5)),
    maps.attention_transfer,
    {"p": 2.0},
    invalid=("batch", "rank"),
  ),
  Case(
    "attention_transfer",
    pair(3, 2, 3, 4),
    maps.attention_transfer,
    {"squared": False},
    invalid=("batch",),
    label="norm",
    smooth=False,
  ),
  Case(
    "importance_map",
    two((3, 2, 3, 4), (3, 2, 3, 5)),
    maps.importance_map,
    {"p": 4.0},
    invalid=("batch", "rank"),
  ),
  Case("nst", two((3, 2, 3, 4), (3, 2, 3, 2)), maps.nst, invalid=("batch", "rank")),
  Case(
    "nst",
    two((3, 1, 3, 4), (3, 1, 3, 2)),
    maps.nst,
    invalid=("batch", "rank"),
    label="few_positions",
  ),
  Case("fsp", two_maps, maps.fsp, invalid=("batch", "width")),
  Case("factor_transfer", pair(3, 2, 3), maps.factor_transfer, {"p": 1.0}, smooth=False),
  Case("factor_transfer", pair(3, 2, 3), maps.factor_transfer, {"p": 2}, label="squared"),
  Case("inter_channel", two((3, 2, 3, 4), (3, 1, 5, 4)), maps.inter_channel),
  Case("activation_boundary", pair(3, 2, 3), maps.activation_boundary, {"margin": 1.0}, least=None),
  Case(
    "ofd", lambda rng: (*pair(3, 2, 4)(rng), -np.abs(rng.normal(size=4))), maps.ofd, shared=(2,)
  ),
  Case("review_kd", pair(2, 5, 6, 3), maps.review_kd),
  Case("review_kd", pair(2, 2, 2, 3), maps.review_kd, label="small"),
  Case("mgd", pair(3, 2, 3), maps.mgd),
  Case(
    "vid",
    lambda rng: (*pair(3, 2, 4)(rng), rng.normal(size=4)),
    maps.vid,
    least=None,
    positive=False,
    shared=(2,),
  ),
  Case(
    "srd",
    pair(5, 2, 3),
    maps.srd,
    {"power": 4.0},
    scalar=True,
    relational=True,
    least=None,
    positive=False,
  ),
  Case("vkd", pair(3, 2, 4), maps.vkd, least=None),
  Case(
    "pad",
    lambda rng: (*pair(4, 3, 2)(rng), rng.normal(size=4)),
    maps.pad,
    least=None,
    positive=False,
  ),
  Case("cwd", pair(2, 3, 2, 4), maps.cwd, {"temperature": 4.0}),
  Case(
    "affinity",
    two((3, 2, 3, 4), (3, 2, 3, 5)),
    maps.affinity,
    smooth=False,
    invalid=("batch", "rank"),
  ),
  Case(
    "ifv",
    lambda rng: (*two((3, 2, 4, 4), (3, 2, 4, 5))(rng), rng.choice([0, 1, 255], size=(3, 4, 4))),
    maps.ifv,
    {"num_classes": 2, "ignore_label": 255},
    invalid=("batch", "rank"),
  ),
  Case(
    "region_affinity",
    lambda rng: (*two((3, 2, 4, 4), (3, 2, 4, 5))(rng), with_classes(rng, (3, 4, 4))),
    maps.region_affinity,
    {"num_classes": 4, "ignore_label": 255},
    invalid=("batch", "rank"),
  ),
  Case(
    "pairwise_similarity",
    two((2, 5, 3, 4), (2, 5, 3, 6)),
    maps.pairwise_similarity,
    {"pool": np.float64(0.4)},  # Not traced: it is the shape of a window.
    invalid=("batch", "rank"),
  ),
  Case("vitkd", vit_tokens, maps.vitkd, {"alpha": 0.3, "beta": 0.2}, smooth=False),
  Case("kdsvd", adjacent_maps, maps.kdsvd, {"k": 2}),
  Case("pearson", pair(4, 3, 2), maps.pearson, scalar=True, relational=True),
  Case(
    "score_weighted",
    pair(4, 3, 2, 5),
    lambda s, t: maps.score_weighted(s, t, 1 / (1 + np.exp(-t[..., 0]))),
    scalar=True,
    relational=True,
    derivatives=1,
    loss=score_weighted_of_first,
  ),
  Case("localization", pair(3, 4, 5), logit.localization, {"temperature": 10.0}, "logits"),
  related("similarity_preserving", maps.similarity_preserving),
  related("rkd_distance", maps.rkd_distance),
  related("rkd_angle", maps.rkd_angle),
  related("pkt", maps.pkt),
  related("correlation_congruence", maps.correlation_congruence, kwargs={"gamma": 0.4}),
  related(
    "correlation_congruence",
    maps.correlation_congruence,
    kwargs={"kernel": "bilinear"},
    label="bilinear",
  ),
  related(
    "dark_rank",
    maps.dark_rank,
    kwargs={"alpha": 0.1, "beta": 3.0, "length": 3},
    least=None,
  ),
  Case("correlation", pair(5, 3, 2), maps.correlation, scalar=True, relational=True, ordered=True),
]
MODELS = [
  Case(
    "info_nce",
    pair(5, 3),
    models.info_nce,
    {"temperature": 0.3},
    scalar=True,
    relational=True,
    least=None,
  ),
  Case(
    "cirkd",
    pair(5, 6),
    models.cirkd,
    {"temperature": 0.3, "pixel_weight": 0.5, "region_weight": 0.2},
    scalar=True,
    relational=True,
    least=None,
    invalid=(),
    loss=cirkd_of_rows,
  ),
  Case(
    "queue_similarity",
    lambda rng: (*pair(4, 3)(rng), rng.normal(size=(6, 3))),
    models.queue_similarity,
    {"student_temperature": 0.2, "teacher_temperature": 0.1},
    least=None,
    shared=(2,),
  ),
  Case("crd", memory, models.crd, {"temperature": 0.5, "momentum": 0.5}, least=None, shared=(4,)),
  Case(
    "dino",
    lambda rng: (rng.normal(size=(3, 4, 5)), rng.normal(size=(2, 4, 5)), rng.normal(size=5)),
    models.dino,
    {"student_temperature": 0.3, "teacher_temperature": 0.2},
    least=None,
    derivatives=1,
    shared=(2,),
    batch_axis=1,
    invalid=("width", "rank"),
  ),
  Case(
    "attention_scores_mse",
    pair(2, 2, 3, 3),
    models.attention_scores_mse,
    {"mask": MASK & MASK.swapaxes(2, 3)},
    shared=(2,),
  ),
  Case("attention_kl", pair(2, 2, 3, 3), models.attention_kl, {"mask": MASK}, "logits"),
  Case(
    "attention_cross_entropy",
    pair(2, 2, 3, 3),
    models.attention_cross_entropy,
    {"mask": MASK},
    "logits",
    least=None,
  ),
  Case(
    "minilm_relations",
    relations,
    models.minilm_relations,
    {"relation_heads": 2},
    invalid=("batch", "rank"),
  ),
  Case("layer_attention", layers, models.layer_attention, least=None, shared=(2,)),
  Case("weight_alignment", trees, models.weight_alignment, scalar=True),
  Case("fgd", boxes, models.fgd, {"temperature": 0.5, "relation": 1e-3}, least=None, shared=(3,)),
  Case(
    "ctc_mean",
    two((3, 4, 5), (3, 6, 5)),
    logit.ctc_mean,
    {"temperature": 3.0},
    kind="logits",
    invalid=("batch", "width", "rank"),
  ),
  Case(
    "rnnt_three_way",
    lambda rng: (*pair(2, 3, 3, 5)(rng), rng.integers(1, 5, size=(2, 2))),
    logit.rnnt_three_way,
    kind="logits",
  ),
]
CASES = LOGITS + LINEAR + MAPS + MODELS

SOFT = [case for case in CASES if case.kind == "logits"]
MASKABLE = [case for case in CASES if case.class_mask]
RELATIONAL = [case for case in CASES if case.relational]
SEPARABLE = [case for case in CASES if not case.scalar and "mask" not in case.kwargs]


def arguments(case, seed=0, dtype=np.float32):
  """Returns the case's arguments, the floating ones as `dtype`."""
  return cast(case.make(np.random.default_rng(seed)), dtype)


def cast(tree, dtype):
  return map_floats(lambda x: np.asarray(x).astype(dtype), tree)


def map_floats(f, *trees):
  def leaf(x, *rest):
    return f(x, *rest) if jnp.issubdtype(np.asarray(x).dtype, jnp.floating) else x

  return jax.tree.map(leaf, *trees)
