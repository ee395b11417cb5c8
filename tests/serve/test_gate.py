"""Who gets in, under which name, and what every reply carries."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serving import Running
from test_bad_input import CHAT, TEXT, check_error

from sailfish.base.config import ServeConfig
from sailfish.base.errors import ConfigError
from sailfish.serve.gateway.auth import load_keys
from sailfish.serve.gateway.gate import PUBLIC_PATHS
from sailfish.serve.routes import OPERATIONS
from sailfish.serve.server import bind

Start = Callable[..., Running]
KEYS = ServeConfig(api_keys="alice:alice-key-1,bob:bob-key-22")
ROUTES = [(each.method, each.path.replace("{model}", "fake")) for each in OPERATIONS]
ROUTES += [("GET", "/openapi.json"), ("GET", "/nothing"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/models")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_the_probes_needs_a_key(start: Start, method: str, path: str) -> None:
    running = start(config=KEYS)
    with running.client() as client, running.client(authorization="Bearer bob-key-22") as known:
        reply = client.request(method, path, json={})
        if path in PUBLIC_PATHS:
            assert reply.status_code == 200
        else:
            check_error(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["type"] == "authentication_error"
        assert known.request(method, path, json={}).status_code != 401


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Basic YTpi",
        b"alice-key-1",
        b"Bearer alice-key-",
        b"Bearer alice-key-1 alice-key-1",
        b"Bearer alice",
        b"Bearer ALICE-KEY-1",
        "Bearer schlüssel".encode(),
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 60_000,
    ],
    ids=range(11),
)
def test_a_wrong_key_is_401(start: Start, value: bytes) -> None:
    with start(config=KEYS).client() as client:
        reply = client.get("/v1/models", headers=[(b"authorization", value)])
        check_error(reply, 401, "invalid_api_key")
        assert "key-1" not in reply.text


def test_two_keys_at_once_and_a_mebibyte_of_key_are_refused(start: Start) -> None:
    running = start(config=KEYS)
    with running.client() as client:
        twice = [(b"authorization", b"Bearer alice-key-1"), (b"authorization", b"Bearer alice-key-1")]
        check_error(client.get("/v1/models", headers=twice), 401, "invalid_api_key")
    huge = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"k" * 2**20 + b"\r\n\r\n"
    reply = running.raw(huge)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 431")


def test_the_scheme_is_case_insensitive_and_the_key_names_the_tenant(start: Start) -> None:
    running = start(config=KEYS)
    with running.client(authorization="bearer alice-key-1") as client:
        assert client.post("/v1/completions", json=TEXT).status_code == 200
        assert client.post("/v1/completions", json={**TEXT, "cache_salt": "s"}).status_code == 200
    assert [each.options.tenant for each in running.engine.submissions] == ["alice", "alice:s"]


def test_every_known_key_is_compared_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    ring = load_keys(KEYS)
    assert ring.tenant([(b"authorization", b"Bearer alice-key-1")]) == "alice"
    assert len(compared) == 2 and all(len(a) == len(b) == 32 for a, b in compared)


def test_keys_come_from_a_file_and_from_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who may use this\nalice:alice-key-1\n\nkey-without-name\n")
    ring = load_keys(ServeConfig(api_keys_file=str(path), api_keys="env:env-key-333"))
    assert len(ring) == 3
    assert ring.tenant([(b"authorization", b"Bearer key-without-name")]) == "key-3"


@pytest.mark.parametrize("keys", ["short", "a:b:c d", "na me:long-enough-key", "a:long-enough,a:long-enough"])
def test_a_malformed_key_is_refused_without_being_shown(keys: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_keys(ServeConfig(api_keys=keys))
    assert "enough" not in str(caught.value) and "short" not in str(caught.value)


def test_a_missing_or_empty_key_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "empty"):
        (tmp_path / "empty").write_text("# nobody\n")
        with pytest.raises(ConfigError):
            load_keys(ServeConfig(api_keys_file=str(path)))


def test_without_keys_only_loopback_can_be_bound() -> None:
    with pytest.raises(ConfigError, match="no API key is set"):
        bind(ServeConfig(host="0.0.0.0", port=0))
    bind(ServeConfig(host="0.0.0.0", port=0, api_keys="a:long-enough-key")).close()
    bind(ServeConfig(host="localhost", port=0)).close()


def test_a_taken_port_is_one_clear_line() -> None:
    with bind(ServeConfig(port=0)) as taken, pytest.raises(ConfigError, match="another program listens"):
        bind(ServeConfig(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    "host",
    [
        *("evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "169.254.1.1", "[::2]", "[::1]evil.com"),
        *("localhost:80@evil.com", "localhost:", "[::1", "localhost:80:80", "[localhost]", "::1"),
    ],
)
def test_a_keyless_server_answers_to_loopback_names_only(shared: Running, host: str) -> None:
    with shared.client() as client:
        reply = client.get("/v1/models", headers={"host": host, "x-forwarded-host": "localhost"})
        check_error(reply, 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.1.2.3", "[::1]:8000"])
def test_a_keyless_server_answers_to_every_loopback_name(shared: Running, host: str) -> None:
    with shared.client() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_cors_is_closed_by_default(shared: Running) -> None:
    with shared.client(origin="http://localhost:3000") as client:
        assert "access-control-allow-origin" not in client.get("/v1/models").headers
        assert client.options("/v1/models").status_code == 405


def test_cors_lets_in_exactly_the_listed_origins(start: Start) -> None:
    config = ServeConfig(cors_origins="http://localhost:3000, https://ui.example", api_keys="a:long-enough")
    with start(config=config).client() as client:
        preflight = client.options("/v1/models", headers={"origin": "https://ui.example"})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://ui.example"
        for origin in ("http://localhost:3000.evil.com", "http://localhost", "null", "https://UI.example"):
            reply = client.options("/v1/models", headers={"origin": origin})
            assert reply.status_code == 401 and "access-control-allow-origin" not in reply.headers


def test_a_good_request_id_is_kept_and_a_bad_one_replaced(shared: Running) -> None:
    with shared.client() as client:
        for _ in range(2):
            reply = client.post("/v1/completions", json=TEXT, headers={"x-request-id": "abc-1"})
            assert reply.status_code == 200 and reply.headers["x-request-id"] == "abc-1"
        for bad in (b"a b", b"x" * 129, b"\xff", b""):
            reply = client.get("/livez", headers=[(b"x-request-id", bad)])
            assert reply.headers["x-request-id"].startswith("req-")
    injected = shared.raw(
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\nfake: 1\r\nConnection: close\r\n\r\n"
    )
    assert b"\nfake: 1" not in injected.lower()


def test_a_key_with_too_much_at_work_gets_429(start: Start) -> None:
    running = start(FakeEngine(hold_after=0), config=KEYS, requests_per_key=1)
    body = b'{"model":"fake","prompt":"ab"}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer alice-key-1\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with running.connect() as first, running.client() as client:
        first.sendall(head + body)
        running.wait(running.engine.held)
        reply = client.get("/v1/models", headers={"authorization": "Bearer alice-key-1"})
        check_error(reply, 429, "rate_limit_exceeded")
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert reply.headers["retry-after"] == "1" and reply.headers["x-should-retry"] == "true"
        assert client.get("/v1/models", headers={"authorization": "Bearer bob-key-22"}).status_code == 200
        running.call(running.engine.go_on.set)
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        running.wait_until_idle()
        assert client.get("/v1/models", headers={"authorization": "Bearer alice-key-1"}).status_code == 200


def test_tokens_go_there_and_back(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
        assert reply == {"count": 2, "max_model_len": 4096, "tokens": [97, 98], "token_strs": ["a", "b"]}
        chat = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()
        assert chat["tokens"] == list(b"#hi")
        assert client.post("/detokenize", json={"tokens": [97, 257]}).json() == {"prompt": "a</s>"}
        check_error(client.post("/detokenize", json={"tokens": [258]}), 400, "invalid_value", "tokens")
        check_error(client.post("/tokenize", json={}), 400, "missing_required_parameter", "prompt")
        info = client.get("/tokenizer_info").json()
        assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>")
        assert info["chat_template"] == "{{ messages }}"


def test_a_text_to_tokenise_need_not_fit_the_context(shared: Running) -> None:
    with shared.client() as client:
        assert client.post("/tokenize", json={"prompt": "a" * 100_000}).json()["count"] == 100_000
        too_long = {"prompt": "a" * (shared.server.site.limits.tokenize_chars + 1)}
        check_error(client.post("/tokenize", json=too_long), 400, "invalid_value", "prompt")


def test_readiness_tells_why_not(start: Start) -> None:
    running = start(FakeEngine(ready="no heartbeat from the engine process for 7 s"))
    with running.client() as client:
        assert client.get("/livez").status_code == 200
        for path in ("/readyz", "/health"):
            reply = client.get(path)
            check_error(reply, 503, "not_ready")
            assert "7 s" in reply.json()["error"]["message"] and reply.headers["retry-after"]


def test_the_listener_is_not_inherited_by_accident() -> None:
    with bind(ServeConfig(port=0)) as listener:
        assert not listener.get_inheritable() and listener.type == socket.SOCK_STREAM
