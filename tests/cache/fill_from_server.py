"""Fills a cache from a server in a process of its own: folder, then the server's address."""

import sys

import numpy as np
from language_models import token_rows

from distill_jax.cache import TopK, import_rows, server_rows


def fill(folder, url, rows, source, **settings):
  filler = server_rows(url, model="big", top_k=12, **settings)
  return import_rows(
    folder, filler if rows is None else rows, source, {"logits": TopK(12)}, identity="big",
    progress=False,
  )  # fmt: skip


if __name__ == "__main__":
  fill(sys.argv[1], sys.argv[2], None, token_rows(np.random.default_rng(0), number=12))
