"""configs/translate_en_fr.py and pronounce.py on few sentences, few words and small networks."""

import json

import numpy as np
import pytest
from pronounce import FRACTIONS, Pronounce
from translate_en_fr import Translation

from distill_jax.data.sets import pronunciations
from distill_jax.jobs import data as job_data
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError, TrainedTeacher, check_config
from distill_jax.models.seq2seq import g2p

ENGLISH = (
  "the page",
  "a table",
  "the file",
  "open",
  "close",
  "insert",
  "delete",
  "no",
  "one",
  "two",
)
FRENCH = (
  "la page", "un tableau", "le fichier", "ouvrir", "fermer", "insérer", "supprimer", "non", "un",
  "deux",
)  # fmt: skip
TRAINING = (
  "student_training.steps=4",
  "student_training.batch_size=8",
  "student_training.warmup_steps=1",
  "eval_every=4",
)


def flags(*options):
  return [f"--config.{option}" for option in (*TRAINING, *options)]


@pytest.fixture
def pairs(tmp_path):
  """A file of pairs: each document says things in its own order."""
  lines = []
  for document in range(60):
    for i in range(4):
      first = (document * 7 + i) % 10
      english, french = (f"{side[first]} {document}" for side in (ENGLISH, FRENCH))
      lines.append(f"ui/{document}\t{english}\t{french}\n")
  path = tmp_path / "pairs.tsv"
  path.write_text("".join(lines), encoding="utf-8")
  return path


@pytest.fixture
def small_g2p(tmp_path):
  """The packages' files: a recurrent teacher with weights of zeros, and a dictionary."""
  weights = {}
  for prefix in ("enc", "dec"):
    weights |= {f"{prefix}_w_{part}": np.zeros((768, 256), np.float32) for part in ("ih", "hh")}
    weights |= {f"{prefix}_b_{part}": np.zeros(768, np.float32) for part in ("ih", "hh")}
  weights["enc_emb"] = np.zeros((len(pronunciations.GRAPHEMES), 256), np.float32)
  weights["dec_emb"] = np.zeros((len(pronunciations.PHONES), 256), np.float32)
  weights["fc_w"] = np.zeros((len(pronunciations.PHONES), 256), np.float32)
  weights["fc_b"] = np.zeros(len(pronunciations.PHONES), np.float32)
  np.savez(tmp_path / "checkpoint20.npz", **weights)
  letters = "abcdefghijklmnop"
  lines = [f"{a}{b}{c} K AE1 T\n" for a in letters for b in "aeiou" for c in letters]
  (tmp_path / "cmudict.dict").write_text("".join(lines))
  return Pronounce(
    dictionary=str(tmp_path / "cmudict.dict"), released=str(tmp_path / "checkpoint20.npz")
  )


@pytest.mark.integration
def test_translation_runs_its_methods(pairs, tmp_path):
  methods = ("word", "interpolation", "both", "quarter")  # the others repeat their programs
  options = flags(
    f"text={pairs}",
    f"methods={','.join(methods)}",
    "vocab_size=400",
    "length=8",
    "teacher_width=64",
    "student_width=16",
    "teacher_layers=1",
    "student_layers=1",
    "beam_size=2",
    "teacher_training.steps=80",  # A network that has not learned to end writes no labels.
    "teacher_training.batch_size=16",
    "teacher_training.learning_rate=0.01",
    "teacher_training.warmup_steps=1",
    "devices=1",
  )
  main(["--config=configs/translate_en_fr.py", *options, f"--workdir={tmp_path / 'run'}"])
  results = json.loads((tmp_path / "run/report/results.json").read_text())
  scores = {entry["variant"]: entry["scores"] for entry in results["entries"]}
  assert set(methods) <= set(scores)
  assert all({"bleu", "chrf", "nll"} <= scores[name].keys() for name in methods)
  assert scores["quarter"]["parameters"] == scores["word"]["parameters"]  # 64 / 4 is 16


def test_fields_that_cannot_be_run_are_refused(pairs):
  for option in (
    {"methods": ("words",)},
    {"teacher_width": 80},
    {"student_width": 24},
    {"beam_size": 0},
    {"cache": "somewhere"},
  ):
    with pytest.raises(ConfigError, match=next(iter(option))):
      check_config(Translation(text=str(pairs), vocab_size=260, **option))
  with pytest.raises(ConfigError, match="packages|folder|text"):
    Translation(text=str(pairs) + "x", packages=str(pairs.parent)).data()


def test_words_have_the_labels_of_their_variant(small_g2p, tmp_path):
  config = small_g2p
  config.label_fraction = 0.1
  check_config(config)
  train = config.data().train
  teacher = config.teacher()

  def says_first_letter(variables, key, batch):
    tokens = np.full((len(batch["source"]), 3), g2p.g2p_steps().end_token, np.int32)
    tokens[:, 0] = np.asarray(batch["source"])[:, 0] + 10
    return tokens, np.ones(len(tokens), np.int32)

  teacher = teacher._replace(sample=says_first_letter)
  trained = TrainedTeacher(teacher, teacher.variables, train)
  labels = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("pronounce.jax.jit", lambda function: function)
    for name in ("sequence", "mixed", *FRACTIONS):
      labels[name] = config.recipe(name).relabel(train, trained, tmp_path / "labels")
  said = labels["sequence"]
  assert len(said) == len(train)
  np.testing.assert_array_equal(said.arrays["label"][:, 0], train.arrays["source"][:, 0] + 10)
  true = config.baseline_train(train)
  assert len(true) == round(0.1 * len(train)) == len(labels["labels_10"])
  assert len(labels["labels_100"]) == len(train) == len(labels["mixed"])
  is_true = labels["mixed"].arrays["label"][:, 1] != said.arrays["label"][0, 1]
  assert is_true.sum() == len(true)


def test_batches_of_jobs_have_the_lengths_of_the_config(small_g2p):
  train = small_g2p.data().train
  batch = next(job_data.training_batches(small_g2p, train, 8))
  assert batch["source"].shape == batch["label"].shape == (8, 8)
  assert train.arrays["source"].shape[1] == 20
