"""Contrastive losses, and those on attention and detectors' maps, in PyTorch.

torchdistill's where it has one, else as one would write them. Each takes tensors laid out as
PyTorch has them and gives a scalar, the mean over the batch.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torchdistill.losses import mid_level


def info_nce(student, teacher, *, temperature):
  similar = F.normalize(student) @ F.normalize(teacher).T
  return F.cross_entropy(similar / temperature, torch.arange(len(similar)))


def queue_similarity(student, teacher, queue, *, student_temperature, teacher_temperature):
  s, t, queue = (F.normalize(x) for x in (student, teacher, queue))

  def similarity(x):
    return torch.cat([(x * t).sum(-1, keepdim=True), x @ queue.T], 1)

  target = torch.softmax(similarity(t) / teacher_temperature, 1)
  return F.cross_entropy(similarity(s) / student_temperature, target)


def crd(student, teacher, indices, negatives, state, *, temperature, momentum):
  """Returns torchdistill's loss with this memory, which it moves in place."""
  memories, examples = state[:2], len(state[0])
  loss = mid_level.CRDLoss.__new__(mid_level.CRDLoss)  # __init__ loops over all examples in Python
  torch.nn.Module.__init__(loss)
  loss.num_samples, loss.eps = examples, 1e-7
  loss.params = torch.tensor([negatives.shape[1], temperature, *state[2].tolist(), momentum]).to(
    student.dtype
  )
  loss.memory_v1, loss.memory_v2 = memories
  chosen = torch.cat([indices[:, None], negatives], 1)
  outputs = loss.contrast_memory(F.normalize(student), F.normalize(teacher), indices, chosen)
  return sum(loss.compute_contrast_loss(x) for x in outputs).squeeze()


def dino(student, teacher, center, *, student_temperature, teacher_temperature, momentum):
  log_q = torch.log_softmax(student / student_temperature, -1)
  p = torch.softmax((teacher - center) / teacher_temperature, -1)
  pairs = [(i, j) for i, j in itertools.product(range(len(p)), range(len(log_q))) if i != j]
  value = sum(-(p[i] * log_q[j]).sum(-1).mean() for i, j in pairs) / len(pairs)
  center.mul_(momentum).add_(teacher.mean((0, 1)), alpha=1 - momentum)
  return value


def attention_scores_mse(student, teacher):
  return F.mse_loss(student, teacher)


def attention_kl(student, teacher):
  log_q, log_p = (torch.log_softmax(x, -1) for x in (student, teacher))
  return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / student.shape[:3].numel()


def attention_cross_entropy(student, teacher):
  log_q, p = torch.log_softmax(student, -1), torch.softmax(teacher, -1)
  return -(p * log_q).sum(-1).mean()


def minilm_relations(student, teacher, *, relation_heads):
  def relation(x):
    x = x.unflatten(-1, (relation_heads, -1)).transpose(1, 2)
    return x @ x.transpose(2, 3) / math.sqrt(x.shape[-1])

  return sum(attention_kl(relation(s), relation(t)) for s, t in zip(student, teacher))


def layer_attention(student, teacher, params):
  queries, keys, bilinear, student_position, teacher_position = params
  q = torch.stack([x.mean((2, 3)) @ w for x, w in zip(teacher, queries)], 1)
  k = torch.stack([F.relu(x.mean((2, 3)) @ w) for x, w in zip(student, keys)], 1)
  scores = torch.einsum("btd,tde,bse->bts", q, bilinear, k) + teacher_position @ student_position.T
  weights = torch.softmax(scores / math.sqrt(q.shape[-1]), -1)

  def attention(x):
    return F.normalize(x.pow(2).mean(1).flatten(1))

  def distance(s, t):
    pooled = F.adaptive_avg_pool2d(s, t.shape[2:])
    return (attention(pooled) - attention(t)).pow(2).mean(1)

  distances = torch.stack([torch.stack([distance(s, t) for s in student], -1) for t in teacher], 1)
  return (weights * distances).sum((1, 2)).mean()


def weight_alignment(student, teacher):
  return sum(F.mse_loss(student[name], teacher[name]) for name in student) / len(student)


def fgd(
  student,
  teacher,
  foreground,
  context,
  *,
  temperature,
  alpha=1e-3,
  beta=5e-4,
  gamma=1e-3,
  relation=1e-3,
):
  (space_s, channel_s), (space_t, channel_t) = (
    _attention(x, temperature) for x in (student, teacher)
  )
  error = ((student - teacher).pow(2) * channel_t[:, :, None, None]).sum(1) * space_t
  outside = (foreground == 0).to(error.dtype)
  background = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
  values = [alpha * foreground * error, beta * background * error]
  values += [gamma * (space_s - space_t).abs(), gamma * (channel_s - channel_t).abs()]
  values += [relation * (_global(student, context[0]) - _global(teacher, context[1])).pow(2)]
  return sum(x.sum() for x in values) / len(student)


def _attention(x, temperature):
  """Over space [B, H, W] and over channels [B, C]."""
  size = x.abs()
  space = torch.softmax(size.mean(1).flatten(1) / temperature, 1).reshape(size[:, 0].shape)
  channel = torch.softmax(size.mean((2, 3)) / temperature, 1)
  return space * size[0, 0].numel(), channel * size.shape[1]


def _global(x, block):
  """x plus the bottleneck of its attention-pooled mean."""
  (pool, pool_bias), (narrow, bias), norm, (expand, out_bias) = block
  flat = x.flatten(2)
  weights = torch.softmax(torch.einsum("bcp,c->bp", flat, pool) + pool_bias, 1)
  hidden = torch.einsum("bcp,bp->bc", flat, weights) @ narrow + bias
  hidden = F.relu(F.layer_norm(hidden, hidden.shape[1:], *norm))
  return x + (hidden @ expand + out_bias)[:, :, None, None]
