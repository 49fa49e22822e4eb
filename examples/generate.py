"""Text from the bundled model: streamed, in a batch, and with the probability of each byte.

Run: python examples/generate.py
"""

from __future__ import annotations

import math

import stateline
from stateline.generation import SamplingConfig, generate_batch, generate_tokens

model = stateline.load("bundled")
sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=1)

print("streamed, up to the end of a sentence:")
for piece in stateline.generate(model, "My fellow citizens", sampling=sampling, stop=".", max_tokens=300):
    print(piece, end="", flush=True)

print("\n\nthree at once, each as if it were alone:")
prompts = ["The economy", "Peace", "In the coming year, our farmers"]
for prompt, text in zip(prompts, generate_batch(model, prompts, max_tokens=60, sampling=sampling), strict=True):
    print(f"  {prompt}|{text!r}")

print("\nhow sure the model is of each byte:")
for token in generate_tokens(model, "The United Sta", max_tokens=8, sampling=SamplingConfig(temperature=0)):
    print(f"  {chr(token.id)!r}: {math.exp(token.logprob):.1%}")
