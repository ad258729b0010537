"""The official client of OpenAI's API."""

import json

import openai
import pytest

from tests.serving.clients.what import FORMAT, MESSAGES, TOOL, check_pet


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client, **options):
    options = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8} | options
    return client.chat.completions.create(**options)


def test_answers_have_choices_usage_and_log_probabilities(client):
    answer = ask(client, n=2, seed=1, temperature=1, logprobs=True, top_logprobs=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            assert token.logprob <= 0
    again = ask(client, n=2, seed=1, temperature=1)
    texts = [[choice.message.content for choice in each.choices] for each in (answer, again)]
    assert texts[0] == texts[1]


def test_a_stream_is_the_answer_in_pieces_and_ends_with_its_usage(client):
    whole = ask(client, temperature=0)
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_that_is_closed_frees_its_place(client, address):
    with ask(client, stream=True, max_completion_tokens=150) as stream:
        next(iter(stream))
    # a server without a place would refuse or wait
    for _ in range(5):
        ask(client, max_completion_tokens=1)


def test_text_follows_a_schema(client, no_spaces):
    answer = ask(client, response_format=FORMAT, max_completion_tokens=60, logit_bias=no_spaces)
    check_pet(json.loads(answer.choices[0].message.content))


def test_a_schema_of_a_class_comes_back_as_an_object(client, no_spaces):
    pydantic = pytest.importorskip("pydantic")

    class Pet(pydantic.BaseModel):
        is_tame: bool

    options = dict(model="tiny", messages=MESSAGES, logit_bias=no_spaces)
    answer = client.chat.completions.parse(response_format=Pet, max_tokens=60, **options)
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_a_tool_is_called_and_its_result_is_taken(client, no_spaces):
    options = dict(
        logit_bias=no_spaces, tools=[TOOL], tool_choice="required", max_completion_tokens=100
    )
    answer = ask(client, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    assert call.function.name == "feed"
    check_pet(json.loads(call.function.arguments))
    result = {"role": "tool", "tool_call_id": call.id, "content": "fed"}
    after = ask(client, messages=[*MESSAGES, answer.message, result], tools=[TOOL])
    assert after.usage.prompt_tokens > 0


def test_a_call_of_a_tool_is_streamed(client, no_spaces):
    choice = {"type": "function", "function": {"name": "feed"}}
    options = dict(
        logit_bias=no_spaces, tools=[TOOL], tool_choice=choice, max_completion_tokens=100
    )
    name, arguments, reasons = "", "", set()
    for chunk in ask(client, stream=True, **options):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reasons.add(chunk.choices[0].finish_reason)
    assert name == "feed"
    check_pet(json.loads(arguments))
    assert reasons == {None, "stop"} or reasons == {None, "tool_calls"}


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        ask(client, model="other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        ask(client, max_completion_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not_a_field"):
        ask(client, extra_body={"not_a_field": 1})


def test_models_completions_and_responses(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:dense"]
    assert client.models.retrieve("tiny:dense").id == "tiny:dense"
    text = client.completions.create(
        model="tiny", prompt="A cat", max_tokens=4, temperature=0, logprobs=1
    )
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens == 4
    response = client.responses.create(model="tiny", input="Hi", max_output_tokens=16)
    assert response.status in ("completed", "incomplete")
    events = list(
        client.responses.create(model="tiny", input="Hi", max_output_tokens=16, stream=True)
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
