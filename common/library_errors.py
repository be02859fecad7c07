"""What the libraries of storage and network raise, in one line: the bucket, the cause and what to do.

`library_errors` goes right around a call of fsspec, TensorStore, orbax or the Hub's client, so that whatever
is raised inside is theirs. They share no base class; this is the one place that knows their kinds.
"""

import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import EyasError, MachineError, RestartError
from common.progress import note

# Top-level modules whose exceptions speak of storage or network. Modules are not imported to name them.
_LIBRARIES = (
    *("aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "httpcore2", "httpx2"),
    *("huggingface_hub", "requests", "s3fs", "urllib3"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUCKET = re.compile(r"\b(?:gs|gcs|s3)://([^/\s]+)")
_HTTP_CODE = re.compile(r"\[http_response_code='(\d{3})'\]")  # in TensorStore's texts
_OS_CODE = re.compile(r"os_error_code='(\d+)'")
# What the system says of a path that leads to nothing, or to something else: that is no failure of its own.
_OTHER_FILE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
_NO_FILE = (errno.ENOENT, *_OTHER_FILE)
_PERMISSION = {
    "read": "storage.objects.get",
    "list": "storage.objects.list",
    "write": "storage.objects.create and storage.objects.delete",
}
_AGAIN = "run the same command again; what is complete is kept"
_PATIENCE = 4.0  # seconds without an answer after which the user is told
_TOLD_AGAIN = 60.0  # seconds between two such notes
_told = [-_TOLD_AGAIN]
# gcsfs logs a stack trace beside each error that it raises; the error alone is told, in one line.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())
logging.getLogger("gcsfs").propagate = False


def is_librarys(error: BaseException) -> bool:
    """True for an exception of a class that a storage or network library defines."""
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


@contextmanager
def library_errors(what: str, doing: str = "write", patience: float = _PATIENCE) -> Iterator[None]:
    """Turns every error of a library's call into an EyasError, or a MachineError where the machine failed.

    `what` names the place, a path or URL first; `doing` is read, list or write. FileNotFoundError of a read
    or list passes. Where a URL has not answered after `patience` seconds, a line on stderr says so.
    """
    with waiting(what, patience):
        try:
            yield
        except EyasError:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and doing != "write":
                cause = error.__cause__  # fsspec says so of a web server that does not answer, too
                if cause is None or not is_librarys(cause) or _status(cause) == 404:
                    raise
                raise explained(cause, what, doing) from error
            raise explained(error, what, doing) from error
        except Exception as error:
            if not is_librarys(error):
                raise
            raise explained(error, what, doing) from error


@contextmanager
def waiting(what: str, patience: float = _PATIENCE) -> Iterator[None]:
    """Says on stderr that `what` is waited for, if it is a URL and takes longer than `patience` seconds."""
    if "://" not in what:
        yield
        return
    timer = threading.Timer(patience, _tell, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(what: str) -> None:
    now = time.monotonic()
    if now - _told[0] >= _TOLD_AGAIN:
        _told[0] = now
        note(f"waiting for {what}: no answer yet; trying on for some minutes (Ctrl-C stops)")


def explained(error: Exception, what: str, doing: str = "read") -> EyasError:
    """The error that says in one line what went wrong with `what`, and what to do."""
    code, text, named = _status(error), reason(error), _BUCKET.search(what)
    bucket = f"the bucket {named[1]}" if named else "the server"
    if _is_full(error):
        return MachineError(f"{what}: the disk is full; make room and {_AGAIN}")
    if code == 401:
        return EyasError(
            f"{what}: {bucket} asks for valid credentials (401: {text}); log in (gcloud auth "
            "application-default login) or name a key file in GOOGLE_APPLICATION_CREDENTIALS, of an account "
            f"with {_PERMISSION[doing]}"
        )
    if code == 403:
        return EyasError(
            f"{what}: this account may not {doing} in {bucket} (403: {text}); have it given "
            f"{_PERMISSION[doing]} there, or log in as another one"
        )
    if code == 404 and named:
        return EyasError(f"{what}: {bucket} does not exist; check its name or create it")
    if isinstance(error, ValueError) and is_librarys(error) and code is None:
        return EyasError(f"{what}: {text}; check the address")
    if _is_connection(error, code):
        status = f"{code}: " if code else ""
        advice = f"check the network and the address, and {_AGAIN}"
        return RestartError(f"{what}: no answer from {bucket} ({status}{text}); {advice}")
    past = {"read": "reading", "list": "listing", "write": "writing"}[doing]
    if _system_code(error) in _OTHER_FILE:
        return EyasError(f"{what}: {past} failed ({text}); check the path, or name another place")
    return MachineError(f"{what}: {past} failed ({text}); mend that and {_AGAIN}")


def is_refusal(error: Exception) -> bool:
    """True if a server or the system refused or did not answer, rather than that what it gave is wrong."""
    code, system = _status(error), _system_code(error)
    refused = (code is not None and code != 404) or _is_connection(error, code)
    return refused or (system is not None and system not in _NO_FILE)


def reason(error: BaseException) -> str:
    """What a library says is wrong, on one line, without TensorStore's spec.

    What is long, of a long path say, loses its middle: the cause stands at the end.
    """
    text = " ".join(str(error).split(" [")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]}...{text[-150:]}"


def _is_full(error: Exception) -> bool:
    return _system_code(error) in _FULL


def _system_code(error: Exception) -> int | None:
    """The system's error number behind an error, None if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OS_CODE.search(str(error))
    return int(found[1]) if found else None


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, None if it has none."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    if type(error).__module__ == "google.auth.exceptions" and type(error).__name__ != "TransportError":
        return 401
    found = _HTTP_CODE.search(str(error))
    response = getattr(error, "response", None)
    for value in (
        found and int(found[1]),
        getattr(error, "code", None),
        getattr(error, "status", None),
        getattr(response, "status_code", None),
    ):
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _is_connection(error: Exception, code: int | None) -> bool:
    if code is not None:
        return code in (408, 429) or code >= 500
    text = str(error)
    known = isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or "[curl_code='" in text
    return known or is_librarys(error) or text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED"))
