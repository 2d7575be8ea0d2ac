"""The model under study: `models/emoji`, loaded from its ONNX folder or from a training checkpoint.

It makes the modules of `models/emoji` importable and turns captions into what the UNet is fed. It knows
nothing of concepts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

EMOJI = Path(__file__).resolve().parents[1] / "emoji"
if str(EMOJI) not in sys.path:
    sys.path.insert(0, str(EMOJI))

import data  # noqa: E402
import export  # noqa: E402
import network as net  # noqa: E402
import sampling  # noqa: E402, F401
import train  # noqa: E402
import vocabulary as words  # noqa: E402

SHIPPED = export.FOLDER
SUBJECT_PICTURES = EMOJI / "subjects"


def load(path=SHIPPED):
    """`train.Model` with frozen weights, from an ONNX folder or a `checkpoint.pt`.

    Matrices of a checkpoint are rounded to fp16 as the export rounds them, so both give the same model.
    """
    path = Path(path)
    if path.is_file():
        model = train.averaged_model(torch.load(path, map_location="cpu", weights_only=False))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() != max(parameter.shape):
                    parameter.copy_(parameter.half().float())
    else:
        model = train.Model()
        if export.load_shipped_weights(model, path) is None:
            raise FileNotFoundError(f"{path} is neither a checkpoint nor an exported model (it has no training.json)")
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


_tokenizer = None


def token_ids(captions):
    """Token ids [B, L] of the captions; a word outside of the vocabulary is refused."""
    global _tokenizer
    _tokenizer = _tokenizer or words.build_tokenizer()
    ids = torch.tensor([encoding.ids for encoding in _tokenizer.encode_batch(list(captions))])
    for caption, row in zip(captions, ids):
        if words.WORDS.index(words.UNKNOWN) in row:
            raise ValueError(f"the tokenizer has no token for a word of {caption!r}")
    return ids


def phrase_ids(phrase):
    """Token ids of a phrase without the start and end tokens: "<s1> animal" -> (4, 36)."""
    frame = {words.WORDS.index(w) for w in (words.PAD, words.START, words.END)}
    return tuple(i for i in token_ids([phrase])[0].tolist() if i not in frame)


def picture_tensor(picture):
    """uint8 [H, W, 3] or [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    picture = torch.as_tensor(np.array(picture))
    picture = picture if picture.ndim == 4 else picture[None]
    return picture.permute(0, 3, 1, 2).float() / 127.5 - 1


def read_picture(path, side=data.SIZE):
    """A picture file as uint8 [side, side, 3]: turned upright by its EXIF tag, laid on white, cropped to its
    central square and resized by area."""
    from PIL import ImageOps

    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened).convert("RGBA")
    ground = Image.new("RGBA", turned.size, "white")
    ground.alpha_composite(turned)
    square = ImageOps.fit(ground.convert("RGB"), (side, side), Image.Resampling.BOX)
    return np.asarray(square)


def plain_label(side):
    """The class label of the plain process for pictures of `side` pixels."""
    return net.PLAIN if side > 32 else net.PLAIN_SMALL


@dataclass
class Pictures:
    """Pictures and their captions: x0 [B, 3, H, W] in [-1, 1], ids [B, L], text states [B, L, C]."""

    x0: torch.Tensor
    ids: torch.Tensor
    text: torch.Tensor
    captions: tuple

    @classmethod
    @torch.no_grad()
    def of(cls, model, x0, captions):
        ids = token_ids(captions)
        return cls(x0, ids, model.text_encoder(ids), tuple(captions))

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, which):
        """The pictures numbered by an index tensor or picked by a boolean one."""
        which = torch.arange(len(self))[which]
        return Pictures(self.x0[which], self.ids[which], self.text[which], tuple(self.captions[i] for i in which))

    def at(self, side):
        """The same pictures shrunk to `side` pixels by the mean over blocks."""
        x0 = torch.nn.functional.avg_pool2d(self.x0, self.x0.shape[2] // side)
        return Pictures(x0, self.ids, self.text, self.captions)

    @classmethod
    def joined(cls, parts):
        """Several sets of pictures as one."""
        tensors = (torch.cat([getattr(p, name) for p in parts]) for name in ("x0", "ids", "text"))
        return cls(*tensors, sum((p.captions for p in parts), ()))
