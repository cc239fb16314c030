"""`GET /express`: one HTML page without external assets, and the headers that hold it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = (files(__package__) / "page.html").read_text("utf-8")


def _hashes(tag: str) -> str:
    """Content-Security-Policy sources for the page's own <tag> elements."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = [hashlib.sha256(text.encode()).digest() for text in found]
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
