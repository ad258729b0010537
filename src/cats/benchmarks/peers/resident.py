"""How much memory a GGUF file takes in our decode loop: a process of its own, which prints JSON.

``python resident.py FILE DTYPE ENGINE '{"ids": [...], "threads": N}'``
"""

from __future__ import annotations

import json
import sys

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # libraries are not what is measured

from cats.benchmarks.peers.worker import resident
from cats.checkpoint import load_dense
from cats.decode import Decoder


def main() -> None:
    path, dtype, engine, question = sys.argv[1:]
    asked = json.loads(question)
    torch.set_num_threads(asked["threads"])
    before = resident()
    decoder = Decoder(load_dense(path, dtype=getattr(torch, dtype)), engine=engine)
    decoder.generate(
        torch.tensor([asked["ids"]]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    print(json.dumps({"resident": resident() - before, "engine": decoder.engine}))


if __name__ == "__main__":
    main()
