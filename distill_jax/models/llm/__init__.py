"""Language models: decoders, their heads, released weights, sampling and on-policy rows."""
