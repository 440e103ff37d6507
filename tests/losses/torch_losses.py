"""PyTorch's losses of the cases in peer_cases.py."""

import inspect

import numpy as np
import torch
import torch_features
import torch_logits
import torch_models

LOSSES = {
  name: f
  for module in (torch_logits, torch_features, torch_models)
  for name, f in inspect.getmembers(module, inspect.isfunction)
  if f.__module__ == module.__name__
}


def tensors(case, tree):
  """Returns the tree with tensors for arrays; images have their channels second."""
  if isinstance(tree, dict):
    return {name: tensors(case, x) for name, x in tree.items()}
  if isinstance(tree, tuple):
    return tuple(tensors(case, x) for x in tree)
  if case.images and np.ndim(tree) == 4:
    tree = np.ascontiguousarray(np.moveaxis(tree, -1, 1))
  return torch.tensor(tree)


def arrays(case, tree):
  """Returns the tree with arrays for tensors: the inverse of `tensors`."""
  if isinstance(tree, dict):
    return {name: arrays(case, x) for name, x in tree.items()}
  if isinstance(tree, tuple):
    return tuple(arrays(case, x) for x in tree)
  tree = tree.numpy()
  return np.moveaxis(tree, 1, -1) if case.images and tree.ndim == 4 else tree


def value(case, args) -> torch.Tensor:
  """Returns the loss of tensors, a scalar."""
  return LOSSES[case.name](*args, **case.kwargs)
