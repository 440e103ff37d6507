"""The stages of a job that keep what its teacher says: written once, read by every student."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax import sharding
from distill_jax.cache import Cache, Incomplete, describe, estimate, open_cache, verify, write_cache
from distill_jax.cache.codecs import Codec
from distill_jax.cache.estimates import row_bytes, table
from distill_jax.cache.shards import COMPLETE
from distill_jax.cache.store import open_store
from distill_jax.cache.writer import rows_of
from distill_jax.config import ConfigError, Taught
from distill_jax.data import Source
from distill_jax.jobs import Job, trained_on
from distill_jax.loading import settings
from distill_jax.types import Model

AGREED = 0.98  # of the first classes; rounding on another device moves few
VERIFIED = 256  # rows that are asked for again
SAMPLED = 512  # examples of an estimate
HEAD = 20  # bytes of each row: `cache.format`


def probe(job: Job) -> None:
  """Finds out before the teacher is trained that nothing could be written.

  Raises:
    StoreError: it is an OSError.
  """
  store = open_store(job.config.cache)
  if store.read(COMPLETE) is None:
    store.probe_writable()


def write(job: Job, taught: Taught) -> Cache:
  """Lets the teacher go over the student's examples; goes on where it was stopped; opens what is there."""
  config, started = job.config, time.perf_counter()
  there = open_store(config.cache).read(COMPLETE) is not None
  cached = write_cache(
    config.cache,
    taught.teacher,
    _in_memory(job),
    config.kept(),
    teacher_variables=taught.variables,
    description=_description(job),
    augment=config.augment(),
    views=config.views or 1,
    batch_size=config.cache_batch_size,
    mesh=sharding.data_mesh(config.devices or None),
  )
  seconds, written = time.perf_counter() - started, cached.manifest.provenance["date"]
  how = f"reused, written {written}" if there else f"written in {seconds:.0f} s"
  print(f"cache: {len(cached):,} rows in {cached.store.url}: {how}", flush=True)
  return cached


def opened(job: Job, taught: Taught | None = None) -> Cache:
  """The finished cache, refused where it is another teacher's, or keeps other outputs."""
  try:
    cached = open_cache(job.config.cache)
  except Incomplete as error:
    raise ConfigError(f"--stages: the students read the cache, add 'cache': {error}") from error
  if taught is not None:
    arrays = _in_memory(job).arrays
    cached.check_teacher(taught.teacher, taught.variables, job.config.kept(), arrays, _description(job))
  return cached


def inspect(job: Job) -> None:
  """Prints what the cache is, how sure its teacher is, and how often right."""
  print(describe(opened(job), _in_memory(job)), flush=True)


def check(job: Job, taught: Taught) -> None:
  """Asks the teacher again about some rows, and reads every byte of the cache; prints both."""
  cached = opened(job, taught)
  for name, found in verify(
    cached,
    taught.teacher,
    _in_memory(job),
    VERIFIED,
    teacher_variables=taught.variables,
    augment=job.config.augment(),
    batch_size=job.config.cache_batch_size,
    mesh=sharding.data_mesh(job.config.devices or None),
  ).items():
    of_logits = (
      "" if found.kl is None else f", KL {found.kl:.2e} nats, {found.top1:.1%} with the same first class"
    )
    print(
      f"cache_verify: {name}: {found.rows} rows, largest difference {found.difference:.2e}{of_logits}",
      flush=True,
    )
    if found.top1 is not None and found.top1 < AGREED:
      raise ConfigError(
        f"cache_verify: {name}: {1 - found.top1:.1%} of the teacher's first classes are others now"
      )
  record = cached.scan()
  print(f"cache_verify: {record['rows']:,} rows, {record['bytes']:,} bytes, every checksum holds", flush=True)


def weigh(job: Job, taught: Taught) -> None:
  """Prints, and writes nothing, what the cache would cost, and what each way of keeping logits would lose."""
  config, train = job.config, _in_memory(job)
  number, augment = min(SAMPLED, len(train)), config.augment()

  @jax.jit
  def said(variables, batch):
    batch = batch if augment is None else augment(batch)
    return taught.teacher.apply(*variables, batch, train=False, key=None)[0]

  batch = rows_of(train, np.arange(number), 0)
  outputs = jax.block_until_ready(said(taught.variables, batch))
  started = time.perf_counter()
  jax.block_until_ready(said(taught.variables, batch))
  seconds, rows = time.perf_counter() - started, len(train) * (config.views or 1)
  kept = config.kept()
  size = sum(row_bytes(codec, outputs[name]) for name, codec in kept.items())
  print(
    f"cache_estimate: {size:,} bytes a row as configured ({', '.join(kept)}), and {HEAD} of ids and checksums; "
    f"{rows:,} rows, {rows * (size + HEAD):,} bytes; about {seconds / number * rows:.0f} s"
  )
  if "logits" in outputs:
    temperature = getattr(kept.get("logits"), "temperature", 1.0)
    print(
      f"  on {number} examples, gradients at a student that knows nothing, temperature {temperature:g}:\n"
      + table(estimate(outputs["logits"], temperature=temperature)),
      flush=True,
    )


def stand_in(teacher: Model | None, kept: Mapping[str, Codec]) -> Model | None:
  """The live teacher with outputs as its cache gives them, to compare shapes before there is a cache."""
  if teacher is None:
    return None

  def apply(params, state, batch, *, train, key):
    outputs, state = teacher.apply(params, state, batch, train=train, key=key)
    unknown = sorted(set(kept) - set(outputs))
    if unknown:
      raise ConfigError(f"kept: the teacher gives no {unknown[0]!r}; it gives {sorted(outputs)}")
    whole = {"view": np.zeros(len(batch["id"]), np.int32), **batch}
    return {
      name: codec.decode(codec.encode(outputs[name], whole), outputs[name]) for name, codec in kept.items()
    }, state

  return teacher._replace(apply=apply)


def _in_memory(job: Job) -> Source:
  """The student's examples."""
  train = trained_on(job, "student")
  if not isinstance(train, Source):
    raise ConfigError(
      "cache: data() gives images that are read while training; a cache takes examples in memory"
    )
  return train


def _description(job: Job) -> dict[str, Any]:
  """The teacher's own settings: what its weights do not show."""
  return {
    name: value
    for name, value in settings(job.config).items()
    if name.startswith("teacher_") and not isinstance(value, dict)
  }
