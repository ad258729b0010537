"""The soak at a small size, and 32 streams of which half leave."""

import asyncio
import json
import os

import httpx
import pytest

from cats.results import Result
from tests.serving.live import make_chat_model, make_models, serving
from tests.serving.scripted import make_scripted
from tests.serving.soak import CLIENTS, KINDS, Soak, run, until_idle


def test_requests_of_all_kinds_leave_nothing_open():
    models = make_models(make_chat_model(sparse=True), rows=16, context=512, queue=64)
    with serving(models) as address:
        soak = asyncio.run(run(address, os.getpid(), 200))
    assert sum(soak.counts.values()) == 200
    assert soak.counts.keys() == {kind.__name__ for kind in KINDS}
    assert soak.open == 0
    # connections that a client has closed are closed here too
    assert soak.files[1] <= soak.files[0] + 5


def test_growth_is_the_slope_of_the_memory_after_the_warm_up():
    memory = [(i, 1000 + 50 * min(i, 20) + 2 * i) for i in range(1, 101)]
    soak = Soak(memory=memory)
    assert soak.growth == pytest.approx(2)
    record = soak.record()
    assert Result.from_json(record.to_json()) == record


def test_streams_whose_neighbours_leave_are_whole():
    text = "A cat sat on the mat, and thought of 9 other mats."
    with serving(make_models(*make_scripted(text), queue=CLIENTS)) as address:

        async def stream(client, number):
            body = {"model": "tiny", "stream": True, "temperature": 0}
            body["messages"] = [{"role": "user", "content": f"number {number}"}]
            said = ""
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    if number % 2 and len(said) > number % 7:
                        return None
            return said

        async def all_streams():
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
                return await asyncio.gather(*(stream(client, i) for i in range(CLIENTS)))

        said = asyncio.run(all_streams())
        assert said[1::2] == [None] * (CLIENTS // 2)
        assert said[::2] == [text] * (CLIENTS // 2)
        assert asyncio.run(until_idle(address)) == 0
