"""The attention of one token, on CUDA alone: rotation, cache and attention in one launch."""
