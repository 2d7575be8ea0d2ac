"""An opened text-to-image model: it draws, composes concepts, finds them, and predicts single steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_uint32, c_void_p, pointer
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from ._abi import (
    Role, Scope, macula_companion, macula_denoise_inputs, macula_discover_options, macula_draw_options, macula_embedding_info, macula_image,
    macula_layer_info, macula_memory_info, macula_pipeline_info, macula_pipeline_options, macula_session_options, macula_term,
    macula_together_options,
)
from ._library import Closable, Handle, StrPath, check, info, lent_array, library, numbers, receive, tensor, text
from .concepts import Concept, Layer
from .images import Images, read_image, view
from .jobs import CancelToken, Progress, run
from .options import DiscoverOptions, DrawOptions, SessionOptions, TogetherOptions, choice, fill
from .runtime import Runtime, shared
from .schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

UNKNOWN = 2**64 - 1


@dataclass
class Term:
    """One concept in a composition.

    - `strength`: share of each weight that is taken away, 0 to 1.
    - `scope`: where it acts; the concept's own if not given.
    - `words`: local scope: the words of the prompt that it acts on; the concept's trigger with its class noun if not given.
    - `tokens`: local scope, in place of `words`: the rows of the prompt's encoding that it acts on.
    """

    concept: Concept
    strength: float = 1.0
    scope: Scope | str = Scope.DEFAULT
    words: str | None = None
    tokens: Sequence[int] = ()


@dataclass
class Companion:
    """A concept that is tuned with others.

    - `concept`: found to draw its subject, with a trigger, in local scope.
    - `pictures`: of the subject, as for `Pipeline.discover`.
    - `prompts`: what each picture shows, with the trigger; `"a TRIGGER NOUN"` if not given.
    """

    concept: Concept
    pictures: Sequence[np.ndarray | StrPath]
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class Memory:
    """What a pipeline and its process take, in bytes; `None` where ONNX Runtime does not tell."""

    weights: int | None
    arena: int | None
    arena_peak: int | None
    composition: int | None
    process: int | None
    process_peak: int | None


class Embedding(Handle):
    """A prompt's encoding. It never changes; its arrays share the library's memory."""

    def __init__(self, handle: int):
        super().__init__(handle, library.macula_embedding_free)
        self._info = info(macula_embedding_info, library.macula_embedding_get_info, handle)

    @property
    def context(self) -> np.ndarray:
        """The encoding `[1, rows, features]`."""
        return lent_array(self, self._info.context)

    @property
    def pooled(self) -> np.ndarray | None:
        """The pooled encoding `[1, features]` of SDXL's second encoder."""
        return lent_array(self, self._info.pooled) if self._info.pooled.data else None

    @property
    def own_tokens(self) -> int:
        """Rows that stand for the prompt's own tokens."""
        return self._info.own_tokens


class Pipeline(Closable):
    """An opened text-to-image model. It does one job at a time; a second one, from another thread, raises `BUSY`."""

    def __init__(
        self,
        folder: StrPath,
        runtime: Runtime | None = None,
        *,
        self_attention: bool = False,
        **session: Unpack[SessionOptions],
    ):
        """Opens a folder in the diffusers ONNX layout; see `SessionOptions` for how it is run.

        `self_attention`: concepts with neurons of self-attention can be composed, at a little time of each step.
        """
        run_by = macula_session_options.new()
        fill(run_by, session, SessionOptions)
        options = macula_pipeline_options.new()
        options.session = pointer(run_by)
        options.self_attention = int(self_attention)
        where = (runtime or shared()).pointer
        opened = receive(library.macula_pipeline_open, where, text(folder), byref(options))
        super().__init__(opened, library.macula_pipeline_free)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the UNet's K and V weights, which concepts of this base carry."""
        return self._info().fingerprint.decode()

    @property
    def provider(self) -> str:
        """What runs the UNet."""
        return self._info().provider.decode()

    @property
    def fallback_reason(self) -> str | None:
        """Why another provider was asked for and replaced."""
        reason = self._info().fallback_reason
        return reason.decode() if reason else None

    @property
    def size(self) -> tuple[int, int]:
        """Default width and height of a picture."""
        found = self._info()
        return found.width, found.height

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of a picture of the default size."""
        found = self._info()
        return found.latent_channels, found.height // found.latent_factor, found.width // found.latent_factor

    @property
    def prompt_tokens(self) -> int:
        """Encodings have a multiple of this many rows."""
        return self._info().prompt_tokens

    @property
    def prompt_features(self) -> int:
        """Numbers in a row of a prompt's encoding; 0 if the model leaves it open or takes no text."""
        return self._info().prompt_features

    @property
    def composes(self) -> bool:
        """Whether concepts can be composed."""
        return bool(self._info().composes)

    @property
    def projections(self) -> list[Layer]:
        """The K and V projections of the UNet, in the order of the paths' bytes."""
        function = library.macula_pipeline_get_projection
        count = self._info().projection_count
        return [Layer.of(info(macula_layer_info, function, self.pointer, at)) for at in range(count)]

    @property
    def memory(self) -> Memory:
        """What it and the process take."""
        found = info(macula_memory_info, library.macula_pipeline_get_memory, self.pointer)
        names = Memory.__dataclass_fields__
        return Memory(**{name: None if (size := getattr(found, name)) == UNKNOWN else size for name in names})

    @property
    def schedule(self) -> Schedule:
        """The decomposed process that the model was trained for; raises `NOT_FOUND` if it was trained for none."""
        return Schedule(receive(library.macula_pipeline_get_schedule, self.pointer))

    def compose(self, *terms: Concept | Term) -> None:
        """Draws concepts together, in place of what was composed before; none ends composing."""
        check(library.macula_compose(self.pointer, _terms(terms), len(terms)))

    def ablate(self, *terms: Concept | Term) -> None:
        """Draws without concepts that were found to erase, in place of what was ablated before."""
        check(library.macula_ablate(self.pointer, _terms(terms), len(terms)))

    def clear(self) -> None:
        """Ends composing and ablating: the next picture is the base model's, bit for bit."""
        check(library.macula_composition_clear(self.pointer))

    def draw(
        self,
        prompt: str,
        *,
        noise: np.ndarray | None = None,
        start_latent: np.ndarray | None = None,
        start_image: np.ndarray | None = None,
        schedule: Schedule | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[DrawOptions],
    ) -> Images:
        """Draws pictures; see `DrawOptions`.

        - `schedule`: a decomposed process in place of the plain one; the model must have been trained for it.
        - `noise`, `start_latent`: `[B, C, H, W]`, float32. `start_image`: `[H, W, 3]`, uint8.
        - `progress`: is told of each step and stops the job by raising; `True` shows a tqdm bar.
        - `cancel`: stops the job from another thread.
        """
        wanted = macula_draw_options.new()
        fill(wanted, options, DrawOptions)
        wanted.prompt = text(prompt)
        wanted.noise, wanted.start_latent = numbers(noise), numbers(start_latent)
        if start_image is not None:
            wanted.start_image = pointer(view(start_image))
        wanted.schedule = schedule.pointer if schedule else None
        call = _receiving(library.macula_pipeline_draw, self.pointer, byref(wanted))
        return Images(run(call, wanted, progress, cancel))

    def discover(
        self,
        pictures: Sequence[np.ndarray | StrPath],
        trigger: str,
        class_noun: str,
        *,
        prompts: Sequence[str] | None = None,
        class_pictures: Sequence[np.ndarray | StrPath] = (),
        preserve: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[DiscoverOptions],
    ) -> Concept:
        """Finds the neurons of a subject from pictures of it; see `DiscoverOptions`.

        - `pictures`: arrays `[H, W, 3]` of one size, or files, which are read at `size` (width, height).
        - `trigger`: a single token of the tokenizer that stands for nothing yet; `class_noun`: what the subject is.
        - `prompts`: what each picture shows, with the trigger in it.
        - `class_pictures`: what must go on being drawn alike in global scope; without them the model draws its own.
        - `preserve`: texts for which predictions are to stay as they are.
        - `progress`, `cancel`: as for `draw`. With a `checkpoint`, the same search goes on where it was stopped.
        """
        wanted = macula_discover_options.new()
        fill(wanted, options, DiscoverOptions)
        read = self._read(pictures, size), self._read(class_pictures, size)
        views, class_views = ([view(one) for one in some] for some in read)
        wanted.pictures, wanted.picture_count = (macula_image * len(views))(*views), len(views)
        if class_views:
            wanted.class_pictures = (macula_image * len(class_views))(*class_views)
            wanted.class_picture_count = len(class_views)
        wanted.trigger, wanted.class_noun = text(trigger), text(class_noun)
        if prompts is not None:
            if len(prompts) != len(views):
                raise ValueError(f"{len(prompts)} prompts for {len(views)} pictures")
            wanted.prompts, wanted.prompt_count = _texts(prompts), len(prompts)
        return self._discovered(wanted, preserve, progress, cancel)

    def discover_encoded(
        self,
        latents: np.ndarray,
        context: np.ndarray,
        trigger: str,
        class_noun: str,
        *,
        embedding: Embedding | None = None,
        class_latents: np.ndarray | None = None,
        class_context: np.ndarray | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[DiscoverOptions],
    ) -> Concept:
        """As `discover`, for a host that encodes pictures and texts itself.

        - `latents`: clean ones of the subject, `[N, C, h, w]`, scaled as the UNet sees them; `context`: encodings of texts
          with the trigger, `[N, rows, features]`, or `[1, rows, features]` of one for all.
        - `embedding`: what `context` is, if the pipeline encoded it; without, `scope="global"` must be asked for, and the
          trigger may be any word.
        - `class_latents`, `class_context`: what must go on being drawn alike in global scope.
        """
        wanted = macula_discover_options.new()
        fill(wanted, options, DiscoverOptions)
        wanted.latents, wanted.context = numbers(latents), numbers(context)
        wanted.class_latents, wanted.class_context = numbers(class_latents), numbers(class_context)
        wanted.embedding = embedding.pointer if embedding else None
        wanted.trigger, wanted.class_noun = text(trigger), text(class_noun)
        return self._discovered(wanted, (), progress, cancel)

    def discover_erasing(
        self,
        word: str,
        anchors: Mapping[str, str],
        *,
        preserve: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[DiscoverOptions],
    ) -> Concept:
        """Finds the neurons that carry a word, for `ablate`; see `DiscoverOptions`.

        - `word`: the word to forget, or words in a row.
        - `anchors`: prompts with the word, and what each is to mean afterwards:
          `{"a tiger on the grass": "an animal on the grass"}`.
        - `preserve`: texts for which predictions are to stay as they are.
        - `size`: width and height of the pictures that the model draws to learn from.
        - `progress`, `cancel`: as for `draw`. With a `checkpoint`, the same search goes on where it was stopped.
        """
        wanted = macula_discover_options.new()
        fill(wanted, options, DiscoverOptions)
        wanted.role, wanted.trigger = Role.ERASE, text(word)
        wanted.prompts, wanted.anchors = _texts(anchors.keys()), _texts(anchors.values())
        wanted.prompt_count = len(anchors)
        wanted.width, wanted.height = size or (0, 0)
        return self._discovered(wanted, preserve, progress, cancel)

    def tune_together(
        self,
        companions: Sequence[Companion],
        *,
        size: tuple[int, int] | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[TogetherOptions],
    ) -> list[Concept]:
        """Gives the weights of several concepts new values, learnt from scenes of their subjects side by side, which are
        made of their pictures; see `TogetherOptions`. The new concepts are in the order of `companions`.

        - `size`: width and height that pictures in files are read at.
        - `progress`, `cancel`: as for `draw`. With a `checkpoint`, the same tuning goes on where it was stopped.
        """
        wanted = macula_together_options.new()
        fill(wanted, options, TogetherOptions)
        array = (macula_companion * len(companions))()
        kept = []  # A view does not keep the array that it shows.
        for one, made in zip(companions, array):
            pictures = self._read(one.pictures, size)
            views = (macula_image * len(pictures))(*map(view, pictures))
            made.subject, made.pictures, made.picture_count = one.concept.pointer, views, len(pictures)
            if one.prompts is not None:
                if len(one.prompts) != len(pictures):
                    raise ValueError(f"{len(one.prompts)} prompts for {len(pictures)} pictures")
                made.prompts = _texts(one.prompts)
            kept.append(pictures)
        wanted.companions, wanted.companion_count = array, len(array)
        handles = (c_void_p * max(1, len(array)))()

        def call() -> list[Concept]:
            check(library.macula_tune_together(self.pointer, byref(wanted), handles))
            return [Concept(handle) for handle in handles if handle is not None]

        return run(call, wanted, progress, cancel)

    def encode_prompt(self, prompt: str, cancel: CancelToken | None = None) -> Embedding:
        """Encodes a prompt of any length."""
        token = cancel.pointer if cancel else None
        return Embedding(receive(library.macula_pipeline_encode_prompt, self.pointer, text(prompt), token))

    def denoise(
        self,
        sample: np.ndarray,
        timestep: float,
        context: np.ndarray | None = None,
        *,
        text_embeds: np.ndarray | None = None,
        time_ids: np.ndarray | None = None,
        class_labels: np.ndarray | None = None,
        timestep_cond: np.ndarray | None = None,
        embedding: Embedding | None = None,
        first_conditional: int = 0,
        stage: int = 0,
        cancel: CancelToken | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """One prediction of the UNet for `sample` `[B, C, H, W]` at `timestep`, of the same shape.

        `context` is `[B, rows, features]`; the others are as in `macula_denoise_inputs`. Float32 arrays in C order are
        read where they lie; the prediction is written to `out` if given, which may be `sample`.
        """
        inputs = macula_denoise_inputs.new()
        states = np.ascontiguousarray(sample, dtype=np.float32)
        inputs.sample, inputs.context = numbers(states), numbers(context)
        inputs.text_embeds, inputs.time_ids = numbers(text_embeds), numbers(time_ids)
        inputs.class_labels, inputs.timestep_cond = numbers(class_labels, np.int64), numbers(timestep_cond)
        inputs.embedding = embedding.pointer if embedding else None
        inputs.cancel = cancel.pointer if cancel else None
        inputs.timestep, inputs.first_conditional, inputs.stage = timestep, first_conditional, stage
        if out is None:
            out = np.empty_like(states)
        elif not (out.dtype == np.float32 and out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be a writeable float32 array in C order")
        check(library.macula_pipeline_denoise(self.pointer, byref(inputs), byref(tensor(out))))
        return out

    def _read(self, pictures: Sequence[np.ndarray | StrPath], size: tuple[int, int] | None) -> list[np.ndarray]:
        width, height = size or self.size
        return [one if isinstance(one, np.ndarray) else read_image(one, width, height) for one in pictures]

    def _discovered(
        self,
        wanted: macula_discover_options,
        preserve: Sequence[str],
        progress: Callable[[Progress], object] | bool | None,
        cancel: CancelToken | None,
    ) -> Concept:
        wanted.preserve, wanted.preserve_count = _texts(preserve), len(preserve)
        call = _receiving(library.macula_discover, self.pointer, byref(wanted))
        return Concept(run(call, wanted, progress, cancel))

    def _info(self) -> macula_pipeline_info:
        return info(macula_pipeline_info, library.macula_pipeline_get_info, self.pointer)

    def __repr__(self) -> str:
        if self._handle is None:
            return "<macula.Pipeline: closed>"
        return f"<macula.Pipeline: {self.size[0]} x {self.size[1]}, {self.provider}>"


def _receiving(function: Any, *arguments: Any) -> Callable[[], int]:
    return lambda: receive(function, *arguments)


def _texts(texts: Collection[str]) -> Any:
    return (c_char_p * len(texts))(*map(text, texts))


def _terms(terms: Sequence[Concept | Term]) -> Any:
    array = (macula_term * len(terms))()
    for at, term in enumerate(terms):
        term = Term(term) if isinstance(term, Concept) else term
        made = macula_term.new()
        made.subject, made.strength, made.scope = term.concept.pointer, term.strength, choice(Scope, term.scope)
        made.words = text(term.words) if term.words is not None else None
        if len(term.tokens):
            made.tokens, made.token_count = (c_uint32 * len(term.tokens))(*term.tokens), len(term.tokens)
        array[at] = made
    return array
