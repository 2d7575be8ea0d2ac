"""The text encoder and the UNet, and the noise process that they are trained for.

The state is a picture [B, 3, H, W] in [-1, 1], H and W multiples of 16. The UNet folds 2 x 2 pixels
into channels at its entry and unfolds them at its exit, so hosts never see that.

One UNet serves two processes. `class_labels` says which:

| label | process, stage | side | network timesteps |
|---|---|---|---|
| 0 | plain | 64 | 0..999 |
| 1 | decomposed, stage 0 | 64 | 0..358 |
| 2 | decomposed, stage 1 | 32 | 359..718 |
| 3 | decomposed, stage 2 | 16 | 719..999 |
| 4 | plain, small pictures | 32 | 0..999 |

The time t = 1..1000 of the decomposed process is the network timestep plus one. Stage k holds the
coordinates of the picture in the space of 2^k x 2^k blocks: `down` is the sum of 2 x 2 pixels over 2.
White noise keeps its spread there and the picture grows by 2 per stage. A component that is dropped at
T fades as sqrt(abar_t) * ATTENUATION ** ((t / T) ** POWER). With eps the noise and x0 the clean
coordinates, the output is, for every component and both processes,

    v = sqrt(abar_t) * eps - sqrt(1 - abar_t) * x0

so from y = L x0 + s eps, with a = sqrt(abar_t) and s = sqrt(1 - abar_t), follows for each component
x0 = (a y - s v) / (a L + s^2) and eps = (s y + L v) / (a L + s^2).
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

import vocabulary as words

STEPS = 1000
TURNING_POINTS = (360, 720)
ATTENUATION = 0.1
POWER = 2.0
PLAIN, STAGE0, STAGE1, STAGE2, PLAIN_SMALL = range(5)

UNET_CONFIG = dict(
    sample_size=32,
    in_channels=12,
    out_channels=12,
    block_out_channels=(48, 96, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=1024,
    attention_head_dim=3,  # diffusers takes this as the number of heads: 32 and 64 wide
    norm_num_groups=16,
    num_class_embeds=8,
    resnet_time_scale_shift="scale_shift",
)


class DirectAttention:
    """Attention as two products and a softmax: fast for few heads on a CPU, and a clean ONNX graph."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        batch, width = hidden_states.shape[0], attn.to_q.out_features

        def heads(x):
            return x.reshape(batch, -1, attn.heads, width // attn.heads).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = torch.softmax(query @ key.transpose(2, 3) * attn.scale, dim=-1)
        return attn.to_out[0]((weights @ value).transpose(1, 2).reshape(batch, -1, width))


class PixelUNet(UNet2DConditionModel):
    """A diffusers UNet on folded pixels."""

    def forward(self, sample, timestep, encoder_hidden_states, class_labels):
        """sample [B, 3, H, W], timestep [B] or scalar, text [B, L, 1024], labels [B] -> v [B, 3, H, W]."""
        rows = sample[:, :, 0::2], sample[:, :, 1::2]
        folded = torch.cat([r[:, :, :, i::2] for r in rows for i in (0, 1)], dim=1)
        out = super().forward(folded, timestep, encoder_hidden_states, class_labels=class_labels, return_dict=False)[0]
        return F.pixel_shuffle(out, 2)


def build_unet():
    """The UNet with fresh weights."""
    unet = PixelUNet(**UNET_CONFIG)
    unet.set_attn_processor(DirectAttention())
    return unet


class Layer(nn.Module):
    """A pre-norm transformer layer that sees all words but the padding."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x, bias):
        batch, width = x.shape[0], self.q_proj.out_features

        def heads(y):
            return y.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)

        y = self.norm1(x)
        query, key, value = heads(self.q_proj(y)), heads(self.k_proj(y)), heads(self.v_proj(y))
        weights = torch.softmax(query @ key.transpose(2, 3) * (width // self.heads) ** -0.5 + bias, dim=-1)
        x = x + self.out_proj((weights @ value).transpose(1, 2).reshape(batch, -1, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """Token ids [B, L], L <= 32 -> text states [B, L, 1024] for the UNet's cross-attention."""

    WIDTH, HEADS, LAYERS, POSITIONS, ROWS = 160, 4, 2, 32, 160

    def __init__(self):
        super().__init__()
        assert len(words.WORDS) <= self.ROWS
        self.token_embedding = nn.Embedding(self.ROWS, self.WIDTH)
        self.position_embedding = nn.Embedding(self.POSITIONS, self.WIDTH)
        self.layers = nn.ModuleList(Layer(self.WIDTH, self.HEADS) for _ in range(self.LAYERS))
        self.final_layer_norm = nn.LayerNorm(self.WIDTH)
        self.text_projection = nn.Linear(self.WIDTH, UNET_CONFIG["cross_attention_dim"])
        nn.init.normal_(self.position_embedding.weight, std=0.3)

    def forward(self, input_ids):
        bias = (input_ids == words.WORDS.index(words.PAD)).float()[:, None, None, :] * -1e4
        x = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, bias)
        return self.text_projection(self.final_layer_norm(x))


def cumulative_alphas():
    """abar for network timesteps 0..999: the cosine schedule as diffusers computes it ("squaredcos_cap_v2")."""
    at = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    bar = torch.cos((at + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0).float()


def down(x):
    """Coordinates in the space of 2 x 2 blocks: [B, C, H, W] -> [B, C, H/2, W/2], orthonormal."""
    return 2 * F.avg_pool2d(x, 2)


def up(x):
    """The adjoint of `down`: [B, C, H, W] -> [B, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2) / 2


def decomposed_signal(x0, timestep, stage):
    """The faded picture of the decomposed process, without its factor sqrt(abar).

    x0 [B, C, H, W] are clean coordinates of `stage`, timestep [B] network timesteps. The components that
    are still alive are the high ones of the stages from `stage` on, each with its own turning point.
    """
    if stage == len(TURNING_POINTS):
        return x0
    fade = ATTENUATION ** (((timestep + 1) / TURNING_POINTS[stage]) ** POWER)
    low = down(x0)
    return up(decomposed_signal(low, timestep, stage + 1)) + fade[:, None, None, None] * (x0 - up(low))


def stage_range(stage):
    """First and last network timestep of a stage: T_k <= t < T_{k+1}, t = timestep + 1."""
    bounds = (1,) + TURNING_POINTS + (STEPS + 1,)
    return bounds[stage] - 1, bounds[stage + 1] - 2
