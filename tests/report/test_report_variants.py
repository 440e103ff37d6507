"""Reports and results pages of runs that distill many students: a row for each."""

import json

import numpy as np
import pytest
from test_report import ROWS, cells, make_entries, make_labels, write
from test_results_page import make_run, tables

from distill_jax.report import comparison, results, variants
from distill_jax.report.__main__ import main
from distill_jax.report.runs import read

RATIOS = {"kd": 1.0, "slow": 2.345}


def make_variants(labels, names, ratios=()):
  """Students alone and distilled, each variant a little better than the one before; `ratios` by name."""
  entries = [e for e in make_entries(labels, seeds=(0, 1)) if e.role != "student"]
  truth = np.eye(entries[0].logits.shape[1], dtype=np.float32)[labels]
  alone = [e for e in entries if e.role == "baseline"]
  for place, name in enumerate(names, 1):
    own = {"step_ratio": ratios[name]} if name in ratios else {}
    entries += [
      e._replace(
        role="student", variant=name, logits=e.logits + 0.4 * place * truth, cost={**e.cost, **own}
      )
      for e in alone
    ]
  return entries


def test_a_row_per_variant_with_the_time_of_its_step(tmp_path):
  labels = make_labels()
  entries = make_variants(labels, RATIOS, RATIOS)
  run = {"settings": {"reference": "kd"}}
  _, markdown, numbers = write(tmp_path, entries, labels, run=run)
  table = cells(markdown)
  assert list(table) == ["Teacher", "Student alone", "kd", "slow"]
  scores = {(e.group.name, e.seed): 100 * np.mean(e.logits.argmax(-1) == labels) for e in entries}
  for name in RATIOS:
    own = [scores[f"student: {name}", seed] for seed in (0, 1)]
    change = [score - scores["baseline", seed] for seed, score in enumerate(own)]
    mean, spread = table[name]["Test accuracy, % ↑"].split(" ± ")
    assert float(mean) == pytest.approx(np.mean(own), abs=0.006)
    assert float(spread) == pytest.approx(np.std(own, ddof=1), abs=0.006)
    assert float(table[name]["− alone"].split()[0]) == pytest.approx(np.mean(change), abs=0.006)
  times = {name: row["Step time / kd ↓"] for name, row in table.items()}
  assert times == {"Teacher": "–", "Student alone": "–", "kd": "1.00", "slow": "2.35"}
  kept = [e["scores"]["step_ratio"] for e in numbers["entries"] if e["variant"] == "slow"]
  assert kept == [2.345, 2.345]
  assert "by turns in one process" in markdown


def test_of_many_variants_the_table_has_all_and_the_pictures_the_first(tmp_path):
  labels = make_labels()
  names = [f"v{i}" for i in range(8)]
  page, markdown, numbers = write(
    tmp_path, make_variants(labels, names), labels, images=np.zeros((ROWS, 4, 4, 1))
  )
  assert list(cells(markdown)) == ["Teacher", "Student alone", *names]
  assert "Step time" not in markdown
  assert "are about the first 5 of 8 distilled students: v0, v1, v2, v3, v4." in markdown
  assert "(v4) is right and the student alone wrong" in markdown and "(v5) is right" not in markdown
  assert {e["variant"] for e in numbers["entries"]} == {"", *names}
  assert "student: v7" in numbers["classes"][0]["accuracy"]


def test_few_untimed_variants_stand_side_by_side(tmp_path):
  labels = make_labels()
  _, markdown, _ = write(tmp_path, make_variants(labels, ["a", "b"]), labels)
  assert list(cells(markdown)["Seeds"]) == [
    "Teacher",
    "Student alone",
    "Distilled: a",
    "Distilled: b",
  ]


def test_the_verdict_counts_what_is_beyond_the_spread():
  def scored(role, seed, accuracy, variant=""):
    nothing = np.zeros((1, 1))
    return results.Measured(
      results.Entry(role, seed, nothing, {}, [], variant), {"accuracy": accuracy}, {}
    )

  measured = [scored("baseline", seed, 0.5) for seed in (0, 1)]
  for name, (first, second) in {"up": (0.7, 0.71), "down": (0.4, 0.41), "same": (0.4, 0.7)}.items():
    measured += [scored("student", 0, first, name), scored("student", 1, second, name)]
  words = variants.verdict(measured)
  assert (
    "Of 3 distilled students 1 are better and 1 worse" in words and "for 1 it is within" in words
  )
  assert len(comparison.verdicts(measured, 10)) == 3
  assert "not all share two seeds" in variants.verdict(measured[:-1])


def test_a_results_page_has_a_table_of_the_methods(tmp_path):
  scores = {"kd": [0.93, 0.97, 0.92], "slow": [0.95, 0.96, 0.97]}
  methods = make_run(
    tmp_path / "m",
    variants=scores,
    settings={"reference": "kd"},
    device="2 x cpu",
    git="0123456789",
  )
  path = tmp_path / "m" / "report" / "results.json"
  content = json.loads(path.read_text())
  for entry in content["entries"]:
    if entry["variant"]:
      entry["scores"]["step_ratio"] = RATIOS[entry["variant"]]
  path.write_text(json.dumps(content))
  readme = tmp_path / "README.md"
  readme.write_text("<!-- results: methods -->\n<!-- end -->\n")
  main([methods, make_run(tmp_path / "plain"), f"--readme={readme}", "--section=methods"])
  text = readme.read_text()
  plain, table = tables(text)
  assert len(plain) == 1 and plain[0]["Distilled"].startswith("94.00")
  assert table[0] == {
    "Method": "Teacher", "Test accuracy, % ↑": "98.00", "− alone": "", "Step time / kd ↓": "–",
  }  # fmt: skip
  assert table[3]["Method"] == "slow" and table[3]["Test accuracy, % ↑"] == "96.00 ± 1.00"
  assert table[3]["− alone"].startswith("+5.00 ±") and table[3]["Step time / kd ↓"] == "2.35"
  assert (
    "359 examples" in text
    and "2 x cpu" in text
    and "git 012345678" in text
    and "over 3 seeds" in text
  )
  assert variants.in_rows(read(tmp_path / "m").measured)
