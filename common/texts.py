"""What may be said, and what can be: secrets, what a terminal obeys, names that are no Unicode, long text."""

import re

_USER = re.compile(r"(\w+://)[^\s/@?#]+@")
_QUERY = re.compile(r"(https?://[^\s?'\"]+\?)[^\s'\"]+")


def without_secrets(text: str) -> str:
    """The text with `...` in the place of what web addresses hold of secrets: users, passwords, queries."""
    return _QUERY.sub(r"\1...", _USER.sub(r"\1...@", text))


def is_unicode(text: str) -> bool:
    """False for a name that is not UTF-8, of which Python makes halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text on one line, what a terminal would obey or not show (\\x1b, say) written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException, limit: int = 200) -> str:
    """What a library's error says first, shortened; the name of its class where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


def install(extra: str) -> str:
    """The command that adds what an extra needs, in the checkout: by the name of the project alone pip would
    fetch whatever has that name in its index."""
    return f".venv/bin/pip install -e '.[{extra}]'"
