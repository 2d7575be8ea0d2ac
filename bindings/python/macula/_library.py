"""The native library: found, loaded, and every function of it given its signature.

It is the file that `MACULA_LIBRARY` names, else the one inside this package, else what the system's loader finds.
"""

from __future__ import annotations

import os
import weakref
from ctypes import CDLL, byref, c_int64, c_void_p, pointer
from pathlib import Path
from typing import Any, Callable, TypeVar

import numpy as np

from ._abi import FUNCTIONS, Dtype, Struct, macula_tensor
from .errors import error

S = TypeVar("S", bound=Struct)
C = TypeVar("C", bound="Closable")

# What names a file or a folder.
StrPath = str | os.PathLike[str]


def _load() -> CDLL:
    inside = Path(__file__).parent / "native/libmacula.so.0"
    path = os.environ.get("MACULA_LIBRARY") or (str(inside) if inside.exists() else "libmacula.so.0")
    try:
        loaded = CDLL(path)
        for name, (result, parameters) in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, parameters
    except (OSError, AttributeError) as reason:
        raise ImportError(f"the native library can't be used: {reason}") from reason
    return loaded


library = _load()


def version() -> str:
    """The native library's version."""
    return library.macula_version_string().decode()


def check(status: int) -> None:
    """Raises what a status that is no success means. To be called on the thread that made the call, right after it."""
    if status:
        raise error(status, library.macula_last_error().decode())


def text(value: StrPath) -> bytes:
    """Text or a path for the library."""
    encoded = os.fspath(value).encode() if isinstance(value, (str, os.PathLike)) else None
    if encoded is None or b"\0" in encoded:
        raise ValueError(f"{value!r} is not text without NUL characters")
    return encoded


def receive(function: Any, *arguments: Any) -> int:
    """What a function gives by its last parameter: a handle."""
    made = c_void_p()
    check(function(*arguments, byref(made)))
    assert made.value is not None, "a call that succeeds gives a handle"
    return made.value


def info(struct: type[S], function: Any, *arguments: Any) -> S:
    """What a function fills in: an information struct, its last parameter."""
    filled = struct.new()
    check(function(*arguments, byref(filled)))
    return filled


class Handle:
    """Owns a handle of the library, and frees it when nobody uses this object any more."""

    def __init__(self, pointer: int, free: Callable[[int], int]):
        self._handle: int | None = pointer
        self._free = free
        self._finalizer = weakref.finalize(self, free, pointer)

    @property
    def pointer(self) -> int:
        """The handle, for functions of macula.h."""
        if self._handle is None:
            raise ValueError(f"this {type(self).__name__} is closed")
        return self._handle


class Closable(Handle):
    """A handle that may be closed, also by leaving a `with` block."""

    def close(self) -> None:
        """Frees the handle now; raises if it is at work. Closing twice does nothing."""
        if self._handle is not None:
            check(self._free(self._handle))
            self._finalizer.detach()
            self._handle = None

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lent:
    """Memory that a handle lends; NumPy arrays of it keep the handle alive and can't be written."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...], kind: str):
        self.owner = owner
        self.__array_interface__ = {"data": (address, True), "shape": shape, "typestr": kind, "version": 3}


_DTYPES: dict[np.dtype[Any], Dtype] = {np.dtype(np.float32): Dtype.F32, np.dtype(np.float16): Dtype.F16, np.dtype(np.int64): Dtype.I64}
_Shape = c_int64 * 8
_KINDS = {number: kind.str for kind, number in _DTYPES.items()}


def tensor(array: np.ndarray) -> macula_tensor:
    """A view of a C-contiguous array, which it keeps alive."""
    # Every denoising call comes here a few times, with cold caches: each object that is not made counts.
    address, shape = array.__array_interface__["data"][0], _Shape(*array.shape)
    made = macula_tensor(address, array.nbytes, shape, array.ndim, _DTYPES[array.dtype])
    made.array = array
    return made


def numbers(array: Any, dtype: type = np.float32) -> Any:
    """A pointer to a tensor of the array, without a copy where its type and order are right; NULL for `None`."""
    return None if array is None else pointer(tensor(np.ascontiguousarray(array, dtype=dtype)))


def lent_array(owner: object, lent: macula_tensor) -> np.ndarray:
    """A tensor of the library as an array without a copy."""
    return np.asarray(Lent(owner, lent.data, tuple(lent.shape[: lent.rank]), _KINDS[lent.dtype]))
