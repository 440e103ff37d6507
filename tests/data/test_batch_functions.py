import pytest

from distill_jax import data
from distill_jax.train import StepOptions

AUGMENT = data.augmentation(data.flip(), seed=0)
MIX = data.mixup(0.2, 10)


def test_functions_of_batches_are_taken():
  StepOptions(augment=AUGMENT, mix=MIX)
  StepOptions(augment=lambda batch: batch, mix=lambda key, batch: batch)
  StepOptions(augment=dict, mix=lambda *args: args[1])


@pytest.mark.parametrize("augment", [MIX, data.flip(), [data.flip()], "flip", lambda: None])
def test_augment_of_another_kind_raises(augment):
  with pytest.raises(ValueError, match=r"^augment: expected .*data.augmentation"):
    StepOptions(augment=augment)


@pytest.mark.parametrize("mix", [AUGMENT, data.flip(), [MIX], 0.2])
def test_mix_of_another_kind_raises(mix):
  with pytest.raises(ValueError, match=r"^mix: expected .*data.mixup"):
    StepOptions(mix=mix)
