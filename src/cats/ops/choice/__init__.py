"""The likeliest token of one row of logits, on CUDA alone: the last launch of a token."""
