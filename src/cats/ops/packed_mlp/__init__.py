"""The operator ``cats::packed_gated_mlp``: a gated MLP over packed rows and columns of codes."""
