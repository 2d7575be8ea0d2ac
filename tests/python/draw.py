"""Draws one picture with the library alone, for comparison with what a host shows.

    draw.py MODEL OUT.png PROMPT STEPS GUIDANCE SEED [CONCEPT.safetensors=STRENGTH ...]
"""

import sys

import macula

model, out, prompt, steps, guidance, seed, *concepts = sys.argv[1:]
drawn, erased = [], []
for concept in concepts:
    file, strength = concept.rsplit("=", 1)
    loaded = macula.Concept.load(file)
    (erased if loaded.role == macula.Role.ERASE else drawn).append(macula.Term(loaded, float(strength)))
with macula.Pipeline(model) as pipeline:
    pipeline.compose(*drawn)
    pipeline.ablate(*erased)
    pipeline.draw(prompt, steps=int(steps), guidance=float(guidance), seed=int(seed)).save(0, out)
