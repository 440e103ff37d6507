"""Reports and results pages of runs with many distilled students: a row for each."""

import re

import numpy as np
import pytest
from report_cases import (
  ACCURACY,
  CLASSIFICATION,
  LANGUAGE,
  RMSE,
  cells,
  make_variants,
  scored,
  tables,
  write,
)
from test_results_page import make_run

from distill_jax.report import comparison, variants
from distill_jax.report.__main__ import main
from distill_jax.report.runs import read
from distill_jax.storage import sealed_json

RATIOS = {"kd": 1.0, "slow": 2.345}


def test_a_row_per_variant_with_the_time_of_its_step(tmp_path):
  entries = make_variants(RATIOS, RATIOS)
  _, markdown, numbers = write(tmp_path, entries, run={"settings": {"reference": "kd"}})
  rows = cells(markdown)
  assert list(rows) == ["Teacher", "Baseline", "kd", "slow"]
  assert list(rows["kd"]) == [
    "Test accuracy, % ↑",
    "− baseline",
    "NLL, nats ↓",
    "ECE, % ↓",
    "Agreement with the teacher, % ↑",
    "Step time / kd ↓",
  ]
  for position, name in enumerate(RATIOS, 1):
    values = [100 * e.scores["accuracy"] for e in entries if e.variant == name]
    mean, spread = map(float, rows[name]["Test accuracy, % ↑"].split(" ± "))
    assert (mean, spread) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=0.006)
    change = float(rows[name]["− baseline"].split()[0])
    assert change == pytest.approx(position + 0.05, abs=0.006)
  times = {name: row["Step time / kd ↓"] for name, row in rows.items()}
  assert times == {"Teacher": "–", "Baseline": "–", "kd": "1.00", "slow": "2.35"}
  ratios = [e["scores"]["step_ratio"] for e in numbers["entries"] if e["variant"] == "slow"]
  assert ratios == [2.345, 2.345]
  assert variants.about_time(entries) in markdown


def test_table_has_all_variants_and_pictures_the_first(tmp_path):
  names = [f"v{i}" for i in range(8)]
  entries = make_variants(names, history=False)
  _, markdown, numbers = write(tmp_path, entries)
  assert list(cells(markdown)) == ["Teacher", "Baseline", *names]
  assert "Step time" not in markdown
  assert "first 5 of 8 distilled students: v0, v1, v2, v3, v4." in markdown
  assert {e["variant"] for e in numbers["entries"]} == {"", *names}
  few = {e.variant for e in variants.few(entries)}
  assert few == {"", *names[:5]}


def test_brief_tables_have_metrics_of_detail_0_only():
  scores = {"perplexity": 30.0, "ece": 0.02, "accuracy": 0.5}
  entries = [scored("student", 0, 0.0, "kd")._replace(scores=scores)]

  def header(task, brief):
    return variants.table(entries, task.metrics, {}, brief=brief).header

  brief = ["Method", "Test perplexity ↓", "− baseline", "ECE, % ↓"]
  assert header(LANGUAGE, True) == brief
  assert header(LANGUAGE, False) == [*brief, "Accuracy, % ↑"]
  assert header(CLASSIFICATION, True) == ["Method", "Test accuracy, % ↑", "− baseline"]


def test_few_untimed_variants_are_columns():
  assert not variants.in_rows(make_variants("ab"))
  assert variants.in_rows(make_variants("ab", {"a": 1.0}))
  assert variants.in_rows(make_variants("abcdef"))


@pytest.mark.parametrize("metric, sign", [(ACCURACY, 1), (RMSE, -1)])
def test_verdict_counts_intervals_that_exclude_0(metric, sign):
  changes = {
    "up": (0.2, 0.21, 0.2),
    "down": (-0.1, -0.09, -0.1),
    "same": (-0.1, 0.2, 0.1),
    "too": (0.1, 0.11, 0.12),
  }
  entries = [scored("baseline", seed, 0.5, name=metric.name) for seed in (0, 1, 2)]
  entries += [
    scored("student", seed, 0.5 + sign * change, name, name=metric.name)
    for name, both in changes.items()
    for seed, change in enumerate(both)
  ]
  words = variants.verdict(entries, metric)
  assert "4 distilled students 2 are better and 1 worse" in words and "For 1 it does not" in words
  assert len(comparison.verdicts(entries, metric, 10)) == 4
  assert "not all share 3 seeds" in variants.verdict(entries[:-1], metric)


def test_results_page_has_a_table_of_the_methods(tmp_path):
  scores = {"kd": [0.93, 0.97, 0.92], "slow": [0.95, 0.96, 0.97]}
  facts = {"settings": {"reference": "kd"}, "device": "2 x cpu", "git": "0123456789"}
  methods = make_run(tmp_path / "m", variants=scores, **facts)
  path = tmp_path / "m" / "report" / "results.json"
  content = sealed_json.read(path)
  for entry in content["entries"]:
    if entry["variant"]:
      entry["scores"]["step_ratio"] = RATIOS[entry["variant"]]
  path.write_text(sealed_json.dumps(content))
  readme = tmp_path / "README.md"
  readme.write_text("<!-- results: methods -->\n<!-- end -->\n")
  main([methods, make_run(tmp_path / "plain"), f"--readme={readme}", "--section=methods"])
  text = readme.read_text()
  plain, table = tables(text)
  assert len(plain) == 1 and plain[0]["Distilled"].startswith("94.00")
  assert table[0] == {
    "Method": "Teacher",
    "Test accuracy, % ↑": "98.00",
    "− baseline": "",
    "Step time / kd ↓": "–",
  }
  assert table[3]["Method"] == "slow" and table[3]["Test accuracy, % ↑"] == "96.00 ± 1.00"
  assert table[3]["− baseline"].startswith("+5.00 (+") and table[3]["Step time / kd ↓"] == "2.35"
  assert all(fact in text for fact in ("359 examples", "2 x cpu", "git 012345678", "3 seeds"))
  assert variants.in_rows(read(tmp_path / "m").entries)


@pytest.mark.parametrize(
  ("latency", "spread", "words"),
  [(0.5, 1.2, "1.20 times"), (0.5, 2.5, "2.50 times.* --stages=report"), (0.1, 1.2, "one by one")],
)
def test_times_that_contradict_or_vary_are_said(latency, spread, words):
  cost = {"latency_ms": latency, "throughput_128": 4_000.0}
  spreads = {"latency_ms_spread": 1.0, "throughput_128_spread": spread}
  entry = scored("student", 0, 0.9, cost=cost | spreads)
  text = variants.about_speed([entry])
  assert re.search(words, text)
  assert ("--stages=report" in text) == (spread > 2 or latency < 0.25)
  assert variants.about_speed([scored("student", 0, 0.9, cost=cost)]) == ""
