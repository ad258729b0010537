"""``/v1/responses`` as a client sees it."""

import json

import pytest

from tests.serving.test_chat import ask as ask_chat


def body(**changes):
    asked = dict(model="tiny", input="Hello", max_output_tokens=8, temperature=0)
    return asked | changes


def ask(client, **changes):
    response = client.post("/v1/responses", json=body(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def events(client, **changes):
    with client.stream("POST", "/v1/responses", json=body(stream=True, **changes)) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    found = []
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        found.append(json.loads(data.removeprefix("data: ")))
        assert found[-1]["type"] == name.removeprefix("event: ")
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def text_of(response):
    [item] = response["output"]
    return item["content"][0]["text"]


def test_a_response_is_the_answer_of_a_chat(client):
    response = ask(client)
    chat = ask_chat(client)
    assert text_of(response) == chat["choices"][0]["message"]["content"]
    assert response["object"] == "response"
    assert (response["status"], response["store"]) == ("incomplete", False)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["output_tokens"] == 8
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_instructions_and_messages_make_the_prompt(client):
    messages = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {
            "type": "message",
            "id": "msg-1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "Again"},
    ]
    response = ask(client, input=messages, instructions="Be short.")
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Again"},
    ]
    assert text_of(response) == ask_chat(client, messages=chat)["choices"][0]["message"]["content"]


def test_a_stream_has_the_events_of_a_response(client):
    found = events(client)
    names = [event["type"].removeprefix("response.") for event in found]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    whole = ask(client)
    text = "".join(event["delta"] for event in found if event["type"].endswith("text.delta"))
    assert text == text_of(whole) == text_of(found[-1]["response"])
    assert found[-1]["response"]["usage"] == whole["usage"]


def test_a_schema_decides_about_the_text(client):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema["additionalProperties"] = False
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    response = ask(client, text=text, max_output_tokens=100, temperature=1)
    assert json.loads(text_of(response)) == {"a": 1}
    assert response["status"] == "completed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(previous_response_id="resp-1"), "previous_response_id is not supported"),
        (dict(store=True), "keeps no answers"),
        (dict(tools=[{"type": "function"}]), "tools is not supported"),
        (dict(input=[]), "input"),
        (dict(temperatur=1), "Unrecognized request argument supplied: temperatur"),
        (dict(input="x" * 500), "context length is 400 tokens"),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, changes, words):
    response = client.post("/v1/responses", json=body(**changes))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
