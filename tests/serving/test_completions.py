"""``/v1/completions`` as a client sees it."""

import json

import pytest


def body(**changes):
    return dict(model="tiny", prompt="A cat is", max_tokens=8, temperature=0) | changes


def ask(client, **changes):
    response = client.post("/v1/completions", json=body(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client, **changes):
    with client.stream("POST", "/v1/completions", json=body(stream=True, **changes)) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_has_the_form_of_openai(client):
    answer = ask(client)
    assert answer["object"] == "text_completion"
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == 8
    assert ask(client, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_a_stream_gives_the_same_text(client):
    parts = chunks(client, stream_options={"include_usage": True})
    text = "".join(choice["text"] for part in parts for choice in part["choices"])
    whole = ask(client)
    assert text == whole["choices"][0]["text"]
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert parts[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("form", ["text", "list", "ids", "list of ids"])
def test_a_prompt_may_be_text_or_ids(client, form):
    ids = client.post("/tokenize", json={"model": "tiny", "prompt": "A cat is"}).json()["tokens"]
    prompt = {"text": "A cat is", "list": ["A cat is"], "ids": ids, "list of ids": [ids]}[form]
    assert ask(client, prompt=prompt)["choices"] == ask(client)["choices"]


def test_the_text_goes_on_where_the_prompt_ends(client):
    # a token that begins with a space keeps it
    choice = ask(client, logit_bias={"220": 100}, max_tokens=3)["choices"][0]
    assert choice["text"] == "   "


def test_logprobs_have_the_older_form(client):
    whole = ask(client, logprobs=2)["choices"][0]["logprobs"]
    assert set(whole) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert [len(values) for values in whole.values()] == [8] * 4
    for token, value, top in zip(
        whole["tokens"], whole["token_logprobs"], whole["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values())
    assert whole["text_offset"][0] == 0
    streamed = [part["choices"][0]["logprobs"] for part in chunks(client, logprobs=2)]
    tokens = [token for found in streamed if found for token in found["tokens"]]
    assert tokens == whole["tokens"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(prompt=""), "prompt has no tokens"),
        (dict(prompt=[]), "no tokens"),
        (dict(prompt=["a", "b"]), "prompt"),
        (dict(prompt=[5000]), "below 259"),
        (dict(prompt=[-1]), "prompt"),
        (dict(echo=True), "echo is not supported"),
        (dict(suffix="x"), "suffix is not supported"),
        (dict(best_of=2), "ask for n answers"),
        (dict(logprobs=6), "less than or equal to 5"),
        (dict(messages=[]), "Unrecognized request argument supplied: messages"),
    ],
)
def test_what_cannot_be_right_is_refused(client, changes, words):
    response = client.post("/v1/completions", json=body(**changes))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
