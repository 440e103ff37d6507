"""Encoders of text: BERT and its kin, their heads, released weights in and out."""
