"""Tables and curves over finished runs, and the sections of a Markdown file that they fill."""

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import ACCURACY, RMSE, headings, scored, tables

from distill_jax.report import stored, style, summary
from distill_jax.report.__main__ import main, run
from distill_jax.report.entries import Group
from distill_jax.report.runs import read, series
from distill_jax.storage import sealed_json

TEACHER = [0.98]
BASELINE, DISTILLED = [0.90, 0.92, 0.91], [0.93, 0.97, 0.92]


def make_run(
  folder,
  *,
  baseline=BASELINE,
  distilled=DISTILLED,
  variants=None,
  settings=None,
  name="digits",
  data="digits",
  test=359,
  metric=ACCURACY,
  **facts,
):
  """Writes a run's folder as the command line does, as far as a results page reads it."""
  settings = {"temperature": 4.0, "label_fraction": 1.0, "flip": False} | (settings or {})
  scores = {Group("teacher"): TEACHER, Group("baseline"): baseline}
  scores |= {Group("student", v): values for v, values in (variants or {"": distilled}).items()}
  entries = [
    scored(group.role, seed, value, group.variant, name=metric.name, cost={"parameters": 24e2})
    for group, values in scores.items()
    for seed, value in enumerate(values)
  ]
  identity = {
    "name": name,
    "command": f"python -m distill_jax --config=configs/{name}.py",
    "settings": settings,
  }
  identity |= {"overrides": [], "git": None, "device": "1 x cpu", "date": "2026-01-02"} | facts
  measured = {
    "seconds": {"teacher": 60.0, "student-0": 100.4},
    "data": {"name": data, "train": 9, "test": test},
  }
  (folder / "report").mkdir(parents=True)
  (folder / "run.json").write_text(sealed_json.dumps(identity))
  content = stored.as_json(entries, [metric], identity | measured)
  (folder / "report" / "results.json").write_text(sealed_json.dumps(content))
  return str(folder)


def fractions(tmp_path, values=(1.0, 0.01, 0.1)):
  return [
    make_run(
      tmp_path / f"few{value}",
      settings={"label_fraction": value},
      overrides=["temperature=2", f"label_fraction={value}"],
      baseline=[score - 0.1 * (1 - value) for score in BASELINE],
    )
    for value in values
  ]


def page(tmp_path, folders):
  main([*folders, f"--out={tmp_path / 'out'}"])
  return (tmp_path / "out" / "results.md").read_text()


def test_a_row_per_run_has_scores_and_origin(tmp_path):
  folders = [
    make_run(tmp_path / "a"),
    make_run(
      tmp_path / "b",
      settings={"flip": True},
      overrides=["flip=True"],
      git="0123456789ab with uncommitted changes",
    ),
  ]
  text = page(tmp_path, folders)
  ((first, second),) = tables(text)
  change = [b - a for a, b in zip(BASELINE, DISTILLED)]
  half = 4.3027 * 100 * statistics.stdev(change) / 3**0.5  # Student's t, 2 degrees of freedom
  assert first == {
    "Run": "digits",
    "Overrides": "",
    "Teacher": "98.00",
    "Baseline": f"91.00 ± {100 * statistics.stdev(BASELINE):.2f}",
    "Distilled": f"94.00 ± {100 * statistics.stdev(DISTILLED):.2f}",
    "Distilled − baseline": f"+3.00 ({3 - half:+.2f} to +{3 + half:.2f})".replace("-", "−"),
    "Seeds": "3",
    "Time": "3 min",
    "Device": "1 x cpu",
    "Git": "",
  }
  assert second["Overrides"] == "flip=True" and second["Git"] == "012345678 (changed)"
  assert (
    "359 examples" in text and "over 3 seeds" in text and "teacher 2,400, student 2,400" in text
  )
  assert f"python -m distill_jax.report {folders[0]} {folders[1]}" in text


def test_runs_that_differ_in_one_number_are_a_series(tmp_path):
  text = page(tmp_path, fractions(tmp_path))
  runs, few = tables(text)
  assert [row["Overrides"] for row in runs] == [
    rf"temperature=2, label\_fraction={v}" for v in ("1.0", "0.01", "0.1")
  ]
  assert [row[r"label\_fraction"] for row in few] == ["0.01", "0.1", "1"]
  assert [row["Baseline"].split()[0] for row in few] == ["81.10", "82.00", "91.00"]
  assert [row["Distilled − baseline"].split()[0] for row in few] == ["+12.90", "+12.00", "+3.00"]
  assert r"## digits, temperature=2: test accuracy against label\_fraction" in text
  assert "](digits-label_fraction.png)" in text
  assert np.ptp(imread(tmp_path / "out" / "digits-label_fraction.png")) > 0


@pytest.mark.parametrize(
  "values, scale",
  [
    ((1.0, 0.01, 0.1), "log"),
    ((0.5, 0.1, 1.0), "log"),
    ((4.0, 1.0, 2.0), "linear"),
    ((0, 1.0, 30), "linear"),
  ],
)
def test_curve_is_at_the_values_with_their_spread(tmp_path, values, scale):
  (varied,) = series([read(Path(folder)) for folder in fractions(tmp_path, values)])
  picture = summary.curve(varied)
  (axes,) = picture.axes
  assert axes.get_xscale() == scale
  assert [text.get_text() for text in axes.get_xticklabels()] == [f"{v:g}" for v in sorted(values)]
  expected = {
    "Teacher": [98.0] * 3,
    "Baseline": [91 - 10 * (1 - v) for v in sorted(values)],
    "Student distilled": [94.0] * 3,
  }
  for container, look in zip(axes.containers, style.LOOKS.values()):
    x, y = container.lines[0].get_xydata().T
    np.testing.assert_allclose(y, expected[container.get_label()])
    np.testing.assert_allclose(x, sorted(values), rtol=0.05, atol=0.01 * max(values))
    assert container.lines[0].get_color() == look.color
    segments = container.lines[2][0].get_segments()
    if container.get_label() == "Teacher":
      assert not any(len(segment) for segment in segments)
      continue
    spread = statistics.stdev(BASELINE if container.get_label() == "Baseline" else DISTILLED)
    np.testing.assert_allclose(
      [segment[1, 1] - segment[0, 1] for segment in segments], 200 * spread
    )


@pytest.mark.parametrize(
  "changes, fields",
  [
    ([{"temperature": 2.0}, {"temperature": 8.0}], ["temperature"]),
    ([{"temperature": 2.0}, {"temperature": 8.0, "flip": True}], []),
    ([{"flip": True}, {"flip": False}], []),
    ([{"best": "accuracy"}, {"best": "loss"}], []),
    ([{"optimizer": {"rate": 1}}, {"optimizer": {"rate": 2.5}}], ["optimizer.rate"]),
    ([{"widths": [32]}, {"widths": [64]}], []),
    ([{}, {}], []),
    (
      [{"temperature": t, "label_fraction": f} for t in (1, 2) for f in (0.1, 1)],
      ["temperature", "temperature", "label_fraction", "label_fraction"],
    ),
  ],
)
def test_a_series_differs_in_one_number_only(tmp_path, changes, fields):
  folders = [
    make_run(tmp_path / str(number), settings=change) for number, change in enumerate(changes)
  ]
  varied = series([read(Path(folder)) for folder in folders])
  assert [one.field for one in varied] == fields
  assert all(len(one.runs) == 2 for one in varied)


def test_series_of_one_field_do_not_share_a_picture(tmp_path):
  grid = [(t, f) for t in (1, 2) for f in (0.1, 1)]
  folders = [
    make_run(tmp_path / f"{t}-{f}", settings={"temperature": t, "label_fraction": f})
    for t, f in grid
  ]
  text = page(tmp_path, folders)
  names = [
    "digits-temperature",
    "digits-temperature-2",
    "digits-label_fraction",
    "digits-label_fraction-2",
  ]
  assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == sorted(names)
  assert all(f"]({name}.png)" in text for name in names)


def test_data_sets_have_separate_tables(tmp_path):
  other = {"data": "fashion_mnist", "settings": {"label_fraction": 0.1}}
  folders = [
    make_run(tmp_path / "a"),
    make_run(tmp_path / "b", **other),
    make_run(tmp_path / "c", test=90),
  ]
  text = page(tmp_path, folders)
  assert headings(text) == ["digits", r"fashion\_mnist", "digits", "Made by"]
  assert [len(rows) for rows in tables(text)] == [1, 1, 1]
  assert not list((tmp_path / "out").glob("*.png"))
  assert series([read(Path(folder)) for folder in folders]) == []


def test_several_students_have_a_row_column_and_curve_each(tmp_path):
  for value in (0.1, 1.0):
    variants = {"generation 1": DISTILLED, "generation 2": [0.95, 0.96, 0.97]}
    make_run(tmp_path / str(value), settings={"label_fraction": value}, variants=variants)
  text = page(tmp_path, [str(tmp_path / "0.1"), str(tmp_path / "1.0")])
  runs, few = tables(text)
  assert [row["Run"] for row in runs] == ["digits: generation 1", "digits: generation 2"] * 2
  assert [row["Distilled"].split()[0] for row in runs] == ["94.00", "96.00"] * 2
  assert few[0]["Distilled: generation 2"].split()[0] == "96.00"
  assert few[0]["generation 1 − baseline"].split()[0] == "+3.00"
  (varied,) = series([read(tmp_path / name) for name in ("0.1", "1.0")])
  titles = ["Teacher", "Baseline", "Distilled: generation 1", "Distilled: generation 2"]
  assert [container.get_label() for container in summary.curve(varied).axes[0].containers] == titles


@pytest.mark.parametrize(
  "change, cells, words",
  [
    (
      {"baseline": [0.9], "distilled": [0.8]},
      ["90.00", "80.00", "−10.00", "1"],
      "one seed, so there is no spread",
    ),
    ({"baseline": [], "distilled": []}, ["–", "–", "–", "–"], "(359 examples)"),
    (
      {"baseline": [0.9], "distilled": [0.8, 0.9]},
      ["90.00", "85.00 ± 7.07", "−10.00", "–"],
      "over seeds",
    ),
  ],
)
def test_missing_scores_are_dashes(tmp_path, change, cells, words):
  text = page(tmp_path, [make_run(tmp_path / "a", **change)])
  ((row,),) = tables(text)
  assert [row[k] for k in ("Baseline", "Distilled", "Distilled − baseline", "Seeds")] == cells
  assert words in text


README = """# Title

<!-- results: digits -->
| typed | by hand |
<!-- end -->
between
<!-- results: few.labels -->
<!-- end -->
after
"""


def test_sections_of_a_readme_are_replaced_and_nothing_else(tmp_path):
  readme = tmp_path / "README.md"
  readme.write_text(README)
  single, few = make_run(tmp_path / "a", baseline=[0.5]), fractions(tmp_path)
  commands = [
    [single, "--section=digits"],
    [*few, make_run(tmp_path / "z", name="z"), "--section=few.labels"],
  ]
  for _ in range(2):
    for command in commands:
      main([*command, f"--readme={readme}"])
  text = readme.read_text()
  start, first, rest = text.partition("<!-- results: digits -->\n")
  inside, _, rest = rest.partition("<!-- end -->\nbetween\n<!-- results: few.labels -->\n")
  second, _, after = rest.partition("<!-- end -->\n")
  assert (start, after) == ("# Title\n\n", "after\n") and "typed" not in text
  ((row,),) = tables(inside)
  assert row["Baseline"] == "50.00"
  assert inside.startswith(f"<!-- python -m distill_jax.report {single} --section=digits --readme=")
  few_labels, others = tables(second)
  assert [row[r"label\_fraction"] for row in few_labels] == ["0.01", "0.1", "1"]
  assert [row["Run"] for row in others] == ["z"]
  assert "![" not in text


def test_metrics_have_separate_tables_and_their_own_units(tmp_path):
  depths = [
    make_run(tmp_path / f"d{t}", metric=RMSE, settings={"temperature": t}) for t in (1.0, 2.0)
  ]
  folders = [make_run(tmp_path / "a"), *depths]
  text = page(tmp_path, folders)
  assert headings(text)[:2] == ["digits: accuracy", "digits: RMSE"]
  (accuracy,), depth, by_temperature = tables(text)
  assert accuracy["Distilled"] == "94.00 ± 2.65"
  assert depth[0]["Distilled − baseline"] == "+0.030 (−0.020 to +0.080)"
  assert by_temperature[0]["Baseline"] == "0.910 ± 0.010"
  assert "Test RMSE in mm (359 examples)" in text and "test RMSE against temperature" in text
  (varied,) = series([read(Path(folder)) for folder in folders])
  assert len(varied.runs) == 2
  assert summary.curve(varied).axes[0].get_ylabel() == "test RMSE, mm"


@pytest.mark.parametrize(
  "text, section, message",
  [
    ("nothing", "digits", r"--section: .* 0 times$"),
    (README, "digit", "--section: .* 0 times.*'digits'"),
    (README + README, "digits", "--section: .* 2 times"),
    (README.replace("<!-- end -->", "", 1), "digits", "--section: .*<!-- end -->"),
    ("<!-- results: digits -->", "digits", "--section: .*<!-- end -->"),
  ],
)
def test_missing_markers_are_reported_before_any_file_is_written(tmp_path, text, section, message):
  readme = tmp_path / "README.md"
  readme.write_text(text)
  out = tmp_path / "out"
  flags = [f"--readme={readme}", f"--section={section}", f"--out={out}"]
  with pytest.raises(ValueError, match=message):
    main([make_run(tmp_path / "a"), *flags])
  assert readme.read_text() == text and not out.exists()


def overwrite(name, content):
  def change(folder):
    path = folder / name
    text = content if isinstance(content, str | None) else sealed_json.dumps(content)
    path.unlink() if text is None else path.write_text(text)

  return change


RESULTS = "report/results.json"
NO_ENTRIES = {"run": {}, "metrics": [], "entries": []}
ROW = {"role": "x", "variant": "", "seed": 0, "scores": {}, "leave_out": {}}
UNKNOWN_ROLE = NO_ENTRIES | {"entries": [ROW]}
OLD_METRIC = NO_ENTRIES | {"metrics": [{"name": "a"}]}


@pytest.mark.parametrize(
  "change, message",
  [
    (overwrite("run.json", None), r"run.json.*\n.*--workdir=.*/a$"),
    (overwrite("run.json", "{"), "run.json is corrupt"),
    (overwrite("run.json", "[]"), "run.json is corrupt: .* list"),
    (overwrite("run.json", '{"name": "a"}'), "run.json is corrupt: .*checksum"),
    (overwrite(RESULTS, None), r"report.*\n  .*--config=configs/digits.py --stages=report"),
    (overwrite(RESULTS, {}), r"results.json .*'run'.*\n.*--stages=report"),
    (overwrite(RESULTS, NO_ENTRIES), "results.json .*entries"),
    (overwrite(RESULTS, UNKNOWN_ROLE), "results.json .*'x'"),
    (overwrite(RESULTS, OLD_METRIC), "results.json .*'title'"),
  ],
)
def test_a_folder_without_a_report_is_named_with_the_next_step(tmp_path, change, message):
  folder = make_run(tmp_path / "a")
  change(tmp_path / "a")
  with pytest.raises(ValueError, match=message):
    main([folder, f"--out={tmp_path / 'out'}"])
  assert not (tmp_path / "out").exists()


def test_the_nearest_runs_are_suggested(tmp_path):
  folders = [make_run(tmp_path / name) for name in ("a", "b")]
  for folder, runs in [(tmp_path, " ".join(folders)), (tmp_path / "a" / "report", folders[0])]:
    with pytest.raises(ValueError, match=rf"RUN: .*{runs}\?"):
      main([str(folder), "--out=x"])
  with pytest.raises(ValueError, match="RUN: .*no folder"):
    main([str(tmp_path / "c"), "--out=x"])


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "--out=FOLDER"),
    (["--readme=x"], "--section=NAME"),
    (["--out=x", "--section=x"], "--readme=FILE"),
    (["--out=x", "SELF"], "RUN: "),
  ],
)
def test_flags_that_do_not_fit_are_rejected(tmp_path, monkeypatch, capsys, flags, message):
  folder = make_run(tmp_path / "a")
  arguments = [folder, *(folder if flag == "SELF" else flag for flag in flags)]
  monkeypatch.setattr(sys, "argv", ["report", *arguments])
  with pytest.raises(SystemExit) as stopped:
    run()
  assert stopped.value.code == 2 and message in capsys.readouterr().err
