"""What the `linear_*` losses share: logits that are made a chunk at a time, forward and backward."""
