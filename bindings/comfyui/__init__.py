"""ComfyUI nodes: concept neurons on ONNX models, which Macula runs, and on ComfyUI's own."""

from inspect import cleandoc

from .concepts import AblateConcept, ComposeConcepts, ConceptInfo, LoadConcept, SaveConcept
from .discovery import FindConceptNeurons
from .models import ApplyConcept, EncodePrompt, LoadMaculaUNet
from .sampling import DecomposedSampler
from .together import TuneConceptsTogether

NODE_CLASS_MAPPINGS = {
    "MaculaLoadUNet": LoadMaculaUNet,
    "MaculaEncodePrompt": EncodePrompt,
    "MaculaLoadConcept": LoadConcept,
    "MaculaSaveConcept": SaveConcept,
    "MaculaComposeConcepts": ComposeConcepts,
    "MaculaAblateConcept": AblateConcept,
    "MaculaApplyConcept": ApplyConcept,
    "MaculaConceptInfo": ConceptInfo,
    "MaculaFindConceptNeurons": FindConceptNeurons,
    "MaculaTuneConceptsTogether": TuneConceptsTogether,
    "MaculaDecomposedSampler": DecomposedSampler,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "MaculaLoadUNet": "Load Macula UNet (ONNX)",
    "MaculaEncodePrompt": "Encode Prompt (Macula)",
    "MaculaLoadConcept": "Load Concept",
    "MaculaSaveConcept": "Save Concept",
    "MaculaComposeConcepts": "Compose Concepts",
    "MaculaAblateConcept": "Ablate Concept",
    "MaculaApplyConcept": "Apply Concept to MODEL",
    "MaculaConceptInfo": "Concept Info",
    "MaculaFindConceptNeurons": "Find Concept Neurons",
    "MaculaTuneConceptsTogether": "Tune Concepts Together",
    "MaculaDecomposedSampler": "Decomposed Sampler",
}

for _node in NODE_CLASS_MAPPINGS.values():
    _node.DESCRIPTION = cleandoc(_node.__doc__)

#: The help pages, in `docs`.
WEB_DIRECTORY = "./web"
