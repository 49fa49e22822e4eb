"""Mamba-3 in files: ours, mamba_ssm's and flash-linear-attention's, and what these cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import edit, ids, small

import stateline
from stateline.interop import CheckpointError

SMALL: dict[str, Any] = {"layer": "Mamba3", "d_state": 6, "headdim": 10, "ngroups": 2}  # d_model 20: 4 heads


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ()), ({"is_outproj_norm": True, "rope_fraction": 1.0, "A_floor": 0.01}, ("norm.weight",)),
        ({"is_mimo": True, "mimo_rank": 2}, ("mimo_x", "mimo_z", "mimo_o")),
    ],
    ids=str,
)  # fmt: skip
def test_files_of_mamba_ssm_both_ways(tmp_path: Path, options: dict[str, Any], more: tuple[str, ...]) -> None:
    """As state-spaces/mamba3-* have them, with a gated MLP, and with arguments that choose kernels."""
    model, x = small(ssm_cfg=SMALL | options, pad_vocab_size_multiple=16, d_intermediate=24), ids()
    stateline.save(model, tmp_path, "mamba_ssm")
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    own = {k.removeprefix("backbone.layers.0.mixer.") for k in stored if k.startswith("backbone.layers.0.mixer.")}
    assert own - {*more} == {
        "dt_bias", "B_bias", "C_bias", "D", "in_proj.weight", "B_norm.weight", "C_norm.weight", "out_proj.weight"
    }  # fmt: skip
    assert own >= {*more}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["ssm_cfg"] == SMALL | options
    kernels = {"chunk_size": 16, "fuse_pregate_headwise_norm": True}
    edit(tmp_path / "config.json", ssm_cfg=written["ssm_cfg"] | kernels)
    again = stateline.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_files_of_flash_linear_attention_are_read_and_written(tmp_path: Path) -> None:
    options = {"A_activation": "softplus", "rope_fraction": 1.0, "is_outproj_norm": True, "dt_max": 0.2}
    model, x = small(ssm_cfg=SMALL | options), ids()
    stateline.save(model, tmp_path, "huggingface")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values | {
        "model_type": "mamba3", "architectures": ["Mamba3ForCausalLM"], "hidden_size": 20, "num_hidden_layers": 2,
        "state_size": 6, "head_dim": 10, "n_groups": 2, "num_heads": 4, "expand": 2, "rope_fraction": 1.0,
        "A_floor": 1e-4, "dt_min": 0.001, "dt_max": 0.2, "dt_init_floor": 1e-4, "is_outproj_norm": True,
        "is_mimo": False, "mimo_rank": 4, "norm_eps": 1e-5, "use_bias": False,
        "tie_word_embeddings": True, "residual_in_fp32": True,
    } == values  # fmt: skip
    again = stateline.load(tmp_path)
    assert torch.equal(again(x), model(x))
    edit(tmp_path / "config.json", use_bias=True)
    with pytest.raises(CheckpointError, match="use_bias is True, Mamba3's projections have none"):
        stateline.load(tmp_path)
    edit(tmp_path / "config.json", use_bias=None, num_heads=3)
    with pytest.raises(CheckpointError, match=r"num_heads is 3, expand · hidden_size / head_dim is 4"):
        stateline.load(tmp_path)
    edit(tmp_path / "config.json", num_heads=None, norm_eps=1e-3)  # one for all norms there
    assert stateline.load(tmp_path).backbone.layers[0].mixer.B_norm.eps == 1e-3


def test_what_other_formats_cannot_express_is_refused(tmp_path: Path) -> None:
    for format, options, message in (
        ("mamba_ssm", {"A_activation": "softplus"}, "A_activation is 'softplus', mamba_ssm's Mamba3 has only"),
        ("mamba_ssm", {"rope_interleaved": False}, "rope_interleaved is False with is_mimo False"),
        ("mamba_ssm", {"rope_fraction": 0.25}, "rope_fraction is 0.25, mamba_ssm's"),
        ("mamba_ssm", {"rope_fraction": 0.5, "d_state": 3}, "rope_fraction is 0.5, mamba_ssm's"),
        ("mamba_ssm", {"norm_eps": 1e-3}, "norm_eps is 0.001, mamba_ssm has only"),
        ("huggingface", {}, "flash-linear-attention cannot express this model: A_activation is 'heavy_tail'"),
        ("huggingface", {"A_activation": "softplus", "is_mimo": True}, r"is_mimo is True \(it runs one rank\)"),
        ("huggingface", {"A_activation": "softplus", "rope_interleaved": False}, "rope_interleaved is False"),
        ("huggingface", {"A_activation": "softplus", "rope_fraction": 0.1}, "rope_fraction is 0.1 of 6 states"),
        ("huggingface", {"A_activation": "softplus", "norm_eps": 1e-3}, "norm_eps is 0.001, the model's 1e-05"),
        ("gguf", {}, "layers of kind Mamba3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            stateline.save(small(ssm_cfg=SMALL | options), tmp_path / "m", format)
        assert not (tmp_path / "m").exists()


def test_a_hybrid_with_attention_travels(tmp_path: Path) -> None:
    model = small(ssm_cfg=SMALL, attn_layer_idx=[1], attn_cfg={"num_heads": 4, "rotary_emb_dim": 4})
    x = ids()
    for format in ("stateline", "mamba_ssm"):
        stateline.save(model, tmp_path / format, format)
        assert torch.equal(stateline.load(tmp_path / format)(x), model(x))
    y, state = model.extend(x[:, :5], model.init_state(2, max_tokens=16))
    rest, _ = model.extend(x[:, 5:], state)
    assert torch.allclose(torch.cat([y, rest], 1), model(x), atol=1e-5)
