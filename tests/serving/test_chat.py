"""``/v1/chat/completions`` as a client sees it."""

import json

import httpx
import pytest

HELLO = [{"role": "user", "content": "Hello"}]


def body(**changes):
    # the tiny model seldom ends by itself
    return dict(model="tiny", messages=HELLO, max_tokens=8, temperature=0) | changes


def ask(client, **changes):
    response = client.post("/v1/chat/completions", json=body(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client, **changes):
    """The JSON documents of a stream, which ends with ``[DONE]``."""
    with client.stream("POST", "/v1/chat/completions", json=body(stream=True, **changes)) as r:
        assert r.status_code == 200
        assert r.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in r.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks, index=0):
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def refusal(client, status=400, **changes):
    response = client.post("/v1/chat/completions", json=body(**changes))
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_an_answer_has_the_form_of_openai(client):
    answer = ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_stream_gives_the_text_of_the_whole_answer(client):
    whole = ask(client)["choices"][0]["message"]["content"]
    parts = chunks(client)
    assert text_of(parts) == whole
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1


def test_usage_comes_in_a_last_chunk_without_choices(client):
    parts = chunks(client, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts[:-1])
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == ask(client)["usage"]


def test_a_repeated_prompt_is_found_in_the_cache(client):
    messages = [{"role": "user", "content": "A text that no other test sends. " * 3}]
    first, second = (ask(client, messages=messages)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 40
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1


def test_the_same_seed_draws_the_same_answers(client):
    drawn = dict(temperature=1, seed=3, n=2)
    first, second = (
        [choice["message"]["content"] for choice in ask(client, **drawn)["choices"]]
        for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]
    assert ask(client, temperature=1, seed=4)["choices"][0]["message"]["content"] == first[1]
    parts = chunks(client, **drawn)
    assert [text_of(parts, i) for i in range(2)] == first


def test_a_stop_string_is_left_out(client):
    text = ask(client, max_tokens=30)["choices"][0]["message"]["content"]
    stop = text[4:6]
    cut = ask(client, max_tokens=30, stop=["never", stop])
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert text_of(chunks(client, max_tokens=30, stop=stop)) == text[: text.index(stop)]


def test_logprobs_agree_between_the_whole_answer_and_the_stream(client):
    asked = dict(logprobs=True, top_logprobs=2)
    content = ask(client, **asked)["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        # greedy: the token is the likeliest
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] < 0
    streamed = [
        entry
        for part in chunks(client, **asked)
        if part["choices"][0]["logprobs"]
        for entry in part["choices"][0]["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_a_large_presence_penalty_repeats_no_token(client):
    def tokens(**changes):
        answer = ask(client, max_tokens=60, logprobs=True, **changes)
        return [tuple(e["bytes"]) for e in answer["choices"][0]["logprobs"]["content"]]

    plain = tokens()
    assert len(set(plain)) < len(plain)
    assert len(set(tokens(presence_penalty=2, frequency_penalty=2))) > len(set(plain))


def test_a_bias_decides_about_a_token(client):
    forced = ask(client, logit_bias={"65": 100}, max_tokens=5, logprobs=True)
    content = forced["choices"][0]["logprobs"]["content"]
    assert len({entry["token"] for entry in content}) == 1
    token = client.post("/tokenize", json={"model": "tiny", "prompt": content[0]["token"]})
    assert token.json()["tokens"] == [65]


def test_an_end_token_ends_an_answer(client):
    ended = ask(client, logit_bias={"258": 100})
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["message"]["content"] == ""
    assert ended["usage"]["completion_tokens"] == 1
    assert ask(client, logit_bias={"258": 100}, ignore_eos=True)["usage"]["completion_tokens"] == 8
    assert ask(client, logit_bias={"258": 100}, min_tokens=3)["usage"]["completion_tokens"] == 4


def test_a_json_schema_decides_about_the_form_of_the_answer(client):
    schema = {
        "type": "object",
        "properties": {"cat": {"enum": ["tabby", "black"]}, "age": {"type": "integer"}},
        "required": ["cat", "age"],
        "additionalProperties": False,
    }
    asked = dict(
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        max_tokens=120,
        logit_bias={"13": -100},
        temperature=1,
        seed=5,
    )
    whole = ask(client, **asked)["choices"][0]
    assert whole["finish_reason"] == "stop", whole
    found = json.loads(whole["message"]["content"])
    assert found["cat"] in ("tabby", "black")
    assert isinstance(found["age"], int)
    assert text_of(chunks(client, **asked)) == whole["message"]["content"]


def test_a_meter_shows_speed_and_the_share_of_weights(client):
    asked = dict(max_tokens=24, stream_options={"include_meter": True})
    sparse = [part["meter"] for part in chunks(client, **asked) if "meter" in part]
    assert [meter["tokens"] for meter in sparse] == sorted(meter["tokens"] for meter in sparse)
    assert sparse[-1]["tokens"] == 24
    assert 0.1 < sparse[-1]["weights_read"] < 0.95
    assert sparse[-1]["tokens_per_second"] > 0
    dense = [p["meter"] for p in chunks(client, model="tiny:dense", **asked) if "meter" in p]
    assert {meter["weights_read"] for meter in dense} == {1}


def test_the_dense_model_gives_other_tokens_than_the_sparse_one(client):
    both = [
        ask(client, model=model, max_tokens=40)["choices"][0]["message"]["content"]
        for model in ("tiny", "tiny:dense")
    ]
    assert both[0] != both[1]


def test_messages_take_parts_and_the_developer_role(client):
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
    ]
    first, second = (ask(client, messages=messages)["choices"] for messages in (plain, parts))
    assert first == second


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        (dict(temperature=3), "temperature", "less than or equal to 2"),
        (dict(temperature="hot"), "temperature", "valid number"),
        (dict(tempratur=1), "tempratur", "Unrecognized request argument supplied: tempratur"),
        (dict(functions=[{}]), "functions", "functions is not supported by this server: use tools"),
        (dict(store=True), "store", "keeps no answers"),
        (dict(messages=[]), "messages", "at least 1 item"),
        (dict(messages=[{"role": "king", "content": "x"}]), "messages.0.role", "system"),
        (dict(messages=[{"role": "user"}]), "messages.0", "needs content"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages.0.content.str",
            "string",
        ),
        (dict(n=0), "n", "greater than or equal to 1"),
        (dict(n=13), "n", "13 answers were asked for, but this server holds 12"),
        (dict(max_tokens=4, max_completion_tokens=4), None, "cannot both be set"),
        (dict(stream_options={"include_usage": True}), None, "only allowed where stream is true"),
        (dict(top_logprobs=2), None, "needs logprobs"),
        (dict(logit_bias={"x": 1}), "logit_bias", "token ids as names"),
        (dict(logit_bias={"5000": 1}), "logit_bias", "below 259"),
        (dict(stop=""), "stop.constrained-str", "at least 1 character"),
        (dict(tool_choice="auto"), "tool_choice", "only allowed where tools are given"),
        (dict(min_tokens=9), "min_tokens", "at most the 8 new tokens"),
        (
            dict(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "cat"}},
                }
            ),
            "response_format",
            "no grammar can be made of it",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(client, changes, param, words):
    error = refusal(client, **changes)
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_values_that_ask_for_nothing_are_taken(client):
    asked = dict(store=False, modalities=["text"], reasoning_effort=None, user="me", metadata={})
    assert ask(client, **asked)["choices"] == ask(client)["choices"]


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(client):
    long = [{"role": "user", "content": "x" * 500}]
    error = refusal(client, messages=long, max_tokens=None)
    assert error["code"] == "context_length_exceeded"
    assert "context length is 400 tokens" in error["message"]
    assert refusal(client, max_tokens=399)["code"] == "context_length_exceeded"
    huge = [{"role": "user", "content": "x" * 300_000}]
    assert refusal(client, messages=huge)["code"] == "context_length_exceeded"


def test_without_a_limit_an_answer_may_fill_the_context(client):
    answer = ask(client, max_tokens=None, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 400
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_model_that_is_not_served_is_not_found(client):
    error = refusal(client, 404, model="gpt-4")
    assert error["code"] == "model_not_found"
    assert "tiny, tiny:dense" in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'"x"', b'{"a": 1e999}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "string", "infinite", "bytes", "deep"],
)
def test_a_body_that_is_no_request_gets_an_error_of_openais_form(client, content):
    response = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_lone_surrogate_is_refused(client):
    content = json.dumps(body(messages=[{"role": "user", "content": "\ud800"}]))
    response = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    response.json()


def test_unknown_routes_and_methods_get_the_same_form(client):
    assert client.get("/v1/cats").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").status_code == 405
    assert "does not take GET" in client.get("/v1/chat/completions").json()["error"]["message"]


def test_a_form_that_a_web_page_could_send_is_refused(client):
    response = client.post(
        "/v1/chat/completions",
        content=json.dumps(body()),
        headers={"content-type": "text/plain"},
    )
    assert response.status_code == 400


def test_an_error_in_mid_stream_is_an_event(address, monkeypatch):
    from cats.serving import chat

    def fail(self, piece):
        raise ValueError("secret")

    with httpx.Client(base_url=address, timeout=30) as client:
        monkeypatch.setattr(chat.ChatForm, "add", fail)
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
            assert response.status_code == 200
            lines = [line for line in response.iter_lines() if line]
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert lines[-1] == "data: [DONE]"
