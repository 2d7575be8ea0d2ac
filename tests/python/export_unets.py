"""Exports diffusers' UNets to ONNX by every exporter that people use, as fixtures for tests and benchmarks.

The topologies are those of Stable Diffusion 1.x, 2.x and XL (number, kind and nesting of the blocks), with random
weights from a seed and, except for the full-size one, small widths. A fixture is a folder

    model.onnx, model.onnx.data   the export (the second only if the exporter made it)
    weights.safetensors           the attention projections as torch has them: `<module path>.weight`, `.bias`
    reference.safetensors         `<case>.<input name>` and `<case>.out_sample`: what torch computes
    gradients.safetensors         for case 0: `target`, `weight` and, for the loss sum_b weight_b mean((out_sample_b - target_b)^2),
                                  `loss` and the gradient with respect to each attention projection, `<module path>.weight`

    python export_unets.py --out FOLDER KEY...             make fixtures that are not there yet; `all` is the matrix
                                                           without the full-size one
    python export_unets.py sd15 --exporter torchscript17 --out FOLDER      make the full-size Stable Diffusion 1.5
"""

import argparse
import copy
import functools
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from safetensors.torch import save_file

INPUTS = ["sample", "timestep", "encoder_hidden_states"]
ADDED_INPUTS = ["text_embeds", "time_ids"]
OUTPUT = "out_sample"

# --- the models ----------------------------------------------------------------------------------------------------

SMALL = dict(sample_size=16, norm_num_groups=8, layers_per_block=2, act_fn="silu")


def sd1():
    """Stable Diffusion 1.x: 16 cross-attention layers, 1x1 convolutions around each transformer."""
    return dict(SMALL, block_out_channels=(16, 32, 32, 32), cross_attention_dim=24, attention_head_dim=4)


def sd2():
    """Stable Diffusion 2.x: as 1.x with linear projections around each transformer and heads that grow with depth."""
    return dict(
        SMALL,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=40,
        attention_head_dim=(2, 4, 8, 8),
        use_linear_projection=True,
        upcast_attention=True,
    )


def sdxl(depth=(1, 2, 10)):
    """Stable Diffusion XL: 70 cross-attention layers at full depth, a pooled text and sizes as further inputs."""
    return dict(
        SMALL,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depth,
        cross_attention_dim=48,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )


def sd15():
    """Stable Diffusion 1.5 at its full size: 860 M parameters, 19,169,280 of them in cross-attention's K and V."""
    return dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sdxl-shallow": lambda: sdxl((1, 1, 2)), "sd15": sd15}


def build(family, *, biased=False, tied=False, projected=False, seed=0):
    """A UNet of a family with random weights.

    biased: cross-attention's K and V have biases. tied: the two cross-attention layers of a down block share their K
    weight. projected: a linear layer stands between the text input and all K and V (`encoder_hid_proj`).
    """
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    if projected:
        config.update(encoder_hid_dim=20, encoder_hid_dim_type="text_proj")
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    if biased:
        for layer in (block for name, block in unet.named_modules() if name.endswith("attn2")):
            for role in ("to_k", "to_v"):
                weight = getattr(layer, role).weight
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=True).requires_grad_(False)
                linear.weight.copy_(weight)
                linear.bias.normal_()
                setattr(layer, role, linear)
    if tied:
        first, second = (block.transformer_blocks[0].attn2 for block in unet.down_blocks[0].attentions)
        second.to_k.weight = first.to_k.weight
    return unet


def inputs_of(unet, batch=2, size=16, tokens=7, seed=1):
    """A call's inputs by name."""
    draw = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=draw)
    config = unet.config
    inputs = {
        "sample": normal(batch, config.in_channels, size, size),
        "timestep": torch.tensor(37 + seed, dtype=torch.int64),
        "encoder_hidden_states": normal(batch, tokens, config.encoder_hid_dim or config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = normal(batch, config.projection_class_embeddings_input_dim - sizes)
        inputs["time_ids"] = torch.rand(batch, 6, generator=draw) * 64
    return {
        name: value.to(unet.dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }


class Call(torch.nn.Module):
    """The UNet behind a signature of tensors only; its modules keep their names."""

    def __init__(self, unet):
        super().__init__()
        for name, module in unet.named_children():
            self.add_module(name, module)
        self.__dict__["unet"] = unet

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None):
        added = {} if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added or None, return_dict=False
        )[0]


# --- the exporters -------------------------------------------------------------------------------------------------


def torchscript(unet, path, *, opset, dynamic=True):
    """torch.onnx's tracing exporter."""
    inputs = inputs_of(unet)
    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
        "text_embeds": {0: "batch"},
        "time_ids": {0: "batch"},
        OUTPUT: {0: "batch", 2: "height", 3: "width"},
    }
    torch.onnx.export(
        Call(unet),
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=[OUTPUT],
        opset_version=opset,
        dynamic_axes={name: axes[name] for name in [*inputs, OUTPUT] if name in axes} if dynamic else None,
        dynamo=False,
    )


def dynamo(unet, path, *, opset, optimize=True):
    """torch.export and torch.onnx's exporter on top of it; batch and prompt length are symbolic."""
    inputs = inputs_of(unet)
    if unet not in programs:
        batch, tokens = torch.export.Dim("batch", max=63), torch.export.Dim("tokens")
        axes = {
            "sample": {0: batch},
            "timestep": None,
            "encoder_hidden_states": {0: batch, 1: tokens},
            "text_embeds": {0: batch},
            "time_ids": {0: batch},
        }
        shapes = {name: axes[name] for name in inputs}
        programs.clear()
        programs[unet] = torch.export.export(Call(unet), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    torch.onnx.export(
        programs[unet],
        (),
        str(path),
        kwargs=inputs,
        input_names=list(inputs),
        output_names=[OUTPUT],
        opset_version=opset,
        dynamo=True,
        external_data=False,
        optimize=optimize,
        verbose=False,
    )


# What torch.export made of a UNet, for the next opset.
programs = {}


def optimum(unet, path, *, opset):
    """Hugging Face Optimum, as `optimum-cli export onnx` does it for the unet of a pipeline."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import UNetOnnxConfig

    if unet.config.addition_embed_type == "text_time":
        unet.config.text_encoder_projection_dim = inputs_of(unet)["text_embeds"].shape[1]
        unet.config.requires_aesthetics_score = False
        unet.config.time_cond_proj_dim = None
    export(unet, UNetOnnxConfig(unet.config, task="semantic-segmentation"), path, opset=opset, do_constant_folding=True)


def ort_fused(unet, path, *, packed):
    """onnxruntime's transformer optimizer: attention becomes `MultiHeadAttention`, with K and V packed into one
    matrix if wanted."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    plain = path.with_name("plain.onnx")
    torchscript(unet, plain, opset=17, dynamic=True)
    options = FusionOptions("unet")
    options.enable_packed_kv = packed
    options.enable_packed_qkv = False
    # These have no kernels on the CPU.
    options.enable_nhwc_conv = False
    options.enable_group_norm = False
    options.enable_skip_group_norm = False
    options.enable_bias_splitgelu = False
    options.enable_bias_add = False
    optimized = optimize_model(
        str(plain), model_type="unet", num_heads=0, hidden_size=0, opt_level=0, optimization_options=options
    )
    optimized.save_model_to_file(str(path))
    plain.unlink()


def quantized(unet, path, *, form):
    """onnxruntime's quantisation of a TorchScript export: `dynamic` (MatMulInteger) or `qdq` (DequantizeLinear)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic
    from onnxruntime.quantization import quantize_static

    plain = path.with_name("plain.onnx")
    torchscript(unet, plain, opset=17, dynamic=True)
    if form == "dynamic":
        quantize_dynamic(str(plain), str(path), op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    else:

        class Reader(CalibrationDataReader):
            calls = iter([{name: value.numpy() for name, value in inputs_of(unet).items()}])

            def get_next(self):
                return next(self.calls, None)

        quant_format = QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator
        quantize_static(str(plain), str(path), Reader(), quant_format=quant_format, op_types_to_quantize=["MatMul"])
    plain.unlink()


def stripped(unet, path):
    """A TorchScript export whose nodes lost their names, as some tools leave it."""
    import onnx

    torchscript(unet, path, opset=17)
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("name")
    onnx.save(model, path)


EXPORTERS = {
    "torchscript14": functools.partial(torchscript, opset=14),
    "torchscript17": functools.partial(torchscript, opset=17),
    "torchscript20": functools.partial(torchscript, opset=20),
    "torchscript14-static": functools.partial(torchscript, opset=14, dynamic=False),
    "torchscript17-static": functools.partial(torchscript, opset=17, dynamic=False),
    "torchscript20-static": functools.partial(torchscript, opset=20, dynamic=False),
    "dynamo17": functools.partial(dynamo, opset=17),
    "dynamo18": functools.partial(dynamo, opset=18),
    "dynamo20": functools.partial(dynamo, opset=20),
    "dynamo23": functools.partial(dynamo, opset=23),
    "dynamo17-raw": functools.partial(dynamo, opset=17, optimize=False),
    "dynamo18-raw": functools.partial(dynamo, opset=18, optimize=False),
    "dynamo20-raw": functools.partial(dynamo, opset=20, optimize=False),
    "dynamo23-raw": functools.partial(dynamo, opset=23, optimize=False),
    "optimum": functools.partial(optimum, opset=18),
    "fused": functools.partial(ort_fused, packed=False),
    "fused-packed": functools.partial(ort_fused, packed=True),
    "quantized-dynamic": functools.partial(quantized, form="dynamic"),
    "quantized-qdq": functools.partial(quantized, form="qdq"),
    "quantized-qoperator": functools.partial(quantized, form="qoperator"),
    "stripped": stripped,
}

# --- the fixtures --------------------------------------------------------------------------------------------------


@dataclass
class Fixture:
    """One export: `key` is its folder's name."""

    key: str
    family: str
    exporter: str
    dtype: torch.dtype = torch.float32
    to_kv: bool = False
    options: dict = field(default_factory=dict)

    @property
    def source(self):
        """What is the same for fixtures of the same UNet."""
        return (self.family, self.dtype, self.to_kv, *sorted(self.options))

    @property
    def task(self):
        """What is the same for fixtures that one process makes: dynamo's share what torch.export made."""
        return (self.source, self.exporter.startswith("dynamo"))

    def unet(self):
        """The UNet, before projections are packed."""
        return build(self.family, **self.options).to(self.dtype)

    def cases(self, unet):
        """The calls that torch answers beside the export: the traced sizes, and others where the export allows."""
        yield inputs_of(unet)
        if "static" not in self.exporter:
            size = 16 if self.exporter.startswith("dynamo") else 24
            yield inputs_of(unet, batch=3, size=size, tokens=11, seed=2)

    def make(self, unet, folder):
        """Writes the fixture's files into a folder."""
        weights = {
            name: value.clone()
            for name, value in unet.state_dict().items()
            if name.rsplit(".", 1)[0].endswith((".to_k", ".to_v"))
        }
        save_file(weights, folder / "weights.safetensors")
        reference = {}
        for index, inputs in enumerate(self.cases(unet)):
            with torch.no_grad():
                output = Call(unet)(**inputs)
            tensors = {**inputs, OUTPUT: output}
            reference.update({f"{index}.{name}": value.contiguous() for name, value in tensors.items()})
        save_file(reference, folder / "reference.safetensors")
        if self.family != "sd15":
            save_file(gradients(unet, next(self.cases(unet))), folder / "gradients.safetensors")
        processor = AttnProcessor() if self.exporter.startswith("fused") else AttnProcessor2_0()
        processors = dict.fromkeys(unet.attn_processors, processor)
        if self.to_kv:
            for name, layer in unet.named_modules():
                if name.endswith("attn2"):
                    layer.fuse_projections(fuse=True)
                    processors[f"{name}.processor"] = FusedAttnProcessor2_0()
        unet.set_attn_processor(processors)
        EXPORTERS[self.exporter](unet, folder / "model.onnx")


def gradients(unet, inputs, seed=2):
    """The loss of a random target and its gradients, computed in float32 also for narrower weights."""
    unet = copy.deepcopy(unet).float().requires_grad_()
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    generator = torch.Generator().manual_seed(seed)
    named = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if name.endswith((".to_k.weight", ".to_v.weight"))
    }
    output = Call(unet)(**inputs)
    target = torch.randn(output.shape, generator=generator)
    weight = torch.rand(len(output), generator=generator) + 0.5
    loss = (weight * ((output - target) ** 2).mean(dim=tuple(range(1, output.ndim)))).sum()
    found = torch.autograd.grad(loss, list(named.values()))
    tensors = {"target": target, "weight": weight, "loss": loss.detach()[None]}
    return tensors | {name: gradient.contiguous() for name, gradient in zip(named, found)}


def matrix():
    """Every fixture by key."""
    exporters = (
        "torchscript14",
        "torchscript17",
        "torchscript20",
        "torchscript14-static",
        "torchscript17-static",
        "torchscript20-static",
        "dynamo17",
        "dynamo18",
        "dynamo20",
        "dynamo23",
        "optimum",
    )

    def variant(family, exporter):
        # The exporter's optimizer takes most of its time; without it weights stay as torch has them.
        raw = exporter.startswith("dynamo") and exporter != "dynamo18" and family != "sd1"
        return f"{exporter}-raw" if raw else exporter

    fixtures = [
        Fixture(f"{family}-{exporter}", family, variant(family, exporter))
        for family in ("sd1", "sd2", "sdxl-shallow")
        for exporter in exporters
    ]
    fixtures += [
        Fixture("sdxl-torchscript17", "sdxl", "torchscript17"),
        Fixture("sd15-torchscript17", "sd15", "torchscript17"),
        Fixture("biased-torchscript17", "sd1", "torchscript17", options=dict(biased=True)),
        Fixture("biased-dynamo18", "sd1", "dynamo18-raw", options=dict(biased=True)),
        Fixture("float16-torchscript17", "sd1", "torchscript17", dtype=torch.float16),
        Fixture("bfloat16-torchscript17", "sd1", "torchscript17", dtype=torch.bfloat16),
        Fixture("float16-dynamo18", "sd1", "dynamo18-raw", dtype=torch.float16),
        Fixture("bfloat16-dynamo18", "sd1", "dynamo18-raw", dtype=torch.bfloat16),
        Fixture("tied-torchscript17", "sd1", "torchscript17", options=dict(tied=True)),
        Fixture("projected-torchscript17", "sd1", "torchscript17", options=dict(projected=True)),
        Fixture("to_kv-torchscript17", "sd1", "torchscript17", to_kv=True),
        Fixture("to_kv-dynamo18", "sd1", "dynamo18-raw", to_kv=True),
        Fixture("stripped", "sd1", "stripped"),
        Fixture("fused", "sd1", "fused"),
        Fixture("fused-packed", "sd1", "fused-packed"),
        Fixture("quantized-dynamic", "sd1", "quantized-dynamic"),
        Fixture("quantized-qdq", "sd1", "quantized-qdq"),
        Fixture("quantized-qoperator", "sd1", "quantized-qoperator"),
    ]
    return {fixture.key: fixture for fixture in fixtures}


def make(fixture, unet, folder):
    """Makes a fixture; its folder appears in one piece."""
    began = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=f".{fixture.key}.", dir=folder.parent))
    try:
        fixture.make(unet, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "model.onnx").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{fixture.key}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def make_all(jobs):
    """Makes fixtures of one UNet, given with their folders, where these are not there yet."""
    jobs = [(fixture, folder) for fixture, folder in jobs if not (folder / "model.onnx").exists()]
    unet = jobs[0][0].unet() if jobs else None
    for fixture, folder in jobs:
        make(fixture, fixture.unet() if fixture.to_kv else unet, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", default=["all"], metavar="KEY")
    parser.add_argument("--out", type=Path, required=True, help="the folder that holds one folder a fixture")
    parser.add_argument("--exporter", choices=EXPORTERS, default="torchscript17", help="for a family's name as key")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), help="processes at a time")
    arguments = parser.parse_args()

    # Exporting is Python's work; a pool of threads would not survive the fork.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = matrix()
    wanted = {}
    for key in arguments.keys:
        if key in FAMILIES:
            fixture = Fixture(key, key, arguments.exporter)
            wanted.setdefault(fixture.task, {})[key] = (fixture, arguments.out)
            continue
        for each in [name for name in known if known[name].family != "sd15"] if key == "all" else [key]:
            if each not in known:
                parser.error(f"no fixture {each!r}; there are {', '.join(known)}")
            wanted.setdefault(known[each].task, {})[each] = (known[each], arguments.out / each)
    wanted = [list(jobs.values()) for jobs in wanted.values()]
    for jobs in wanted:
        for _, folder in jobs:
            folder.parent.mkdir(parents=True, exist_ok=True)
    if arguments.jobs > 1 and len(wanted) > 1:
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            pool.map(make_all, sorted(wanted, key=len, reverse=True), chunksize=1)
    else:
        for jobs in wanted:
            make_all(jobs)


if __name__ == "__main__":
    main()
