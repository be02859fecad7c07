"""What may be said, and what can be: secrets, what a terminal obeys, and names that are no Unicode."""

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
