"""Many requests of all kinds on one server, and what its memory does meanwhile.

    python -m tests.serving.soak --requests 10000 [-o FILE.jsonl]

The server is a process of its own with a tiny sparse model. 32 clients send chats, streams, streams
that they leave in the middle, several answers, schemas, log probabilities, and wrong requests. The
first fifth warms up. A line through the rest says how much memory a request leaves behind.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from cats.results import ServerMemory, append_results, environment

CLIENTS = 32
# KiB that a request may leave behind. An answer that is kept would be some; the first run had 0.56.
LIMIT = 1.0
# Below so many requests, the memory has no time to settle, and is not judged.
FEWEST = 2000
_SAMPLES = 100
_MODEL = "tiny"


@dataclass
class Soak:
    """What came of the requests.

    Attributes:
        counts: Requests by kind.
        memory: Requests done, and KiB of the server then.
        open: Answers that the server holds open at the end.
        files: Open files of the server after the warm-up and at the end.
        seconds: How long it took.
    """

    counts: Counter = field(default_factory=Counter)
    memory: list[tuple[int, int]] = field(default_factory=list)
    open: float = 0.0
    files: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def settled(self):
        """The samples after the warm-up."""
        start = self.memory[-1][0] / 5
        return [(done, memory) for done, memory in self.memory if done >= start]

    @property
    def growth(self):
        """KiB that a request leaves behind, by a line through the samples."""
        return slope(self.settled)

    def record(self):
        settled, mib = self.settled, 1 / 1024
        halves = [slope(settled[: len(settled) // 2]), slope(settled[len(settled) // 2 :])]
        return ServerMemory(
            value=self.growth,
            low=min(halves),
            high=max(halves),
            samples=len(settled),
            environment=environment("cpu"),
            model="tiny Llama, CATS-50",
            requests=sum(self.counts.values()),
            clients=CLIENTS,
            left=self.counts["leave"],
            wrong=self.counts["wrong"],
            seconds=round(self.seconds, 1),
            first_mib=round(settled[0][1] * mib, 2),
            last_mib=round(settled[-1][1] * mib, 2),
        )


def slope(samples):
    done, memory = zip(*samples, strict=True)
    return float(np.polyfit(done, memory, 1)[0])


def chat(random_, **changes):
    question = "".join(random_.choices("abcdefgh ", k=random_.randint(1, 200)))
    message = {"role": "user", "content": question}
    limit = random_.randint(1, 16)
    return {"model": _MODEL, "messages": [message], "max_tokens": limit} | changes


async def whole(client, random_):
    response = await client.post("/v1/chat/completions", json=chat(random_, temperature=1))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] > 0


async def stream(client, random_):
    body = chat(random_, stream=True, stream_options={"include_meter": True})
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert response.status_code == 200, lines
    assert lines[-1] == "data: [DONE]", lines[-1]


async def leave(client, random_):
    body = chat(random_, stream=True, max_tokens=250, ignore_eos=True)
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for _ in response.aiter_lines():
            if random_.random() < 0.3:
                return


async def several(client, random_):
    body = {"model": _MODEL, "prompt": chat(random_)["messages"][0]["content"], "n": 2}
    body |= {"max_tokens": 4, "logprobs": 2, "stop": ["zz"], "presence_penalty": 0.5}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 2


async def schema(client, random_):
    # another schema each time, so that kept ones would show
    choices = [f"{random_.getrandbits(64):x}", "other"]
    form = {"name": "choice", "schema": {"enum": choices}}
    format_ = {"type": "json_schema", "json_schema": form}
    body = chat(random_, response_format=format_, max_tokens=40)
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert json.loads(response.json()["choices"][0]["message"]["content"]) in choices


async def wrong(client, random_):
    bodies = [
        chat(random_, temperature=9),
        chat(random_, max_tokens=10**9),
        chat(random_) | {f"field_{random_.getrandbits(64):x}": 1},
        {"model": f"model-{random_.getrandbits(64):x}", "messages": []},
    ]
    response = await client.post("/v1/chat/completions", json=random_.choice(bodies))
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["message"]


async def other(client, random_):
    path = random_.choice(["/", "/v1/models", "/health", "/metrics", f"/{random_.random()}"])
    response = await client.get(path)
    assert response.status_code == (404 if path.startswith("/0.") else 200), path
    await client.post("/tokenize", json={"model": _MODEL, "prompt": "abc"})


KINDS = {whole: 30, stream: 25, leave: 15, several: 10, schema: 5, wrong: 10, other: 5}


async def run(address, pid, requests, kinds=KINDS):
    """Send so many requests to a server, and watch its process."""
    soak, done, start = Soak(), 0, time.monotonic()
    numbers = iter(range(requests))

    async def one_client(client):
        nonlocal done
        for number in numbers:
            random_ = random.Random(number)
            (kind,) = random_.choices(list(kinds), kinds.values())
            try:
                await asyncio.wait_for(kind(client, random_), 120)
            except Exception as error:
                raise AssertionError(f"request {number}, {kind.__name__}: {error!r}") from error
            soak.counts[kind.__name__] += 1
            done += 1
            if done % max(1, requests // _SAMPLES) == 0:
                soak.memory.append((done, resident(pid)))
            if done == requests // 5:
                soak.files = (open_files(pid), 0)

    # each on connections of its own, as real clients
    clients = [httpx.AsyncClient(base_url=address, timeout=120) for _ in range(CLIENTS)]
    await asyncio.gather(*map(one_client, clients))
    for client in clients:
        await client.aclose()
    soak.seconds = time.monotonic() - start
    soak.open = await until_idle(address)
    soak.files = (soak.files[0], open_files(pid))
    return soak


async def until_idle(address, seconds=10):
    """Open answers of the server once nobody asks; it may need a moment to see that all left."""
    async with httpx.AsyncClient(base_url=address) as client:
        for _ in range(10 * seconds):
            metrics = (await client.get("/metrics")).text
            still = sum(map(float, re.findall(r"^cats_open_answers\{.*\} (.*)$", metrics, re.M)))
            if not still:
                break
            await asyncio.sleep(0.1)
        return still


def resident(pid):
    """KiB of memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def soak_a_server(requests, kinds=KINDS):
    """Start a server, send so many requests to it, and end it."""
    command = [sys.executable, "-m", "tests.serving.tiny_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            assert address.startswith("http"), "the server did not start"
            soak = asyncio.run(run(address, server.pid, requests, kinds))
        finally:
            server.terminate()
    # it lets answers end, and then ends as the signal asks
    assert server.returncode == -signal.SIGTERM, f"the server ended with {server.returncode}"
    return soak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("-o", "--output", type=Path, help="append the result to this file")
    names = {kind.__name__: kind for kind in KINDS}
    parser.add_argument("--kind", choices=names, help="requests of this kind alone")
    arguments = parser.parse_args()
    kinds = {names[arguments.kind]: 1} if arguments.kind else KINDS
    soak = soak_a_server(arguments.requests, kinds)
    first, last = soak.settled[0][1], soak.settled[-1][1]
    print(f"{sum(soak.counts.values())} requests in {soak.seconds:.0f} s: {dict(soak.counts)}")
    print(f"memory {first / 1024:.1f} MiB after the warm-up, {last / 1024:.1f} MiB at the end")
    print(f"{soak.growth:.3f} KiB a request; open answers {soak.open:g}, files {soak.files}")
    if arguments.output is not None and kinds is KINDS:
        append_results(arguments.output, [soak.record()])
    if arguments.requests >= FEWEST and soak.growth > LIMIT:
        sys.exit(f"the memory grows by {soak.growth:.2f} KiB a request; {LIMIT} is the limit")


if __name__ == "__main__":
    main()
