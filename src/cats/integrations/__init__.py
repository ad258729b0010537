"""Other programs that run sparse models."""
