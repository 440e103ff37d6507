"""Writes golden_repositories.json: numbers of losses' published code that is in no package.

python tests/losses/make_golden_repositories.py FOLDER [--check]

FOLDER has a clone of each repository in COMMITS, as owner/name. Needs torch 2.13.0 (its CPU wheel)
and NumPy. Classes and functions are cut out of their files: an import of the projects needs all of
their dependencies. --check writes nothing and exits with 1 where a value differs.
"""

import __future__

import argparse
import ast
import json
import pathlib
import subprocess
import types

import numpy as np
import torch
import torch.nn.functional as F
from peer_cases import repository_inputs
from torch import nn

GOLDEN = pathlib.Path(__file__).with_name("golden_repositories.json")
COMMITS = {
  "EagleMIT/EMKD": "943c9dc3c411fd0392ebca7b0c52a7bc4561503f",
  "HobbitLong/RepDistiller": "b84f547c5db6a35318d4671d7d5c4de74c822403",
  "NVIDIA/TensorRT-Model-Optimizer": "5a4242faf4147fb0688bb73e10ca30b8ad3aabb3",
  "YukangWang/IFVD": "950a7a5fd8686ceed87a6976c49143462fcb823a",
  "airaria/TextBrewer": "2c105fa664bbc10669cd2888bd846d2c9b8afca8",
  "huggingface/trl": "f2cd57710ae345ea6428ae95363267fcf38a3dc8",
  "irfanICMLL/structure_knowledge_distillation": "ce208e1e5ba9177ecfc42519a2c64148d396fb71",
  "lenscloth/RKD": "0a6c3c0c190722d428322bf71703c0ae86c25242",
  "microsoft/LMOps": "4f2a9deb5f08e459fd44c2e4792344d78ca89fc3",
  "songmzhang/DSKD": "077337ac989045ccf11a6dd927418e3cf4f40971",
  "winycg/CIRKD": "dab64dbb5e4172141166cf8434a80ce55d9d3aa7",
  "yzd-v/cls_KD": "1e5d48f36957ee460d39d7ebc592c6cc7f8f3d66",
}
INPUTS = repository_inputs()
FOLDER = pathlib.Path()


def main() -> None:
  global FOLDER
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path, help="has the clones, as owner/name")
  parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
  arguments = parser.parse_args()
  FOLDER = arguments.folder
  torch.set_default_dtype(torch.float64)
  values = {f.__name__: float(f"{f().item():.10g}") for f in FUNCTIONS}
  page = {"made_by": {"torch": torch.__version__, **COMMITS}, "values": values}
  if not arguments.check:
    GOLDEN.write_text(json.dumps(page, indent=1) + "\n")
    return
  stored = json.loads(GOLDEN.read_text())["values"]
  changes = [
    f"{name}: {stored.get(name)} in the file, {value} here"
    for name, value in values.items()
    if not np.isclose(stored.get(name, np.nan), value, rtol=1e-6)
  ]
  print("\n".join(changes) or f"{GOLDEN.name} is what the repositories give")
  raise SystemExit(bool(changes))


def tensors(name: str) -> tuple[torch.Tensor, ...]:
  return tuple(torch.tensor(np.ascontiguousarray(x)) for x in INPUTS[name])


def images(*maps: np.ndarray) -> list[torch.Tensor]:
  """Returns tensors of maps with the channels second."""
  return [torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1))) for x in maps]


def repdistiller_correlation():
  scope = definitions("HobbitLong/RepDistiller", "distiller_zoo/CC.py", "Correlation")
  return scope["Correlation"]()(*tensors("rows"))


def repdistiller_kdsvd():
  """Returns the loss with k = 2; the sign of a singular vector is that of its largest entry."""

  def svd(x):
    u, s, v = torch.svd(x)
    return u, s, v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()

  path = "distiller_zoo/KDSVD.py"
  scope = definitions("HobbitLong/RepDistiller", path, "KDSVD", torch=_with(torch, svd=svd))
  student, teacher = (images(*maps) for maps in INPUTS["layers"])
  return sum(scope["KDSVD"](k=2)(student, teacher))


def rkd_dark_rank():
  pdist = definitions("lenscloth/RKD", "metric/utils.py", "pdist")["pdist"]
  scope = definitions("lenscloth/RKD", "metric/loss.py", "HardDarkRank", pdist=pdist)
  return scope["HardDarkRank"](alpha=0.1, beta=3, permute_len=3)(*tensors("rows"))


def dskd_adaptive_kl():
  """Computed in float32."""
  path, name = "code/criterions/various_divergence.py", "VariousDivergence"
  scope = definitions("songmzhang/DSKD", path, name, CrossEntropyLoss=nn.Module)
  loss = scope[name].__new__(scope[name])
  nn.Module.__init__(loss)
  loss.args, loss.kd_temp = types.SimpleNamespace(adaptive_kl_alpha=0.5), 2.0
  student, teacher, _ = tensors("tokens")
  return loss.compute_adaptive_kl_divergence(student, teacher, None, reduction="none").mean()


def modelopt_mft():
  path, name = "modelopt/torch/distill/losses.py", "MFTLoss"
  scope = definitions("NVIDIA/TensorRT-Model-Optimizer", path, name, Loss=nn.Module)
  return scope[name](temperature=2.0, threshold=0.2)(*tensors("labeled"))


def lmops_single_step():
  """Computed in float32."""
  names = ("get_entropy", "get_x_entropy")
  scope = definitions("microsoft/LMOps", "minillm/minillm/utils.py", *names)
  student, teacher, _ = tensors("tokens")
  infinite, mask = torch.zeros(7, dtype=bool), torch.ones(2, 3)
  cross = scope["get_x_entropy"](student, teacher, infinite, mask)
  return (cross - scope["get_entropy"](student, infinite, mask)).mean()


def trl_single_step():
  path, name = "trl/experimental/minillm/minillm_trainer.py", "_single_step_decomposition_loss"
  loss = definitions("huggingface/trl", path, name)[name]
  student, teacher, _ = tensors("tokens")
  log_probs = (torch.log_softmax(x / 2, -1) for x in (student, teacher))
  return loss(None, *log_probs, torch.ones(2, 3, dtype=bool))


def trl_top_k_jensen_shannon():
  """TRL takes the classes of its student: both sides are swapped, so alpha is the student's."""
  names = ("compute_divergence", "add_tail_bucket", "compute_topk_self_distillation_loss")
  scope = definitions("huggingface/trl", "trl/experimental/sdpo/loss_utils.py", *names)
  student, teacher, _ = tensors("labeled")
  options = {"distillation_topk": 3, "distillation_alpha": 0.9, "distillation_add_tail": True}
  return scope[names[-1]](teacher, student, **options).mean()


def textbrewer_attention():
  scope = definitions("airaria/TextBrewer", "src/textbrewer/losses.py", "att_ce_loss")
  return scope["att_ce_loss"](*tensors("scores"))


def ifvd_ifv():
  scope = definitions("YukangWang/IFVD", "utils/criterion.py", "CriterionIFV")
  student, teacher = images(*INPUTS["maps"][:2])
  labels = torch.tensor(INPUTS["maps"][2])
  return scope["CriterionIFV"](3)([0, 0, student], [0, 0, teacher], labels)


def structure_kd_pair_wise():
  """Computed in float32, on maps of 3 x 4 in patches of 1 x 2."""
  repository, name = "irfanICMLL/structure_knowledge_distillation", "sim_dis_compute"
  parts = definitions(repository, "utils/utils.py", "L2", "similarity", name)
  path, criterion = "utils/criterion.py", "CriterionPairWiseforWholeFeatAfterPool"
  scope = definitions(repository, path, criterion, sim_dis_compute=parts[name])
  maps = ([x] for x in images(*INPUTS["maps"][:2]))
  return scope[criterion](scale=0.5, feat_ind=0)(*maps)


def emkd_importance_maps():
  names = ("at", "importance_maps_distillation")
  scope = definitions("EagleMIT/EMKD", "utils/loss_functions.py", *names)
  return scope[names[1]](*images(*INPUTS["maps"][:2]))


def emkd_region_affinity():
  names = ("region_contrast", "region_affinity_distillation")
  scope = definitions("EagleMIT/EMKD", "utils/loss_functions.py", *names)
  labels = torch.tensor(INPUTS["regions"])
  masks = torch.stack([labels == 0, labels == 1], 1).to(torch.float64)
  return scope[names[1]](*images(*INPUTS["maps"][:2]), masks)


def cirkd_mini_batch():
  torch.Tensor.cuda = lambda x: x
  name = "CriterionMiniBatchCrossImagePair"
  scope = definitions("winycg/CIRKD", "losses/cirkd_mini_batch.py", name)
  return scope[name](temperature=0.1)(*images(*INPUTS["maps"][:2]))


def cirkd_pixel_memory():
  return _cirkd_memories()[0]


def cirkd_region_memory():
  return _cirkd_memories()[1]


def _cirkd_memories():
  """Computed in float32, with all of the memory, a head that changes nothing and no update."""
  torch.Tensor.cuda = lambda x: x
  name = "StudentSegContrast"
  scope = definitions("winycg/CIRKD", "losses/cirkd_memory.py", name, np=np)
  loss = scope[name].__new__(scope[name])
  nn.Module.__init__(loss)
  loss.project_head, loss.ignore_label = nn.Identity(), 255
  loss.contrast_temperature, loss.contrast_kd_temperature = 0.1, 1.0
  loss.pixel_contrast_size, loss.region_contrast_size = 4, 2
  memories = (F.normalize(torch.tensor(x), dim=2).float() for x in INPUTS["memory"])
  loss.teacher_pixel_queue, loss.teacher_segment_queue = memories
  loss._dequeue_and_enqueue = lambda keys, labels: None
  maps = (x.float() for x in images(*INPUTS["maps"][:2]))
  labels = torch.tensor(INPUTS["maps"][2])
  return loss(*maps, labels, predict=labels)


def cls_kd_uskd():
  return _uskd("rarest", alpha=1.0, beta=0.1, mu=0.005)


def cls_kd_uskd_without_others():
  return _uskd("labeled", alpha=0.5, beta=0.0, mu=0.1)


def cls_kd_vitkd():
  """Returns the loss of a generator that changes nothing."""
  path, name = "mmcls/models/dis_losses/vitkd.py", "ViTKDLoss"
  masked = torch.tensor(INPUTS["masked"])
  fixed = _with(torch, rand=lambda *shape, device: masked.to(torch.float64))
  scope = definitions("yzd-v/cls_KD", path, name, torch=fixed)
  loss = scope[name]("", True, 3, 3, alpha_vitkd=0.3, beta_vitkd=0.2, lambda_vitkd=0.5)
  loss.generation = nn.Identity()
  return loss(*([torch.tensor(x) for x in side] for side in INPUTS["vit"]))


def _uskd(name, **weights):
  scope = definitions("yzd-v/cls_KD", "mmcls/models/dis_losses/uskd.py", "USKDLoss")
  torch.Tensor.cuda = lambda x: x
  loss = scope["USKDLoss"]("", True, channel=1, num_classes=7, **weights)
  loss.fc = nn.Identity()  # The head's output is the input.
  student, weak, labels = tensors(name)
  return loss(weak, student, labels)


FUNCTIONS = (
  repdistiller_correlation,
  repdistiller_kdsvd,
  rkd_dark_rank,
  dskd_adaptive_kl,
  modelopt_mft,
  lmops_single_step,
  trl_single_step,
  trl_top_k_jensen_shannon,
  textbrewer_attention,
  ifvd_ifv,
  structure_kd_pair_wise,
  emkd_importance_maps,
  emkd_region_affinity,
  cirkd_mini_batch,
  cirkd_pixel_memory,
  cirkd_region_memory,
  cls_kd_uskd,
  cls_kd_uskd_without_others,
  cls_kd_vitkd,
)


def _with(module, **attributes):
  """Returns a namespace of the module's names, some of them replaced."""
  return types.SimpleNamespace(**{**vars(module), **attributes})


def definitions(repository: str, path: str, *names: str, **scope) -> dict:
  """Returns the functions and classes of these names at the repository's commit."""
  command = ["git", "-C", str(FOLDER / repository), "show", f"{COMMITS[repository]}:{path}"]
  source = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  namespace = {"torch": torch, "nn": nn, "F": F, **scope}
  nodes = [x for x in ast.walk(ast.parse(source)) if getattr(x, "name", None) in names]
  for node in nodes:
    node.decorator_list = []
  flags = __future__.annotations.compiler_flag  # Annotations stay text.
  exec(compile(ast.Module(nodes, []), path, "exec", flags), namespace)
  return namespace


if __name__ == "__main__":
  main()
