"""A headless Chromium, driven over its DevTools protocol: real clicks and keys on a page. Tests ask for the fixture `web`: one
browser for all of a process's tests. They skip where no Chromium is installed, and fail in CI, which installs Debian's."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str:
    """The browser's path; where there is none the test is skipped, and fails in CI."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium here: `apt-get install chromium`")
    return found


class Browser:
    """One page. `errors`: what its console said of errors, exceptions and refused requests."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.num, self.errors = socket, 0, list[str]()
        self.asked: list[str] = []  # addresses that were requested
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def forget(self) -> None:
        """An empty page of no test before: as wide as a desk's, nothing asked for, nothing wrong."""
        self.call("Emulation.setEmulatedMedia", media="")
        self.open("about:blank")
        self.size(1400)
        self.errors.clear()
        self.asked.clear()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.num += 1
        self.socket.send(json.dumps({"id": self.num, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            self._note(message)
            if message.get("id") == self.num:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(str(params["entry"]["text"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        elif message.get("method") == "Network.requestWillBeSent":
            self.asked.append(str(params["request"]["url"]))

    def size(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, url: str, until: str = "document.readyState === 'complete'") -> float:
        """Seconds until the page is loaded."""
        start = time.monotonic()
        self.call("Page.navigate", url=url)
        self.wait(until)
        return time.monotonic() - start

    def js(self, text: str) -> Any:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (text, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, text: str, seconds: float = 60.0) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(text):
            assert time.monotonic() < end, f"not true after {seconds} s: {text}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """A press and release of the left button at the middle of the first element that matches."""
        name = json.dumps(selector)
        self.js(f"document.querySelector({name}).scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.js(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                      f"(document.querySelector({name}).getClientRects()[0])")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Keys, into what has the focus."""
        for sign in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=sign, key=sign)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=sign)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path, whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own under `folder`, ended with the block."""
    from websockets.sync.client import connect

    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu"]
    options += ["--no-first-run", "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    process = subprocess.Popen(
        [program(), *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.is_file() and len(port.read_text().split()) == 2):
            assert process.poll() is None and time.monotonic() < end, "chromium did not start"
            time.sleep(0.05)
        import urllib.request

        number = port.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list", timeout=30) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        # Without pings: a browser that computes for long on a busy machine does not answer them. What it said since the
        # last test is read by nobody, so it would be waited for at the end, 10 s by default.
        address = pages[0]["webSocketDebuggerUrl"]
        with connect(address, max_size=None, open_timeout=60, close_timeout=0.2, ping_interval=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(30)
