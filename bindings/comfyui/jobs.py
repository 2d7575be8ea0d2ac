"""Long native calls inside ComfyUI: its Interrupt button stops them, its progress bar shows how far they are."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import macula
from PIL import Image

from .plots import loss_curve

#: Seconds between two looks at ComfyUI's flag.
LOOK = 0.05


@contextmanager
def interruptible():
    """A cancel token for the native calls of its block. If the user interrupts, they stop in the middle, and what ComfyUI
    expects is raised."""
    done = threading.Event()

    def watch():
        while not done.wait(LOOK):
            if comfy.model_management.processing_interrupted():
                token.cancel()
                return

    comfy.model_management.throw_exception_if_processing_interrupted()
    with macula.CancelToken() as token:
        watcher = threading.Thread(target=watch, name="macula-interrupt", daemon=True)
        watcher.start()
        try:
            yield token
        except macula.Cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        finally:
            done.set()
            watcher.join()


class SearchProgress:
    """Shows a search in its node: the bar, the loss as a curve, and how long it will still take."""

    def __init__(self, batches, tune_steps, node_id):
        self.behind = {"search": 0, "tune": batches}
        self.total = batches + tune_steps
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(self.total, node_id=node_id)
        self.losses: list[tuple[int, float]] = []
        self.began: tuple[float, int] | None = None

    def __call__(self, now):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if now.stage not in self.behind:
            self.say(f"{now.stage}: {now.done} of {now.total}")
            return
        done = self.behind[now.stage] + now.done
        self.began = self.began or (time.monotonic(), done)
        picture = None
        if now.loss is not None:
            self.losses.append((done, now.loss))
            picture = ("JPEG", Image.fromarray(loss_curve(self.losses, self.total)), None)
        self.bar.update_absolute(done, self.total, picture)
        self.say(", ".join([f"{now.stage}: {now.done} of {now.total}", *self.details(done)]))

    def details(self, done):
        if self.losses:
            yield f"loss {self.losses[-1][1]:.4f}"
        start, first = self.began
        if done > first:
            left = (time.monotonic() - start) / (done - first) * (self.total - done)
            yield f"{int(left) // 60}:{int(left) % 60:02} left"

    def say(self, text):
        """Shows text in the node, where a server listens."""
        try:
            from server import PromptServer

            send = PromptServer.instance.send_progress_text
        except (ImportError, AttributeError):
            return
        if self.node_id is not None:
            send(text, self.node_id)
