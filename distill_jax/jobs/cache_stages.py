"""The stages of a job that keep what its teacher says: written once, read by every student."""

import time
from typing import Any

import jax
import numpy as np

from distill_jax.cache import (
  Cache,
  Incomplete,
  check_run,
  check_teacher,
  describe,
  estimate,
  open_cache,
  verify,
  write_cache,
)
from distill_jax.cache.codecs.codec import output_of
from distill_jax.cache.codecs.estimates import estimate_table, row_bytes
from distill_jax.cache.identity import crop_varies
from distill_jax.cache.store.backend import open_store
from distill_jax.cache.store.shards import open_complete
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import make_output_fn
from distill_jax.cache.teacher_inputs import ImageInputs, TeacherInputs, make_teacher_inputs
from distill_jax.cache.writer import plan
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.distributed import hosts, sharding
from distill_jax.jobs.config import ConfigError, TrainedTeacher
from distill_jax.jobs.overrides import settings_of
from distill_jax.jobs.plan import Job, train_data
from distill_jax.models.llm import decoder

AGREED = 0.98  # of the first classes; rounding on another device moves few
VERIFIED = 256  # rows that are asked for again
SAMPLED = 512  # examples of an estimate


def check_writable(job: Job) -> None:
  """Finds out before the teacher is trained that nothing could be written.

  Raises:
    StoreError: it is an OSError.
  """
  if not _is_whole(job.config.cache):
    open_store(job.config.cache).probe_writable()


def write(job: Job, trained_teacher: TrainedTeacher) -> Cache:
  """Lets the teacher go over the student's examples; goes on where it was stopped; opens what is there."""
  config, started = job.config, time.perf_counter()
  examples = _examples(job)
  there = _is_whole(config.cache)
  cached = write_cache(
    config.cache,
    trained_teacher.teacher,
    examples.source,
    config.cached_outputs(),
    teacher_variables=trained_teacher.variables,
    description=_description(job),
    crop=_crop(job),
    augment=config.augment(),
    num_views=config.num_views or 1,
    batch_size=config.cache_batch_size,
    mesh=sharding.data_mesh(config.devices or None),
    progress=hosts.is_first(),
  )
  seconds, written = time.perf_counter() - started, cached.manifest.provenance["date"]
  how = f"reused, written {written}" if there else f"written in {seconds:.0f} s"
  if hosts.is_first():
    print(f"cache: {len(cached):,} rows in {cached.store.url}: {how}", flush=True)
  return cached


def _is_whole(url: str) -> bool:
  try:
    open_complete(open_store(url))
  except Incomplete:
    return False
  return True


def open_checked(job: Job, trained_teacher: TrainedTeacher | None = None) -> Cache:
  """The finished cache, refused where it is another teacher's, or keeps other outputs."""
  crop = _crop(job)
  try:
    cached = open_cache(job.config.cache)
  except Incomplete as error:
    raise ConfigError(f"--stages: the students read the cache, add 'cache': {error}") from error
  if trained_teacher is not None:
    shapes = _examples(job).shapes
    check_teacher(
      cached,
      trained_teacher.teacher,
      trained_teacher.variables,
      job.config.cached_outputs(),
      shapes,
      _description(job),
    )
  if crop is not None:  # examples in memory are compared by `fit`, of others it sees a batch
    check_run(
      cached,
      train_data(job, "student"),
      crop=crop,
      augment=job.config.augment(),
      num_views=job.config.num_views or 1,
    )
  return cached


def inspect(job: Job) -> None:
  """Prints what the cache is, how sure its teacher is, and how often right."""
  source = train_data(job, "student")
  print(describe(open_checked(job), source if isinstance(source, Source) else None), flush=True)


def check(job: Job, trained_teacher: TrainedTeacher) -> None:
  """Asks the teacher again about some rows, and reads every byte of the cache; prints both."""
  cached = open_checked(job, trained_teacher)
  for name, found in verify(
    cached,
    trained_teacher.teacher,
    train_data(job, "student"),
    VERIFIED,
    teacher_variables=trained_teacher.variables,
    crop=_crop(job),
    augment=job.config.augment(),
    batch_size=job.config.cache_batch_size,
    mesh=sharding.data_mesh(job.config.devices or None),
  ).items():
    of_logits = (
      ""
      if found.kl is None
      else f", KL {found.kl:.2e} nats, {found.top1:.1%} with the same first class"
    )
    print(
      f"cache_verify: {name}: {found.rows} rows, largest difference {found.difference:.2e}{of_logits}",
      flush=True,
    )
    if found.top1 is not None and found.top1 < AGREED:
      raise ConfigError(
        f"cache_verify: {name}: {1 - found.top1:.1%} of the teacher's first classes are others now"
      )
  record = cached.check_checksums()
  print(
    f"cache_verify: {record['rows']:,} rows, {record['bytes']:,} bytes, every checksum holds",
    flush=True,
  )


def estimate_cost(job: Job, trained_teacher: TrainedTeacher) -> None:
  """Prints, and writes nothing, what the cache would cost, and what each way of keeping logits would lose."""
  config, examples, kept = job.config, _examples(job), job.config.cached_outputs()
  rows = min(SAMPLED, config.cache_batch_size) if "tokens" in examples.shapes else SAMPLED
  ids = np.sort(examples.source.ids)[:rows]
  said = jax.jit(
    lambda variables, batch: make_output_fn(trained_teacher.teacher, kept, config.augment())(
      variables, batch
    )[0]
  )
  batch = examples.batch(ids, np.zeros(len(ids), np.int32))
  outputs = jax.block_until_ready(said(trained_teacher.variables, batch))
  started = time.perf_counter()
  jax.block_until_ready(said(trained_teacher.variables, batch))
  seconds = (time.perf_counter() - started) / len(ids)
  planned = plan(kept, outputs, examples, config.num_views or 1, config.cache_batch_size)
  size = sum(row_bytes(codec, outputs[name]) for name, codec in kept.items())
  print(
    f"cache_estimate: {planned.header(0).record_dtype.itemsize:,} bytes a row, {size:,} of them as configured "
    f"({', '.join(kept)}), the others ids, checksums and padding; {len(planned.rows):,} rows, {planned.size:,} bytes "
    f"in {len(planned.plan)} shards; about {seconds * len(planned.rows):.0f} s"
  )
  for name, output in outputs.items():
    if output_of(name) != "logits":
      continue
    temperature = getattr(kept[name], "temperature", 1.0)
    shown = f"{len(ids)} examples"
    if isinstance(output, LazyLogits):
      tokens = output.hidden.reshape(-1, output.hidden.shape[-1])[:SAMPLED]
      output, shown = (
        decoder.logits({"hidden": tokens, "head": output.head}),
        f"{len(tokens)} tokens",
      )
    print(
      f"  {name}: on {shown}, gradients at a student that knows nothing, temperature {temperature:g}:\n"
      + estimate_table(estimate(output, temperature=temperature)),
      flush=True,
    )
    break  # the others keep the same logits


def _examples(job: Job) -> TeacherInputs:
  """The student's."""
  examples = make_teacher_inputs(train_data(job, "student"), _crop(job))
  if (
    job.config.num_views == 0
    and isinstance(examples, ImageInputs)
    and crop_varies(examples.identity())
  ):
    raise ConfigError(
      "num_views: expected at least 1, got 0 (a new view each epoch): a cache holds a number of views of each image"
    )
  return examples


def _crop(job: Job) -> Crop | None:
  """How the student's examples are cut, where they are read while training."""
  return None if isinstance(train_data(job, "student"), Source) else job.config.crops().training


def _description(job: Job) -> dict[str, Any]:
  """The teacher's own settings: what its weights do not show."""
  return {
    name: value
    for name, value in settings_of(job.config).items()
    if name.startswith("teacher_") and not isinstance(value, dict)
  }
