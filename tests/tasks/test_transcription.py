"""Error rates of transcripts, and the statistics of CTC frames."""

import io
import itertools
import wave

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
from PIL import Image

from distill_jax import tasks
from distill_jax.models import from_apply
from distill_jax.models.decoding import ctc_sampler
from distill_jax.report import Entry
from distill_jax.report.document import Picture, Sound, Table, Text, to_html, to_markdown
from distill_jax.train import evaluate_models
from distill_jax.types import SAMPLE

ALPHABET = " abcdefghi"
BLANK = 0
FRAMES, CLASSES = 24, 1 + len(ALPHABET)


def decode(ids):
  """Fails for blanks and padding, which are never to be shown."""
  assert ids.dtype == np.int32 and (ids > 0).all()
  return "".join(ALPHABET[i - 1] for i in ids)


def encode(text):
  return [1 + ALPHABET.index(c) for c in text]


TEXTS = ["ab cd", "a", "", "dead beef", "hag", "cab", "bad egg", "fade a", "heed", "gag", "abba"]


def labels(texts, length=10):
  """Returns labels [N, length]: blanks behind even rows and empty ones, else -1."""
  rows = np.full((len(texts), length), -1, np.int32)
  for number, text in enumerate(texts):
    ids = encode(text)
    rows[number, : len(ids)] = ids
    if number % 2 == 0 or not text:
      rows[number, len(ids) :] = BLANK
  return rows


def examples():
  """Returns 22 rows, the last one without a label, and 3 whose targets do not fit."""
  texts = TEXTS * 2
  rng = np.random.default_rng(0)
  label = labels(texts)
  label[-1] = -1
  lengths = rng.integers(20, FRAMES + 1, len(texts)).astype(np.int32)
  lengths[[3, 10]] = 9, 4  # "dead beef" needs 10 frames, "abba" 5
  lengths[0] = 4
  path = rng.integers(0, CLASSES, (len(texts), FRAMES))
  for row, text in enumerate(texts):  # mostly what was said
    ids = [x for c in encode(text) for x in (c, BLANK)]
    path[row, : len(ids)] = ids
    path[row, len(ids) :] = BLANK if row % 3 else path[row, len(ids) :]
  frames = 4 * jax.nn.one_hot(path, CLASSES) + rng.normal(size=(len(texts), FRAMES, CLASSES))
  return {"id": np.arange(len(texts)), "x": np.float32(frames), "n": lengths, "label": label}


ROWS = examples()


def network(noise):
  def apply(w, x, n):
    inside = (jnp.arange(FRAMES) < n[:, None])[..., None]
    return {"logits": jnp.where(inside, w * x + noise * jnp.sin(7 * x), jnp.nan), "lengths": n}

  return from_apply(None, apply, variables=jnp.float32(1), inputs=("x", "n"))


def measured(task, *models, rows=ROWS):
  """Evaluates models on batches of one row, with a row of padding each."""
  batches = []
  for i in range(len(rows["id"])):
    batch = {name: np.concatenate([x[i : i + 1], x[:1]]) for name, x in rows.items()}
    batches.append(batch | {"where": np.array([True, False])})
  trained = [(model, model.variables) for model in models]
  return evaluate_models(trained, batches, task, predict=True, leave_out=True, teacher=trained[0])


@pytest.fixture(scope="module")
def evaluated():
  task = tasks.transcription(decode)
  return task, measured(task, network(0), network(0.5), network(2.0))


def pairs(predictions):
  """Returns references and texts of the labeled rows, with single spaces."""
  references = (TEXTS * 2)[:-1]
  rows = predictions["tokens"][: len(references)]
  texts = ["".join(ALPHABET[i - 1] for i in row if i >= 0) for row in rows]
  return references, [" ".join(text.split()) for text in texts]


def test_error_rates_are_those_of_jiwer(evaluated):
  _, results = evaluated
  rates = []
  for one in results:
    references, texts = pairs(one.predictions)
    assert one.scores["wer"] == pytest.approx(jiwer.wer(references, texts), abs=1e-12)
    assert one.scores["cer"] == pytest.approx(jiwer.cer(references, texts), abs=1e-12)
    same = [a == b for a, b in zip(references, texts)]
    assert one.scores["exact"] == pytest.approx(np.mean(same))
    assert one.leave_out["wer"].shape == (20,)
    rates.append(one.scores["wer"])
  assert rates[0] < rates[1] < rates[2]


def shown(evaluated, **references):
  """Returns the blocks of a report on a teacher, a baseline and a student, and its page."""
  task, (exact, *others) = evaluated
  task = tasks.transcription(decode, audio_rate=8000) if "audio" in references else task
  entries = [
    Entry(role, 0, one.scores, {}, [], predictions=one.predictions)
    for role, one in zip(("teacher", "student", "baseline"), (exact, *others))
  ]
  blocks = task.figures(entries, {"id": ROWS["id"] + 100} | references, ())
  return blocks, to_html("page", blocks), to_markdown("page", blocks)


def test_report_shows_differences_sounds_and_pictures(evaluated):
  rng = np.random.default_rng(0)
  rows = len(ROWS["id"])
  audio = rng.uniform(-1.5, 1.5, (rows, 100)).astype(np.float32)
  audio[:, 70:] = 0
  image = rng.uniform(0, 1, (rows, 8, 20, 1)).astype(np.float32)
  widths = np.full(rows, 11)
  blocks, html, markdown = shown(evaluated, audio=audio, image=image, widths=widths)
  tables = [block for block in blocks if isinstance(block, Table)]
  assert len(tables) == 8 and html.count("<audio") == 8 and "<img" in html
  for table in tables:
    assert [row[0] for row in table.rows] == ["Reference", "Teacher", "Baseline", "Distilled"]
  paragraphs = [block.text for block in blocks if isinstance(block, Text)]
  assert "largest gain" in paragraphs[1] and "worst" in paragraphs[-1]
  # The row of the last paragraph, by the numbers in the page.
  row = int(paragraphs[-1].split()[1].rstrip(":")) - 100
  references, texts = pairs(evaluated[1][1].predictions)
  assert tables[-1].rows[0][1] == (references[row] or "(empty)")
  assert tables[-1].rows[3][2:] == [
    f"{jiwer.wer(references[row], texts[row]):.0%}",
    f"{jiwer.cer(references[row], texts[row]):.0%}",
  ]
  expected = jiwer.process_characters(references[row], texts[row])
  lines = jiwer.visualize_alignment(expected, show_measures=False).splitlines()[2:4]
  assert " " in references[row] or all(line.rstrip() in blocks[-1].text for line in lines)
  sounds = [block for block in blocks if isinstance(block, Sound)]
  with wave.open(io.BytesIO(sounds[-1].wav)) as file:
    assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
    samples = np.frombuffer(file.readframes(1000), "<i2") / 32767
  np.testing.assert_allclose(samples, np.clip(audio[row, :70], -1, 1), atol=1e-4)
  (picture,) = [b for b in blocks if isinstance(b, Picture) and b.file == f"line_{row}.png"]
  pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
  np.testing.assert_array_equal(pixels[..., 2], np.round(255 * image[row, :, :11, 0]))
  assert f"[sound](sound\\_{row}.wav)" in markdown or f"(sound_{row}.wav)" in markdown
  # Nothing to play or to see, and no more text than is labeled.
  blocks, html, _ = shown(evaluated)
  assert "<audio" not in html and "<img" not in html and len(blocks) > 16


def test_report_escapes_texts():
  def markup(ids):
    return "<b>x y</b>" if 2 in ids else "<b>"

  task = tasks.transcription(markup, normalizer=None)
  label = np.array([[2, 0], [0, 0]])
  predictions = {"tokens": np.array([[1, -1], [1, -1]]), "label": label}
  entries = [Entry("student", 0, {}, {}, [], predictions=predictions)]
  html = to_html("page", task.figures(entries, {}, ()))
  assert "<b>" not in html and "&lt;b&gt;x y&lt;/b&gt;" in html


def collapse(path):
  return [int(token) for token, _ in itertools.groupby(path) if token != BLANK]


def test_frames_are_cut_at_lengths(evaluated):
  _, (exact, *_) = evaluated
  for row, length in enumerate(ROWS["n"]):
    tokens = exact.predictions["tokens"][row]
    assert tokens[tokens >= 0].tolist() == collapse(ROWS["x"][row, :length].argmax(-1))


def nll(log_probs, target):
  """Returns -log p(target) by the forward algorithm of Graves et al. 2006, in float64."""
  states = [BLANK, *(x for token in target for x in (token, BLANK))]
  alpha = np.full(len(states), -np.inf)
  alpha[0] = 0
  if len(log_probs) == 0:
    return -alpha[0] if not target else np.inf
  alpha = np.full(len(states), -np.inf)
  alpha[:2] = log_probs[0, states[:2]]
  for frame in log_probs[1:]:
    before = alpha
    alpha = np.logaddexp(before, np.append(-np.inf, before[:-1]))
    for i in range(2, len(states)):
      if states[i] not in (BLANK, states[i - 2]):
        alpha[i] = np.logaddexp(alpha[i], before[i - 2])
    alpha = alpha + frame[states]
  return -np.logaddexp.reduce(alpha[-2:])


def test_frame_scores_are_those_of_formulas(evaluated):
  _, results = evaluated
  losses, too_long, same, divergences = [], [], [], []
  x = np.float64(ROWS["x"])
  noisy = jax.nn.log_softmax(np.float64(np.float32(x) + 0.5 * np.sin(7 * np.float32(x))))
  noisy, clean = np.asarray(noisy, np.float64), np.asarray(jax.nn.log_softmax(x), np.float64)
  for row, length in enumerate(ROWS["n"]):
    p, q = clean[row, :length], noisy[row, :length]
    same += (p.argmax(-1) == q.argmax(-1)).tolist()
    divergences += (np.exp(p) * (p - q)).sum(-1).tolist()
    if row < len(ROWS["n"]) - 1:
      loss = nll(q, [token for token in ROWS["label"][row].tolist() if token > 0])
      too_long.append(np.isinf(loss))
      losses += [] if np.isinf(loss) else [loss]
  scores = results[1].scores
  assert sum(too_long) == 3 and scores["too_long"] == pytest.approx(np.mean(too_long))
  assert scores["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
  assert scores["agreement"] == pytest.approx(np.mean(same))
  assert scores["teacher_kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
  assert results[0].scores["teacher_kl"] == pytest.approx(0, abs=1e-6)


def test_empty_and_missing_references():
  task = tasks.transcription(decode)
  label = np.array([[0, 0], [0, -1], [-1, -1]])

  def scores(tokens):
    return task.evaluate_predictions({"tokens": np.array(tokens), "label": label}, {})

  assert scores([[-1, -1], [-1, -1], [2, 2]]) == {"wer": 0, "cer": 0, "exact": 1}
  # As jiwer: wer("", "a") is 1, and the number of insertions where all references are empty.
  found = scores([[2, 3], [-1, -1], [2, 2]])
  assert found == {"wer": jiwer.wer(["", ""], ["ab", ""]), "cer": 2.0, "exact": 0.5}
  assert task.evaluate_predictions({"tokens": label[2:], "label": label[2:]}, {}) == {}


def test_samples_of_models_and_of_decoders_with_an_end_token():
  model = network(0)
  model = model._replace(sample=ctc_sampler(model, beam_size=4))
  rows = {name: x[1:3] for name, x in ROWS.items()}
  task = tasks.transcription(decode, use_sample=True)
  (one,) = evaluate_models([(model, model.variables)], [rows], task, predict=True)
  tokens, lengths = model.sample(model.variables, None, rows)
  assert one.predictions["tokens"][0].tolist()[: lengths[0]] == tokens[0, : lengths[0]].tolist()
  decoder = tasks.transcription(decode, end_token=10, decides="nll")
  outputs = {SAMPLE: (jnp.array([[2, 3, 10], [2, 10, 10]]), jnp.array([2, 1]))}
  predictions = decoder.predict(outputs, {"label": jnp.array([[2, 4, 10], [2, 10, -1]])})
  assert decoder.evaluate_predictions(predictions, {}) == {"wer": 0.5, "cer": 1 / 3, "exact": 0.5}
  assert decoder.generates and decoder.decides == "nll"


def test_errors():
  with pytest.raises(ValueError, match="decides"):
    tasks.transcription(decode, decides="bleu")
  label = ROWS["label"].copy()
  label[1, 0] = CLASSES
  with pytest.raises(ValueError, match="label"):
    measured(tasks.transcription(decode), network(0), rows=ROWS | {"label": label})


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("label", jnp.array([[1, 0, 2]])),
    ("label", jnp.array([[CLASSES, 0, 0]])),
    ("label", jnp.array([1])),
    ("label", jnp.array([[1.0, 2.0]])),
    ("lengths", jnp.array([4])),
    ("lengths", jnp.array([-1])),
    ("lengths", jnp.array([2.0])),
  ],
)
def test_what_ctc_refuses_is_not_scored(name, value):
  """Inside of a compiled function values cannot raise: the scores do."""
  task = tasks.transcription(decode)
  logits = jnp.zeros((1, 3, CLASSES))
  batch = {"label": jnp.array([[1, 2, 0]]), name: value}
  teacher = {"logits": logits}

  def scores(statistics):
    return task.compute(statistics({"logits": logits}, batch, teacher))

  for statistics in (task.statistics, jax.jit(task.statistics)):
    with pytest.raises(ValueError, match=name):
      scores(statistics)
  # So are those of the teacher, whose frames are compared.
  if name == "lengths" and value.dtype == int:
    teacher, batch = teacher | batch, {"label": batch["label"]}
    for statistics in (task.statistics, jax.jit(task.statistics)):
      with pytest.raises(ValueError, match=name):
        scores(statistics)
    return
  # The numbers of a row that does not count may be any.
  if value.dtype == int and batch["label"].ndim == 2:
    batch["where"] = jnp.array([False])
    assert "nll" not in scores(jax.jit(task.statistics))


def test_blank_that_is_no_class():
  task = tasks.transcription(decode, blank=CLASSES)
  with pytest.raises(ValueError, match="blank"):
    task.statistics({"logits": jnp.zeros((1, 3, CLASSES))}, {"label": jnp.ones((1, 2), int)}, None)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16])
def test_labels_of_any_integer(dtype):
  task = tasks.transcription(decode)
  outputs = {"logits": 9.0 * jax.nn.one_hot(jnp.array([[1, 2, 0]]), CLASSES)}
  predictions = task.predict(outputs, {"label": jnp.array([[1, 2, 0]], dtype)})
  assert task.evaluate_predictions(predictions, {})["cer"] == 0


def test_numbers_of_frames_may_stand_in_the_batch():
  task = tasks.transcription(decode)
  logits = 9.0 * jax.nn.one_hot(jnp.array([[1, 2, 3], [1, 2, 3]]), CLASSES)
  batch = {"label": jnp.array([[1, 2], [0, -1]]), "lengths": jnp.array([2, 0])}
  predictions = task.predict({"logits": logits}, batch)
  assert predictions["tokens"].tolist() == [[1, 2, -1], [-1, -1, -1]]
  sums = task.statistics({"logits": logits}, batch, None)
  # No frame says nothing, not even an empty transcript.
  assert [float(x) for x in sums["too_long"]] == [1.0, 2.0]
  np.testing.assert_allclose(sums["nll"][0], 2 * np.log1p((CLASSES - 1) * np.exp(-9)), rtol=1e-3)
