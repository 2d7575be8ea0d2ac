"""Tests of the ComfyUI nodes in ComfyUI's own process: its samplers, its patcher and its own models, without the server.

Arguments: the repository, ComfyUI's folder, a folder to write in, one with a latent model in `model`.
"""

import importlib.util
import sys
import unittest
from pathlib import Path

import diffusers
import numpy as np
import torch

import macula

ROOT, COMFYUI, FOLDER, FIXTURE = map(Path, sys.argv[1:5])


def load_nodes():
    """The package, as ComfyUI imports a custom node."""
    sys.path.insert(0, str(COMFYUI))
    sys.argv = sys.argv[:1] + ["--cpu", "--base-directory", str(FOLDER)]
    import comfy.options

    comfy.options.enable_args_parsing()
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

import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models


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

    def test_a_learnt_embedding_is_told_and_not_dropped_unsaid(self):
        sys.path.insert(0, str(ROOT / "models/reference"))
        import concept_file

        metadata = {
            "macula.base": "ab" * 32, "macula.trigger": "cat", "macula.token": "cat", "modelspec.title": "a test",
            "modelspec.architecture": "a test",
        }
        file = FOLDER / "learnt.safetensors"
        concept_file.write(file, {"block.attn1.to_k": (2, 2, [1])}, metadata, [np.ones(4, np.float32)])
        concept = macula.Concept.load(file)
        with self.assertRaisesRegex(ValueError, "learnt embedding of cat"):
            node("MaculaComposeConcepts")(concept, 1.0)
        self.assertIn("learnt embedding of cat, for 1 text encoders", node("MaculaConceptInfo")(concept)["result"][0])

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

    def test_its_memory_is_told(self):
        """Weights as they are, and what the largest run took; more for a larger one."""
        (model,) = node("MaculaLoadUNet")("small", "cpu")
        unet = model.model.diffusion_model
        self.assertEqual(model.model_size(), unet.pipeline.memory.weights)
        self.assertGreater(model.model.memory_required([2, *unet.pipeline.latent_shape]), 0)
        self.predict(model)
        taken = unet.pipeline.memory.arena_peak
        self.assertEqual(model.model.memory_required(self.x.shape), taken)
        self.assertEqual(model.model.memory_required([1, *self.x.shape[1:]]), taken)
        self.assertEqual(model.model.memory_required([6, *self.x.shape[1:]]), 3 * taken)

    def test_samplers_draw_and_restore(self):
        (applied,) = node("MaculaApplyConcept")(self.model, node("MaculaComposeConcepts")(self.concept, 1.0)[0])
        noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, *self.pipeline.latent_shape), dtype=np.float32))
        texts = [[[torch.from_numpy(self.pipeline.encode_prompt(text).context.copy()), {}]] for text in ("the red cat", "")]

        def sample(with_model):
            zeros = torch.zeros_like(noise)
            return comfy.sample.sample(
                with_model, noise, 4, 5.0, "euler", "normal", *texts, zeros, disable_pbar=True, seed=1
            )

        first, composed, again = sample(self.model), sample(applied), sample(self.model)
        self.assertTrue(torch.isfinite(first).all())
        self.assertTrue(torch.equal(first, again))
        self.assertGreater((first - composed).abs().max(), 1e-4)

    def test_local_concepts_act_on_conditional_entries_only(self):
        """Prompts told in any order, and one prompt twice, are the native call's: unconditional entries first."""
        local = macula.Concept.create(
            {one.path: ((one.out_features, one.in_features), range(64)) for one in self.pipeline.projections},
            self.pipeline.fingerprint, trigger="cat", scope="local",
        )
        (applied,) = node("MaculaApplyConcept")(self.model, node("MaculaComposeConcepts")(local, 1.0)[0])
        prompts = [self.pipeline.encode_prompt(text) for text in ("", "a photo of the red cat", "a cat")]
        context = np.concatenate([one.context for one in prompts])
        x = np.concatenate([self.x.numpy(), self.x.numpy()[:1]])
        self.pipeline.clear()
        self.unet.composed = ()
        plain = self.pipeline.denoise(x, 500, context)
        self.pipeline.compose(macula.Term(local))
        pair = [self.pipeline.denoise(x[[0, at]], 500, context[[0, at]], embedding=prompts[at], first_conditional=1)
                for at in (1, 2)]
        self.pipeline.clear()

        def predict(order, kinds):
            options = {**applied.model_options["transformer_options"], "cond_or_uncond": kinds}
            return self.unet(
                torch.from_numpy(x[order]), torch.tensor([500.0] * len(order)), context=torch.from_numpy(context[order]),
                transformer_options=options, macula_prompts=[prompts[at] for at in order],
            ).numpy()

        for order, kinds in [([0, 1], [1, 0]), ([1, 0], [0, 1]), ([2, 0, 1], [0, 1, 0])]:
            for at, predicted in zip(order, predict(order, kinds)):
                expected = pair[0][0] if at == 0 else pair[at - 1][1]
                np.testing.assert_allclose(predicted, expected, atol=1e-5)
        np.testing.assert_allclose(predict([0], [1])[0], plain[0], atol=1e-5)
        self.assertGreater(np.abs(pair[0][1] - plain[1]).max(), 1e-4)

    def test_noise_levels_are_those_of_diffusers(self):
        noise_levels = sys.modules["comfyui_macula.noise"].noise_levels
        for fields in [
            {"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
            {"trained_betas": np.linspace(0.001, 0.03, 50).tolist(), "num_train_timesteps": 50},
        ]:
            kept = diffusers.DDIMScheduler(**fields).alphas_cumprod.double().numpy()
            np.testing.assert_allclose(noise_levels(fields), np.sqrt((1 - kept) / kept), rtol=1e-3)
        zero = {"beta_schedule": "linear", "rescale_betas_zero_snr": True}
        kept = diffusers.DDIMScheduler(**zero).alphas_cumprod.double().numpy()[:-1]
        np.testing.assert_allclose(noise_levels(zero)[:-1], np.sqrt((1 - kept) / kept), rtol=1e-2)
        self.assertGreater(noise_levels(zero)[-1], 1e4)
        with self.assertRaisesRegex(ValueError, "beta_schedule is sigmoid"):
            noise_levels({"beta_schedule": "sigmoid"})


COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
    "context_dim": 24, "legacy": False,
}
#: UNets of both layouts with fewer channels, and public names of some projections: diffusers' and the checkpoints'.
LAYOUTS = {
    "SD15": ({
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 4, "adm_in_channels": None,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "use_linear_in_transformer": False,
    }, {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": "middle_block.1.transformer_blocks.0.attn2.to_v",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k": "output_blocks.11.1.transformer_blocks.0.attn2.to_k",
    }),
    "SDXL": ({
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_head_channels": 32, "num_heads": -1,
        "adm_in_channels": 16, "num_classes": "sequential",
        "transformer_depth": [0, 0, 2, 2, 3, 3], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3, "use_linear_in_transformer": True,
    }, {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        "down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_v": "input_blocks.8.1.transformer_blocks.2.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block.1.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_v": "output_blocks.2.1.transformer_blocks.1.attn2.to_v",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "output_blocks.3.1.transformer_blocks.0.attn2.to_k",
    }),
}


class OwnModels(unittest.TestCase):
    """ComfyUI's own UNets, its patcher and its LoRAs."""

    def opened(self, layout, dtype):
        fields, known = LAYOUTS[layout]
        kind = getattr(comfy.supported_models, layout)
        model = kind({**COMMON, **fields, "dtype": dtype}).get_model({}, "", device="cpu")
        weights = model.state_dict()
        before = {path: weights[f"diffusion_model.{name}.weight"].normal_().clone() for path, name in known.items()}
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu), before, known

    @staticmethod
    def lora(known, before, seed):
        """A LoRA file of rank 2, and what it adds to each weight."""
        rng, file, added = torch.Generator().manual_seed(seed), {}, {}
        for path, name in known.items():
            rows, columns = before[path].shape
            up, down = torch.randn(rows, 2, generator=rng), torch.randn(2, columns, generator=rng)
            key = "lora_unet_" + name.replace(".", "_")
            file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            added[path] = up @ down
        return file, added

    def test_weights_are_shut_in_list_order_with_loras_and_restored(self):
        for layout in LAYOUTS:
            for dtype in (torch.float32, torch.float16):
                with self.subTest(layout=layout, dtype=dtype):
                    self.shut_between_loras(*self.opened(layout, dtype))

    def shut_between_loras(self, patcher, before, known):
        layers = {path: (tuple(weight.shape), range(0, weight.numel(), 7)) for path, weight in before.items()}
        (composition,) = node("MaculaComposeConcepts")(macula.Concept.create(layers, "ab" * 32), 0.75)
        (first, added), (second, added_after) = (self.lora(known, before, seed) for seed in (1, 2))
        applied, _ = comfy.sd.load_lora_for_models(patcher, None, first, 1.0, 0)
        (applied,) = node("MaculaApplyConcept")(applied, composition)
        applied, _ = comfy.sd.load_lora_for_models(applied, None, second, 0.5, 0)
        self.assertEqual((len(patcher.patches), {len(one) for one in applied.patches.values()}), (0, {3}))
        applied.patch_model()
        for path, name in known.items():
            expected = before[path].float() + added[path]
            expected.reshape(-1)[::7] *= 0.25
            expected = (expected + 0.5 * added_after[path]).to(before[path].dtype)
            weight = patcher.model.state_dict()[f"diffusion_model.{name}.weight"]
            torch.testing.assert_close(weight, expected, msg=path)
        applied.unpatch_model()
        for path, name in known.items():
            self.assertTrue(torch.equal(patcher.model.state_dict()[f"diffusion_model.{name}.weight"], before[path]), path)

    def test_a_concept_of_another_layout_is_one_clear_error(self):
        patcher, _, _ = self.opened("SD15", torch.float32)
        path = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
        concept = macula.Concept.create({path: ((64, 24), range(5))}, "ab" * 32)
        with self.assertRaisesRegex(ValueError, rf"it has no {path} \(1 are missing\)"):
            node("MaculaApplyConcept")(patcher, node("MaculaComposeConcepts")(concept, 1.0)[0])


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


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[5:]])
