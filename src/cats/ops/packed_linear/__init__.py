"""The operator ``cats::packed_linear``: a linear layer over packed rows of codes."""
