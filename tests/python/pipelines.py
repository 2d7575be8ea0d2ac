"""Builds small random-weight pipelines in the diffusers layout, exports each part to ONNX, and draws with PyTorch.

usage: pipelines.py KIND FOLDER     KIND: sd1, sd2, sdxl, lcm or pixel

FOLDER/model is what Macula opens. FOLDER/draws.json lists draws: options, and the offsets in FOLDER/values.f32 of the start
noise, the latents after every step, and the planes of the final images, all made by diffusers' own pipeline classes (the pixel
model by a loop over its scheduler). Draws from a picture also have the picture, its encoding and the first step that is run.
Vocabularies are made here: CLIP's byte alphabet and a few hundred merges.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

OPSET = 17
PROMPTS = ["a photo of a red cat, sitting", "The <b>Quick</b> brown fox's 42 jumps"]
NEGATIVE = "blurry"
WORDS = "the quick brown fox jumps on a red cat and blue dog with picture of sitting photo".split()
# Longer than two chunks; words of several tokens meet both boundaries.
LONG = " ".join(WORDS[(5 * i) % 17] if i % 4 else "unseen" for i in range(70))


def vocabulary(folder, pad):
    """CLIP's byte alphabet, with and without the end of a word, and merges that follow from a few words."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    words = "a photo of the red cat sitting quick brown fox jumps blurry picture dog with and on blue".split()
    merges, tokens = [], alphabet + [c + "</w>" for c in alphabet]
    for word in words:
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                if parts[0] + parts[1] not in tokens:
                    tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_encoder(vocabulary_size, width, projected):
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=48,
        eos_token_id=vocabulary_size - 1,
        bos_token_id=vocabulary_size - 2,
        hidden_act="gelu" if projected else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


class Encoder(torch.nn.Module):
    """A text encoder with the outputs that optimum's export has."""

    def __init__(self, model, projected, hidden):
        super().__init__()
        self.model, self.projected, self.hidden = model, projected, hidden

    def forward(self, input_ids):
        out = self.model(input_ids.long(), output_hidden_states=True)
        first = (out.text_embeds, out.last_hidden_state) if self.projected else (out.last_hidden_state, out.pooler_output)
        return first + (tuple(out.hidden_states) if self.hidden else ())


def export(module, inputs, path, names, outputs, dynamic):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        module, inputs, str(path), input_names=names, output_names=outputs, dynamic_axes=dynamic, opset_version=OPSET, dynamo=False
    )


def export_text_encoder(model, folder, projected, hidden, dtype):
    outputs = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]
    if hidden:
        outputs += [f"hidden_states.{i}" for i in range(model.config.num_hidden_layers + 1)]
    ids = torch.zeros(1, 77, dtype=dtype)
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}}
    export(Encoder(model, projected, hidden), (ids,), folder / "model.onnx", ["input_ids"], outputs, dynamic)
    (folder / "config.json").write_text(model.config.to_json_string())


class Plain(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None):
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class Distilled(Plain):
    """A UNet that takes its guidance scale as an embedding."""

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond):
        return self.unet(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False)[0]


def export_unet(unet, folder, sdxl):
    config = unet.config
    size = config.sample_size
    inputs = [torch.randn(2, config.in_channels, size, size), torch.tensor([7]), torch.randn(2, 77, config.cross_attention_dim)]
    names = ["sample", "timestep", "encoder_hidden_states"]
    dynamic = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "encoder_hidden_states": {0: "batch", 1: "sequence"},
    }
    if sdxl:
        inputs += [torch.randn(2, 48), torch.randn(2, 6)]
        names += ["text_embeds", "time_ids"]
        dynamic |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}
    if config.time_cond_proj_dim:
        inputs.append(torch.randn(2, config.time_cond_proj_dim))
        names.append("timestep_cond")
        dynamic |= {"timestep_cond": {0: "batch"}}
    module = Distilled if config.time_cond_proj_dim else Plain
    export(module(unet).eval(), tuple(inputs), folder / "model.onnx", names, ["out_sample"], dynamic)
    (folder / "config.json").write_text(json.dumps(dict(config), default=str))


def export_vae(vae, folder):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

    class Decode(Half):
        def forward(self, latent_sample):
            return self.vae.decode(latent_sample, return_dict=False)[0]

    class Encode(Half):
        def forward(self, sample):
            return self.vae.encode(sample, return_dict=False)[0].parameters

    latent = vae.config.latent_channels
    spatial = {0: "batch", 2: "height", 3: "width"}
    export(Decode(), (torch.randn(1, latent, 8, 8),), folder / "vae_decoder/model.onnx", ["latent_sample"], ["sample"],
           {"latent_sample": spatial})
    export(Encode(), (torch.randn(1, 3, 16, 16),), folder / "vae_encoder/model.onnx", ["sample"], ["latent_parameters"],
           {"sample": spatial})
    for part in ("vae_decoder", "vae_encoder"):
        (folder / part / "config.json").write_text(json.dumps(dict(vae.config), default=str))


def small_unet(context, channels, sdxl=False, guidance_features=None):
    if sdxl:
        extra = dict(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 6 * 8,
            transformer_layers_per_block=(1, 2), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    else:
        extra = dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
        )
    return UNet2DConditionModel(
        sample_size=8 if channels == 4 else 16, in_channels=channels, out_channels=channels, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=context, attention_head_dim=4, norm_num_groups=16,
        time_cond_proj_dim=guidance_features, **extra,
    ).eval()


class Draws:
    def __init__(self, folder):
        self.folder, self.draws, self.values, self.offset = folder, [], [], 0

    def put(self, array):
        array = np.ascontiguousarray(array, dtype="<f4")
        at = self.offset
        self.values.append(array.ravel())
        self.offset += array.size
        return {"offset": at, "shape": list(array.shape)}

    def save(self):
        np.concatenate(self.values).tofile(self.folder / "values.f32")
        (self.folder / "draws.json").write_text(json.dumps(self.draws))


SCHEDULERS = {
    "DDIMScheduler": DDIMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "LCMScheduler": LCMScheduler,
}

# Pipelines draw the posterior of a picture; Macula takes its mean, which needs no noise.
DiagonalGaussianDistribution.sample = lambda posterior, generator=None: posterior.mode()


def chunks(tokenizer, prompt):
    """Token numbers of a prompt in chunks of 77, with no word in two of them."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    contents = [[]]
    for word in prompt.split():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(contents[-1]) + len(ids) > 75:
            contents.append([])
        contents[-1] += ids
    framed = [[begin, *content, end] for content in contents]
    return [chunk + [tokenizer.pad_token_id] * (77 - len(chunk)) for chunk in framed]


def embed(pipe, prompt, least):
    """The encoding of a prompt, chunk after chunk, and SDXL's pooled one of the first chunk."""
    parts, pooled = [], None
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "text_encoder_2"):
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in encoders:
        ids = chunks(tokenizer, prompt)
        ids += chunks(tokenizer, "") * (least - len(ids))
        with torch.no_grad():
            outputs = [encoder(torch.tensor([chunk]), output_hidden_states=True) for chunk in ids]
        if len(encoders) == 2:
            parts.append(torch.cat([out.hidden_states[-2] for out in outputs], dim=1))
            pooled = getattr(outputs[0], "text_embeds", None)
        else:
            parts.append(torch.cat([out.last_hidden_state for out in outputs], dim=1))
    return torch.cat(parts, dim=2), pooled


def encoded(pipe, prompt, negative_prompt):
    """Options of a pipeline with a long prompt, which it would cut by itself."""
    long = len(chunks(pipe.tokenizer, prompt))
    assert long > 2
    result = {}
    for name, text in ("", prompt), ("negative_", negative_prompt):
        context, pooled = embed(pipe, text, long)
        result[f"{name}prompt_embeds"] = context
        if pooled is not None:
            result[f"{name}pooled_prompt_embeds"] = pooled
    return result


def picture(pipe, draws, shape, options):
    """Options of an image-to-image pipeline, and what the test needs: the last `count` of its noisy steps are run."""
    count = options.pop("from_pictures")
    random = np.random.default_rng(len(draws.draws))
    pixels = random.integers(0, 256, (count, *(pipe.vae_scale_factor * side for side in shape[2:]), 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels] * (shape[0] // count)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(planes).latent_dist.mode()
    config = pipe.vae.config
    if config.latents_mean is not None:
        mean, deviation = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        latents = (latents - mean) / deviation
    latents = latents * config.scaling_factor
    steps = options["num_inference_steps"]
    first = steps - min(int(steps * options["strength"]), steps)
    entry = {"picture": draws.put(pixels), "latents": draws.put(latents), "first_step": first}
    return {"image": images}, entry


def draw(draws, pipe, shape, **options):
    """One draw by a diffusers pipeline, with every state kept."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(draws.draws)))
    # From the file, as a program that opens the folder would: every value of it counts, also those that were defaults.
    pipe.scheduler = SCHEDULERS[options.pop("sampler")].from_pretrained(draws.folder / "model/scheduler")
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"].numpy().copy())
        return {}

    entry = {"options": dict(options), "sampler": type(pipe.scheduler).__name__, "noise": draws.put(noise)}
    common = dict(callback_on_step_end=keep, output_type="np")
    if "from_pictures" in options:
        given, more = picture(pipe, draws, shape, options)
        entry |= more
        common |= given
    else:
        common |= dict(
            height=shape[2] * pipe.vae_scale_factor, width=shape[3] * pipe.vae_scale_factor, latents=noise.clone()
        )
    if options.get("prompt") == LONG:
        common |= encoded(pipe, options.pop("prompt"), options.pop("negative_prompt"))
    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_xl_img2img):
        module.randn_tensor = lambda shape, **_: noise.clone()
    with torch.no_grad():
        images = pipe(**common, **options).images
    entry |= {"states": draws.put(np.stack(states)), "images": draws.put(images)}
    draws.draws.append(entry)


def stable_diffusion(folder, second):
    torch.manual_seed(5 + second)
    model = folder / "model"
    tokenizer = vocabulary(model / "tokenizer", "!" if second else "<|endoftext|>")
    encoder = text_encoder(len(tokenizer), 64, False)
    unet = small_unet(64, 4)
    vae = AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16).eval()
    fields = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                  set_alpha_to_one=False, steps_offset=1)
    if second:
        fields |= dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDIMScheduler(**fields)
    pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    scheduler.save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    export_text_encoder(encoder, model / "text_encoder", False, False, torch.int32)
    export_unet(unet, model / "unet", False)
    export_vae(vae, model)
    draws = Draws(folder)
    base = dict(prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=25, guidance_scale=7.5)
    draw(draws, pipe, (2, 4, 8, 8), sampler="DDIMScheduler", **base)
    draw(draws, pipe, (2, 4, 8, 8), sampler="EulerDiscreteScheduler", **base)
    draw(draws, pipe, (2, 4, 8, 8), sampler="DPMSolverMultistepScheduler", **base)
    draw(draws, pipe, (2, 4, 8, 8), sampler="DDIMScheduler", guidance_rescale=0.7, **base)
    draw(draws, pipe, (1, 4, 12, 4), sampler="DDIMScheduler", prompt=PROMPTS[0], num_inference_steps=7, guidance_scale=1.0)
    draw(draws, pipe, (1, 4, 8, 8), sampler="DDIMScheduler",
         prompt=LONG, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=7.5)
    from_picture = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    from_picture.set_progress_bar_config(disable=True)
    for sampler, strength, count in [("DDIMScheduler", 0.6, 2), ("EulerDiscreteScheduler", 0.35, 1),
                                     ("DPMSolverMultistepScheduler", 1.0, 2)]:
        draw(draws, from_picture, (2, 4, 8, 8), sampler=sampler, strength=strength, from_pictures=count, **base)
    draws.save()


def distilled(folder):
    """A UNet that embeds its guidance scale, as latent consistency models do."""
    torch.manual_seed(21)
    model = folder / "model"
    tokenizer = vocabulary(model / "tokenizer", "<|endoftext|>")
    encoder = text_encoder(len(tokenizer), 64, False)
    unet = small_unet(64, 4, guidance_features=32)
    # Zero at first, for a UNet that learns it; here it must be seen.
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    vae = AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16).eval()
    scheduler = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                             set_alpha_to_one=True)
    pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    scheduler.save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "LatentConsistencyModelPipeline"}))
    export_text_encoder(encoder, model / "text_encoder", False, False, torch.int32)
    export_unet(unet, model / "unet", False)
    export_vae(vae, model)
    draws = Draws(folder)
    # The noise between steps of LCM can't be given to a draw: one step has none, DDIM needs none.
    for sampler, steps, scale in [("LCMScheduler", 1, 8.5), ("DDIMScheduler", 10, 8.5), ("DDIMScheduler", 10, 2.0)]:
        draw(draws, pipe, (2, 4, 8, 8), sampler=sampler, prompt=PROMPTS, num_inference_steps=steps, guidance_scale=scale)
    draws.save()


def sdxl(folder):
    torch.manual_seed(9)
    model = folder / "model"
    tokenizer = vocabulary(model / "tokenizer", "<|endoftext|>")
    tokenizer_2 = vocabulary(model / "tokenizer_2", "!")
    encoder, encoder_2 = text_encoder(len(tokenizer), 64, False), text_encoder(len(tokenizer), 32, True)
    unet = small_unet(96, 4, sdxl=True)
    vae = AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16,
                        scaling_factor=0.13025, latents_mean=[-1.6, 0.3, 0.0, 0.8],
                        latents_std=[8.0, 5.5, 0.7, 1.3]).eval()
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                       timestep_spacing="leading", steps_offset=1)
    pipe = StableDiffusionXLPipeline(vae, encoder, encoder_2, tokenizer, tokenizer_2, unet, scheduler,
                                     force_zeros_for_empty_prompt=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    scheduler.save_pretrained(model / "scheduler")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (model / "model_index.json").write_text(json.dumps(index))
    export_text_encoder(encoder, model / "text_encoder", False, True, torch.int64)
    export_text_encoder(encoder_2, model / "text_encoder_2", True, True, torch.int64)
    export_unet(unet, model / "unet", True)
    export_vae(vae, model)
    draws = Draws(folder)
    base = dict(prompt=PROMPTS, num_inference_steps=25, guidance_scale=5.0)
    draw(draws, pipe, (2, 4, 8, 8), sampler="EulerDiscreteScheduler", **base)
    draw(draws, pipe, (2, 4, 8, 8), sampler="DPMSolverMultistepScheduler", negative_prompt=[NEGATIVE] * 2,
         original_size=(40, 48), crops_coords_top_left=(4, 2), target_size=(20, 24), **base)
    draw(draws, pipe, (1, 4, 8, 8), sampler="EulerDiscreteScheduler",
         prompt=LONG, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=5.0)
    from_picture = StableDiffusionXLImg2ImgPipeline(**pipe.components, force_zeros_for_empty_prompt=True,
                                                    add_watermarker=False)
    from_picture.set_progress_bar_config(disable=True)
    draw(draws, from_picture, (2, 4, 8, 8), sampler="EulerDiscreteScheduler", strength=0.5, from_pictures=2, **base)
    draws.save()


def pixel(folder):
    torch.manual_seed(13)
    model = folder / "model"
    tokenizer = vocabulary(model / "tokenizer", "<|endoftext|>")
    encoder = text_encoder(len(tokenizer), 64, False)
    unet = small_unet(64, 3)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                              timestep_spacing="trailing", clip_sample=True)
    scheduler.save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    export_text_encoder(encoder, model / "text_encoder", False, False, torch.int64)
    export_unet(unet, model / "unet", False)
    draws = Draws(folder)
    shape, options = (2, 3, 16, 16), dict(prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=25,
                                          guidance_scale=4.0)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        def encode(texts):
            ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            return encoder(ids).last_hidden_state

        context = torch.cat([encode([NEGATIVE] * 2), encode(PROMPTS)])
        scheduler.set_timesteps(25)
        sample, states = noise * scheduler.init_noise_sigma, []
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([sample] * 2), t)
            unconditional, conditional = unet(scaled, t, context, return_dict=False)[0].chunk(2)
            prediction = unconditional + 4.0 * (conditional - unconditional)
            sample = scheduler.step(prediction, t, sample, return_dict=False)[0]
            states.append(sample.numpy().copy())
    images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    draws.draws.append({"options": options, "sampler": "DDIMScheduler", "noise": draws.put(noise),
                        "states": draws.put(np.stack(states)), "images": draws.put(images)})
    draws.save()


def main(kind, folder):
    folder = pathlib.Path(folder)
    torch.set_num_threads(2)
    {"sd1": lambda: stable_diffusion(folder, False), "sd2": lambda: stable_diffusion(folder, True),
     "sdxl": lambda: sdxl(folder), "lcm": lambda: distilled(folder), "pixel": lambda: pixel(folder)}[kind]()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
