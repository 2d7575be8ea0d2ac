"""Tests of the Python package, run by an environment that has nothing but its wheel, NumPy and tqdm.

Arguments: the repository, a folder to write in, and the file of what the C compiler says of macula.h.
"""

import ctypes
import gc
import io
import json
import os
import re
import signal
import sys
import threading
import time
import unittest
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import numpy as np

import macula
from macula import _abi, _library

ROOT, FOLDER, LAYOUT = map(Path, sys.argv[1:4])
MODEL = ROOT / "models/emoji/onnx"
QUICK = {"steps": 2, "guidance": 1.0, "seed": 7}


def first_weights(pipeline, count):
    """A concept of the first weights of every projection."""
    layers = {one.path: ((one.out_features, one.in_features), range(count)) for one in pipeline.projections}
    return macula.Concept.create(layers, pipeline.fingerprint, title="a test", trigger="cat")


class WithPipeline(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pipeline = macula.Pipeline(MODEL)
        cls.base = cls.pipeline.draw("a cat", **QUICK)[0].copy()

    @classmethod
    def tearDownClass(cls):
        cls.pipeline.close()

    def assert_draws_as_before(self):
        np.testing.assert_array_equal(self.pipeline.draw("a cat", **QUICK)[0], self.base)


class Signatures(unittest.TestCase):
    """ctypes believes what it is told, so everything is held against the C compiler and the list of exports."""

    @classmethod
    def setUpClass(cls):
        cls.said = [json.loads(line) for line in LAYOUT.read_text().splitlines()]

    def test_every_export_is_bound(self):
        exports = (ROOT / "include/exports.txt").read_text().split()
        self.assertEqual(sorted(_abi.FUNCTIONS), exports)

    def test_structs_lie_as_in_c(self):
        structs = [one for one in self.said if one["kind"] == "struct"]
        self.assertGreater(len(structs), 15)
        bound = {name for name, one in vars(_abi).items() if isinstance(one, type) and issubclass(one, _abi.Struct)}
        self.assertEqual(bound - {"Struct"}, {one["name"] for one in structs})
        for said in structs:
            struct = getattr(_abi, said["name"])
            members = [[name, getattr(struct, name).offset, getattr(struct, name).size] for name, *_ in struct._fields_]
            self.assertEqual((ctypes.sizeof(struct), members), (said["size"], said["members"]), said["name"])
            if "initial" in said:
                self.assertEqual(bytes(struct.new()).hex(), said["initial"], said["name"])

    def test_functions_take_what_c_takes(self):
        functions = [one for one in self.said if one["kind"] == "function"]
        self.assertEqual({one["name"] for one in functions}, set(_abi.FUNCTIONS))
        for said in functions:
            result, parameters = _abi.FUNCTIONS[said["name"]]
            self.assertEqual(len(parameters), len(said["parameters"]), said["name"])
            for bound, wanted in zip([result, *parameters], [said["result"], *said["parameters"]]):
                self.assertEqual(self.described(bound), wanted, said["name"])

    @staticmethod
    def described(bound):
        """`["pointer", what to]`, or `["number", bytes]`."""
        if bound is ctypes.c_void_p:
            return ["pointer", ""]
        if bound is ctypes.c_char_p:
            return ["pointer", "char"]
        if hasattr(bound, "contents"):
            to = bound._type_
            return ["pointer", to.__name__ if issubclass(to, ctypes.Structure) else f"{ctypes.sizeof(to)} bytes"]
        return ["number", ctypes.sizeof(bound)]


class Drawing(WithPipeline):
    def test_the_readme_runs(self):
        readme = (ROOT / "bindings/python/README.md").read_text()
        code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
        code = code.replace('"models/', f'"{ROOT}/models/').replace('"apple.png"', f'"{FOLDER}/apple.png"')
        with mock.patch("builtins.print") as told:
            exec(code, {})
        self.assertGreater(told.call_count, 20)
        self.assertTrue((FOLDER / "apple.png").read_bytes().startswith(b"\x89PNG"))

    def test_pictures_share_the_librarys_memory(self):
        images = self.pipeline.draw("a cat", batch=2, **QUICK)
        view = _abi.macula_image()
        _library.check(_library.library.macula_images_get(images.pointer, 1, ctypes.byref(view)))
        second = images[1]
        self.assertEqual(second.ctypes.data, ctypes.addressof(view.rgb.contents))
        self.assertFalse(second.flags.writeable)
        self.assertEqual(([len(images), len(images[:]), images[-1].shape]), [2, 2, self.base.shape])
        before = second.copy()
        del images
        gc.collect()
        self.pipeline.draw("a dog", **QUICK)
        np.testing.assert_array_equal(second, before)

    def test_pictures_are_written_and_read(self):
        macula.write_png(self.base, FOLDER / "base.png")
        read = macula.read_image(FOLDER / "base.png", *self.pipeline.size)
        np.testing.assert_array_equal(read, self.base)
        with self.assertRaisesRegex(ValueError, r"\[H, W, 3\] of uint8"):
            macula.write_png(self.base.astype(np.float32), FOLDER / "no.png")

    def test_start_noise_and_pictures_are_taken(self):
        noise = np.random.default_rng(1).standard_normal((1, *self.pipeline.latent_shape), dtype=np.float32)
        one, other = (self.pipeline.draw("a cat", noise=noise, **QUICK | {"seed": seed})[0] for seed in (1, 2))
        np.testing.assert_array_equal(one, other)
        kept = self.pipeline.draw("a cat", start_image=self.base, start_step=49, **QUICK | {"steps": 50})[0]
        self.assertLess(np.abs(kept.astype(int) - self.base).mean(), 8)

    def test_progress_is_told(self):
        told = []
        self.pipeline.draw("a cat", preview=True, progress=lambda now: told.append((now.done, now.latent, now.preview)), **QUICK)
        self.assertEqual([done for done, *_ in told], [0, 1, 2])
        latent, preview = told[-1][1:]
        self.assertEqual((latent.shape[1:], preview.shape), (self.pipeline.latent_shape, self.base.shape))
        bar = io.StringIO()
        with redirect_stderr(bar):
            self.pipeline.draw("a cat", progress=True, **QUICK)
        self.assertIn("2/2", bar.getvalue())

    def test_what_progress_raises_stops_the_job(self):
        def stop(now):
            raise KeyError(now.done)

        for thread in ("main", "other"):
            with self.subTest(thread), self.assertRaises(KeyError):
                on_thread(thread, lambda: self.pipeline.draw("a cat", progress=stop, **QUICK))
        self.assert_draws_as_before()

    def test_a_token_stops_from_another_thread(self):
        token = macula.CancelToken()
        timer = threading.Timer(0.2, token.cancel)
        timer.start()
        with self.assertRaises(macula.Cancelled) as raised:
            self.pipeline.draw("a cat", cancel=token, **QUICK | {"steps": 1000})
        self.assertEqual((raised.exception.status, token.cancelled), (macula.Status.CANCELLED, True))
        token.reset()
        self.pipeline.draw("a cat", cancel=token, **QUICK)

    def test_control_c_stops_a_job_and_leaves_tokens_alone(self):
        # Python leaves a signal ignored that was ignored when it started, as in a shell's background job.
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        token = macula.CancelToken()
        for progress in (None, lambda now: None):
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            start = time.monotonic()
            with self.assertRaises(KeyboardInterrupt):
                self.pipeline.draw("a cat", cancel=token, progress=progress, **QUICK | {"steps": 1000})
            self.assertLess(time.monotonic() - start, 10)
            self.assertFalse(token.cancelled)
            timer.join()
        self.assert_draws_as_before()

    def test_a_second_job_is_busy(self):
        def second(now):
            self.pipeline.encode_prompt("a cat")

        with self.assertRaises(macula.MaculaError) as raised:
            self.pipeline.draw("a cat", progress=second, **QUICK)
        self.assertEqual(raised.exception.status, macula.Status.BUSY)

    def test_other_threads_run_during_a_call(self):
        """With the GIL held, the longest wait of the other thread would be the whole call."""
        ended, moments = threading.Event(), []

        def count():
            while not ended.is_set():
                moments.append(time.monotonic())
                time.sleep(0.001)

        images = ctypes.c_void_p()
        options = _abi.macula_draw_options.new()
        options.prompt, options.steps, options.guidance = b"a cat", 20, 1.0
        other = threading.Thread(target=count)
        other.start()
        start = time.monotonic()
        status = _library.library.macula_pipeline_draw(self.pipeline.pointer, ctypes.byref(options), ctypes.byref(images))
        end = time.monotonic()
        ended.set()
        other.join()
        _library.check(status)
        macula.Images(images.value)
        during = [start, *(moment for moment in moments if start < moment < end), end]
        self.assertLess(max(np.diff(during)), (end - start) / 2)


class Concepts(WithPipeline):
    def test_composing_acts_and_clearing_restores(self):
        few, many = first_weights(self.pipeline, 8), first_weights(self.pipeline, 64)
        self.pipeline.compose(many, macula.Term(few, strength=0.5))
        self.assertTrue((self.pipeline.draw("a cat", **QUICK)[0] != self.base).any())
        self.pipeline.clear()
        self.assert_draws_as_before()
        self.pipeline.compose(macula.Term(many, scope="local", words="cat"))
        self.pipeline.draw("a cat", **QUICK)
        self.pipeline.compose(macula.Term(many, scope=macula.Scope.LOCAL, tokens=[1, 2]))
        self.assertTrue((self.pipeline.draw("a cat", **QUICK)[0] != self.base).any())
        self.pipeline.compose()
        self.assert_draws_as_before()

    def test_sets_are_those_of_python(self):
        rng = np.random.default_rng(3)
        weights = {"b.to_k": (4, 8), "a.to_v": (6, 8)}
        sets = [
            {path: np.flatnonzero(rng.random(rows * columns) < 0.4) for path, (rows, columns) in weights.items()}
            for _ in range(2)
        ]
        one, other = (
            macula.Concept.create({path: (weights[path], chosen[path]) for path in weights}, "ab" * 32) for chosen in sets
        )
        for made, operation in [(one | other, set.union), (one & other, set.intersection), (one - other, set.difference)]:
            for at, layer in enumerate(made.layers):
                wanted = operation(*(set(chosen[layer.path].tolist()) for chosen in sets))
                self.assertEqual(made.indices(at).tolist(), sorted(wanted))
        both, either = (one & other).neurons, (one | other).neurons
        self.assertEqual(one.overlap(other), macula.Overlap(both, either, both / either))
        self.assertEqual(sum(layer.union for layer in one.overlap_by_layer(other).values()), either)

    def test_files_keep_everything(self):
        concept = first_weights(self.pipeline, 8)
        concept.save(FOLDER / "few.safetensors")
        for read in (macula.Concept.load(FOLDER / "few.safetensors"),
                     macula.Concept.from_bytes((FOLDER / "few.safetensors").read_bytes())):
            self.assertEqual((read.metadata, read.layers), (concept.metadata, concept.layers))
            self.assertEqual((read.trigger, read.title, read.role, read.scope), ("cat", "a test", 0, 1))
            self.assertAlmostEqual(read.density, read.neurons / read.weights)

    def test_values_are_kept_and_act(self):
        projections = self.pipeline.projections
        layers = {one.path: ((one.out_features, one.in_features), np.arange(64)) for one in projections}
        values = {one.path: np.linspace(-0.5, 0.5, 64, dtype=np.float32) for one in projections}
        tuned, shut = (macula.Concept.create(layers, self.pipeline.fingerprint, values=v) for v in (values, None))
        self.assertEqual((tuned.precision, shut.precision), (macula.Values.FLOAT16, macula.Values.NONE))
        np.testing.assert_array_equal(tuned.values(0), values[tuned.layers[0].path].astype(np.float16))
        self.assertFalse(shut.values(0).any())
        self.assertEqual(tuned.metadata["macula.values"], "float16")
        drawn = []
        for concept in (tuned, shut):
            self.pipeline.compose(concept)
            drawn.append(self.pipeline.draw("a cat", **QUICK)[0])
        self.assertTrue((drawn[0] != drawn[1]).any())
        self.pipeline.clear()
        self.assert_draws_as_before()
        with self.assertRaisesRegex(macula.InvalidArgument, "tuned values"):
            tuned | shut
        with self.assertRaisesRegex(ValueError, "63 values"):
            macula.Concept.create(layers, "ab" * 32, values={path: one[1:] for path, one in values.items()})


class Discovering(WithPipeline):
    """Searches on small pictures with few batches; what they find is the business of the library's own tests."""

    SEARCH = {"batches": 16, "batch": 2, "seed": 5}

    def setUp(self):
        pictures = [self.pipeline.draw("a cat", width=32, height=32, **QUICK | {"seed": seed})[0] for seed in (1, 2)]
        self.subject = (pictures, "<s1>", "cat")

    @staticmethod
    def neurons(concept):
        return {layer.path: concept.indices(at).tolist() for at, layer in enumerate(concept.layers)}

    def test_a_search_is_told(self):
        told, bar = [], io.StringIO()
        found = self.pipeline.discover(*self.subject, progress=told.append, **self.SEARCH)
        losses = [one.loss for one in told if one.stage == "search"]
        self.assertEqual((len(losses), losses[0]), (17, None))
        self.assertTrue(np.isfinite(losses[1:]).all())
        with redirect_stderr(bar):
            again = self.pipeline.discover(*self.subject, progress=True, **self.SEARCH)
        self.assertRegex(bar.getvalue(), r"search: .*16/16.*loss=\d")
        self.assertEqual(self.neurons(found), self.neurons(again))
        self.assertEqual((found.trigger, found.class_noun), ("<s1>", "cat"))
        self.assertGreater(found.neurons, 0)
        # What is computed again changes nothing.
        again = self.pipeline.discover(*self.subject, activation_bytes=1, **self.SEARCH)
        self.assertEqual(self.neurons(found), self.neurons(again))

    def test_self_attention_is_searched_and_composed(self):
        search = {**self.SEARCH, "attention": "self", "method": "saliency", "drawn_pictures": 0}
        with self.assertRaisesRegex(macula.InvalidArgument, "global"):
            self.pipeline.discover(*self.subject, **search)
        found = self.pipeline.discover(*self.subject, scope="global", **search)
        self.assertTrue(all(".attn1.to_" in layer.path for layer in found.layers))
        with self.assertRaisesRegex(macula.MaculaError, "self-attention"):
            self.pipeline.compose(found)
        with macula.Pipeline(MODEL, self_attention=True) as pipeline:
            base = pipeline.draw("a cat", **QUICK)[0].astype(int)
            pipeline.compose(found)
            self.assertGreater(np.abs(pipeline.draw("a cat", **QUICK)[0] - base).max(), 2)
            pipeline.clear()
            np.testing.assert_array_equal(pipeline.draw("a cat", **QUICK)[0], base)

    def test_concepts_are_tuned_together(self):
        pictures, search = self.subject[0], {**self.SEARCH, "method": "saliency", "batches": 1}
        found = [self.pipeline.discover(pictures, trigger, "cat", **search) for trigger in ("<s1>", "<s2>")]
        companions = [macula.Companion(one, pictures) for one in found]
        options, told = {"steps": 3, "batch": 2, "scenes": 4, "values": "quaternary"}, []
        tuned = self.pipeline.tune_together(companions, progress=told.append, **options)
        self.assertEqual([one.done for one in told if one.stage == "tune"], [0, 1, 2, 3])
        for one, before in zip(tuned, found, strict=True):
            self.assertEqual((one.trigger, self.neurons(one)), (before.trigger, self.neurons(before)))
            self.assertEqual((before.precision, one.precision), (macula.Values.NONE, macula.Values.QUATERNARY))
        companions[1].prompts = ["a <s2> cat on a red background"] * len(pictures)
        again = self.pipeline.tune_together(companions, **options)
        self.assertNotEqual(again[1].values(0).tolist(), tuned[1].values(0).tolist())
        companions[1].prompts = ["a <s2> cat"]
        with self.assertRaisesRegex(ValueError, "1 prompts for 2 pictures"):
            self.pipeline.tune_together(companions)
        with self.assertRaisesRegex(macula.InvalidArgument, "1 concepts"):
            self.pipeline.tune_together(companions[:1])
        with self.assertRaises(TypeError):
            self.pipeline.tune_together(companions[:1], colour="red")
        self.assert_draws_as_before()

    def test_prompts_are_looked_at(self):
        plain = self.pipeline.discover(*self.subject, **self.SEARCH)
        usual, other = (
            self.pipeline.discover(*self.subject, prompts=[prompt] * 2, **self.SEARCH)
            for prompt in ("a <s1> cat", "a <s1> cat on a red background")
        )
        self.assertEqual(self.neurons(plain), self.neurons(usual))
        self.assertNotEqual(self.neurons(plain), self.neurons(other))
        with self.assertRaisesRegex(ValueError, "1 prompts for 2 pictures"):
            self.pipeline.discover(*self.subject, prompts=["a <s1> cat"])
        with self.assertRaisesRegex(macula.InvalidArgument, "no such trigger"):
            self.pipeline.discover(self.subject[0], "no such trigger", "cat")

    def test_an_embedding_is_learnt_and_goes_with_its_concept(self):
        told = []
        found = self.pipeline.discover(
            *self.subject, embedding_steps=2, progress=lambda now: told.append((now.stage, now.done)), **self.SEARCH
        )
        self.assertIn(("invert", 2), told)
        (row,) = found.token_rows
        self.assertEqual((row.dtype, row.ndim, bool(np.isfinite(row).all())), (np.float32, 1, True))
        self.assertEqual(found.metadata["macula.token"], found.trigger)
        found.save(FOLDER / "learnt.safetensors")
        self.assertTrue((macula.Concept.load(FOLDER / "learnt.safetensors").token_rows[0] == row).all())
        self.assertEqual(self.pipeline.discover(*self.subject, **self.SEARCH).token_rows, [])
        prompt = f"a {found.trigger} cat"
        base = self.pipeline.encode_prompt(prompt).context.copy()
        self.pipeline.compose(found)
        self.assertTrue((self.pipeline.encode_prompt(prompt).context != base).any())
        self.pipeline.clear()
        self.assertTrue((self.pipeline.encode_prompt(prompt).context == base).all())
        self.assert_draws_as_before()
        prompt = self.pipeline.encode_prompt("a <s2> animal")
        latents = np.zeros((1, 3, 32, 32), np.float32)
        with self.assertRaisesRegex(macula.InvalidArgument, "embedding is learnt only"):
            self.pipeline.discover_encoded(
                latents, prompt.context, "<s2>", "animal", embedding=prompt, embedding_steps=1, **self.SEARCH
            )

    def test_control_c_stops_a_search_and_its_checkpoint_goes_on(self):
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        search = {**self.SEARCH, "batches": 30, "checkpoint": FOLDER / "search"}

        def interrupt(now):
            if now.stage == "search" and now.done == 12:
                # It comes while the search goes on, as from a keyboard.
                threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

        with self.assertRaises(KeyboardInterrupt):
            self.pipeline.discover(*self.subject, progress=interrupt, **search)
        self.assert_draws_as_before()
        told = []
        found = self.pipeline.discover(*self.subject, progress=told.append, **search)
        self.assertGreaterEqual(next(one.done for one in told if one.stage == "search"), 12)
        del search["checkpoint"]
        self.assertEqual(self.neurons(found), self.neurons(self.pipeline.discover(*self.subject, **search)))

    def test_a_word_is_found_to_be_erased(self):
        options = {**self.SEARCH, "drawn_pictures": 2, "size": (32, 32)}
        anchors = {"a tiger on a white background": "an animal on a white background"}
        erased = self.pipeline.discover_erasing("tiger", anchors, preserve=["a lion"], **options)
        self.assertEqual((erased.role, erased.trigger), (macula.Role.ERASE, "tiger"))
        base = self.pipeline.draw("a tiger", **QUICK)[0].copy()
        self.pipeline.ablate(erased)
        self.assertTrue((self.pipeline.draw("a tiger", **QUICK)[0] != base).any())
        self.pipeline.clear()
        with self.assertRaises(macula.InvalidArgument):
            self.pipeline.discover_erasing("tiger", {}, **options)

    def test_a_search_takes_what_was_encoded(self):
        """Latents of a model in pixel space are the pictures, so the same search can be asked for in both ways."""
        pictures = [macula.read_image(ROOT / f"models/emoji/subjects/octopus/{at}.png", 32, 32) for at in (1, 2)]
        quick = {"batches": 2, "batch": 1, "method": "saliency", "class_label": 4}
        known = self.pipeline.discover(pictures, "<s2>", "animal", **quick)
        prompt = self.pipeline.encode_prompt("a <s2> animal")
        latents = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        told = []
        found = self.pipeline.discover_encoded(
            latents, prompt.context, "<s2>", "animal", embedding=prompt, progress=lambda now: told.append(now.loss), **quick
        )
        shared = found.overlap(known)
        self.assertGreater(shared.jaccard, 0.99)
        self.assertTrue(told[-1] > 0 and told[0] is None, told)
        everywhere = self.pipeline.discover_encoded(
            latents, prompt.context, "no token", "animal", class_latents=latents[:1], class_context=prompt.context,
            scope="global", **quick,
        )
        self.assertEqual(everywhere.scope, macula.Scope.GLOBAL)
        self.assertLess(everywhere.overlap(known).jaccard, 0.9)
        for wrong, named in [
            ({}, "local scope"),
            ({"embedding": self.pipeline.encode_prompt("an animal")}, "lacks"),
            ({"scope": "global", "class_latents": latents}, "class_context"),
            ({"scope": "global", "class_latents": latents[:, :1], "class_context": prompt.context}, "1 channels"),
        ]:
            with self.assertRaisesRegex(macula.InvalidArgument, named):
                self.pipeline.discover_encoded(latents, prompt.context, "<s2>", "animal", **wrong, **quick)
        two = np.repeat(prompt.context, 3, axis=0)
        with self.assertRaisesRegex(macula.InvalidArgument, "2 latents and 3 texts"):
            self.pipeline.discover_encoded(latents, two, "<s2>", "animal", scope="global", **quick)


class Schedules(WithPipeline):
    def test_early_steps_see_smaller_states(self):
        schedule, sides = self.pipeline.schedule, []
        schedule.check(self.pipeline)
        options = {**QUICK, "steps": 4, "schedule": schedule}
        drawn = self.pipeline.draw("a cat", progress=lambda told: sides.append(told.latent), **options)
        self.assertEqual(drawn[0].shape, self.base.shape)
        sides = [latent.shape[2] for latent in sides if latent is not None]
        self.assertEqual(sorted(set(sides)), [16, 32, 64])
        again = macula.Schedule.from_json(schedule.fields)
        np.testing.assert_array_equal(self.pipeline.draw("a cat", **{**options, "schedule": again})[0], drawn[0])
        self.assert_draws_as_before()

    def walked(self, trajectory, noises):
        """Clean states by a loop of this test's own, and the sides of all states."""
        context = self.pipeline.encode_prompt("a cat").context
        state, sides = trajectory.start(next(noises)(trajectory.now.shape)), []
        while not (now := trajectory.now).done:
            sides.append(now.shape[2])
            label = None if now.class_label is None else np.array([now.class_label])
            prediction = self.pipeline.denoise(now.input_scale * state, now.timestep, context, class_labels=label)
            lift = next(noises)(now.next_shape) if now.lifts else None
            state, clean = trajectory.step(state, prediction, lift_noise=lift)
            self.assertEqual((state.shape, clean.shape), (now.next_shape, now.shape))
        return state, sides

    def test_a_loop_of_ones_own_draws_the_same(self):
        noise = np.random.default_rng(7).standard_normal((1, 3, 64, 64), dtype=np.float32)
        fields = {**self.pipeline.schedule.fields, "turning_points": [], "stage_class_labels": [0], "stage_sizes": [64]}
        plain = macula.Schedule.from_json({**fields, "lift_std": []})
        state, sides = self.walked(plain.begin(steps=3), iter([lambda shape: noise]))
        self.assertEqual(sides, [64, 64, 64])
        drawn = self.pipeline.draw("a cat", steps=3, guidance=1.0, noise=noise)[0]
        np.testing.assert_allclose((state[0].transpose(1, 2, 0) + 1) * 127.5, drawn, atol=0.51)

    def test_noise_is_asked_for_where_sides_double(self):
        trajectory, rng = self.pipeline.schedule.begin(steps=4), np.random.default_rng(7)
        normal = lambda shape: rng.standard_normal(shape, dtype=np.float32)
        state, sides = self.walked(trajectory, iter([normal] * 3))
        self.assertEqual((sorted(set(sides)), state.shape, trajectory.now.done), ([16, 32, 64], (1, 3, 64, 64), True))
        with self.pipeline.schedule.begin(steps=4, batch=2) as other:
            zeros = np.zeros(other.now.shape, dtype=np.float32)
            while not other.now.lifts:
                zeros, _ = other.step(zeros, zeros)
            before = other.now
            with self.assertRaisesRegex(macula.InvalidArgument, "adds lift noise"):
                other.step(zeros, zeros)
            self.assertEqual(other.now, before)
        with self.assertRaisesRegex(ValueError, "closed"):
            other.now

    def test_turning_points_are_chosen_within_a_budget(self):
        rough = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(2)]
        plot = FOLDER / "chosen.svg"
        loose, cost = macula.Schedule.choose(self.pipeline, rough, drop_error=1e-2, plot=plot)
        strict, more = macula.Schedule.choose(self.pipeline, rough, drop_error=1e-3, turning_points=1)
        self.assertLess(cost, more)
        self.assertLess(loose.turning_points[0], strict.turning_points[0])
        dropped = loose.fields["lift_std"][0] ** 2
        self.assertLessEqual(loose.drop_error(0, loose.turning_points[0] - 1, dropped), 1e-2)
        self.assertIn("<svg", plot.read_text())
        with self.assertRaisesRegex(ValueError, "1 stage costs for 3 stages"):
            macula.Schedule.choose(self.pipeline, rough, stage_costs=[1.0])

    def test_what_does_not_fit_is_refused(self):
        for fields, named in [
            ({"turning_points": [720, 360]}, "720 before 360"),
            ('{"attenuation": {"r": 0}}', "r = 0"),
        ]:
            with self.assertRaisesRegex(macula.MaculaError, named):
                macula.Schedule.from_json(fields)
        other = macula.Schedule.from_json({"turning_points": [500]})
        for attempt in (lambda: other.check(self.pipeline), lambda: self.pipeline.draw("a cat", schedule=other, **QUICK)):
            with self.assertRaisesRegex(macula.InvalidArgument, "another model's"):
                attempt()


class Denoising(WithPipeline):
    def inputs(self):
        context = self.pipeline.encode_prompt("a cat").context
        sample = np.random.default_rng(5).standard_normal((1, *self.pipeline.latent_shape), dtype=np.float32)
        return sample, context

    def test_arrays_are_read_and_written_where_they_lie(self):
        sample, context = self.inputs()
        labels = np.zeros(1, dtype=np.int64)
        predicted = self.pipeline.denoise(sample, 500, context, class_labels=labels)
        self.assertEqual(predicted.shape, sample.shape)
        inside = sample.copy()
        self.assertIs(self.pipeline.denoise(inside, 500, context, class_labels=labels, out=inside), inside)
        np.testing.assert_array_equal(inside, predicted)
        strided = np.repeat(sample, 2, axis=3)[..., ::2]
        np.testing.assert_array_equal(self.pipeline.denoise(strided, 500, context, class_labels=labels), predicted)
        with self.assertRaisesRegex(ValueError, "writeable float32"):
            self.pipeline.denoise(sample, 500, context, class_labels=labels, out=sample.astype(np.float64))

    def test_a_call_costs_little_python(self):
        """CPU time of this thread with the native function left out, so that other load does not matter."""
        sample, context = self.inputs()
        out, labels = np.empty_like(sample), np.zeros(1, dtype=np.int64)
        calls = 2000
        with mock.patch.object(_library.library, "macula_pipeline_denoise", lambda *_: 0):
            start = time.thread_time()
            for _ in range(calls):
                self.pipeline.denoise(sample, 500, context, class_labels=labels, out=out)
            overhead = (time.thread_time() - start) / calls * 1e6
        (FOLDER / "figures.json").write_text(json.dumps({"python_overhead_us": round(overhead, 1)}))
        self.assertLess(overhead, 200)


class Errors(WithPipeline):
    def test_failures_have_a_status(self):
        with self.assertRaises(macula.MaculaError) as raised:
            macula.Pipeline("/nowhere")
        self.assertEqual(raised.exception.status, macula.Status.NOT_FOUND)
        self.assertIn("/nowhere", str(raised.exception))
        with self.assertRaises(ValueError):
            self.pipeline.draw("a cat", width=7)
        with self.assertRaises(macula.MaculaError) as raised:
            self.pipeline.compose(macula.Concept.create({"a.to_k": ((4, 8), [1])}, "ab" * 32))
        self.assertEqual(raised.exception.status, macula.Status.WRONG_BASE)

    def test_options_are_checked(self):
        with self.assertRaisesRegex(TypeError, "'stepz' is no option; there are .*steps"):
            self.pipeline.draw("a cat", stepz=3)
        for wrong in (-1, 2**32, 2**40 + 2):
            with self.assertRaisesRegex(ValueError, "out of range"):
                self.pipeline.draw("a cat", steps=wrong)
        with self.assertRaisesRegex(TypeError, "steps = 2.5"):
            self.pipeline.draw("a cat", steps=2.5)
        with self.assertRaisesRegex(ValueError, "no Sampler: .*ddim"):
            self.pipeline.draw("a cat", sampler="quick")
        with self.assertRaisesRegex(ValueError, "NUL"):
            self.pipeline.draw("a\0cat")
        for sampler in ("ddim", macula.Sampler.DDIM):
            self.pipeline.draw("a cat", sampler=sampler, **QUICK)

    def test_what_is_closed_is_refused(self):
        pipeline = macula.Pipeline(MODEL, threads=1)
        with pipeline:
            self.assertEqual(pipeline.provider, "CPUExecutionProvider")
            self.assertGreater(pipeline.memory.weights, 0)
        pipeline.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            pipeline.draw("a cat")

    def test_the_log_is_pythons(self):
        heard = []
        with macula.Runtime(log=lambda *message: heard.append(message), log_level="debug") as runtime:
            macula.Pipeline(MODEL, runtime).close()
            self.assertIn("native/onnxruntime", runtime.path)
            self.assertIn("CPUExecutionProvider", runtime.providers)
        self.assertTrue(heard)
        with self.assertLogs("macula", "DEBUG"), macula.Runtime(log_level="debug") as runtime:
            macula.Pipeline(MODEL, runtime).close()


def on_thread(name, work):
    """Runs `work` here or on another thread, and raises what it raised."""
    if name == "main":
        return work()
    raised = []

    def kept():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=kept)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=1)
