"""Small models beside UNets, exported to ONNX, with their derivatives by PyTorch, for `tests/gradients_models.rs`.

    python gradients_models.py some|all FOLDER      all: each model by each exporter, some: each model by two of them

FOLDER/MODEL-EXPORTER.onnx is the export, with random weights. FOLDER/MODEL-EXPORTER.safetensors holds, computed in double
precision: `input.NAME`; a cotangent `u` of the output; `gradient.VALUE`, the gradient of <u, output> with respect to a float
input, an inner value or an initializer of the export, in the sizes that it has there; and for models with `curvature` a
direction `v` of the first input x, `jvp`, the derivative of the output along v, and `hvp`, that of x's gradient.
"""

import copy
import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn

# ------------------------------------------------------------------------------------------------------------ the models


class Decoder(nn.Module):
    """From scaled latents to pictures."""

    def __init__(self):
        super().__init__()
        self.vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 16],
            layers_per_block=1, latent_channels=4, norm_num_groups=4,
        )

    def forward(self, latents):
        return self.vae.decode(latents / 0.18215, return_dict=False)[0]


class TextEncoder(nn.Module):
    """Tokens to their features and, behind those, the projected features of the whole text."""

    def __init__(self):
        super().__init__()
        config = transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=24, intermediate_size=48, projection_dim=16, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=12, bos_token_id=62, eos_token_id=63,
        )
        self.clip = transformers.CLIPTextModelWithProjection(config)

    def forward(self, input_ids):
        answer = self.clip(input_ids)
        return torch.cat([answer.last_hidden_state.flatten(1), answer.text_embeds], 1)

    def inner(self):
        """Modules whose output's gradient is wanted, with what the export calls their weight."""
        return [self.clip.text_model.embeddings.token_embedding]


class Classifier(nn.Module):
    """A classifier of transformers, as a function of pictures."""

    def __init__(self, kind, **config):
        super().__init__()
        config = getattr(transformers, f"{kind}Config")(num_labels=5, **config)
        self.model = getattr(transformers, f"{kind}ForImageClassification")(config)

    def forward(self, pixels):
        return self.model(pixels).logits


def dcgan():
    """The generator of DCGAN (arXiv 1511.06434)."""
    layers, channels = [], [6, 16, 8, 4, 3]
    for index, (few, more) in enumerate(zip(channels, channels[1:])):
        stride, padding = (1, 0) if index == 0 else (2, 1)
        layers.append(nn.ConvTranspose2d(few, more, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(more), nn.ReLU()] if index + 2 < len(channels) else [nn.Tanh()]
    return nn.Sequential(*layers)


class Modulated(nn.Module):
    """A convolution whose kernel is scaled by each sample's style and brought back to unit deviation (StyleGAN2, arXiv
    1912.04958, equations 1 and 3)."""

    def __init__(self, style, channels, outputs, size, up=False, demodulate=True):
        super().__init__()
        self.style = nn.Linear(style, channels)
        self.weight = nn.Parameter(torch.randn(outputs, channels, size, size))
        self.up, self.demodulate = up, demodulate

    def forward(self, x, style):
        batch, channels, height, width = x.shape
        kernel = self.weight * self.style(style)[:, None, :, None, None]
        if self.demodulate:
            kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, batch * channels, height, width)
        if self.up:
            x = F.conv_transpose2d(x, kernel.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
            return blurred(x.transpose(0, 1), [1, 1]).reshape(batch, -1, 2 * height, 2 * width)
        x = F.conv2d(x, kernel.flatten(0, 1), padding=kernel.shape[-1] // 2, groups=batch)
        return x.reshape(batch, -1, height, width)


def blurred(x, pads):
    """Pictures `[B, 1, H, W]` under the binomial filter, with so many places added before and after."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 4
    return F.conv2d(F.pad(x, pads * 2), torch.outer(line, line)[None, None])


def upsampled(x):
    """Zeros between the places of `[B, C, H, W]`, and the filter over them."""
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(batch * channels, 1, height, 1, width, 1), [0, 1, 0, 0, 0, 1])
    return blurred(x.reshape(batch * channels, 1, 2 * height, 2 * width), [2, 1]).reshape(batch, channels, 2 * height, 2 * width)


class Layer(nn.Module):
    """A modulated convolution with noise and bias behind it."""

    def __init__(self, style, channels, outputs, up=False):
        super().__init__()
        self.conv = Modulated(style, channels, outputs, 3, up)
        self.strength, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x, style, noise):
        return F.leaky_relu(self.conv(x, style) + self.strength * noise + self.bias, 0.2) * 2**0.5


class StyleGan(nn.Module):
    """The generator of StyleGAN2 with output skips, from a latent and the noise of each layer."""

    def __init__(self, style=8, channels=(8, 6, 4)):
        super().__init__()
        self.mapping = nn.ModuleList(nn.Linear(style, style) for _ in range(2))
        self.mean = nn.Parameter(torch.randn(style))
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.first = Layer(style, channels[0], channels[0])
        pairs = list(zip(channels, channels[1:]))
        self.up = nn.ModuleList(Layer(style, few, more, up=True) for few, more in pairs)
        self.flat = nn.ModuleList(Layer(style, more, more) for _, more in pairs)
        self.colours = nn.ModuleList(Modulated(style, count, 3, 1, demodulate=False) for count in channels)

    def forward(self, z, *noises):
        style = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            style = F.leaky_relu(layer(style), 0.2) * 2**0.5
        style = self.mean + 0.7 * (style - self.mean)
        x = self.first(self.constant.repeat(len(z), 1, 1, 1), style, noises[0])
        picture = self.colours[0](x, style)
        for index, (up, flat) in enumerate(zip(self.up, self.flat)):
            x = flat(up(x, style, noises[2 * index + 1]), style, noises[2 * index + 2])
            picture = upsampled(picture) + self.colours[index + 1](x, style)
        return picture


def normal(*sizes):
    return lambda draw: torch.randn(sizes, generator=draw)


TOKENS = torch.tensor([[62, 3, 17, 9, 63, 63, 63], [62, 41, 3, 5, 8, 60, 63]])
SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4)
# Channels of the published network, of which a quarter is left; its last layer has 1280.
STAGES = dict(
    in_channels=[32, 32], out_channels=[32, 48], kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 2],
    expand_ratios=[1, 4], depthwise_padding=[], hidden_dim=320, width_coefficient=0.25, depth_coefficient=1.0,
)
NOISES = [normal(2, 1, size, size) for size in (4, 8, 8, 16, 16)]
# What makes it, its inputs, its dynamo exporter in `some`, and the inputs whose batch may vary.
MODELS = {
    "decoder": (Decoder, dict(latents=normal(2, 4, 5, 6)), 20, True),
    "text": (TextEncoder, dict(input_ids=lambda _: TOKENS), 23, True),
    "dcgan": (dcgan, dict(z=normal(2, 6, 1, 1)), 18, True),
    "stylegan2": (StyleGan, dict(z=normal(2, 8)) | {f"noise{i}": noise for i, noise in enumerate(NOISES)}, 20, False),
    "resnet": (lambda: Classifier("ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2]), dict(pixels=normal(2, 3, 32, 32)), 18, True),
    "efficientnet": (lambda: Classifier("EfficientNet", **STAGES), dict(pixels=normal(2, 3, 21, 24)), 20, True),
    "vit": (lambda: Classifier("ViT", **SMALL), dict(pixels=normal(2, 3, 16, 16)), 23, True),
}
CURVED = ["decoder", "stylegan2", "efficientnet", "vit"]

# --------------------------------------------------------------------------------------------------------- the reference

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def random_weights(module, draw):
    """No two tensors alike, none zero: values tell which initializer of an export is which parameter."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=draw))
            elif value.is_floating_point():
                scale = 0.3 if value.ndim < 2 else value[0].numel() ** -0.5
                start = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
                value.copy_(start + scale * torch.randn(value.shape, generator=draw))
    return module


class Reference:
    """What PyTorch computes in double precision: `gradients` are pairs of a tensor and its gradient, by name."""

    def __init__(self, module, inputs, draw, curved):
        module = copy.deepcopy(module).double()
        given = {name: value.double().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
        pairs, taps = [], {}
        hooks = watch(module, pairs, taps)
        output = module(*given.values())
        for hook in hooks:
            hook.remove()
        self.u = torch.randn(output.shape, generator=draw, dtype=torch.float32)
        points = {name: value for name, value in given.items() if value.requires_grad}
        points |= dict(module.named_parameters()) | taps
        found = torch.autograd.grad((output * self.u).sum(), list(points.values()), allow_unused=True)
        self.gradients = {name: (points[name].detach(), gradient) for name, gradient in zip(points, found) if gradient is not None}
        self.inner, self.inputs, self.either = list(taps), [name for name in given if name in points], {}
        for convolution, normalisation in pairs:
            self.fold(module, convolution, normalisation)
        self.curvature = self.second(module, given, draw) if curved else {}

    def fold(self, module, convolution, normalisation):
        """A convolution with the batch normalisation behind it, which most exporters make one: the kernel times
        s = gamma / deviation, and the bias beta + s (bias - mean)."""
        name = next(name for name, other in module.named_modules() if other is convolution)
        last = next(name for name, other in module.named_modules() if other is normalisation)
        scale = (normalisation.weight / (normalisation.running_var + normalisation.eps).sqrt()).detach()
        bias = 0 if convolution.bias is None else convolution.bias.detach()
        bias = normalisation.bias.detach() + scale * (bias - normalisation.running_mean)
        channels = 1 if isinstance(convolution, nn.ConvTranspose2d) and convolution.groups == 1 else 0
        scale = scale.reshape([-1 if axis == channels else 1 for axis in range(4)])
        kernel, gradient = self.gradients[f"{name}.weight"]
        self.gradients[f"{name}.weight (folded)"] = kernel * scale, gradient / scale
        self.gradients[f"{name}.bias (folded)"] = bias, self.gradients[f"{last}.bias"][1]
        self.either[f"{name}.weight (folded)"] = [f"{name}.weight", f"{last}.weight", f"{last}.bias"]

    def second(self, module, given, draw):
        """Along a direction v of the first input x: of the output, and of the gradient of <u, output>."""
        (x, *others), v = given.values(), torch.randn(next(iter(given.values())).shape, generator=draw, dtype=torch.float32)
        function = lambda x: module(x, *(other.detach() for other in others))
        weighed = lambda x: (function(x) * self.u).sum()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            along = lambda function: torch.func.jvp(function, (x.detach(),), (v.double(),))[1]
            return {"v": v, "jvp": along(function), "hvp": along(torch.func.grad(weighed))}


def watch(module, pairs, taps):
    """Notes the convolutions that a batch normalisation follows, and what `module.inner()` give."""
    made = {}

    def after(each, given, answer):
        if isinstance(each, CONVOLUTIONS):
            made[id(answer)] = each, answer
        if isinstance(each, nn.BatchNorm2d) and id(given[0]) in made:
            pairs.append((made[id(given[0])][0], each))

    hooks = [each.register_forward_hook(after) for each in module.modules()]
    for each in module.inner() if hasattr(module, "inner") else []:
        name = next(name for name, other in module.named_modules() if other is each)
        hooks.append(each.register_forward_hook(lambda each, given, answer, name=name: taps.update({f"{name} (output)": answer})))
    return hooks


# ------------------------------------------------------------------------------------------------------------ the exports


def torchscript(model, module, inputs, path):
    varies = {name: {0: "batch"} for name in [*inputs, "output"]} if MODELS[model][3] else {}
    torch.onnx.export(
        module, tuple(inputs.values()), path, input_names=list(inputs), output_names=["output"], dynamic_axes=varies,
        opset_version=17, dynamo=False,
    )


PROGRAMS = {}


def dynamo(opset):
    def export(model, module, inputs, path):
        if model not in PROGRAMS:
            batch = torch.export.Dim("batch", max=63)
            shapes = tuple({0: batch} for _ in inputs) if MODELS[model][3] else None
            PROGRAMS[model] = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        torch.onnx.export(
            PROGRAMS[model], tuple(inputs.values()), path, input_names=list(inputs), output_names=["output"], opset_version=opset,
            dynamo=True, external_data=False, verbose=False,
        )

    return export


def half(model, module, inputs, path):
    inputs = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    torchscript(model, copy.deepcopy(module).half(), inputs, path)


EXPORTERS = {"torchscript": torchscript, "half": half} | {f"dynamo{opset}": dynamo(opset) for opset in (18, 20, 23)}


# Of which an export may keep the used rows alone, or one for each sample.
CUT = ["clip.text_model.embeddings.position_embedding.weight", "constant"]


def places(model, reference, tolerance):
    """The gradients of the reference by the values of an export, in their sizes: every parameter is there, as it is or
    folded."""
    used = {name for node in model.graph.node for name in node.input}
    found = {name: reference.gradients[name][1] for name in reference.inputs}
    known = {}
    for tensor in model.graph.initializer:
        value = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64))
        if tensor.name not in used or value.numel() < 2:
            continue
        for name, (point, gradient) in reference.gradients.items():
            for turned in (False, True) if point.ndim == 2 else (False,):
                point, gradient = (point.T, gradient.T) if turned else (point, gradient)
                if value.numel() == point.numel() and torch.allclose(value.flatten(), point.flatten(), rtol=tolerance, atol=tolerance):
                    found[tensor.name] = gradient.reshape(value.shape)
                    known[name] = tensor.name
    for name in reference.inner:
        weight = known[name.replace(" (output)", ".weight")]
        node = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == weight)
        known[name] = node.output[0]
        found[node.output[0]] = reference.gradients[name][1]
    accounted = {*known, *reference.inputs, *CUT}
    for folded, plain in reference.either.items():
        accounted.update([*plain, folded, folded.replace(".weight", ".bias")] if folded in known or plain[0] in known else [])
    missing = [name for name, (point, _) in reference.gradients.items() if name not in accounted and point.numel() > 1]
    assert not missing, f"not in the export: {missing}"
    return found


def make(model, exporters, folder):
    build, inputs, *_ = MODELS[model]
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    module = random_weights(build().eval(), draw)
    inputs = {name: each(draw) for name, each in inputs.items()}
    torch.set_default_dtype(torch.float64)
    reference = Reference(module, inputs, draw, model in CURVED)
    torch.set_default_dtype(torch.float32)
    for exporter in exporters:
        path = folder / f"{model}-{exporter}.onnx"
        EXPORTERS[exporter](model, module, inputs, str(path))
        found = places(onnx.load(path), reference, 1e-3 if exporter == "half" else 1e-6)
        stored = {f"input.{name}": value for name, value in inputs.items()} | {"u": reference.u}
        stored |= {f"gradient.{name}": value for name, value in found.items()} | reference.curvature
        save_file({name: value.contiguous().clone() for name, value in stored.items()}, path.with_suffix(".safetensors"))


def main(which, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    dynamos = [name for name in EXPORTERS if name.startswith("dynamo")]
    jobs = [(model, ["torchscript", *(dynamos if which == "all" else [f"dynamo{MODELS[model][2]}"])], folder) for model in MODELS]
    jobs += [("text", ["half"], folder)]
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count())) as pool:
        pool.starmap(make, jobs, chunksize=1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
