"""A small HTTP server with the completions API that delays, fails, truncates and lies by a plan."""

import copy
import http.server
import json
import threading
import time

import numpy as np

SLOW_SECONDS = 0.5  # longer than the clients' timeout
FAULTS = [
  "late", "dribble", "429", "500", "503", "closed", "half", "truncated", "empty", "html", "list",
  "other tokens", "fewer logprobs", "shorter", "two choices", "no choices", "positive", "nan",
  "doubled", "no token", "no mapping",
]  # fmt: skip


def plan(number, seed):
  """Returns so many faults in a random order, each kind as often as the others."""
  faults = [FAULTS[at % len(FAULTS)] for at in range(number)]
  return np.random.default_rng(seed).permutation(faults).tolist()


class CompletionsServer(http.server.ThreadingHTTPServer):
  """Serves prompts that it knows; use it as a context.

  Args:
    answers: id -> (prompt, prompt_logprobs).
    faults: what goes wrong with one request each, as long as there are some.
    hold_after: number of right answers after which it answers no more.

  Attributes:
    asked: the ids that were asked for, in order, once for each request.
    faults: those that are left.
    held: set once it answers no more.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, answers, faults=(), hold_after=None):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.answers = {tuple(prompt): (id, entries) for id, (prompt, entries) in answers.items()}
    self.faults = list(faults)
    self.asked = []
    self.headers_seen = []
    self.lock = threading.Lock()
    self.held = threading.Event()
    self.hold_after = hold_after
    self.closing = threading.Event()
    self.url = f"http://127.0.0.1:{self.server_port}/v1"

  def __enter__(self):
    self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
    self.thread.start()
    return self

  def __exit__(self, *_):
    self.closing.set()
    self.shutdown()
    self.thread.join()
    self.server_close()

  def handle_error(self, request, client_address):
    """Clients that gave up are no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    server = self.server
    with server.lock:
      server.headers_seen.append(dict(self.headers))
      fault = server.faults.pop() if server.faults else None
      id, entries = server.answers[tuple(request["prompt"])]
      server.asked.append(id)
      if server.hold_after is not None and len(server.asked) > server.hold_after:
        server.held.set()
    if server.held.is_set():
      server.closing.wait()
      return
    assert self.path == "/v1/completions" and request["max_tokens"] == 1
    choice = {"index": 0, "text": "", "prompt_token_ids": request["prompt"]}
    choice["prompt_logprobs"] = copy.deepcopy(entries)
    self._answer(fault, {"id": "cmpl-1", "model": request["model"], "choices": [choice]})

  def _answer(self, fault, answer):
    status, headers = 200, {}
    if fault in ("429", "500", "503", "400"):
      status = int(fault)
      headers = {"Retry-After": "0"} if status == 429 else {}
      answer = {"error": {"message": f"the server's {fault}", "code": status}}
    elif fault == "late":
      self.server.closing.wait(SLOW_SECONDS)
    elif fault is not None:
      _lie(fault, answer)
    data = json.dumps(answer).encode()
    if fault == "doubled":
      last = answer["choices"][0]["prompt_logprobs"][-1]
      token = next(iter(last))
      text = json.dumps(last)
      double = f'{{"{token}": {{"logprob": -9.0, "rank": 1}}, {text[1:]}'
      data = data.replace(text.encode(), double.encode())
    size = len(data)
    if fault == "closed":
      return
    if fault in ("half", "truncated"):
      data = data[: size // 2]
      size = size if fault == "truncated" else len(data)
    if fault in ("empty", "html", "list"):
      data = {"empty": b"", "html": b"<html>busy</html>", "list": b"[]"}[fault]
      size = len(data)
    self.send_response(status)
    for name, value in {"Content-Length": str(size), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if fault == "dribble":
      end = time.monotonic() + SLOW_SECONDS
      while time.monotonic() < end:
        self.wfile.write(b" ")
        time.sleep(0.02)
      return
    self.wfile.write(data)


def _lie(fault, answer):
  choices = answer["choices"]
  [choice] = choices
  entries = choice["prompt_logprobs"]
  last = entries[-1]
  own = str(choice["prompt_token_ids"][-1])
  match fault:
    case "other tokens":
      choice["prompt_token_ids"] = [*choice["prompt_token_ids"][:-1], 3]
    case "fewer logprobs":
      for entry in entries[1:]:
        for token in sorted(entry, key=lambda token: entry[token]["rank"])[2:]:
          if token not in map(str, choice["prompt_token_ids"]):
            del entry[token]
    case "shorter":
      entries.pop()
    case "two choices":
      choices.append(choice)
    case "no choices":
      choices.clear()
    case "positive":
      last[own]["logprob"] = 0.25
    case "nan":
      next(x for x in last.values() if x["rank"] == 1)["logprob"] = float("nan")
    case "no mapping":
      entries[-1] = [last, last]
    case "no token":
      last["3" * 9] = last.pop(own)
