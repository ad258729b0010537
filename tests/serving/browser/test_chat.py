"""Conversations on the page: texts, stops, other settings, dense and sparse."""

import re
import time

import pytest
from playwright.sync_api import expect

from tests.serving.browser.conftest import SCRIPT

SHOWN = re.sub(r"```html\n(.*)\n```\n", r"\1\n", SCRIPT).replace("`", "").replace("**", "")


@pytest.fixture
def page(open_page, server):
    return open_page(server)


@pytest.fixture
def requests(page):
    """The bodies of the requests for answers that the page has sent."""
    bodies = []

    def note(request):
        if request.method == "POST":
            bodies.append(request.post_data_json)

    page.on("request", note)
    return bodies


def ask(page, text="What?", *, wait=True):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    if wait:
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def answers(page):
    return page.locator("li.assistant .text")


def without_gaps(text):
    return re.sub(r"\s+", " ", text).strip()


def test_an_answer_is_shown_with_its_counts(page):
    ask(page)
    assert without_gaps(answers(page).inner_text()) == without_gaps(SHOWN)
    facts = page.locator(".facts span").inner_text()
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · \d\d % of weights read", facts)
    tokens = int(facts.split()[0])
    used = page.locator("#context").inner_text()
    assert re.fullmatch(r"\d+ of 1,024 tokens used", used)
    assert int(used.split()[0]) > tokens
    expect(page.get_by_role("status")).to_contain_text("Answer: Look:")


def test_text_of_a_model_is_never_markup(page):
    ask(page, "<b>mine</b>")
    assert page.title() == "tiny - CATS chat"
    assert page.locator(".text img, .text script").count() == 0
    assert page.locator("li.user .text").inner_text() == "<b>mine</b>"
    assert answers(page).locator("pre").inner_text().startswith("<b>a long line")
    assert answers(page).locator("b").all_inner_texts() == ["drop"]
    assert answers(page).locator("code:not(pre code)").all_inner_texts() == ["abs(x) < t"]


def test_the_page_reaches_no_other_address(open_page, server):
    page = open_page(server, complaints=["Content Security Policy", "TrustedHTML"])
    failed = "error => String(error)"
    other = f"fetch('http://localhost:1/').catch({failed})"
    assert "Failed to fetch" in page.evaluate(other)
    violation = "new Promise(done => addEventListener('securitypolicyviolation', "
    violation += "event => done(event.effectiveDirective)))"
    seen = page.evaluate(f"(() => {{ const seen = {violation}; {other}; return seen; }})()")
    assert seen == "connect-src"
    assert "TrustedHTML" in page.evaluate(
        f"(async () => {{ document.body.innerHTML = '<b>x</b>'; }})().catch({failed})"
    )


def test_settings_reach_the_server_and_a_seed_gives_the_same_request(page, requests):
    page.get_by_label("System prompt").fill("Be a cat.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed").fill("11")
    ask(page)
    expect(page.locator(".facts span")).to_contain_text("7 tokens")
    expect(page.locator(".facts span")).to_contain_text("ended at max tokens")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert answers(page).count() == 1
    first, second = requests
    assert first == second
    assert first["messages"] == [
        {"role": "system", "content": "Be a cat."},
        {"role": "user", "content": "What?"},
    ]
    assert (first["temperature"], first["max_completion_tokens"], first["seed"]) == (0.25, 7, 11)


def test_empty_fields_leave_the_choice_to_the_server(page, requests):
    page.get_by_label("Max tokens").fill("")
    ask(page)
    assert not requests[0].keys() & {"seed", "max_completion_tokens"}
    assert requests[0]["messages"] == [{"role": "user", "content": "What?"}]


def test_a_conversation_goes_on_and_a_new_chat_forgets_it(page, requests):
    ask(page)
    ask(page, "And?")
    assert [message["role"] for message in requests[1]["messages"]] == ["user", "assistant", "user"]
    assert requests[1]["messages"][1]["content"] == SCRIPT
    page.get_by_role("button", name="New chat").click()
    assert page.locator("li").count() == 0
    ask(page, "Again?")
    assert len(requests[2]["messages"]) == 1


def test_the_switch_chooses_the_model_and_the_charts_show_both(page, requests):
    ask(page)
    page.get_by_role("radio", name="Dense").check(force=True)
    ask(page, "And?")
    assert [body["model"] for body in requests] == ["tiny", "tiny:dense"]
    sparse, dense = (
        int(text.split()[0]) for text in page.locator("#compare td").all_inner_texts()[1::2]
    )
    assert sparse < dense == 100
    for chart in ("#speed-chart", "#read-chart"):
        assert page.locator(f"{chart} path.sparse").count() == 1
        assert page.locator(f"{chart} path.dense").count() == 1
        assert "dense" in page.locator(chart).get_attribute("aria-label")
    assert page.locator("#read-value").inner_text() == "100 %"


@pytest.mark.parametrize("by", ["Escape", "Stop"])
def test_a_stopped_answer_stays_and_its_place_is_free(open_page, endless, by):
    page = open_page(endless)
    expect(page.get_by_role("radio", name="Sparse")).to_be_disabled()
    page.get_by_label("Max tokens").fill("")
    ask(page, wait=False)
    expect(answers(page)).to_contain_text("for ever")
    if by == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".facts span")).to_contain_text("stopped")
    expect(page.get_by_label("Message")).to_be_focused()
    stopped = answers(page).inner_text()
    end = time.monotonic() + 10
    while (
        'cats_open_answers{model="tiny"} 0.0' not in page.request.get(f"{endless}/metrics").text()
    ):
        assert time.monotonic() < end, "the server still decodes"
    assert answers(page).inner_text() == stopped
