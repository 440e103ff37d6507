"""Makes a teacher of an ONNX file, which onnxruntime computes."""

import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import naming_extras, suggest
from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.teachers.host_function import host
from distill_jax.teachers.host_outputs import Arrays
from distill_jax.trees import describe_leaf
from distill_jax.types import Model

_DTYPES = {"float": "float32", "double": "float64"}  # where ONNX has other names than numpy
# In the file a tensor outside of it has a pair of texts, 'location' and its file.
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", re.DOTALL)
_CPP_FUNCTION = re.compile(r"^/\S+:\d+ .*?\) (?=[A-Z])")  # in which an error was raised
_HINTS = {
  "not a registered|No Op registered": "register its custom operators in session_options "
  "(register_custom_ops_library), or export it without them",
  "opset|IR version": "install a newer onnxruntime, or export it with an older opset",
  "parsing failed|No graph": "pass the path of an .onnx file, as the exporter wrote it",
}


def onnx(
  path: str | os.PathLike[str],
  *,
  inputs: Mapping[str, str],
  outputs: Mapping[str, str],
  preprocess: Callable[[Arrays], Arrays] | None = None,
  postprocess: Callable[[Arrays], Arrays] | None = None,
  identity: str | Path | Sequence[Path] | None = None,
  session_options: Any = None,
  providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Model:
  """Returns a teacher of an ONNX file. It is a `host` teacher: `cache.write_cache` is its place.

  A network of a fixed batch size gets as many rows at once; the last ones are repeated to fill it.

  Args:
    path: the .onnx file; a file with its weights lies next to it.
    inputs: the batch's entry of each of the network's inputs: `{"pixel_values": "image"}`. Its
      dtype is the network's, or an integer or floating one that fits into it.
    outputs: the network's output of each of the teacher's: `{"logits": "output_0"}`. All have a
      row for each example, first. 'logits' are no probabilities: take the logarithm in
      `postprocess`.
    preprocess: `{entry: [B, ...]} -> the same`, such as NHWC -> NCHW; None: the entries as they
      are.
    postprocess: `{output: [B, ...]} -> the same`; None: the network's outputs as they are.
    identity: as for `host`; None: the bytes of the file and of the files that it names. The two
      functions are not part of it, but a cache also stores outputs of artificial examples.
    session_options: `onnxruntime.SessionOptions`, such as threads and custom operators; None: its
      defaults.
    providers: names of onnxruntime's execution providers, the first one that works.

  Raises:
    FileNotFoundError: the file, or one that it names, does not exist.
    ValueError: no ONNX file, an operator that onnxruntime does not have, an input or output that
      the network does not have; when it is called, entries of another dtype or shape, and what
      `host` raises.

      def log(outputs):
        return {"logits": np.log(np.maximum(outputs["logits"], 1e-30))}

      teacher = onnx(
        "classifier.onnx",
        inputs={"x": "image"},
        outputs={"logits": "softmax_0"},
        preprocess=lambda batch: {"image": batch["image"].transpose(0, 3, 1, 2)},
        postprocess=log,
      )

  >>> import inspect
  >>> from distill_jax import teachers
  >>> list(inspect.signature(teachers.onnx).parameters)[:3]
  ['path', 'inputs', 'outputs']
  """
  for field, mapping in {"inputs": inputs, "outputs": outputs}.items():
    if not isinstance(mapping, Mapping):
      raise wrong_kind(field, "a mapping of names", mapping)
  path = Path(path)
  files = _files(path)
  session = open_session(path, session_options, providers)
  network_inputs = {x.name: x for x in session.get_inputs()}
  network_outputs = [x.name for x in session.get_outputs()]
  _check_names("inputs", inputs, network_inputs)
  _check_names("outputs", outputs.values(), network_outputs)
  missing = sorted(set(network_inputs) - set(inputs))
  if missing:
    raise ValueError(
      f"inputs: expected an entry of the batch for each of the network's, got none for {missing}"
    )
  names = list(outputs)

  def predict(batch: Arrays) -> Arrays:
    batch = batch if preprocess is None else preprocess(batch)
    feeds = {name: _feed(network_inputs[name], batch, entry) for name, entry in inputs.items()}
    results = dict(zip(names, run_session(session, list(outputs.values()), feeds, network_inputs)))
    return results if postprocess is None else postprocess(results)

  entries = list(dict.fromkeys(inputs.values()))
  return host(predict, identity=files if identity is None else identity, inputs=entries)


def _files(path: Path) -> list[Path]:
  """Returns the file and those with tensors that it names.

  Raises:
    FileNotFoundError: one does not exist.
  """
  if not path.is_file():
    raise FileNotFoundError(f"path: expected an ONNX file, got {path}, which is none")
  if not path.stat().st_size:
    return [path]
  names = set()
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    for match in _LOCATION.finditer(data):
      # A varint: the low bytes come first, each with 7 bits.
      size = sum((byte & 127) << 7 * i for i, byte in enumerate(match[1]))
      names.add(data[match.end() : match.end() + size].decode())
  files = [path.parent / name for name in sorted(names)]
  for weights in files:
    if not weights.is_file():
      raise FileNotFoundError(
        f"path: expected the weights of {path} in {weights}, got no such file: copy it there, or "
        "export the network as one file"
      )
  return [path, *files]


def open_session(path: Path, options: Any, providers: Sequence[str]) -> Any:
  """Returns an `onnxruntime.InferenceSession`."""
  with naming_extras():
    import onnxruntime
  try:
    return onnxruntime.InferenceSession(str(path), options, list(providers))
  except Exception as error:  # its classes have no public name
    reason = str(error).splitlines()[0].rpartition(" failed:")[2]
    reason = _CPP_FUNCTION.sub("", reason)
    hint = next((text for pattern, text in _HINTS.items() if re.search(pattern, reason)), "")
    raise ValueError(
      f"path: expected a network that onnxruntime {onnxruntime.__version__} runs, got {path} with "
      f"{reason}{hint and ': ' + hint}"
    ) from error


def _check_names(field: str, names: Any, existing: Any) -> None:
  if not names:
    raise ValueError(f"{field}: expected some of the network's {sorted(existing)}, got none")
  for name in names:
    if name not in existing:
      raise ValueError(
        f"{field}: expected one of the network's, got {name!r}{suggest(name, existing)}"
      )


def _feed(network_input: Any, batch: Arrays, entry: str) -> np.ndarray:
  """Returns an entry of the batch in the dtype of the network's input.

  Raises:
    ValueError: another dtype or shape.
  """
  if not isinstance(batch, Mapping) or entry not in batch:
    got = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(f"preprocess: expected a dict with {entry!r}, got {got}: return all entries")
  values = batch[entry]
  kind = network_input.type.removeprefix("tensor(").removesuffix(")")
  dtype = np.dtype(_DTYPES.get(kind, kind))
  shape = network_input.shape
  is_dtype = values.dtype == dtype or (
    np.can_cast(values.dtype, dtype) and (values.dtype.kind in "iu") == (dtype.kind in "iu")
  )
  is_shape = values.ndim == len(shape) and all(
    not isinstance(size, int) or size == actual for size, actual in zip(shape[1:], values.shape[1:])
  )
  if not is_dtype or not is_shape:
    raise ValueError(
      f"inputs[{network_input.name!r}]: expected {describe_leaf(shape, dtype)}, got the entry "
      f"{entry!r} with {describe_leaf(values.shape, values.dtype)}: cast or transpose it in "
      "preprocess="
    )
  return np.ascontiguousarray(values, dtype)


def run_session(
  session: Any, outputs: list[str], feeds: Arrays, network_inputs: Mapping[str, Any]
) -> list[np.ndarray]:
  """Returns the outputs of all rows, of as many at once as the network takes."""
  sizes = [x.shape[0] for x in network_inputs.values() if isinstance(x.shape[0], int)]
  if not sizes:
    return session.run(outputs, feeds)
  rows = len(next(iter(feeds.values())))
  parts = []
  for first in range(0, rows, sizes[0]):
    chosen = np.minimum(np.arange(first, first + sizes[0]), rows - 1)
    parts.append(session.run(outputs, {name: x[chosen] for name, x in feeds.items()}))
  return [np.concatenate(values)[:rows] for values in zip(*parts)]
