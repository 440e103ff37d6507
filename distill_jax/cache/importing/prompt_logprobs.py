"""Reads rows from the answers of vLLM and of servers like it, one JSON object in a line."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_jax.cache.importing.importer import Row
from distill_jax.cache.importing.token_rows import TokenRows
from distill_jax.storage import unique_names


def prompt_logprobs_rows(
  paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], source: Any, *, top_k: int
) -> Iterator[Row]:
  """Yields rows for `import_rows` from JSON lines with `prompt_logprobs`.

  A line is `{"id": 7, "prompt_logprobs": [null, {"42": {"logprob": -0.1, "rank": 1}, ...}, ...]}`,
  where `id` is the example's. The prompt must be the row's tokens up to the last position with a
  label, and that label, because the entry of token t + 1 is the prediction at position t. An entry
  has the `top_k` most probable tokens, and the prompt's own if it is none of them, which becomes
  the label's log-probability. `prompt_token_ids`, if the line has them, are compared too. Positions
  after the last label count for no loss of tokens, and get a uniform distribution.

  vLLM's log-probabilities are natural logarithms at temperature 1 under the normalizer of the full
  vocabulary (`logprobs_mode="raw_logprobs"`, its default), as `TopK` stores them.

  Args:
    paths: one file or several.
    source: as for `import_rows`; a text with 'tokens' and 'label' [N, L].
    top_k: number of tokens to read at each position, at least the k of `TopK`.

  Raises:
    ValueError: a line is no such JSON, or its tokens are not the source's; the message names the
      line, or id and position.
    OSError: a file cannot be read.

  >>> import json, pathlib, tempfile
  >>> from distill_jax import cache, data
  >>> arrays = {"tokens": np.array([[0, 1]]), "label": np.array([[1, 2]])}
  >>> source = data.Source(arrays, classes=3)
  >>> entry = {"1": {"logprob": -0.7, "rank": 1}, "2": {"logprob": -1.2, "rank": 2}}
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
  >>> _ = path.write_text(json.dumps({"id": 0, "prompt_logprobs": [None, entry, entry]}))
  >>> rows = cache.prompt_logprobs_rows(path, source, top_k=2)
  >>> outputs = {"logits": cache.TopK(2)}
  >>> options = {"identity": "by hand", "progress": False}
  >>> len(cache.import_rows(path.parent / "cache", rows, source, outputs, **options))
  1
  """
  tokens = TokenRows(source, top_k)
  for path in [paths] if isinstance(paths, str | os.PathLike) else list(paths):
    with Path(path).open(encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          name = f"{path}, line {number}"
          values = _parse_line(name, line)
          prompt = tokens.prompt(values["id"])
          yield values["id"], 0, tokens.values(values["id"], prompt, *prompt_of(name, values))


def prompt_of(name: str, answer: Mapping[str, Any]) -> tuple[Any, Any]:
  """Returns `prompt_logprobs` and `prompt_token_ids` of an answer, or of its only choice.

  Raises:
    ValueError: there is not one choice.
  """
  if "choices" in answer:
    choices = answer["choices"]
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], Mapping)):
      count = len(choices) if isinstance(choices, list) else choices
      raise ValueError(f"{name}: expected one choice, got {count!r}: ask for n=1 of one prompt")
    answer = {**answer, **choices[0]}
  token_ids = answer.get("prompt_token_ids")
  if not isinstance(token_ids, list | None):
    raise ValueError(
      f"{name}: expected a list in prompt_token_ids, got {token_ids!r}: leave it out"
    )
  return answer.get("prompt_logprobs"), token_ids


def _parse_line(name: str, line: str) -> dict[str, Any]:
  try:
    values = unique_names.loads(line)
  except ValueError as error:
    raise ValueError(f"{name}: expected a JSON object, got {line[:40]!r}: {error}") from error
  if not isinstance(values, dict) or not isinstance(values.get("id"), int):
    raise ValueError(
      f'{name}: expected a JSON object with the example\'s "id", an integer, got {line[:40]!r}: '
      "add it"
    )
  return values
