"""Look inside ONNX diffusion models and steer them: concept neurons, composed and ablated.

`Pipeline` opens a model folder and draws, `Concept` is a set of neurons; `macula.h` of the native library is the manual.
"""

from ._abi import (
    Attention, ConvolutionSearch, LogLevel, Method, Optimization, Provider, Role, Sampler, Scope, Searched, Status, Values,
)
from ._library import version as _version
from .concepts import Concept, Layer, Overlap
from .errors import Cancelled, InvalidArgument, MaculaError, OutOfMemory
from .images import Images, read_image, write_png
from .jobs import CancelToken, Progress
from .options import DiscoverOptions, DrawOptions, SessionOptions, TogetherOptions, TrajectoryOptions
from .pipeline import Companion, Embedding, Memory, Pipeline, Term
from .runtime import Runtime
from .schedules import Moment, Schedule, Trajectory

__version__ = _version()

__all__ = [
    "Attention", "CancelToken", "Cancelled", "Companion", "Concept", "ConvolutionSearch", "DiscoverOptions", "DrawOptions",
    "Embedding", "Images", "InvalidArgument", "Layer", "LogLevel", "MaculaError", "Memory", "Method", "Moment",
    "Optimization", "OutOfMemory", "Overlap", "Pipeline", "Progress", "Provider", "Role", "Runtime", "Sampler", "Schedule",
    "Scope", "Searched", "SessionOptions", "Status", "Term", "TogetherOptions", "Trajectory", "TrajectoryOptions", "Values",
    "read_image", "write_png",
]
