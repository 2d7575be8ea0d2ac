"""Tests of `macula.ray` on a local Ray with two workers, run by an environment that has the wheel with its extra `ray`.

Arguments: the repository, a folder to write in.
"""

import json
import os
import secrets
import shutil
import signal
import sys
import unittest
from pathlib import Path
from unittest import mock

# Ray reads these when it is imported: it tells nobody of its use, and writes no token into the home folder.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

import numpy as np
import pyarrow.parquet
import ray

import macula
import macula.ray

ROOT, FOLDER = map(Path, sys.argv[1:3])
MODEL = ROOT / "models/emoji/onnx"
SUBJECTS = ROOT / "models/emoji/subjects"
# Enough batches for a checkpoint, which is written after each ten, and for being stopped after it.
SEARCH = {"batches": 30, "batch": 1, "size": (16, 16), "seed": 5}
OCTOPUS = "a <s2> animal on a white background"


def setUpModule():
    # On a busy machine Ray takes longer to start than it waits for itself.
    for attempts_left in (2, 1, 0):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
            return
        except Exception as reason:
            if not attempts_left or "timed out during startup" not in str(reason):
                raise
            ray.shutdown()


def tearDownModule():
    ray.shutdown()


def lay_out(catalogue, name, subject, count=3):
    folder = catalogue / name
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        shutil.copy(SUBJECTS / subject / f"{number}.png", folder)
    return folder


def steps(reports, concept, pid=None):
    """How far the search for a concept was at each report, of one process or of all."""
    return [one.done for one in reports if one.concept == concept and one.stage == "search" and pid in (None, one.pid)]


def after_a_checkpoint(report):
    return report.stage == "search" and report.done > 10


class Finding(unittest.TestCase):
    """One catalogue: three concepts that can be found, two folders that are broken, a process that is killed."""

    words = {"<s1> apple": ("<s1>", "apple"), "octopus": ("<s2>", "animal"), "10_<s3> flower": ("<s3>", "flower")}

    @classmethod
    def setUpClass(cls):
        cls.catalogue, cls.results = FOLDER / "catalogue", FOLDER / "results"
        lay_out(cls.catalogue, "<s1> apple", "green-apple")
        octopus = lay_out(cls.catalogue, "octopus", "octopus")
        for number in (1, 2, 3):
            (octopus / f"{number}.txt").write_text(OCTOPUS + "\n")
        told = {"trigger": "<s2>", "class_noun": "animal", "density": 0.002}
        (octopus / "concept.json").write_text(json.dumps(told))
        lay_out(cls.catalogue, "10_<s3> flower", "sunflower")
        broken = lay_out(cls.catalogue, "<s4> cookie", "cookie")
        (broken / "2.png").write_bytes(b"no picture")
        lay_out(cls.catalogue, "nameless", "ram")
        (cls.catalogue / ".hidden").mkdir()
        cls.reports, cls.killed = [], []

        def kill_one(report):
            cls.reports.append(report)
            if not cls.killed and after_a_checkpoint(report):
                cls.killed.append(report)
                os.kill(report.pid, signal.SIGKILL)

        cls.table = macula.ray.discover_catalogue(MODEL, cls.catalogue, cls.results, progress=kill_one, **SEARCH)
        cls.index = pyarrow.parquet.read_table(cls.results / "index.parquet")
        cls.rows = {row["name"]: row for row in cls.table.to_pylist()}

    def test_a_killed_search_goes_on_where_it_was(self):
        (killed,) = self.killed
        pids = list(dict.fromkeys(one.pid for one in self.reports if one.concept == killed.concept))
        self.assertEqual((len(pids), pids[0]), (2, killed.pid))
        self.assertGreaterEqual(steps(self.reports, killed.concept, pids[1])[0], 10)
        self.assertEqual(steps(self.reports, killed.concept)[-1], SEARCH["batches"])

    def test_what_is_found_is_what_one_process_finds(self):
        self.assertEqual(self.words, {name: (self.rows[name]["trigger"], self.rows[name]["class_noun"]) for name in self.words})
        with macula.Pipeline(MODEL, threads=1) as pipeline:
            for name in {"octopus", self.killed[0].concept}:
                row, words = self.rows[name], self.words[name]
                options = {"density": 0.002, "prompts": [OCTOPUS] * 3} if name == "octopus" else {}
                pictures = sorted((self.catalogue / name).glob("*.png"))
                concept = pipeline.discover(pictures, *words, **SEARCH, **options)
                found = macula.Concept.load(self.results / row["file"])
                self.assertEqual((found.trigger, found.class_noun, found.layers), (*words, concept.layers))
                for at in range(len(concept.layers)):
                    np.testing.assert_array_equal(found.indices(at), concept.indices(at))
                self.assertEqual(row["density"], concept.density)
        self.assertLessEqual(self.rows["octopus"]["density"], 0.002)

    def test_a_broken_folder_is_reported_and_not_fatal(self):
        cookie, nameless = self.rows["<s4> cookie"], self.rows["nameless"]
        self.assertEqual((cookie["status"], cookie["file"]), ("failed", None))
        self.assertRegex(cookie["error"], "INVALID_FILE|2.png")
        self.assertEqual(nameless["status"], "failed")
        self.assertIn("trigger", nameless["error"])
        self.assertEqual(len(self.rows), 5)

    def test_the_index_is_a_parquet_file(self):
        self.assertTrue(self.index.equals(self.table))
        for name in self.words:
            row = self.rows[name]
            self.assertEqual((row["status"], row["error"], len(row["losses"])), ("found", None, SEARCH["batches"]))
            self.assertTrue(np.isfinite(row["losses"]).all())
            self.assertGreater(row["seconds"], 0)
        kept = {path.name for path in (self.results / "checkpoints").iterdir()}
        self.assertLessEqual(kept, {"<s4> cookie"})

    def test_only_what_is_missing_is_found_again(self):
        shutil.copy(SUBJECTS / "cookie/2.png", self.catalogue / "<s4> cookie")
        shutil.rmtree(self.catalogue / "nameless")
        reports = []
        table = macula.ray.discover_catalogue(MODEL, self.catalogue, self.results, progress=reports.append, **SEARCH)
        self.assertEqual({one.concept for one in reports}, {"<s4> cookie"})
        rows = {row["name"]: row for row in table.to_pylist()}
        self.assertEqual(rows["<s4> cookie"]["status"], "found")
        before = [(path.name, path.stat().st_mtime_ns) for path in sorted(self.results.iterdir())]
        with mock.patch("ray.remote", side_effect=AssertionError("a task was made")):
            again = macula.ray.discover_catalogue(MODEL, self.catalogue, self.results, progress=True, **SEARCH)
        self.assertTrue(again.equals(table))
        self.assertEqual([(path.name, path.stat().st_mtime_ns) for path in sorted(self.results.iterdir())], before)


class Stopping(unittest.TestCase):
    def test_what_progress_raises_stops_all_and_keeps_it(self):
        catalogue, results = FOLDER / "few", FOLDER / "few-results"
        lay_out(catalogue, "<s1> apple", "green-apple")
        lay_out(catalogue, "<s2> animal", "octopus")

        def stop(report):
            if after_a_checkpoint(report):
                raise InterruptedError(report.pid)

        find = lambda progress: macula.ray.discover_catalogue(MODEL, catalogue, results, progress=progress, **SEARCH)
        with self.assertRaises(InterruptedError):
            find(stop)
        self.assertFalse((results / "index.parquet").exists())
        reports = []
        table = find(reports.append)
        self.assertEqual(table["status"].to_pylist(), ["found", "found"])
        self.assertGreater(max(steps(reports, name)[0] for name in table["name"].to_pylist()), 9)

    def test_what_is_wrong_for_all_is_an_error_at_once(self):
        catalogue, results = FOLDER / "wrong", FOLDER / "wrong-results"
        lay_out(catalogue, "<s1> apple", "green-apple", count=1)
        for wrong, error in [({"densitee": 1}, TypeError), ({"checkpoint": "here"}, TypeError), ({"batches": -1}, ValueError)]:
            with self.assertRaises(error):
                macula.ray.discover_catalogue(MODEL, catalogue, results, **wrong)
        with self.assertRaises(FileNotFoundError):
            macula.ray.discover_catalogue("/nowhere", catalogue, results)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=1)
