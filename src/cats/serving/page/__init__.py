"""The chat page: one file without a network, and the headers that hold it to that."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the server answers at ``/``.

    Attributes:
        html: The whole page.
        headers: A policy that lets the page run its own script and style and call its own server,
            and nothing else: no other host, no script from text, no frame.
    """

    html: str
    headers: dict[str, str]


def chat_page() -> Page:
    """Read the page from the package."""
    html = files("cats.serving.page").joinpath("index.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # a browser that knows it then refuses innerHTML and the like
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # a new release of the package has another page
        "Cache-Control": "no-cache",
    }
    return Page(html=html, headers=headers)


def _hashes(html: str, tag: str) -> str:
    """The hashes of all inline elements of one kind, as a policy names them."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = [b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
