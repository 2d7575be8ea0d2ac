"""What a call of the library raises when it fails."""

from __future__ import annotations

from ._abi import Status


class MaculaError(Exception):
    """A call of the library failed. `status` tells a program what it can do about it, the text a person what was wrong."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = Status(status) if status in Status._value2member_map_ else status


class InvalidArgument(MaculaError, ValueError):
    """An argument is out of range, of the wrong shape, or does not fit the model."""


class Cancelled(MaculaError):
    """The job was stopped by its cancel token."""


class OutOfMemory(MaculaError, MemoryError):
    """Memory could not be had."""


_CLASSES: dict[int, type[MaculaError]] = {
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.CANCELLED: Cancelled,
    Status.OUT_OF_MEMORY: OutOfMemory,
}


def error(status: int, message: str) -> MaculaError:
    """The exception for a status."""
    return _CLASSES.get(status, MaculaError)(status, message)
