"""Runs the stages of a job that store its teacher's outputs, which every student reads."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.cache import (
  Agreement,
  Cache,
  Incomplete,
  check_run,
  check_teacher,
  describe,
  estimate,
  identity,
  open_cache,
  verify,
  write_cache,
)
from distill_jax.cache.codecs.codec import output_of
from distill_jax.cache.codecs.estimates import estimate_table, row_bytes
from distill_jax.cache.store.backend import open_store
from distill_jax.cache.store.shards import open_complete
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import make_output_fn
from distill_jax.cache.teacher_inputs import ImageInputs, TeacherInputs, make_teacher_inputs
from distill_jax.cache.writer import plan
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.distributed import hosts, sharding
from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError, TrainedTeacher
from distill_jax.jobs.identity import settings_of
from distill_jax.jobs.plan import Job, one_per_variant, train_data
from distill_jax.models.llm.head import head_logits

MIN_AGREEMENT = 0.98
"""Least fraction of equal predicted classes of a valid cache; rounding on another device moves few.
"""
VERIFIED_ROWS = 256
"""Rows that the teacher computes again."""
ESTIMATE_EXAMPLES = 512
"""Examples of an estimate."""
_NO_VIEWS = (
  "num_views: expected at least 1 with a cache, got 0 (a new view each epoch): set the number of "
  "views to store"
)


def check_writable(job: Job) -> None:
  """Checks that the cache's folder can be written, before the teacher is trained.

  Raises:
    StoreError: it cannot; an OSError.
  """
  if not _is_complete(job.cache):
    open_store(job.cache).probe_writable()


def write(job: Job, trained_teacher: TrainedTeacher) -> Cache:
  """Computes the teacher's outputs on the student's examples; resumes an interrupted cache, opens a
  complete one.
  """
  config, started = job.config, time.perf_counter()
  inputs = _teacher_inputs(job)
  complete = _is_complete(job.cache)
  cache = write_cache(
    job.cache,
    trained_teacher.teacher,
    inputs.source,
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
  seconds = time.perf_counter() - started
  date = cache.manifest.provenance["date"]
  how = f"reused, written {date}" if complete else f"written in {seconds:.0f} s"
  if hosts.is_first():
    print(f"cache: {len(cache):,} rows in {cache.store.url}: {how}", flush=True)
  return cache


def check_num_views(job: Job) -> None:
  """Checks, before anything is trained, that views can be stored where the teacher's differ.

  Raises:
    ConfigError: each epoch would have a new one.
  """
  config = job.config
  inputs, augment = _teacher_inputs(job), config.augment()
  if config.num_views or augment is None:
    return
  cached = [network for network in one_per_variant(job, "student") if network.cached]
  teacher = cached[0].teacher if cached else None
  if teacher is None:
    return
  variables = teacher.variables
  if variables is None:
    example = data.first(config, job.splits.train)
    variables = jax.eval_shape(teacher.init, jax.random.key(0), example)
  outputs = config.cached_outputs()
  names = identity.teacher_entries(teacher, variables, outputs, inputs.shapes, augment)
  # What the students alone read may change as often as it likes.
  if identity.augmentation_identity(augment, inputs.shapes, names)["name"] != "none":
    raise ConfigError(_NO_VIEWS)


def open_checked(job: Job, trained_teacher: TrainedTeacher | None = None) -> Cache:
  """Returns the complete cache.

  Raises:
    ConfigError: it is not complete.
    Mismatch: it is of another teacher or other data, or stores other outputs.
  """
  crop = _crop(job)
  try:
    cache = open_cache(job.cache)
  except Incomplete as error:
    raise ConfigError(f"--stages: the students read the cache, add 'cache': {error}") from error
  if trained_teacher is not None:
    check_teacher(
      cache,
      trained_teacher.teacher,
      trained_teacher.variables,
      job.config.cached_outputs(),
      _teacher_inputs(job).shapes,
      _description(job),
    )
  if crop is not None:  # `fit` compares examples in memory; of others it sees one batch.
    check_run(
      cache,
      train_data(job, "student"),
      crop=crop,
      augment=job.config.augment(),
      num_views=job.config.num_views or 1,
    )
  return cache


def inspect(job: Job) -> None:
  """Prints what the cache stores, and the entropy and accuracy of its teacher."""
  source = train_data(job, "student")
  print(describe(open_checked(job), source if isinstance(source, Source) else None), flush=True)


def check(job: Job, trained_teacher: TrainedTeacher) -> None:
  """Compares some rows with the teacher and reads every byte of the cache; prints both results.

  Raises:
    ConfigError: too many of the teacher's predicted classes differ.
  """
  cache = open_checked(job, trained_teacher)
  agreements = verify(
    cache,
    trained_teacher.teacher,
    train_data(job, "student"),
    VERIFIED_ROWS,
    teacher_variables=trained_teacher.variables,
    crop=_crop(job),
    augment=job.config.augment(),
    batch_size=job.config.cache_batch_size,
    mesh=sharding.data_mesh(job.config.devices or None),
  )
  for name, agreement in agreements.items():
    _print_agreement(name, agreement)
  record = cache.check_checksums()
  size = f"{record['rows']:,} rows, {record['bytes']:,} bytes"
  print(f"cache_verify: {size}, every checksum holds", flush=True)


def estimate_cost(job: Job, trained_teacher: TrainedTeacher) -> None:
  """Prints what the cache would cost, and what each codec of logits would lose; writes nothing."""
  config, inputs, codecs = job.config, _teacher_inputs(job), job.config.cached_outputs()
  num_examples = ESTIMATE_EXAMPLES
  if "tokens" in inputs.shapes:
    num_examples = min(num_examples, config.cache_batch_size)
  ids = np.sort(inputs.source.ids)[:num_examples]
  outputs, seconds = _compute_outputs(job, trained_teacher, inputs, ids)
  planned = plan(codecs, outputs, inputs, config.num_views or 1, config.cache_batch_size)
  size = sum(row_bytes(codec, outputs[name]) for name, codec in codecs.items())
  print(
    f"cache_estimate: {planned.header(0).record_dtype.itemsize:,} bytes a row, {size:,} of them as "
    "configured "
    f"({', '.join(codecs)}), the others ids, checksums and padding; {len(planned.rows):,} rows, "
    f"{planned.size:,} bytes in {len(planned.plan)} shards; about "
    f"{seconds * len(planned.rows):.0f} s"
  )
  # Several codecs of the logits have the same estimate.
  name = next((name for name in outputs if output_of(name) == "logits"), None)
  if name is not None:
    _print_losses(name, outputs[name], getattr(codecs[name], "temperature", 1.0), len(ids))


def _print_agreement(name: str, agreement: Agreement) -> None:
  logits = ""
  if agreement.kl is not None:
    logits = f", KL {agreement.kl:.2e} nats, {agreement.top1:.1%} with the same predicted class"
  print(
    f"cache_verify: {name}: {agreement.rows} rows, largest difference "
    f"{agreement.difference:.2e}{logits}",
    flush=True,
  )
  if agreement.top1 is not None and agreement.top1 < MIN_AGREEMENT:
    raise ConfigError(
      f"cache: {name}: expected at least {MIN_AGREEMENT:.0%} of the teacher's predicted classes, "
      f"got {agreement.top1:.1%}: write the cache again"
    )


def _compute_outputs(
  job: Job, trained_teacher: TrainedTeacher, inputs: TeacherInputs, ids: np.ndarray
) -> tuple[Mapping[str, Any], float]:
  """Returns the teacher's outputs of some examples, and seconds per example."""
  config = job.config
  output_fn = make_output_fn(trained_teacher.teacher, config.cached_outputs(), config.augment())
  compute = jax.jit(lambda variables, batch: output_fn(variables, batch)[0])
  batch = inputs.batch(ids, np.zeros(len(ids), np.int32))
  outputs = jax.block_until_ready(compute(trained_teacher.variables, batch))
  started = time.perf_counter()
  jax.block_until_ready(compute(trained_teacher.variables, batch))
  return outputs, (time.perf_counter() - started) / len(ids)


def _print_losses(name: str, logits: Any, temperature: float, num_examples: int) -> None:
  sample = f"{num_examples} examples"
  if isinstance(logits, LazyLogits):
    tokens = logits.hidden.reshape(-1, logits.hidden.shape[-1])[:ESTIMATE_EXAMPLES]
    logits = head_logits({"hidden": tokens, "head": logits.head})
    sample = f"{len(tokens)} tokens"
  table = estimate_table(estimate(logits, temperature=temperature))
  print(
    f"  {name}: on {sample}, gradients at an untrained student, temperature {temperature:g}:\n"
    f"{table}",
    flush=True,
  )


def _is_complete(url: str) -> bool:
  try:
    open_complete(open_store(url))
  except Incomplete:
    return False
  return True


def _teacher_inputs(job: Job) -> TeacherInputs:
  """Returns the student's examples as the teacher sees them."""
  inputs = make_teacher_inputs(train_data(job, "student"), _crop(job))
  is_varying = isinstance(inputs, ImageInputs) and identity.crop_varies(inputs.identity(["image"]))
  if job.config.num_views == 0 and is_varying:
    raise ConfigError(_NO_VIEWS)
  return inputs


def _crop(job: Job) -> Crop | None:
  """Returns how the student's examples are cropped; None where they are in memory."""
  return None if isinstance(train_data(job, "student"), Source) else job.config.crops().training


def _description(job: Job) -> dict[str, Any]:
  """Returns the teacher's own settings, which its weights do not show."""
  return {
    name: value
    for name, value in settings_of(job.config).items()
    if name.startswith("teacher_") and not isinstance(value, dict)
  }
