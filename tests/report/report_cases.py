"""Builds entries and tasks of three kinds of problem for the tests of reports."""

import dataclasses
import json

import numpy as np

from distill_jax import report
from distill_jax.report.document import Numbers, Text
from distill_jax.types import Metric, Task

ACCURACY = Metric("accuracy", "accuracy", "%", "max", ".2%")
ECE = Metric("ece", "expected calibration error", "%", "min", ".2%", short="ECE")
NLL = Metric("nll", "negative log-likelihood", "nats", "min", ".4f", short="NLL")
F1 = Metric("f1", "macro F1", "%", "max", ".2%", detail=2)
AGREEMENT = Metric("agreement", "agreement with the teacher", "%", "max", ".2%")
UNMEASURED = Metric("unmeasured", "score that no entry has", "", "max", ".2f")
RMSE = Metric("rmse", "RMSE", "mm", "min", ".3f")
PERPLEXITY = Metric("perplexity", "perplexity", "", "min", ".3f")

ROWS = 80
ROLES = ("teacher", "baseline", "student")
LEVELS = {"teacher": 0.95, "baseline": 0.8, "student": 0.9}
COST = {
  "parameters": 1000.0,
  "bytes": 4000,
  "flops": 2.5e6,
  "latency_ms": 0.25,
  "throughput_128": 12345.6,
}
REFERENCES = {"label": np.zeros(ROWS, int), "id": np.arange(ROWS) + 100}


def make_task(*metrics, figures=None):
  return Task(metrics=metrics, statistics=dict, compute=dict, figures=figures)


def class_blocks(entries, references, class_names):
  """Returns figures that depend on all three arguments."""
  text = f"{len(entries)} entries, {len(references['label'])} labels, {list(class_names)}"
  return [Text(text), Numbers("classes", [np.float32(0.5), float("nan")])]


CLASSIFICATION = make_task(ACCURACY, F1, NLL, ECE, AGREEMENT, UNMEASURED, figures=class_blocks)
REGRESSION = make_task(RMSE, Metric("r2", "R²", "", "max", ".4f"))
LANGUAGE = make_task(PERPLEXITY, dataclasses.replace(ECE, detail=0), ACCURACY)


def make_history(seed=0, name="accuracy"):
  return [
    {"step": step, "phase": phase, "loss": 2 / step + seed, name: 1 - 1 / step - seed / 100}
    for step in (10, 20, 30)
    for phase in ("train", "validation")
  ]


def scored(role, seed, value, variant="", *, name="accuracy", cost=None, history=(), **fields):
  """Returns an entry with one score."""
  return report.Entry(role, seed, {name: value}, cost or {}, history, variant, **fields)


def make_entries(*, seeds=(0, 1, 2), roles=ROLES, history=True, cost=COST):
  """Returns entries of the classification task with random scores; the teacher has one seed."""
  rng, entries = np.random.default_rng(7), []
  for role in roles:
    for seed in seeds[:1] if role == "teacher" else seeds:
      scores = {"accuracy": LEVELS[role] + rng.uniform(-0.05, 0.05), "unlisted": 1.0}
      scores |= {name: rng.uniform(0.05, 0.95) for name in ("f1", "nll", "ece")}
      if role != "teacher":
        scores["agreement"] = rng.uniform()
      is_teacher = role == "teacher" and cost
      role_cost = cost | {"parameters": 8000.0} if is_teacher else cost
      lines = make_history(seed) if history else []
      entries.append(report.Entry(role, seed, scores, role_cost, lines))
  return entries


def make_variants(names, ratios=(), seeds=(0, 1), **options):
  """Returns teacher, baseline and distilled students, each better than the one before."""
  entries = make_entries(seeds=seeds, roles=ROLES[:2], **options)
  baselines = [e for e in entries if e.role == "baseline"]
  for position, name in enumerate(names, 1):
    time = {"step_ratio": ratios[name]} if name in ratios else {}
    for e in baselines:
      scores = {**e.scores, "accuracy": e.scores["accuracy"] + 0.01 * position + 0.001 * e.seed}
      entries.append(
        e._replace(role="student", variant=name, scores=scores, cost={**e.cost, **time})
      )
  return sorted(entries, key=lambda e: e.seed)  # the order of a run: all variants of a seed


def write(folder, entries, *, task=CLASSIFICATION, references=REFERENCES, run=None, names=()):
  """Writes a report; returns its HTML, Markdown and numbers."""
  path = report.write(
    folder, entries, task=task, references=references, class_names=names, run=run or {}
  )
  markdown = (folder / "report.md").read_text()
  return path.read_text(), markdown, json.loads((folder / "results.json").read_text())


def tables(markdown):
  """Returns each table as rows of {column title: cell}."""
  result = []
  for block in markdown.split("\n\n"):
    if block.startswith("|"):
      header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()
      ]
      result.append([dict(zip(header, row)) for row in rows])
  return result


def cells(markdown, index=0):
  """Returns one table as {row title: {column title: cell}}."""
  result = {}
  for row in tables(markdown)[index]:
    title, *values = row.values()
    result[title] = dict(zip(list(row)[1:], values))
  return result


def headings(markdown):
  return [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
