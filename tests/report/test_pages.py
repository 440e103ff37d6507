"""The report of one run: its files, order and what it leaves out."""

import base64
import io
import json

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import (
  CLASSIFICATION,
  LANGUAGE,
  PERPLEXITY,
  REFERENCES,
  REGRESSION,
  ROLES,
  ROWS,
  cells,
  headings,
  make_entries,
  make_history,
  make_task,
  scored,
  write,
)
from test_document import Tags

from distill_jax.report import runs, stored, style
from distill_jax.report.document import Numbers
from distill_jax.storage import sealed_json

RUN = {
  "name": "tiny & <i>small</i>",
  "command": "distill-jax --config=x.py --config.a=`b`",
  "config": "configs/x.py",
  "settings": {"rate": 0.1, "student": {"widths": (8, 4), "name": None}},
  "overrides": ["a=`b`"],
  "versions": {"jax": "0.10.2"},
  "git": "abc123",
  "device": "cpu",
  "seconds": {"teacher": 1.26},
  "stopped": {"teacher": "after step 8: patience"},
  "data": {"train": 100, "test": 359},
  "date": "2025-01-02",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("new") / "run" / "report"
  entries = make_entries()
  before = dict(matplotlib.rcParams)
  html, markdown, numbers = write(folder, entries, run=RUN, names=["a", "b"])
  assert dict(matplotlib.rcParams) == before
  return folder, entries, html, markdown, numbers


def test_html_loads_nothing_and_embeds_the_pictures(written):
  folder, _, html, *_ = written
  tags = Tags(html).tags
  assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "i"}
  sources = [a[key] for _, a in tags for key in ("src", "href", "srcset") if key in a]
  pictures = [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources]
  # Each one after the one for a phone.
  assert set(pictures[1::2]) == {path.read_bytes() for path in folder.glob("*.png")}
  widths = [imread(io.BytesIO(png)).shape[1] for png in pictures[::2]]
  assert max(widths) <= 160 * style.PHONE
  assert "url(" not in html and "@import" not in html and "://" not in html


def test_every_file_is_written_and_every_picture_linked(written):
  folder, _, _, markdown, _ = written
  names = sorted(path.name for path in folder.iterdir())
  pictures = ["curves.png", "parameters.png", "terms.png"]
  assert names == sorted([*pictures, "report.html", "report.md", "results.json"])
  assert all(f"]({name})" in markdown for name in pictures)
  assert all(np.ptp(imread(folder / name)) > 0 for name in pictures)


def test_sections_have_task_blocks_after_the_curves(written):
  *_, markdown, _ = written
  verdict, table, curves, blocks, size, origin = (
    markdown.index(text)
    for text in (
      "Over 3 seeds",
      "| Seeds |",
      "## Learning curves",
      r"7 entries, 80 labels, \['a', 'b'\]",
      "## Accuracy against size",
      "## What was run",
    )
  )
  assert verdict < table < curves < blocks < size < origin
  assert "359 test examples" in markdown


def test_run_is_described_and_can_be_repeated(written):
  _, _, html, markdown, _ = written
  text = Tags(html).text
  facts = "configs/x.py", "abc123", "2025-01-02", "student.widths", "(8, 4)", "0.10.2"
  assert all(fact in text for fact in facts)
  assert "| Seconds: teacher | 1.3 |" in markdown
  assert "| Stopped: teacher | after step 8: patience |" in markdown
  assert "```\ndistill-jax --config=x.py --config.a=`b`\n```" in markdown
  assert RUN["name"] in text and "tiny &amp; &lt;i&gt;small" in markdown


def test_json_has_scores_metrics_and_the_tasks_numbers(written):
  _, entries, *_, numbers = written
  assert [metric["name"] for metric in numbers["metrics"]] == [
    "accuracy",
    "f1",
    "nll",
    "ece",
    "agreement",
  ]
  assert [row["scores"] for row in numbers["entries"]] == [
    pytest.approx(entry.values) for entry in entries
  ]
  assert numbers["over_seeds"]["student"]["accuracy"]["number"] == 3
  assert numbers["over_seeds"]["teacher"]["accuracy"]["deviation"] is None
  gains = [entries[4 + seed].scores["f1"] - entries[1 + seed].scores["f1"] for seed in range(3)]
  gain = numbers["distilled_minus_baseline"]["student"]["f1"]
  assert gain["mean"] == pytest.approx(np.mean(gains))
  assert gain["deviation"] == pytest.approx(np.std(gains, ddof=1))
  assert numbers["classes"] == [0.5, None]
  assert numbers["run"]["settings"]["student"] == {"widths": [8, 4], "name": None}


def test_a_written_report_is_read_back(written):
  folder, entries, *_ = written
  (folder.parent / "run.json").write_text(sealed_json.dumps({}))
  run = runs.read(folder.parent)
  assert (run.name, run.data) == (RUN["name"], ("unknown data", 359))
  assert tuple(run.metrics) == CLASSIFICATION.metrics[:5]
  assert [(e.group, e.seed, e.values) for e in run.entries] == [
    (e.group, e.seed, e.values) for e in entries
  ]


def test_numbers_that_are_not_finite_are_null():
  entry = scored("student", 0, 0.5, cost={"flops": np.float32("nan")})
  facts = {"x": float("inf"), "shape": (1, np.int64(2))}
  content = stored.as_json([entry], CLASSIFICATION.metrics[:1], facts)
  plain = json.loads(json.dumps(content, allow_nan=False))
  assert plain["entries"][0]["scores"] == {"accuracy": 0.5, "flops": None}
  assert plain["run"] == {"x": None, "shape": [1, 2]}
  assert stored.from_json(plain)[1][0].values == {"accuracy": 0.5}
  with pytest.raises(ValueError, match="'entries'"):
    stored.as_json([entry], CLASSIFICATION.metrics[:1], {}, [Numbers("entries", [])])


HARD = {
  "one seed, no teacher": {"seeds": (4,), "roles": ROLES[1:]},
  "no baseline": {"seeds": (4, 5), "roles": ("teacher", "student")},
  "only a teacher": {"seeds": (4,), "roles": ("teacher",), "history": False, "cost": {}},
}


@pytest.mark.parametrize("case", HARD)
def test_missing_parts_are_left_out(case, tmp_path):
  _, markdown, _ = write(tmp_path, make_entries(**HARD[case]))
  rows = cells(markdown)
  is_bare = case == "only a teacher"
  assert ("Agreement with the teacher, % ↑" in rows) == (not is_bare)
  assert not any("no entry has" in title for title in rows)
  assert ("Distilled − baseline" in rows["Seeds"]) == (case == "one seed, no teacher")
  assert ("Learning curves" in headings(markdown)) == (not is_bare)
  assert ("Accuracy against size" in headings(markdown)) == (not is_bare)
  assert ("one seed, so there is no spread" in markdown) == (case != "no baseline")
  spread = rows["Test accuracy, % ↑"].get("Student distilled", "")
  assert ("±" in spread) == (case == "no baseline")


@pytest.mark.parametrize("task", [REGRESSION, LANGUAGE], ids=["regression", "language"])
def test_first_metric_heads_the_page(task, tmp_path):
  metric = task.metrics[0]
  entries = [
    scored(
      role,
      seed,
      value + seed + (role == "student" and seed / 10),
      name=metric.name,
      cost={"parameters": 10},
      text=f"{role}!",
    )
    for role, value in (("teacher", 1.0), ("baseline", 4.0), ("student", 2.0))
    for seed in range(1 if role == "teacher" else 3)
  ]
  entries = [e._replace(history=make_history(e.seed, metric.name)) for e in entries]
  references = {"id": np.arange(9), "label": np.zeros((9, 3))}
  _, markdown, numbers = write(tmp_path, entries, task=task, references=references)
  unit = " mm" if task is REGRESSION else ""
  assert f"−1.900{unit} in test {metric.title} " in markdown and "9 test examples" in markdown
  assert "distillation helped this student" in markdown
  assert f"{metric.title} on the validation split" in markdown
  title = "RMSE" if task is REGRESSION else "Perplexity"
  assert f"{title} against size" in headings(markdown)
  assert [one["name"] for one in numbers["metrics"]] == [metric.name]
  assert "Student distilled, seed 0:\n\n```\nstudent!\n```" in markdown
  assert list(cells(markdown))[:2] == ["Seeds", f"Test {metric.title}{',' * bool(unit)}{unit} ↓"]


def test_pictures_do_not_depend_on_the_users_style(tmp_path):
  entries = make_entries(seeds=(0,), roles=("student",), history=False)
  write(tmp_path / "a", entries)
  with matplotlib.style.context("dark_background"):
    write(tmp_path / "b", entries)
  (picture,) = (tmp_path / "a").glob("*.png")
  assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()


def test_references_may_be_missing(tmp_path):
  task = make_task(PERPLEXITY)
  _, markdown, _ = write(
    tmp_path, [scored("student", 0, 3.0, name="perplexity")], task=task, references={}
  )
  assert "No baseline" in markdown and len(REFERENCES["id"]) == ROWS
