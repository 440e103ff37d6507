"""Labels and indices that are no class: NaN where they are, never a loss of zero."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import losses

from distill_jax import losses as public
from distill_jax import reduce

CLASSES = 3
PER_LABEL = {
  "dkd": {},
  "nkd": {},
  "wsld": {},
  "ofa": {"eps": 1.5},
  "minifinetuning": {},
  "minillm_single_step": {"teacher_mixing": 0.2},
}
SPARSE = (
  "sparse_kl",
  "sparse_kl_conditional",
  "sparse_kl_smoothed",
  "sparse_jensen_shannon",
  "sampled_cross_entropy",
)
# In test_linear.py: they raise, and are NaN in compiled code.
LINEAR = {"linear_kl", "linear_sparse_kl", "linear_cross_entropy"}
REGIONS = ("ifv", "region_affinity")
LAST_ROW = np.array([True, True, True, False])


@pytest.fixture
def logits():
  return np.random.default_rng(0).normal(size=(2, 4, CLASSES)).astype(np.float32)


def test_every_loss_with_labels_or_indices_is_tried():
  tried = {*PER_LABEL, *SPARSE, *LINEAR, "uskd", *REGIONS, "crd", "cirkd", "rnnt_three_way"}
  functions = inspect.getmembers(public, inspect.isfunction)
  named = {"labels", "targets", "indices"}
  assert tried == {name for name, f in functions if named & set(inspect.signature(f).parameters)}


@pytest.mark.parametrize("name", PER_LABEL)
def test_labels_outside_the_classes_are_nan(name, logits):
  f = functools.partial(getattr(public, name), **PER_LABEL[name])
  for invalid in (np.ones(4), np.ones((4, CLASSES), int)):
    with pytest.raises(ValueError, match="labels"):
      f(*logits, invalid)
  labels = np.array([0, CLASSES, -2, 2])
  where = np.isin(labels, range(CLASSES))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def mean(s):
    values = f(s, logits[1], labels)
    return reduce.mean(values, jnp.asarray(where)), values

  (_, values), gradient = jax.device_get(mean(logits[0]))
  np.testing.assert_array_equal(np.isnan(values), ~where)
  # Labels that the mean leaves out may be anything.
  assert np.isfinite(gradient).all() and (gradient[1:3] == 0).all()


@pytest.mark.parametrize("outside", [CLASSES, -2])
def test_uskd_is_nan_unless_the_row_is_masked(outside, logits):
  labels = np.array([0, 1, outside, 2])
  where = labels != outside
  assert np.isnan(losses.uskd(*logits, labels, where=np.ones(4, bool)))
  kept = losses.uskd(*(x[[0, 1, 3, 3]] for x in logits), labels[[0, 1, 3, 3]], where=LAST_ROW)
  np.testing.assert_allclose(losses.uskd(*logits, labels, where=where), kept, rtol=1e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_indices_outside_the_classes_are_nan(name, logits):
  s, t = logits
  is_sampled = name == "sampled_cross_entropy"
  targets = public.sample_k(jax.random.key(0), t, 2) if is_sampled else public.top_k(t, 2)
  indices = np.array(targets.indices)
  indices[1:3, 0] = CLASSES, -2
  values = getattr(losses, name)(s, dataclasses.replace(targets, indices=indices))
  np.testing.assert_array_equal(np.isnan(values), [False, True, True, False])


@pytest.mark.parametrize("name", REGIONS)
def test_regions_take_only_classes_negative_and_ignored_labels(name, logits):
  loss = getattr(losses, name)
  maps = logits.reshape(2, 2, 2, 1, CLASSES)
  labels = np.array([[[0], [255]], [[0], [1]]])
  options = {"num_classes": 2, "ignore_label": 255}
  assert np.isfinite(loss(*maps, labels, **options)).all()
  assert np.isfinite(loss(*maps, np.where(labels == 1, -2, labels), **options)).all()
  np.testing.assert_array_equal(
    np.isnan(loss(*maps, np.where(labels == 1, 2, labels), **options)), [False, True]
  )
  assert np.isnan(loss(*maps, labels, num_classes=2, ignore_label=-100)[0])
  background = loss(*maps, labels % 255, num_classes=2, ignore_label=0)
  expected = loss(*maps, np.where(labels % 255 == 0, -1, labels), num_classes=2)
  np.testing.assert_array_equal(background, expected)


@pytest.mark.parametrize(("outside", "is_negative"), [(5, False), (-1, False), (5, True)])
def test_crd_indices_outside_the_memory_change_nothing(outside, is_negative, logits):
  s, t = logits[:, :2]
  state = public.crd_state(jax.random.key(0), 5, CLASSES)
  indices, negatives = np.array([1, 2]), np.array([[3], [0]])
  (negatives[1] if is_negative else indices)[-1] = outside
  values, after = losses.crd(s, t, indices, negatives, state)
  np.testing.assert_array_equal(np.isnan(values), [False, True])
  valid = np.array([True, False])
  expected, alone = losses.crd(s, t, np.array([1, 2]), np.array([[3], [0]]), state, where=valid)
  np.testing.assert_allclose(values[0], expected[0], rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), after, alone)


def test_transducer_labels_outside_or_blank_are_nan():
  z = jnp.zeros((1, 1, 3, 4))
  for label in (0, 4, -2):
    nodes = losses.rnnt_three_way(z, z, jnp.array([[label, 2]]))
    np.testing.assert_array_equal(jnp.isnan(nodes[0, 0]), [True, False, False])
  with pytest.raises(ValueError, match="labels"):
    losses.rnnt_three_way(z, z, jnp.array([[1]]))
  with pytest.raises(ValueError, match="blank"):
    losses.rnnt_three_way(z, z, jnp.array([[1, 2]]), blank=4)
