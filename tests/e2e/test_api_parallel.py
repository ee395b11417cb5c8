"""One engine, many callers at once: threads and tasks of Python, the openai client, several API processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from live import (
    SMALL,
    WAIT_S,
    ask,
    descendants,
    engine_of,
    is_alive,
    metrics,
    ready_reason,
    streams,
    typed,
    until,
)

import sailfish
from sailfish.base.config import EngineConfig
from sailfish.base.errors import RequestError, SailfishError, WorkerDied
from sailfish.bench.server import ServerProcess
from sailfish.build.cache import find_or_build
from sailfish.data import DEMO_MODEL_NAME, demo_model
from sailfish.engine.api import Chunk, SamplingParams
from sailfish.engine.client import AsyncEngine

pytestmark = pytest.mark.slow
CONFIG = EngineConfig(context_tokens=512, max_sequences=8, step_tokens=64, kv_bytes=8 * 2**20)
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)
MOST_CONNECTIONS = 64
"""Enough for two processes to get one each."""
PROMPTS = [f"Chapter {i}. It was" for i in range(12)]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the packaged model."""
    cache = tmp_path_factory.mktemp("cache")
    return find_or_build(DEMO_MODEL_NAME, CONFIG, environ={"XDG_CACHE_HOME": str(cache)})


@pytest.fixture(scope="module")
def engine(engine_dir: Path) -> Iterator[sailfish.Engine]:
    """An engine at work, shared by the tests that leave it as it was."""
    with sailfish.Engine(engine_dir, config=CONFIG) as running:
        yield running


def process_of(engine: sailfish.Engine | AsyncEngine) -> psutil.Process:
    """Return an engine's process."""
    return psutil.Process(engine.info.pid)


def is_free(engine: sailfish.Engine) -> bool:
    """Tell whether an engine holds no block and runs nothing."""
    stats = engine.stats()
    return not (stats.blocks_used or stats.running or stats.waiting)


def test_threads_get_the_answers_they_would_get_alone(engine: sailfish.Engine) -> None:
    alone = [engine.generate(prompt, GREEDY)[0].text for prompt in PROMPTS]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(12) as pool:
        whole = pool.map(lambda prompt: engine.generate(prompt, GREEDY)[0].text, PROMPTS * 3)
        streamed = pool.map(lambda p: "".join(c.text for c in engine.stream(p, GREEDY)), PROMPTS)
        assert list(whole) == alone * 3
        assert list(streamed) == alone
    together = engine.generate_many(PROMPTS, GREEDY)
    assert [completions[0].text for completions in together] == alone
    until(lambda: is_free(engine), "every block is free")


def test_several_answers_with_a_seed_come_again(engine: sailfish.Engine) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, n=4)
    first, second = engine.generate("It was", params), engine.generate("It was", params)
    assert [completion.token_ids for completion in first] == [completion.token_ids for completion in second]
    assert len({completion.text for completion in first}) == 4
    other = engine.generate("It was", SamplingParams(max_tokens=16, temperature=1.0, seed=50, n=4))
    assert [completion.token_ids for completion in first] != [completion.token_ids for completion in other]


def test_a_stream_left_early_frees_its_blocks(engine: sailfish.Engine) -> None:
    aborted = engine.stats().finished.get("abort", 0)
    for _ in engine.stream("It was", ENDLESS):
        break
    opened = engine.stream_chat([{"role": "user", "content": "Hello"}], ENDLESS)
    next(opened)
    until(lambda: engine.stats().running, "the second one runs")
    opened.close()  # type: ignore[attr-defined]
    until(lambda: is_free(engine), "both are gone")
    assert engine.stats().finished["abort"] == aborted + 2


def test_a_wrong_request_raises_where_it_was_made(engine: sailfish.Engine) -> None:
    too_long = [5] * 512
    for make in (engine.generate, lambda prompt: list(engine.stream(prompt))):
        with pytest.raises(SailfishError) as caught:
            make(too_long)
        assert caught.value.code == "context_length_exceeded"
    assert engine.generate("It was", GREEDY)[0].text


def test_closing_ends_the_process_and_everyone_who_waits(engine_dir: Path) -> None:
    engine = sailfish.Engine(engine_dir, config=CONFIG)
    process = process_of(engine)
    began = threading.Barrier(5)

    def wait_for(answer: Callable[[], Iterator[Chunk]]) -> str:
        chunks = answer()
        next(chunks)
        began.wait(WAIT_S)
        try:
            return "".join(chunk.text for chunk in chunks)
        except WorkerDied as error:
            return error.code

    with ThreadPoolExecutor(8) as pool:
        left = [pool.submit(wait_for, lambda: engine.stream("It was", ENDLESS)) for _ in range(4)]
        began.wait(WAIT_S)
        process.suspend()  # so that none of them ends by itself
        closing = [pool.submit(engine.close) for _ in range(3)]
        assert [future.result(WAIT_S) for future in left] == ["engine_unavailable"] * 4
        process.resume()
        for future in closing:
            future.result(WAIT_S)
    engine.close()
    assert not is_alive(process)
    for use in (lambda: engine.generate("It was"), lambda: list(engine.stream("It was")), engine.stats):
        with pytest.raises(WorkerDied, match="closed"):
            use()


def test_the_async_engine_does_the_same(engine_dir: Path) -> None:
    async def main() -> psutil.Process:
        async with await AsyncEngine.start(engine_dir, config=CONFIG) as engine:
            process = process_of(engine)
            alone = [(await engine.generate(prompt, GREEDY))[0].text for prompt in PROMPTS[:4]]
            together = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS[:4]))
            assert [completions[0].text for completions in together] == alone
            [chat] = await engine.chat([{"role": "user", "content": "Hello"}], GREEDY)
            assert chat.usage.completion_tokens == len(chat.token_ids)
            async for _ in engine.stream("It was", ENDLESS):
                break
            waiting = asyncio.create_task(engine.generate("It was", ENDLESS))
            while not (await engine.stats()).running:
                await asyncio.sleep(0)
            waiting.cancel()
            while (await engine.stats()).blocks_used:
                await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(WorkerDied):
            await engine.stats()
        return process

    assert not is_alive(asyncio.run(asyncio.wait_for(main(), WAIT_S)))


def test_a_checkpoint_in_place_of_an_engine_is_one_clear_line() -> None:
    with pytest.raises(SailfishError) as caught:
        sailfish.Engine(demo_model())
    assert "sailfish build" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_engine_that_cannot_be_attached_leaves_no_process(engine_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.engine"
    shutil.copytree(engine_dir, damaged)
    (damaged / "tokenizer.json").chmod(0o644)
    (damaged / "tokenizer.json").write_text("{")
    before = {process.pid for process in descendants(psutil.Process().pid, "sailfish.engine.worker")}
    with pytest.raises(SailfishError):
        sailfish.Engine(damaged, config=CONFIG)
    after = {process.pid for process in descendants(psutil.Process().pid, "sailfish.engine.worker")}
    assert after == before


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Two API processes on one engine."""
    with ServerProcess("books-4m", *SMALL, "--api-processes", "2") as running:
        yield running


def test_the_openai_client_gets_what_it_asks_for(server: ServerProcess) -> None:
    chat: dict[str, Any] = {
        "model": "books-4m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12,
        "temperature": 0, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        whole = client.chat.completions.create(**chat).choices[0]
        pieces = list(client.chat.completions.create(**chat, stream=True))
        echoed = client.completions.create(
            model="books-4m", prompt="It was a dark", max_tokens=1, temperature=0, echo=True, logprobs=1
        ).choices[0]
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.message.content
    assert whole.logprobs is not None and whole.logprobs.content is not None
    scored = [c for p in pieces if p.choices[0].logprobs for c in p.choices[0].logprobs.content or []]
    assert [c.token for c in scored] == [c.token for c in whole.logprobs.content]
    assert [c.logprob for c in scored] == pytest.approx([c.logprob for c in whole.logprobs.content], abs=1e-4)
    assert "".join(c.token for c in scored) == whole.message.content
    for token in scored:  # greedy: the token drawn is the likeliest one
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    assert echoed.text.startswith("It was a dark")
    assert echoed.logprobs is not None
    assert "".join(echoed.logprobs.tokens or []) == echoed.text
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in echoed.logprobs.token_logprobs[1:])


def test_the_async_openai_client_streams_many_at_once(server: ServerProcess) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="books-4m", prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([piece.choices[0].text async for piece in stream if piece.choices])

            return await asyncio.gather(*map(one, PROMPTS))

    alone = [ask(server.url, prompt, max_tokens=16).json()["choices"][0]["text"] for prompt in PROMPTS]
    assert asyncio.run(main()) == alone


def test_offsets_point_at_the_tokens_in_the_text(server: ServerProcess) -> None:
    prompt = "It was é a 漢字 girl"
    choice = ask(server.url, prompt, echo=True, logprobs=0).json()["choices"][0]
    scored = choice["logprobs"]
    starts = list(zip(scored["tokens"], scored["text_offset"], strict=True))
    assert any(token.startswith("bytes:") for token, _ in starts)
    assert all(choice["text"].startswith(t, at) for t, at in starts if not t.startswith("bytes:"))
    zero = ask(server.url, prompt, echo=True, logprobs=0, max_tokens=0).json()
    assert zero["choices"][0]["text"] == prompt and zero["usage"]["completion_tokens"] == 0
    scores = zero["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[1:] == pytest.approx(scored["token_logprobs"][1 : len(scores)], abs=1e-4)


def test_variables_that_the_template_does_not_read_are_refused(server: ServerProcess) -> None:
    for name in ("nonsense", "bos_token", "raise_exception", "messages"):
        body = {"model": "books-4m", "messages": [{"role": "user", "content": "Hello"}]}
        reply = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body | {"chat_template_kwargs": {name: 1}},
            timeout=WAIT_S,
        )
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_wrong_template_is_found_before_the_engine_starts(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% if %}")
    ended = typed("serve", "books-4m", "--port", "0", "--chat-template", "bad.jinja", cwd=tmp_path)
    assert ended.returncode == 2 and "bad.jinja: the chat template is not usable" in ended.stderr
    assert "Traceback" not in ended.stderr and "weights" not in ended.stderr


def takes_part(pid: int) -> bool:
    """Tell whether a process holds a client's connection."""
    return any(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections("tcp"))


def test_a_drain_lets_every_api_process_end_what_it_has_at_work() -> None:
    with ServerProcess("books-4m", *SMALL, "--api-processes", "2") as server:
        [other] = descendants(server.pid, "sailfish.serve.api_process")
        running = streams(server.url, 1, ignore_eos=True)
        while not takes_part(other.pid):
            assert len(running) < MOST_CONNECTIONS, "one process takes every connection"
            running += streams(server.url, 1, ignore_eos=True)
        os.kill(server.pid, signal.SIGTERM)
        until(lambda: "draining" in ready_reason(server.url), "the server says that it drains")
        for stream in running:
            assert stream.result().finishes == {0: ["length"]}, stream.streamed.errors
        assert server.stop() == 0


def test_both_api_processes_answer_and_their_metrics_add_up() -> None:
    body = {"model": "books-4m", "prompt": "It was", "max_tokens": 1}
    kept: list[httpx.Client] = []
    with ServerProcess("books-4m", *SMALL, "--api-processes", "2") as server, contextlib.ExitStack() as stack:
        [other] = descendants(server.pid, "sailfish.serve.api_process")
        while not (takes_part(server.pid) and takes_part(other.pid)):
            assert len(kept) < MOST_CONNECTIONS, "one process takes every connection"
            kept.append(stack.enter_context(httpx.Client(base_url=server.url, timeout=WAIT_S)))
            assert kept[-1].post("/v1/completions", json=body).status_code == 200
        route = "sailfish_http_replies_total:/v1/completions"
        until(lambda: metrics(server.url)[route] == len(kept), "every reply is counted once")
        assert metrics(server.url)["sailfish_finished_sequences_total"] == len(kept)
        stack.close()
        engine = engine_of(server.pid)
        assert server.stop() == 0
        assert not is_alive(engine) and not is_alive(other)


def test_many_prompts_are_paced_and_a_wrong_one_ends_the_others(engine_dir: Path) -> None:
    with sailfish.Engine(engine_dir, config=replace(CONFIG, max_queue=2)) as engine:
        few = SamplingParams(max_tokens=2, temperature=0.0, n=3)
        answers = engine.generate_many(["It was"] * 40, few)
        assert [len(answer) for answer in answers] == [3] * 40
        drawn = [SamplingParams(max_tokens=8, seed=seed) for seed in (1, 2, 1)]
        one, other, again = (answer[0].text for answer in engine.generate_many(["It was"] * 3, drawn))
        assert one == again != other
        with pytest.raises(RequestError, match="3 params are not those of 2 prompts"):
            engine.generate_many(["It was"] * 2, drawn)
        with pytest.raises(RequestError):
            engine.generate_many(["It was", [10**6], "It was"], ENDLESS)
        until(lambda: engine.stats().running + engine.stats().waiting == 0, "the others end")


def test_a_script_that_forgets_to_close_ends_cleanly(engine_dir: Path) -> None:
    script = (
        "import sys, sailfish\n"
        "engine = sailfish.Engine(sys.argv[1])\n"
        "print(engine.info.pid, len(engine.generate('It was', sailfish.SamplingParams(max_tokens=3))))\n"
    )
    command = [sys.executable, "-c", script, str(engine_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert not psutil.pid_exists(int(done.stdout.split()[0]))
