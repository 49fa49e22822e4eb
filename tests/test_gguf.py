"""GGUF files: what is in them, and what llama.cpp makes of them."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import contents, small

import stateline
from stateline.cli import main
from stateline.interop import CheckpointError
from stateline.interop import gguf as ours
from stateline.interop.gguf_layers import Weight
from stateline.interop.gguf_read import write_tokenizer

if os.environ.get("CI") or importlib.util.find_spec("gguf"):
    import gguf
else:
    pytest.skip("gguf (extra `gguf`) is not installed", allow_module_level=True)

#: Error of a weight over the largest of its matrix. Q8_0: half a step of 1/127, and a scale in 16 bits. Q4_0: a step of
#: 1/8 from −8 to 7, so that a value opposite to a block's largest may lose one.
LOSS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11, "Q4_0": 1 / 8 + 2**-11}
#: Error of the logits over the largest: llama.cpp rounds activations as well, to 8 bits beside Q8_0 and Q4_0.
ACTIVATIONS = {"F32": 5e-6, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 3e-2, "Q4_0": 3e-2}


MAMBA2 = {"layer": "Mamba2", "headdim": 16, "d_state": 16, "ngroups": 2}
CONFIGS: dict[str, dict[str, Any]] = {"Mamba": {"d_state": 16}, "Mamba2": MAMBA2}


def model_of(**options: Any) -> stateline.LanguageModel:
    model = small(**{"d_model": 64, "vocab_size": 61, "ssm_cfg": {"d_state": 16}, **options})
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and skips start as ones, which hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


@pytest.mark.parametrize("kind", ours.KINDS)
def test_every_weight_is_there(tmp_path: Path, kind: str) -> None:
    model = model_of(tie_embeddings=False, ssm_cfg={"d_state": 16, "conv_bias": False})
    stateline.save(model, tmp_path / "m.gguf", format="gguf", dtype=kind, tokenizer="none")
    found = tensors(tmp_path / "m.gguf")
    assert len(found) == 3 + 2 * 10
    mixer = model.backbone.layers[1].mixer
    exact = {
        "output_norm.weight": model.backbone.norm_f.weight,
        "blk.1.attn_norm.weight": model.backbone.layers[1].norm.weight,
        "blk.1.ssm_conv1d.weight": mixer.conv1d.weight[:, 0],
        "blk.1.ssm_conv1d.bias": torch.zeros(128),
        "blk.1.ssm_dt.bias": mixer.dt_proj.bias,
        "blk.1.ssm_a": -mixer.A_log.exp(),
        "blk.1.ssm_d": mixer.D,
    }
    for name, wanted in exact.items():
        assert found[name].tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(found[name].data, wanted.detach().numpy()), name
    matrices = {
        "token_embd.weight": model.backbone.embedding.weight[:61],
        "output.weight": model.lm_head.weight[:61],
        "blk.1.ssm_in.weight": mixer.in_proj.weight,
        "blk.1.ssm_x.weight": mixer.x_proj.weight,
        "blk.1.ssm_dt.weight": mixer.dt_proj.weight,
        "blk.1.ssm_out.weight": mixer.out_proj.weight,
    }
    for name, wanted in matrices.items():
        stored = found[name].tensor_type
        fits = wanted.shape[1] % 32 == 0 or kind not in ours.BLOCKED
        assert stored.name == (kind if fits else "F16"), name
        values = gguf.quants.dequantize(found[name].data, stored)
        assert np.abs(values - wanted.detach().numpy()).max() <= LOSS[kind] * float(wanted.detach().abs().max()), name
    assert set(exact) | set(matrices) <= set(found)


def test_weights_of_mamba_2_lie_as_llama_cpp_wants_them(tmp_path: Path) -> None:
    model = model_of(ssm_cfg=MAMBA2)
    stateline.save(model, tmp_path / "m.gguf", format="gguf", dtype="Q8_0", tokenizer="none")
    found, mixer = tensors(tmp_path / "m.gguf"), model.backbone.layers[1].mixer
    exact = {
        "blk.1.ssm_conv1d.weight": mixer.conv1d.weight[:, 0],
        "blk.1.ssm_conv1d.bias": mixer.conv1d.bias,
        "blk.1.ssm_dt.bias": mixer.dt_bias,
        "blk.1.ssm_a": -mixer.A_log.exp()[:, None],
        "blk.1.ssm_d": mixer.D[:, None],
        "blk.1.ssm_norm.weight": mixer.norm.weight.view(2, 64),
    }
    for name, wanted in exact.items():
        assert found[name].tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(found[name].data, wanted.detach().numpy()), name
    matrices = {"token_embd.weight", "blk.1.ssm_in.weight", "blk.1.ssm_out.weight"}
    assert {
        name for name, t in found.items() if t.tensor_type.name == "Q8_0" and not name.startswith("blk.0")
    } == matrices
    assert len(found) == 2 + 2 * 9
    sizes = {"conv_kernel": 4, "inner_size": 128, "state_size": 16, "time_step_rank": 8, "group_count": 2}
    for name, value in sizes.items():
        assert field(tmp_path / "m.gguf", f"mamba2.ssm.{name}") == value


@pytest.mark.parametrize("kind", ours.KINDS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_was_written_is_read(tmp_path: Path, name: str, kind: str) -> None:
    model = model_of(ssm_cfg=CONFIGS[name], tie_embeddings=name == "Mamba", norm_eps=3e-5 if name == "Mamba" else 1e-5)
    stateline.save(model, tmp_path / "m.gguf", format="gguf", dtype=kind, tokenizer="none")
    again = stateline.load(tmp_path / "m.gguf")
    assert again.config.norm_eps == model.config.norm_eps
    assert again.config.tie_embeddings == model.config.tie_embeddings
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert again.backbone.embedding.weight.dtype == kept
    again = stateline.load(tmp_path / "m.gguf", dtype=torch.float32)
    for (parameter, values), wanted in zip(again.named_parameters(), model.parameters(), strict=True):
        if parameter == "backbone.embedding.weight" or parameter.startswith("lm_head"):
            wanted = wanted[:61]
        lost = (values - wanted).abs().max() / wanted.abs().max()
        assert lost <= (LOSS[kind] if wanted.dim() == 2 and "A_log" not in parameter else 1e-6), parameter
    ids = torch.randint(61, (2, 9))
    stateline.save(again, tmp_path / "n.gguf", format="gguf", dtype=kind, tokenizer="none")
    second = stateline.load(tmp_path / "n.gguf", dtype=torch.float32)
    assert (second(ids) - again(ids)).abs().max() <= 1e-5 * again(ids).abs().max()  # nothing is lost twice


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match=r"m\.gguf is no file\.$"):
        stateline.load(path)
    path.write_bytes(b"GGML, perhaps")
    with pytest.raises(CheckpointError, match=r"m\.gguf is no GGUF file, or damaged: .*Copy or download it again"):
        stateline.load(path)
    stateline.save(model_of(ssm_cfg=MAMBA2), path, format="gguf", tokenizer="none")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"m\.gguf is no GGUF file, or damaged"):
        stateline.load(path)
    path.write_bytes(whole.replace(b"mamba2", b"llamas"))
    with pytest.raises(CheckpointError, match=r"architecture 'llamas'; 'mamba' and 'mamba2' are supported"):
        stateline.load(path)
    path.write_bytes(whole.replace(b"ssm.group_count", b"ssm.group_total"))
    with pytest.raises(CheckpointError, match=r"lacks the metadata 'ssm\.group_count'"):
        stateline.load(path)
    path.write_bytes(whole.replace(b"blk.1.ssm_norm.weight", b"blk.1.ssm_form.weight"))
    with pytest.raises(CheckpointError, match=r"missing: .*1\.mixer\.norm\.weight(.|\n)*unexpected: blk\.1\.ssm_form"):
        stateline.load(path)
    broken = model_of(ssm_cfg=MAMBA2)
    broken.backbone.layers[0].mixer.A_log.data[0] = -torch.inf
    stateline.save(broken, path, format="gguf", tokenizer="none")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a has decay rates that are not below 0"):
        stateline.load(path)


def test_a_file_without_a_vocabulary_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    stateline.save(model_of(), path, format="gguf", tokenizer="none")
    assert main(["generate", "the", "--model", str(path)]) == 2
    assert f"{path} holds no tokenizer, and its model has 61 ids." in capsys.readouterr().err
    for to in ("vllm", "gguf"):
        assert main(["convert", str(path), str(tmp_path / to), "--to", to]) == 2
        error = capsys.readouterr().err
        assert f"{path} holds no tokenizer, and its model has 61 ids. --no-tokenizer leaves it out of {to}" in error
        assert main(["convert", str(path), str(tmp_path / to), "--to", to, "--no-tokenizer"]) == 0
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 0


def test_a_weight_that_lies_the_other_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Weight.there
    monkeypatch.setattr(
        Weight, "there", lambda own, mixer: there(own, mixer).T if own.ours == "A_log" else there(own, mixer)
    )
    stateline.save(model_of(), tmp_path / "m.gguf", format="gguf", tokenizer="none")
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0\.ssm_a has shape \(16, 128\), expected \(128, 16\)"):
        stateline.load(tmp_path / "m.gguf")


def test_a_vocabulary_that_points_nowhere_is_damage(tmp_path: Path) -> None:
    folder, path = bpe(tmp_path), tmp_path / "m.gguf"
    size = stateline.generation.tokenizer.read_tokenizer(folder / "tokenizer.json").vocab_size
    stateline.save(model_of(vocab_size=size), path, format="gguf", tokenizer=folder)
    whole, damaged = path.read_bytes(), r"m\.gguf is damaged: its vocabulary lacks .*Copy or download it again"
    end = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.eos_token_id"]
    end.parts[end.data[0]][0] = 5000
    end.parts[end.data[0]].flush()
    with pytest.raises(CheckpointError, match=damaged):
        write_tokenizer(path, tmp_path)
    path.write_bytes(whole.replace(b"ggml.token_type", b"ggml.token_kind"))
    with pytest.raises(CheckpointError, match=damaged):
        write_tokenizer(path, tmp_path)


def test_sizes_and_no_vocabulary(tmp_path: Path) -> None:
    stateline.save(model_of(norm_eps=3e-5), tmp_path / "m.gguf", format="gguf", tokenizer="none")
    wanted = {
        "general.architecture": "mamba", "mamba.embedding_length": 64, "mamba.block_count": 2, "mamba.vocab_size": 61,
        "mamba.ssm.conv_kernel": 4, "mamba.ssm.inner_size": 128, "mamba.ssm.state_size": 16,
        "mamba.ssm.time_step_rank": 4, "mamba.ssm.dt_b_c_rms": False, "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.tokens": None,
    }  # fmt: skip
    for name, value in wanted.items():
        assert field(tmp_path / "m.gguf", name) == value, name
    assert field(tmp_path / "m.gguf", "mamba.attention.layer_norm_rms_epsilon") == pytest.approx(3e-5)
    assert "output.weight" not in tensors(tmp_path / "m.gguf")  # tied


def bpe(folder: Path, **changes: Any) -> Path:
    """A small byte-level BPE with an end of text, in a folder."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = changes.get("pre", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the theory of the thing, and then the other thing"] * 3, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return folder


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    folder = bpe(tmp_path)
    size = stateline.generation.tokenizer.read_tokenizer(folder / "tokenizer.json").vocab_size
    stateline.save(model_of(vocab_size=size + 3), tmp_path / "m.gguf", format="gguf", tokenizer=folder)
    pieces = field(tmp_path / "m.gguf", "tokenizer.ggml.tokens")
    assert len(pieces) == size + 3
    assert pieces[0] == "<end>"
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.token_type")[:2] == [3, 1]
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.token_type")[-3:] == [5, 5, 5]
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.merges")[0] == "t h"
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.eos_token_id") == 0


def test_texts_that_begin_with_a_special_id_do_so_there_too(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    model = stateline.load("bundled-zh")
    folder = Path(stateline.__file__).parent / "bundled" / "chinese"
    stateline.save(model, tmp_path / "m.gguf", format="gguf", tokenizer=folder)
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.add_bos_token") is True
    write_tokenizer(tmp_path / "m.gguf", tmp_path)
    again, known = (stateline.generation.load_tokenizer(home, 6144) for home in (tmp_path, "bundled-zh"))
    assert (again.prefix, again.start, again.end) == (known.prefix, known.start, known.end) == ((0,), 0, 0)
    text = "春眠不覺曉，處處聞啼鳥。 spring 1, 2, 3\n"
    assert again.encode(text) == known.encode(text)
    stateline.save(model_of(vocab_size=300), tmp_path / "n.gguf", format="gguf", tokenizer=bpe(tmp_path))
    assert field(tmp_path / "n.gguf", "tokenizer.ggml.add_bos_token") is False


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    def save(model: stateline.LanguageModel, **options: Any) -> None:
        stateline.save(model, tmp_path / "m.gguf", format="gguf", **{"tokenizer": "none", **options})

    for options, what in (
        ({"d_intermediate": 32}, "d_intermediate is 32"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"expand": 3}}, "expand is 3"),
        ({"ssm_cfg": {"bias": True}}, "bias is True"),
    ):
        with pytest.raises(ValueError, match=f"llama.cpp cannot express this model: {what}"):
            save(model_of(**options))
    for change, what in (
        ({"bias": True}, "bias is True"),
        ({"d_ssm": 64}, "d_ssm is 64"),
        ({"D_has_hdim": True}, "D_has_hdim is True"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"norm_before_gate": True}, "norm_before_gate is True"),
        ({"norm_eps": 1e-3}, "the mixer's norm_eps is 0.001"),
        ({"dt_limit": (0.01, None)}, "dt_limit is"),
    ):
        with pytest.raises(ValueError, match=f"llama.cpp cannot express this model: {what}"):
            save(model_of(ssm_cfg=MAMBA2 | change))
    with pytest.raises(ValueError, match="layers of kind Attention, GGUF takes one of Mamba, Mamba2"):
        save(model_of(attn_layer_idx=[1], attn_cfg={"num_heads": 4}))
    with pytest.raises(ValueError, match="d_model is 40, Q4_0 keeps rows in blocks of 32"):
        save(model_of(d_model=40), dtype="Q4_0")
    with pytest.raises(ValueError, match="61 ids and no tokenizer was given"):
        save(model_of(), tokenizer=None)
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        save(model_of(), tokenizer=tmp_path)
    with pytest.raises(ValueError, match="They do not belong together"):
        save(model_of(), tokenizer=bpe(tmp_path))
    tokenizers = pytest.importorskip("tokenizers")
    spaced = bpe(tmp_path, pre=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(ValueError, match=r"cut as GPT-2's are.*none"):
        save(model_of(vocab_size=400), tokenizer=spaced)
    for dtype in ("Q5_K", torch.float64):
        with pytest.raises(ValueError, match="F32"):
            save(model_of(), dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype is 'Q8_0', expected a torch\.dtype"):
        stateline.save(model_of(), tmp_path / "d", dtype="Q8_0")
    with pytest.raises(ValueError, match="tokenizer was given for format='stateline'"):
        stateline.save(model_of(), tmp_path / "d", tokenizer=tmp_path)
    assert not (tmp_path / "m.gguf").exists()
    assert not (tmp_path / "d").exists()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stateline.save(model_of(), tmp_path / "m.gguf", format="gguf", tokenizer="none")
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match=r"save: .*m\.gguf could not be written.*disk full"):
        stateline.save(model_of(), tmp_path / "m.gguf", format="gguf", tokenizer="none")
    assert contents(tmp_path) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "b.gguf"
    assert main(["convert", "bundled", str(target), "--to", "gguf", "--dtype", "float16"]) == 0
    assert "b.gguf: gguf" in capsys.readouterr().out
    assert len(field(target, "tokenizer.ggml.tokens")) == 256
    assert main(["convert", "bundled", str(target), "--to", "gguf"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["convert", "bundled", str(target), "--to", "gguf", "--no-tokenizer", "--force"]) == 0
    assert field(target, "tokenizer.ggml.tokens") is None
    for wrong in (["--dtype", "Q4_0"], ["--no-tokenizer"]):
        assert main(["convert", "bundled", str(tmp_path / "d"), *wrong]) == 2
        assert "is for --to gguf" in capsys.readouterr().err


def test_the_command_reads_a_file_and_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bpe(tmp_path)
    tokenizer = stateline.generation.tokenizer.read_tokenizer(folder / "tokenizer.json")
    model = model_of(vocab_size=tokenizer.vocab_size + 3, ssm_cfg=MAMBA2)
    stateline.save(model, tmp_path / "m.gguf", format="gguf", tokenizer=folder)
    assert main(["info", str(tmp_path / "m.gguf"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["bytes on disk"]) == ("gguf", (tmp_path / "m.gguf").stat().st_size)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back")]) == 0
    again = stateline.generation.load_tokenizer(tmp_path / "back", model.config.vocab_size)
    text = "the other thing, né  then\n42's <end><end> of the"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.start, again.end, again.vocab_size) == (tokenizer.end, tokenizer.end, tokenizer.vocab_size)
    ids = torch.randint(60, (1, 7))
    with torch.no_grad():
        assert torch.equal(stateline.load(tmp_path / "back")(ids), stateline.load(tmp_path / "m.gguf")(ids))
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "n.gguf"), "--to", "gguf", "--dtype", "Q8_0"]) == 0
    (tmp_path / "named otherwise").write_bytes((tmp_path / "m.gguf").read_bytes())
    texts = []
    for source in ("m.gguf", "named otherwise", "back"):
        capsys.readouterr()
        assert main(["generate", "the", "--model", str(tmp_path / source), "--max-tokens", "9", "--greedy"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    name = "tokenizer.ggml.tokens"
    assert field(tmp_path / "n.gguf", name) == field(tmp_path / "m.gguf", name)
    data = (tmp_path / "m.gguf").read_bytes()
    data = data.replace(b"gpt-2", b"qwen2")
    (tmp_path / "q.gguf").write_bytes(data)
    assert main(["convert", str(tmp_path / "q.gguf"), str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "its vocabulary is gpt2 cut as qwen2" in error
    assert "--no-tokenizer` leaves it out" in error
    assert not (tmp_path / "other").exists()
    assert main(["convert", str(tmp_path / "q.gguf"), str(tmp_path / "other"), "--no-tokenizer"]) == 0
    assert not (tmp_path / "other" / "tokenizer.json").exists()


# ---- llama.cpp itself, which is built from source: with the other long tests -----------------------------------------


def logits(path: Path, ids: list[int]) -> np.ndarray:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `peers`) is not installed")
    reader = llama.Llama(str(path), n_ctx=256, verbose=False, logits_all=True)
    reader.eval(ids)
    return np.array(reader.scores[: len(ids)])


@pytest.mark.full
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ours.KINDS)
@pytest.mark.parametrize("name", [*CONFIGS, "Mamba2, expand 3"])
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str, kind: str, tie: bool) -> None:
    model = model_of(tie_embeddings=tie, ssm_cfg=CONFIGS.get(name, MAMBA2 | {"expand": 3}))
    stateline.save(model, tmp_path / "m.gguf", format="gguf", dtype=kind, tokenizer="none")
    stored = {name: gguf.quants.dequantize(t.data, t.tensor_type) for name, t in tensors(tmp_path / "m.gguf").items()}
    layer = ours._layer(model)
    with torch.no_grad():  # the weights that the file holds, so that only arithmetic is compared
        for name, values, is_matrix in ours._tensors(model, layer):
            if is_matrix:
                values.copy_(torch.from_numpy(stored[name].copy()))
        ids = torch.randint(61, (1, 40))
        wanted = model(ids)[0].numpy()
    worst = np.abs(logits(tmp_path / "m.gguf", ids[0].tolist()) - wanted).max() / np.abs(wanted).max()
    assert worst <= ACTIVATIONS[kind]


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_llama_cpp_quantised_is_read(tmp_path: Path, name: str) -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `peers`) is not installed")
    stateline.save(model_of(ssm_cfg=CONFIGS[name], d_model=256), tmp_path / "m.gguf", format="gguf", tokenizer="none")
    options = llama.llama_model_quantize_default_params()
    options.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
    paths = [str(tmp_path / f"{name}.gguf").encode() for name in "mq"]
    assert llama.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    assert "Q4_K" in {tensor.tensor_type.name for tensor in tensors(tmp_path / "q.gguf").values()}
    ids = torch.randint(61, (1, 40))
    wanted = stateline.load(tmp_path / "q.gguf")(ids)[0].numpy()
    worst = np.abs(logits(tmp_path / "q.gguf", ids[0].tolist()) - wanted).max() / np.abs(wanted).max()
    assert worst <= 5e-2  # activations in 8 bits for groups of 256


@pytest.mark.full
def test_llama_cpp_reads_the_vocabularies(tmp_path: Path) -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `peers`) is not installed")
    folder = bpe(tmp_path)
    tokenizer = stateline.generation.tokenizer.read_tokenizer(folder / "tokenizer.json")
    text = "the other thing, né  then\n42's <end"
    stateline.save(model_of(vocab_size=tokenizer.vocab_size + 1), tmp_path / "m.gguf", format="gguf", tokenizer=folder)
    stateline.save(model_of(vocab_size=256), tmp_path / "b.gguf", format="gguf")
    poems = stateline.generation.load_tokenizer("bundled-zh", 6144)
    home = Path(stateline.__file__).parent / "bundled" / "chinese"
    stateline.save(model_of(vocab_size=6144), tmp_path / "p.gguf", format="gguf", tokenizer=home)
    reader = llama.Llama(str(tmp_path / "p.gguf"), n_ctx=64, verbose=False)
    assert reader.tokenize("春眠".encode(), add_bos=True) == [0, *poems.encode("春眠")]
    for name, wanted in (("m", tokenizer.encode(text)), ("b", list(text.encode()))):
        reader = llama.Llama(str(tmp_path / f"{name}.gguf"), n_ctx=64, verbose=False)
        assert reader.tokenize(text.encode(), add_bos=False) == wanted
        assert reader.tokenize(text.encode(), add_bos=True) == wanted  # none is added
        assert reader.detokenize(wanted) == text.encode()
