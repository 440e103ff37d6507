"""configs/brain_tissue.py: methods, folds and splits, on files like nilearn's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brain_files import install
from brain_tissue import OBJECTIVES, BrainTissue

from distill_jax.jobs.config import ConfigError, check_config

SMALL = {"teacher_widths": (2, 2), "student_widths": (2, 2), "window": 8}


@pytest.fixture
def splits(tmp_path, monkeypatch):
  install(tmp_path, monkeypatch)
  return BrainTissue().data()


def outputs(model, batch):
  def run(batch):
    return model.apply(*model.init(jax.random.key(0), batch), batch, train=True, key=None)[0]

  return jax.eval_shape(run, batch)


def test_every_method_has_its_terms_on_crops(splits):
  config = BrainTissue(methods=tuple(OBJECTIVES), **SMALL)
  check_config(config)
  recipes = config.recipes()
  batch = {name: x[:2] for name, x in splits.train.arrays.items()}
  batch = jax.eval_shape(config.augment(), batch | {"view": np.zeros(2, np.int32)})
  assert batch["image"].shape == (2, 8, 8, 1) and batch["label"].shape == (2, 8, 8)
  networks = {"teacher": outputs(config.teacher(), batch), "": {}}
  student = outputs(config.student(), batch)
  for name in recipes:
    networks[name] = outputs(recipes[name].student, batch) if name == "folds" else student
    teacher = networks[recipes[name].teacher]
    objective = config.variant_objective(name)

    def terms(batch, student, teacher, objective=objective):
      variables = objective.init(jax.random.key(0), student, teacher)
      return objective.apply(
        *variables, student, teacher, batch, step=jnp.array(0), key=jax.random.key(0)
      )[0]

    names = set(jax.eval_shape(terms, batch, networks[name], teacher))
    assert names == TERMS[name]


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


def test_unknown_method_raises():
  with pytest.raises(ConfigError, match="methods: .*'emdk'.*'emkd'"):
    BrainTissue(methods=("emdk",)).validate()
