"""Code of the `linear_*` losses: logits computed a chunk at a time, forward and backward."""
