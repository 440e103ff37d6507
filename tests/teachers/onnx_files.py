"""Writes small ONNX files by hand: the runtime does not need the package that builds them.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto has the numbers of the fields.
"""

FLOAT, UINT8, INT64, DOUBLE = 1, 2, 7, 11
DTYPES = {"float32": FLOAT, "uint8": UINT8, "int64": INT64, "float64": DOUBLE}


def varint(number):
  data = bytearray()
  while number > 127:
    data.append(number & 127 | 128)
    number >>= 7
  return bytes([*data, number])


def field(number, value):
  """Returns a field of protobuf: an integer, or bytes, a text or a message."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  data = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name, values, location=None):
  """Returns a TensorProto; its values are in the file `location` unless that is None."""
  dims = b"".join(field(1, size) for size in values.shape)
  head = dims + field(2, DTYPES[values.dtype.name]) + field(8, name)
  if location is None:
    return head + field(9, values.tobytes())
  return head + field(13, field(1, "location") + field(2, location)) + field(14, 1)


def value_info(name, dtype, shape):
  """Returns a ValueInfoProto; a text in the shape is a dynamic size."""
  dims = b"".join(field(1, field(1 if isinstance(x, int) else 2, x)) for x in shape)
  return field(1, name) + field(2, field(1, field(1, DTYPES[dtype]) + field(2, dims)))


def node(op, inputs, outputs, domain="", attributes=b""):
  names = b"".join(field(1, x) for x in inputs) + b"".join(field(2, x) for x in outputs)
  return names + field(4, op) + attributes + field(7, domain)


def model(nodes, inputs, outputs, tensors=()):
  """Returns the bytes of an ONNX file.

  Args:
    nodes: from `node`.
    inputs, outputs: `(name, dtype, shape)` each.
    tensors: from `tensor`.
  """
  graph = b"".join(field(1, x) for x in nodes) + field(2, "graph")
  graph += b"".join(field(5, x) for x in tensors)
  graph += b"".join(field(11, value_info(*x)) for x in inputs)
  graph += b"".join(field(12, value_info(*x)) for x in outputs)
  opsets = field(8, field(2, 13)) + field(8, field(1, "my.ops") + field(2, 1))
  return field(1, 8) + field(7, graph) + opsets


def linear(kernel, rows="N", location=None):
  """Returns the file of `y = x @ kernel` and of `twice = y + y`."""
  nodes = [node("MatMul", ["x", "kernel"], ["y"]), node("Add", ["y", "y"], ["twice"])]
  features, classes = kernel.shape
  outputs = [("y", "float32", [rows, classes]), ("twice", "float32", [rows, classes])]
  tensors = [tensor("kernel", kernel, location)]
  return model(nodes, [("x", "float32", [rows, features])], outputs, tensors)
