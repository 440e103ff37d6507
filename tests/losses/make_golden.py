"""Writes golden.json: float64 values of PyTorch and published packages for peer_cases.py.

python tests/losses/make_golden.py [--check]

--check writes nothing and exits with 1 where a value differs. It needs another environment:

  python -m venv /tmp/peers
  /tmp/peers/bin/pip install torch==2.13.0 torchdistill==1.1.5 keras==3.15.1
  /tmp/peers/bin/pip install jax==0.10.2 optax==0.2.8
  /tmp/peers/bin/pip install --no-deps trl==1.16.0 google-tunix==0.1.7
  /tmp/peers/bin/python tests/losses/make_golden.py --check

(torch's CPU wheel, where there is one.) Functions of TRL and Tunix are cut out of their sources: an
import of the packages needs all of their dependencies.
"""

import argparse
import ast
import importlib.metadata
import json
import os
import pathlib
import types

os.environ["KERAS_BACKEND"] = "torch"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
import torch.nn.functional as F
import torch_losses
from peer_cases import CASES, PUBLISHED, Case, Inputs
from torch_features import PAIR
from torch_logits import PATH, io
from torchdistill.losses import mid_level

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "torchdistill", "keras", "trl", "google-tunix")
IMAGES = Case("", lambda draw: (), images=True)
PEERS = ("torchdistill", "trl", "keras", "tunix")  # Prefixes of the functions below.
TRL = "trl/experimental"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
  values = page()
  if not parser.parse_args().check:
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
    return
  changes = differences(json.loads(GOLDEN.read_text()), values)
  print("\n".join(changes) or f"{GOLDEN.name} is what the packages give")
  raise SystemExit(bool(changes))


def page() -> dict:
  keras.config.set_floatx("float64")
  torch.set_default_dtype(torch.float64)
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  by_case = {case.id: value(case) for case in CASES}
  published = {
    name: f() for name, f in globals().items() if name.split("_")[0] in PEERS and callable(f)
  }
  rounded = [
    {name: float(f"{float(x):.13g}") for name, x in group.items()} for group in (by_case, published)
  ]
  return {"made_by": versions, "values": rounded[0], "published": rounded[1]}


def differences(stored: dict, values: dict) -> list[str]:
  """Returns the differences that rounding on another machine does not explain."""
  changes = [f"made by {stored['made_by']}, here {values['made_by']}"] * (
    stored["made_by"] != values["made_by"]
  )
  for group in ("values", "published"):
    for name in sorted(set(stored[group]) | set(values[group])):
      old, new = stored[group].get(name), values[group].get(name)
      if (
        old is None
        or new is None
        or not np.isclose(old, new, rtol=1e-9 if group == "values" else 1e-6)
      ):
        changes.append(f"{name}: {old} in the file, {new} here")
  return changes


def value(case: Case):
  return torch_losses.value(case, torch_losses.tensors(case, case.make(Inputs(real=False))))


def inputs(name: str) -> tuple:
  """Returns tensors of an entry of peer_cases.PUBLISHED."""
  return torch_losses.tensors(IMAGES, PUBLISHED[name])


def torchdistill_kd_with_labels():
  loss = mid_level.KDLoss(**PATH, temperature=3.0, alpha=0.1)
  return loss(*io(*inputs("logits")), inputs("labels"))


def torchdistill_kd_without_labels():
  return mid_level.KDLoss(**PATH, temperature=3.0, alpha=0.1)(*io(*inputs("logits")))


def torchdistill_standardized():
  return mid_level.LogitStdKDLoss(**PATH, temperature=3.0, alpha=0)(*io(*inputs("logits")))


def torchdistill_similarity():
  return mid_level.SPKDLoss("net", "net", reduction="batchmean")(*io(*inputs("maps")))


def torchdistill_correlation():
  return mid_level.CCKDLoss("net", "net", {"type": "bilinear"}, "batchmean")(*io(*inputs("rows")))


def torchdistill_gaussian_correlation():
  unit = [F.normalize(x) for x in inputs("rows")]
  kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
  return mid_level.CCKDLoss("net", "net", kernel, "batchmean")(*io(*unit))


def torchdistill_attention():
  return mid_level.ATLoss(PAIR, mode="paper")(*io(*inputs("maps")))


def torchdistill_factors():
  s, t = inputs("maps")
  return mid_level.FTLoss(p=2)({"translator": {"output": s}}, {"paraphraser": {"output": t}})


def torchdistill_fsp():
  names = [f"{whose}_{which}" for whose in ("student", "teacher") for which in ("first", "second")]
  pairs = {"pair": {name: {"io": "output", "path": name} for name in names}}
  outputs = [{name: {"output": x} for name, x in zip(names, sum(inputs("two_layers"), ()))}] * 2
  return mid_level.FSPLoss(pairs)(*outputs)


def torchdistill_crd_twice():
  """Returns the second step's loss, with the constants and the memory of the first."""
  student, teacher, indices, negatives, (first, second, _) = inputs("memory")
  torch.manual_seed(0)
  loss = mid_level.CRDLoss("s", "e", "t", 4, 9, 6, 9, temperature=0.5)
  loss.memory_v1, loss.memory_v2 = first, second
  chosen = torch.cat([indices[:, None], negatives], 1)
  outputs = {"s": {"output": student}, "e": {"input": {"pos_idx": indices, "contrast_idx": chosen}}}
  return [loss(outputs, {"t": {"output": teacher}}) for _ in range(2)][1]


def trl_jensen_shannon():
  return _jsd(*inputs("tokens"), beta=0.1, temperature=3.0, labels=inputs("tokens_labels"))


def trl_kl():
  return _jsd(*inputs("tokens"), beta=0, labels=inputs("tokens_labels"))


def trl_reverse_kl():
  return _jsd(*inputs("tokens"), beta=1, labels=inputs("tokens_labels"))


def trl_without_labels():
  return _jsd(*inputs("tokens"), beta=0)


def trl_top_k():
  return _trl_top_k(tail=False)


def trl_top_k_and_tail():
  return _trl_top_k(tail=True)


def keras_logits():
  s, t = inputs("logits")
  loss = keras.distillation.LogitsDistillation(temperature=3.0, loss=keras.losses.KLDivergence())
  return loss.compute_loss(t, s)


def keras_logits_by_default():
  s, t = inputs("logits")
  return keras.distillation.LogitsDistillation(temperature=3.0).compute_loss(t, s)


def keras_cosine():
  s, t = inputs("rows")
  return keras.distillation.FeatureDistillation("cosine_similarity").compute_loss(t, s)


def tunix_logits():
  return _tunix(top_k=0)


def tunix_top_k():
  return _tunix(top_k=3)


def _jsd(*args, **kwargs):
  return function_of("trl", f"{TRL}/gkd/gkd_trainer.py", "generalized_jsd_loss", torch=torch, F=F)(
    *args, **kwargs
  )


def _trl_top_k(tail):
  """TRL takes the classes of its student and the reverse KL: both sides are swapped."""
  file, names = f"{TRL}/sdpo/loss_utils.py", {"torch": torch, "F": F}
  for name in ("compute_divergence", "add_tail_bucket", "compute_topk_self_distillation_loss"):
    names[name] = function_of("trl", file, name, **names)
  s, t = inputs("logits")
  options = {"distillation_topk": 3, "distillation_alpha": 1.0, "distillation_add_tail": tail}
  return names["compute_topk_self_distillation_loss"](t, s, **options).mean()


def _tunix(top_k):
  """Tunix computes in float32."""
  file = "tunix/distillation/strategies/logit.py"
  f = function_of("google-tunix", file, "compute_loss", jax=jax, jnp=jnp, optax=optax)
  strategy = types.SimpleNamespace(temperature=3.0, alpha=0.5, distill_top_k=top_k)
  s, t = PUBLISHED["logits"]
  labels = np.eye(s.shape[1])[PUBLISHED["labels"]]
  return f(strategy, jnp.asarray(s), jnp.asarray(t), labels)[1]["distill/soft_loss"]


def function_of(distribution: str, file: str, name: str, **names):
  """Returns a function cut out of a package's source, with the names that it uses."""
  path = importlib.metadata.distribution(distribution).locate_file(file)
  tree = ast.parse(path.read_text())
  (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
  node.decorator_list, node.returns = [], None
  for argument in (*node.args.args, *node.args.kwonlyargs):
    argument.annotation = None
  namespace = dict(names)
  exec(compile(ast.Module([node], []), str(path), "exec"), namespace)
  return namespace[name]


if __name__ == "__main__":
  main()
