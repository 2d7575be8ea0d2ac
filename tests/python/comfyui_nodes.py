"""Tests of the ComfyUI nodes, on a ComfyUI that MACULA_COMFYUI names, else with stand-ins for what they use of it.

Arguments: the repository, a folder with a latent model in `model`, a folder to write in.
"""

import importlib.util
import os
import sys
import types
import unittest
from pathlib import Path

import numpy as np
import torch

import macula

ROOT, FIXTURE, FOLDER = map(Path, sys.argv[1:4])
COMFYUI = os.environ.get("MACULA_COMFYUI")


def stand_in(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]


def stand_in_for_comfyui():
    """The few functions that the nodes call, each as short as its contract."""
    paths = {}
    folders = stand_in("folder_paths", models_dir=str(FOLDER / "models"), folder_names_and_paths=paths)
    folders.add_model_folder_path = lambda name, path: paths.setdefault(name, ([], set()))[0].append(path)
    folders.get_folder_paths = lambda name: paths[name][0]
    folders.get_filename_list = lambda name: sorted(
        file for folder in paths[name][0] for file in os.listdir(folder) if Path(file).suffix in paths[name][1]
    )
    folders.get_full_path_or_raise = lambda name, file: next(
        str(path) for folder in paths[name][0] if (path := Path(folder) / file).is_file()
    )
    folders.get_output_directory = lambda: str(FOLDER / "output")
    folders.get_save_image_path = lambda prefix, output: (output, Path(prefix).name, 1, "", prefix)

    class BaseModel(torch.nn.Module):
        def __init__(self, config, model_type, device):
            super().__init__()
            self.model_config, self.model_type = config, model_type

    class ModelPatcher:
        def __init__(self, model, **_):
            self.model, self.model_options, self.patches = model, {"transformer_options": {}}, {}

        def clone(self):
            made = ModelPatcher(self.model)
            made.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
            made.patches = {key: list(patches) for key, patches in self.patches.items()}
            return made

        def add_patches(self, patches, strength):
            known = set(patches) & set(self.model.state_dict())
            for key in known:
                self.patches.setdefault(key, []).append((strength, patches[key]))
            return list(known)

    class ProgressBar:
        def __init__(self, total, node_id):
            pass

        def update_absolute(self, value, total):
            pass

    package = stand_in("comfy")
    kinds = types.SimpleNamespace(EPS="EPS", V_PREDICTION="V_PREDICTION")
    package.model_base = stand_in("comfy.model_base", BaseModel=BaseModel, ModelType=kinds)
    package.model_patcher = stand_in("comfy.model_patcher", ModelPatcher=ModelPatcher)
    package.supported_models = stand_in("comfy.supported_models", SD15=dict)
    package.utils = stand_in("comfy.utils", ProgressBar=ProgressBar, unet_to_diffusers=lambda config: config["keys"])
    package.model_management = stand_in("comfy.model_management", throw_exception_if_processing_interrupted=lambda: None)
    package.weight_adapter = stand_in("comfy.weight_adapter")
    stand_in("comfy.weight_adapter.base", WeightAdapterBase=object)


def load_nodes():
    """The package, as ComfyUI imports a custom node."""
    if COMFYUI:
        sys.path.insert(0, COMFYUI)
        sys.argv = sys.argv[:1] + ["--cpu", "--base-directory", str(FOLDER)]
        import comfy.options

        comfy.options.enable_args_parsing()
    else:
        stand_in_for_comfyui()
    folder = ROOT / "bindings/comfyui"
    spec = importlib.util.spec_from_file_location(
        "comfyui_macula", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_macula"] = module
    spec.loader.exec_module(module)
    return module


for name in ("models/concepts", "models/macula", "output"):
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
(FOLDER / "models/macula/small").symlink_to(FIXTURE / "model")
NODES = load_nodes()


def node(name):
    """A node as ComfyUI runs it: by the method that FUNCTION names."""
    made = NODES.NODE_CLASS_MAPPINGS[name]()
    return getattr(made, made.FUNCTION)


def first_weights(projections, fingerprint, count, role="implant"):
    layers = {one.path: ((one.out_features, one.in_features), range(count)) for one in projections}
    return macula.Concept.create(layers, fingerprint, title="a test", trigger="cat", role=role)


class Graphs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        (cls.model,) = node("MaculaLoadUNet")("small", "cpu")
        cls.unet = cls.model.model.diffusion_model
        cls.pipeline = cls.unet.pipeline
        cls.concept = first_weights(cls.pipeline.projections, cls.pipeline.fingerprint, 64)
        cls.eraser = first_weights(cls.pipeline.projections, cls.pipeline.fingerprint, 32, "erase")
        rng = np.random.default_rng(1)
        cls.x = torch.from_numpy(rng.standard_normal((2, *cls.pipeline.latent_shape), dtype=np.float32))
        texts = [cls.pipeline.encode_prompt(text).context for text in ("", "a photo of the red cat")]
        cls.context = torch.from_numpy(np.concatenate(texts))

    def predict(self, model, x=None, steps=(500.0, 500.0), context=None):
        """A prediction as a sampler asks for it, with the MODEL's options."""
        x, context = self.x if x is None else x, self.context if context is None else context
        options = model.model_options["transformer_options"]
        return model.model.diffusion_model(x, torch.tensor(steps), context=context, transformer_options=options)

    def test_every_node_says_what_comfyui_asks(self):
        self.assertEqual(set(NODES.NODE_CLASS_MAPPINGS), set(NODES.NODE_DISPLAY_NAME_MAPPINGS))
        for name, kind in NODES.NODE_CLASS_MAPPINGS.items():
            self.assertTrue(kind.CATEGORY and callable(getattr(kind, kind.FUNCTION)) and kind.__doc__, name)
            self.assertIn("required", kind.INPUT_TYPES())
            self.assertIsInstance(kind.RETURN_TYPES, tuple)
        self.assertIn("small", NODES.LoadMaculaUNet.INPUT_TYPES()["required"]["folder"][0])

    def test_a_batch_is_predicted_as_its_entries_are(self):
        both = self.predict(self.model)
        for at in range(2):
            one = self.predict(self.model, self.x[at : at + 1], (500.0,), self.context[at : at + 1])
            torch.testing.assert_close(both[at : at + 1], one, rtol=1e-4, atol=1e-5)
        apart = self.predict(self.model, steps=(500.0, 20.0))
        torch.testing.assert_close(apart[:1], both[:1], rtol=1e-4, atol=1e-5)
        self.assertGreater((apart[1] - both[1]).abs().max(), 1e-3)
        direct = self.pipeline.denoise(self.x.numpy(), 500, self.context.numpy())
        np.testing.assert_array_equal(both.numpy(), direct)

    def test_conditioning_may_be_longer_and_of_half_precision(self):
        long = torch.cat([self.context, self.context], dim=1)
        predicted = self.predict(self.model, context=long)
        np.testing.assert_array_equal(predicted.numpy(), self.pipeline.denoise(self.x.numpy(), 500, long.numpy()))
        self.assertEqual(self.predict(self.model, x=self.x.half()).dtype, torch.float16)

    def test_compositions_belong_to_their_model(self):
        plain = self.predict(self.model)
        (composition,) = node("MaculaComposeConcepts")(self.concept, 1.0)
        (composition,) = node("MaculaAblateConcept")(self.eraser, 0.5, composition)
        (applied,) = node("MaculaApplyConcept")(self.model, composition)
        composed = self.predict(applied)
        self.assertGreater((composed - plain).abs().max(), 1e-4)
        self.assertTrue(torch.equal(self.predict(self.model), plain))
        self.assertTrue(torch.equal(self.predict(applied), composed))
        self.pipeline.compose(macula.Term(self.concept, 1.0, "global"))
        self.pipeline.ablate(macula.Term(self.eraser, 0.5, "global"))
        np.testing.assert_array_equal(composed.numpy(), self.pipeline.denoise(self.x.numpy(), 500, self.context.numpy()))

    def test_roles_are_not_mixed_up(self):
        with self.assertRaisesRegex(ValueError, "use the node Ablate Concept"):
            node("MaculaComposeConcepts")(self.eraser, 1.0)
        with self.assertRaisesRegex(ValueError, "use the node Compose Concepts"):
            node("MaculaAblateConcept")(self.concept, 1.0)

    def test_a_concept_of_another_model_is_one_clear_error(self):
        other = first_weights(self.pipeline.projections, "ab" * 32, 8)
        (composition,) = node("MaculaComposeConcepts")(other, 1.0)
        (applied,) = node("MaculaApplyConcept")(self.model, composition)
        with self.assertRaises(macula.MaculaError) as raised:
            self.predict(applied)
        self.assertEqual(raised.exception.status, macula.Status.WRONG_BASE)
        self.predict(self.model)

    def test_controlnet_is_refused(self):
        with self.assertRaisesRegex(ValueError, "ControlNet"):
            self.unet(self.x, torch.tensor([1.0, 1.0]), context=self.context, control={})

    def test_files_are_listed_saved_and_described(self):
        self.concept.save(FOLDER / "models/concepts/test.safetensors")
        self.assertIn("test.safetensors", NODES.LoadConcept.INPUT_TYPES()["required"]["concept_name"][0])
        (loaded,) = node("MaculaLoadConcept")("test.safetensors")
        said = node("MaculaConceptInfo")(loaded, self.concept)["result"][0]
        self.assertIn("a test: cat", said)
        self.assertIn("Jaccard 1.0000", said)
        self.assertEqual(said.count("attn2.to_"), len(loaded.layers))
        (name,) = node("MaculaSaveConcept")(loaded, "saved")["ui"]["text"]
        self.assertEqual(macula.Concept.load(FOLDER / "output" / name).metadata, loaded.metadata)

    def test_a_search_can_be_interrupted(self):
        import comfy.model_management

        class Interrupted(BaseException):
            pass

        def interrupt():
            raise Interrupted

        kept = comfy.model_management.throw_exception_if_processing_interrupted
        self.addCleanup(setattr, comfy.model_management, "throw_exception_if_processing_interrupted", kept)
        comfy.model_management.throw_exception_if_processing_interrupted = interrupt
        # The shipped model has words to give away; it draws in pixel space, so that samplers of ComfyUI don't take it.
        unet = sys.modules["comfyui_macula.onnx_unet"].OnnxUNet(macula.Pipeline(ROOT / "models/emoji/onnx"))
        model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=unet))
        pictures = torch.rand(2, *reversed(unet.pipeline.size), 3)
        with self.assertRaises(Interrupted):
            node("MaculaFindConceptNeurons")(model, pictures, "<s1>", "cat", 0.01, 13, 0)


@unittest.skipUnless(COMFYUI, "MACULA_COMFYUI names no ComfyUI: its samplers and its own models are not tried")
class RealComfyUI(unittest.TestCase):
    def test_its_sampler_draws_and_restores(self):
        import comfy.sample

        (model,) = node("MaculaLoadUNet")("small", "cpu")
        pipeline = model.model.diffusion_model.pipeline
        concept = first_weights(pipeline.projections, pipeline.fingerprint, 256)
        (applied,) = node("MaculaApplyConcept")(model, node("MaculaComposeConcepts")(concept, 1.0)[0])
        noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, *pipeline.latent_shape), dtype=np.float32))
        texts = [[[torch.from_numpy(pipeline.encode_prompt(text).context.copy()), {}]] for text in ("the red cat", "")]

        def sample(with_model):
            zeros = torch.zeros_like(noise)
            return comfy.sample.sample(
                with_model, noise, 4, 5.0, "euler", "normal", *texts, zeros, disable_pbar=True, seed=1
            )

        first, composed, again = sample(model), sample(applied), sample(model)
        self.assertTrue(torch.isfinite(first).all())
        self.assertTrue(torch.equal(first, again))
        self.assertGreater((first - composed).abs().max(), 1e-4)

    def test_its_own_unet_is_shut_and_restored(self):
        """A UNet of SD1.x's layout with fewer channels; its names and those of diffusers are the public ones."""
        import comfy.model_patcher
        import comfy.supported_models

        config = comfy.supported_models.SD15({
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4], "num_heads": 4, "use_spatial_transformer": True, "context_dim": 24,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1, "use_linear_in_transformer": False, "adm_in_channels": None,
            "dtype": torch.float32, "legacy": False,
        })
        model = config.get_model({}, "", device="cpu")
        known = {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": "middle_block.1.transformer_blocks.0.attn2.to_v",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k": "output_blocks.11.1.transformer_blocks.0.attn2.to_k",
        }
        weights = model.state_dict()
        before = {path: weights[f"diffusion_model.{name}.weight"].normal_().clone() for path, name in known.items()}
        layers = {path: (tuple(weight.shape), range(0, weight.numel(), 7)) for path, weight in before.items()}
        concept = macula.Concept.create(layers, "ab" * 32)
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        (composition,) = node("MaculaComposeConcepts")(concept, 0.75)
        (applied,) = node("MaculaApplyConcept")(patcher, composition)
        self.assertEqual((len(patcher.patches), len(applied.patches)), (0, 3))
        applied.patch_model()
        for path, name in known.items():
            expected = before[path].clone().reshape(-1)
            expected[::7] *= 0.25
            self.assertTrue(torch.equal(model.state_dict()[f"diffusion_model.{name}.weight"].reshape(-1), expected), path)
        applied.unpatch_model()
        for path, name in known.items():
            self.assertTrue(torch.equal(model.state_dict()[f"diffusion_model.{name}.weight"], before[path]), path)


class TorchWeights(unittest.TestCase):
    """The closed form: shutting a weight by a strength leaves `1 - strength` of it; several multiply."""

    def setUp(self):
        rng = np.random.default_rng(2)
        self.weights = {f"attn{at}.to_k": rng.standard_normal((6, 8)).astype(np.float32) for at in range(2)}
        self.indices = {path: np.flatnonzero(rng.random(48) < 0.3) for path in self.weights}
        self.concept = macula.Concept.create({path: ((6, 8), self.indices[path]) for path in self.weights}, "ab" * 32)
        self.keys = {f"{path}.weight": f"block.{path}.weight" for path in self.weights}

    def patches(self):
        return sys.modules["comfyui_macula.weights"].patches(self.concept, self.keys)

    def test_the_chosen_weights_are_scaled(self):
        for dtype in (torch.float32, torch.float16):
            for path, weight in self.weights.items():
                patch = self.patches()[f"diffusion_model.block.{path}.weight"]
                changed = torch.from_numpy(weight.copy()).to(dtype)
                expected = weight.astype(changed.numpy().dtype)
                for strength in (0.25, 0.5):
                    changed = patch.calculate_weight(changed, path, strength, 1.0, None, None)
                    flat = expected.reshape(-1)
                    flat[self.indices[path]] *= np.asarray(1 - strength, expected.dtype)
                np.testing.assert_array_equal(changed.numpy(), expected)

    def test_tuned_values_take_the_place_of_the_weights(self):
        values = {path: np.linspace(-1, 1, len(chosen), dtype=np.float32) for path, chosen in self.indices.items()}
        layers = {path: ((6, 8), chosen) for path, chosen in self.indices.items()}
        self.concept = macula.Concept.create(layers, "ab" * 32, values=values, precision="float32")
        for path, weight in self.weights.items():
            patch = self.patches()[f"diffusion_model.block.{path}.weight"]
            changed = patch.calculate_weight(torch.from_numpy(weight.copy()), path, 0.75, 1.0, None, None).numpy()
            expected = weight.copy()
            flat = expected.reshape(-1)
            flat[self.indices[path]] += np.float32(0.75) * (values[path] - flat[self.indices[path]])
            np.testing.assert_allclose(changed, expected, atol=1e-6)

    def test_another_kind_of_model_is_one_clear_error(self):
        del self.keys["attn1.to_k.weight"]
        with self.assertRaisesRegex(ValueError, r"it has no attn1.to_k \(1 are missing\)"):
            self.patches()
        self.keys["attn1.to_k.weight"] = "block.attn1.to_k.weight"
        patch = self.patches()["diffusion_model.block.attn1.to_k.weight"]
        with self.assertRaisesRegex(ValueError, r"\[5, 8\], the concept was found on \[6, 8\]"):
            patch.calculate_weight(torch.zeros(5, 8), "block.attn1.to_k.weight", 1.0, 1.0, None, None)

    @unittest.skipUnless(COMFYUI, "MACULA_COMFYUI names no ComfyUI: its patcher is not tried")
    def test_comfyuis_patcher_applies_and_restores(self):
        import comfy.model_patcher

        model = torch.nn.Module()
        model.diffusion_model = torch.nn.Module()
        model.diffusion_model.block = torch.nn.ModuleDict()
        for path, weight in self.weights.items():
            first, second = path.split(".")
            layer = torch.nn.Linear(8, 6, bias=False)
            layer.weight.data = torch.from_numpy(weight.copy())
            model.diffusion_model.block[first] = torch.nn.ModuleDict({second: layer})
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu).clone()
        added = torch.randn(6, 8)
        key = "diffusion_model.block.attn0.to_k.weight"
        patcher.add_patches({key: ("diff", (added,))}, 1.0)
        self.assertEqual(set(patcher.add_patches(self.patches(), 1.0)), set(self.patches()))
        patcher.patch_model()
        expected = (torch.from_numpy(self.weights["attn0.to_k"]) + added).reshape(-1)
        expected[torch.from_numpy(self.indices["attn0.to_k"])] = 0
        torch.testing.assert_close(model.state_dict()[key], expected.reshape(6, 8))
        patcher.unpatch_model()
        for path, weight in self.weights.items():
            restored = model.state_dict()[f"diffusion_model.block.{path}.weight"].numpy()
            np.testing.assert_array_equal(restored, weight)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
