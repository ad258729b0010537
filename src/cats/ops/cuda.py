from torch import Tensor


def unavailable() -> str | None:
    return "not written yet"
