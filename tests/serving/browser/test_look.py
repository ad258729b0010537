"""Wide and narrow windows, light and dark, and the keyboard alone."""

import pytest
from playwright.sync_api import expect

from tests.serving.browser.test_chat import ask

# What an element needs to be seen: its box within the window, and nothing on top of it.
IS_SEEN = """element => {
  const box = element.getBoundingClientRect();
  const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight
    && element.contains(at);
}"""
# Contrast of text on its background, as WCAG defines it.
CONTRAST = """element => {
  const luminance = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const linear = (c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = parts.map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  let behind = element, background;
  do { background = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
  while (behind && background === "rgba(0, 0, 0, 0)");
  const both = [luminance(getComputedStyle(element).color), luminance(background)];
  return (Math.max(...both) + .05) / (Math.min(...both) + .05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 667)])
def test_all_is_in_the_window_and_readable(open_page, server, width, height, scheme):
    page = open_page(server, width=width, height=height, scheme=scheme)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.scrollHeight") == height
    for selector in (
        "h1",
        "#new",
        "label[for=dense]",
        "#speed-chart",
        "#read-value",
        "#prompt",
        "#send",
        ".facts .again",
    ):
        assert page.locator(selector).evaluate(IS_SEEN), selector
    # a wide line scrolls in its own block
    block = page.locator("pre")
    assert block.evaluate("e => e.getBoundingClientRect().right <= innerWidth")
    assert block.evaluate("e => e.scrollWidth > e.clientWidth") == (width == 375)
    for selector in (
        "h1",
        "#model",
        ".user .text",
        ".who",
        ".facts",
        "pre",
        "#send",
        ".switch :checked + label",
        ".note >> nth=0",
    ):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 27)")


def test_the_keyboard_alone_reaches_everything_in_the_order_of_the_page(open_page, server):
    page = open_page(server)
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.get_by_role("radio", name="Sparse")).to_be_enabled()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.get_by_label("Message").input_value() == "one\ntwo"
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert page.locator("li.user .text").inner_text() == "one\ntwo"
    page.locator("body").evaluate("() => document.activeElement.blur()")
    page.locator("#new").focus()
    seen = ["new"]
    while seen[-1] != "send":
        page.keyboard.press("Tab")
        name, ring = page.evaluate(
            """() => {
              const e = document.activeElement;
              const shown = e.type === "radio" ? e.parentElement : e;
              return [e.id || e.textContent || e.tagName, getComputedStyle(shown).outlineStyle];
            }"""
        )
        assert ring == "solid", f"nothing shows that {name} has the focus"
        seen.append(name)
        assert len(seen) < 20
    assert seen[1:7] == ["sparse", "Settings", "system", "temperature", "limit", "seed"]
    assert seen[7:] == [
        "log",
        page.locator("pre").inner_text(),
        "Copy",
        "Regenerate",
        "prompt",
        "send",
    ]


def test_arrows_move_the_switch_and_regenerate_works_by_key(open_page, server):
    page = open_page(server)
    ask(page)
    page.get_by_role("radio", name="Sparse").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Dense")).to_be_checked()
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".who")).to_have_text(["You", "Assistant, dense"][1:])
    expect(page.get_by_label("Message")).to_be_focused()


def test_enter_that_ends_a_composed_word_sends_nothing(open_page, server):
    page = open_page(server)
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_label("Message").fill("ねこ")
    page.get_by_label("Message").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert page.locator("li").count() == 0
    page.get_by_label("Message").dispatch_event("keydown", {"key": "Enter"})
    assert page.locator("li.user").count() == 1


def test_a_reader_of_older_text_is_not_pulled_to_the_end(open_page, endless):
    page = open_page(endless, width=375, height=667)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Max tokens").fill("")
    page.get_by_text("Settings", exact=True).click()
    ask(page, wait=False)
    log = page.get_by_role("log")
    element = log.element_handle()
    at_end = "e => e.scrollTop > 100 && e.scrollHeight - e.scrollTop - e.clientHeight < 60"
    page.wait_for_function(at_end, arg=element)
    log.evaluate("e => { e.scrollTop = 0; }")
    length = log.evaluate("e => e.scrollHeight")
    page.wait_for_function("([e, length]) => e.scrollHeight > length + 50", arg=[element, length])
    assert log.evaluate("e => e.scrollTop") == 0
    page.keyboard.press("Escape")
