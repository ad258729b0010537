"""Generate tokens with vLLM, for tests: jobs as JSON on the input, answers after ``ANSWERS``.

A job has ``options`` (of ``vllm.LLM``), ``prompts`` (ids) and ``adapter`` (a folder or null). Its
answer has ``tokens``, ``cached`` (how many tokens of each prompt came from the cache), ``mlps``
(class of each MLP) and ``model`` (module of the model's class), or ``error``.
"""

import gc
import json
import os
import sys
import traceback
from collections import Counter

TOKENS = 24


def describe(model):
    types = Counter(type(m).__name__ for n, m in model.named_modules() if n.endswith(".mlp"))
    return {"mlps": types, "model": type(model).__module__}


def answer(job):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    llm = LLM(**options | job["options"])
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    adapter = job.get("adapter")
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(prompts, sampling, lora_request=request)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }
    # a function goes to no other process
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        found |= llm.apply_model(describe)[0]
    return found


def main():
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = []
    for job in json.load(sys.stdin):
        try:
            answers.append(answer(job))
        except Exception as error:
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    print("\nANSWERS " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
