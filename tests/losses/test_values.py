"""Limits, infinities, labels and helpers of losses: what their formulas leave open."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import losses, quick_compilation
from jax.test_util import check_grads
from scipy import stats

from distill_jax import losses as public
from distill_jax import reduce

INF = np.inf


def test_one_sided_minus_infinity_is_probability_zero():
  full, cut = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, -INF])
  assert losses.kl_divergence(cut, full) == INF and losses.reverse_kl(full, cut) == INF
  p = jax.nn.softmax(full)
  np.testing.assert_allclose(losses.kl_divergence(full, cut), -jnp.log(p[0] + p[1]), rtol=1e-6)
  bounded = "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "uld"

  @jax.jit
  def graded(student, teacher):
    return {
      name: jax.value_and_grad(getattr(losses, name), (0, 1))(student, teacher) for name in bounded
    }

  for name, (value, gradients) in jax.device_get(graded(full, cut)).items():
    assert all(np.isfinite(x).all() for x in (value, *gradients)), name
  assert losses.binary_kl(cut, full) == INF and losses.logit_mse(cut, full) == INF
  np.testing.assert_allclose(losses.binary_kl(full, cut), jax.nn.softplus(3.0), rtol=1e-6)


def test_underflow_on_an_impossible_class_is_infinite():
  assert losses.kl_divergence(jnp.array([0.0, -INF]), jnp.array([0.0, -1e4])) == INF


def test_nan_stays_nan():
  assert jnp.isnan(losses.kl_divergence(jnp.array([0.0, 1.0]), jnp.array([jnp.nan, 1.0])))


def test_dkd_with_two_classes_raises():
  with pytest.raises(ValueError, match="student.*2 classes"):
    losses.dkd(np.ones((1, 2)), np.ones((1, 2)), np.array([0]))


def test_dkd_with_its_coupled_weights_is_kl():
  s, t = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])
  coupled = losses.dkd(s, t, jnp.array(1), beta=1 - jax.nn.softmax(t)[1], temperature=1.0)
  np.testing.assert_allclose(coupled, losses.kl_divergence(s, t), rtol=1e-6)


def test_ofa_raises_the_target_only():
  s, t = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])
  plain = losses.ofa(s, t, jnp.array(1), eps=1)
  np.testing.assert_allclose(plain, losses.soft_cross_entropy(s, t), rtol=1e-6)
  p, log_q = jax.nn.softmax(t)[1], jax.nn.log_softmax(s)[1]
  raised = losses.ofa(s, t, jnp.array(1), eps=1.5) - plain
  np.testing.assert_allclose(raised, -((1 + p) ** 1.5 - 1 - p) * log_q, rtol=1e-5)


def test_wsld_holds_its_weight_constant():
  with jax.enable_x64(True):
    s, t, y = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]), jnp.array(1)
    weight = losses.wsld(s, t, y) / losses.soft_cross_entropy(s, t, temperature=2.0)
    gradient = jax.jit(jax.grad(losses.soft_cross_entropy), static_argnames="temperature")
    expected = weight * gradient(s, t, temperature=2.0)
    np.testing.assert_allclose(jax.jit(jax.grad(losses.wsld))(s, t, y), expected, rtol=1e-12)


def test_adaptive_kl_holds_its_factor_constant():
  s, t = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])
  head_mass = np.array([0.5, 0.7, 1.0])
  in_head = np.array([[0, 1, 0], [1, 1, 0], [1, 1, 1]])  # p is 0.24, 0.67, 0.09

  def gradients(head_mass, in_head):
    gap = jnp.abs(jax.nn.softmax(s) - jax.nn.softmax(t))
    g = (gap * in_head).sum() / gap.sum()

    def mixed(s):
      return g * public.kl_divergence(s, t) + (1 - g) * public.reverse_kl(s, t)

    return jax.grad(mixed)(s), jax.grad(public.adaptive_kl)(s, t, head_mass=head_mass)

  with quick_compilation():
    expected, values = jax.jit(jax.vmap(gradients))(head_mass, in_head)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_adaptive_kl_is_infinite_where_a_kl_that_counts_is():
  full, cut = [1.0, 2.0, 3.0], [1.0, 2.0, -INF]
  student, teacher = jnp.array([cut, full]), jnp.array([full, cut])
  with quick_compilation():
    both = jax.jit(jax.vmap(jax.value_and_grad(public.adaptive_kl)))
    values, gradients = both(student, teacher)
  assert (values == INF).all() and jnp.isfinite(gradients).all()


def test_minifinetuning_corrects_the_teacher():
  s, t = jnp.array([1.0, -2.0, 0.5]), jnp.log(jnp.array([0.5, 0.3, 0.2]))
  cases = [
    (0, 0.2, [0.7, 0.18, 0.12]),  # The label leads: + 0.2, from the others in proportion.
    (0, 0.6, [1, 0, 0]),
    (0, 0.0, [0.5, 0.3, 0.2]),
    (1, 0.2, [1 / 3, 1 / 3 + 0.2, 2 / 15]),  # It leads by 0.2 afterwards.
    (2, 0.0, [0.5 / 1.3, 0.3 / 1.3, 0.5 / 1.3]),
    (2, 1.0, [0, 0, 1]),
  ]
  labels, thresholds, expected = (np.array(x) for x in zip(*cases))

  def gradient(label, threshold):
    return jax.grad(public.minifinetuning)(s, t, label, threshold=threshold)

  with quick_compilation():
    gradients = jax.jit(jax.vmap(gradient))(labels, thresholds)
  # The gradient is q - p'.
  np.testing.assert_allclose(jax.nn.softmax(s) - gradients, expected, atol=1e-6)


def test_minillm_holds_its_weight_constant():
  s, t, y = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]), jnp.array(1)
  p, q = jax.nn.softmax(t)[1], jax.nn.softmax(s)[1]

  def gradients(a):
    expected = q / (a * p + (1 - a) * q) * jax.grad(public.reverse_kl)(s, t)
    return expected, jax.grad(public.minillm_single_step)(s, t, y, teacher_mixing=a)

  with quick_compilation():
    expected, values = jax.jit(jax.vmap(gradients))(np.array([0.0, 0.2], np.float32))
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_sparse_jensen_shannon_is_at_most_the_full_one(rng):
  s, t = 2 * rng.normal(size=(2, 4, 6)).astype(np.float32)

  def values(s, t):
    weight = {"teacher_weight": 0.3}
    full = public.jensen_shannon(s, t, **weight)
    return full, *(public.sparse_jensen_shannon(s, public.top_k(t, k), **weight) for k in (6, 2))

  with quick_compilation():
    full, all_classes, two = jax.jit(values)(s, t)
  np.testing.assert_allclose(all_classes, full, rtol=1e-5, atol=1e-6)
  assert (two <= full).all() and (two > 0).all()


def test_uskd_holds_its_soft_labels_constant():
  rng = np.random.default_rng(0)
  s, w = rng.normal(size=(2, 3, 4)).astype(np.float32)
  y = np.array([2, 0, 3])
  q = jax.nn.softmax(s)
  confidence = q[np.arange(3), y] ** 2
  soft = confidence + 1 - confidence.mean()
  others = np.arange(4) != y[:, None]
  score = np.where(others, q / (1 - q[np.arange(3), y][:, None]), 0)
  score += np.where(others, jax.nn.softmax(np.where(others, w, -INF)), 0)
  zipf = np.where(others, 1 / (1 + (score[:, None, :] > score[..., None]).sum(-1)), 0)
  zipf /= zipf.sum(-1, keepdims=True)

  def expected(s, w):
    log_q, log_w = jax.nn.log_softmax(s), jax.nn.log_softmax(w)
    target = 0.9 * ~others + 0.1 / 4
    hard = -soft * log_q[np.arange(3), y]
    rest = -(zipf * jax.nn.log_softmax(jnp.where(others, s, -1e30))).sum(-1)
    return (hard + 0.1 * rest - 0.005 * (target * log_w).sum(-1)).mean()

  with quick_compilation():
    gradients = [
      jax.jit(jax.grad(f, (0, 1)))(s, w) for f in (expected, lambda s, w: public.uskd(s, w, y))
    ]
  for a, b in zip(*gradients):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-7)


def test_label_that_is_no_class_makes_uskd_nan_unless_masked():
  z, y = np.zeros((2, 3), np.float32), np.array([1, -1])
  where = np.array([[True, True], [True, False]])
  with quick_compilation():
    values = jax.jit(jax.vmap(lambda where: public.uskd(z, z, y, where=where)))(where)
  np.testing.assert_allclose(values, [np.nan, np.log(3) * 1.005 + 0.1 * np.log(2)], rtol=1e-5)
  with pytest.raises(ValueError, match="labels"):
    public.uskd(z, z, np.ones(2))


@pytest.mark.parametrize("name", ["ifv", "region_affinity"])
def test_pixels_of_other_labels_are_ignored(rng, name):
  loss = getattr(public, name)
  s, t = rng.normal(size=(2, 1, 2, 2, 3)).astype(np.float32)
  t[0, 1, 1] = np.nan
  y = np.array([[[0, 1], [0, 255]]])

  def value(t, y):  # Class 2 is absent.
    return loss(s, t, y, num_classes=3, ignore_label=255)[0]

  def values(t):
    three = (x.reshape(1, 1, 4, *x.shape[3:])[:, :, :3] for x in (s, t, y))
    return value(t, y), value(t, np.full((1, 1, 1), -1)), loss(*three, num_classes=2)[0]

  with quick_compilation():
    (masked, empty, expected), gradient = jax.jit(lambda t: (values(t), jax.grad(value)(t, y)))(t)
  np.testing.assert_allclose(masked, expected, rtol=1e-5)
  assert np.isfinite(gradient).all() and (gradient[0, 1, 1] == 0).all() and empty == 0
  shapes = ((1, 4), (2, 2, 2), (1, 2, 2, 1))
  for invalid in (np.zeros((1, 2, 2)), *(np.zeros(shape, int) for shape in shapes)):
    with pytest.raises(ValueError, match="labels"):
      loss(s, s, invalid, num_classes=2)


def test_one_region_has_no_affinity_and_no_gradient(rng):
  s, t = rng.normal(size=(2, 1, 2, 2, 3)).astype(np.float32)
  one_class = np.ones((1, 2, 2), int)
  with quick_compilation():
    value, gradient = jax.jit(
      jax.value_and_grad(lambda s: public.region_affinity(s, t, one_class, num_classes=3)[0])
    )(s)
  assert value == 0 and (gradient == 0).all()


def test_vitkd_arguments_that_do_not_fit_raise():
  x, masked = (np.ones((1, 2)), np.ones((1, 3, 2))), np.ones((1, 3), bool)
  for args, field in [
    ((x[0], x, masked), "student"),
    ((x, x[:1], masked), "teacher"),
    ((x, x, masked[:, :2]), "masked"),
    ((x, x, np.ones((1, 3))), "masked"),
    ((x[:1] * 2, x[:1] * 2, masked), "student"),
  ]:
    with pytest.raises(ValueError, match=f"^{field}"):
      public.vitkd(*args)


def test_binary_kl_has_its_derivative_where_logits_are_zero():
  gradients = jax.jit(jax.grad(losses.binary_kl, (0, 1)))(
    jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 2.0])
  )
  q, p = jax.nn.sigmoid(1.0), jax.nn.sigmoid(2.0)
  np.testing.assert_allclose(gradients[0], [0, q - 0.5, 0.5 - p], atol=1e-6)
  np.testing.assert_allclose(gradients[1], [0, -0.25, 2 * p * (1 - p)], atol=1e-6)


def test_first_of_equal_logits_is_the_decision():
  s, t = jnp.array([[1.0, 2.0, 4.0]] * 2), jnp.array([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
  log_q = jax.nn.log_softmax(s)
  np.testing.assert_allclose(
    losses.hard_distillation(s, t), [-log_q[0, 1], -log_q[1, 0]], rtol=1e-6
  )


def test_standardize():
  with jax.enable_x64(True):
    z = np.random.default_rng(0).normal(size=(3, 5))
    expected = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(losses.standardize(z), expected, rtol=1e-12)
    check_grads(losses.standardize, (z,), 1, ["rev"])
  mask = np.array([True, False, True, True, False])
  np.testing.assert_allclose(
    losses.standardize(z, class_mask=mask)[:, mask], losses.standardize(z[:, mask]), rtol=1e-5
  )
  gradient = jax.jit(jax.grad(lambda z: losses.standardize(z)[0]))(
    np.array([2.0, 2.0, -INF], np.float32)
  )
  assert jnp.isfinite(gradient).all()


def test_uld_pads_the_shorter_vocabulary():
  s, t = np.array([1.0, 2.0], np.float32), np.array([0.5, 2.0, -1.0, -INF], np.float32)
  padded = np.append(s, -INF).astype(np.float32)[[0, 2, 1, 2]]
  np.testing.assert_allclose(losses.uld(s, t), losses.uld(t, padded), rtol=1e-6)


def test_ofd_margin_is_the_mean_of_the_negative_part():
  scale, bias = np.array([1.0, -2.0, 0.5]), np.array([0.3, -1.0, 0.2])
  expected = [stats.truncnorm(-INF, -b / abs(a), b, abs(a)).mean() for a, b in zip(scale, bias)]
  np.testing.assert_allclose(losses.ofd_margin(scale, bias), expected, rtol=1e-5)
  edge = losses.ofd_margin(np.array([1.0, 0.0, 1.0]), np.array([4.0, -2.0, -1e4]))
  np.testing.assert_allclose(edge, [-3, -2, -1e4], rtol=1e-5)
  with pytest.raises(ValueError, match="margin"):
    losses.ofd(np.ones((2, 3)), np.ones((2, 3)), np.ones(2))


def test_vid_starts_at_its_variance():
  np.testing.assert_allclose(
    jax.nn.softplus(losses.vid_raw_scale(3, variance=2.0)) + 1e-5, 2, rtol=1e-6
  )
  with pytest.raises(ValueError, match="raw_scale"):
    losses.vid(np.ones((2, 3)), np.ones((2, 3)), np.ones(2))


def test_first_batch_sets_the_normalizers_of_crd():
  s, t = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
  args = (s, t, np.array([1, 2]), np.array([[3], [0]]))
  _, first = losses.crd(*args, losses.crd_state(jax.random.key(0), 5, 4))
  assert (first.normalizers > 0).all()
  _, second = losses.crd(*args, first)
  np.testing.assert_array_equal(first.normalizers, second.normalizers)
  _, empty = losses.crd(*args, losses.crd_state(jax.random.key(0), 5, 4), where=np.zeros(2, bool))
  np.testing.assert_array_equal(empty.normalizers, 0)
  with pytest.raises(ValueError, match="memory"):
    losses.crd(s[:, :2], t[:, :2], *args[2:], first)


def test_dino_has_no_teacher_gradient_and_skips_the_same_view():
  views = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradients(student, teacher):
    return losses.dino(student, teacher, np.zeros(4, np.float32))[0].sum()

  student, teacher = jax.device_get(gradients(views, views[:1]))
  np.testing.assert_array_equal(teacher, 0)
  assert (student[0] == 0).all() and (student[1] != 0).any()
  with pytest.raises(ValueError, match="U <= V"):
    losses.dino(views[:1], views[:1], np.zeros(4))


def test_box_weights_take_the_smallest_valid_box():
  boxes = np.array([[[0, 0, 3, 1], [0.5, 0.5, 1, 0.9], [0, 0, 3, 3]]], np.float32)
  weights = losses.box_weights(boxes, np.array([[True, True, False]]), height=3, width=4)
  np.testing.assert_allclose(weights[0], [[1 / 4, 1 / 4, 1 / 8, 1 / 8]] * 2 + [[0] * 4], rtol=1e-6)


def test_ignored_pixels_do_not_count():
  s, t = np.random.default_rng(0).normal(size=(2, 2, 3, 3, 4)).astype(np.float32)
  valid = np.random.default_rng(1).random(size=(2, 3, 3)) > 0.4
  expected = np.mean(losses.kl_divergence(s[valid], t[valid]))
  np.testing.assert_allclose(
    reduce.mean(losses.kl_divergence(s, t), jnp.asarray(valid)), expected, rtol=1e-5
  )


def test_rkd_distance_averages_over_equal_rows_too():
  student, teacher = np.float32([[0], [0], [1], [3]]), np.float32([[0], [2], [2], [3]])
  np.testing.assert_allclose(losses.rkd_distance(student, teacher), 0.259722, atol=1e-6)


def test_fsp_of_sequences():
  a, b = np.float32([[[1], [3]]]), np.float32([[[2], [4]]])
  # Flows are means over positions: (1 * 2 + 3 * 4) / 2 and (1 * 1 + 3 * 3) / 2.
  np.testing.assert_allclose(losses.fsp((a, b), (a, a)), [(7 - 5) ** 2])


def test_axis_is_the_class_axis():
  s, t = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
  for f in (losses.kl_divergence, losses.logit_mse, losses.binary_kl, losses.standardize):
    one = (t,) if f is losses.standardize else (s, t)
    np.testing.assert_allclose(
      np.moveaxis(f(*(x.T for x in one), axis=0), 0, -1), f(*one), rtol=1e-5
    )


@pytest.mark.parametrize("axis", [2, -3, "classes", None])
@pytest.mark.parametrize(
  "loss", [losses.kl_divergence, losses.logit_mse, losses.binary_kl, losses.hard_distillation]
)
def test_axis_that_the_logits_do_not_have_raises(loss, axis):
  z = np.zeros((4, 3), np.float32)
  with pytest.raises(ValueError, match=r"^axis: expected .* -2 to 1 .*, got"):
    loss(z, z, axis=axis)


def test_class_mask_of_indices_raises_with_the_mask_to_write():
  z = np.zeros((4, 3), np.float32)
  with pytest.raises(ValueError, match=r"^class_mask: .*np\.isin\(np\.arange\(3\), class_mask\)"):
    losses.kl_divergence(z, z, class_mask=[0, 2])
  with pytest.raises(ValueError, match=r"^class_mask: .*class_mask > 0"):
    losses.kl_divergence(z, z, class_mask=[1, 0, 1])
