"""A real server for the HTTP tests, and what they ask of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

#: The server's pool and block size, so that tests can turn usage into blocks.
BLOCKS, BLOCK_SIZE = 160, 64
#: A GPU runs compiled, with CUDA graphs, and leaves room for other tests' engines.
RUNS = (
    ["--gpu-memory-utilization=0.12", f"--kv-cache-memory-bytes={1 << 30}", "--max-num-seqs=64"]
    if torch.cuda.is_available()
    else ["--enforce-eager"]
)


@dataclass
class Server:
    url: str
    log: Path
    client: httpx.Client
    pid: int = 0

    def metric(self, name):
        """The value of a metric with a single sample."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith((name + "{", name + " ")):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def blocks(self):
        """KV-cache blocks in use, as the engine reports them."""
        return round(self.metric("vllm:kv_cache_usage_perc") * (BLOCKS - 1))


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def serve(model_path, log, *arguments, headers=None, express=None):
    """A server of its own, with more `arguments` and settings of `express`.

    `headers` go with every request of its client.
    """
    settings = {"memory_tokens": 1024, "max_memory_tokens": 8192, **(express or {})}
    port = free_port()
    script = Path(sys.executable).with_name("vllm")
    program = [script] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command = [
        *map(str, program), "serve", str(model_path),
        "--attention-backend", "express", "--port", str(port), "--host", "127.0.0.1",
        "--served-model-name", "small", *RUNS,
        "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(BLOCKS),
        "--additional-config", json.dumps({"express": settings}),
        *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=300, headers=headers) as client:
        try:
            _wait(client, process, log)
            yield Server(url, log, client, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # engines outlive a server


def _wait(client, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped:\n{log.read_text()[-6000:]}")
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(f"the server did not start:\n{log.read_text()[-6000:]}")


def body(route, express="{}"):
    """A body as text, so that it can say what no JSON library would write."""
    rest = {
        "completions": '"prompt": "Hello", "max_tokens": 2',
        "chat/completions": '"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2',
        "responses": '"input": "Hello", "max_output_tokens": 2',
    }[route]
    return f'{{"model": "small", {rest}, "express": {express}}}'


def wait_for_rest(server, seconds=60):
    """Nothing runs and every block is back; the page's numbers say so too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = server.client.get("/v1/express/status").json()
        if not (server.blocks() or status["held_kv_tokens"] or status["requests_running"]):
            return
        time.sleep(0.2)
    raise AssertionError(f"{server.blocks()} blocks are held, {status}")


def watch(server, done, seen):
    while not done.is_set():
        seen.append(server.blocks())
        time.sleep(0.05)
