"""Decodes every row of a source with a teacher's sampler, and writes the sequences as a cache."""

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.arguments import check_count
from distill_jax.cache.reader import Cache
from distill_jax.cache.sequence_level.candidates import Keep, TokenLimits
from distill_jax.cache.sequence_level.decoder import Decoder, make_decoder
from distill_jax.cache.sequence_level.reading import pseudo_labels, read_candidates
from distill_jax.cache.sequence_level.selection import as_rules, store_selection
from distill_jax.cache.shard_filling import fill_missing, progress_bar
from distill_jax.cache.store import manifest as manifests
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store, open_store
from distill_jax.cache.store.format import Column
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.rows import RowIndex
from distill_jax.cache.teacher_inputs import ArrayInputs
from distill_jax.data import Source
from distill_jax.distributed import sharding
from distill_jax.errors import check_integer, suggest
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.types import Variables, input_names
from distill_jax.version import __version__

SHARD_BATCHES = 16  # at most, which a killed writer loses


def seq_kd(
  url: str | os.PathLike[str],
  sampler: Callable[..., Any],
  variables: Variables,
  source: Source | Mapping[str, Any],
  *,
  start_token: int | None,
  end_token: int | None,
  blank: int = 0,
  settings: Mapping[str, Any],
  keep: Keep | Sequence[Keep] = (),
  key: jax.Array | None = None,
  inputs: Sequence[str] | None = None,
  batch_size: int = 64,
  progress: bool = True,
) -> Source:
  """Writes the sequences that a teacher generates for every row, and reads them as pseudo labels.

  An earlier call that was interrupted is resumed: the rows then have the same bytes as without the
  interruption. A finished file of the same teacher, data and settings is opened as it is, without a
  call of the sampler. Several processes may write one file at once.

  Args:
    url: a folder, or `gs://`, `s3://`, `file://`, `memory://`, as for `write_cache`.
    sampler: `(Variables, key, batch) -> (tokens int32 [B, L], lengths int32 [B])`, or a beam
      search, `(Variables, batch) -> (tokens int32 [B, K, L], lengths int32 [B, K], scores float32
      [B, K])`, best first; the functions of `models.decoding` under `jax.jit`, or any other.
      `tokens` have no start token, `lengths` do not count the end token, and a sequence that has
      not ended has length L. A row's sequences must not depend on the batch's other rows; random
      ones depend on `key` and the row's 'id'.
    variables: the teacher's weights; `Variables({}, {})` for a teacher elsewhere, which `settings`
      then name.
    source: the rows to decode, labeled or not. 'label' [N, T], if there is one, holds the
      references: the teacher does not see them.
    start_token: the student's first input, which precedes each target in 'tokens'; None: CTC.
    end_token: token that ends each target in 'label'; None: CTC, whose targets have neither.
    blank: class of no token in CTC, which pads sequences; not read with an end token.
    settings: plain values that say how the sampler decodes, such as `{"beam_size": 4,
      "max_length": 24}`. A file of other settings is rejected.
    keep: `Candidates -> bool [N, K]`, or several, in this order: which sequences of each row may be
      kept (`nearest_to_reference`, `below`, ...). Of those that are left, the first is the row's
      target; a row without any is dropped. Always left out are empty sequences, those that have
      not ended within L tokens, those that begin with the start token, and those that, with the end
      token, are longer than the source's 'label'; of CTC longer ones only: an empty sequence is
      the blank alone.
      `pseudo_labels(url, source, keep)` makes other choices among the sequences of a finished file.
    key: a typed PRNG key for a sampler that draws; None: `jax.random.key(0)`.
    inputs: entries of the source that the sampler reads; None: all whose names begin with 'source',
      or, of CTC, all inputs. It gets these and 'id'.
    batch_size: rows that are decoded at once, over all devices.
    progress: whether to show a progress bar, and to print how many rows each function dropped.

  Returns:
    `pseudo_labels(url, source)`.

  Raises:
    ValueError: the source has no such entries; the sampler returns other shapes or dtypes, tokens
      outside of the source's classes, or end tokens inside of a sequence (the message names the
      example; its part of the file is not written); or no row is left.
    Mismatch: a file of another teacher, other data, settings or `keep` is there; the message names
      each field. It is a ValueError.
    CorruptCache: a row of the file was changed; the message names it.
    OSError: the folder cannot be written, or is full.

  >>> import tempfile
  >>> from distill_jax import cache, data
  >>> from distill_jax.types import Variables
  >>> arrays = {"source": np.array([[5, 6], [7, 0]]), "label": np.array([[9, 0], [9, 0]])}
  >>> source = data.Source(arrays, classes=10)
  >>> def copy(variables, key, batch):  # a teacher that repeats the source; token 0 is the end
  ...   tokens = np.pad(np.asarray(batch["source"]), ((0, 0), (0, 1)))
  ...   return tokens, (tokens > 0).sum(1)
  >>> teacher = Variables({}, {})
  >>> labels = cache.seq_kd(
  ...   tempfile.mkdtemp(), copy, teacher, source, start_token=1, end_token=0,
  ...   settings={"teacher": "copy"}, progress=False)  # the sequence of row 0 is too long
  >>> labels.ids, labels.arrays["tokens"], labels.arrays["label"]
  (array([1], dtype=int32), array([[1, 7]], dtype=int32), array([[7, 0]], dtype=int32))
  """
  store = open_store(url)
  source = source if isinstance(source, Source) else Source(source)
  rules = as_rules(keep)
  limits = _limits(start_token, end_token, blank, source)
  names = _input_names(source, inputs, limits.has_end)
  mesh = sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  teacher_inputs = ArrayInputs(source)
  decoder = make_decoder(sampler, variables, key, names, limits, mesh)
  manifest_identity = {
    "teacher": {"weights": fingerprint(tuple(variables))},
    "data": teacher_inputs.identity(names),
    "augmentation": identity.augmentation_identity(None, {}, ()),
    "decoding": _decoding_identity(settings, key, limits),
    "outputs": {},
  }
  wanted = _manifest(store, manifest_identity, decoder, teacher_inputs, batch_size)
  manifest = shards.begin(store, wanted)
  missing = shards.missing_shards(store, manifest)
  if missing:
    store.probe_writable(sum(manifest.header(shard).size for shard in missing))
    fill_missing(
      store, manifest, teacher_inputs, decoder, batch_size=batch_size, part=None, progress=progress
    )
  if missing or store.read(shards.COMPLETE) is None:
    shards.complete(
      store, manifest, lambda n: progress_bar(n, "cache: reading back", " shard", progress)
    )
  sorted_source = source.take(np.argsort(source.ids))
  candidates = read_candidates(Cache(store, manifest), sorted_source)
  selection = store_selection(store, manifest, candidates, rules)
  if progress:
    print(selection, flush=True)
  return pseudo_labels(url, source)


def _manifest(
  store: Store,
  manifest_identity: Mapping[str, Any],
  decoder: Decoder,
  inputs: ArrayInputs,
  batch_size: int,
) -> Manifest:
  """Returns the manifest to write; where there is none yet, a first batch shows its columns."""
  ids = np.sort(inputs.source.ids)
  stored = manifests.load(store)
  if stored is None:
    first = np.minimum(np.arange(batch_size), len(ids) - 1)
    columns, _ = decoder.start(inputs.batch(ids[first], np.zeros(batch_size)), None)()
    specs = tuple(Column(name, x.dtype, x.shape[1:]) for name, x in columns.items())
  else:
    specs = stored.columns
  provenance = {
    "jax": jax.__version__,
    "distill_jax": __version__,
    "device": jax.devices()[0].device_kind,
    "batch_size": batch_size,
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }
  rows_per_shard = min(SHARD_BATCHES * batch_size, len(ids))
  return Manifest(manifest_identity, specs, RowIndex(ids), rows_per_shard, provenance)


def _decoding_identity(
  settings: Mapping[str, Any], key: jax.Array | None, limits: TokenLimits
) -> dict[str, Any]:
  """Returns the `decoding` part of the identity."""
  try:
    values = json.loads(json.dumps(dict(settings), allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"settings: expected plain values by name, got {settings!r}: write such as "
      '{"beam_size": 4, "max_length": 24}'
    ) from error
  if not values:
    raise ValueError(
      'settings: expected how the sampler decodes, such as {"beam_size": 4, "max_length": 24}, '
      "got none: a file of other settings could not be rejected"
    )
  return {
    "settings": values,
    **_special_tokens(limits),
    "key": None if key is None else jax.random.key_data(key).tolist(),
  }


def _special_tokens(limits: TokenLimits) -> dict[str, int | None]:
  """Returns the tokens of the identity; files of encoder-decoders do not name a blank."""
  if limits.has_end:
    return {"start_token": limits.start_token, "end_token": limits.end_token}
  return {"start_token": None, "end_token": None, "blank": limits.end_token}


def _limits(
  start_token: int | None, end_token: int | None, blank: int, source: Source
) -> TokenLimits:
  """Returns what tokens the sampler may return, after a check of the special ones."""
  most = None if source.classes is None else source.classes - 1
  if start_token is None and end_token is None:
    blank = check_integer("blank", blank, 0, np.iinfo(np.int32).max if most is None else most)
    return TokenLimits(-1, blank, source.classes, source.name, has_end=False)
  # The start token may lie outside of the vocabulary that is generated.
  start = check_integer("start_token", start_token, 0)
  end = check_integer("end_token", end_token, 0, np.iinfo(np.int32).max if most is None else most)
  return TokenLimits(start, end, source.classes, source.name)


def _input_names(source: Source, inputs: Sequence[str] | None, has_end: bool) -> tuple[str, ...]:
  """Returns the entries that the sampler gets."""
  known = input_names(source.arrays)
  if inputs is None and not has_end:
    return tuple(sorted(known))
  if inputs is None:
    names = sorted(name for name in known if name.startswith("source"))
    if "source" not in names:
      raise ValueError(
        f"source: expected an entry 'source', tokens [N, S], in {source.name}, got {known}: name "
        "the entries that the sampler reads in inputs="
      )
    return tuple(names)
  for name in inputs:
    if name not in known:
      raise ValueError(
        f"inputs: expected entries of {source.name}, got {name!r}{suggest(name, known)}"
      )
  return tuple(sorted(inputs))
