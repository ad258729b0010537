"""What goes wrong is said plainly, and the conversation goes on."""

import json

import pytest
from playwright.sync_api import expect

from tests.serving.browser.test_chat import ask
from tests.serving.live import make_models, serving
from tests.serving.scripted import make_scripted


@pytest.fixture(scope="module")
def locked():
    with serving(make_models(*make_scripted("Hello there.")), api_keys=("right",)) as address:
        yield address


def test_a_key_is_asked_for_and_used(open_page, locked):
    page = open_page(locked)
    field = page.get_by_label("This server asks for an API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_contain_text("key")
    field.fill("right")
    page.keyboard.press("Enter")
    expect(field).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()
    ask(page)
    expect(page.locator("li.assistant .text")).to_have_text("Hello there.")


def answer_with(page, body, **reply):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, **reply))


def error(message):
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})


def test_a_full_server_says_when_to_try_again_and_trying_again_works(open_page, server):
    page = open_page(server)
    answer_with(page, error("all places are taken"), status=429, headers={"Retry-After": "7"})
    ask(page, wait=False)
    alert = page.locator("li .error")
    expect(alert).to_contain_text("Error: all places are taken. Try again in 7 s.")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert alert.count() == 0
    assert page.locator("li").count() == 2


def test_a_question_without_an_answer_is_left_out_of_the_next_request(open_page, server):
    page = open_page(server)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Lost?", wait=False)
    expect(page.locator("li .error")).to_contain_text("The server does not answer.")
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Found?")
    assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["Found?"]
    expect(page.locator("li.left-out").last).to_contain_text("Left out of the conversation.")


@pytest.mark.parametrize("end", [f"data: {error('out of memory')}\n\ndata: [DONE]\n\n", ""])
def test_an_error_in_mid_stream_keeps_what_came(open_page, server, end):
    page = open_page(server)
    begun = 'data: {"choices":[{"delta":{"content":"Half an ans"}}]}\r\n\r\n'
    answer_with(page, begun + end, headers={"Content-Type": "text/event-stream"})
    ask(page, wait=False)
    message = "out of memory" if end else "The connection ended before the answer was whole."
    expect(page.locator("li .error")).to_contain_text(message)
    expect(page.locator("li.assistant .text")).to_have_text("Half an ans")
    expect(page.get_by_role("status")).to_have_text(f"Error: {message}")


def test_a_prompt_beyond_the_context_is_refused_with_the_servers_words(open_page, server):
    page = open_page(server)
    ask(page, "long " * 400, wait=False)
    expect(page.locator("li .error")).to_contain_text("maximum context length is 1024 tokens")


def test_wrong_settings_are_shown_instead_of_sent(open_page, server):
    page = open_page(server, width=375, height=667)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Temperature").fill("9")
    page.get_by_text("Settings", exact=True).click()
    ask(page, wait=False)
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert page.locator("li").count() == 0


def test_a_server_that_cannot_be_reached_is_asked_again(open_page, server):
    page = open_page(server)
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert").first).to_contain_text("Is it still running?")
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#model")).to_have_text("tiny")
