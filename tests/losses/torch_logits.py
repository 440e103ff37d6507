"""The losses on logits in PyTorch: torchdistill's where it has one, else as one would write them.

Each takes tensors laid out as PyTorch has them and gives a scalar, the mean over the batch.
"""

import torch
import torch.nn.functional as F
from torchdistill.losses import mid_level

PATH = {"student_module_path": "net", "teacher_module_path": "net"}
PATH |= {"student_module_io": "output", "teacher_module_io": "output"}


def io(student, teacher):
  """What torchdistill's losses take: the outputs of named modules."""
  return {"net": {"output": student}}, {"net": {"output": teacher}}


def kl_divergence(student, teacher, *, temperature):
  student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
  soft = mid_level.KDLoss(**PATH, temperature=temperature, alpha=0)
  return temperature**2 * soft(*io(student, teacher))  # without labels torchdistill leaves T^2 out


def standardize(student, teacher, *, temperature):
  """`kl_divergence` of standardized logits."""
  soft = mid_level.LogitStdKDLoss(**PATH, temperature=temperature, alpha=0)
  return temperature**2 * soft(*io(student, teacher))


def reverse_kl(student, teacher, *, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  return temperature**2 * kl(log_q, log_p)


def soft_cross_entropy(student, teacher, *, temperature):
  return temperature**2 * F.cross_entropy(
    student / temperature, torch.softmax(teacher / temperature, -1)
  )


def jensen_shannon(student, teacher, *, teacher_weight, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  log_m = mixture(log_p, log_q, teacher_weight)
  value = teacher_weight * kl(log_p, log_m) + (1 - teacher_weight) * kl(log_q, log_m)
  return temperature**2 * value


def skew_kl(student, teacher, *, alpha, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  return temperature**2 * kl(log_p, mixture(log_p, log_q, alpha))


def skew_reverse_kl(student, teacher, *, alpha, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  return temperature**2 * kl(log_q, mixture(log_q, log_p, alpha))


def total_variation(student, teacher, *, temperature):
  q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))
  return 0.5 * F.l1_loss(q, p, reduction="sum") / len(q)


def logit_mse(student, teacher):
  return F.mse_loss(student, teacher)


def hard_distillation(student, teacher, *, label_smoothing):
  return F.cross_entropy(student, teacher.argmax(-1), label_smoothing=label_smoothing)


def binary_kl(student, teacher, *, temperature):
  s, t = student / temperature, teacher / temperature
  p = torch.sigmoid(t)
  cross, entropy = (F.binary_cross_entropy_with_logits(x, p, reduction="sum") for x in (s, t))
  return temperature**2 * (cross - entropy) / len(s)


def uld(student, teacher):
  q, p = (torch.softmax(x, -1).sort(-1, descending=True).values for x in (student, teacher))
  q = F.pad(q, (0, p.shape[1] - q.shape[1]))
  return F.l1_loss(q, p, reduction="sum") / len(q)


def dkd(student, teacher, labels, *, alpha, beta, temperature):
  target = F.one_hot(labels, student.shape[1]).bool()
  binary, others = [], []
  for x in (student / temperature, teacher / temperature):
    p = torch.softmax(x, -1)
    binary.append(torch.stack([p[target], p.masked_fill(target, 0).sum(-1)], -1).log())
    others.append(torch.log_softmax(x - 1000 * target, -1))
  return temperature**2 * (alpha * kl(*reversed(binary)) + beta * kl(*reversed(others)))


def adaptive_kl(student, teacher, *, head_mass, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  gap = (log_q.exp() - log_p.exp()).abs()
  ascending, order = log_p.exp().sort(-1)
  tail = (gap.gather(-1, order) * (ascending.cumsum(-1) <= 1 - head_mass)).sum(-1)
  weight = (1 - tail / gap.sum(-1)).detach()[:, None]
  forward, reverse = log_p.exp() * (log_p - log_q), log_q.exp() * (log_q - log_p)
  return temperature**2 * (weight * forward + (1 - weight) * reverse).sum(-1).mean()


def minifinetuning(student, teacher, labels, *, threshold, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  p, target = log_p.exp(), F.one_hot(labels, student.shape[1])
  p_label, p_max = (p * target).sum(-1), p.max(-1).values
  moved = torch.where(
    p_label < p_max,
    (p_max - p_label + threshold) / (1 + p_max - p_label),
    ((p_label + threshold).clamp(max=1) - p_label) / (1 - p_label),
  )[:, None]
  corrected = (1 - moved) * p + moved * target
  return temperature**2 * F.kl_div(log_q, corrected, reduction="batchmean")


def minillm_single_step(student, teacher, labels, *, teacher_mixing, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)
  q, p = (x.exp().gather(-1, labels[:, None]) for x in (log_q, log_p))
  weight = (q / (teacher_mixing * p + (1 - teacher_mixing) * q)).detach()
  return temperature**2 * (weight * log_q.exp() * (log_q - log_p)).sum(-1).mean()


def nkd(student, teacher, labels, *, gamma, temperature):
  target = F.one_hot(labels, student.shape[1]).bool()
  hard = -torch.softmax(teacher, -1)[target] * torch.log_softmax(student, -1)[target]
  s, t = (x[~target].reshape(len(x), -1) / temperature for x in (student, teacher))
  others = F.cross_entropy(s, torch.softmax(t, -1))
  return hard.mean() + gamma * temperature**2 * others


def wsld(student, teacher, labels, *, temperature):
  soft = F.cross_entropy(
    student / temperature, torch.softmax(teacher / temperature, -1), reduction="none"
  )
  with torch.no_grad():
    student_loss, teacher_loss = (
      F.cross_entropy(x, labels, reduction="none") for x in (student, teacher)
    )
    weight = 1 - torch.exp(-student_loss / (teacher_loss + 1e-7))
  return temperature**2 * (weight * soft).mean()


def ofa(student, teacher, labels, *, eps):
  p, target = torch.softmax(teacher, -1), F.one_hot(labels, student.shape[1])
  raised = torch.where(target.bool(), (p + 1) ** eps - 1, p)
  return -(raised * torch.log_softmax(student, -1)).sum(-1).mean()


def uskd(student, weak, labels, *, alpha, beta, mu):
  target = F.one_hot(labels, student.shape[1]).bool()
  log_q_label = torch.log_softmax(student, -1)[target]
  confidence = log_q_label.exp().detach() ** 2
  others, weak_others = (x[~target].reshape(len(x), -1) for x in (student, weak))
  score = torch.softmax(others, -1) + torch.softmax(weak_others, -1)
  zipf = 1 / (1 + score.argsort(-1, descending=True).argsort(-1))
  zipf = (zipf / zipf.sum(-1, keepdim=True)).to(student.dtype)
  hard = -((confidence + 1 - confidence.mean()) * log_q_label).mean()
  smoothed = F.cross_entropy(weak, labels, label_smoothing=0.1)
  return alpha * hard + beta * F.cross_entropy(others, zipf) + mu * smoothed


def dist(student, teacher, *, beta, gamma, temperature):
  return mid_level.DISTLoss(**PATH, beta=beta, gamma=gamma, tau=temperature)(*io(student, teacher))


def class_gram(student, teacher, *, temperature):
  q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))
  return F.mse_loss(q.T @ q, p.T @ p, reduction="sum") / q.shape[1]


def batch_gram(student, teacher, *, temperature):
  q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))
  return F.mse_loss(q @ q.T, p @ p.T, reduction="sum") / len(q)


def sparse_kl(student, indices, log_probs, log_tail):
  q = torch.softmax(student, -1)
  top = q.gather(-1, indices)
  rest = 1 - top.sum(-1, keepdim=True)
  log_q = torch.cat([top, rest], -1).log()
  return kl(torch.cat([log_probs, log_tail[:, None]], -1), log_q)


def sparse_jensen_shannon(student, indices, log_probs, log_tail, *, teacher_weight):
  q = torch.softmax(student, -1).gather(-1, indices)
  log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).log()
  log_p = torch.cat([log_probs, log_tail[:, None]], -1)
  log_m = mixture(log_p, log_q, teacher_weight)
  return teacher_weight * kl(log_p, log_m) + (1 - teacher_weight) * kl(log_q, log_m)


def sparse_kl_conditional(student, indices, log_probs, log_tail):
  return kl(torch.log_softmax(log_probs, -1), torch.log_softmax(student.gather(-1, indices), -1))


def sparse_kl_smoothed(student, indices, log_probs, log_tail):
  classes = student.shape[1]
  evenly = log_tail[:, None] - torch.tensor(classes - indices.shape[1], dtype=student.dtype).log()
  log_p = evenly.expand(-1, classes).scatter(-1, indices, log_probs)
  return kl(log_p, torch.log_softmax(student, -1))


def sampled_cross_entropy(student, indices, log_probs, log_tail):
  return -torch.log_softmax(student, -1).gather(-1, indices).mean()


def localization(student, teacher, *, temperature):
  log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
  boxes = student.shape[:-2].numel()
  return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / boxes


def ctc_frames(student, teacher, *, mode, temperature):
  log_q, log_p = log_softmaxes(student, teacher, temperature)

  def two(log_a):
    return torch.stack([log_a[..., 0], torch.logsumexp(log_a[..., 1:], -1)], -1)

  assert mode == "collapsed"
  full = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
  collapsed = F.kl_div(two(log_q), two(log_p), reduction="none", log_target=True).sum(-1)
  return temperature**2 * torch.where(teacher.argmax(-1) == 0, collapsed, full).mean()


def ctc_mean(student, teacher, *, temperature):
  """PaddleOCR's KLCTCLogits.forward_meanmax without its 1e-6, and with T^2."""
  q, p = (torch.softmax(x / temperature, -1).mean(1) for x in (student, teacher))
  return temperature**2 * F.kl_div(q.log(), p, reduction="batchmean")


def rnnt_three_way(student, teacher, labels, *, blank=0):
  batch, _, nodes, _ = student.shape
  labels = F.pad(labels, (0, 1), value=blank)[:, None, :, None].expand(-1, student.shape[1], -1, 1)

  def three(x):
    p = torch.softmax(x, -1)
    label = p.gather(-1, labels) * (torch.arange(nodes) < nodes - 1)[:, None]
    both = torch.cat([label, p[..., blank : blank + 1]], -1)
    return torch.cat([both, 1 - both.sum(-1, keepdim=True)], -1)

  q, p = three(student), three(teacher)
  return F.kl_div(q.clamp(min=1e-30).log(), p, reduction="sum") / student.shape[:3].numel()


def log_softmaxes(student, teacher, temperature):
  return tuple(torch.log_softmax(x / temperature, -1) for x in (student, teacher))


def kl(log_a, log_b):
  """KL(a || b), the mean over the batch."""
  return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


def mixture(log_a, log_b, weight):
  weight = torch.tensor(weight, dtype=log_a.dtype)
  return torch.logaddexp(log_a + weight.log(), log_b + torch.log1p(-weight))
