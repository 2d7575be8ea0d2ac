"""The example workflows in ComfyUI's page, in headless Chromium: each loads with no node missing, runs, and shows its picture;
a screenshot of each is kept in the folder that is written in. With `--write`, the workflows themselves are made anew from the
graphs below, and their pictures.

Arguments: those of comfyui_server.py. Ends with 69 and the reason if there is no Chromium, or no Playwright can be had.
"""

import io
import json
import shutil
import sys
import unittest

import comfyui_home
import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium")
try:
    if not CHROMIUM:
        raise comfyui_home.Unavailable("Chromium is not installed: apt-get install chromium fonts-noto-cjk")
    sys.path.append(str(comfyui_home.browser()))
except comfyui_home.Unavailable as reason:
    print(reason, file=sys.stderr)
    sys.exit(comfyui_home.UNAVAILABLE)

from playwright.sync_api import sync_playwright

WRITE = "--write" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--write"]

from comfyui_server import BASE, FOLDER, ROOT, SEED, Server, applied, drawing

EXAMPLES = ROOT / "bindings/comfyui/example_workflows"
SIZE = {"width": 2300, "height": 1000}

#: The examples by name.
GRAPHS = {}


def example(name):
    return lambda make: GRAPHS.setdefault(name, make())


def better(graph, guidance):
    """More steps than the tests take."""
    graph["sampler"][1] |= {"steps": 20, "cfg": guidance}
    graph["save"][1]["filename_prefix"] = "macula"
    return graph


@example("compose_and_ablate")
def _():
    graph = applied(
        drawing("a <s1> apple and a tiger on a blue background", batch=4),
        ("MaculaComposeConcepts", "green-apple", 1.0), ("MaculaAblateConcept", "erase-tiger", 1.0),
    )
    return better(graph, 3.0)


@example("decomposed_sampler")
def _():
    graph = drawing("an elephant and a pizza on a green background", batch=4)
    graph["process"] = ["MaculaDecomposedSampler", {"model": ("model", 0), "steps": 25, "method": "default", "eta": 0.0,
                                                    "schedule": ""}]
    graph["sampler"] = ["SamplerCustom", {
        "model": ("model", 0), "add_noise": True, "noise_seed": SEED, "cfg": 3.0, "positive": ("positive", 0),
        "negative": ("negative", 0), "sampler": ("process", 0), "sigmas": ("process", 1), "latent_image": ("latent", 0),
    }]
    graph["save"][1]["filename_prefix"] = "macula"
    return graph


@example("find_and_compose")
def _():
    graph = better(drawing("a <s2> animal on a white background", batch=4), 2.0)
    graph["first"] = ["LoadImage", {"image": "octopus-1.png"}]
    graph["second"] = ["LoadImage", {"image": "octopus-2.png"}]
    graph["pictures"] = ["ImageBatch", {"image1": ("first", 0), "image2": ("second", 0)}]
    graph["subject"] = ["MaculaEncodePrompt", {"model": ("model", 0), "text": "a <s2> animal"}]
    graph["find"] = ["MaculaFindConceptNeurons", {
        "model": ("model", 0), "subject": ("subject", 0), "trigger": "<s2>", "class_noun": "animal", "density": 0.01,
        "batches": 40, "batch": 4, "tune_steps": 100, "seed": 0, "pictures": ("pictures", 0), "vae": ("vae", 0),
    }]
    graph["info"] = ["MaculaConceptInfo", {"concept": ("find", 0)}]
    graph["text"] = ["PreviewAny", {"source": ("info", 0)}]
    graph["keep"] = ["MaculaSaveConcept", {"concept": ("find", 0), "filename_prefix": "concepts/octopus"}]
    graph["term"] = ["MaculaComposeConcepts", {"concept": ("find", 0), "strength": 1.0}]
    graph["applied"] = ["MaculaApplyConcept", {"model": ("model", 0), "composition": ("term", 0)}]
    graph["sampler"][1]["model"] = ("applied", 0)
    return graph


class Page:
    """ComfyUI's page in a browser."""

    def __init__(self, browser, server, language="en"):
        server.post("/settings", **{
            "Comfy.TutorialCompleted": True, "Comfy.Locale": language, "Comfy.Workflow.ShowMissingModelsWarning": False,
            "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
        })
        self.server, self.tab = server, browser.new_page(viewport=SIZE)
        self.errors = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(f"http://{server.address}")
        self.tab.wait_for_function("window.app?.graph && window.app.vueAppReady !== false", timeout=120_000)
        self.tab.wait_for_timeout(2000)

    def load(self, workflow):
        self.tab.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def load_api(self, graph, name):
        self.tab.evaluate("([graph, name]) => window.app.loadApiJson(graph, name)", [graph, name])

    def workflow(self):
        return self.tab.evaluate("window.app.graph.serialize()")

    def kinds(self):
        """Types of the nodes, and which of them the page does not know."""
        return self.tab.evaluate("window.app.graph._nodes.map(node => [node.type, !!node.has_errors, node.title])")

    def run(self):
        """Queues what is loaded, waits for its end, and gives the outputs."""
        before = set(self.server.json("/history"))
        self.tab.evaluate("window.app.queuePrompt(0, 1)")
        for _ in range(3000):
            self.tab.wait_for_timeout(100)
            history = self.server.json("/history")
            if new := set(history) - before:
                done = history[new.pop()]
                assert done["status"]["status_str"] == "success", done["status"]
                return done["outputs"]
        raise TimeoutError("the workflow did not end")

    def screenshot(self):
        """The graph without the page around it."""
        # By then the page no longer says that the job is done.
        self.tab.wait_for_timeout(8000)
        area = self.tab.evaluate("""() => {
            const canvas = window.app.canvas;
            const bounds = canvas.graph._nodes.map(node => node.getBounding());
            const left = Math.min(...bounds.map(b => b[0])), top = Math.min(...bounds.map(b => b[1]));
            const right = Math.max(...bounds.map(b => b[0] + b[2])), bottom = Math.max(...bounds.map(b => b[1] + b[3]));
            const [x, y] = [90, 130], scale = Math.min((window.innerWidth - x - 20) / (right - left),
                (window.innerHeight - y - 60) / (bottom - top), 1.2);
            canvas.ds.scale = scale;
            canvas.ds.offset[0] = x / scale - left;
            canvas.ds.offset[1] = y / scale - top;
            canvas.setDirty(true, true);
            return {x: x - 20, y: y - 20, width: (right - left) * scale + 40, height: (bottom - top) * scale + 40};
        }""")
        self.tab.wait_for_timeout(1500)
        return Image.open(io.BytesIO(self.tab.screenshot(clip=area))).convert("RGB")


def api(graph):
    return {
        name: {"class_type": kind, "_meta": {}, "inputs": {
            key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()
        }} for name, (kind, inputs) in graph.items()
    }


class Workflows(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.close)
        for at in (1, 2):
            shutil.copy(ROOT / f"models/emoji/subjects/octopus/{at}.png", BASE / f"input/octopus-{at}.png")
        play = cls.enterClassContext(sync_playwright())
        cls.browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        cls.addClassCleanup(cls.browser.close)

    def test_each_example_loads_runs_and_shows_its_picture(self):
        for name in GRAPHS:
            with self.subTest(name):
                page = Page(self.browser, self.server)
                if WRITE:
                    page.load_api(api(GRAPHS[name]), name)
                    page.tab.evaluate("""() => {
                        const widgets = window.app.graph._nodes.flatMap(node => node.widgets ?? []);
                        for (const one of widgets) if (one.name === "control_after_generate") one.value = "fixed";
                        const shows = ["LoadImage", "MaculaConceptInfo", "MaculaFindConceptNeurons", "PreviewAny"];
                        // Room for what these will show once they have run.
                        for (const node of window.app.graph._nodes)
                            if (shows.includes(node.type)) node.setSize([Math.max(node.size[0], 320), node.size[1] + 200]);
                        window.app.graph.arrange();
                    }""")
                    made = json.dumps(page.workflow(), indent=1) + "\n"
                    (EXAMPLES / f"{name}.json").write_text(made)
                page.load(json.loads((EXAMPLES / f"{name}.json").read_text()))
                kinds = page.kinds()
                self.assertEqual(sorted(kind for kind, *_ in kinds), sorted(kind for kind, _ in GRAPHS[name].values()))
                self.assertFalse([title for _, broken, title in kinds if broken])
                outputs = page.run()
                self.assertTrue(any("images" in one for one in outputs.values()), outputs)
                shot = page.screenshot()
                shot.save(FOLDER / f"{name}.png")
                if WRITE:
                    shot.save(EXAMPLES / f"{name}.jpg", quality=75, optimize=True)
                self.assertEqual(page.errors, [])
                shown = page.tab.evaluate("window.app.graph._nodes.filter(node => node.imgs?.length).map(node => node.type)")
                self.assertIn("SaveImage", shown)
                self.assertGreater(np.asarray(shot).std(), 10)
                page.tab.close()

    def test_the_page_speaks_chinese(self):
        page = Page(self.browser, self.server, "zh")
        page.load(json.loads((EXAMPLES / "compose_and_ablate.json").read_text()))
        page.screenshot().save(FOLDER / "chinese.png")
        names = page.tab.evaluate("Object.values(LiteGraph.registered_node_types).map(kind => kind.title)")
        self.assertIn("消除概念", names)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]], verbosity=2)
