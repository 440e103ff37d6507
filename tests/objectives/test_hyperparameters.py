"""Hyper-parameters: schedules in every term equal constants at their step; other types raise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, objectives, reduce
from distill_jax.errors import check_integer
from distill_jax.models import from_apply
from distill_jax.objectives import weighted
from distill_jax.objectives.hyperparameters import (
  check_number,
  check_types,
  schedule_steps,
)
from distill_jax.train import fit

KEY = jax.random.key(0)
STEP = 3


def falling(first, at_step):
  """A schedule with this number at step 0 and that one at `STEP`."""
  return lambda step: first + (at_step - first) * step / STEP


def scaled_sparse_kl(s, t, *, scale):
  return scale * losses.sparse_kl(s, t)


# term -> a function of a number, or of a schedule; two numbers
TERMS = {
  "temperature": (lambda x: objectives.logits(losses.kl_divergence, temperature=x), 8.0, 2.0),
  "alpha": (lambda x: objectives.features("z", "z", losses.skew_kl, alpha=x), 0.5, 0.2),
  "mutual": (lambda x: objectives.mutual(losses.reverse_kl, 2, temperature=x), 4.0, 2.0),
  "class_mask": (
    lambda x: objectives.sparse(
      lambda s, t, *, scale: scale * losses.sparse_kl(s, t), k=2, scale=x
    ),
    1.0,
    0.5,
  ),
  "label_weight": (lambda x: objectives.tokens(label_weight=x), 1.0, 0.25),
  "token_temperature": (lambda x: objectives.tokens(temperature=x), 4.0, 2.0),
  "token_alpha": (lambda x: objectives.tokens(losses.skew_kl, alpha=x), 0.5, 0.1),
  "layers": (
    lambda x: objectives.layers([(1, 1)], losses.kl_divergence, name="hidden", temperature=x),
    4.0,
    2.0,
  ),
  "power": (lambda x: objectives.srd("flat", "flat", power=x), 4.0, 2.0),
  "margin": (lambda x: objectives.activation_boundary("flat", "flat", margin=x), 1.0, 0.25),
  "fraction": (lambda x: objectives.mgd("map", "map", mask_fraction=x), 0.8, 0.3),
  "p": (lambda x: objectives.factor_transfer("map", "map", p=x), 1.0, 2.0),
  "crd": (
    lambda x: objectives.crd("flat", "flat", 8, negatives=3, width=2, temperature=x),
    0.5,
    0.1,
  ),
  "queue": (
    lambda x: objectives.queue_similarity("flat", "flat", size=4, student_temperature=x),
    1.0,
    0.2,
  ),
  "dino": (lambda x: objectives.dino("views", "views", student_temperature=x), 1.0, 0.2),
  "vitkd": (lambda x: objectives.vitkd(("grid", "grid"), ("grid", "grid"), alpha=x), 1.0, 0.2),
  "grid_mask": (
    lambda x: objectives.vitkd(("grid", "grid"), ("grid", "grid"), mask_fraction=x),
    0.8,
    0.3,
  ),
  "uskd": (lambda x: objectives.uskd("flat", entry="class", mu=x), 1.0, 0.2),
  "fgd": (lambda x: objectives.fgd("map", "map", stride=2.0, temperature=x), 1.0, 0.5),
}


def problem():
  rng = np.random.default_rng(0)

  def network():
    def values(*shape):
      return rng.normal(size=(4, *shape)).astype(np.float32)

    return {
      "logits": values(5),
      "z": values(5),
      "0/logits": values(5),
      "1/logits": values(5),
      "hidden": values(3, 4),
      "hidden1": values(3, 4),
      "head": (values(6), None, None),
      "flat": values(6),
      "map": values(4, 4, 3),
      "grid": values(4, 3),
      "views": values(2, 5),
    }

  batch = {
    "id": np.arange(4, dtype=np.int32),
    "class": np.arange(4, dtype=np.int32),
    "boxes": np.array([[[0, 0, 4, 4]]] * 4, np.float32),
    "boxes_valid": np.ones((4, 1), bool),
  }
  return network(), network(), batch


def test_schedule_of_every_term_equals_the_number_at_its_step():
  student, teacher, batch = problem()
  labels = np.ones((4, 3), np.int32)

  def objective(make):
    return weighted(**{name: (1.0, make(*case)) for name, case in TERMS.items()})

  constant = objective(lambda build, first, last: build(last))
  scheduled = objective(lambda build, first, last: build(falling(first, last)))
  variables = constant.init(KEY, student, teacher)
  assert jax.tree.structure(scheduled.init(KEY, student, teacher)) == jax.tree.structure(variables)

  @jax.jit
  def evaluate(step):
    def means(goal):
      rows = batch | {"label": labels}
      terms, _ = goal.apply(*variables, student, teacher, rows, step=step, key=KEY)
      return {n: reduce.mean(*v) if isinstance(v, tuple) else v for n, (_, v) in terms.items()}

    return means(constant), means(scheduled)

  expected, got = evaluate(jnp.int32(STEP))
  _, first = evaluate(jnp.int32(0))
  for name in TERMS:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)
    assert abs(first[name] - got[name]) > 1e-4 * abs(got[name]), name


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (lambda: objectives.logits(losses.kl_divergence, temperature="4"), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=True), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=None), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=[1.0]), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=lambda: 2.0), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=float), "temperature"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=lambda s: jnp.ones(2)), "temper"),
    (lambda: objectives.logits(losses.kl_divergence, temperature=lambda s: "4"), "temperature"),
    (
      lambda: objectives.logits(losses.kl_divergence, temperature=lambda s: 1.0 if s < 9 else 2.0),
      "temperature",
    ),
    (lambda: objectives.logits(losses.kl_divergence, axis=optax.constant_schedule(1)), "axis"),
    (lambda: objectives.features("a", "b", losses.cosine, project=1, x=1), "x"),
    (lambda: objectives.sparse(losses.sparse_kl, k=optax.constant_schedule(2)), "k"),
    (lambda: objectives.sparse(losses.sparse_kl, k=2.0), "k"),
    (lambda: objectives.sparse(losses.sparse_kl, k=2, temperature=falling(4, 1)), "temperature"),
    (lambda: objectives.tokens(label_weight="0.5"), "label_weight"),
    (lambda: objectives.tokens(label_weight=falling(-1, 0)), "label_weight"),
    (lambda: objectives.tokens(temperature=False), "temperature"),
    (lambda: objectives.tokens(memory=True), "memory"),
    (lambda: objectives.tokens(losses.skew_kl, alpha="0.1"), "alpha"),
    (lambda: objectives.mutual(losses.kl_divergence, True), "students"),
    (lambda: objectives.srd("a", "a", power="2"), "power"),
    (lambda: objectives.srd("a", "a", power=falling(0.5, 1)), "power"),
    (lambda: objectives.mgd("a", "a", mask_fraction=True), "mask_fraction"),
    (lambda: objectives.activation_boundary("a", "a", margin=None), "margin"),
    (lambda: objectives.factor_transfer("a", "a", p=0), "p"),
    (lambda: objectives.paraphraser("a", rate=falling(0.5, 1)), "rate"),
    (lambda: objectives.crd("a", "a", 8.0), "examples"),
    (lambda: objectives.crd("a", "a", 8, temperature="1"), "temperature"),
    (lambda: objectives.queue_similarity("a", "a", size=True), "size"),
    (lambda: objectives.queue_similarity("a", "a", teacher_temperature=0), "teacher_temperature"),
    (lambda: objectives.dino("a", "a", momentum=1.0), "momentum"),
    (lambda: objectives.fgd("a", "a", stride="8"), "stride"),
    (lambda: objectives.fgd("a", "a", stride=8, alhpa=1.0), "alhpa"),
    (lambda: objectives.fgd("a", "a", stride=8, alpha=True), "alpha"),
    (lambda: objectives.layers([(1, 1.5)], losses.hint), "pairs"),
    (lambda: objectives.relations([(1, 1)], relation_heads=True), "relation_heads"),
    (lambda: objectives.layer_map("2", 4), "student_depth"),
  ],
)
def test_value_of_another_type_raises_at_once(make, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    make()


def test_schedule_out_of_range_at_the_first_step_raises_in_init():
  term = objectives.logits(losses.kl_divergence, temperature=falling(0.0, 1.0))
  z = {"logits": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  with pytest.raises(ValueError, match="^term 'soft': temperature: "):
    weighted(soft=(1.0, term)).init(KEY, z, z)


def test_schedule_of_what_a_loss_needs_at_once_raises_in_init():
  def loss(s, t, *, power):
    return ((s - t) ** int(power)).sum(-1)

  z = {"logits": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  objectives.logits(loss, power=2).init(KEY, z, z)
  with pytest.raises(ValueError, match="^term 'soft': power: .*schedule"):
    weighted(soft=(1.0, objectives.logits(loss, power=falling(1, 2)))).init(KEY, z, z)


def test_types_follow_annotations_and_defaults():
  def loss(s, t, *, a: float, b=1, c: int = 2, d=True, e="x", f=None, g=jax.nn.relu):
    return s

  good = {"a": np.float32(1), "b": jnp.ones(()), "c": np.int64(3), "d": False, "e": "y", "f": KEY}
  assert check_types(loss, good | {"g": jax.nn.gelu}) == frozenset()
  assert check_types(loss, {"a": falling(0, 1), "b": falling(0, 1)}) == {"a", "b"}
  bad = {"a": True, "b": "1", "c": 2.0, "d": 0, "e": 1}
  for name, value in bad.items():
    with pytest.raises(ValueError, match=f"^{name}: "):
      check_types(loss, {name: value})


def test_ranges_of_numbers():
  check_number("x", 1, low=0, high=1)
  check_integer("n", np.int32(2), 2)
  for value in (1, np.float32(1), jnp.ones(())):
    with pytest.raises(ValueError, match="^x: "):
      check_number("x", value, high=1, open_high=True)
  with pytest.raises(ValueError, match="^n: "):
    check_integer("n", 1, 2)


def soft(**options):
  return objectives.logits(losses.kl_divergence, **options)


def fit_terms(**terms):
  image = np.ones((8, 3), np.float32)
  net = from_apply(lambda key, x: jnp.eye(3), lambda w, x: x @ w, variables=jnp.eye(3))
  source = {"image": image, "label": np.arange(8) % 3}
  fit(net, net, weighted(**terms), optax.sgd(0.1), source, steps=20, batch_size=8)


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda x: {"a": (x, objectives.labels())}, r"term 'a': weight: .*-0\.1.* at step 10"),
    (
      lambda x: {"a": (1.0, objectives.labels(label_smoothing=x))},
      r"'a': label_smoothing: .*step 10",
    ),
    (lambda x: {"a": (1.0, soft(temperature=x))}, "'a': temperature: .*step 10"),
  ],
)
def test_fit_checks_schedules_at_later_steps(make, match):
  with pytest.raises(ValueError, match=match):
    fit_terms(**make(optax.linear_schedule(0.9, -1.0, 19)))


def scores_kl(student, teacher, *, temperature=1.0):
  return losses.kl_divergence(student, teacher, temperature=temperature).mean((1, 2))


@pytest.mark.parametrize("total", [2, 20])
def test_terms_check_schedules_at_later_steps(total):

  def wrong_at_last(step):
    return jnp.where(step == total - 1, -1.0, 0.5)

  for make, output in [
    (lambda x: objectives.crd("z", "z", 8, negatives=3, width=2, momentum=x), (4, 3)),
    (lambda x: objectives.srd("z", "z", power=lambda step: 1 + x(step)), (4, 3)),
    (lambda x: objectives.tokens(label_weight=x), (4, 3)),
    (lambda x: objectives.fgd("z", "z", stride=8, temperature=x), (2, 4, 4, 4)),
    (lambda x: objectives.uskd("z", output="z", alpha=x), (4, 3)),
    (lambda x: objectives.vitkd(("z", "z"), ("z", "z"), beta=x), (2, 4, 3)),
    (lambda x: objectives.attention([(1, 1)], scores_kl, name="z", temperature=x), (2, 2, 3, 3)),
  ]:
    outputs = dict.fromkeys(("z", "z1"), jax.ShapeDtypeStruct(output, jnp.float32))
    with pytest.raises(ValueError, match=f"at step {total - 1}"), schedule_steps(total):
      make(wrong_at_last).init(KEY, outputs, outputs)


def test_a_schedule_that_returns_nothing_is_named():
  with pytest.raises(ValueError, match="temperature: .*None"):
    soft(temperature=lambda step: None)
  with pytest.raises(ValueError, match="label_smoothing: .*1.5"):
    objectives.labels(label_smoothing=lambda step: 1.5)


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: objectives.logits(losses.dkd, labels=np.arange(4)), "labels: .*the batch"),
    (lambda: objectives.features("a", "a", losses.pkt, where=np.ones(4)), "where: .*the batch"),
    (lambda: soft(teacher=np.ones((4, 3))), "teacher: .*the networks' outputs"),
    (lambda: objectives.logits(losses.sparse_kl), "loss: .*objectives.sparse"),
    (lambda: objectives.logits(optax.kl_divergence), "loss: .*losses.kl_divergence"),
    (lambda: objectives.logits("kl_divergence"), "loss: .*write losses.kl_divergence"),
  ],
)
def test_arguments_that_the_term_fills_and_other_losses_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize("outputs", [{"logits": np.zeros(4)}, {"logits": {"a": np.zeros((4, 3))}}])
def test_logits_without_classes_are_refused(outputs):
  with pytest.raises(ValueError, match="logits: .*binary_kl"):
    soft().init(KEY, outputs, outputs)
