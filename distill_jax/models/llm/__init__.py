"""Language models: a decoder of the Llama kind, its released weights, sampling, and on-policy batches."""
