"""configs/lm.py, from text to table, on a little text."""

import json

import pytest

from distill_jax.cache import TopK
from distill_jax.cache.codecs import estimates
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.overrides import load_config

SMALL = [
  "--config.vocab_size=0",
  "--config.length=16",
  "--config.rows=0",
  "--config.teacher_embed_dim=20",
  "--config.teacher_num_layers=1",
  "--config.student_embed_dim=20",
  "--config.student_num_layers=1",
  "--config.ks=2",
  "--config.prompt=4",
  "--config.cache_batch_size=8",
  "--config.devices=1",
  *(
    f"--config.{role}_training.{field}"
    for role in ("teacher", "student")
    for field in ("steps=2", "batch_size=8", "warmup_steps=1")
  ),
]


@pytest.fixture
def text(tmp_path):
  """40 documents in two files."""
  folder = tmp_path / "text"
  folder.mkdir()
  for name in ("a.txt", "b.txt"):
    (folder / name).write_text(
      "\f".join(f"{name}: document {n} of a few words.\n" * 2 for n in range(20))
    )
  return str(folder)


@pytest.mark.integration
def test_from_text_to_table(text, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    estimates, "default_codecs", lambda classes, **_: [TopK(2)]
  )  # each compiles for half a second
  run = tmp_path / "run"
  stages = (
    "--stages=teacher,cache,baseline,student,report,cache_inspect,cache_estimate,cache_verify"
  )
  own = [
    f"--config.text={text}",
    f"--config.cache={tmp_path / 'cache'}",
    f"--workdir={run}",
    stages,
  ]
  main(["--config=configs/lm.py", *SMALL, *own])
  results = json.loads((run / "report" / "results.json").read_text())
  names = [entry["variant"] or entry["role"] for entry in results["entries"]]
  assert names == [
    "teacher",
    "baseline",
    "live_teacher",
    "on_policy",
    "top.2",
    "tail_bucket.2",
    "random_sampling.2",
  ]
  for entry in results["entries"]:
    assert {"perplexity", "ece", "accuracy", "latency_ms"} <= set(entry["scores"])
    assert ("teacher_kl" in entry["scores"]) == (entry["role"] != "teacher")
  report = (run / "report" / "report.md").read_text()
  assert "Test perplexity ↓" in report and "And the" in report
  assert (run / "student-live_teacher-0" / "model.stablehlo").exists()
  out = capsys.readouterr().out
  assert "logits@top2" in out and "| TopK(2) |" in out and "every checksum holds" in out


def test_without_the_programs_the_text_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr("corpora.shutil.which", lambda name: None)
  config = load_config("configs/lm.py", [f"text={tmp_path / 'none'}"])
  with pytest.raises(ConfigError, match="text: "):
    config.data()


def test_documents_are_in_one_split_alone(text):
  config = load_config(
    "configs/lm.py",
    [
      f"text={text}",
      "vocab_size=0",
      "length=16",
      "teacher_embed_dim=20",
      "student_embed_dim=20",
      "prompt=4",
    ],
  )
  sizes = [len(set(split.arrays["segments"].ravel()) - {-1}) for split in config.data()]
  assert sizes == [36, 1, 1]


def test_tokens_that_cannot_be_kept_are_refused():
  with pytest.raises(ConfigError, match="ks: "):
    load_config("configs/lm.py", ["ks=2048"])
