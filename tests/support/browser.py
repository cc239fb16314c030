"""A headless Chromium driven over its DevTools protocol: what the page tests need of a browser."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
from websockets.sync.client import connect


class Browser:
    """One page in Debian's chromium; use as a context manager."""

    def __init__(self, width=1100, height=1500):
        program = shutil.which("chromium")
        if program is None:
            raise RuntimeError("chromium is not installed: apt-get install chromium")
        # Its helpers may write to the profile a moment longer than the browser runs.
        self.folder = tempfile.TemporaryDirectory(
            prefix="express-chromium-", ignore_cleanup_errors=True
        )
        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-port=0", f"--user-data-dir={self.folder.name}",
             f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.number = 0
        self.console = []

    def __enter__(self):
        found = Path(self.folder.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (found.exists() and found.read_text().strip()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("chromium did not start")
            time.sleep(0.1)
        port = found.read_text().split()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json").json()
        (page,) = [p for p in pages if p["type"] == "page"]
        self.connection = connect(page["webSocketDebuggerUrl"], max_size=None)
        self.socket = self.connection.__enter__()
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.connection.__exit__(*error)
        self.process.terminate()
        self.process.wait(20)
        self.folder.cleanup()

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.console.append(answer["params"])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, script, seconds=60):
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}; console: {self.console}")
            time.sleep(0.1)
        return value

    def key(self, name, text=""):
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        common = {"key": name, "windowsVirtualKeyCode": codes.get(name, ord(name[0]))}
        if text or name == "Enter":
            common["text"] = text or "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def dark(self, on):
        value = "dark" if on else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": value}],
        )

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))
