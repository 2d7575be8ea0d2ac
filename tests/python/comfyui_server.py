"""Tests of the nodes in a running ComfyUI, driven by HTTP and websocket as its page does; every picture is held against the
library called directly.

Arguments: the repository, ComfyUI's folder, a folder to write in; then those of unittest. The packages of ComfyUI must be
importable.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import torch
import websocket
from diffusers import DDIMScheduler
from PIL import Image

import macula

ROOT, COMFYUI, FOLDER = map(Path, sys.argv[1:4])
MODEL = ROOT / "models/emoji/onnx"
BASE, EXTRA = FOLDER / "base", FOLDER / "extra"
STEPS, GUIDANCE, SEED = 4, 3.0, 5
APPLE = "a <s1> apple on a blue background"


class Server:
    """ComfyUI on a free port of this machine, with the nodes as a custom node pack."""

    def __init__(self):
        for name in ("custom_nodes", "models/macula", "models/concepts", "input", "output", "temp", "user"):
            (BASE / name).mkdir(parents=True)
        (BASE / "custom_nodes/comfyui-macula").symlink_to(ROOT / "bindings/comfyui")
        (BASE / "models/macula/emoji").symlink_to(MODEL)
        for name in ("green-apple", "erase-tiger"):
            shutil.copy(ROOT / f"models/concepts/{name}.safetensors", BASE / "models/concepts")
        (EXTRA / "steering").mkdir(parents=True)
        (EXTRA / "onnx").mkdir()
        (EXTRA / "onnx/elsewhere").symlink_to(MODEL)
        shutil.copy(ROOT / "models/concepts/octopus.safetensors", EXTRA / "steering")
        paths = FOLDER / "extra_model_paths.yaml"
        paths.write_text(f"own:\n  base_path: {EXTRA}\n  concepts: steering\n  macula: onnx\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log_file = FOLDER / "server.log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", self.address.split(":")[1],
                 "--base-directory", str(BASE), "--extra-model-paths-config", str(paths), "--disable-api-nodes",
                 "--disable-auto-launch", "--dont-print-server", "--preview-method", "latent2rgb",
                 "--database-url", "sqlite:///:memory:"],
                cwd=COMFYUI, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
            )
        self.client = uuid.uuid4().hex
        self.wait_until_it_answers()
        self.socket = websocket.create_connection(f"ws://{self.address}/ws?clientId={self.client}", timeout=60)

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_until_it_answers(self):
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log}")

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read()

    def json(self, path):
        return json.loads(self.get(path))

    def post(self, path, **content):
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def queue(self, graph):
        """Puts a graph in the queue: a node is `[class, {input: value or (node, output)}]`."""
        made = {}
        for name, (kind, inputs) in graph.items():
            links = {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}
            made[name] = {"class_type": kind, "inputs": links}
        return json.loads(self.post("/prompt", prompt=made, client_id=self.client))["prompt_id"]

    def events(self, job):
        """What the page is told of a job until its end: `(name, content)`; binary messages have the name `binary`."""
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                yield "binary", message
                continue
            said = json.loads(message)
            if said["data"].get("prompt_id") == job:
                yield said["type"], said["data"]
                if said["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return

    def outcome(self, job):
        """How a job ended, and what it gave."""
        name, content = list(self.events(job))[-1]
        return name, self.outputs(job) if name == "execution_success" else content

    def outputs(self, job):
        """What a job gave; the server tells of the end first, and writes its history after it."""
        until = time.monotonic() + 60
        while not (history := self.json(f"/history/{job}")) and time.monotonic() < until:
            time.sleep(0.01)
        return history[job]["outputs"]

    def run(self, graph):
        name, content = self.outcome(self.queue(graph))
        if name != "execution_success":
            raise AssertionError(f"{name}: {content}\n{self.log[-3000:]}")
        return content

    def file(self, told):
        return self.get("/view?" + urllib.parse.urlencode(told))

    def pictures(self, outputs, node="save"):
        return [np.asarray(Image.open(io.BytesIO(self.file(one)))) for one in outputs[node]["images"]]

    def resident(self):
        """Bytes of memory that the process takes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def close(self):
        self.socket.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def drawing(prompt=APPLE, negative="", batch=1, side=64, steps=STEPS, seed=SEED, model=("model", 0)):
    """A graph that draws with KSampler, from what `model` names."""
    return {
        "model": ["MaculaLoadUNet", {"folder": "emoji", "provider": "cpu"}],
        "positive": ["MaculaEncodePrompt", {"model": ("model", 0), "text": prompt}],
        "negative": ["MaculaEncodePrompt", {"model": ("model", 0), "text": negative}],
        "latent": ["EmptyLatentImage", {"width": side, "height": side, "batch_size": batch}],
        "sampler": ["KSampler", {
            "model": model, "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0),
            "seed": seed, "steps": steps, "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        }],
        **shown(("sampler", 0)),
    }


def shown(samples):
    return {
        "vae": ["VAELoader", {"vae_name": "pixel_space"}],
        "decode": ["VAEDecode", {"samples": samples, "vae": ("vae", 0)}],
        "save": ["SaveImage", {"images": ("decode", 0), "filename_prefix": "test"}],
    }


def applied(graph, *terms):
    """The graph with concepts: `(node class, file, strength)`."""
    graph, composition = dict(graph), None
    for at, (kind, file, strength) in enumerate(terms):
        graph[f"concept{at}"] = ["MaculaLoadConcept", {"concept_name": f"{file}.safetensors"}]
        graph[f"term{at}"] = [kind, {"concept": (f"concept{at}", 0), "strength": strength}]
        if composition:
            graph[f"term{at}"][1]["composition"] = composition
        composition = (f"term{at}", 0)
    graph["applied"] = ["MaculaApplyConcept", {"model": ("model", 0), "composition": composition}]
    graph["sampler"] = [graph["sampler"][0], {**graph["sampler"][1], "model": ("applied", 0)}]
    return graph


BATCHES = 16  # of a search: enough for a learnt mask to shut something
COMPOSED = ("MaculaComposeConcepts", "green-apple", 1.0)
ABLATED = ("MaculaAblateConcept", "erase-tiger", 0.75)


def hashes(pictures):
    return [hashlib.sha256(one.tobytes()).hexdigest() for one in pictures]


# What the library draws when it is called directly, by a sampler loop of the test's own.

def noise_of(seed, batch, side):
    return torch.randn((batch, 3, side, side), generator=torch.manual_seed(seed)).numpy()


def sigmas():
    """Noise levels as diffusers has them."""
    kept = DDIMScheduler.from_pretrained(MODEL / "scheduler").alphas_cumprod.double()
    return (((1 - kept) / kept) ** 0.5).numpy()


class Direct:
    """The library, opened in this process."""

    def __init__(self):
        self.pipeline = macula.Pipeline(MODEL)

    def denoised(self, sample, timestep, sigma, prompts, label=0, context=None):
        """The guided clean states that v-predictions for `sample / sqrt(sigma^2 + 1)` mean."""
        scale = np.sqrt(sigma**2 + 1)
        positive, negative = prompts
        batch = len(sample)
        if context is None:
            context = [np.repeat(one.context, batch, axis=0) for one in (negative, positive)]
        predictions = self.pipeline.denoise(
            np.concatenate([sample / scale] * 2), timestep, np.concatenate(context),
            class_labels=np.full(2 * batch, label), embedding=positive, first_conditional=batch,
        ).astype(np.float64)
        away, towards = sample / scale**2 - predictions.reshape(2, *sample.shape) * sigma / scale
        return away + GUIDANCE * (towards - away)

    def euler(self, prompts=(APPLE, ""), batch=1, side=64, seed=SEED, steps=STEPS, context=None):
        prompts = [self.pipeline.encode_prompt(text) for text in prompts]
        levels = sigmas()
        at = [len(levels) - 1 - int(step * len(levels) / steps) for step in range(steps)]
        walk = [*levels[at], 0.0]
        state = noise_of(seed, batch, side) * np.sqrt(walk[0] ** 2 + 1)
        for step, timestep in enumerate(at):
            clean = self.denoised(state, timestep, walk[step], prompts, context=context)
            state = state + (state - clean) / walk[step] * (walk[step + 1] - walk[step])
        return as_pictures(state)


def as_pictures(states):
    return (np.clip((states.transpose(0, 2, 3, 1) + 1) / 2, 0, 1) * 255).astype(np.uint8)


class Nodes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server, cls.direct = Server(), Direct()
        cls.addClassCleanup(cls.server.close)
        cls.apple = macula.Concept.load(ROOT / "models/concepts/green-apple.safetensors")
        cls.tiger = macula.Concept.load(ROOT / "models/concepts/erase-tiger.safetensors")

    def setUp(self):
        self.direct.pipeline.clear()

    def assert_drawn(self, drawn, expected):
        """Pictures are equal but for a rounding of the last place."""
        self.assertEqual(np.shape(drawn), np.shape(expected))
        apart = np.abs(np.asarray(drawn, int) - np.asarray(expected, int))
        self.assertLessEqual(apart.max(), 2)
        self.assertLess((apart > 0).mean(), 0.02)

    def test_the_pack_is_whole(self):
        nodes = self.server.json("/object_info")
        names = {name for name, one in nodes.items() if one["python_module"] == "custom_nodes.comfyui-macula"}
        self.assertEqual(len(names), 11)
        self.assertNotIn("IMPORT FAILED", self.server.log)
        files = nodes["MaculaLoadConcept"]["input"]["required"]["concept_name"][0]
        self.assertEqual(sorted(files), ["erase-tiger.safetensors", "green-apple.safetensors", "octopus.safetensors"])
        self.assertEqual(sorted(nodes["MaculaLoadUNet"]["input"]["required"]["folder"][0]), ["elsewhere", "emoji"])
        said = self.server.json("/i18n")
        for name in names:
            inputs = {key for part in nodes[name]["input"].values() for key in part} - {"unique_id"}
            for language in ("en", "zh"):
                told = said[language]["nodeDefs"][name]
                self.assertEqual(set(told.get("inputs", {})), inputs, (name, language))
                self.assertTrue(told["display_name"] and told["description"])
                help_page = self.server.get(f"/extensions/comfyui-macula/docs/{name}/{language}.md").decode()
                self.assertTrue(help_page.startswith(f"# {told['display_name']}\n"), help_page[:80])
            self.assertEqual(said["en"]["nodeDefs"][name]["display_name"], nodes[name]["display_name"])
        workflows = self.server.json("/api/workflow_templates")["comfyui-macula"]
        for name in workflows:
            picture = self.server.get(f"/api/workflow_templates/comfyui-macula/{name}.jpg")
            self.assertEqual(Image.open(io.BytesIO(picture)).format, "JPEG")
        self.assertGreaterEqual(len(workflows), 3)

    def test_extra_paths_are_honoured(self):
        graph = applied(drawing("a <s2> animal on a white background"), ("MaculaComposeConcepts", "octopus", 1.0))
        graph["model"][1]["folder"] = "elsewhere"
        self.direct.pipeline.compose(macula.Concept.load(EXTRA / "steering/octopus.safetensors"))
        drawn = self.server.pictures(self.server.run(graph))
        self.assert_drawn(drawn, self.direct.euler(("a <s2> animal on a white background", "")))

    def test_plain_composed_plain(self):
        """Each picture is the library's; the second of the plain ones is drawn by the same opened model."""
        plain, composed = drawing(batch=2), applied(drawing(batch=2), COMPOSED, ABLATED)
        composed["positive"][1]["text"] = plain["positive"][1]["text"] = prompt = "a <s1> apple and a tiger"
        first, second, third = (self.server.pictures(self.server.run(graph)) for graph in (plain, composed, plain))
        self.assertEqual(hashes(first), hashes(third))
        self.assertNotEqual(hashes(first), hashes(second))
        self.assertNotEqual(*hashes(first))
        self.assert_drawn(first, self.direct.euler((prompt, ""), batch=2))
        self.direct.pipeline.compose(self.apple)
        self.direct.pipeline.ablate(macula.Term(self.tiger, 0.75))
        self.assert_drawn(second, self.direct.euler((prompt, ""), batch=2))

    def test_foreign_conditioning_of_any_length(self):
        """Other nodes make longer texts of prompts: a concept then acts on every token."""
        graph = applied(drawing(), COMPOSED)
        graph["longer"] = ["ConditioningConcat", {"conditioning_to": ("positive", 0), "conditioning_from": ("negative", 0)}]
        graph["longer_too"] = ["ConditioningConcat", {"conditioning_to": ("negative", 0), "conditioning_from": ("negative", 0)}]
        graph["sampler"][1] |= {"positive": ("longer", 0), "negative": ("longer_too", 0)}
        drawn = self.server.pictures(self.server.run(graph))
        self.direct.pipeline.compose(macula.Term(self.apple, 1.0, "global"))
        positive, negative = (self.direct.pipeline.encode_prompt(text).context for text in (APPLE, ""))
        context = [np.concatenate([negative, negative], axis=1), np.concatenate([positive, negative], axis=1)]
        self.assert_drawn(drawn, self.direct.euler(context=context))

    def test_prompts_wait_in_the_queue(self):
        graphs = [drawing(seed=11), applied(drawing(seed=11), COMPOSED)]
        jobs = [self.server.queue(graph) for graph in graphs]
        drawn = [self.server.pictures(self.server.outcome(job)[1]) for job in jobs]
        self.assert_drawn(drawn[0], self.direct.euler(seed=11))
        self.direct.pipeline.compose(self.apple)
        self.assert_drawn(drawn[1], self.direct.euler(seed=11))

    def test_interrupt_stops_within_a_step(self):
        """A step of so large a picture takes seconds; the call is stopped in its middle."""
        before = self.server.pictures(self.server.run(drawing()))
        job = self.server.queue(drawing(side=256, steps=50))
        times, stopped = [], None
        for name, content in self.server.events(job):
            if name == "progress":
                times.append(time.monotonic())
            if len(times) == 2 and stopped is None:
                time.sleep((times[1] - times[0]) / 4)
                stopped = time.monotonic()
                self.server.post("/interrupt")
        took, step = time.monotonic() - stopped, times[1] - times[0]
        print(f"interrupted after {took:.2f} s, a step takes {step:.2f} s")
        self.assertEqual((name, len(times)), ("execution_interrupted", 2))
        self.assertLess(took, step)
        again = self.server.pictures(self.server.run(drawing()))
        self.assertEqual(hashes(before), hashes(again))

    def test_a_broken_file_is_one_clear_error(self):
        (BASE / "models/concepts/broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 this is no file ")
        self.addCleanup((BASE / "models/concepts/broken.safetensors").unlink)
        graph = applied(drawing(), ("MaculaComposeConcepts", "broken", 1.0))
        events = list(self.server.events(self.server.queue(graph)))
        errors = [content for name, content in events if name == "execution_error"]
        self.assertEqual(len(errors), 1)
        self.assertEqual((errors[0]["node_type"], errors[0]["node_id"]), ("MaculaLoadConcept", "concept0"))
        self.assertIn("broken.safetensors", errors[0]["exception_message"])
        self.assertEqual(errors[0]["exception_type"], "macula.errors.MaculaError")
        with self.assertRaises(urllib.error.HTTPError):
            self.server.queue(applied(drawing(), ("MaculaComposeConcepts", "missing", 1.0)))

    def test_a_word_that_is_not_in_the_prompt_is_named(self):
        name, content = self.server.outcome(self.server.queue(applied(drawing("a cat"), COMPOSED)))
        self.assertEqual(name, "execution_error")
        self.assertIn("<s1>", content["exception_message"])

    def test_free_gives_memory_back(self):
        graph = drawing(side=256, steps=1)
        self.server.run(graph)
        full = self.server.resident()
        until = time.monotonic() + 20
        while (left := full - self.server.resident()) < MODEL.joinpath("unet/model.onnx").stat().st_size:
            self.assertLess(time.monotonic(), until, f"only {left >> 20} MB of {full >> 20} were given back")
            # The server overlooks what it is asked for between the end of a job and its waiting for the next.
            self.server.post("/free", unload_models=True, free_memory=True)
            time.sleep(1)
        print(f"/free gave back {left >> 20} MB of {full >> 20}")
        events = list(self.server.events(self.server.queue(graph)))
        ran = [content["node"] for name, content in events if name == "executing"]
        self.assertIn("model", ran)

    def test_concepts_are_saved_and_described(self):
        outputs = self.server.run({
            "apple": ["MaculaLoadConcept", {"concept_name": "green-apple.safetensors"}],
            "octopus": ["MaculaLoadConcept", {"concept_name": "octopus.safetensors"}],
            "save": ["MaculaSaveConcept", {"concept": ("apple", 0), "filename_prefix": "found/apple"}],
            "info": ["MaculaConceptInfo", {"concept": ("apple", 0), "other": ("octopus", 0)}],
            "plot": ["SaveImage", {"images": ("info", 1), "filename_prefix": "plot"}],
        })
        saved = macula.Concept.load(BASE / "output" / outputs["save"]["text"][0])
        self.assertEqual(saved.metadata, self.apple.metadata)
        other = macula.Concept.load(EXTRA / "steering/octopus.safetensors")
        overlap = saved.overlap(other)
        said = outputs["info"]["text"][0]
        self.assertIn(f"{overlap.intersection:,} weights, Jaccard {overlap.jaccard:.4f}", said)
        self.assertEqual(said.count("attn2.to_"), len(saved.layers))
        shown, output = self.server.pictures(outputs, "info")[0], self.server.pictures(outputs, "plot")[0]
        self.assert_drawn([shown], [output])
        self.assertEqual(shown.shape[1], 900)

    def test_a_decomposed_process_is_walked(self):
        """The whole walk, and its second half from a latent; the same walk by the library's trajectory."""
        steps, prompt = 6, "a cat on a red background"
        graph = drawing(prompt)
        graph["process"] = ["MaculaDecomposedSampler", {"model": ("model", 0), "steps": steps, "method": "default", "eta": 0.5}]
        given = {"model": ("model", 0), "add_noise": True, "noise_seed": SEED, "cfg": GUIDANCE,
                 "positive": ("positive", 0), "negative": ("negative", 0), "sampler": ("process", 0)}
        graph["sampler"] = ["SamplerCustom", {**given, "sigmas": ("process", 1), "latent_image": ("latent", 0)}]
        whole = self.server.pictures(self.server.run(graph))
        state = self.walked(prompt, steps)
        self.assert_drawn(whole, as_pictures(state))
        total = self.direct.pipeline.schedule.begin(steps=steps).now.step_count
        graph["split"] = ["SplitSigmas", {"sigmas": ("process", 1), "step": total - 2}]
        graph["again"] = ["SamplerCustom", {**given, "sigmas": ("split", 1), "latent_image": ("sampler", 0)}]
        graph |= shown(("again", 0))
        again = self.server.pictures(self.server.run(graph))
        self.assert_drawn(again, as_pictures(self.walked(prompt, steps, total - 2, state)))
        graph["again"][1]["sigmas"] = ("split", 0)
        name, content = self.server.outcome(self.server.queue(graph))
        self.assertEqual(name, "execution_error")
        self.assertIn("needs the SIGMAS that its own node gives", content["exception_message"])

    def walked(self, prompt, steps, start=0, clean=None):
        prompts = [self.direct.pipeline.encode_prompt(text) for text in (prompt, "")]
        walk = self.direct.pipeline.schedule.begin(steps=steps, start_step=start, eta=0.5)
        rng, levels = torch.Generator().manual_seed(SEED + 1), sigmas()

        def noise(shape):
            factor = 64 // shape[2]
            return noise_of(SEED, 1, 64).reshape(1, 3, 64 // factor, factor, 64 // factor, factor).sum((3, 5)) / factor

        state = walk.start(noise(walk.now.shape), None if clean is None else np.clip(clean, -1, 1))
        while not (now := walk.now).done:
            sigma = levels[int(now.timestep)]
            scale = np.sqrt(sigma**2 + 1)
            given = state.astype(np.float64) * now.input_scale * scale
            clean = self.direct.denoised(given, now.timestep, sigma, prompts, now.class_label)
            prediction = (given / scale**2 - clean) * scale / sigma
            added = torch.randn(now.shape, generator=rng).numpy() if now.needs_noise else None
            state, _ = walk.step(state, prediction, added, noise(now.next_shape) if now.lifts else None)
        return state

    def searching(self, **inputs):
        for at in (1, 2):
            shutil.copy(ROOT / f"models/emoji/subjects/octopus/{at}.png", BASE / f"input/{at}.png")
        return {
            "model": ["MaculaLoadUNet", {"folder": "emoji", "provider": "cpu"}],
            "subject": ["MaculaEncodePrompt", {"model": ("model", 0), "text": "a <s2> animal"}],
            "first": ["LoadImage", {"image": "1.png"}],
            "second": ["LoadImage", {"image": "2.png"}],
            "pictures": ["ImageBatch", {"image1": ("first", 0), "image2": ("second", 0)}],
            "vae": ["VAELoader", {"vae_name": "pixel_space"}],
            "find": ["MaculaFindConceptNeurons", {
                "model": ("model", 0), "subject": ("subject", 0), "trigger": "<s2>", "class_noun": "animal",
                "density": 0.01, "batches": BATCHES, "batch": 1, "tune_steps": 0, "seed": 3, "pictures": ("pictures", 0),
                "vae": ("vae", 0), **inputs,
            }],
            "save": ["MaculaSaveConcept", {"concept": ("find", 0), "filename_prefix": "found/octopus"}],
        }

    def found(self, **options):
        pictures = [np.asarray(Image.open(BASE / f"input/{at}.png").convert("RGB")) for at in (1, 2)]
        latents = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 255 * 2 - 1
        context = self.direct.pipeline.encode_prompt("a <s2> animal")
        return self.direct.pipeline.discover_encoded(
            latents, context.context, "<s2>", "animal", batches=BATCHES, batch=1, seed=3, **options
        ), latents, context

    def test_neurons_are_found(self):
        """The same neurons as the library's, with progress, the time left and the loss as a picture."""
        events = list(self.server.events(job := self.server.queue(self.searching())))
        outputs = self.server.outputs(job)
        found = macula.Concept.load(BASE / "output" / outputs["save"]["text"][0])
        prompt = self.direct.pipeline.encode_prompt("a <s2> animal")
        known, *_ = self.found(embedding=prompt)
        self.assertEqual((found.scope, found.trigger, found.neurons), (known.scope, "<s2>", known.neurons))
        self.assertGreater(found.neurons, 0)
        self.assertGreater(found.overlap(known).jaccard, 0.99)
        told = [content for name, content in events if name == "progress" and content["node"] == "find"]
        self.assertEqual([one["value"] for one in told], list(range(BATCHES + 1)))
        texts = [message[8:].decode(errors="replace") for name, message in events if name == "binary" and message[3] == 3]
        self.assertTrue(any("loss 0." in text and " left" in text for text in texts), texts)
        pictures = [message for name, message in events if name == "binary" and message[3] in (1, 4)]
        self.assertGreaterEqual(len(pictures), BATCHES)

    def test_neurons_are_found_in_latents_with_foreign_conditioning(self):
        graph = self.searching(latents=("latents", 0), subject_class=("class", 0), class_latents=("latents", 0),
                               subject=("longer", 0))
        del graph["find"][1]["pictures"]
        graph["class"] = ["MaculaEncodePrompt", {"model": ("model", 0), "text": "an animal an animal"}]
        graph["longer"] = ["ConditioningConcat", {"conditioning_to": ("subject", 0), "conditioning_from": ("class", 0)}]
        graph["latents"] = ["VAEEncode", {"pixels": ("pictures", 0), "vae": ("vae", 0)}]
        graph["class_longer"] = ["ConditioningConcat", {"conditioning_to": ("class", 0), "conditioning_from": ("class", 0)}]
        graph["find"][1]["subject_class"] = ("class_longer", 0)
        outputs = self.server.run(graph)
        found = macula.Concept.load(BASE / "output" / outputs["save"]["text"][0])
        self.assertEqual(found.scope, macula.Scope.GLOBAL)
        of_class = self.direct.pipeline.encode_prompt("an animal an animal").context
        subject = self.direct.pipeline.encode_prompt("a <s2> animal").context
        _, latents, _ = self.found(embedding=self.direct.pipeline.encode_prompt("a <s2> animal"), method="saliency")
        known = self.direct.pipeline.discover_encoded(
            latents, np.concatenate([subject, of_class], axis=1), "<s2>", "animal", batches=BATCHES, batch=1, seed=3,
            scope="global", class_latents=latents, class_context=np.concatenate([of_class, of_class], axis=1),
        )
        self.assertGreater(found.overlap(known).jaccard, 0.99)

    def test_concepts_are_tuned_together(self):
        """The same values as the library's, for concepts that were found before."""
        graph = self.searching()
        graph["other"] = ["MaculaEncodePrompt", {"model": ("model", 0), "text": "a <s1> animal"}]
        graph["again"] = [graph["find"][0], {**graph["find"][1], "subject": ("other", 0), "trigger": "<s1>", "seed": 4}]
        graph["together"] = ["MaculaTuneConceptsTogether", {
            "model": ("model", 0), "concept_1": ("find", 0), "pictures_1": ("pictures", 0), "concept_2": ("again", 0),
            "pictures_2": ("pictures", 0), "steps": 3, "scenes": 4, "class_label": 0, "seed": 5,
        }]
        graph["save_again"] = ["MaculaSaveConcept", {"concept": ("again", 0), "filename_prefix": "found/again"}]
        for at, name in enumerate(("first", "second")):
            graph[f"save_{name}"] = ["MaculaSaveConcept", {"concept": ("together", at), "filename_prefix": f"found/{name}"}]
        events = list(self.server.events(job := self.server.queue(graph)))
        outputs = self.server.outputs(job)
        before, again, first, second = (
            macula.Concept.load(BASE / "output" / outputs[name]["text"][0])
            for name in ("save", "save_again", "save_first", "save_second")
        )
        pictures = [np.asarray(Image.open(BASE / f"input/{at}.png").convert("RGB")) for at in (1, 2)]
        companions = [macula.Companion(one, pictures) for one in (before, again)]
        known = self.direct.pipeline.tune_together(companions, steps=3, scenes=4, seed=5)
        for one, expected in zip((first, second), known, strict=True):
            self.assertEqual((one.trigger, one.neurons), (expected.trigger, expected.neurons))
            for at in range(len(one.layers)):
                np.testing.assert_allclose(one.values(at), expected.values(at), atol=2e-3)
        told = [content["value"] for name, content in events if name == "progress" and content["node"] == "together"]
        self.assertEqual(told, [0, 1, 2, 3])

    def test_a_search_is_interrupted(self):
        job = self.server.queue(self.searching(batches=2000))
        stopped = None
        for name, content in self.server.events(job):
            if name == "progress" and content["node"] == "find" and content["value"] == 2:
                stopped = time.monotonic()
                self.server.post("/interrupt")
        self.assertEqual(name, "execution_interrupted")
        self.assertLess(time.monotonic() - stopped, 2)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]], verbosity=2)
