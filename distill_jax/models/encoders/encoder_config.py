"""Describes an `Encoder`: its sizes, its family and its head."""

import dataclasses

from distill_jax.errors import check_integer, suggest

FAMILIES = ("bert", "distilbert", "roberta", "modernbert")
HEADS = ("", "sequence", "tokens", "spans", "masked")
_TOKEN_TYPES = {"bert": 2, "distilbert": 0, "roberta": 1, "modernbert": 0}


@dataclasses.dataclass(frozen=True)
class ModernOptions:
  """What only ModernBERT has; the values are those of the released networks.

  Attributes:
    global_theta: base of the rotary wavelengths of blocks that attend to all tokens.
    local_theta: that of the blocks that attend to near ones.
    window: number of near tokens, half of them on each side.
    global_every: distance of blocks that attend to all tokens, from the first on; 1: all do.
    mean_pooling: whether the head 'sequence' reads the mean of the hidden states over the tokens
      instead of the first one's.
  """

  global_theta: float = 160_000.0
  local_theta: float = 10_000.0
  window: int = 128
  global_every: int = 3
  mean_pooling: bool = False


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes and head of an `Encoder`; a student's is `dataclasses.replace(config, num_layers=2)`.

  Attributes:
    vocab_size: number of tokens in the vocabulary.
    embed_dim: size of the hidden states.
    num_layers: number of blocks.
    num_heads: number of attention heads, a divisor of embed_dim.
    mlp_dim: size inside the perceptrons; 0: 4 embed_dim.
    max_length: number of positions, the maximum number of tokens in a text.
    token_types: number of embeddings that tell the sentences of a pair apart; 0: none; None: that
      of the family, 2 for BERT, 1 for RoBERTa, 0 for the others.
    norm_eps: epsilon of the layer norms.
    pooler: whether a network without a head has a layer that makes 'pooled' of the first token's
      last hidden state, which DistilBERT and ModernBERT have not. The head 'sequence' has one in
      any case, and so have 'masked' and all heads of ModernBERT; the others have none.
    head: 'sequence': one label, or one number, a text; 'tokens': a label a token; 'spans': the
      first and the last token of an answer; 'masked': the hidden tokens, with the embedding as the
      last kernel; '': none.
    num_labels: number of the head's logits, 1 for a number to predict; 2 for 'spans'; 0: no head,
      or 'masked', whose logits are the vocabulary's.
    family: 'bert', 'distilbert', 'roberta' or 'modernbert'. The first three have learned positions
      and norms after each part; they differ in their names in released files, and in the pooler's
      activation: ReLU for DistilBERT, tanh for the others. 'modernbert' has rotary positions, norms
      before each part, a gated perceptron and no biases.
    modern: of 'modernbert'; None: `ModernOptions()`.

  Raises:
    ValueError: a size that is no positive integer or does not divide, an unknown family or head, or
      a head and labels that do not go together.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int = 0
  max_length: int = 512
  token_types: int | None = None
  norm_eps: float = 1e-12
  pooler: bool = True
  head: str = ""
  num_labels: int = 0
  family: str = "bert"
  modern: ModernOptions | None = None

  def __post_init__(self):
    for field, value, names in (("family", self.family, FAMILIES), ("head", self.head, HEADS)):
      if value not in names:
        raise ValueError(f"{field}: expected one of {names}, got {value!r}{suggest(value, names)}")
    if self.mlp_dim == 0:
      object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
    if self.token_types is None:
      object.__setattr__(self, "token_types", _TOKEN_TYPES[self.family])
    for field in ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "max_length"):
      check_integer(field, getattr(self, field), 1)
    check_integer("token_types", self.token_types, 0)
    self._check_modern()
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}"
      )
    self._check_head()

  def _check_modern(self) -> None:
    if self.family != "modernbert":
      if self.modern is not None:
        raise ValueError(
          f"modern: expected None for the family {self.family!r}, got {self.modern}: write "
          "family='modernbert'"
        )
      return
    object.__setattr__(self, "modern", self.modern or ModernOptions())
    if self.token_types:
      raise ValueError(f"token_types: expected 0 for 'modernbert', got {self.token_types}")
    if self.embed_dim // self.num_heads % 2:
      raise ValueError(
        f"num_heads: expected heads of an even size, as positions rotate pairs, got "
        f"{self.num_heads} of embed_dim={self.embed_dim}"
      )

  def _check_head(self) -> None:
    if self.head == "spans" and self.num_labels == 0:
      object.__setattr__(self, "num_labels", 2)
    if not self.head and self.num_labels != 0:
      raise ValueError(
        f"num_labels: expected 0 without a head, got {self.num_labels}: name the head too, one "
        f"of {HEADS[1:]}"
      )
    if self.head == "masked" and self.num_labels != 0:
      raise ValueError(
        f"num_labels: expected 0 for 'masked', whose logits are the vocabulary's, got "
        f"{self.num_labels}"
      )
    if self.head not in ("", "masked"):
      check_integer("num_labels", self.num_labels, 1)
    if self.head == "spans" and self.num_labels != 2:
      raise ValueError(f"num_labels: expected 2, a span's start and end, got {self.num_labels}")
    if self.head:
      has_pooler = self.head in ("sequence", "masked") or self.family == "modernbert"
    else:
      has_pooler = self.pooler and self.family in ("bert", "roberta")
    object.__setattr__(self, "pooler", has_pooler)
