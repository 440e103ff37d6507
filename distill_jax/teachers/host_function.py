"""Makes a teacher of a function of numpy arrays: a network of another framework."""

import contextlib
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from distill_jax.errors import join_first
from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.models.adapters.outputs import select_inputs
from distill_jax.storage import files
from distill_jax.teachers.host_outputs import Arrays, Specs, check_arrays, check_specs
from distill_jax.trees import describe_leaf
from distill_jax.types import Batch, Model, Variables, input_names

Predict = Callable[[Arrays], Mapping[str, np.ndarray]]
Identity = str | Path | Sequence[Path]

_PROBE_ROWS = 2  # A function that squeezes a single row away would fail at one.


def host(
  predict: Predict, *, identity: Identity, inputs: str | Sequence[str] | None = None
) -> Model:
  """Returns a teacher that calls a function of numpy arrays: PyTorch, TensorFlow, anything.

  `cache.write_cache` calls the function directly, in a thread of its own, and writes rows while it
  computes the next batch: prefer that. In a train step the function is called by each step, which
  waits for it; no gradient passes through it. Calls never overlap.

  The shapes of its outputs are found by calling it on two rows of zeros, once for each shape of a
  row.

  Args:
    predict: `{entry: [B, ...]} -> {output: [B, ...]}`, numpy arrays, rows first. The same names,
      dtypes and shapes of a row for every batch, in dtypes of at most 32 bits; 'logits' are no
      probabilities. Rows do not depend on one another. It is called in several threads, so what is
      set for a thread (`torch.no_grad`) belongs inside.
    identity: what tells this teacher from others, as a run with another one must not read its
      cache: the path of the file of its weights, or several, whose bytes are hashed; or a text that
      names network and weights, such as 'torchvision resnet50 IMAGENET1K_V2'.
    inputs: the batch's entry, or entries, that it gets. None: all but ids, views, labels and
      'where'.

  Raises:
    ValueError: no function; an identity that is empty; when it is called, outputs that are no numpy
      arrays, of another number of rows, of 64 bits, or unlike those of earlier batches.
    OSError: a file of the identity cannot be read.

  What `predict` raises, `write_cache`, `verify` and `fit` raise as it is, with a note that names
  the examples; a program of your own raises an error of JAX with its text.

  >>> from distill_jax import teachers
  >>> kernel = np.eye(3, dtype=np.float32)
  >>> predict = lambda batch: {"logits": batch["image"] @ kernel}  # any framework
  >>> teacher = teachers.host(predict, identity="the identity, 3 classes")
  >>> batch = {"id": np.arange(2), "image": np.ones((2, 3), np.float32)}
  >>> outputs, _ = teacher.apply(*teacher.variables, batch, train=False, key=None)
  >>> outputs["logits"].shape
  (2, 3)
  """
  if not callable(predict):
    raise wrong_kind("predict", "a function {entry: array} -> {output: array}", predict)
  variables = Variables({}, {"identity": _digest(identity)})
  return Model(lambda key, batch: variables, HostApply(predict, inputs), variables)


def warn_of_host_calls(teacher: Model | None) -> None:
  """Warns of a train step that waits for a host teacher."""
  if teacher is not None and isinstance(teacher.apply, HostApply):
    warnings.warn(
      "teacher: expected one that the device computes, got a function of numpy arrays, for which "
      "every step copies its batch to the host and waits: write its outputs once with "
      "cache.write_cache, and pass the Cache as the teacher",
      stacklevel=3,
    )


@contextlib.contextmanager
def raising_host_errors() -> Iterator[None]:
  """Raises what a host teacher raised, in place of the error of the program that called it."""
  HostApply.last_error = None
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter from waiting for an array
    host_error = HostApply.last_error
    if host_error is None or host_error is error or type(host_error).__name__ not in str(error):
      raise
    raise host_error from error


class HostApply:
  """`Model.apply` of a teacher on the host; `call` is the same without a compiled program."""

  last_error: ClassVar[Exception | None] = None
  """Of any host teacher: a program that calls it raises an error of its own."""

  def __init__(self, predict: Predict, inputs: str | Sequence[str] | None):
    self._predict = predict
    self._inputs = inputs
    self._specs: dict[Any, Specs] = {}
    # Devices call it at the same time, and few frameworks allow that.
    self._lock = threading.RLock()
    self._last_call: tuple[Arrays | None, Arrays | Exception] = (None, {})

  def __call__(self, params: Any, state: Any, batch: Batch, *, train: bool, key: Any):
    """Returns the outputs of a batch, from within a compiled program."""
    del params, train, key
    entries = jax.lax.stop_gradient(self.select(batch))
    specs = self.output_specs(entries)
    ids = batch.get("id")
    if jax.default_backend() == "cpu":
      # pure_callback copies its arguments in a thread of the pool whose threads wait for it: with
      # as many devices as cores, or one core, it hangs.
      call = buffer_callback(self._write_outputs, specs, vmap_method="sequential")
      return call(entries, ids), state
    call = jax.pure_callback(self.call, specs, entries, ids, vmap_method="sequential")
    return call, state

  def select(self, batch: Batch) -> dict[str, Any]:
    """Returns the entries of a batch that the function gets."""
    names = input_names(batch) if self._inputs is None else self._inputs
    names = [names] if isinstance(names, str) else list(names)
    return dict(zip(names, select_inputs(batch, names)))

  def call(self, entries: Mapping[str, Any], ids: Any = None) -> Arrays:
    """Returns the function's outputs, checked.

    Args:
      entries: arrays [B, ...] by name.
      ids: of the examples, for messages; None: unknown.
    """
    arrays = {name: _canonical(x) for name, x in entries.items()}
    specs = self.output_specs(arrays)
    if not _num_rows(arrays):  # Few frameworks take an empty batch.
      return {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    try:
      with self._lock:
        outputs = check_arrays(self._predict(dict(arrays)), _num_rows(arrays))
        check_specs(outputs, specs)
        # A framework may write the next batch into the same memory before these rows are stored.
        outputs = {name: x.copy() for name, x in outputs.items()}
    except Exception as error:
      if ids is not None:
        names = join_first(dict.fromkeys(np.asarray(ids).tolist()))
        error.add_note(f"The teacher's predict was called for the example ids {names}.")
      HostApply.last_error = error
      raise
    return outputs

  def output_specs(self, entries: Mapping[str, Any]) -> Specs:
    """Returns shapes and dtypes of the outputs of a batch."""
    rows = _num_rows(entries)
    shapes = {name: (tuple(x.shape[1:]), np.dtype(x.dtype)) for name, x in entries.items()}
    key = tuple(sorted((name, *shape) for name, shape in shapes.items()))
    with self._lock:
      if key not in self._specs:
        self._specs[key] = self._probe(shapes)
    return {
      name: jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype)
      for name, spec in self._specs[key].items()
    }

  def _probe(self, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Specs:
    """Returns shapes and dtypes of the outputs of a few rows of zeros."""
    zeros = {
      name: np.zeros((_PROBE_ROWS, *shape), dtype) for name, (shape, dtype) in shapes.items()
    }
    try:
      with jax.ensure_compile_time_eval():  # A function that uses JAX would be traced.
        outputs = check_arrays(self._predict(zeros), _PROBE_ROWS)
    except Exception as error:
      inputs = {name: describe_leaf(x.shape, x.dtype) for name, x in zeros.items()}
      error.add_note(f"The teacher's predict was called for zeros {inputs}, to find its outputs.")
      raise
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}

  def _call_once(self, arrays: Arrays, ids: Any) -> Arrays | Exception:
    """Returns the outputs, or the error; of equal arrays those of the call before.

    Each device of a mesh calls with all rows of the batch. All must fail where one does: the others
    would wait for it, and JAX would end the process.
    """
    with self._lock:
      arguments, result = self._last_call
      is_known = arguments is not None and _same_arrays(arguments, arrays)
      if isinstance(result, Exception) and result is not HostApply.last_error:
        is_known = False  # of an earlier run
      if not is_known:
        try:
          # The function may write to what it gets.
          result = self.call({name: x.copy() for name, x in arrays.items()}, ids)
        except Exception as error:
          result = error
        self._last_call = arrays, result
    return result

  def _write_outputs(self, context: Any, results: Any, entries: Any, ids: Any) -> None:
    """Writes the outputs into the buffers of a compiled program."""
    del context
    arrays = {name: np.asarray(x).copy() for name, x in entries.items()}  # buffers are reused
    outputs = self._call_once(arrays, ids)
    if isinstance(outputs, Exception):
      raise outputs
    for name, result in results.items():
      np.asarray(result)[...] = outputs[name]


def _digest(identity: Identity) -> np.ndarray:
  """Returns the sha256 of a text, or of the contents of files, uint8 [32]."""
  digest = hashlib.sha256()
  if isinstance(identity, str) and identity.strip():
    digest.update(b"text:" + identity.encode())
    return np.frombuffer(digest.digest(), np.uint8)
  paths = [identity] if isinstance(identity, Path) else identity
  if isinstance(paths, str) or not isinstance(paths, Sequence) or not paths:
    raise _identity_error(identity)
  for path in paths:
    if not isinstance(path, Path):
      raise _identity_error(identity)
    digest.update(f"file:{files.digest(path)}".encode())
  return np.frombuffer(digest.digest(), np.uint8)


def _identity_error(identity: Any) -> ValueError:
  return ValueError(
    "identity: expected a text that names network and weights, or the pathlib.Path of each file of "
    f"its weights, got {identity!r}: a cache is of one teacher, and this tells which"
  )


def _num_rows(entries: Mapping[str, Any]) -> int:
  if not entries:
    raise ValueError(
      "inputs: expected at least one entry of the batch, got none: name those that predict reads"
    )
  return next(iter(entries.values())).shape[0]


def _canonical(values: Any) -> np.ndarray:
  """Returns a host array in the dtype that it has in a compiled program.

  It may be written to, which an array of JAX may not.
  """
  array = np.asarray(values)
  array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
  return np.require(array, requirements="W")


def _same_arrays(a: Arrays, b: Arrays) -> bool:
  """Returns whether all bits are equal: a NaN equals itself."""
  if any(a[name].shape != b[name].shape or a[name].dtype != b[name].dtype for name in a):
    return False
  return all(np.array_equal(a[name].view(np.uint8), b[name].view(np.uint8)) for name in a)
