"""A Mamba of random weights as a GGUF file, so that llama.cpp can be timed on the shapes that we time.

Names and layouts as llama.cpp's converter writes them: A = −exp(A_log), convolutions (channels, taps), one-dimensional
tensors, A and the convolution in float32, matrices in the format asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("F16", "Q8_0", "Q4_0")


def write(path: Path, format: str, d_model: int, n_layer: int, vocab_size: int, d_state: int = 16) -> None:
    """Write a model to `path`; `format` is one of FORMATS."""
    import gguf

    inner, rank, taps = 2 * d_model, -(-d_model // 16), 4
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(path, "mamba")
    out.add_context_length(2**20)
    out.add_embedding_length(d_model)
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(n_layer)
    out.add_ssm_conv_kernel(taps)
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(d_state)
    out.add_ssm_time_step_rank(rank)
    out.add_ssm_dt_b_c_rms(False)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(vocab_size)
    out.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)).astype(np.float32)
        # Quantised rows come in blocks of 32; llama.cpp keeps others in 16 bits.
        kind = getattr(gguf.GGMLQuantizationType, format if columns % 32 == 0 else "F16")
        out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, values: Any) -> None:
        out.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))

    matrix("token_embd.weight", vocab_size, d_model)
    vector("output_norm.weight", np.ones(d_model))
    for i in range(n_layer):
        block = f"blk.{i}."
        vector(block + "attn_norm.weight", np.ones(d_model))
        matrix(block + "ssm_in.weight", 2 * inner, d_model)
        vector(block + "ssm_conv1d.weight", 0.5 * rng.standard_normal((inner, taps)))
        vector(block + "ssm_conv1d.bias", np.zeros(inner))
        matrix(block + "ssm_x.weight", rank + 2 * d_state, inner)
        matrix(block + "ssm_dt.weight", inner, rank)
        vector(block + "ssm_dt.bias", np.full(inner, -4.0))
        vector(block + "ssm_a", -np.tile(np.arange(1.0, d_state + 1), (inner, 1)))
        vector(block + "ssm_d", np.ones(inner))
        matrix(block + "ssm_out.weight", d_model, inner)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
