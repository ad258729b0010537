"""The embedding of one token, on CUDA alone: the first launch of a token of the stream engine."""
