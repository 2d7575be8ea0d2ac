"""ONNX Runtime, loaded and checked by the library."""

from __future__ import annotations

import logging
import threading
from ctypes import byref
from typing import Callable

from ._abi import LogLevel, macula_log_fn, macula_runtime_info, macula_runtime_options
from ._library import Closable, StrPath, info, library, receive, text
from .options import choice

_LEVELS: dict[int, int] = {
    LogLevel.ERROR: logging.ERROR,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.INFO: logging.INFO,
    LogLevel.DEBUG: logging.DEBUG,
}


def _to_logging(level: int, target: str, message: str) -> None:
    name = target.replace("::", ".")
    logger = logging.getLogger(name if name.startswith("macula") else f"macula.{name}")
    logger.log(_LEVELS.get(level, logging.INFO), "%s", message)


class Runtime(Closable):
    """ONNX Runtime. One process uses one library of it, whichever was asked for first.

    - `library`: path of the shared library or of its folder; without it, the search order of macula.h.
    - `log`: receives level, target and text, on any thread; Python's `logging`, logger `macula`, if it is not given.
    - `log_level`: the least grave level that is heard.
    """

    def __init__(
        self,
        library: StrPath | None = None,
        *,
        log: Callable[[int, str, str], None] = _to_logging,
        log_level: LogLevel | str = LogLevel.WARNING,
    ):
        options = macula_runtime_options.new()
        options.library = text(library) if library is not None else None
        options.log_level = choice(LogLevel, log_level)
        # ctypes frees a callback with its last reference: it must live as long as the handle.
        options.log = macula_log_fn(lambda _, level, target, message: log(level, target.decode(), message.decode()))
        super().__init__(receive(_create, byref(options)), _Free(options.log))

    @property
    def version(self) -> str:
        """ONNX Runtime's version."""
        return self._info().version.decode()

    @property
    def path(self) -> str | None:
        """Absolute path of the library that was loaded."""
        path = self._info().library
        return path.decode() if path else None

    @property
    def providers(self) -> list[str]:
        """Names of the providers that it was compiled with."""
        found = self._info()
        return [found.providers[at].decode() for at in range(found.provider_count)]

    def _info(self) -> macula_runtime_info:
        return info(macula_runtime_info, library.macula_runtime_get_info, self.pointer)


_create = library.macula_runtime_create


class _Free:
    """Frees the handle; until then it keeps the callback that the handle calls."""

    def __init__(self, callback: object):
        self.callback = callback

    def __call__(self, pointer: int) -> int:
        return library.macula_runtime_free(pointer)


_shared: Runtime | None = None
_lock = threading.Lock()


def shared() -> Runtime:
    """The runtime of pipelines that were given none."""
    global _shared
    with _lock:
        if _shared is None or _shared._handle is None:
            _shared = Runtime()
        return _shared
