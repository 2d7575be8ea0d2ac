"""What PyTorch says of texts in which one token's embedding was replaced, for `tests/textual_inversion.rs`.

usage: textual_inversion.py KIND VERSION FOLDER     VERSION: of the shipped model, not used

KIND: `emoji`, the shipped model; or a small pixel-space pipeline with random weights, which is exported to FOLDER/model:
`sd1` and `sdxl` by TorchScript, `dynamo17`, `dynamo20` by torch.export, `dynamo20-raw` unoptimised, `half` with a text
encoder of half precision.

FOLDER/texts.json: `word`, and `prompts` with it. FOLDER/expected.safetensors: `row.E` for each text encoder E, the encodings
`context` (and `pooled`) of the prompts with these rows in place of the word's, one batch of noisy states (`state`, `timestep`,
`target`, `weight`, `text`: which of the prompts each has, `labels`), the `loss` of the UNet's prediction for them and its
gradient with respect to each row, `gradient.E`, by torch.autograd.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "models" / "reference"
PROMPTS = ["a photo of a red fox", "the red dog and a red cat"]
SIDE = 16
BATCH = 3


class Pipeline:
    """Networks, and what they are fed: `ids` of each encoder [P, L], `token` of the word in each."""

    def __init__(self, word, prompts, embeddings, ids, token, encode, predict, labels=None, side=SIDE):
        self.word, self.prompts, self.embeddings, self.ids, self.token = word, prompts, embeddings, ids, token
        self.encode, self.predict, self.labels, self.side = encode, predict, labels, side


def shipped():
    sys.path.insert(0, str(REFERENCE))
    import model as reference

    network = reference.load()
    prompts = ["a <s2> animal on a blue background", "a <s2> animal"]
    ids = reference.token_ids(prompts)
    labels = torch.full((BATCH,), reference.plain_label(32))
    return Pipeline(
        "<s2>", prompts, [network.text_encoder.token_embedding], [ids], reference.phrase_ids("<s2>"),
        lambda: (network.text_encoder(ids), None),
        lambda state, timestep, text, pooled: network.unet(state, timestep, text, labels),
        labels, side=32,
    )


def by_dynamo(module, folder, config, opset, optimize):
    folder.mkdir(parents=True)
    batch, length = torch.export.Dim("batch", max=63), torch.export.Dim("sequence", max=77)
    # Sizes of one would be taken for constants.
    torch.onnx.export(
        module, (torch.ones(2, 12, dtype=torch.long),), str(folder / "model.onnx"), input_names=["input_ids"],
        output_names=["last_hidden_state", "pooler_output"], opset_version=opset, dynamo=True, external_data=False,
        dynamic_shapes={"input_ids": {0: batch, 1: length}}, optimize=optimize, verbose=False,
    )
    (folder / "config.json").write_text(config.to_json_string())


def small(kind, folder):
    from diffusers import DDIMScheduler

    import pipelines

    torch.manual_seed(31)
    model = folder / "model"
    sdxl = kind == "sdxl"
    tokenizers = [pipelines.vocabulary(model / "tokenizer", "<|endoftext|>")]
    encoders = [pipelines.text_encoder(len(tokenizers[0]), 64, False)]
    if sdxl:
        tokenizers.append(pipelines.vocabulary(model / "tokenizer_2", "!"))
        encoders.append(pipelines.text_encoder(len(tokenizers[0]), 32, True))
    if kind == "half":
        encoders = [encoders[0].half()]
    unet = pipelines.small_unet(96 if sdxl else 64, 3, sdxl=sdxl)
    DDIMScheduler().save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    for number, encoder in enumerate(encoders):
        place = model / ("text_encoder_2" if number else "text_encoder")
        if kind.startswith("dynamo"):
            wrapped = pipelines.Encoder(encoder, False, False)
            by_dynamo(wrapped, place, encoder.config, int(kind[6:8]), "raw" not in kind)
        else:
            pipelines.export_text_encoder(encoder, place, bool(number), sdxl, torch.int64)
    pipelines.export_unet(unet, model / "unet", sdxl)
    ids = [
        tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids for tokenizer in tokenizers
    ]

    def encode():
        outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(encoders, ids)]
        if sdxl:
            return torch.cat([out.hidden_states[-2] for out in outputs], dim=2), outputs[1].text_embeds
        return outputs[0].last_hidden_state.float(), None

    def predict(state, timestep, text, pooled):
        added = None
        if sdxl:
            sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float).expand(len(state), 6)
            added = {"text_embeds": pooled, "time_ids": sizes}
        return unet(state, timestep, text, added_cond_kwargs=added, return_dict=False)[0]

    token = [tokenizer.convert_tokens_to_ids("red</w>") for tokenizer in tokenizers]
    tables = [encoder.get_input_embeddings() for encoder in encoders]
    return Pipeline("red", PROMPTS, tables, ids, token, encode, predict)


def main(kind, folder):
    folder = pathlib.Path(folder)
    torch.set_num_threads(2)
    pipeline = shipped() if kind == "emoji" else small(kind, folder)
    random = torch.Generator().manual_seed(3)
    stored = {}
    for number, (table, token) in enumerate(zip(pipeline.embeddings, pipeline.token)):
        table.weight.requires_grad_(True)
        deviation = table.weight.detach().float().std()
        with torch.no_grad():
            row = table.weight[token].float() + 0.5 * deviation * torch.randn(table.weight.shape[1], generator=random)
            table.weight[token] = row.to(table.weight.dtype)
        stored[f"row.{number}"] = row.clone()
    context, pooled = pipeline.encode()
    stored["context"] = context
    if pooled is not None:
        stored["pooled"] = pooled
    shape = (BATCH, 3, pipeline.side, pipeline.side)
    state, target = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    timestep, weight, text = torch.tensor([40, 400, 800]), torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0, 1, 0])
    said = pipeline.predict(state, timestep, context[text], None if pooled is None else pooled[text])
    loss = (weight * ((said - target) ** 2).mean(dim=(1, 2, 3))).sum()
    loss.backward()
    for number, (table, token) in enumerate(zip(pipeline.embeddings, pipeline.token)):
        stored[f"gradient.{number}"] = table.weight.grad[token].float()
    stored |= {"state": state, "target": target, "timestep": timestep, "weight": weight, "text": text}
    stored |= {"loss": loss.reshape(1), "labels": torch.zeros(0) if pipeline.labels is None else pipeline.labels}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in stored.items()}, folder / "expected.safetensors")
    (folder / "texts.json").write_text(json.dumps({"word": pipeline.word, "prompts": pipeline.prompts}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
