"""Checks caches that a server fills: whatever it does, what is stored is right."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from completions_server import FAULTS, CompletionsServer, plan
from fill_from_server import fill
from imported import answers
from language_models import language_model, token_rows

from distill_jax.cache import Dense, Incomplete, TopK, import_rows, open_cache, server_rows
from distill_jax.cache.importing import completions
from distill_jax.cache.importing.journal import Journal
from distill_jax.cache.importing.token_rows import TokenRows

K = 12
QUICK = dict(timeout=0.25, backoff=1e-4)


@pytest.fixture(scope="module")
def source():
  return token_rows(np.random.default_rng(0), number=12)


@pytest.fixture(scope="module")
def right(source):
  return answers(language_model(1, logits=True), source, K)


@pytest.fixture(scope="module")
def digest(tmp_path_factory, source, right):
  """Digest of the cache of right answers."""
  tokens = TokenRows(source, K)
  rows = [(id, 0, tokens.values(id, *answer)) for id, answer in right.items()]
  cache = fill(tmp_path_factory.mktemp("right"), "http://unused", rows, source)
  return cache.check_checksums()["sha256"]


def test_two_hundred_faults_leave_nothing_wrong(tmp_path, source, right, digest):
  with CompletionsServer(right, plan(200, seed=5)) as server:
    cache = fill(tmp_path, server.url, None, source, attempts=200, concurrency=16, **QUICK)
    assert not server.faults
    assert len(server.asked) >= 200 + len(source)
  assert cache.check_checksums()["sha256"] == digest


REASONS = {
  "late": "none within",
  "dribble": "none within",
  "429": "status 429 .*the server's 429",
  "500": "status 500",
  "closed": "broken connection",
  "half": "no JSON",
  "doubled": "two entries",
  "other tokens": "expected the tokens of the source",
  "fewer logprobs": "most probable",
  "two choices": "one choice, got 2",
  "positive": "at most 0",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_lasts_is_named(tmp_path, source, right, fault):
  reason = rf"example id \d+, view 0.*{REASONS.get(fault, '')}.*attempt 2, look"
  with CompletionsServer(right, [fault] * 100) as server:
    with pytest.raises(ValueError, match=reason):
      fill(tmp_path, server.url, None, source, attempts=2, concurrency=2, **QUICK)
  with pytest.raises(Incomplete):
    open_cache(tmp_path)


def test_a_refused_request_is_not_repeated(tmp_path, source, right):
  with CompletionsServer(right, ["400"] * 100) as server:
    with pytest.raises(ValueError, match="status 400.*the server's 400"):
      fill(tmp_path, server.url, None, source, concurrency=1, **QUICK)
    assert len(server.asked) == len(set(server.asked))


def test_a_killed_process_resumes_without_asking_again(tmp_path, source, right, digest):
  script = Path(__file__).with_name("fill_from_server.py")
  with CompletionsServer(right, hold_after=8) as server:
    command = [sys.executable, script, tmp_path, server.url]
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert server.held.wait(60)
    [journal] = tmp_path.glob("rows-*")
    deadline = time.monotonic() + 30
    while not journal.stat().st_size:
      assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
  stored = [int(id) for id in records(journal)]
  with pytest.raises(Incomplete):
    open_cache(tmp_path)
  with CompletionsServer(right) as server:
    cache = fill(tmp_path, server.url, None, source)
    assert stored
    assert sorted(server.asked + stored) == sorted(right)
  assert cache.check_checksums()["sha256"] == digest


def records(journal):
  """Returns the ids in a journal, whose records are 488 bytes."""
  content = journal.read_bytes()
  return np.frombuffer(content[: len(content) // 488 * 488], "<i8").reshape(-1, 61)[:, 0]


def test_threads_end_with_an_import_that_fails(tmp_path, source, right, monkeypatch):
  def full(*_):
    raise OSError("no space")

  monkeypatch.setattr(Journal, "append", full)
  with CompletionsServer(right, ["503"] * 10_000 + [None]) as server:
    with pytest.raises(OSError, match="no space") as error:
      fill(tmp_path, server.url, None, source, attempts=10_000, **QUICK)
    threads = [x for x in threading.enumerate() if x.name.startswith("server_rows")]
    for thread in threads:
      thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
  del error  # until here it held the generator, which would otherwise end by itself


def test_no_server_is_an_error(tmp_path, source):
  with pytest.raises(ValueError, match="broken connection"):
    fill(tmp_path, "http://127.0.0.1:9", None, source, attempts=2, **QUICK)


def test_the_key_is_sent_and_not_repeated(tmp_path, source, right):
  with CompletionsServer(right, ["400"] * 100) as server:
    with pytest.raises(ValueError) as error:
      fill(tmp_path, server.url, None, source, api_key="secret", **QUICK)
    assert server.headers_seen[0]["Authorization"] == "Bearer secret"
  assert "secret" not in repr(error.value)


@pytest.mark.parametrize(
  "header, seconds",
  [(None, 0), ("7", 7), ("soon", 0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0)],
)
def test_retry_after_is_a_number_or_a_date(header, seconds):
  assert completions._retry_after(header) == seconds


def test_retry_after_holds_for_all_requests(tmp_path, source, right, monkeypatch):
  monkeypatch.setattr(completions, "_retry_after", lambda header: 1e4 if header else 0.0)
  with CompletionsServer(right, ["429"]) as server:
    with pytest.raises(ValueError, match="asks to wait longer"):
      fill(tmp_path, server.url, None, source, **QUICK)


def test_arguments_are_checked():
  for settings in (dict(attempts=0), dict(concurrency=0), dict(timeout=0), dict(backoff=-1)):
    with pytest.raises(ValueError, match=next(iter(settings))):
      server_rows("http://host/v1", model="big", top_k=4, **settings)
  with pytest.raises(ValueError, match="url"):
    server_rows("file:///etc", model="big", top_k=4)


@pytest.mark.parametrize("codec, reason", [(TopK(K + 1), "top_k: "), (Dense(), "outputs: ")])
def test_a_codec_of_more_than_is_asked_for_sends_no_request(tmp_path, source, right, codec, reason):
  with CompletionsServer(right, []) as server:
    rows = server_rows(server.url, model="big", top_k=K, **QUICK)
    with pytest.raises(ValueError, match=reason):
      import_rows(tmp_path, rows, source, {"logits": codec}, identity="big", inputs=["tokens"])
    assert not server.asked
