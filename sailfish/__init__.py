"""Sailfish turns a Hugging Face checkpoint into a proven engine and serves it.

>>> import sailfish
>>> with sailfish.Engine(sailfish.find_or_build("books-4m")) as engine:
...     print(engine.generate("It was", sailfish.SamplingParams(max_tokens=20))[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sailfish.version import __version__

if TYPE_CHECKING:
    from sailfish.base.config import EngineConfig
    from sailfish.base.errors import SailfishError
    from sailfish.build.builder import build_engine
    from sailfish.build.cache import find_or_build
    from sailfish.compress.module import W4Linear, replace_linears
    from sailfish.engine.api import Chunk, Completion, EngineInfo, EngineStats, Options, SamplingParams
    from sailfish.engine.client import AsyncEngine
    from sailfish.engine.sync import Engine

_HOMES = {
    "AsyncEngine": "sailfish.engine.client",
    "Chunk": "sailfish.engine.api",
    "Completion": "sailfish.engine.api",
    "Engine": "sailfish.engine.sync",
    "EngineConfig": "sailfish.base.config",
    "EngineInfo": "sailfish.engine.api",
    "EngineStats": "sailfish.engine.api",
    "Options": "sailfish.engine.api",
    "SailfishError": "sailfish.base.errors",
    "SamplingParams": "sailfish.engine.api",
    "W4Linear": "sailfish.compress.module",
    "build_engine": "sailfish.build.builder",
    "find_or_build": "sailfish.build.cache",
    "replace_linears": "sailfish.compress.module",
}
"""Public name -> the module it lives in, imported when the name is first used."""

__all__ = [
    "AsyncEngine",
    "Chunk",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "Options",
    "SailfishError",
    "SamplingParams",
    "W4Linear",
    "__version__",
    "build_engine",
    "find_or_build",
    "replace_linears",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sailfish' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
