"""A headless Chromium, driven over two pipes by its DevTools protocol; nothing but Python is needed."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(PATH is None, reason="there is no Chromium (apt-get install chromium)")
DESKTOP, PHONE = (1200, 800), (390, 844)


class Tab:
    """One page of the browser."""

    def __init__(self, write: int, read: int):
        self.write, self.read, self.numbers, self.rest = write, read, itertools.count(1), b""
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.errors: list[str] = []  # what the page's scripts threw
        self.call("Runtime.enable")
        self.call("Page.enable")

    def message(self) -> dict:
        """The browser's next message."""
        while b"\0" not in self.rest:
            block = os.read(self.read, 1 << 16)
            assert block, "Chromium has ended"
            self.rest += block
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        return message

    def call(self, method: str, **parameters) -> dict:
        """The result of a DevTools method."""
        number = next(self.numbers)
        request = {"id": number, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(request).encode() + b"\0")
        while (answer := self.message()).get("id") != number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def open(self, url: str, size: tuple[int, int]) -> None:
        """Load a page in a window of this size, and wait until it is there."""
        width, height = size
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **device)
        self.call("Page.navigate", url=url)
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        """The value of an expression, or what its promise gives."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str, seconds: int = 60):
        """The value of an expression once it is true; the test fails if that takes longer."""
        return self.run(
            "new Promise((resolve, reject) => {"
            f"  const look = () => {{ const value = {condition};"
            "    value ? resolve(value) : setTimeout(look, 20) };"
            f"  setTimeout(reject, {1000 * seconds}, 'waited in vain'); look() }})"
        )

    def type(self, text: str) -> None:
        """Type into what has the focus, and press Enter."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13
            )

    def overflows(self) -> bool:
        """Whether the page is wider than its window."""
        return self.run("document.documentElement.scrollWidth > window.innerWidth")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path):
    """A tab of a browser that keeps its files in a folder."""
    (theirs_in, write), (read, theirs_out) = os.pipe(), os.pipe()
    command = [PATH, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    redirect = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", redirect, "bash", *command],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (theirs_in, theirs_out):
        os.close(end)
    try:
        yield Tab(write, read)
    finally:
        process.terminate()
        process.wait()
        os.close(write)
        os.close(read)
