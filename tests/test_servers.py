"""What vLLM and SGLang read of an exported directory, written down as they read it, against what is there.

Neither is installed here. The parameters below are those that their model files make from a configuration (vLLM 0.33.0,
SGLang 0.5.23): names after their own renaming of a checkpoint's, and shapes on one device.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import ids, small
from safetensors.torch import load_file

import stateline
from stateline import LanguageModel, ModelConfig
from stateline import nn as sl
from stateline.cli import main
from stateline.generation import load_tokenizer
from stateline.models import MIXERS

try:
    import transformers
except ImportError:  # the `hf` extra
    if os.environ.get("CI"):
        raise
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers (extra `hf`) is not installed")

MAMBA2 = {"layer": "Mamba2", "d_state": 3, "headdim": 5, "ngroups": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba, odd": {"ssm_cfg": {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 7, "bias": True, "conv_bias": False}},
    "mamba, untied": {"tie_embeddings": False},
    "falcon_mamba": {"ssm_cfg": {"d_state": 5, "b_c_dt_rms_eps": 1e-4}},
    "mamba2": {"ssm_cfg": MAMBA2},
    "mamba2, untied": {"ssm_cfg": {**MAMBA2, "bias": True, "dt_limit": (0.0, float("inf"))}, "tie_embeddings": False},
}
ARCHITECTURES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


def exported(folder: Path, name: str, **options: Any) -> tuple[LanguageModel, dict[str, Any], dict[str, torch.Tensor]]:
    """(the model, config.json, tensors by name) of an export without a tokenizer."""
    model = small(**MODELS[name])
    stateline.save(model, folder, "vllm", tokenizer="none", **options)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    config = json.loads((folder / "config.json").read_text(), parse_constant=refuse)
    return model, config, load_file(folder / "model.safetensors")


def mixer_of(c: dict[str, Any], a: str) -> dict[str, tuple[int, ...]]:
    """Parameters of one mixer, by the names of their classes; `a`: what A_log is called there."""
    d, e, n, k, heads = c["hidden_size"], c["intermediate_size"], c["state_size"], c["conv_kernel"], c.get("num_heads")
    width = e if heads is None else e + 2 * c["n_groups"] * n  # of the convolution
    found: dict[str, tuple[int, ...]] = {"conv1d.weight": (width, 1, k), "out_proj.weight": (d, e)}
    if heads is None:
        rank = c["time_step_rank"]
        found |= {"in_proj.weight": (2 * e, d), "x_proj.weight": (rank + 2 * n, e), "dt_proj.weight": (e, rank)}
        found |= {"dt_proj.bias": (e,), a: (e, n), "D": (e,)}
    else:
        found |= {"in_proj.weight": (e + width + heads, d), a: (heads,), "D": (heads,), "dt_bias": (heads,)}
        found |= {"norm.weight": (e,)}
    if c["use_conv_bias"]:
        found["conv1d.bias"] = (width,)
    if c["use_bias"]:
        found |= {"in_proj.bias": found["in_proj.weight"][:1], "out_proj.bias": (d,)}
    return found


def wanted(c: dict[str, Any], server: str) -> tuple[dict[str, tuple[int, ...]], list[tuple[str, str]]]:
    """(parameters that a server makes and a checkpoint must fill, how it renames a checkpoint's names)."""
    two = c["model_type"] == "mamba2"
    if server == "vllm":
        a, names, renamed = "A", ("backbone.embeddings", "backbone.layers", "backbone.norm_f"), [(".A_log", ".A")]
        tied = c["tie_word_embeddings"]
    else:
        a, names = "A" if two else "A_log", ("model.embed_tokens", "model.layers", "model.norm")
        renamed = [("backbone.", "model."), ("embeddings.", "embed_tokens."), ("norm_f.", "norm.")]
        renamed += [("A_log", "A")] if two else []
        tied = c["tie_word_embeddings"] and not two  # its Mamba-2 has a head of its own whatever is said
    embedding, layers, norm = names
    shapes: dict[str, tuple[int, ...]] = {f"{embedding}.weight": (c["vocab_size"], c["hidden_size"])}
    shapes[f"{norm}.weight"] = (c["hidden_size"],)
    if not tied:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        shapes[f"{layers}.{i}.norm.weight"] = (c["hidden_size"],)
        shapes |= {f"{layers}.{i}.mixer.{key}": shape for key, shape in mixer_of(c, a).items()}
    return shapes, renamed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_every_parameter_of_a_server_is_there_and_no_other(tmp_path: Path, name: str, server: str) -> None:
    _, config, tensors = exported(tmp_path, name)
    shapes, renamed = wanted(config, server)
    found = {}
    for key, tensor in tensors.items():
        for old, new in renamed:
            key = key.replace(old, new)
        found[key] = tuple(tensor.shape)
    assert found == shapes


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_says_what_they_ask(tmp_path: Path, name: str) -> None:
    model, config, _ = exported(tmp_path, name)
    kind = name.partition(",")[0]
    assert config["model_type"] == kind
    assert config["architectures"] == [ARCHITECTURES[kind]]
    assert config["hidden_act"] == "silu"
    assert "time_step_limit" not in config
    mixer: Any = model.backbone.layers[0].mixer
    for key in ("layer_norm_epsilon", "expand", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        assert key in config
    assert config["intermediate_size"] == config["expand"] * config["hidden_size"] == mixer.d_inner
    if kind == "mamba2":
        assert config["rms_norm"] is True
        assert config["num_heads"] * config["head_dim"] == config["intermediate_size"]
        assert config["chunk_size"] > 0
        assert config["tie_word_embeddings"] is False
    else:
        assert isinstance(config["time_step_rank"], int)
        assert config["tie_word_embeddings"] is model.config.tie_embeddings
    if kind == "falcon_mamba":
        assert config["mixer_rms_eps"] == 1e-4


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_computes_the_same_of_it(tmp_path: Path, name: str) -> None:
    """Both servers make their configurations from its classes, and their layers from its models."""
    model, _, _ = exported(tmp_path, name)
    theirs, x = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids()
    assert type(theirs).__name__ in ARCHITECTURES.values()
    assert (theirs(x).logits - model(x)).abs().max() < 1e-4
    assert torch.equal(stateline.load(tmp_path)(x), model(x))


def test_sixteen_bits_leave_time_constants_whole(tmp_path: Path) -> None:
    _, config, tensors = exported(tmp_path, "mamba2", dtype=torch.bfloat16)
    assert config["dtype"] == "bfloat16"
    exact = {name.rpartition(".")[2] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert exact == {"A_log", "D", "dt_bias"}
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssm_cfg": {**MAMBA2, "dt_limit": (0.01, 0.5)}}, r"dt_limit is \(0.01, 0.5\) \(step sizes are not limited"),
        ({"ssm_cfg": {**MAMBA2, "dt_limit": (0.01, None)}}, "dt_limit is"),
        ({"ssm_cfg": {"d_conv": 5}}, "d_conv is 5"), ({"ssm_cfg": {"d_conv": 1}}, "d_conv is 1"),
        ({"ssm_cfg": {"d_state": 257}}, "d_state is 257"), ({"d_intermediate": 8}, "d_intermediate is 8"),
        ({"ssm_cfg": {**MAMBA2, "rmsnorm": False, "d_conv": 9}}, "d_conv is 9 .*; rmsnorm is False"),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, r"attn_layer_idx is \[0\]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_they_cannot_run_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^save: .*cannot .*{message}"):
        stateline.save(small(**options), tmp_path / "m", "vllm", tokenizer="none")
    assert not (tmp_path / "m").exists()


def test_another_format_is_named_only_if_it_takes_the_model(tmp_path: Path) -> None:
    def words(**options: Any) -> str:
        with pytest.raises(ValueError, match=r"^save: vLLM and SGLang cannot run this model: ") as error:
            stateline.save(small(**options), tmp_path / "m", "vllm", tokenizer="none")
        return str(error.value).partition("model: ")[2]

    mamba3 = {"layer": "Mamba3", "d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 2}
    assert words(ssm_cfg=mamba3) == 'the mixer is Mamba3 (neither has it). Use format="stateline".'
    assert words(ssm_cfg={"d_conv": 5}).endswith('Use format="huggingface".')
    assert words(ssm_cfg={"d_conv": 5}, d_intermediate=8).endswith('Use format="stateline".')


def test_a_mixer_of_the_users_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "Own", sl.Mamba)
    for format in ("vllm", "huggingface"):
        with pytest.raises(ValueError, match=r"^save: transformers has no mixer for Own\."):
            stateline.save(small(ssm_cfg={"layer": "Own"}), tmp_path / "m", format)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@needs_transformers
def test_bytes_are_a_tokenizer_of_theirs(tmp_path: Path) -> None:
    stateline.save(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=256)), tmp_path, "vllm")
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path), "héllo  Wörld\n\t春\x00<s>"
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode()), clean_up_tokenization_spaces=False) == text
    assert load_tokenizer(tmp_path, 256).encode(text) == list(text.encode())
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None


@needs_transformers
def test_a_tokenizer_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    assert main(["convert", "bundled-zh", str(tmp_path / "m"), "--to", "vllm", "--dtype", "bfloat16"]) == 0
    assert "vllm, 9,109,248 parameters" in capsys.readouterr().out
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "m"), load_tokenizer("bundled-zh", 6144)
    assert theirs("春眠不覺曉", add_special_tokens=False)["input_ids"] == ours.encode("春眠不覺曉")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id == 0
    assert main(["convert", "bundled-zh", str(tmp_path / "m"), "--to", "vllm", "--force", "--no-tokenizer"]) == 0
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "n"), "--to", "vllm"]) != 0
    assert "tokenizer.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_a_tokenizer_must_be_named_where_ids_are_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model has 61 ids and no tokenizer was given. Give tokenizer=DIR"):
        stateline.save(small(), tmp_path / "m", "vllm")
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        stateline.save(small(), tmp_path / "m", "vllm", tokenizer=tmp_path)
    bytes_model = small(vocab_size=256)
    stateline.save(bytes_model, tmp_path / "bytes", "vllm")
    with pytest.raises(ValueError, match=r'tokenizer is "none" and .*bytes holds tokenizer\.json'):
        stateline.save(bytes_model, tmp_path / "bytes", "vllm", tokenizer="none")
    stateline.save(small(), tmp_path / "m")
    with pytest.raises(ValueError, match="holds a stateline model"):
        stateline.save(small(), tmp_path / "m", "vllm", tokenizer="none")
