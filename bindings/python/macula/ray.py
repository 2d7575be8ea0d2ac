"""Finds a whole catalogue of concepts with Ray, one task a concept, on one machine or many: `pip install macula[ray]`.

A catalogue is a folder that has one folder of pictures for each concept:

    catalogue/
      sks dog/          1.png 2.png 3.png
      green-apple/      1.jpg 2.jpg concept.json
      octopus/          a.webp a.txt b.webp b.txt concept.json class/

- `concept.json` gives the concept's `trigger` and `class_noun`, and may have any of `DiscoverOptions`, for this one alone.
- Without them the folder's name says both: its first word is the trigger, the others are the class noun. A number in
  front that ends in `_`, as in `10_sks dog`, is left out.
- A text file beside each picture, of the same name, is its prompt, with the trigger in it.
- A folder `class` has pictures of the class, for global scope.

Model, catalogue and results have to lie where every machine of the cluster finds them under the same path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

try:
    import pyarrow
    import pyarrow.parquet
    import ray
    from ray.util.queue import Queue
except ImportError as reason:
    raise ImportError("macula.ray needs Ray and PyArrow: pip install macula[ray]") from reason

from ._abi import macula_discover_options, macula_session_options
from ._library import StrPath
from .jobs import Progress, tqdm_bar
from .options import DiscoverOptions, SessionOptions, fill
from .pipeline import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

INDEX = "index.parquet"

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}

_SCHEMA = pyarrow.schema([
    ("name", pyarrow.string()),
    ("file", pyarrow.string()),
    ("trigger", pyarrow.string()),
    ("class_noun", pyarrow.string()),
    ("density", pyarrow.float64()),
    ("losses", pyarrow.list_(pyarrow.float64())),
    ("seconds", pyarrow.float64()),
    ("status", pyarrow.string()),
    ("error", pyarrow.string()),
    ("request", pyarrow.string()),
])


@dataclass(frozen=True)
class Report:
    """How far one concept is, and which process of which machine finds it."""

    concept: str
    host: str
    pid: int
    stage: str
    done: int
    total: int
    loss: float | None


def discover_catalogue(
    model: StrPath,
    catalogue: StrPath,
    results: StrPath,
    *,
    cpus: float = 1,
    gpus: float = 0,
    retries: int = 3,
    size: tuple[int, int] | None = None,
    session: SessionOptions | None = None,
    progress: Callable[[Report], object] | bool | None = None,
    **options: Unpack[DiscoverOptions],
) -> pyarrow.Table:
    """Finds every concept of a catalogue that was not found yet; gives the index, one row a concept.

    - `model`: the model's folder; `catalogue`: see above; `results`: a folder for concept files, `index.parquet` and the
      checkpoints of searches that have not ended.
    - `cpus`, `gpus`: what Ray sets aside for one concept; the model runs on as many threads as there are CPUs.
    - `retries`: how often a concept is tried again whose process died.
    - `size`: width and height that the pictures are read at, the model's own if not given; `session`: how the model is
      run; `options`: how all concepts are searched for.
    - `progress`: is told of each batch, here, and stops everything by raising; `True` shows a tqdm bar. Ctrl-C stops
      everything, too.

    A row has `name` (the folder's), `file` (in `results`), `trigger`, `class_noun`, `density`, `losses` (of each batch),
    `seconds` (since the search last began or went on), `status` (`"found"` or `"failed"`) and `error`. `request` is a hash
    of all that was asked for: a concept is found anew when its pictures or options change. One that failed is tried
    again by the next call; others go on meanwhile. A search that was broken off goes on from its checkpoint and finds
    what it would have found in one go.

    Ray is asked only if there is something to find; `ray.init` then starts it on this machine unless it runs already.
    """
    results = Path(results).absolute()
    results.mkdir(parents=True, exist_ok=True)
    model = os.path.abspath(model)
    session = {"threads": max(1, int(cpus)), **(session or {})}
    # What is wrong for all concepts is an error here, not in each of them.
    if not os.path.isdir(model):
        raise FileNotFoundError(f"there is no folder {model}")
    fill(macula_session_options.new(), session, SessionOptions)
    _check(options)
    folders = [one for one in Path(catalogue).absolute().iterdir() if one.is_dir() and not one.name.startswith(".")]
    index = _Index(results)
    wanted = []
    for folder in sorted(folders):
        try:
            request = _Request.read(folder, model, size, options)
        except Exception as reason:
            index.put({"name": folder.name, "status": "failed", "error": _said(reason)})
        else:
            if not index.has(request):
                wanted.append(request)
    if wanted:
        find = ray.remote(_find).options(num_cpus=cpus, num_gpus=gpus, max_retries=retries)
        reports = Queue(actor_options={"num_cpus": 0}) if callable(progress) else None
        tasks = {find.remote(one, session, results, reports): one for one in wanted}
        with closing(_outcomes(tasks, reports, progress)) as outcomes:
            for request, row in outcomes:
                index.put(row)
                # Only now: until its row is in the index, a concept counts as not found.
                if row["status"] == "found":
                    shutil.rmtree(request.checkpoint(results).parent)
    return index.table()


@dataclass(frozen=True)
class _Request:
    """All that one concept depends on."""

    name: str
    model: str
    trigger: str
    class_noun: str
    pictures: list[str]
    prompts: list[str] | None
    class_pictures: list[str]
    size: tuple[int, int] | None
    options: dict[str, Any]
    digest: str

    @classmethod
    def read(cls, folder: Path, model: str, size: tuple[int, int] | None, options: DiscoverOptions) -> _Request:
        """What a folder of the catalogue asks for."""
        words = re.match(r"(?:\d+_)?(?P<trigger>\S+)\s+(?P<class_noun>\S.*)", folder.name)
        told: dict[str, Any] = words.groupdict() if words else {}
        file = folder / "concept.json"
        if file.exists():
            told |= json.loads(file.read_text(encoding="utf-8"))
        try:
            trigger, class_noun = told.pop("trigger"), told.pop("class_noun")
        except KeyError as missing:
            raise ValueError(f"no {missing}: {file} does not give it, nor does the folder's name") from None
        told = {**options, **told}
        _check(told)
        pictures = _pictures(folder)
        if not pictures:
            raise ValueError(f"{folder} has no pictures ({', '.join(sorted(_SUFFIXES))})")
        texts = [one.with_suffix(".txt") for one in pictures]
        prompts = None
        if any(one.exists() for one in texts):
            prompts = [one.read_text(encoding="utf-8").strip() for one in texts]
        class_pictures = _pictures(folder / "class") if (folder / "class").is_dir() else []
        asked: dict[str, Any] = {
            "name": folder.name, "model": model, "trigger": trigger, "class_noun": class_noun, "prompts": prompts,
            "pictures": [str(one) for one in pictures], "class_pictures": [str(one) for one in class_pictures],
            "size": size, "options": told,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
        for picture in [*pictures, *class_pictures]:
            digest.update(hashlib.sha256(picture.read_bytes()).digest())
        return cls(**asked, digest=digest.hexdigest())

    def checkpoint(self, results: Path) -> Path:
        """Where the search is kept. A changed request has another place, and begins anew."""
        return results / "checkpoints" / self.name / self.digest


def _pictures(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.suffix.lower() in _SUFFIXES)


def _check(options: Mapping[str, Any]) -> None:
    """Raises for options that no search takes."""
    if "checkpoint" in options:
        raise TypeError("'checkpoint' is no option here: each concept has its own")
    fill(macula_discover_options.new(), options, DiscoverOptions)


def _said(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {reason}"


class _Index:
    """The Parquet file of what was found and what failed; written whole at each change, in one piece."""

    def __init__(self, results: Path):
        self._results = results
        self._rows: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError):
            self._rows = {row["name"]: row for row in pyarrow.parquet.read_table(results / INDEX).to_pylist()}

    def has(self, request: _Request) -> bool:
        """Whether just this was found, and its file is there."""
        row = self._rows.get(request.name)
        return (
            row is not None and row["status"] == "found" and row["request"] == request.digest
            and (self._results / row["file"]).exists()
        )

    def put(self, row: dict[str, Any]) -> None:
        row = {**dict.fromkeys(_SCHEMA.names), **row}
        if row == self._rows.get(row["name"]):
            return
        self._rows[row["name"]] = row
        partial = self._results / f"{INDEX}.partial"
        pyarrow.parquet.write_table(self.table(), partial)
        os.replace(partial, self._results / INDEX)

    def table(self) -> pyarrow.Table:
        return pyarrow.Table.from_pylist([self._rows[name] for name in sorted(self._rows)], schema=_SCHEMA)


def _outcomes(
    tasks: dict[Any, _Request], reports: Queue | None, progress: Callable[[Report], object] | bool | None
) -> Generator[tuple[_Request, dict[str, Any]], None, None]:
    """The row of each concept as it ends. Whatever is raised here, or where the rows are taken, stops all tasks."""
    bar = tqdm_bar()(total=len(tasks), desc="concepts") if progress is True else None
    try:
        while tasks:
            ended, _ = ray.wait(list(tasks), timeout=0.2)
            if reports is not None and callable(progress):
                for report in reports.get_nowait_batch(reports.qsize()):
                    progress(report)
            for task in ended:
                request = tasks.pop(task)
                try:
                    row = ray.get(task)
                except ray.exceptions.RayError as reason:
                    row = _row(request, status="failed", error=_said(reason))
                if bar is not None:
                    bar.update()
                yield request, row
    finally:
        if bar is not None:
            bar.close()
        for task in tasks:
            ray.cancel(task)
        if tasks:
            # Each writes its checkpoint, unless it is at work on something long.
            _, busy = ray.wait(list(tasks), num_returns=len(tasks), timeout=30)
            for task in busy:
                ray.cancel(task, force=True)


def _row(request: _Request, **found: Any) -> dict[str, Any]:
    return {
        "name": request.name, "trigger": request.trigger, "class_noun": request.class_noun, "request": request.digest,
        **found,
    }


def _find(request: _Request, session: SessionOptions, results: Path, reports: Queue | None) -> dict[str, Any]:
    """One concept, in a process of Ray's: its row."""
    began = time.monotonic()
    host = socket.gethostname()

    def tell(now: Progress) -> None:
        if reports is not None:
            reports.put(Report(request.name, host, os.getpid(), now.stage, now.done, now.total, now.loss))

    try:
        checkpoint = request.checkpoint(results)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        pipeline = _pipeline(request.model, tuple(session.items()))
        concept = pipeline.discover(
            request.pictures, request.trigger, request.class_noun, prompts=request.prompts,
            class_pictures=request.class_pictures, size=request.size, checkpoint=checkpoint, progress=tell,
            **request.options,
        )
        file = f"{request.name}.safetensors"
        concept.save(results / file)
        found = {"status": "found", "file": file, "density": concept.density, "losses": _losses(checkpoint)}
    except Exception as reason:
        found = {"status": "failed", "error": _said(reason)}
    return _row(request, seconds=time.monotonic() - began, **found)


@lru_cache(maxsize=1)
def _pipeline(model: str, session: tuple[tuple[str, Any], ...]) -> Pipeline:
    """The model, opened once in each process."""
    return Pipeline(model, **dict(session))


def _losses(checkpoint: Path) -> list[float]:
    """The loss of every batch, also of those before the search was broken off: the checkpoint is a safetensors file."""
    data = checkpoint.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:end])
    losses: list[float] = []
    for name in ("losses", "tuned.losses"):
        if name in tensors:
            first, last = (end + offset for offset in tensors[name]["data_offsets"])
            losses += memoryview(data[first:last]).cast("d").tolist()
    return losses
