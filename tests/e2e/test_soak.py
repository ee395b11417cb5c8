"""Two hundred mixed requests at once leave nothing behind, and each ends exactly once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from live import WAIT_S, Streamed, anonymous_bytes, ask, engine_of, is_idle, metrics, until

from sailfish.bench.server import ServerProcess

pytestmark = pytest.mark.slow
REQUESTS, AT_ONCE = 200, 16
CONTEXT_TOKENS = 1024
MAX_GROWTH_BYTES = 64 * 10**6
WORDS = ("the", "ship", "went", "down", "to", "old", "sea", "and", "men", "of", "that", "dark", "house")
KINDS = (
    "short", "short", "long", "long", "chat", "several", "stops", "logprobs", "left", "left", "gone",
    "prompts", "overlong_text", "overlong_answer", "deadline", "expires",
)  # fmt: skip


def request(kind: str, rng: random.Random) -> dict[str, Any]:
    """Return the body of one request."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randint(1, 24), "seed": rng.randrange(99)}
    body["stream"] = rng.random() < 0.5
    match kind:
        case "long":
            body |= {"prompt": " ".join(rng.choices(WORDS, k=400)), "max_tokens": rng.randint(50, 200)}
        case "chat":
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        case "several":
            body |= {"n": rng.randint(2, 5), "max_tokens": 30}
        case "stops":
            body |= {"stop": [" the", "e", "."], "max_tokens": 60}
        case "logprobs":
            body |= {"logprobs": 3, "echo": True, "stream": False}
        case "left" | "gone":
            body |= {"stream": kind == "left", "max_tokens": 500, "ignore_eos": True}
        case "prompts":
            body |= {"prompt": [prompt, "It"], "n": 2}
        case "overlong_text":
            body["prompt"] = " ".join(WORDS * 200)
        case "overlong_answer":
            body |= {"max_tokens": CONTEXT_TOKENS, "n": 2}
        case "deadline":
            body["deadline_s"] = WAIT_S
        case "expires":
            body |= {"deadline_s": 0.05, "max_tokens": 900, "ignore_eos": True}
    return {"model": "books-4m"} | body


def n_choices(body: dict[str, Any]) -> int:
    """Return how many answers a request asks for."""
    return body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)


async def send(client: httpx.AsyncClient, kind: str, body: dict[str, Any]) -> str:
    """Send one request, check that it ends exactly once, and say how."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if kind == "gone":
        try:
            await client.post(path, json=body, timeout=httpx.Timeout(WAIT_S, read=0.1))
        except httpx.ReadTimeout:
            return "left"
        return "complete"
    async with client.stream("POST", path, json=body) as reply:
        if reply.status_code != 200 or not body["stream"]:
            await reply.aread()
            return _whole(reply, n_choices(body))
        streamed = Streamed()
        async for line in reply.aiter_lines():
            streamed.take(line)
            if kind == "left" and any(streamed.texts.values()):
                return "left"
    streamed.check(n_choices(body))
    return streamed.errors[0]["code"] if streamed.errors else "complete"


def _whole(reply: httpx.Response, n: int) -> str:
    data = reply.json()
    if reply.status_code != 200:
        return str(data["error"]["code"])
    assert [choice["index"] for choice in data["choices"]] == list(range(n))
    assert all(choice["finish_reason"] in ("stop", "length") for choice in data["choices"])
    return "complete"


async def soak(url: str, kinds: list[str], rng: random.Random) -> tuple[Counter[tuple[str, str]], int]:
    """Send a request of each kind, so many at once; count (kind, end) and the sequences the engine met."""
    ends: Counter[tuple[str, str]] = Counter()
    waiting = [(kind, request(kind, rng)) for kind in kinds]
    n_sequences = sum(n_choices(body) for kind, body in waiting if kind != "overlong_text")

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            kind, body = waiting.pop()
            ends[kind, await send(client, kind, body)] += 1

    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
        await asyncio.gather(*(work(client) for _ in range(AT_ONCE)))
    return ends, n_sequences


ALLOWED = {
    "left": {"left", "complete"},
    "gone": {"left", "complete"},
    "overlong_text": {"context_length_exceeded"},
    "overlong_answer": {"context_length_exceeded"},
    "expires": {"deadline_exceeded", "overloaded"},
}
"""How a request of a kind may end, where that is not an answer."""


def test_two_hundred_mixed_requests_leave_nothing_behind() -> None:
    rng = random.Random(7)
    kinds = [KINDS[i % len(KINDS)] for i in range(REQUESTS)]
    rng.shuffle(kinds)
    flags = ("--ctx", str(CONTEXT_TOKENS), "--kv-memory", "4MiB", "--concurrency", "16")
    with ServerProcess("books-4m", *flags) as server:
        engine = engine_of(server.pid)
        ready_bytes = anonymous_bytes(engine.pid)
        before_text = ask(server.url).json()["choices"][0]["text"]
        asyncio.run(soak(server.url, list(KINDS) * 2, random.Random(1)))
        until(lambda: is_idle(server.url), "the server is idle after the warm-up")
        before = metrics(server.url)
        before_bytes = anonymous_bytes(engine.pid)
        start_s = time.monotonic()

        ends, n_sequences = asyncio.run(soak(server.url, kinds, rng))

        elapsed_s = time.monotonic() - start_s
        until(lambda: is_idle(server.url), "every block is free, nothing runs or waits")
        after = metrics(server.url)
        end_bytes = anonymous_bytes(engine.pid)
        assert ask(server.url).json()["choices"][0]["text"] == before_text
        assert "Traceback" not in server.log()
        assert server.stop() == 0

    assert ends.total() == REQUESTS
    for kind, end in ends:
        assert end in ALLOWED.get(kind, {"complete"}), (kind, end)
    assert ends["left", "left"] + ends["gone", "left"] > 10

    def grown(name: str) -> float:
        return after[name] - before[name]

    finished, refused = grown("sailfish_finished_sequences_total"), grown("sailfish_refused_sequences_total")
    assert finished + refused == n_sequences
    assert after["sailfish_step_errors_total"] == 0
    assert after["sailfish_preemptions_total"] > 0, "the pool was never too small"
    assert end_bytes - ready_bytes < MAX_GROWTH_BYTES
    assert grown("sailfish_device_reserved_bytes") < MAX_GROWTH_BYTES
    print(  # noqa: T201 - the figures, for whoever runs this with -s
        f"\n{REQUESTS} requests, {n_sequences} sequences in {elapsed_s:.1f} s; {finished:.0f} finished, "
        f"{refused:.0f} refused, {grown('sailfish_preemptions_total'):.0f} preemptions, "
        f"{grown('sailfish_generated_tokens_total'):.0f} tokens; "
        f"engine grew {(end_bytes - before_bytes) / 1e6:.2f} MB, "
        f"{(end_bytes - ready_bytes) / 1e6:.2f} MB since READY; "
        f"reserved {grown('sailfish_device_reserved_bytes') / 1e6:.2f} MB\n{dict(ends)}"
    )
