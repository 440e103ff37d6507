"""What to minimise: weighted terms over (student, teacher, batch), with learned parts where a term needs them.

objective = weighted(
  hard=(0.1, labels()),
  soft=(0.9, logits(losses.kl_divergence, temperature=4.0)),
  hint=(optax.linear_schedule(1.0, 0.0, 1000), features("block2", "block3", losses.hint)),
)
"""

from distill_jax.objectives.terms import Term, features, labels, logits, mutual, weighted

__all__ = ["Term", "features", "labels", "logits", "mutual", "weighted"]
