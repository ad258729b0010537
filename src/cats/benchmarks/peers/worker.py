"""llama.cpp in a process of its own, through the package ``cyllama``: one JSON line per question.

It imports nothing of cats: it runs in whatever interpreter has the package. The command is
``python worker.py FILE THREADS CONTEXT``. A line ``{"ids": [...], "new_tokens": N}`` is answered by
``{"times": [...], "tokens": [...]}``: when each new token was there, in seconds after the start.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    path, threads, context_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    out = sys.stdout
    # the library prints; answers go where they are expected
    sys.stdout = sys.stderr
    import cyllama.llama.llama_cpp as library  # type: ignore[import-not-found,unused-ignore]

    before = resident()
    library.disable_logging()
    library.ggml_backend_load_all()
    options = library.LlamaModelParams()
    options.n_gpu_layers = 0
    model = library.LlamaModel(path, options)
    settings = library.LlamaContextParams()
    settings.n_ctx = context_size
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = library.LlamaContext(model, settings)
    sampler = library.LlamaSampler()
    sampler.add_greedy()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        ids, count = question["ids"], question["new_tokens"]
        times, tokens = [], []
        context.kv_cache_clear()
        start = time.perf_counter()
        for first in range(0, len(ids), 512):
            context.decode(library.llama_batch_get_one(ids[first : first + 512], first))
        for position in range(len(ids), len(ids) + count):
            token = sampler.sample(context, -1)
            tokens.append(token)
            times.append(time.perf_counter() - start)
            if len(tokens) < count:
                context.decode(library.llama_batch_get_one([token], position))
        return {"times": times, "tokens": tokens, "resident": resident() - before}

    print(json.dumps({"release": metadata.version("cyllama")}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
