"""The server around the answers: access, limits, places, disconnects, the end."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest

from cats.errors import ConfigError
from cats.serving.log import JsonFormatter
from cats.serving.settings import Settings
from tests.serving.live import make_chat_model, make_chat_tokenizer, make_models, serving

CHAT = "/v1/chat/completions"
ENDLESS = dict(
    model="tiny",
    messages=[{"role": "user", "content": "Hello"}],
    ignore_eos=True,
    stream=True,
    temperature=0,
)


@pytest.fixture(scope="module")
def guarded():
    """A server with keys, small limits and one place."""
    models = make_models(make_slow_model(), rows=1, queue=1)
    with serving(
        models, api_keys=("first-key", "second-key"), max_body=2000, read_timeout=0.4
    ) as address:
        yield address


def raw(address, data, *, shut=False, timeout=5):
    """What a server sends back for some bytes, until it closes the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=timeout) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)


def metric(address, name, headers=None):
    """The sum of all numbers of a metric."""
    lines = httpx.get(f"{address}/metrics", headers=headers).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# --- other routes


def test_models_say_what_they_are(client):
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "tiny:dense"]
    assert [model["max_model_len"] for model in listed] == [400, 400]
    assert listed[0]["cats"] == {
        "sparse": True,
        "rows": 4,
        "context": 400,
        "method": "cats",
        "target_sparsity": 0.5,
    }
    assert listed[1]["cats"] == {"sparse": False, "rows": 2, "context": 400}
    assert client.get("/v1/models/tiny:dense").json() == listed[1]
    assert client.get("/v1/models/cow").status_code == 404


def test_texts_and_messages_are_tokenised(client):
    text = client.post("/tokenize", json={"model": "tiny", "prompt": "Hi"}).json()
    assert text["count"] == len(text["tokens"]) == 2
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.post(
        "/tokenize", json={"model": "tiny", "messages": messages, "return_token_strs": True}
    ).json()
    assert chat["token_strs"][0] == "<|im_start|>"
    used = client.post(CHAT, json={"model": "tiny", "messages": messages, "max_tokens": 1}).json()[
        "usage"
    ]
    assert used["prompt_tokens"] == chat["count"]
    assert client.post("/tokenize", json={"model": "tiny"}).status_code == 400


def test_the_server_is_healthy(client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_metrics_count_tokens_and_requests(client, address):
    before = metric(address, 'cats_new_tokens_total{model="tiny"}')
    asked = dict(model="tiny", prompt="Hello", max_tokens=7, ignore_eos=True)
    client.post("/v1/completions", json=asked).raise_for_status()
    assert metric(address, 'cats_new_tokens_total{model="tiny"}') == before + 7
    client.get("/a/path/that/is/no/route")
    text = client.get("/metrics").text
    assert 'route="other",status="404"' in text
    assert "a/path" not in text
    assert 'cats_time_to_first_token_seconds_bucket{le="0.01",model="tiny"}' in text


# --- access


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/tokenize", CHAT, "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer"},
        {"Authorization": "first-key"},
        {"Authorization": "Basic first-key"},
    ],
    ids=["none", "other", "shorter", "empty", "bare", "basic"],
)
def test_without_a_key_nobody_gets_in(guarded, path, headers):
    response = httpx.get(guarded + path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_each_key_lets_in_and_the_health_needs_none(guarded):
    for key in ("first-key", "second-key"):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{guarded}/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:99", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
    ],
)
def test_a_local_server_answers_under_local_names_only(address, host, status):
    response = httpx.get(f"{address}/v1/models", headers={"Host": host})
    assert response.status_code == status


def test_answers_let_no_other_page_read_them(client):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for response in (client.options(CHAT, headers=headers), client.get("/health", headers=headers)):
        assert not any("access-control" in name for name in response.headers)


def test_settings_that_cannot_be_right_are_refused():
    for wrong in (dict(port=70_000), dict(queue=-1), dict(max_body=0), dict(api_keys=("",))):
        with pytest.raises(ConfigError):
            Settings(**wrong)
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "0.0.0.0": False, "box": False}
    assert {host: Settings(host=host).is_local for host in hosts} == hosts


# --- limits

KEY = {"Authorization": "Bearer first-key"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"


def test_a_body_that_is_too_large_is_refused_whatever_its_headers_say(guarded):
    response = httpx.post(f"{guarded}/v1/completions", headers=KEY, content=b"x" * 3000)
    assert response.status_code == 413
    assert "larger than 2000 bytes" in response.json()["error"]["message"]
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    chunked += 2 * (b"3e8\r\n" + b"x" * 1000 + b"\r\n") + b"0\r\n\r\n"
    assert raw(guarded, POST + chunked).startswith(b"HTTP/1.1 413")
    claimed = b"Content-Length: 999999999999\r\n\r\n"
    assert raw(guarded, POST + claimed).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""], ids=["whole", "part"])
def test_headers_that_are_too_large_are_refused(guarded, end):
    received = raw(guarded, POST + b"X-Cat: " + b"x" * 100_000 + end)
    assert received.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == (
        "invalid_request_error"
    )


def test_what_is_no_http_gets_an_error_of_the_same_form(guarded):
    received = raw(guarded, b"cats are better\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 400")
    assert b'"error"' in received


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/completions HT", POST, POST + b"Content-Length: 100\r\n\r\n{"],
    ids=["nothing", "line", "headers", "body"],
)
def test_a_client_that_does_not_go_on_is_not_waited_for(guarded, data):
    start = time.monotonic()
    received = raw(guarded, data)
    assert 0.3 < time.monotonic() - start < 4
    assert received == b"" or received.startswith(b"HTTP/1.1 408")
    assert (b"408" in received) == data.endswith(b"{")


# --- places


def test_answers_wait_in_the_queue_and_beyond_it_get_429(guarded):
    with httpx.Client(base_url=guarded, headers=KEY, timeout=30) as client:
        with client.stream("POST", CHAT, json=ENDLESS) as first:
            lines = first.iter_lines()
            next(lines)
            waiting = threading.Thread(
                target=client.post, args=(CHAT,), kwargs={"json": ENDLESS | {"max_tokens": 1}}
            )
            waiting.start()
            wait_for(lambda: metric(guarded, "cats_open_answers", KEY) == 2)
            refused = client.post(CHAT, json=ENDLESS)
        waiting.join(10)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        wait_for(lambda: metric(guarded, "cats_open_answers", KEY) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(guarded, stream):
    place = urlsplit(guarded)
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    before = metric(guarded, 'cats_answers_total{model="tiny",reason="left"}', KEY)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(POST.replace(b"/v1/completions", CHAT.encode()) + length + body)
        wait_for(lambda: metric(guarded, "cats_open_answers", KEY) == 1)
    wait_for(lambda: metric(guarded, "cats_open_answers", KEY) == 0)
    assert metric(guarded, 'cats_answers_total{model="tiny",reason="left"}', KEY) == before + 1
    # the engine has a free row again
    answer = httpx.post(
        guarded + CHAT, headers=KEY, json=ENDLESS | dict(stream=False, max_tokens=2)
    )
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_many_streams_at_once_get_their_own_answers(address):
    def ask(i, found):
        with httpx.Client(base_url=address, timeout=60) as client:
            asked = dict(model="tiny", prompt=f"cat {i}", max_tokens=12, ignore_eos=True)
            found[i] = client.post("/v1/completions", json=asked | {"temperature": 0}).json()

    alone, together = {}, {}
    for i in range(10):
        ask(i, alone)
    threads = [threading.Thread(target=ask, args=(i, together)) for i in range(10)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i in range(10):
        assert together[i]["choices"] == alone[i]["choices"]


def test_an_answer_that_takes_too_long_ends_with_an_error():
    with serving(make_models(dense_rows=0), request_timeout=0.01) as address:
        whole = httpx.post(address + CHAT, json=ENDLESS | {"stream": False}, timeout=30)
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "timeout"
        wait_for(lambda: metric(address, "cats_open_answers") == 0)


def test_an_engine_that_fails_is_not_healthy():
    models = make_models(dense_rows=0)
    with serving(models) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        models.get("tiny").sessions.close()
        assert httpx.get(f"{address}/health").status_code == 503


# --- the end


def test_a_server_that_is_stopped_lets_running_answers_end():
    models = make_models(dense_rows=0)
    lines = []
    with serving(models) as address:
        started = threading.Event()

        def read():
            with httpx.stream("POST", address + CHAT, json=ENDLESS, timeout=30) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(10)
    reader.join(10)
    assert lines[-2] == "data: [DONE]"
    assert '"finish_reason":"length"' in lines[-4]


def test_answers_that_take_too_long_to_end_get_an_error():
    models = make_models(make_slow_model(), dense_rows=0)
    lines = []
    with serving(models, shutdown_timeout=0.2) as address:
        started = threading.Event()

        def read():
            with httpx.stream("POST", address + CHAT, json=ENDLESS, timeout=30) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(20)
    reader.join(10)
    error = json.loads(lines[-4].removeprefix("data: "))["error"]
    assert error["code"] == "server_shutting_down"
    assert lines[-2] == "data: [DONE]"


def make_slow_model():
    """A model whose steps take so long that its answers do not end during a test."""
    model = make_chat_model()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    return model


def test_the_command_serves_a_folder_and_ends_on_a_signal(tmp_path):
    make_chat_model().save_pretrained(tmp_path)
    make_chat_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "cats", "serve", str(tmp_path), "--name", "folder"]
    command += ["--port", "0", "--log-json", "--rows", "2", "--device", "cpu"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"CATS_API_KEY": "k"}
    ) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "OpenAI clients at" in line:
                    break
            address = line.split()[2].rstrip("/,")
            asked = dict(model="folder", prompt="Hi", max_tokens=3, ignore_eos=True)
            for _ in range(100):
                try:
                    answer = httpx.post(
                        f"{address}/v1/completions",
                        json=asked,
                        headers={"Authorization": "Bearer k"},
                    )
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            assert answer.json()["usage"]["completion_tokens"] == 3
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "folder: dense, context 512 tokens, 2 answers at a time\n" in said
    entries = [json.loads(line) for line in rest.splitlines()]
    [request] = [entry for entry in entries if entry.get("event") == "request"]
    assert (request["path"], request["status"]) == ("/v1/completions", 200)
    assert (request["new_tokens"], request["finish"]) == (3, "length")
    assert "Hi" not in rest


def test_a_log_entry_is_one_line_of_json():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "failed: %s", ("a\nb",), sys.exc_info()
        )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert json.loads(text)["message"] == "failed: a\nb"
