"""Where GPU kernels are tested: on a CUDA device, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
