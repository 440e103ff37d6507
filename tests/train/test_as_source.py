import numpy as np
import pytest

from distill_jax import data
from distill_jax.train.inputs import as_source


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"val": x}, lambda x: [{"val": x}]])
def test_source_inside_a_list_or_dict_raises(wrap):
  source = data.Source({"x": np.ones(4)})
  for examples in (source, data.from_iterable([{"x": np.ones(4)}])):
    with pytest.raises(ValueError, match=rf"^evaluation: .*the {type(examples).__name__} itself"):
      as_source("evaluation", wrap(examples))
