"""Provides the locations of a cache, and small caches that tests only read."""

import urllib.request

import numpy as np
import pytest
import toys


@pytest.fixture(scope="session")
def server(tmp_path_factory):
  """Returns the address of an S3 server with the bucket `bucket`."""
  moto = pytest.importorskip("moto.server")
  empty = tmp_path_factory.mktemp("aws") / "empty"
  empty.touch()
  with pytest.MonkeyPatch.context() as patch:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
      patch.setenv(name, str(empty))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
      patch.setenv(name, "any")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
    yield address
    running.stop()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def url(request, tmp_path):
  match request.param:
    case "path":
      return str(tmp_path / "cache")
    case "file":
      return f"file://{tmp_path}/with%20space"
    case "memory":
      return f"memory://{tmp_path}"
  return (
    f"s3://bucket/{tmp_path.name}/?endpoint={request.getfixturevalue('server')}&region=us-east-1"
  )


@pytest.fixture(scope="session")
def source():
  return toys.images(np.random.default_rng(0))


@pytest.fixture(scope="session")
def cached(tmp_path_factory, source):
  """A cache of float32 logits."""
  return toys.written(tmp_path_factory.mktemp("cache") / "cache", source)


@pytest.fixture(scope="session")
def augmented(tmp_path_factory, source):
  """A cache of float32 logits of two augmented views."""
  folder = tmp_path_factory.mktemp("augmented") / "cache"
  return toys.written(folder, source, augment=toys.AUGMENT, num_views=2)
