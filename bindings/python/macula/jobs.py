"""Long native calls: told how far they are, stopped by a token, an exception or Ctrl-C."""

from __future__ import annotations

import math
import threading
from ctypes import addressof, byref, c_int32
from queue import SimpleQueue
from typing import Any, Callable, TypeVar

import numpy as np

from ._abi import Struct, macula_image, macula_progress, macula_progress_fn
from ._library import Closable, Lent, check, lent_array, library, receive

T = TypeVar("T")


class CancelToken(Closable):
    """A switch that stops the jobs that it was given to, from any thread."""

    def __init__(self) -> None:
        super().__init__(receive(library.macula_cancel_token_create), library.macula_cancel_token_free)

    def cancel(self) -> None:
        """Stops every job that runs with it, and each that starts later, until `reset`."""
        check(library.macula_cancel_token_cancel(self.pointer))

    def reset(self) -> None:
        """Makes it usable for another job."""
        check(library.macula_cancel_token_reset(self.pointer))

    @property
    def cancelled(self) -> bool:
        """Whether it is cancelled."""
        answer = c_int32()
        check(library.macula_cancel_token_is_cancelled(self.pointer, byref(answer)))
        return bool(answer.value)


class Progress:
    """How far a job is: `done` of `total` steps of `stage`. The arrays are copies, to be had during the call only.

    `loss`: of a search or tuning, the mean of the last ten batches; `None` elsewhere and before the first.
    """

    def __init__(self, told: macula_progress):
        self._told: macula_progress | None = told
        self.stage: str = told.stage.decode()
        self.done: int = told.done
        self.total: int = told.total
        self.loss: float | None = None if math.isnan(told.loss) else told.loss

    def __repr__(self) -> str:
        return f"{self.stage} {self.done} of {self.total}"

    @property
    def latent(self) -> np.ndarray | None:
        """The clean latent `[B, C, H, W]` as it is predicted now."""
        told = self._now().latent
        return lent_array(self, told.contents).copy() if told else None

    @property
    def preview(self) -> np.ndarray | None:
        """The first picture `[H, W, 3]` as it is predicted now, if `preview=True` was asked for and possible."""
        told = self._now().preview
        return picture(self, told.contents).copy() if told else None

    def _now(self) -> macula_progress:
        if self._told is None:
            raise ValueError("the arrays of a Progress are there during the call only")
        return self._told


def picture(owner: object, view: macula_image) -> np.ndarray:
    """A picture of the library as an array `[H, W, 3]` without a copy."""
    return np.asarray(Lent(owner, addressof(view.rgb.contents), (view.height, view.width, 3), "|u1"))


def tqdm_bar() -> Any:
    """The class of tqdm's bars."""
    try:
        from tqdm.auto import tqdm
    except ImportError as reason:
        raise ImportError("progress=True needs tqdm: pip install macula[progress]") from reason
    return tqdm


class Bar:
    """Shows a job by tqdm, one bar a stage."""

    def __init__(self) -> None:
        self._tqdm = tqdm_bar()
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self.close()
            self._stage, self._bar = progress.stage, self._tqdm(total=progress.total, desc=progress.stage)
        if progress.loss is not None:
            self._bar.set_postfix(loss=f"{progress.loss:.4f}", refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run(
    call: Callable[[], T],
    options: Struct,
    progress: Callable[[Progress], object] | bool | None,
    cancel: CancelToken | None,
) -> T:
    """Makes a native call with `options`, which tell it whom to ask. The call runs on a thread of its own, so that this
    one answers Ctrl-C at once; `progress` is called on this one. Whatever is raised here stops the call first.
    """
    bar = Bar() if progress is True else None
    listener: Callable[[Progress], object] | None = progress if callable(progress) else bar
    token = cancel or CancelToken()
    options.cancel = token.pointer
    asked: SimpleQueue[tuple[Progress, threading.Event] | None] = SimpleQueue()
    stopping = threading.Event()

    def tell(_: int, told: Any) -> int:
        answered = threading.Event()
        asked.put((Progress(told.contents), answered))
        while not answered.wait(0.1):
            if stopping.is_set():
                return 1
        return int(stopping.is_set())

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as reason:
            failure.append(reason)
        asked.put(None)

    outcome: list[T] = []
    failure: list[BaseException] = []
    callback = macula_progress_fn(tell)
    if listener:
        options.progress = callback
    worker = threading.Thread(target=work, name="macula")
    worker.start()
    try:
        while (question := asked.get()) is not None:
            told, answered = question
            try:
                if listener:
                    listener(told)
            finally:
                told._told = None
            answered.set()
    except BaseException:
        stopping.set()
        _stop(worker, token, reset=cancel is not None)
        raise
    finally:
        if bar:
            bar.close()
    worker.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _stop(worker: threading.Thread, token: CancelToken, reset: bool) -> None:
    """Stops a call and waits for its end, whatever else is raised meanwhile; a token of the caller's is left as it was."""
    reset = reset and not token.cancelled
    token.cancel()
    while worker.is_alive():
        try:
            worker.join()
        except KeyboardInterrupt:
            pass
    if reset:
        token.reset()
