"""One process at a time works in a folder of a bucket, which has no locks: an object there says who does.

The object is created on the condition that there is none, and its holder writes the time into it again and
again. One that has not been renewed for a while is of a process that died: the next one takes its place, on
the condition that it is still what was read.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from common import kvstore, schema, storage, strict_json
from common.errors import EyasError, RestartError

_RENEWED = 30.0  # seconds between two renewals
_PATIENCE = 5.0  # seconds that a renewal under way is waited for at the end
_STALE = 180.0  # seconds after which a lease that is not renewed is nobody's; clocks may differ by half of it


class _Lease(schema.TypedDict):
    holder: str
    time: float  # seconds since 1970, when it was renewed


@contextmanager
def leased(url: str) -> Iterator[Callable[[], None]]:
    """Holds the lease that is the object `url` while the context lasts. Yields a check, which costs nothing
    and raises EyasError once the lease is lost.

    RestartError, naming process and host, while another one holds it: one that was killed does so for three
    minutes. EyasError for an object that is no lease.
    """
    held = _Held(url)
    held.take()
    thread = threading.Thread(target=held.keep, name=f"lease {url}", daemon=True)
    thread.start()
    try:
        yield held.check
    finally:
        held.end.set()
        thread.join(_PATIENCE)
        if not thread.is_alive():  # else the bucket is away, and the lease lapses by itself
            with suppress(EyasError):  # the work is done, or has an error of its own
                kvstore.remove_file(url, held.written)


def holder(url: str) -> str | None:
    """The process that holds the lease `url`, None if none does or that cannot be told."""
    try:
        found = _parse(storage.read_bytes(url), url)
    except EyasError:
        return None
    return None if _age(found) > _STALE else found["holder"]


class _Held:
    """`written` is what the object holds as long as the lease is this process's."""

    def __init__(self, url: str):
        self._url = url
        self._until = 0.0  # of the monotonic clock
        self.written = b""
        self.end = threading.Event()

    def take(self) -> None:
        new, start = _content(), time.monotonic()
        old = None if kvstore.create_file(self._url, new) else storage.read_bytes(self._url)
        if old not in (None, new):  # `new` if the answer to the first request was lost
            found = _parse(old, self._url)
            if _age(found) <= _STALE or not kvstore.replace_file(self._url, old, new):
                raise RestartError(
                    f"{os.path.dirname(self._url)} is in use by {found['holder']}, which said so "
                    f"{_age(found):.0f} seconds ago; wait until it ends ({_STALE:.0f} seconds if it "
                    "was killed), or name another folder"
                )
        self.written, self._until = new, start + _STALE

    def keep(self) -> None:
        """Renews the lease until the end is set or it is lost."""
        while not self.end.wait(_RENEWED):
            with suppress(EyasError):  # the bucket is away: there is time for more than one try
                if not self._renew():
                    self._until = 0.0
                    return

    def _renew(self) -> bool:
        new, start = _content(), time.monotonic()
        if not kvstore.replace_file(self._url, self.written, new) and storage.read_bytes(self._url) != new:
            return False
        self.written, self._until = new, start + _STALE
        return True

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise RestartError(
                f"{self._url} could not be renewed for {_STALE:.0f} seconds, or another process works in the "
                "folder; run the same command again"
            )


def _content() -> bytes:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    return json.dumps(_Lease(holder=who, time=time.time())).encode()


def _parse(data: bytes, url: str) -> _Lease:
    return schema.check(_Lease, strict_json.parse(data, url), url, "delete it if no process works there")


def _age(lease: _Lease) -> float:
    """Seconds between this clock and that of the holder, either way: one that was far ahead and died would
    else hold the folder until this clock is there, too."""
    return abs(time.time() - lease["time"])
