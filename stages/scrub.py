"""Messages without credentials."""

import os

MESSAGE = 4000
"""Characters that are shown of one: what lies at a remote may make it endless."""

SHORTEST_SECRET = 8
"""Characters. Real ones have sixteen or more; the word "test" in place of one stays readable in other words."""

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def scrubbed(message: str) -> str:
    """A message in one line, without control characters, and without the credentials of the environment or of URLs in it."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST_SECRET:
            message = message.replace(value, f"[{name}]")
    words = "".join(c if c.isprintable() else " " for c in message).split()
    found = " ".join(map(_without_password, words))
    return found if len(found) <= MESSAGE else f"{found[: MESSAGE // 2]} ... {found[-MESSAGE // 2 :]}"


def _without_password(word: str) -> str:
    """A word of a message without user:password@, whether there is a scheme before it or not."""
    head, at, tail = word.rpartition("@")
    return f"[credentials]@{tail}" if at and ":" in head.replace("file:///", "/") else word
