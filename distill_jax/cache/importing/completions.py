"""Asks a server over HTTP for one completion at a time, each attempt within a time limit."""

import datetime
import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from distill_jax.storage import unique_names

RETRIED = (408, 409, 425, 429)  # and all from 500 on
WANTED = "expected an answer of the server"
CHUNK = 2**16
MAX_TEXT = 300  # characters of a server's message that errors repeat


class Refused(ValueError):
  """An answer that another attempt would not change, such as status 400."""


class NoAnswer(ValueError):
  """No answer, or one that another attempt may change.

  Attributes:
    retry_after: seconds that the server asks to wait; 0 without such a header.
  """

  def __init__(self, text: str, retry_after: float = 0.0):
    super().__init__(text)
    self.retry_after = retry_after


class Completions:
  """The completions endpoint of a server.

  Args:
    url: its base, such as `http://localhost:8000/v1`.
    api_key: sent as a bearer token; None: none. No message repeats it.
    timeout: seconds for one attempt, from its start to the last byte.

  Raises:
    ValueError: another kind of address.
  """

  def __init__(self, url: str, api_key: str | None, timeout: float):
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
      raise ValueError(f"url: expected http://HOST/v1 or https://HOST/v1, got {url!r}")
    self._url = url.rstrip("/").removesuffix("/completions") + "/completions"
    self._timeout = timeout
    self._headers = {"Content-Type": "application/json"}
    if api_key is not None:
      self._headers["Authorization"] = f"Bearer {api_key}"

  def ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the server's answer to one request.

    Raises:
      Refused: the server rejects the request: repeating it is of no use.
      NoAnswer: no answer in time, a broken connection, an overloaded server or half a JSON.
    """
    data = json.dumps(request).encode()
    http_request = urllib.request.Request(self._url, data, self._headers, method="POST")
    deadline = time.monotonic() + self._timeout
    try:
      with urllib.request.urlopen(http_request, timeout=self._timeout) as response:
        content = _read(response, deadline)
    except urllib.error.HTTPError as error:
      with error:
        self._raise_status(error, deadline)
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, "reason", error)  # of a URLError
      if isinstance(reason, TimeoutError):
        raise NoAnswer(f"{WANTED}, got none within {self._timeout:g} s") from error
      raise NoAnswer(f"{WANTED}, got a broken connection ({reason!r})") from error
    return _parse(content)

  def _raise_status(self, error: urllib.error.HTTPError, deadline: float) -> None:
    try:
      text = _message(_read(error, deadline))
    except (OSError, http.client.HTTPException):
      text = "no message"
    reason = f"{WANTED}, got status {error.code} ({text})"
    if error.code in RETRIED or error.code >= 500:
      raise NoAnswer(reason, _retry_after(error.headers.get("Retry-After"))) from error
    raise Refused(reason) from error


def _read(response: Any, deadline: float) -> bytes:
  """Returns the body of a response; a server that sends a byte now and then is no exception."""
  parts = []
  while part := response.read1(CHUNK):
    parts.append(part)
    if time.monotonic() > deadline:
      raise TimeoutError
  return b"".join(parts)


def _parse(content: bytes) -> dict[str, Any]:
  try:
    answer = unique_names.loads(content)
  except ValueError as error:
    raise NoAnswer(f"{WANTED}, got {len(content)} bytes that are no JSON ({error})") from error
  if not isinstance(answer, dict):
    raise NoAnswer(f"{WANTED}, got {_shorten(repr(answer))}")
  return answer


def _message(content: bytes) -> str:
  """Returns the server's own words about an error."""
  try:
    error = json.loads(content)
    error = error.get("error", error)
    return _shorten(str(error.get("message", error)))
  except (ValueError, AttributeError):
    return _shorten(content.decode(errors="replace")) or "no message"


def _retry_after(header: str | None) -> float:
  """Returns the seconds of a Retry-After header, which is a number or a date; 0 for others."""
  if header is None:
    return 0.0
  if header.strip().isdecimal():
    return float(header)
  try:
    date = email.utils.parsedate_to_datetime(header)
  except ValueError:
    return 0.0
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


def _shorten(text: str) -> str:
  text = " ".join(text.split())
  return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
