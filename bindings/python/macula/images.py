"""Pictures as NumPy arrays `[H, W, 3]` of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, byref, c_size_t, c_uint8, cast
from typing import overload

import numpy as np

from ._abi import macula_image
from ._library import Handle, StrPath, check, library, receive, text
from .jobs import picture


class Images(Handle, Sequence[np.ndarray]):
    """Pictures of one size, each an array `[H, W, 3]` that shares the library's memory and can't be written."""

    def __init__(self, pointer: int):
        super().__init__(pointer, library.macula_images_free)
        count = c_size_t()
        check(library.macula_images_count(pointer, byref(count)))
        self._count = count.value

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, at: slice) -> list[np.ndarray]: ...

    def __getitem__(self, at: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(self._count))]
        if not -self._count <= at < self._count:
            raise IndexError(f"picture {at} of {self._count}")
        view = macula_image()
        check(library.macula_images_get(self.pointer, at % self._count, byref(view)))
        return picture(self, view)

    def save(self, at: int, file: StrPath) -> None:
        """Writes one picture as a PNG file."""
        write_png(self[at], file)

    def __repr__(self) -> str:
        return f"<macula.Images: {len(self)} of {self[0].shape[1]} x {self[0].shape[0]}>"


def view(array: np.ndarray) -> macula_image:
    """A view of an array `[H, W, 3]`, which it keeps alive."""
    pixels = np.ascontiguousarray(array)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is an array [H, W, 3] of uint8, not {list(pixels.shape)} of {pixels.dtype}")
    made = macula_image(cast(pixels.ctypes.data, POINTER(c_uint8)), pixels.shape[1], pixels.shape[0])
    made.array = pixels
    return made


def read_image(file: StrPath, width: int, height: int) -> np.ndarray:
    """Reads a PNG, JPEG or WebP file: upright, cropped around its centre to the wanted proportions, and scaled."""
    if not (0 < width < 2**32 and 0 < height < 2**32):
        raise ValueError(f"{width} x {height} is no size of a picture")
    return Images(receive(library.macula_images_read, text(file), width, height))[0]


def write_png(array: np.ndarray, file: StrPath) -> None:
    """Writes an array `[H, W, 3]` of bytes as a PNG file."""
    check(library.macula_image_write_png(byref(view(array)), text(file)))
