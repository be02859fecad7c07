"""A headless Chromium that opens a page and is asked about it, over its DevTools protocol."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --hide-scrollbars"
)
_SECONDS = 60


class Page:
    """An open page. `problems`: what its console and its security policy complained of; `asked`: the URLs it
    asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._ids = socket, itertools.count(1)
        self._session: dict[str, str] = {}
        self.problems: list[str] = []
        self.asked: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools method."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params} | self._session)
        while True:
            found = await self._socket.receive_json(timeout=_SECONDS)
            self._take(found)
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found}"
                return found["result"]

    def _take(self, found: dict[str, Any]) -> None:
        method, params = found.get("method", ""), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and params["entry"]["level"] == "error"
        ):
            self.problems.append(str(params))

    async def open(self, url: str, width: int, height: int, dark: bool) -> None:
        """Attaches to a new tab of that size and loads `url`."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Network", "Page"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)
        while await self.js("document.readyState") != "complete" or await self.js("location.href") != url:
            await asyncio.sleep(0.05)

    async def js(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, f"{expression}: {found}"
        return found["result"].get("value")

    async def press(self, *keys: str) -> None:
        """Presses keys, such as Tab or ArrowLeft, one after the other."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    async def mouse(self, kind: str, x: float, y: float) -> None:
        """mouseMoved, mousePressed or mouseReleased at a point of the window."""
        held = 0 if kind == "mouseMoved" else 1
        button = "none" if kind == "mouseMoved" else "left"
        await self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=held, clickCount=held
        )

    async def shot(self, path: Path, whole: bool = True) -> None:
        """Writes a PNG of the page."""
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def _opened(url: str, profile: Path, width: int, height: int, dark: bool) -> AsyncIterator[Page]:
    command = [CHROMIUM, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, path = await _address(profile / "DevToolsActivePort", process)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0) as socket,
        ):
            page = Page(socket)
            await page.open(url, width, height, dark)
            yield page
    finally:
        process.terminate()
        process.wait(timeout=_SECONDS)


async def _address(place: Path, process: subprocess.Popen) -> list[str]:
    """[port, path] that a starting Chromium writes down."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, "Chromium ended at once"
        if place.exists() and len(lines := place.read_text().splitlines()) == 2:
            return lines
        await asyncio.sleep(0.05)
    raise AssertionError(f"Chromium did not start within {_SECONDS} s")


def look(
    file: Path,
    profile: Path,
    at: Callable[[Page], Coroutine[Any, Any, Any]],
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
) -> Any:
    """What `at` returns of the page that `file` opens, in a browser whose folder is `profile`, a new one."""

    async def go() -> Any:
        async with _opened(file.as_uri(), profile, width, height, dark) as page:
            return await at(page)

    return asyncio.run(go())
