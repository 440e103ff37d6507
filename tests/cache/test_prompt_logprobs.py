"""Checks rows from vLLM's JSON lines: they train as the teacher's own cache, or are refused."""

import copy
import json

import numpy as np
import optax
import pytest
from fitting import fit_with
from imported import answers, columns_of
from language_models import VOCABULARY, language_model, token_rows
from toys import largest_difference

from distill_jax import data, losses, objectives
from distill_jax.cache import TopK, describe, import_rows, prompt_logprobs_rows, write_cache

K = 12
OUTPUTS = {"logits": TopK(K)}
OBJECTIVE = objectives.weighted(soft=(1.0, objectives.tokens(losses.sparse_kl)))


@pytest.fixture(scope="module")
def source():
  return token_rows(np.random.default_rng(0), number=12)


@pytest.fixture(scope="module")
def teacher():
  return language_model(1, logits=True)


@pytest.fixture(scope="module")
def lines(source, teacher):
  """The lines of a file, shuffled."""
  by_id = answers(teacher, source, K)
  order = np.random.default_rng(1).permutation(list(by_id))
  return [
    {"id": int(id), "prompt_token_ids": by_id[id][0], "prompt_logprobs": by_id[id][1]}
    for id in order
  ]


def read(folder, lines, source, k=K):
  path = folder / "rows.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return prompt_logprobs_rows(path, source, top_k=k)


def imported(folder, lines, source):
  rows = read(folder, lines, source)
  return import_rows(
    folder / "imported", rows, source, OUTPUTS, identity="a server", progress=False
  )


@pytest.fixture(scope="module")
def cache(tmp_path_factory, lines, source):
  return imported(tmp_path_factory.mktemp("cache"), lines, source)


def test_rows_are_those_of_the_teachers_own_cache(tmp_path, cache, source, teacher):
  own = write_cache(tmp_path, teacher, source, OUTPUTS, batch_size=8, progress=False)
  stored = columns_of(cache, source)
  expected = columns_of(own, source)
  labeled = source.arrays["label"][np.argsort(source.ids)] >= 0
  assert not labeled.all()
  for name, values in expected.items():
    # 1 - sum(p) is the remaining probability but for float32's rounding: 2e-4 of the smallest.
    tolerance = 1e-3 if values.dtype.kind == "f" else 0
    np.testing.assert_allclose(stored[name][labeled], values[labeled], tolerance, tolerance, name)
  assert f"{labeled.sum()} stored labels" in describe(cache, source)

  def train(outputs):
    student = language_model(7, 4, exact=False)._replace(variables=None)
    return fit_with(
      student, outputs, OBJECTIVE, optax.adam(1e-2), source, steps=6, batch_size=8, ignore_label=-1
    )

  imported_result = train(cache)
  assert largest_difference(imported_result, train(own)) < 1e-6
  assert imported_result.history[0]["loss"] > 0.1


@pytest.mark.parametrize("form", ["no token ids", "no ranks", "choices", "more than k"])
def test_other_forms_of_lines_are_the_same_rows(tmp_path, cache, lines, source, teacher, form):
  lines = copy.deepcopy(lines)
  by_id = answers(teacher, source, K + 5)
  for line in lines:
    if form != "choices":
      line.pop("prompt_token_ids")
    if form == "no ranks":
      for entry in line["prompt_logprobs"][1:]:
        entry.update((token, value["logprob"]) for token, value in entry.items())
    elif form == "choices":
      line["choices"] = [{"index": 0, "prompt_logprobs": line.pop("prompt_logprobs")}]
    elif form == "more than k":
      line["prompt_logprobs"] = by_id[line["id"]][1]
  other = imported(tmp_path, lines, source)
  assert other.check_checksums()["sha256"] == cache.check_checksums()["sha256"]


def without(entry, count):
  for token in sorted(entry, key=lambda token: entry[token]["rank"])[K - count : K]:
    del entry[token]


def renamed(line, old, new):
  entry = line["prompt_logprobs"][3]
  line["prompt_logprobs"][3] = {new if token == old else token: x for token, x in entry.items()}


def own(line):
  return str(line["prompt_token_ids"][3])


def other(line):
  return next(token for token in line["prompt_logprobs"][3] if token != own(line))


WRONG = {
  "position 2: .*next token": lambda line: line["prompt_logprobs"][3].pop(own(line)),
  "position 2: .*the 12 most probable": lambda line: without(line["prompt_logprobs"][3], 2),
  "position 1: expected the tokens of the source": lambda line: line.update(
    prompt_token_ids=[line["prompt_token_ids"][0], 1, 2]
  ),
  "expected prompt_logprobs of": lambda line: line["prompt_logprobs"].pop(),
  "got None": lambda line: line.pop("prompt_logprobs"),
  "position 2: expected a mapping": lambda line: line["prompt_logprobs"].__setitem__(3, None),
  "position 2: .*token ids": lambda line: renamed(line, other(line), " the"),
  f"position 2: expected classes 0 to {VOCABULARY - 1}, got {10**11 - 1}": lambda line: renamed(
    line, other(line), str(10**11 - 1)
  ),
  "position 2: .*'logprob': None": lambda line: line["prompt_logprobs"][3][own(line)].update(
    logprob=None
  ),
  "position 2: .*at most 0": lambda line: line["prompt_logprobs"][3][own(line)].update(logprob=0.5),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_answers_are_refused(tmp_path, lines, source, reason):
  lines = copy.deepcopy(lines)
  line = next(line for line in lines if len(line["prompt_logprobs"]) > 5)
  WRONG[reason](line)
  with pytest.raises(ValueError, match=f"example id {line['id']}, view 0.*{reason}"):
    imported(tmp_path, lines, source)


@pytest.mark.parametrize(
  "text, reason",
  [
    ('{"id": 0, "prompt_log', "expected a JSON object"),
    ('{"prompt_logprobs": []}', '"id"'),
    ("[]", "expected a JSON object"),
    ('{"id": 99999}', "example id 99999"),
    ('{"id": 0, "prompt_logprobs": [null, {"1": -1.0, "1": -2.0}]}', "two entries '1'"),
    ('{"id": 0, "choices": [{}, {}]}', "expected one choice, got 2"),
    ('{"id": 0, "prompt_token_ids": 7}', "a list in prompt_token_ids"),
  ],
)
def test_wrong_lines_are_named(tmp_path, source, text, reason):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n" + text)
  with pytest.raises(ValueError, match=reason) as error:
    list(prompt_logprobs_rows([path], source, top_k=K))
  assert "line 2" in str(error.value) or "example id" in str(error.value)


def test_minus_infinity_is_no_class(tmp_path, lines, source):
  lines = copy.deepcopy(lines)
  token = other(lines[0])
  lines[0]["prompt_logprobs"][3][token]["logprob"] = -9999.0
  [row] = [row for row in read(tmp_path, lines, source) if row[0] == lines[0]["id"]]
  at = row[2]["indices"][2].tolist().index(int(token))
  assert row[2]["logprobs"][2, at] == -np.inf


def test_labels_must_be_the_next_tokens(tmp_path, source, lines):
  arrays = {name: np.array(x) for name, x in source.arrays.items()}
  arrays["label"] = arrays["tokens"]
  unshifted = data.Source(arrays, VOCABULARY, name="words")
  with pytest.raises(ValueError, match="position 0: .*shift the labels"):
    list(read(tmp_path, lines, unshifted))
  with pytest.raises(ValueError, match="expected a text"):
    list(read(tmp_path, lines, {"x": np.zeros((2, 2))}))
  with pytest.raises(ValueError, match="top_k"):
    list(read(tmp_path, lines, source, VOCABULARY + 1))
