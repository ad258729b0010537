"""LiteLLM, in the environment of ``make test-clients``."""

import json

import pytest

from tests.serving.clients.what import FORMAT, MESSAGES, TOOL, check_pet

litellm = pytest.importorskip("litellm", reason="runs by `make test-clients`")


@pytest.fixture
def ask(address):
    def ask(**options):
        options = {"model": "openai/tiny", "messages": MESSAGES, "max_tokens": 8} | options
        return litellm.completion(api_base=f"{address}/v1", api_key="any", num_retries=0, **options)

    return ask


def test_answers_streams_and_log_probabilities(ask):
    answer = ask(n=2, temperature=0, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens > 0
    assert len(answer.choices[0].logprobs["content"][0]["top_logprobs"]) == 2
    chunks = list(ask(temperature=0, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens / 2


def test_schemas_and_tools(ask, no_spaces):
    text = (
        ask(response_format=FORMAT, max_tokens=60, logit_bias=no_spaces).choices[0].message.content
    )
    check_pet(json.loads(text))
    options = dict(logit_bias=no_spaces, tools=[TOOL], tool_choice="required", max_tokens=100)
    answer = ask(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    check_pet(json.loads(answer.message.tool_calls[0].function.arguments))
    arguments = "".join(
        call.function.arguments or ""
        for chunk in ask(stream=True, **options)
        for call in chunk.choices[0].delta.tool_calls or ()
    )
    check_pet(json.loads(arguments))


def test_errors_keep_their_kind(ask):
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        ask(model="openai/other")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=3)
    with pytest.raises(litellm.ContextWindowExceededError, match="context"):
        ask(max_tokens=100_000)
