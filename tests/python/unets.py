"""Small random-weight UNets, exported to ONNX, with predictions and walks made by PyTorch, for `tests/diffusion_unet.rs`.

usage: unets.py KIND FOLDER     KIND: text, half, bfloat16, static or unconditional

FOLDER/model/model.onnx is the export. FOLDER/cases.json and FOLDER/values.f32 hold: `predictions` (inputs and outputs), one of them
with the K and V weights of `sets` (per module path: out, in and flat indices) set to zero in the PyTorch model, one with those
of `self_sets` too, which are self-attention's, and for `text`
25-step `walks` with every one of the six samplers, with the noise that each step adds given. For `bfloat16` the export holds its
weights, keys, values, text and states in that type and computes in single precision; FOLDER/native also computes in it, which
the operators of its opset do not allow.
"""

import importlib
import json
import pathlib
import sys

import numpy as np
import onnx
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from schedulers import MODULES


class Values:
    def __init__(self):
        self.values, self.offset = [], 0

    def put(self, tensor):
        array = np.ascontiguousarray(torch.as_tensor(tensor).float().numpy(), dtype="<f4")
        at = self.offset
        self.values.append(array.ravel())
        self.offset += array.size
        return {"offset": at, "shape": list(array.shape)}


def conditional(classes=True):
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=48, attention_head_dim=4, norm_num_groups=16, num_class_embeds=5 if classes else None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


class Signature(torch.nn.Module):
    def __init__(self, unet, classes):
        super().__init__()
        self.unet, self.classes = unet, classes

    def forward(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
        if encoder_hidden_states is None:
            return self.unet(sample, timestep, return_dict=False)[0]
        labels = class_labels if self.classes else None
        return self.unet(sample, timestep, encoder_hidden_states, class_labels=labels, return_dict=False)[0]


def export(module, inputs, names, dynamic, folder, config):
    folder.mkdir(parents=True)
    torch.onnx.export(
        module, inputs, str(folder / "model.onnx"), input_names=names, output_names=["out_sample"], dynamic_axes=dynamic,
        opset_version=17, dynamo=False,
    )
    (folder / "config.json").write_text(json.dumps(dict(config), default=str))


def store_in_bfloat16(path):
    """Rewrites a single-precision export: what is stored and what goes in and out is bfloat16, and so are the products of the
    cross-attention's keys and values; all else is computed as before."""
    single, brain = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    model = onnx.load(path)
    graph, before, after = model.graph, [], []
    names = {value.name for value in [*graph.input, *graph.output]}
    stored = [tensor.name for tensor in graph.initializer if tensor.data_type == single]
    for tensor in graph.initializer:
        if tensor.data_type == single:
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).bfloat16()
            tensor.data_type, tensor.raw_data = brain, values.view(torch.int16).numpy().tobytes()
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = brain
    taken = stored + [value.name for value in graph.input if value.type.tensor_type.elem_type == brain]
    for node in graph.node:
        product = node.op_type == "MatMul" and node.name.endswith(("attn2/to_k/MatMul", "attn2/to_v/MatMul"))
        if product:
            after.append((node, node.output[0]))
            node.output[0] += "_brain"
        else:
            node.input[:] = [f"{name}_single" if name in taken else name for name in node.input]
        node.output[:] = [f"{name}_single" if name in names else name for name in node.output]
    before = [onnx.helper.make_node("Cast", [name], [f"{name}_single"], to=single) for name in taken]
    nodes = list(graph.node)
    for node, name in after:
        nodes.insert(nodes.index(node) + 1, onnx.helper.make_node("Cast", [node.output[0]], [name], to=single))
    last = [onnx.helper.make_node("Cast", [f"{v.name}_single"], [v.name], to=brain) for v in graph.output]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*before, *nodes, *last])
    onnx.save(model, path)


def random_sets(unet, rng, attention):
    sets = {}
    for name, parameter in sorted(unet.named_parameters()):
        if name.endswith((f"{attention}.to_k.weight", f"{attention}.to_v.weight")):
            chosen = np.flatnonzero(rng.random(parameter.numel()) < 0.05)
            sets[name.removesuffix(".weight")] = [*parameter.shape, chosen.tolist()]
    return sets


def walk(unet, name, values, context, rng):
    fields = {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    scheduler = getattr(module, name)(**fields)
    scheduler.set_timesteps(25)
    shape = (2, 4, 8, 8)
    noises = torch.from_numpy(rng.standard_normal((26, *shape)).astype(np.float32))
    sample, step, states = noises[25] * scheduler.init_noise_sigma, 0, []
    module.randn_tensor = lambda shape, **_: noises[step]
    labels = torch.tensor([1, 3])
    options = {"eta": 0.5} if name == "DDIMScheduler" else {}
    for step, t in enumerate(scheduler.timesteps):
        prediction = unet(scheduler.scale_model_input(sample, t), t, context, class_labels=labels, return_dict=False)[0]
        sample = scheduler.step(prediction, t, sample, return_dict=False, **options)[0]
        states.append(sample.clone())
    return {"config": {"_class_name": name, **fields}, "eta": options.get("eta", 0.0), "noises": values.put(noises),
            "states": values.put(torch.stack(states))}


def main(kind, folder):
    torch.manual_seed(3)
    torch.set_num_threads(2)
    folder, rng, values = pathlib.Path(folder), np.random.default_rng(4), Values()
    cases = {"predictions": []}

    def predict(module, what, sample, timestep, context=None, labels=None):
        inputs = [x for x in (sample, timestep, context, labels) if x is not None]
        case = {"what": what, "sample": values.put(sample), "timestep": float(timestep.reshape(-1)[0]),
                "output": values.put(module(*inputs))}
        if context is not None:
            case["context"] = values.put(context)
        if labels is not None:
            case["labels"] = labels.tolist()
        cases["predictions"].append(case)

    with torch.no_grad():
        if kind == "unconditional":
            unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
                               norm_num_groups=16, attention_head_dim=8,
                               down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                               up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()
            module = Signature(unet, False)
            export(module, (torch.randn(1, 3, 8, 8), torch.tensor([3])), ["sample", "timestep"],
                   {"sample": {0: "batch", 2: "height", 3: "width"}}, folder / "model", unet.config)
            predict(module, "plain", torch.randn(2, 3, 8, 8), torch.tensor([41]))
        elif kind == "static":
            unet = conditional(classes=False)
            module = Signature(unet, False)
            inputs = (torch.randn(1, 4, 8, 8), torch.tensor(5.0), torch.randn(1, 77, 48))
            export(module, inputs, ["sample", "timestep", "encoder_hidden_states"], {}, folder / "model", unet.config)
            predict(module, "plain", torch.randn(1, 4, 8, 8), torch.tensor(123.25), torch.randn(1, 77, 48))
        else:
            unet = conditional()
            module = Signature(unet, True)
            batch = {0: "batch"}
            dynamic = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": batch, "class_labels": batch,
                       "encoder_hidden_states": {0: "batch", 1: "sequence"}}
            sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 48)
            labels, time = torch.tensor([1, 3]), torch.tensor([500, 500])
            names = ["sample", "timestep", "encoder_hidden_states", "class_labels"]
            if kind == "half":
                half = Signature(unet.half(), True)
                export(half, (sample.half(), time, context.half(), labels), names, dynamic, folder / "model", unet.config)
                unet.float()
            elif kind == "bfloat16":
                brain = Signature(unet.bfloat16(), True)
                sample, context = sample.bfloat16(), context.bfloat16()
                export(brain, (sample, time, context, labels), names, dynamic, folder / "native", unet.config)
                # As the export computes: with rounded weights and inputs, in single precision.
                unet.float()
                sample, context = sample.float(), context.float()
                export(module, (sample, time, context, labels), names, dynamic, folder / "model", unet.config)
                store_in_bfloat16(folder / "model/model.onnx")
            else:
                export(module, (sample, time, context, labels), names, dynamic, folder / "model", unet.config)
            predict(module, "plain", sample, time, context, labels)
            predict(module, "other sizes", torch.randn(3, 4, 12, 6), torch.tensor([7, 7, 7]), torch.randn(3, 154, 48),
                    torch.tensor([0, 4, 2]))
            if kind == "text":
                cases["walks"] = [walk(unet, name, values, context, rng) for name in MODULES]
                cases["context"] = values.put(context)
                parameters = dict(unet.named_parameters())
                for key, attention, what in (
                    ("sets", "attn2", "composed"), ("self_sets", "attn1", "composed, with self-attention")
                ):
                    cases[key] = random_sets(unet, rng, attention)
                    for path, (_, _, chosen) in cases[key].items():
                        parameters[path + ".weight"].view(-1)[chosen] = 0.0
                    predict(module, what, sample, time, context, labels)
    np.concatenate(values.values).tofile(folder / "values.f32")
    (folder / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
