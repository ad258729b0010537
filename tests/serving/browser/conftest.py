"""Headless Chromium on the page of a server whose model says a text that the tests chose."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serving.live import make_models, serving
from tests.serving.scripted import make_scripted

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
SCRIPT = (
    'Look: <img src="x" onerror="document.title=1"> <script>document.title = 2</script>\n\n'
    "```html\n<b>a long line of code that is wider than the window of any phone there is</b>\n```\n"
    "Cats **drop** what `abs(x) < t`, and that is all."
)
expect.set_options(timeout=20_000)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="chromium is not installed: apt-get install chromium")
    for item in items:
        if CHROMIUM is None and "serving/browser" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture(scope="package")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server():
    """Address of a server with a sparse model and the dense one beside it."""
    with serving(make_models(*make_scripted(SCRIPT, sparsity=0.5), context=1024)) as address:
        yield address


@pytest.fixture(scope="package")
def endless():
    """Address of a server whose answers fill the context."""
    model = make_scripted("and so on, for ever; ", repeats=True)
    with serving(make_models(*model, context=1024)) as address:
        yield address


@pytest.fixture
def open_page(chromium):
    """Opens the page of a server, and fails the test if the page breaks its own rules."""
    faults, contexts, known = [], [], ["Failed to load resource"]

    def watch(message):
        if message.type == "error" and not any(part in message.text for part in known):
            faults.append(message.text)

    def open_page(address, *, width=1280, height=800, scheme="light", complaints=()):
        known.extend(complaints)
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", watch)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
