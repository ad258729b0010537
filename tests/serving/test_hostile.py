"""Malformed, huge and hostile requests: never a status of 500, always OpenAI's form of errors."""

import json
import math
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.live import make_models, serving
from tests.serving.scripted import make_scripted

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "Hi:", "max_tokens": 2}
RESPONSE = {"model": "tiny", "input": "Hi", "max_output_tokens": 2}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/tokenize": {"model": "tiny", "prompt": "Hi"},
}
# Fields whose values are worth trying, some of them unknown to this server.
NAMES = """
    model messages prompt input n stream stream_options max_tokens max_completion_tokens
    max_output_tokens temperature top_p top_k min_p repetition_penalty presence_penalty
    frequency_penalty logit_bias seed stop stop_token_ids min_tokens ignore_eos response_format
    logprobs top_logprobs tools tool_choice parallel_tool_calls add_generation_prompt
    continue_final_message chat_template_kwargs user metadata service_tier echo suffix best_of
    functions audio instructions text store previous_response_id tokens unheard_of
"""


@pytest.fixture(scope="module")
def client():
    models = make_models(*make_scripted("Hello there, hostile world."), context=1024)
    with (
        serving(models, read_timeout=1, max_body=100_000) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client


def check(response):
    """That an answer is right, or an error in OpenAI's form which is the client's fault."""
    assert response.status_code < 500, response.text
    if response.status_code == 200:
        if "event-stream" in response.headers["content-type"]:
            assert response.text.endswith("\n\n")
            events = [e for e in response.text.split("\n\n")[:-1] if not e.startswith(":")]
            data = [line[6:] for e in events for line in e.split("\n") if line.startswith("data: ")]
            for event in data:
                assert event == "[DONE]" or "error" not in json.loads(event), event
        else:
            assert "error" not in response.json() or response.json()["error"] is None
        return
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert 0 < len(body["error"]["message"]) < 2000
    assert isinstance(body["error"]["type"], str)


names = st.sampled_from(NAMES.split())
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
odd_numbers = st.sampled_from(
    [-1, 0, 1, 2, 21, 129, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**400]
)
texts = st.text(max_size=20) | st.sampled_from(["", "\0", "<eos>", "{{ 7 * 7 }}", "../..", "tiny"])
leaves = st.none() | st.booleans() | numbers | odd_numbers | texts
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names | st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "system", "assistant", "tool", "developer", "", "root"])
contents = texts | st.none() | st.just([{"type": "text", "text": "x"}]) | values
messages = st.fixed_dictionaries(
    {"role": roles, "content": contents},
    optional={"name": texts, "tool_calls": values, "tool_call_id": texts},
)
schemas = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?<=a)b"},
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "#/$defs/missing"},
        {"type": "nothing"},
        {"enum": []},
        {"type": "object", "minProperties": 10**9},
        {"type": "string", "minLength": 10**12},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"not": {}},
        True,
        False,
    ]
)
formats = st.fixed_dictionaries(
    {
        "type": st.just("json_schema"),
        "json_schema": st.fixed_dictionaries({"name": st.just("s"), "schema": schemas | values}),
    }
)
functions = st.fixed_dictionaries(
    {"name": texts | st.just("f")}, optional={"parameters": schemas | values, "description": texts}
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=2
)
changes = st.dictionaries(names, values, max_size=3) | st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(messages, max_size=3),
        "response_format": formats,
        "tools": tools,
        "tool_choice": st.sampled_from(
            ["auto", "required", "none", {"type": "function", "function": {"name": "f"}}]
        ),
        "stream": st.booleans(),
        "n": odd_numbers,
        "temperature": odd_numbers,
        "logit_bias": st.dictionaries(st.text(max_size=3) | st.just("0"), numbers, max_size=2),
        "stop": st.lists(texts, max_size=3),
    },
)


def sent(client, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=data, headers={"Content-Type": "application/json"})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(list(BODIES)), change=changes)
def test_any_value_of_any_field_is_answered_or_refused(client, path, change):
    check(sent(client, path, BODIES[path] | change))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(list(BODIES)), body=st.binary(max_size=60) | values)
def test_any_body_is_refused(client, path, body):
    response = sent(client, path, body)
    check(response)
    assert response.status_code in (400, 422)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "\xff\xfe", "max_tokens": 2}',
        b'{"a":' * 20_000,
        b"[" * 50_000,
        b'{"model": "tiny", "prompt": "Hi", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "Hi", "max_tokens": 1e999}',
        b'{"model": "tiny", "prompt": "Hi", "max_tokens": ' + b"9" * 5_000 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        json.dumps(COMPLETION | {"prompt": ["x"] * 3_000}).encode(),
        json.dumps(COMPLETION | {"prompt": [10**30]}).encode(),
        json.dumps(COMPLETION | {"prompt": [-1]}).encode(),
        json.dumps(COMPLETION | {"stop": ["x"] * 1000}).encode(),
        json.dumps(COMPLETION | {"n": 128, "max_tokens": 10**9}).encode(),
        json.dumps(COMPLETION | {"prompt": "x" * 99_000}).encode(),
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_bodies_that_break_parsers_are_refused(client, body):
    response = sent(client, "/v1/completions", body)
    check(response)
    assert response.status_code == 400


def test_half_of_a_surrogate_pair_is_answered_or_refused(client):
    for path in BODIES:
        check(sent(client, path, json.dumps(BODIES[path]).replace("Hi", "\\ud800").encode()))


def test_a_body_beyond_the_limit_is_refused_whatever_it_says_of_its_length(client):
    big = b"x" * 100_001
    assert sent(client, "/v1/completions", big).status_code == 413
    response = client.post("/v1/completions", content=iter([big[:60_000], big[60_000:]]))
    assert response.status_code == 413
    check(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/" + "x" * 5_000, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/page/index.html", 404),
        ("OPTIONS", "/v1/chat/completions", 405),
    ],
    ids=lambda part: str(part)[:24],
)
def test_other_paths_and_methods_are_refused_in_the_same_form(client, method, path, status):
    response = client.request(method, path)
    check(response)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def raw(client, data, *, timeout=10):
    """All that the server sends after bytes that may be no HTTP."""
    address = client.base_url
    with socket.create_connection((address.host, address.port), timeout) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: -5\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (HEAD + b"X: " + b"a" * 40_000 + b"\r\n\r\n", b"431"),
        (HEAD + b"Content-Length: 999999999999999999\r\n\r\n", b"413"),
        (HEAD + b"Content-Length: 50\r\n\r\n{}", b"408"),
        (HEAD.replace(b"localhost", b"evil.example") + b"Content-Length: 2\r\n\r\n{}", b"403"),
        (b"POST /v1/completions HTTP/1.1\r\n", b""),
    ],
    ids=[
        "TLS",
        "0.9",
        "negative",
        "two lengths",
        "chunks",
        "headers",
        "length",
        "slow",
        "host",
        "half",
    ],
)
def test_bytes_that_are_no_request_are_refused(client, data, status):
    answer = raw(client, data)
    if status == b"":
        assert answer == b"", "headers that do not come end with the connection"
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == status
    assert json.loads(body)["error"]["message"]


def test_the_server_still_answers_and_counts_no_open_answer(client):
    response = sent(client, "/v1/chat/completions", CHAT | {"max_tokens": 50})
    assert response.json()["choices"][0]["message"]["content"] == "Hello there, hostile world."
    metrics = client.get("/metrics").text
    assert 'cats_open_answers{model="tiny"} 0.0' in metrics
    assert not math.isnan(response.json()["usage"]["total_tokens"])
