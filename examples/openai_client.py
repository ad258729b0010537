"""Ask a server of OpenAI's interface: the same program for ``cats serve`` and ``vllm serve``.

    pip install openai
    python examples/openai_client.py http://127.0.0.1:8000/v1 "What is a cat?"

It lists the models, asks the first one by chat (whole and streamed) and continues a text. Answers
are greedy, so that two servers of one checkpoint can be compared.
"""

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="address of the server, with /v1 at its end")
    parser.add_argument("question", nargs="?", default="What is a cat?")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = options.model or next(iter(client.models.list())).id
    print(f"model: {os.path.basename(model)}")

    messages = [{"role": "user", "content": options.question}]
    request = {"model": model, "max_tokens": options.tokens, "temperature": 0}
    answer = client.chat.completions.create(messages=messages, **request)
    print(f"chat: {answer.choices[0].message.content!r} ({answer.choices[0].finish_reason})")
    print(f"tokens: {answer.usage.prompt_tokens} in, {answer.usage.completion_tokens} out")

    pieces, usage = [], None
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **request
    )
    for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    print(f"streamed: {''.join(pieces)!r}, {usage.completion_tokens} tokens")

    completion = client.completions.create(prompt=options.question, seed=0, logprobs=1, **request)
    choice = completion.choices[0]
    print(f"completion: {choice.text!r}")
    print(f"log probability: {sum(choice.logprobs.token_logprobs):.3f}")


if __name__ == "__main__":
    main()
