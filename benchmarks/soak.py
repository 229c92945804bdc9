"""Measure waiting times of thirty simultaneous visitors of the application, two of whom never read their responses.

    python benchmarks/soak.py                     # five minutes; written to benchmarks/results/app/soak.json

Each visitor loads the page, polls every two seconds as the page does, and every ten seconds moves the slider of Compare
to another step. The two who never read have requested images, and keep their streams open. The result has the seconds
of the requests, the server's memory every 15 seconds, its growth in the second half (none without a leak), and the
numbers of threads and open files: at the beginning, the highest, and after all have left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import numpy as np
import psutil
from measured import ROOT, Others, keep

API, HOST = "/gradio_api", "127.0.0.1"
LOOK, EVERY, WEIGHED = 2.0, 10.0, 15.0  # seconds between two polls, two comparisons, two measurements of memory
T = TypeVar("T")


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--silent", type=int, default=2, help="of them never read")
    parser.add_argument("--name", default="app/soak", help="where in benchmarks/results it is kept")
    return parser.parse_args()


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Visitor:
    """A visitor who has the page open."""

    def __init__(self, number: int, address: str, kept: Kept) -> None:
        self.random, self.session, self.kept = random.Random(number), f"soak{number}", kept
        self.client = httpx.AsyncClient(base_url=address, timeout=120)

    async def stay(self, until: float) -> None:
        """Open the page after a random delay, and use it until the time `until`."""
        async with self.client:
            await asyncio.sleep(self.random.uniform(0, EVERY))
            config = (await self.kept.timed("page", self.client.get("/config"))).json()
            ticking = [each for each in config["dependencies"] if any(on == "tick" for _, on in each["targets"])]
            watch = max(ticking, key=lambda each: len(each["outputs"]))
            shown = {each["id"]: each["props"].get("value") for each in config["components"]}
            values = [shown[number] for number in watch["inputs"][1:]]
            run = (await self.kept.timed("runs", self.call("runs")))[0][0]
            while time.monotonic() < until:
                began = time.monotonic()
                await self.kept.timed("look", self.look(watch["id"], [run, *values]))
                if self.random.random() < LOOK / EVERY:
                    await self.kept.timed("compare", self.call("compare", run, self.random.randrange(0, 200, 50)))
                await asyncio.sleep(max(0.0, LOOK - (time.monotonic() - began)))

    async def look(self, number: int, values: list) -> None:
        """Send the request of the page's timer: the event of that number, with the displayed values."""
        question = {"data": values, "fn_index": number, "session_hash": self.session}
        (await self.client.post(f"{API}/run/predict", json=question)).raise_for_status()

    async def call(self, name: str, *values: object) -> list:
        """Return the response of a named endpoint, after waiting in the queue as a click does."""
        question = {"data": values, "session_hash": self.session}
        asked = await self.client.post(f"{API}/call/{name}", json=question)
        answer = await self.client.get(f"{API}/call/{name}/{asked.raise_for_status().json()['event_id']}")
        *_, event, data = answer.raise_for_status().text.strip().splitlines()
        if event != "event: complete":
            raise RuntimeError(f"{name} {values}: {event} {data}")
        return json.loads(data.removeprefix("data: "))


@dataclass
class Kept:
    """Seconds of every kind of request, and errors."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)

    async def timed(self, kind: str, waiting: Awaitable[T]) -> T:
        """Await a response, and record its duration."""
        began = time.monotonic()
        try:
            return await waiting
        except Exception as error:
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")
            raise
        finally:
            self.seconds[kind].append(time.monotonic() - began)

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the number of requests of each kind, and median, 95th percentile and maximum in seconds."""
        return {
            kind: {
                "requests": len(found), "median": round(float(np.median(found)), 3),
                "p95": round(float(np.quantile(found, 0.95)), 3), "longest": round(max(found), 3),
            }
            for kind, found in self.seconds.items()
        }  # fmt: skip


def never_read(host: str, port: int, run: str, label: str) -> socket.socket:
    """Request a stream of images, and return its socket without reading from it."""
    with httpx.Client(base_url=f"http://{host}:{port}{API}", timeout=120) as client:
        wanted = {"label": label, "prompt": "red apple", "images": 8, "steps": 100}
        values = []
        for place, parameter in enumerate(client.get("/info").json()["named_endpoints"]["/generate"]["parameters"]):
            default = run if place == 0 else parameter.get("parameter_default")
            values.append(wanted.get(parameter["parameter_name"], default))
        asked = client.post("/call/generate", json={"data": values})
        event = asked.raise_for_status().json()["event_id"]
    stream = socket.create_connection((host, port))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stream.sendall(f"GET {API}/call/generate/{event} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return stream


def size(process: psutil.Process) -> dict[str, int]:
    """Return the sizes that a leak would increase."""
    memory = round(process.memory_info().rss / 2**20)
    return {"memory_mib": memory, "threads": process.num_threads(), "files": process.num_fds()}


def grown(sizes: list[dict[str, int]]) -> dict:
    """Return how the sizes change; the last ones are from after all visitors have left."""
    memory = [each["memory_mib"] for each in sizes]
    ends = {name: [sizes[0][name], max(each[name] for each in sizes), sizes[-1][name]] for name in ("threads", "files")}
    return {"memory_mib": memory, "second_half_mib": memory[-1] - memory[len(memory) // 2], **ends}


async def visits(args: argparse.Namespace, port: int, process: psutil.Process) -> dict:
    """Run all visitors, and return their measurements."""
    kept, address = Kept(), f"http://{HOST}:{port}"
    visitors = [Visitor(number, address, kept) for number in range(args.clients - args.silent)]
    first = Visitor(-1, address, Kept())
    run = (await first.call("runs"))[0][0]
    label = (await first.call("weights", run))[0][-1]
    silent = [never_read(HOST, port, run, label) for _ in range(args.silent)]
    until = time.monotonic() + 60 * args.minutes
    staying = asyncio.gather(*(visitor.stay(until) for visitor in visitors), return_exceptions=True)
    sizes = []
    while not staying.done():
        sizes.append(size(process))
        await asyncio.wait([staying], timeout=WEIGHED)
    ended = [str(each) for each in await staying if isinstance(each, BaseException)]
    for stream in silent:
        stream.close()
    await asyncio.sleep(10)
    return {"requests": kept.figures(), "errors": kept.errors, "left": ended, **grown([*sizes, size(process)])}


def main() -> None:
    """Start the application, run the visitors, and write the result."""
    args = parse_args()
    port, others = free_port(), Others()
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "app", "--runs", runs, "--port", str(port)]
        with subprocess.Popen(command, cwd=ROOT) as server:
            try:
                wait_for(port, server)
                found = asyncio.run(visits(args, port, psutil.Process(server.pid)))
            finally:
                server.terminate()
    keep(args.name, {"settings": {**vars(args)}, **others(), **found})
    print(json.dumps(found["requests"], indent=1), found["memory_mib"], *found["errors"][:5], sep="\n")


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Wait until the page is served; exits with an error if the application ends."""
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the application ended with status {server.returncode}")
        try:
            httpx.get(f"http://{HOST}:{port}/config", timeout=60)
            return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit("the application does not answer")


if __name__ == "__main__":
    main()
