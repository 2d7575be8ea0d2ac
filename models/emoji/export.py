"""Writes the trained networks as an ONNX folder in the diffusers layout, and reads weights back from it.

Matrices and kernels are stored as fp16 and cast to fp32 in the graph: half the bytes, fp32 arithmetic.
Initializers carry their PyTorch names (`down_blocks.1. ... .attn2.to_k.weight`); those that feed a MatMul
are stored [in, out], the transpose of PyTorch's. So a clone without a checkpoint can train on.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import data
import network as net
import train
import vocabulary as words

FOLDER = Path(__file__).resolve().parent / "onnx"
OPSET = 17


def export(model, state, folder, seed=0):
    """Writes `model` (`train.Model`) and the training `state` into the ONNX folder."""
    folder = Path(folder)
    unet_inputs = {
        "sample": torch.randn(2, 3, 64, 64),
        "timestep": torch.tensor([10, 20]),
        "encoder_hidden_states": torch.randn(2, words.MAX_LENGTH, net.UNET_CONFIG["cross_attention_dim"]),
        "class_labels": torch.tensor([0, 1]),
    }
    picture = {0: "batch", 2: "height", 3: "width"}
    unet_axes = {
        "sample": picture,
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "sequence"},
        "class_labels": {0: "batch"},
        "out_sample": picture,
    }
    write_onnx(model.unet, unet_inputs, unet_axes, folder / "unet" / "model.onnx")
    text = {0: "batch", 1: "sequence"}
    ids = {"input_ids": torch.ones(2, words.MAX_LENGTH, dtype=torch.long)}
    write_onnx(model.text_encoder, ids, {"input_ids": text, "last_hidden_state": text}, folder / "text_encoder" / "model.onnx")
    write_configs(folder)
    write_json(folder / "training.json", {"seed": seed, **state})


def write_onnx(module, inputs, axes, path):
    """Traces `module` and stores it; the keys of `axes` that are no inputs name the outputs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    module = module.eval().to(memory_format=torch.contiguous_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            path,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[name for name in axes if name not in inputs],
            dynamic_axes=axes,
            dynamo=False,
        )
    graph_model = onnx.load(path)
    name_weights(graph_model.graph)
    store_as_half(graph_model.graph)
    onnx.checker.check_model(graph_model, full_check=True)
    onnx.save(graph_model, path)


def name_weights(graph):
    """Gives the anonymous initializers that the tracer makes their PyTorch names, read off the node names.

    These are the [in, out] matrices of Linear layers and the [C, 1, 1] scales and shifts of group norms.
    """
    kinds = {"MatMul": "weight", "Mul": "weight", "Add": "bias"}
    initializers = {x.name for x in graph.initializer}
    renamed = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name.startswith("onnx::") and node.op_type in kinds and name in initializers:
                scope = node.name.rsplit("/", 1)[0].strip("/").replace("/", ".")
                renamed[name] = node.input[i] = f"{scope}.{kinds[node.op_type]}"
    for initializer in graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)


def store_as_half(graph):
    """Turns matrices and kernels into fp16 behind a Cast to fp32; vectors stay fp32."""
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != TensorProto.FLOAT or np.prod(initializer.dims) == max(initializer.dims, default=1):
            continue
        name, values = initializer.name, numpy_helper.to_array(initializer)
        initializer.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
        for node in graph.node:
            for i, used in enumerate(node.input):
                if used == name:
                    node.input[i] = name + "/fp32"
        casts.append(helper.make_node("Cast", [name], [name + "/fp32"], name=name + "/Cast", to=TensorProto.FLOAT))
    nodes = casts + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_configs(folder):
    """The files around the graphs: what hosts read in a diffusers folder, and the decomposed process."""
    pixel = {"in_channels": 3, "out_channels": 3, "sample_size": data.SIZE, "pixel_unshuffle": 2}
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **net.UNET_CONFIG, **pixel})
    encoder = net.TextEncoder
    write_json(
        folder / "text_encoder" / "config.json",
        {
            "architectures": ["TextEncoder"],
            "hidden_size": net.UNET_CONFIG["cross_attention_dim"],
            "inner_size": encoder.WIDTH,
            "num_hidden_layers": encoder.LAYERS,
            "num_attention_heads": encoder.HEADS,
            "max_position_embeddings": encoder.POSITIONS,
            "vocab_size": encoder.ROWS,
            "pad_token_id": words.WORDS.index(words.PAD),
            "bos_token_id": words.WORDS.index(words.START),
            "eos_token_id": words.WORDS.index(words.END),
        },
    )
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    words.build_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": words.MAX_LENGTH,
            "padding_side": "right",
            "pad_token": words.PAD,
            "bos_token": words.START,
            "eos_token": words.END,
            "unk_token": words.UNKNOWN,
            "placeholder_tokens": list(words.PLACEHOLDERS),
        },
    )
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": net.STEPS,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "steps_offset": 0,
            "set_alpha_to_one": True,
            "clip_sample": True,
            "clip_sample_range": 1.0,
        },
    )
    write_json(
        folder / "scheduler" / "decomposed.json",
        {
            "num_train_timesteps": net.STEPS,
            "beta_schedule": "squaredcos_cap_v2",
            "turning_points": list(net.TURNING_POINTS),
            "attenuation": {"r": net.ATTENUATION, "q": net.POWER},
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "use_clipped_model_output": True,
            "plain_class_label": net.PLAIN,
            "stage_class_labels": [net.STAGE0, net.STAGE1, net.STAGE2],
            "stage_sizes": [64, 32, 16],
        },
    )
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["onnx", "TextEncoder"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "unet": ["onnx", "UNet2DConditionModel"],
        },
    )


def load_shipped_weights(model, folder=FOLDER):
    """Fills `train.Model` from the ONNX folder; returns the training state, or None where no model lies there."""
    folder = Path(folder)
    if not (folder / "training.json").exists():
        return None
    for part in ("unet", "text_encoder"):
        graph = onnx.load(folder / part / "model.onnx").graph
        stored = {i.name: numpy_helper.to_array(i).astype(np.float32) for i in graph.initializer}
        transposed = {node.input[1].removesuffix("/fp32") for node in graph.node if node.op_type == "MatMul"}
        module = getattr(model, part)
        filled = {}
        for name, parameter in module.state_dict().items():
            values = stored[name].T if name in transposed else stored[name]
            filled[name] = torch.from_numpy(values.copy()).reshape(parameter.shape)
        module.load_state_dict(filled)
    state = json.loads((folder / "training.json").read_text())
    state["pictures"] = {int(size): count for size, count in state["pictures"].items()}
    return {key: state[key] for key in ("step", "hours", "pictures")}


def verify(model, folder):
    """Compares the stored graphs with PyTorch over several shapes; returns the largest error of each."""
    torch.manual_seed(1)
    width = net.UNET_CONFIG["cross_attention_dim"]
    unet = onnxruntime.InferenceSession(Path(folder) / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    text = onnxruntime.InferenceSession(Path(folder) / "text_encoder" / "model.onnx", providers=["CPUExecutionProvider"])
    rounded = train.Model().eval()
    load_shipped_weights(rounded, folder)
    worst = {"unet": 0.0, "text_encoder": 0.0, "fp16 rounding": 0.0}
    shapes = [(1, 64, 64, 24), (2, 32, 32, 24), (5, 48, 64, 7), (2, 16, 16, 77), (1, 64, 96, 1)]
    for batch, height, width_px, length in shapes:
        x = torch.randn(batch, 3, height, width_px)
        t = torch.randint(0, net.STEPS, (batch,))
        labels = torch.randint(0, 5, (batch,))
        context = torch.randn(batch, length, width)
        feeds = {"sample": x, "timestep": t, "encoder_hidden_states": context, "class_labels": labels}
        out = torch.from_numpy(unet.run(None, {k: v.numpy() for k, v in feeds.items()})[0])
        with torch.no_grad():
            expected = rounded.unet(x, t, context, labels)
            unrounded = model.unet(x, t, context, labels)
        worst["unet"] = max(worst["unet"], (out - expected).abs().max().item())
        worst["fp16 rounding"] = max(worst["fp16 rounding"], (expected - unrounded).abs().max().item())
        ids = torch.randint(0, len(words.WORDS), (batch, min(length, net.TextEncoder.POSITIONS)))
        states = torch.from_numpy(text.run(None, {"input_ids": ids.numpy()})[0])
        with torch.no_grad():
            difference = (states - rounded.text_encoder(ids)).abs().max().item()
        worst["text_encoder"] = max(worst["text_encoder"], difference)
    assert worst["unet"] < 1e-3 and worst["text_encoder"] < 1e-3, worst
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=data.DEFAULT_WORK, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=FOLDER, help="ONNX folder to write")
    options = parser.parse_args()
    saved = torch.load(options.work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = train.averaged_model(saved)
    export(model, saved["state"], options.out)
    print("largest differences from PyTorch:", verify(model, options.out))
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{size / 2**20:.2f} MiB in {options.out}")


if __name__ == "__main__":
    main()
