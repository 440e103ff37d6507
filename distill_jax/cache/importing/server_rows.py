"""Fills a cache from a server with the completions API of OpenAI and vLLM's prompt_logprobs."""

import concurrent.futures
import random
import threading
import time
from collections.abc import Iterator

from distill_jax.cache.arguments import check_count
from distill_jax.cache.importing.completions import Completions, NoAnswer, Refused
from distill_jax.cache.importing.importer import Filler, MissingRows, Row
from distill_jax.cache.importing.prompt_logprobs import prompt_of
from distill_jax.cache.importing.row_checks import RowSpec, check_row, row_name
from distill_jax.cache.importing.token_rows import TokenRows

LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left for another day


def server_rows(
  url: str,
  *,
  model: str,
  top_k: int,
  api_key: str | None = None,
  concurrency: int = 8,
  attempts: int = 8,
  timeout: float = 60.0,
  backoff: float = 1.0,
) -> Filler:
  """Returns a function that lets `import_rows` ask a server with `prompt_logprobs`, such as vLLM's.

  Each row of a text is one request of token ids (`prompt_logprobs_rows` says which, and how the
  answer is normalized). An answer is checked in full before it counts. No answer in time, a broken
  connection, status 408, 409, 425, 429 or 5xx, half a JSON, and an answer of other tokens, of too
  few or of impossible log-probabilities are asked again, after `backoff * 2 ** n` seconds times a
  random number from 0.5 to 1.5, and not before the server's Retry-After, which all requests obey.
  Any other status ends the import with the server's message. Rows that came are kept: the same call
  of `import_rows` asks for the others only.

  The server sees a row as one text: documents that are packed into one row see each other, as they
  do in a student without `segments`. A vLLM server limits `top_k` by its `--max-logprobs`.

  Args:
    url: base of the API, such as `http://localhost:8000/v1`.
    model: name of the model on the server.
    top_k: number of tokens at each position, at least the k of `TopK`.
    api_key: sent as a bearer token; None: none.
    concurrency: requests at once.
    attempts: requests for one row, after which the import ends.
    timeout: seconds for one request.
    backoff: seconds before the second attempt, doubled for every further one.

  Raises:
    ValueError: an argument is out of range. In `import_rows`: a row got no right answer; the
      message names id, view, the answer and the attempts.

  >>> from distill_jax import cache
  >>> rows = cache.server_rows("http://localhost:8000/v1", model="big", top_k=16)
  >>> identity = "big at revision 1a2b, bfloat16, vLLM 0.11"
  >>> def fill(folder, train):  # asks the server for each row of the text `train` once
  ...   return cache.import_rows(folder, rows, train, {"logits": cache.TopK(16)}, identity=identity)
  """
  completions = Completions(url, api_key, timeout)
  check_count("concurrency", concurrency)
  check_count("attempts", attempts)
  for name, value in {"timeout": timeout, "backoff": backoff}.items():
    if not value > 0:
      raise ValueError(f"{name}: expected seconds > 0, got {value}")

  def fill(missing: MissingRows) -> Iterator[Row]:
    tokens = TokenRows(missing.source, top_k)
    k = missing.spec.k
    if not k:
      raise ValueError("outputs: expected TopK, got a codec of logits: a server sends lists")
    if top_k < k:
      raise ValueError(f"top_k: expected at least {k}, as outputs stores TopK({k}), got {top_k}")
    asker = _Asker(completions, tokens, model, top_k, missing.spec, attempts, backoff)
    return _in_parallel(asker, missing.ids.tolist(), concurrency)

  return fill


class _Asker:
  """Asks for one row until the answer is right; threads share the time before which none asks."""

  def __init__(
    self,
    completions: Completions,
    tokens: TokenRows,
    model: str,
    top_k: int,
    spec: RowSpec,
    attempts: int,
    backoff: float,
  ):
    self.stop = threading.Event()
    self._completions = completions
    self._tokens = tokens
    self._request = {"model": model, "max_tokens": 1, "temperature": 1.0, "n": 1}
    self._request |= {"prompt_logprobs": top_k, "return_token_ids": True}
    self._spec = spec
    self._attempts = attempts
    self._backoff = backoff
    self._not_before = 0.0

  def row(self, id: int) -> Row | None:
    """Returns a checked row; None once `stop` is set.

    Raises:
      ValueError: the server refused it, or gave no right answer in all attempts.
    """
    prompt = self._tokens.prompt(id)
    for attempt in range(self._attempts):
      if self.stop.wait(max(0.0, self._not_before - time.monotonic())):
        return None
      try:
        return self._ask(id, prompt)
      except NoAnswer as error:
        failure = error
      if failure.retry_after > LONGEST_WAIT:
        raise _named(id, failure, "the server asks to wait longer than is sensible")
      self._not_before = max(self._not_before, time.monotonic() + failure.retry_after)
      # Threads that failed together must not ask together again.
      pause = min(self._backoff * 2.0 ** min(attempt, 60), LONGEST_WAIT) * random.uniform(0.5, 1.5)
      if attempt + 1 < self._attempts and self.stop.wait(pause):
        return None
    raise _named(id, failure, f"this was attempt {self._attempts}, look at the server")

  def _ask(self, id: int, prompt: list[int]) -> Row:
    """Returns the row of one answer, which is checked in full.

    Raises:
      NoAnswer: there is no answer, or a wrong one.
      ValueError: the server refuses the request.
    """
    try:
      answer = self._completions.ask({**self._request, "prompt": prompt}) if prompt else {}
      logprobs, token_ids = prompt_of(row_name(id, 0), answer) if prompt else ([], None)
      row = id, 0, self._tokens.values(id, prompt, logprobs, token_ids)
      check_row(self._spec, row)
      return row
    except NoAnswer:
      raise
    except Refused as error:
      raise _named(id, error, "correct the request or the server") from error
    except ValueError as error:
      raise NoAnswer(str(error)) from error


def _named(id: int, error: ValueError, hint: str) -> ValueError:
  """Returns an error that names the row, and says what to do."""
  text = str(error)
  if not text.startswith(row_name(id, 0)):
    text = f"{row_name(id, 0)}: {text}"
  return ValueError(f"{text}: {hint}, then call import_rows again")


def _in_parallel(asker: _Asker, ids: list[int], concurrency: int) -> Iterator[Row]:
  """Yields the rows as they come, with so many requests at once; raises the first error."""
  pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="server_rows")
  remaining = iter(ids)
  futures: set[concurrent.futures.Future] = set()
  try:
    while True:
      # As many again wait in the pool, so that no thread is idle while a row is encoded.
      while len(futures) < 2 * concurrency and (id := next(remaining, None)) is not None:
        futures.add(pool.submit(asker.row, id))
      if not futures:
        return
      done, futures = concurrent.futures.wait(
        futures, return_when=concurrent.futures.FIRST_COMPLETED
      )
      # What came is kept before an error ends the import.
      for future in sorted(done, key=lambda future: future.exception() is not None):
        yield future.result()
  finally:
    asker.stop.set()
    pool.shutdown(wait=False, cancel_futures=True)
