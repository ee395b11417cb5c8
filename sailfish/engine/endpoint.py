"""The engine process's private socket: accepts clients, feeds the loop's inbox, sends its events.

It runs in a thread of its own, so that heartbeats and statistics go out while a step is running.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import threading
import time
from pathlib import Path

import msgspec

from sailfish.base.errors import EngineError
from sailfish.engine import wire
from sailfish.engine.api import EngineInfo
from sailfish.engine.loop import Disconnect, EngineLoop

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_MAX_UNSENT_BYTES = 64 * 2**20
"""A client that reads so slowly is cut off; its sequences end."""


class Endpoint:
    """Serve one EngineLoop on an AF_UNIX socket that only this user can reach."""

    def __init__(self, path: Path, info: EngineInfo) -> None:
        self.path = path
        self._info = info
        self._engine: EngineLoop | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._next_client = 0
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)

    def start(self, engine: EngineLoop) -> None:
        """Listen; returns once clients can connect."""
        self._engine = engine
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Flush what is queued, close every connection, remove the socket."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def send(self, client: int, message: wire.ToClient) -> None:
        """Queue a message to a client; never blocks. A client that is gone is ignored."""
        self._loop.call_soon_threadsafe(self._write, client, wire.frame(message))

    def _write(self, client: int, data: bytes) -> None:
        writer = self._writers.get(client)
        if writer is None:
            return
        if writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            log.warning("client %d does not read; cutting it off", client)
            writer.transport.abort()
            return
        writer.write(data)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_unix_server(self._attend, path=str(self.path))
        self.path.chmod(0o600)
        self._ready.set()
        beat = asyncio.create_task(self._beat())
        await self._stopping.wait()
        beat.cancel()
        server.close()
        for writer in list(self._writers.values()):
            writer.close()
            try:
                await asyncio.wait_for(writer.wait_closed(), timeout=2.0)
            except (ConnectionError, TimeoutError):
                writer.transport.abort()
        self.path.unlink(missing_ok=True)

    async def _beat(self) -> None:
        assert self._engine is not None
        while True:
            await asyncio.sleep(_BEAT_S)
            since = self._engine.step_started_s
            stalled_s = 0.0 if since is None else time.monotonic() - since
            steps = self._engine.scheduler.stats.steps
            data = wire.frame(wire.Beat(steps, stalled_s, self._engine.is_draining))
            for client in list(self._writers):
                self._write(client, data)

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._engine is not None
        if not _is_same_user(writer.get_extra_info("socket")):
            writer.transport.abort()
            return
        client = self._next_client
        self._next_client += 1
        self._writers[client] = writer
        writer.write(wire.frame(wire.Hello(self._info)))
        try:
            while (message := await wire.read_to_engine(reader)) is not None:
                self._engine.inbox.put((client, message))
        except (msgspec.DecodeError, UnicodeDecodeError, EngineError) as error:
            log.warning("client %d sent a malformed frame: %s", client, error)
        finally:
            del self._writers[client]
            self._engine.inbox.put((client, Disconnect()))
            writer.close()


def _is_same_user(peer: socket.socket) -> bool:
    """Whether the process at the other end runs as this user (or the platform cannot say)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the socket's directory is readable by its owner only
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.getuid())
