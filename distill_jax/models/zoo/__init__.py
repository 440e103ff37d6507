"""Small vision networks in Flax NNX, one family a file."""
