"""The commands as a user meets them: results on standard output, one-line errors, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import live
import pytest

from sailfish.bench.server import ServerProcess
from sailfish.data import demo_model

Typed = Callable[..., subprocess.CompletedProcess[str]]
GREEDY = ("--temperature", "0", "--max-tokens", "12")
BATCH = ("generate", "books-4m", "--jsonl-in", "in.jsonl", "--jsonl-out", "out.jsonl")
pytestmark = pytest.mark.slow


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    """Run `sailfish WORDS...` in an empty folder and return what became of it."""
    return partial(live.typed, cwd=tmp_path)


def test_a_prompt_is_continued_alike_from_argument_file_and_standard_input(
    typed: Typed, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("It was a dark", encoding="utf-8")
    from_argument = typed("generate", "books-4m", "It was a dark", *GREEDY)
    from_file = typed("generate", "books-4m", "--file", "prompt.txt", *GREEDY)
    from_stdin = typed("generate", "books-4m", *GREEDY, given="It was a dark")
    assert from_argument.stdout.strip()
    assert from_argument.stdout == from_file.stdout == from_stdin.stdout
    assert "12 tokens in" in from_argument.stderr


def test_a_batch_answers_every_line_and_names_the_ones_that_failed(typed: Typed, tmp_path: Path) -> None:
    lines = [
        {"id": "text", "prompt": "It was a dark"},
        {"id": "ids", "prompt": [5, 6, 7], "n": 2},
        {"id": "chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
        {"id": "wrong", "prompt": "a", "temperature": -1},
        {"id": "wizard", "messages": [{"role": "wizard", "content": "Hello"}]},
        {"id": "dict", "messages": [{"role": "user", "content": {"text": "Hello"}}]},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "out.jsonl").write_text("an older answer\n", encoding="utf-8")
    done = typed(*BATCH, *GREEDY)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("requests: 3 answered, 3 failed; see out.jsonl\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["chat", "dict", "ids", "ids", "text", "wizard", "wrong"]
    by_id = {row["id"]: row for row in rows}
    assert by_id["wrong"]["error"]["code"] == "invalid_value"
    assert by_id["wizard"]["error"]["message"].startswith("messages[0].role: ")
    assert by_id["dict"]["error"]["message"].startswith("messages[0].content: ")
    assert by_id["chat"]["usage"]["completion_tokens"] == 3
    assert by_id["text"]["text"]


def test_old_answers_outlive_a_batch_whose_engine_does_not_start(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    (tmp_path / "out.jsonl").write_text("an older answer\n", encoding="utf-8")
    assert typed(*BATCH, "--ctx", "1m").returncode == 2
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "an older answer\n"
    done = typed(*BATCH, *GREEDY)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        0,
        "requests: 1 answered, 0 failed; see out.jsonl",
    )
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["text"]


def test_a_conversation_goes_on_until_its_end(typed: Typed) -> None:
    done = typed("chat", "books-4m", *GREEDY, given="Hello\n/reset\nHello\n/exit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()[0], done.stdout.strip().splitlines()[-1]
    assert first == second, "after /reset the same question has the same greedy answer"


def test_an_engine_is_built_inspected_verified_and_refused_once_changed(typed: Typed, tmp_path: Path) -> None:
    built = typed("build", "books-4m", "-o", "own.engine", "--bundle")
    assert built.returncode == 0, built.stderr
    digest = built.stdout.split()[-1]
    assert digest in typed("inspect", "own.engine").stdout
    assert json.loads(typed("inspect", "own.engine", "--json").stdout)["digest"] == digest
    assert "intact" in typed("verify", "own.engine").stdout
    again = typed("build", "books-4m", "-o", "own.engine")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    [weights] = (tmp_path / "own.engine").glob("*.bin")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    changed = typed("verify", "own.engine")
    assert changed.returncode == 2
    assert "CHANGED" in changed.stdout
    assert changed.stderr.startswith("error: 1 of ")


def test_what_does_not_fit_is_refused_with_what_would(typed: Typed) -> None:
    done = typed("plan", "books-4m", "--memory", "300MiB", "--kv-memory", "1MiB", "--ctx", "2k")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "fits" in done.stderr


def test_a_plan_and_an_explanation_are_data_too(typed: Typed) -> None:
    plan = json.loads(typed("plan", "books-4m", "--target", "sm_90", "--json").stdout)
    assert plan["total_bytes"] == sum(line["bytes"] for line in plan["memory"])
    explained = json.loads(typed("explain", "books-4m", "--ctx", "1k", "--json").stdout)
    [context] = [row for row in explained["settings"] if row["setting"] == "context_tokens"]
    assert (context["requested"], context["from"], context["active"]) == ("1024", "--ctx", "1024")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("generate", "no/such-model-anywhere", "x", "--offline"), 2, "is not, or not wholly, in the cache"),
        (("generate", "books-4m", "x", "--ctx", "1m"), 2, "context_tokens is 1048576"),
        (("generate", "books-4m", "x", "--file", "y"), 2, "a prompt and --file were both given"),
        (("generate", "books-4m", "x", "--jsonl-in", "y"), 2, "belong together"),
        (BATCH[:2] + ("x",) + BATCH[2:], 2, "a batch and another prompt were both given"),
        ((*BATCH, "--file", "f"), 2, "a batch and another prompt were both given"),
        (BATCH, 2, "requests in.jsonl: No such file"),
        (("inspect", "org/name", "--offline", "--download"), 2, "--offline and --download"),
        (("verify", "absent.engine"), 2, "absent.engine"),
        (("plan", "books-4m", "--target", "sm_12"), 2, "sm_12"),
        (("bench", "engine", "books-4m", "--batches", "a"), 2, "--batches 'a'"),
    ],
)
def test_a_users_mistake_is_one_line(typed: Typed, words: tuple[str, ...], status: int, said: str) -> None:
    done = typed(*words)
    assert done.returncode == status
    lines = [line for line in done.stderr.splitlines() if not line.startswith("engine ")]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]


def test_a_damaged_checkpoint_is_named_before_anything_listens(typed: Typed, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(demo_model(), damaged)
    weights = damaged / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = typed("serve", "damaged", "--port", "0")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr.splitlines()[-1]
    assert "READY" not in done.stdout


def test_a_taken_port_is_told_before_a_model_is_loaded(typed: Typed) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = typed("serve", "books-4m", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "another program listens there" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_open_address_needs_a_key(typed: Typed) -> None:
    done = typed("serve", "books-4m", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "no API key is set" in done.stderr


def test_a_server_that_is_told_to_stop_while_it_loads_leaves_nothing_behind() -> None:
    """SIGTERM as soon as the engine process reports its first stage."""
    command = [sys.executable, "-m", "sailfish.cli.main", "serve", "books-4m", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " plan: " in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in rest


def test_a_served_model_has_the_name_it_was_given_and_ends_with_status_zero() -> None:
    with ServerProcess("books-4m", "--served-model-name", "novels", "--ctx", "512") as server:
        assert "novels on cpu" in server.log()
        assert "security: open to this machine only" in server.log()
        assert server.stop() == 0
