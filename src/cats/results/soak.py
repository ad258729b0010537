"""Records of a server that answered many requests (``python -m tests.serving.soak``)."""

from typing import Literal

from cats.results.result import Found, FoundCount, Result


class ServerMemory(Result):
    """Memory that a request leaves behind: the slope of a line through the server's memory.

    ``low`` and ``high`` are the slopes of the first and the second half after the warm-up.

    Attributes:
        model: What was served.
        requests: How many requests were sent, of all kinds.
        clients: How many at a time.
        left: How many answers their clients left.
        wrong: How many requests had to be refused.
        seconds: Of all requests.
        first_mib: Memory after the warm-up, the first fifth of the requests.
        last_mib: Memory at the end.
    """

    benchmark: Literal["serve_soak"] = "serve_soak"
    quantity: Literal["memory_growth"] = "memory_growth"
    unit: Literal["KiB/request"] = "KiB/request"
    model: str
    requests: int
    clients: int
    left: FoundCount
    wrong: FoundCount
    seconds: Found
    first_mib: Found
    last_mib: Found
