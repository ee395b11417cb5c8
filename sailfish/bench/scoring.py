"""Asks a model how likely texts are and what it writes: through an engine process, or through HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from sailfish.base.errors import ConfigError, EngineError, RequestError, SailfishError
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine.api import Completion, SamplingParams
from sailfish.engine.client import AsyncEngine
from sailfish.engine.pace import Pace
from sailfish.quality.task_scores import Likelihood, TaskScores, collected
from sailfish.quality.tasks import AnswerQuestion, ChoiceQuestion, TaskSet, WordQuestion

Told = Callable[[int, int], None]
"""Told (requests answered, in all)."""
T = TypeVar("T")
N_CONNECTIONS = 16
_TIMEOUT_S = 600.0


class ScoredToken(NamedTuple):
    """What a model gave a token that came."""

    logprob: float
    is_top: bool
    """No other token was likelier."""


class Model(Protocol):
    """Whatever scores token ids and continues texts."""

    @property
    def room(self) -> int:
        """The most tokens of a text that can be scored."""

    async def score(self, ids: Sequence[int]) -> list[ScoredToken]:
        """Return what each token but the first was given."""

    async def write(self, ids: Sequence[int], until: Sequence[str], max_tokens: int) -> str:
        """Return the greedy continuation, up to the first text that ends it."""


class EngineModel:
    """An engine process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._pace = Pace(engine.info.max_sequences)
        self.room = engine.info.context_tokens - 1

    async def score(self, ids: Sequence[int]) -> list[ScoredToken]:
        """Return what each token but the first was given."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        entries = (await self._answer(ids, params)).prompt_logprobs or []
        found = [entry for entry in entries if entry is not None]
        return [ScoredToken(entry.logprob, entry.logprob >= entry.top[0].logprob) for entry in found]

    async def write(self, ids: Sequence[int], until: Sequence[str], max_tokens: int) -> str:
        """Return the greedy continuation, up to the first text that ends it."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=tuple(until))
        return (await self._answer(ids, params)).text

    async def _answer(self, ids: Sequence[int], params: SamplingParams) -> Completion:
        async with self._pace.places(1):
            return (await self._engine.generate(list(ids), params))[0]


class HttpModel:
    """A server that speaks OpenAI's completions with echo and log-probabilities, this one or another."""

    def __init__(self, url: str, *, api_key: str | None = None, name: str | None = None) -> None:
        """Ask the server at `url` ("http://host:port") what it serves; EngineError where none answers."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server", hint="use http://HOST:PORT", param="url")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._url = url
        self._base = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        host, port = parts.hostname, parts.port
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        for _ in range(N_CONNECTIONS):
            self._idle.put(kind(host, port, timeout=_TIMEOUT_S))
        self._places = asyncio.Semaphore(N_CONNECTIONS)
        data = self._ask("GET", "/models", None).get("data")
        served = [model for model in data if "id" in model] if isinstance(data, list) else []
        found = next((model for model in served if name in (None, model["id"])), None)
        if found is None:
            raise ConfigError(
                f"{url} serves {', '.join(str(model['id']) for model in served) or 'no model'}, not {name}",
                param="served",
            )
        self.name = str(found["id"])
        self.room = int(found.get("max_model_len") or 1 << 31) - 1

    async def score(self, ids: Sequence[int]) -> list[ScoredToken]:
        """Return what each token but the first was given."""
        choice = await self._complete(prompt=list(ids), max_tokens=1, echo=True, logprobs=1)
        try:
            given, scored = choice["logprobs"], slice(1, len(ids))
            pairs = zip(given["token_logprobs"][scored], given["top_logprobs"][scored], strict=True)
            found = [ScoredToken(float(logprob), logprob >= max(top.values())) for logprob, top in pairs]
        except (KeyError, TypeError, ValueError, AttributeError):
            found = []
        if len(found) != len(ids) - 1:
            raise EngineError(f"{self._url} does not score its prompts: echo and logprobs have no effect")
        return found

    async def write(self, ids: Sequence[int], until: Sequence[str], max_tokens: int) -> str:
        """Return the greedy continuation, up to the first text that ends it."""
        choice = await self._complete(prompt=list(ids), max_tokens=max_tokens, stop=list(until))
        return str(choice["text"])

    def close(self) -> None:
        """Close all connections."""
        while not self._idle.empty():
            self._idle.get().close()

    async def _complete(self, **values: Any) -> dict[str, Any]:
        body = json.dumps({"model": self.name, "temperature": 0.0, **values})
        async with self._places:
            reply = await asyncio.to_thread(self._ask, "POST", "/completions", body)
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineError(f"{self._url} answers, but not as OpenAI's completions do")
        choice: dict[str, Any] = choices[0]
        return choice

    def _ask(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        connection = self._idle.get()
        try:
            connection.request(method, self._base + path, body, self._headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EngineError(f"{self._url} does not answer: {error}", hint="is the server up?") from None
        finally:
            self._idle.put(connection)
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        reply: dict[str, Any] = found if isinstance(found, dict) else {}
        if response.status != 200:
            said = reply.get("error")
            message = said.get("message") if isinstance(said, dict) else f"status {response.status}"
            raise RequestError(f"{self._url} refused: {message}")
        return reply


async def score_windows(model: Model, windows: Sequence[Sequence[int]], told: Told) -> list[list[float]]:
    """Return the negative log-likelihood of every token but the first of each window, in nats."""

    async def one(window: Sequence[int]) -> list[float]:
        return [-token.logprob for token in await model.score(window)]

    return await _all([one(window) for window in windows], told)


async def score_tasks(model: Model, tokenizer: Tokenizer, tasks: TaskSet, told: Told) -> TaskScores:
    """Return the scores of a task set.

    A context and its continuation are tokenised together and cut apart after the context's own number of
    tokens; a text that is too long loses its beginning. Both as lm_eval does (`TemplateLM._encode_pair`).
    """

    async def likelihoods(context: str, continuations: Sequence[str]) -> list[Likelihood]:
        found = []
        for ids, n_scored in (_pair(tokenizer, context, text, model.room) for text in continuations):
            tokens = (await model.score(ids))[-n_scored:] if n_scored else []
            found.append(
                Likelihood(
                    logprob=sum(token.logprob for token in tokens),
                    is_greedy=all(token.is_top for token in tokens),
                )
            )
        return found

    async def one(question: ChoiceQuestion | WordQuestion | AnswerQuestion) -> list[Likelihood] | str:
        match question:
            case ChoiceQuestion():
                return await likelihoods(question.context, question.continuations)
            case WordQuestion():
                return await likelihoods(question.context, [question.word])
            case AnswerQuestion():
                n_tokens = min(question.max_tokens, model.room // 2)
                ids = tokenizer.encode(question.prompt, special=True)[-(model.room - n_tokens) :]
                return await model.write(ids, question.until, n_tokens)

    return collected(tasks, await _all([one(question) for question in tasks.questions], told))


def _pair(tokenizer: Tokenizer, context: str, continuation: str, room: int) -> tuple[list[int], int]:
    """Return the ids of a text, and how many of the last ones are the continuation's."""
    if not context:
        ids = tokenizer.encode(continuation, special=True, add_special=False)
        begin = _begin_id(tokenizer)
        ids = ids if ids[:1] == [begin] else [begin, *ids]
        return ids[-room:], min(len(ids) - 1, room - 1)
    stripped = context.rstrip()
    ids = tokenizer.encode(context + continuation, special=True)
    n_context = len(tokenizer.encode(stripped, special=True)) if stripped else 0
    return ids[-room:], min(max(len(ids) - n_context, 0), len(ids) - 1, room - 1)


def _begin_id(tokenizer: Tokenizer) -> int:
    """Return the token that stands before a text with no context: the begin-of-text one, else the end."""
    token = tokenizer.bos_token or tokenizer.eos_token
    ids = tokenizer.encode(token, special=True, add_special=False) if token else []
    if len(ids) != 1:
        raise ConfigError("a row has no context, and the tokenizer no token to begin a text with")
    return ids[0]


async def _all(work: Sequence[Coroutine[Any, Any, T]], told: Told) -> list[T]:
    """Do all side by side, telling how many are done; the first error ends the others."""
    n_done = 0

    async def counted(one: Coroutine[Any, Any, T]) -> T:
        nonlocal n_done
        result = await one
        n_done += 1
        told(n_done, len(work))
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(counted(one)) for one in work]
    except BaseExceptionGroup as errors:
        first = next((error for error in errors.exceptions if isinstance(error, SailfishError)), None)
        if first is None:
            raise
        raise first from None
    return [task.result() for task in tasks]
