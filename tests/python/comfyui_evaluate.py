"""Figures of the ComfyUI nodes beside ComfyUI's own torch UNet, one JSON object a line: `name`, `value`, `bound`, `note`.

- `apply_to_torch_ms`: a concept of 1 % of the K and V weights of a UNet of Stable Diffusion 1.5's size: the node, and each of
  the weights as ComfyUI's patcher changes it, with a copy of each to restore it from.
- `comfy_step_ratio`: a step of KSampler through our MODEL, in units of one through the same UNet in ComfyUI's torch, both on
  as many threads, in turn.

Arguments: the folder of that UNet as `export_unets.py sd15` makes it; the threads (2 if left out). MACULA_LIBRARY and
MACULA_ONNXRUNTIME say what runs. Ends with 69 if ComfyUI can't be had here.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import comfyui_home

try:
    HOME = comfyui_home.home()
except comfyui_home.Unavailable as reason:
    print(f"there is no ComfyUI: {reason}", file=sys.stderr)
    sys.exit(comfyui_home.UNAVAILABLE)

EXPORTED, THREADS = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
ROOT = comfyui_home.ROOT
sys.path[:0] = [str(HOME / "ComfyUI"), str(HOME / "packages"), str(ROOT / "bindings/python")]
sys.argv = sys.argv[:1] + ["--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_patcher
import comfy.sample
import comfy.sd
import folder_paths
import numpy as np
import onnx
import torch

import export_unets
import macula

ROUNDS, STEPS, APPLIED = 3, 2, 7


def nodes(folder):
    """The package, as ComfyUI imports a custom node."""
    folder_paths.models_dir = str(folder)
    pack = ROOT / "bindings/comfyui"
    spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
    module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(name, value, bound, note):
    print(json.dumps({"name": name, "value": value, "bound": bound, "note": note}), flush=True)


def pipeline_folder(folder):
    """A model folder with the exported UNet and the scheduler of Stable Diffusion 1.5."""
    (folder / "unet").symlink_to(EXPORTED.resolve())
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({
        "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "prediction_type": "epsilon",
    }))
    # The library takes no UNet for latents without a decoder, which is not used here.
    (folder / "vae_decoder").mkdir()
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", channels, *sides])
              for name, channels, sides in [("latent_sample", 4, ["h", "w"]), ("sample", 3, ["height", "width"])]]
    weight = onnx.numpy_helper.from_array(np.zeros((4, 3, 8, 8), dtype=np.float32), "weight")
    node = onnx.helper.make_node("ConvTranspose", ["latent_sample", "weight"], ["sample"], strides=[8, 8])
    graph = onnx.helper.make_graph([node], "decoder", values[:1], values[1:], [weight])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "vae_decoder/model.onnx")
    return folder


def a_concept(unet):
    """Every hundredth weight of each K and V projection, from a place of its own on."""
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            weight = module.weight
            layers[name] = (tuple(weight.shape), range(len(layers), weight.numel(), 100))
    return macula.Concept.create(layers, "ab" * 32)


def apply_to_torch(pack, own, concept):
    """Milliseconds of the node and of the patcher's changes, of several times."""
    (composition,) = pack.ComposeConcepts().add(concept, 1.0)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    before = own.model.state_dict()[key].clone()
    took = []
    for _ in range(APPLIED):
        start = time.perf_counter()
        (applied,) = pack.ApplyConcept().apply(own, composition)
        for name in applied.patches:
            applied.patch_weight_to_device(name, torch.device("cpu"))
        took.append(1e3 * (time.perf_counter() - start))
        changed = (own.model.state_dict()[key] != before).sum().item()
        assert changed >= before.numel() // 100, f"{changed} weights changed"
        applied.unpatch_model()
        assert torch.equal(own.model.state_dict()[key], before)
    return statistics.median(took)


def steps(model, texts, noise):
    """Seconds of each step of KSampler's euler, and what it drew."""
    times = [time.perf_counter()]
    drawn = comfy.sample.sample(
        model, noise, STEPS, 7.5, "euler", "normal", *texts, torch.zeros_like(noise), disable_pbar=True, seed=1,
        callback=lambda *_: times.append(time.perf_counter()),
    )
    return np.diff(times).tolist(), drawn


def main():
    torch.set_num_threads(THREADS)
    unet = export_unets.build("sd15")
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        pack = nodes(Path(name))
        own = comfy.sd.load_diffusion_model_state_dict(dict(unet.state_dict()), model_options={"dtype": torch.float32})
        concept = a_concept(unet)
        del unet
        note = f"{concept.neurons:,} of {concept.weights:,} weights, float32, median of {APPLIED}"
        figure("apply_to_torch_ms", apply_to_torch(pack, own, concept), "<= 100", note)

        folder = pipeline_folder(Path(name))
        pipeline = macula.Pipeline(folder, threads=THREADS)
        ours = comfy.model_patcher.ModelPatcher(
            sys.modules["pack.models"].MaculaModel(folder, pipeline), torch.device("cpu"), torch.device("cpu"),
            size=pipeline.memory.weights,
        )
        rng = torch.Generator().manual_seed(1)
        texts = [[[torch.randn(1, 77, 768, generator=rng), {}]] for _ in range(2)]
        noise = torch.randn(1, 4, 64, 64, generator=rng)
        seconds, drawn = {"ours": [], "theirs": []}, {}
        for _ in range(ROUNDS):
            for side, model in (("ours", ours), ("theirs", own)):
                took, drawn[side] = steps(model, texts, noise)
                # The first step of a walk also gets the model ready.
                seconds[side] += took[1:]
        apart = (torch.linalg.norm(drawn["ours"] - drawn["theirs"]) / torch.linalg.norm(drawn["theirs"])).item()
        assert apart < 1e-3, f"the two UNets draw different latents: {apart:.1e} apart"
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        note = (
            f"SD1.5 size, 512 x 512, guided, {THREADS} threads: {medians['ours']:.2f} s and {medians['theirs']:.2f} s a step, "
            f"latents {apart:.0e} apart"
        )
        figure("comfy_step_ratio", medians["ours"] / medians["theirs"], "<= 0.7", note)


if __name__ == "__main__":
    main()
