"""Translation, and other text to text: BLEU and chrF of what a network generates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.tasks._sequences import (
  Decode,
  Texts,
  check_ends,
  labeled_rows,
  sequence_task,
)
from distill_jax.tasks._translations import Scorer
from distill_jax.types import Metric, Task

BLEU = Metric("bleu", "BLEU", "", "max", ".2f", detail=0)
CHRF = Metric("chrf", "character F (chrF)", "", "max", ".2f", short="chrF", detail=0)


def translation(
  decode: Decode,
  *,
  end_token: int,
  decode_source: Decode | None = None,
  references: Sequence[str] | Mapping[int, str] | None = None,
  decides: str = "",
  tokenize: str = "13a",
  memory: int = 2**26,
) -> Task:
  """Returns the task of text that a network generates from a source: labels int [B, T] are the
  target with its end token, negative behind it.

  Its metrics are BLEU and chrF, those of sacrebleu (the extra 'translation'), and as for
  `language_modeling` token NLL, accuracy, perplexity and calibration given the true text, and, next
  to a teacher of the same vocabulary, agreement with it and KL(teacher || student). A row without
  any label does not count; one with the end token alone is an empty text.

  Each network generates by its own `Model.sample`, once per evaluation: pass models with
  `model._replace(sample=models.decoding.sampler(...))`. `fit` generates in its evaluations only
  where BLEU or chrF chooses the weights.

  A report shows sacrebleu's signatures, and examples: source, reference, and the text of teacher,
  baseline and distilled student.

  Args:
    decode: maps token ids, int32 [n], to text (or to symbols, which are joined by spaces).
    end_token: the token that ends targets; neither it nor what follows it is decoded.
    decode_source: the same for the batch's 'source' [B, S] where 'source_segments', if there are
      any, are not negative; None: `decode`, up to `end_token`.
    references: the original texts by the batch's 'id', of all sets that are evaluated; None: the
      decoded labels.
    decides: the metric that chooses the weights; 'nll' spares generating text while training. "":
      BLEU.
    tokenize: sacrebleu's tokenizer of words for BLEU, such as '13a', 'intl', 'zh' or 'char'.
    memory: bytes that one network's logits may take at once.

  Raises:
    ValueError: no metric of the name `decides`. When it is measured: a Model without `sample`, no
      label with the end token, an id without a reference.
    ModuleNotFoundError: when it is measured, sacrebleu is not installed.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks, types
  >>> words = ["</s>", "the", "page", "is", "empty", "here"]
  >>> task = tasks.translation(lambda ids: [words[i] for i in ids], end_token=0)
  >>> outputs = {types.SAMPLE: (jnp.array([[1, 2, 3, 4, 0]]), jnp.array([4]))}
  >>> predictions = task.predict(outputs, {"label": jnp.array([[1, 2, 3, 4, 5, 0]])})
  >>> scores = task.evaluate_predictions(predictions, {})
  >>> {name: round(score, 1) for name, score in scores.items()}
  {'bleu': 77.9, 'chrf': 77.9}
  """
  return sequence_task(
    (BLEU, CHRF),
    decides,
    memory,
    **_Options(
      Texts(decode, end_token),
      Texts(decode_source or decode, None if decode_source else end_token),
      end_token,
      references,
      Scorer(tokenize),
    ).fields(),
  )


class _Options(NamedTuple):
  """What the functions of `translation` need."""

  texts: Texts
  source_texts: Texts
  end_token: int
  references: Sequence[str] | Mapping[int, str] | None
  scorer: Scorer

  def fields(self) -> dict[str, Any]:
    """Returns the fields of the `Task`."""
    return {
      "evaluate_predictions": self.evaluate,
      "references": () if self.references is None else ("id",),
      "figures": self.figures,
      "figure_references": ("source", "source_segments", "id"),
    }

  def true_texts(self, predictions: Mapping[str, Any], ids: Any) -> list[str]:
    """Returns the reference of each example."""
    if self.references is None:
      return self.texts(predictions["label"])
    try:
      return [self.references[int(number)] for number in ids]
    except (KeyError, IndexError) as error:
      raise ValueError(
        f"references: expected a text for each id, got {len(self.references)} texts and the ids "
        f"{min(ids)} to {max(ids)}: pass those of all sets that are evaluated"
      ) from error

  def evaluate(
    self, predictions: Mapping[str, Any], references: Mapping[str, Any]
  ) -> dict[str, float]:
    """Returns the scores of the text."""
    labeled = labeled_rows(predictions)
    rows = {name: np.asarray(x)[labeled] for name, x in predictions.items()}
    ids = np.asarray(references["id"])[labeled] if self.references is not None else None
    check_ends(rows["label"], self.end_token)
    return self.scorer.scores(self.texts(rows["tokens"]), self.true_texts(rows, ids))

  def figures(
    self, entries: Sequence[Any], references: Mapping[str, Any], class_names: Sequence[str]
  ) -> Sequence[Any]:
    """Returns the signatures and the examples."""
    from distill_jax.report.document import Numbers, Text
    from distill_jax.tasks._class_figures import sequence_figures  # matplotlib

    del class_names
    predicted = [entry for entry in entries if "tokens" in (entry.predictions or {})]
    if not predicted:
      return []
    true = self.true_texts(predicted[0].predictions, references.get("id"))
    signatures = self.scorer.signatures()
    return [
      *sequence_figures(
        predicted,
        references,
        true=true,
        texts=self.texts,
        source_texts=self.source_texts,
        scores=lambda rows: self.scorer.sentence_scores(self.texts(rows), true),
        title="chrF",
        form=".0f",
      ),
      Text(f"sacrebleu's signatures: BLEU {signatures['bleu']}; chrF {signatures['chrf']}."),
      Numbers("signatures", signatures),
    ]
