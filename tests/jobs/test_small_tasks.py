"""Runs the jobs of other tasks than classification: regression and several labels per example."""

import json
import re

import numpy as np
import pytest
from diabetes_regression import Diabetes
from digits_multi_label import DigitPairs

from distill_jax.jobs.cli import main

STEPS = ["--config.teacher_training.steps=4", "--config.student_training.steps=4"]
NETWORKS = {
  "diabetes_regression": ["--config.teacher_widths=(8,)", "--config.student_widths=(4,)"],
  "digits_multi_label": ["--config.teacher_width=0.03125", "--config.student_widths=(4,)"],
}


def test_labels_are_standardized_by_the_training_split():
  train, validation, test = Diabetes().data()
  label = train.arrays["label"]
  np.testing.assert_allclose([label.mean(), label.std()], [0, 1], atol=1e-5)
  assert abs(test.arrays["label"].mean()) > 1e-3, "the test split has a mean of its own"
  assert len(train) + len(validation) + len(test) == 442
  assert not set(train.ids) & set(validation.ids) | set(train.ids) & set(test.ids)


def test_pairs_show_the_digits_of_their_label():
  digits = super(DigitPairs, DigitPairs()).data().test
  test = DigitPairs().data().test
  image, label = test.arrays["image"], test.arrays["label"]
  assert image.shape == (len(digits), 8, 16, 1) and set(label.sum(1)) == {1, 2}
  np.testing.assert_array_equal(image[:, :, :8], digits.arrays["image"])
  assert (label[np.arange(len(label)), digits.arrays["label"]] == 1).all()
  rows = np.flatnonzero((digits.arrays["image"] == image[0, :, 8:]).all((1, 2, 3)))
  assert (label[0, digits.arrays["label"][rows]] == 1).all()


def run(name, folder, *flags):
  """Returns {metric name: better} and the scores of the three networks on the test split."""
  config = f"--config=configs/{name}.py"
  main([config, *STEPS, *NETWORKS[name], *flags, "--config.devices=1", f"--workdir={folder}"])
  results = json.loads((folder / "report" / "results.json").read_text())
  metrics = {metric["name"]: metric["better"] for metric in results["metrics"]}
  first = results["metrics"][0]["name"]
  scores = {entry["role"]: entry["scores"] for entry in results["entries"]}
  for entry in results["entries"]:  # Parts of near-equal size: their mean is near the score.
    parts = entry["leave_out"][first]
    assert np.mean(parts) == pytest.approx(scores[entry["role"]][first], rel=0.05)
    assert len(parts) > 20 and len(set(parts)) > 1
  assert list(scores) == ["teacher", "baseline", "student"]
  assert all(set(metrics) <= set(networks) for networks in scores.values())
  assert (folder / "report" / "curves.png").exists()
  return metrics, scores


def test_regression_job_is_chosen_and_headed_by_its_best_metric(tmp_path, capsys):
  metrics, scores = run("diabetes_regression", tmp_path, "--config.best=mae")
  assert list(metrics)[:2] == ["mae", "rmse"] and metrics["rmse"] == "min"
  correlations = {name: metrics[name] for name in list(metrics)[2:]}
  assert correlations == dict.fromkeys(("r2", "pearson", "spearman"), "max")
  assert all(entry["mae"] <= entry["rmse"] for entry in scores.values())
  printed = re.findall(r"(\S+): mae (\S+) on validation", capsys.readouterr().out)
  for network, error in printed:
    lines = (tmp_path / network / "metrics.jsonl").read_text().splitlines()
    errors = [record["mae"] for record in map(json.loads, lines) if "mae" in record]
    np.testing.assert_allclose(float(error), min(errors), rtol=1e-3)
  assert len(printed) == 3 and "in test mean absolute error" in report(tmp_path)


@pytest.mark.nightly
def test_multi_label_job_reports_its_scores(tmp_path):
  metrics, scores = run("digits_multi_label", tmp_path)
  assert list(metrics) == ["macro_f1", "micro_f1", "map", "exact", "nll"]
  assert all(0 <= entry["map"] <= 1 for entry in scores.values())
  assert "macro F1" in report(tmp_path)


def report(folder):
  return (folder / "report" / "report.md").read_text()
