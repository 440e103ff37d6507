"""configs/brain_tissue.py: methods, folds and splits, on files like nilearn's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brain_files import install
from brain_tissue import OBJECTIVES, BrainTissue
from brain_tissue_volumes import BrainVolumes, as_volumes

from distill_jax.jobs.config import ConfigError, check_config

SMALL = {"teacher_widths": (2, 2), "student_widths": (2, 2), "window": 8}


@pytest.fixture(scope="module")
def nilearn(tmp_path_factory):
  with pytest.MonkeyPatch.context() as monkeypatch:
    yield install(tmp_path_factory.mktemp("packages"), monkeypatch)


@pytest.fixture(scope="module")
def splits(nilearn):
  return BrainTissue().data()


def outputs(model, batch):
  def run(batch):
    return model.apply(*model.init(jax.random.key(0), batch), batch, train=True, key=None)[0]

  return jax.eval_shape(run, batch)


def terms_of_methods(config, splits):
  """Returns the names of each method's terms, from their shapes on a batch of crops."""
  check_config(config)
  recipes = config.recipes()
  batch = {name: x[:2] for name, x in splits.train.arrays.items()}
  batch = jax.eval_shape(config.augment(), batch | {"view": np.zeros(2, np.int32)})
  networks = {"teacher": outputs(config.teacher(), batch), "": {}}
  student = outputs(config.student(), batch)
  assert student["logits"].shape == (*batch["label"].shape, 3)
  names = {}
  for name in recipes:
    networks[name] = outputs(recipes[name].student, batch) if name == "folds" else student
    objective = config.variant_objective(name)

    def terms(batch, student, teacher, objective=objective):
      variables = objective.init(jax.random.key(0), student, teacher)
      return objective.apply(
        *variables, student, teacher, batch, step=jnp.array(0), key=jax.random.key(0)
      )[0]

    names[name] = set(jax.eval_shape(terms, batch, networks[name], networks[recipes[name].teacher]))
  return names


@pytest.mark.integration
def test_every_method_has_its_terms_on_crops(splits):
  assert terms_of_methods(BrainTissue(methods=tuple(OBJECTIVES), **SMALL), splits) == TERMS


@pytest.mark.integration
def test_every_method_has_its_terms_on_volumes(nilearn):
  config = BrainVolumes(methods=("kd", "emkd"), **SMALL)
  assert terms_of_methods(config, config.data()) == {name: TERMS[name] for name in ("kd", "emkd")}


def test_volumes_are_neighboring_slices_of_a_slab(splits):
  volumes = [as_volumes(source) for source in splits]
  assert [len(source) for source in volumes] == [15, 2, 3]
  for source in volumes:
    assert source.arrays["image"].shape[1:] == (8, 160, 144, 1)
    positions = source.arrays["image"][:, :, 0, 0, 0] * 255
    np.testing.assert_allclose(positions, source.ids[:, None] + np.arange(8), rtol=1e-6)


TERMS = {
  "kd": {"hard", "soft"},
  "cwd_logits": {"hard", "soft"},
  "cwd": {"hard", "maps"},
  "pearson": {"hard", "maps"},
  "emkd": {
    *("hard", "soft", "importance_encoder_0", "importance_decoder_0"),
    *("regions_encoder_0", "regions_decoder_0"),
  },
  "folds": {f"fold_{k}" for k in range(5)},
  "kd.folds": {"hard", "soft"},
}


def test_each_fold_leaves_one_slab_of_training_out(splits):
  arrays = splits.train.arrays
  folds = np.stack([arrays[f"fold_{k}"] for k in range(5)])
  np.testing.assert_array_equal(folds.sum(0), 4)
  for k, fold in enumerate(folds):
    assert set(arrays["slab"][fold == 0]) == {2 * k}
  assert not set(splits.test.arrays["slab"]) & set(arrays["slab"])


@pytest.mark.parametrize("config", [BrainTissue, BrainVolumes])
def test_configs_are_complete(config):
  check_config(config())


def test_unknown_method_raises():
  with pytest.raises(ConfigError, match="methods: .*'emdk'.*'emkd'"):
    BrainTissue(methods=("emdk",)).validate()
