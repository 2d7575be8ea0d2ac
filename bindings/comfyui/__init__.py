"""ComfyUI nodes: concept neurons on ONNX models, which Macula runs, and on ComfyUI's own."""

from .concepts import AblateConcept, ComposeConcepts, ConceptInfo, LoadConcept, SaveConcept
from .models import ApplyConcept, FindConceptNeurons, LoadMaculaUNet

NODE_CLASS_MAPPINGS = {
    "MaculaLoadUNet": LoadMaculaUNet,
    "MaculaLoadConcept": LoadConcept,
    "MaculaSaveConcept": SaveConcept,
    "MaculaComposeConcepts": ComposeConcepts,
    "MaculaAblateConcept": AblateConcept,
    "MaculaApplyConcept": ApplyConcept,
    "MaculaConceptInfo": ConceptInfo,
    "MaculaFindConceptNeurons": FindConceptNeurons,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "MaculaLoadUNet": "Load Macula UNet (ONNX)",
    "MaculaLoadConcept": "Load Concept",
    "MaculaSaveConcept": "Save Concept",
    "MaculaComposeConcepts": "Compose Concepts",
    "MaculaAblateConcept": "Ablate Concept",
    "MaculaApplyConcept": "Apply Concept to MODEL",
    "MaculaConceptInfo": "Concept Info",
    "MaculaFindConceptNeurons": "Find Concept Neurons",
}
