"""Tests files of weights under the names of another library."""

import numpy as np
import pytest
import safetensors

from distill_jax.models import load_weights, save_weights, torch_kernel

TREE = {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones(2, np.float16)}
NAMES = {"kernel": ("fc.weight", np.transpose), "bias": "fc.bias"}


def test_written_weights_are_read_again(tmp_path):
  path = save_weights(tmp_path / "model.safetensors", TREE, names=NAMES)
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}
    np.testing.assert_array_equal(file.get_tensor("fc.weight"), TREE["kernel"].T)
  loaded = load_weights(path, TREE, names=NAMES | {"kernel": ("fc.weight", torch_kernel)})
  for name, value in TREE.items():
    np.testing.assert_array_equal(loaded[name], value)
    assert loaded[name].dtype == value.dtype


@pytest.mark.parametrize(
  "file, names, field",
  [
    ("model.bin", None, "path"),
    ("model.safetensors", {"bias": "kernel"}, "names: .*'kernel'"),
    ("model.safetensors", lambda leaf: "w", "names: .*'w'"),
  ],
)
def test_invalid_arguments_raise(file, names, field, tmp_path):
  with pytest.raises(ValueError, match=f"^{field}"):
    save_weights(tmp_path / file, TREE, names=names)
  assert not list(tmp_path.iterdir())
