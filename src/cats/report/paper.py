"""What the paper reports (arXiv:2404.08763), to stand beside what is measured here."""

# Mean zero-shot accuracy of the eight tasks, without fine-tuning.
MEAN_ACCURACY = {
    "Mistral-7B": {"dense": 0.6994, "cats-50": 0.6890, "cats-90": 0.4368, "relu": 0.3230},
    "Llama-2-7B": {"dense": 0.6589, "cats-50": 0.6433, "cats-90": 0.4764, "relu": 0.3525},
}
# Times the dense speed in float32 at 50 %.
SPEED = {
    "MLP": "1.47x",
    "one token, end to end, Mistral-7B": "1.21x",
    "one token, end to end, Llama-2-7B": "1.18x",
}
