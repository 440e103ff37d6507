"""Augments texts on the device: a view of a text is a function of (seed, example id, view)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from distill_jax.data.checks import check_seed
from distill_jax.data.label_checks import UNLABELED
from distill_jax.errors import check_integer
from distill_jax.types import Batch


def mask_tokens(
  rate: float,
  *,
  mask: int,
  keep: Sequence[int],
  seed: int,
  replace_rate: float = 0.0,
  vocab_size: int | None = None,
  label: str | None = None,
) -> Callable[[Batch], Batch]:
  """Returns an augmentation that hides random tokens of a text: `augment=` of `fit` and of a cache.

      mask, *keep = (tokenizer.tokenizer.token_to_id(f"[{t}]") for t in ("MASK", "CLS", "SEP"))
      augment = mask_tokens(0.1, mask=mask, keep=keep, seed=0)

  Teacher and student read the same view. What is drawn for a token depends on the seed, the id, the
  view and its position only, so that a row may be padded to several lengths.
  Source: Tang et al. 2019, section 3.3, with the probability 0.1.

  Args:
    rate: probability that a token becomes `mask`.
    mask: the token that stands for a hidden one.
    keep: tokens that never change, such as [CLS] and [SEP]. Padding, negative 'segments', never
      does.
    seed: from 0 to 2^32 - 1.
    replace_rate: probability that a token becomes a random one of the vocabulary.
    vocab_size: number of tokens to draw from; needed with `replace_rate`.
    label: entry of the batch that gets the original of each token that is hidden or replaced, and
      -1 elsewhere, [B, L]: what an encoder's head 'masked' learns. None: no entry.

  Returns:
    `batch -> batch` that changes 'tokens' [B, L], and `label`, only. It reads 'id' and 'view',
    int [B].

  Raises:
    ValueError: a probability outside of 0 to 1, or a sum above 1, a token or seed out of its range,
      or no `vocab_size`; when called, the batch lacks an entry, or its tokens are no integers.

  >>> batch = {"tokens": jnp.arange(1, 9)[None], "id": jnp.array([5]), "view": jnp.array([0])}
  >>> augment = mask_tokens(0.4, mask=99, keep=(1, 8), seed=0)
  >>> augment(batch)["tokens"].shape
  (1, 8)
  """
  check_seed(seed)
  for name, value in (("rate", rate), ("replace_rate", replace_rate)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}: expected a probability, got {value}")
  if not 0 < rate + replace_rate <= 1:
    raise ValueError(
      f"rate, replace_rate: expected a sum above 0 and at most 1, got {rate + replace_rate}"
    )
  if replace_rate and vocab_size is None:
    raise ValueError(
      "vocab_size: expected the number of tokens to draw from, got None: pass the tokenizer's size"
    )
  size = 1 if vocab_size is None else check_integer("vocab_size", vocab_size, 1)
  check_integer("mask", mask, 0)
  kept = [check_integer("keep", token, 0) for token in keep]

  def augment(batch: Batch) -> Batch:
    missing = [name for name in ("tokens", "id", "view") if name not in batch]
    if missing:
      raise ValueError(f"{missing[0]}: expected an entry of the batch, got only {sorted(batch)}")
    tokens = jnp.asarray(batch["tokens"])
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"tokens: expected integers [rows, length], got {tokens.dtype} {list(tokens.shape)}"
      )
    stays = jnp.isin(tokens, jnp.array(kept, tokens.dtype))
    if "segments" in batch:
      stays |= jnp.asarray(batch["segments"]) < 0

    def draw(id, view, position):
      key = jax.random.key(seed, impl="threefry2x32")
      # One key a position: the numbers of a longer row begin with those of a shorter one.
      for number in (id, view, position):
        key = jax.random.fold_in(key, number)
      choice, token = jax.random.split(key)
      number = jax.random.uniform(choice, (), jnp.float32)
      return number, jax.random.randint(token, (), 0, size, jnp.int32)

    positions = jnp.arange(tokens.shape[1])
    of_row = jax.vmap(draw, (None, None, 0))
    number, token = jax.vmap(of_row, (0, 0, None))(batch["id"], batch["view"], positions)
    changed = jnp.where(number < rate, jnp.asarray(mask, tokens.dtype), token.astype(tokens.dtype))
    is_changed = (number < rate + replace_rate) & ~stays
    labels = {} if label is None else {label: jnp.where(is_changed, tokens, UNLABELED)}
    return {**batch, "tokens": jnp.where(is_changed, changed, tokens), **labels}

  return augment
