"""configs/minilm_embedding.py, tagging.py and sentiment.py on a small encoder and a few texts."""

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minilm_embedding import MiniLMEmbedding
from sentiment import Sentiment
from tagging import CLASSES, Tagging, class_of

from distill_jax.data import UNLABELED
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError, check_config
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.encoders.encoder_files import save_encoder
from distill_jax.storage.student import load_student

JOBS = {"minilm_embedding": MiniLMEmbedding, "tagging": Tagging, "sentiment": Sentiment}
SMALL = {"sentences": 16, "length": 8}
HELD_OUT = {"held_out": (20, 24)}
NARROW = {"student_num_layers": 1, "student_embed_dim": 32}
FIELDS = {
  "minilm_embedding": SMALL | HELD_OUT,
  "tagging": SMALL | HELD_OUT | NARROW | {"labels": 8},
  "sentiment": SMALL | NARROW,
}
TERMS = {
  ("minilm_embedding", "layers2"): {"embedding"},
  ("minilm_embedding", "narrow3"): {"embedding"},
  ("tagging", "kd"): {"hard", "soft"},
  ("tagging", "pseudo"): {"hard", "soft"},
  ("sentiment", "features"): {"hidden", "attention"},
  ("sentiment", "tinybert"): {"hard", "soft"},
}
WORDS = ["a", "cat", "dog", "sat", "ran", "on", "the", "mat", "and", "saw", "it", "old", "good"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An encoder of 3 layers, and the texts of each job."""
  folder = tmp_path_factory.mktemp("language")
  vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *WORDS]
  config = EncoderConfig(len(vocabulary), 8, num_layers=3, num_heads=2, max_length=16)
  model = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs="tokens")
  save_encoder(folder / "encoder", jax.jit(model.init)(jax.random.key(0), {}), config)
  (folder / "encoder" / "vocab.txt").write_text("\n".join(vocabulary))
  rng = np.random.default_rng(0)
  documents = rng.choice(WORDS, (30, 12, 6)).tolist()

  def write(name, word):
    lines = (("\n".join(" ".join(map(word, line)) for line in lines)) for lines in documents)
    (folder / name).write_text(corpora.SEPARATOR.join(lines))

  (folder / "minilm_embedding").mkdir()
  write("minilm_embedding/a.txt", str)
  write("tagging", lambda word: f"{word}/{'at' if word in ('a', 'the') else 'nn'}")
  rows = [f"review{n}\t{rng.normal()}\t{' '.join(x)}" for n, d in enumerate(documents) for x in d]
  (folder / "sentiment").write_text("\n".join(rows))
  return folder


def job(folder, name, **fields):
  paths = {"encoder": str(folder / "encoder"), "text": str(folder / name)}
  return JOBS[name](**paths, **FIELDS[name] | fields)


@pytest.mark.parametrize(("name", "variant"), TERMS)
def test_every_student_has_its_terms(folder, name, variant):
  config = job(folder, name)
  config = job(folder, name, methods=tuple(dict.fromkeys((*config.methods, variant))))
  check_config(config)
  batch = {entry: x[:2] for entry, x in config.data().train.arrays.items()}

  def terms(batch):
    outputs = [
      model.apply(*model.init(jax.random.key(0), batch), batch, train=False, key=None)[0]
      for model in (config.recipe(variant).student, config.teacher())
    ]
    objective = config.variant_objective(variant)
    variables = objective.init(jax.random.key(0), *outputs)
    step = jnp.array(0)
    return objective.apply(*variables, *outputs, batch, step=step, key=jax.random.key(0))[0]

  assert set(jax.eval_shape(terms, batch)) == TERMS[name, variant]


def test_only_some_sentences_have_tags(folder):
  config = job(folder, "tagging")
  train = config.data().train
  student = config.student_train(train).arrays
  has_tags = (student["label"] != UNLABELED).any(1)
  assert has_tags[:8].all() and not has_tags[8:].any() and student["is_word"].any(1).all()
  np.testing.assert_array_equal(config.baseline_train(train).ids, train.ids[:8])


@pytest.mark.parametrize(
  ("tag", "name"),
  [
    ("nn-tl", "noun"),
    ("nil", "other"),
    ("fw-at", "other"),
    ("ppss+bem", "pronoun"),
    ("doz", "verb"),
    ("dti", "determiner"),
    ("*", "adverb"),
    ("--", "punctuation"),
  ],
)
def test_tags_have_classes(tag, name):
  assert [*CLASSES][class_of(tag)] == name


def test_documents_are_in_one_split_and_pairs_have_the_teachers_similarity(folder):
  splits = job(folder, "minilm_embedding").data()
  train, validation, test = (set(split.arrays["label"]) for split in splits)
  assert not train & validation | train & test | validation & test
  arrays = splits.test.arrays
  near = arrays["label"][:12].reshape(-1, 2)
  assert (near[:, 0] == near[:, 1]).all() and (splits.train.arrays["pair"] == -1).all()
  np.testing.assert_array_equal(arrays["score"][::2], arrays["score"][1::2])


def test_classes_of_sentiment_follow_the_scores(folder):
  scores, classes = (
    job(folder, "sentiment", target=target).data().test.arrays["label"]
    for target in ("score", "classes")
  )
  np.testing.assert_array_equal(np.digitize(scores, [-0.5, 0.5]), classes)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("minilm_embedding", {"methods": ("layer2",)}),
    ("minilm_embedding", {"held_out": (20, 23)}),
    ("tagging", {"labels": 17}),
    ("tagging", {"student_embed_dim": 40}),
    ("sentiment", {"target": "stars"}),
    ("sentiment", {"methods": ("tiny",)}),
  ],
)
def test_fields_that_cannot_be_run_raise(folder, name, fields):
  field = next(iter(fields))
  with pytest.raises(ConfigError, match=f"^{field}: expected"):
    job(folder, name, **fields).validate()


def test_too_little_text_raises(folder):
  with pytest.raises(ConfigError, match="^text: expected at least 400 sentences of train"):
    job(folder, "minilm_embedding", sentences=400).data()


@pytest.mark.parametrize(
  ("name", "method", "trainings"),
  [
    pytest.param("minilm_embedding", "layers2", ("student",), marks=pytest.mark.nightly),
    pytest.param("tagging", "kd", ("teacher", "student"), marks=pytest.mark.nightly),
    pytest.param(
      "sentiment", "features", ("teacher", "features", "student"), marks=pytest.mark.nightly
    ),
  ],
)
def test_job_trains_from_text_to_student(folder, tmp_path, name, method, trainings):
  values = {"encoder": folder / "encoder", "text": folder / name, **FIELDS[name]}
  values |= {"methods": f"('{method}',)", "devices": 1, "cache_batch_size": 8}
  for training in trainings:
    sizes = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    values |= {f"{training}_training.{field}": value for field, value in sizes.items()}
  options = [f"--config.{field}={value}" for field, value in values.items()]
  if name == "sentiment":
    options.append("--config.cache=")
  stages = "--stages=teacher,cache,student" if name != "sentiment" else "--stages=teacher,student"
  main([f"--config=configs/{name}.py", *options, f"--workdir={tmp_path}", stages])
  student = job(folder, name).recipe(method).student
  batch = {entry: x[:2] for entry, x in job(folder, name).data().train.arrays.items()}
  load_student(tmp_path / f"student-{method}-0", student, batch)
