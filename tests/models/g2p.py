"""The network of g2p-en 2.1.0 in JAX, with its name map: a GRU encoder-decoder from words to
phones."""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models import from_apply
from distill_jax.models.weights import torch_kernel

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = (
  "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH UW"  # UW is there without stress too
)
PHONES = ["<pad>", "<unk>", "<s>", "</s>"]
PHONES += sorted(
  [f"{vowel}{stress}" for vowel in VOWELS.split() for stress in "012"] + CONSONANTS.split()
)
SAMPLE = pathlib.Path(__file__).with_name("cmudict_200.txt")
PARTS = {"input": "w_ih", "state": "w_hh"}
NAMES = {
  **{f"params/{side}/embedding": f"{side[:3]}_emb" for side in ("encoder", "decoder")},
  **{
    f"params/{side}/{part}/kernel": (f"{side[:3]}_{name}", torch_kernel)
    for side in ("encoder", "decoder")
    for part, name in PARTS.items()
  },
  **{
    f"params/{side}/{part}/bias": f"{side[:3]}_b{name[1:]}"
    for side in ("encoder", "decoder")
    for part, name in PARTS.items()
  },
  "params/head/kernel": ("fc_w", torch_kernel),
  "params/head/bias": "fc_b",
}


def released() -> pathlib.Path | None:
  """The weights that the package carries. It is not imported: that downloads data."""
  try:
    files = importlib.metadata.files("g2p-en") or []
  except importlib.metadata.PackageNotFoundError:
    return None
  return next((pathlib.Path(str(f.locate())) for f in files if f.name == "checkpoint20.npz"), None)


def network(width: int):
  """Returns a model: `word` [B, L] to '</s>' and `phones` [B, T] from '<s>' -> logits [B, T,
  74]."""
  return from_apply(lambda key, *_: init(key, width), forward, inputs=("word", "phones"))


def init(key, width):
  keys = iter(jax.random.split(key, 7))

  def dense(rows, columns):
    kernel = jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)
    return {"kernel": kernel, "bias": jnp.zeros(columns)}

  def side(symbols):
    embedding = jax.random.normal(next(keys), (symbols, width))
    return {
      "embedding": embedding,
      "input": dense(width, 3 * width),
      "state": dense(width, 3 * width),
    }

  return {"encoder": side(29), "decoder": side(74), "head": dense(width, 74)}


def gru(params, h, x):
  """PyTorch's cell: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html."""
  parts = (("input", x), ("state", h))
  of_input, of_state = (a @ params[p]["kernel"] + params[p]["bias"] for p, a in parts)
  input_r, input_z, input_n = jnp.split(of_input, 3, -1)
  state_r, state_z, state_n = jnp.split(of_state, 3, -1)
  r = jax.nn.sigmoid(input_r + state_r)
  z = jax.nn.sigmoid(input_z + state_z)
  return (1 - z) * jnp.tanh(input_n + r * state_n) + z * h


def encode(params, word):
  ended = jnp.cumsum(word == 2, -1) - (word == 2) > 0  # after '</s>'

  def step(h, now):
    x, over = now
    return jnp.where(over[:, None], h, gru(params, h, x)), None

  inputs = params["embedding"][word].swapaxes(0, 1), ended.T
  return jax.lax.scan(step, jnp.zeros((len(word), params["embedding"].shape[1])), inputs)[0]


def forward(params, word, phones):
  def step(h, x):
    h = gru(params["decoder"], h, x)
    return h, h

  inputs = params["decoder"]["embedding"][phones].swapaxes(0, 1)
  hidden = jax.lax.scan(step, encode(params["encoder"], word), inputs)[1].swapaxes(0, 1)
  return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def spell(words) -> np.ndarray:
  table = np.zeros((len(words), max(map(len, words)) + 1), np.int32)
  for row, word in zip(table, words):
    row[: len(word) + 1] = [*map(LETTERS.index, word), 2]
  return table


@jax.jit
def greedy(params, word):
  def step(carry, _):
    h, phone = carry
    h = gru(params["decoder"], h, params["decoder"]["embedding"][phone])
    phone = (h @ params["head"]["kernel"] + params["head"]["bias"]).argmax(-1)
    return (h, phone), phone

  start = encode(params["encoder"], word), jnp.full(len(word), 2)
  return jax.lax.scan(step, start, length=20)[1].T


def pronounce(params, words) -> list[list[str]]:
  rows = [[PHONES[i] for i in row] for row in np.asarray(greedy(params, spell(words)))]
  return [row[: row.index("</s>")] if "</s>" in row else row for row in rows]


def phone_error_rate(found, expected) -> float:
  return sum(map(edits, found, expected)) / sum(map(len, expected))


def edits(a, b) -> int:
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    last, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
  return row[-1]


def dictionary(path=SAMPLE) -> tuple[list[str], list[list[str]]]:
  lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
  return [line[0] for line in lines], [line[1:] for line in lines]
