"""Learning curves, and scores against the number of parameters."""

import statistics

import numpy as np
import pytest
from report_cases import ACCURACY, LEVELS, RMSE, make_entries, make_history, make_variants, scored

from distill_jax.report import plots, style
from distill_jax.report.entries import Group, groups, over_seeds
from distill_jax.types import Metric


def test_curves_are_means_with_bands_over_the_common_steps():
  def history(steps, losses):
    return [{"step": s, "phase": "train", "loss": v} for s, v in zip(steps, losses)]

  repeated = history([0, 10, 20, 10], [4.0, 9.0, 2.0, 3.0])  # a resumed run logs step 10 again
  not_finite = history([5, 10, 15, 30], [1.0, 1.0, float("nan"), 1.0])
  entries = [
    scored("student", 0, 0.9, history=repeated),
    scored("student", 1, 0.9, history=not_finite),
    scored("baseline", 0, 0.9, history=history([7], [2.0])),
  ]
  (left,) = plots.learning_curves(entries, ACCURACY).axes
  baseline, student = left.lines
  np.testing.assert_allclose(baseline.get_xydata(), [[7, 2]])
  np.testing.assert_allclose(student.get_xydata(), [[5, 2.25], [10, 2], [20, 1.5]])
  assert left.get_yscale() == "log"
  (band,) = left.collections
  top = band.get_paths()[0].vertices[:, 1].max()
  assert top == pytest.approx(2.25 + statistics.stdev([3.5, 1.0]))
  assert plots.learning_curves([scored("student", 0, 0.9)], ACCURACY) is None


def test_panels_stand_side_by_side_or_one_under_the_other():
  for page, rows, columns in ((style.PAGE, 1, 2), (style.PHONE, 2, 1)):
    drawing = plots.learning_curves(make_entries(), ACCURACY, page)
    grid = drawing.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, columns) and drawing.get_figwidth() == page


def test_loss_below_0_has_a_linear_axis():
  history = [{"step": 1, "phase": "train", "loss": -1.0}]
  drawing = plots.learning_curves([scored("student", 0, 0.9, history=history)], ACCURACY)
  assert drawing.axes[0].get_yscale() == "linear"


def test_each_role_has_its_own_look():
  drawing = plots.learning_curves(make_entries(), ACCURACY)
  for axes in drawing.axes:
    colors = [look.color for look in style.LOOKS.values()]
    assert [line.get_color() for line in axes.lines] == colors
    assert len({line.get_linestyle() for line in axes.lines}) == 3
  expected = [100 * (1 - 1 / s - 0.01) for s in (10, 20, 30)]
  np.testing.assert_allclose(drawing.axes[1].lines[1].get_ydata(), expected)
  assert drawing.axes[1].get_ylabel() == "accuracy, %"


def test_validation_curve_is_of_the_first_metric():
  history = make_history(name="rmse")
  drawing = plots.learning_curves([scored("student", 0, 1.0, name="rmse", history=history)], RMSE)
  axes = drawing.axes[1]
  assert axes.get_ylabel() == "RMSE, mm" and axes.get_title(loc="center") == "Validation RMSE"
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [1 - 1 / s for s in (10, 20, 30)])


def test_scores_are_drawn_at_the_number_of_parameters():
  entries = make_entries(history=False)
  (axes,) = plots.score_against_parameters(entries, ACCURACY).axes
  assert axes.get_xscale() == "log" and axes.get_ylim()[1] <= 101
  means = [container.lines[0].get_xydata()[0] for container in axes.containers]
  np.testing.assert_allclose([m[0] for m in means], [8000, 1000, 1000], rtol=0.06)
  expected = [100 * over_seeds(entries, Group(role), "accuracy").mean for role in LEVELS]
  np.testing.assert_allclose([m[1] for m in means], expected)
  assert plots.score_against_parameters([scored("student", 0, 0.9)], ACCURACY) is None


def test_axis_of_percentages_ends_at_100_unless_scores_exceed_it():
  def top(metric, values):
    entries = [
      scored("student", seed, value, name=metric.name, cost={"parameters": 10.0})
      for seed, value in enumerate(values)
    ]
    return plots.score_against_parameters(entries, metric).axes[0].get_ylim()[1]

  assert top(ACCURACY, [0.9, 1.0]) <= 101
  assert top(ACCURACY, [0.9, 1.4]) > 140
  assert top(RMSE, [0.9, 140.0]) > 140


def test_variants_differ_in_every_picture():
  entries = make_variants("abcde", history=True)
  looks = style.looks(groups(entries)).values()
  assert len({look.color for look in looks}) == len({look.marker for look in looks}) == 7
  titles = ["Teacher", "Baseline", *(f"Distilled: {name}" for name in "abcde")]
  curves = plots.learning_curves(entries, ACCURACY)
  sizes = plots.score_against_parameters(entries, ACCURACY)
  for drawing in (curves, sizes):
    (legend,) = drawing.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.removesuffix(": 1,000").removesuffix(": 8,000") for text in texts] == titles
  containers = sizes.axes[0].containers
  assert len({container.lines[0].get_xdata()[0] for container in containers}) == 7


def test_terms_validation_loss_and_learning_rate_have_panels():
  train = {"step": 5, "phase": "train", "loss": 3.0, "hard": 1.0, "soft": -2.0, "accuracy": 0.5}
  train |= {"grad_norm": 9.0, "examples_per_second": 9.0, "learning_rate": 0.1}
  validation = {"step": 5, "phase": "validation", "loss": 4.0, "accuracy": 0.5}
  entries = [scored("student", 0, 0.9, history=[train, validation])]
  entries.append(scored("baseline", 0, 0.9, history=[{"step": 5, "phase": "train", "hard": 7.0}]))
  drawing = plots.term_curves(entries, [ACCURACY])
  panels = {axes.get_title(): axes for axes in drawing.axes}
  values = {title: [line.get_ydata()[0] for line in axes.lines] for title, axes in panels.items()}
  assert values == {
    "Validation loss": [4.0],
    "Training: hard": [7.0, 1.0],
    "Training: soft": [-2.0],
    "Learning rate": [0.1],
  }
  scales = [axes.get_yscale() for axes in drawing.axes]
  assert scales == ["log", "log", "linear", "linear"]
  assert (drawing.axes[0].get_gridspec().nrows, len(drawing.axes)) == (2, 4)
  unlabeled = [Metric(name, name, better="min") for name in ("loss", "hard", "soft")]
  titles = [axes.get_title() for axes in plots.term_curves(entries, unlabeled).axes]
  assert titles == ["Training: hard", "Training: soft", "Learning rate"]
  assert plots.term_curves(entries, [ACCURACY], style.PHONE).get_figwidth() == style.PHONE
  assert plots.term_curves([scored("student", 0, 0.9)], [ACCURACY]) is None
