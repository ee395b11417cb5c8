"""One more API process: it shares a listening socket and attaches to a running engine. No torch."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from pathlib import Path

import msgspec

from sailfish.base import log
from sailfish.base.config import ServeConfig
from sailfish.base.errors import SailfishError
from sailfish.checkpoint.template import ChatTemplate
from sailfish.engine.client import AsyncEngine
from sailfish.serve.server import READY, ApiServer


def main() -> None:
    """Serve on the socket given by its number until a signal comes or the parent is gone.

    The configuration comes as one line of JSON on standard input: a command line would show the keys.
    """
    parser = argparse.ArgumentParser(prog="python -m sailfish.serve.api_process")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--engine-socket", type=Path, required=True)
    parser.add_argument("--chat-template", type=Path)
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args()
    log.configure(level=args.log_level)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServeConfig)
    with socket.socket(fileno=args.fd) as listener:
        try:
            asyncio.run(_serve(config, listener, args.engine_socket, args.chat_template))
        except SailfishError as error:
            logging.getLogger("sailfish.serve").error("%s", error)
            sys.exit(error.exit_code)


async def _serve(
    config: ServeConfig, listener: socket.socket, engine_socket: Path, chat_template: Path | None
) -> None:
    async with await AsyncEngine.attach(engine_socket) as engine:
        if chat_template is not None:
            engine.template = ChatTemplate.load(Path(engine.info.engine_dir), override=chat_template)
        server = ApiServer(engine, config)

        def parent_left() -> None:
            asyncio.get_running_loop().remove_reader(sys.stdin)
            server.drain()

        asyncio.get_running_loop().add_reader(sys.stdin, parent_left)
        await server.run_on([listener], _say_ready)


def _say_ready() -> None:
    sys.stdout.buffer.write(READY.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
