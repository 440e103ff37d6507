"""The losses on features in PyTorch: torchdistill's where it has one, else as one would write them.

Each takes tensors laid out as PyTorch has them (channels second) and gives a scalar, the mean over
the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch_logits import PATH, io
from torchdistill.losses import mid_level

ENDS = {"teacher": {"io": "output", "path": "net"}, "student": {"io": "output", "path": "net"}}
PAIR = {"pair": {**ENDS, "weight": 1}}


def hint(student, teacher):
  return F.mse_loss(student, teacher)


def l1(student, teacher):
  return F.l1_loss(student, teacher)


def pad(student, teacher, log_variance):
  student_outputs, teacher_outputs = io(student, teacher)
  student_outputs["var_estimator"] = {"output": log_variance[:, None]}  # here one an example
  return mid_level.PADL2Loss("net", "net")(student_outputs, teacher_outputs)


def cosine(student, teacher):
  return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def attention_transfer(student, teacher):
  return mid_level.ATLoss(PAIR, mode="code")(*io(student, teacher))


def nst(student, teacher):
  s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

  def kernel(a, b):
    return (a @ b.transpose(1, 2)).pow(2).mean()

  return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def fsp(student, teacher):
  s, t = (mid_level.FSPLoss.compute_fsp_matrix(*x) for x in (student, teacher))
  return F.mse_loss(s, t)  # The loss of torchdistill sums norms.


def factor_transfer(student, teacher):
  return mid_level.FTLoss()(
    {"translator": {"output": student}}, {"paraphraser": {"output": teacher}}
  )


def inter_channel(student, teacher):
  return len(student) * mid_level.ChSimLoss(PAIR)(
    *io(student, teacher)
  )  # torchdistill divides by B^2


def affinity(student, teacher):
  s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
  difference = (s.transpose(1, 2) @ s - t.transpose(1, 2) @ t) / s.shape[2]
  return difference.norm(dim=2).sum(1).mean()


def activation_boundary(student, teacher):
  return mid_level.AltActTransferLoss(PAIR, margin=1.0, reduction="mean")(*io(student, teacher))


def ofd(student, teacher, margin):
  target = torch.maximum(teacher, margin[:, None, None])
  paid = (student > target) | (target > 0)
  return ((student - target).pow(2) * paid).sum() / len(student)


def review_kd(student, teacher):
  return mid_level.HierarchicalContextLoss(**PATH)(*io((student, None), teacher))


def mgd(student, teacher):
  return F.mse_loss(student, teacher, reduction="sum") / len(student)


def vid(student, teacher, raw_scale):
  variance = (F.softplus(raw_scale) + 1e-5)[:, None, None]  # as torchdistill's Regressor4VID
  return mid_level.VIDLoss(PAIR)(*io((student, variance), teacher))


def srd(student, teacher):
  s, t = (F.batch_norm(x, None, None, training=True, eps=1e-4) for x in (student, teacher))
  outputs = [{"net": {"output": x}, "logits": {"output": torch.zeros(1, 2)}} for x in (s, t)]
  paths = ["net", "output", "net", "output", "logits", "output", "logits", "output"]
  return (
    mid_level.SRDLoss(*paths, exponent=4.0)(*outputs) / 2
  )  # twice the loss, and a KL that is 0 here


def vkd(student, teacher):
  return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[-1:]))


def cwd(student, teacher, *, temperature):
  log_q, log_p = (torch.log_softmax(x.flatten(2) / temperature, -1) for x in (student, teacher))
  total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
  return temperature**2 * total / student.shape[:2].numel()


def pearson(student, teacher):
  def standard(x):
    std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (std + 1e-6)

  return F.mse_loss(standard(student), standard(teacher)) / 2


def similarity_preserving(student, teacher):
  def gram(x):
    x = x.flatten(1)
    return F.normalize(x @ x.T)  # L2, where torchdistill takes L1

  return F.mse_loss(gram(student), gram(teacher))


def rkd_distance(student, teacher):
  return _rkd(student, teacher, dist_factor=1, angle_factor=0)


def rkd_angle(student, teacher):
  return _rkd(student, teacher, dist_factor=0, angle_factor=1)


def pkt(student, teacher):
  return mid_level.PKTLoss(**PATH)(*io(student, teacher))


def correlation_congruence(student, teacher):
  """Returns the loss of unit rows, squared; torchdistill takes raw rows and the norm."""
  gamma, degree = 0.4, 2

  def kernel(x):
    x = F.normalize(x)
    similar = x @ x.T
    series = sum((2 * gamma) ** p / math.factorial(p) * similar**p for p in range(degree + 1))
    return math.exp(-2 * gamma) * series

  return F.mse_loss(kernel(student), kernel(teacher))


def ifv(student, teacher, labels, *, num_classes):
  labels = labels[:, 0] if labels.ndim == 4 else labels
  classes = F.one_hot(labels, num_classes).flatten(1, 2).to(student.dtype)

  def cosines(x):
    x = x.flatten(2).transpose(1, 2)
    means = classes.transpose(1, 2) @ x / classes.sum(1)[..., None].clamp(min=1)
    return F.cosine_similarity(x, classes @ means, dim=-1)

  return F.mse_loss(cosines(student), cosines(teacher))


def vitkd(student, teacher, masked, *, alpha, beta):
  shallow, deep = (F.mse_loss(s, t, reduction="none") for s, t in zip(student, teacher))
  masked = masked.to(deep.dtype)
  generation = (deep.sum(2) * masked).sum(1) * masked.shape[1] / masked.sum(1)
  return (alpha * shallow.flatten(1).sum(1) + beta * generation).mean()


def kdsvd(student, teacher, *, k):
  def directions(s, t):
    s, t = (torch.linalg.svd(x.flatten(2).transpose(1, 2)) for x in (s, t))
    s, t, values = s.Vh[:, : k + 3].mT, t.Vh[:, :k].mT, F.normalize(t.S[:, :k])[:, None]
    t = t * t.gather(1, t.abs().argmax(1, keepdim=True)).sign()
    cosines = s.mT @ t
    nearest = cosines.abs().argmax(1, keepdim=True)
    s = s.gather(2, nearest.expand(-1, s.shape[1], -1)) * cosines.gather(1, nearest).sign()
    return s * values, t * values

  def kernel(a, b):
    return torch.exp(-((a[:, :, None] - b[:, None]) ** 2) / 8)

  layers = [directions(s, t) for s, t in zip(student, teacher)]
  return sum(
    (kernel(b[0], a[0]) - kernel(b[1], a[1])).pow(2).sum() for a, b in zip(layers, layers[1:])
  ) / len(student[0])


def dark_rank(student, teacher, *, alpha, beta, length):
  s, t = (torch.cdist(x, x) for x in (student, teacher))
  nearest = t.argsort(1)[:, 1 : length + 1]
  scores = -alpha * s.gather(1, nearest) ** beta
  remaining = scores.flip(1).logcumsumexp(1).flip(1)
  return (remaining - scores).sum(1).mean()


def correlation(student, teacher):
  error = (student - teacher).abs()
  return (error[1:] * error[:-1]).sum(1).mean()


def _rkd(student, teacher, **factors):
  return mid_level.RKDLoss("net", "net", reduction="mean", **factors)(*io(student, teacher))
