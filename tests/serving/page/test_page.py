"""The page as a file: nothing from outside, no text as code, a label for each control."""

import re
from html.parser import HTMLParser

import pytest

from cats.serving.page import chat_page

VOID = frozenset({"meta", "link", "input"})


class Elements(HTMLParser):
    """All start tags with their attributes; checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.all = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, *tags):
        return [attributes for tag, attributes in self.all if tag in tags]


@pytest.fixture(scope="module")
def page():
    return chat_page()


def test_the_policy_lets_the_page_reach_its_own_server_alone(page):
    parts = page.headers["Content-Security-Policy"].split("; ")
    policy = {name: value for name, _, value in (part.partition(" ") for part in parts)}
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    for source in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[source])


def test_the_page_holds_all_that_it_needs(page):
    fetched = re.findall(r'(?:src|href|action)="([^"]*)"|url\(([^)]*)\)|@import', page.html)
    assert all(address.startswith("data:") for address, _ in fetched)
    # the name of the svg language is no address that is fetched
    outside = page.html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.", outside)


def test_text_never_becomes_code_or_markup(page):
    dangerous = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function"
    assert not re.search(dangerous, page.html)
    assert not re.search(r"\son[a-z]+=|\sstyle=", page.html), "the policy refuses these"


def test_every_control_has_a_label_and_every_reference_an_element(page):
    elements = Elements(page.html)
    ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    labelled = {label["for"] for label in elements.named("label")}
    shown = [c for c in elements.named("input", "textarea") if c.get("aria-hidden") != "true"]
    assert len(shown) == 8
    assert {control["id"] for control in shown} == labelled
    for _, attributes in elements.all:
        described = (attributes.get("aria-describedby") or "").split()
        assert set(described) <= set(ids)
    used = set(re.findall(r'\$\("([a-z-]+)"\)', page.html))
    assert used <= set(ids)
