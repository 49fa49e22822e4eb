"""Checkpoints: ours, mamba_ssm's and Hugging Face's, written, read, damaged, cut short and mistaken for each other."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import FORMATS, contents, edit, ids, small
from safetensors.torch import load_file, save_file

import stateline
from stateline.files import bundled
from stateline.generation import SamplingConfig, load_tokenizer
from stateline.generation.decode import explain
from stateline.interop import CheckpointError, detect
from stateline.models import checkpoint
from stateline.nn.precision import full_precision_names
from stateline.training import bits_per_byte

try:
    import transformers
except ImportError:  # the `hf` extra
    if os.environ.get("CI"):
        raise
    transformers = None

needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers (extra `hf`) is not installed")


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"tie_embeddings": False}, {"residual_in_fp32": False},
        {"ssm_cfg": {"layer": "Mamba2", "d_state": 3, "headdim": 5, "ngroups": 2, "dt_limit": (0.01, 0.5)}},
        {"ssm_cfg": {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 7, "bias": True, "conv_bias": False}},
    ],
    ids=str,
)  # fmt: skip
def test_round_trip_keeps_every_bit(tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    model, x = small(**options), ids()
    stateline.save(model, tmp_path / "m", format)
    assert detect(tmp_path / "m") == format
    again = stateline.load(tmp_path / "m")
    assert not again.training
    assert torch.equal(again(x), model(x))
    if format != "huggingface":  # which leaves out the rows that pad the vocabulary
        assert list(again.state_dict()) == list(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    tied = again.lm_head.weight is again.backbone.embedding.weight
    assert tied == model.config.tie_embeddings


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("sharded", [False, True])
def test_saving_leaves_no_older_weights_for_a_loader_to_prefer(tmp_path: Path, format: str, sharded: bool) -> None:
    stateline.save(small(), tmp_path, format)
    kept = {p.name for p in tmp_path.iterdir()}
    tensors, embedding = small().state_dict(), "backbone.embedding.weight"
    tensors["backbone.embeddings.weight" if format == "huggingface" else embedding] = tensors.pop(embedding)
    for name in ("model.safetensors", "pytorch_model.bin"):
        stem, end = name.split(".")
        file = f"{stem}-00001-of-00001.{end}" if sharded else name
        store: Any = torch.save if end == "bin" else save_file
        store({key: t.clone() for key, t in tensors.items()}, tmp_path / file)
        if sharded:
            (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    (tmp_path / "model.of.mine.safetensors").write_bytes(b"not of this checkpoint")
    model, x = small(), ids()
    stateline.save(model, tmp_path, format)
    assert torch.equal(stateline.load(tmp_path)(x), model(x))
    assert {p.name for p in tmp_path.iterdir()} == kept | {"model.of.mine.safetensors"}


def test_every_option_survives_in_our_format_and_mamba_ssms(tmp_path: Path) -> None:
    model, x = small(d_intermediate=40, rms_norm=False, residual_in_fp32=False, pad_vocab_size_multiple=16), ids()
    for format in FORMATS[:2]:
        stateline.save(model, tmp_path / format, format)
        again = stateline.load(tmp_path / format)
        assert again.config == model.config
        assert torch.equal(again(x), model(x))
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("format", FORMATS)
def test_storage_in_16_bits_rounds_all_but_time_constants(tmp_path: Path, format: str) -> None:
    model = small()
    stateline.save(model, tmp_path / "full", format)
    stateline.save(model, tmp_path / "half", format, dtype=torch.bfloat16)
    again = stateline.load(tmp_path / "half", dtype=torch.float32)
    exact = full_precision_names(model)
    rows = model.config.vocab_size
    for name, tensor in model.named_parameters():
        want = tensor if name in exact else tensor.bfloat16().float()
        assert torch.equal(again.get_parameter(name)[:rows], want[:rows]), name
    back = stateline.load(tmp_path / "half")
    assert back.backbone.embedding.weight.dtype == (torch.float32 if format == "stateline" else torch.bfloat16)
    narrow = stateline.load(tmp_path / "full", dtype=torch.bfloat16)
    assert {narrow.get_parameter(n).dtype for n in exact} == {torch.float32}
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    size = [sum(len(b) for b in contents(tmp_path / name).values()) for name in ("half", "full")]
    assert size[0] < 0.75 * size[1]


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def random_hf(**options: Any) -> Any:
    config = {"hidden_size": 20, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, **options}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


HF_OPTIONS = [
    {},
    {"tie_word_embeddings": False},
    {"hidden_size": 33, "state_size": 1, "conv_kernel": 3, "expand": 1, "time_step_rank": 5, "vocab_size": 67},
    {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-3, "num_hidden_layers": 1},
    {"residual_in_fp32": False, "state_size": 17, "expand": 3, "conv_kernel": 2},
]


@needs_transformers
@pytest.mark.parametrize("options", HF_OPTIONS, ids=str)
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    """Both ways, on random weights and odd sizes; reading, writing and reading again keeps every weight."""
    theirs, x = random_hf(**options), ids()
    theirs.save_pretrained(tmp_path / "a")
    ours = stateline.load(tmp_path / "a")
    with torch.no_grad():
        want = theirs(x).logits
        assert (ours(x) - want).abs().max() < 1e-4
        _, state = ours.extend(x[:, :4], ours.init_state(2))
        assert (ours.extend(x[:, 4:], state)[0] - want[:, 4:]).abs().max() < 1e-4
        stateline.save(ours, tmp_path / "b", "huggingface")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert type(back).__name__ == "MambaForCausalLM"
        assert torch.equal(back(x).logits, want)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    for key, value in theirs.config.to_dict().items():
        if key in json.loads((tmp_path / "b" / "config.json").read_text()):
            assert back.config.to_dict()[key] == value or key.endswith("token_id"), key


@needs_transformers
@pytest.mark.parametrize("inner", [None, 30])
def test_falcon_mamba_both_ways(tmp_path: Path, inner: int | None) -> None:
    """Its file may say an expand that is not the inner width over the model's; the inner width counts."""
    config = transformers.FalconMambaConfig(
        hidden_size=20, num_hidden_layers=2, vocab_size=61, state_size=5, mixer_rms_eps=1e-3, tie_word_embeddings=False,
        **({} if inner is None else {"intermediate_size": inner, "expand": 16}),
    )  # fmt: skip
    theirs, x = transformers.FalconMambaForCausalLM(config).eval(), ids()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        theirs.save_pretrained(tmp_path / "a")
        ours, want = stateline.load(tmp_path / "a"), theirs(x).logits
        assert ours.config.ssm_cfg["b_c_dt_rms_eps"] == 1e-3
        assert ours.backbone.layers[0].mixer.d_inner == (inner or 40)
        assert (ours(x) - want).abs().max() < 1e-4
        _, state = ours.extend(x[:, :4], ours.init_state(2))
        assert (ours.step_(x[:, 4], state) - want[:, 4]).abs().max() < 1e-4
        packed = stateline.prepare_for_decode(ours, "bf16")
        assert "normalises dt, B and C" in str(explain(packed))
        assert (packed(x) - want).abs().max() < 0.05 * want.abs().max()
        if inner is None:
            stateline.save(ours, tmp_path / "b", "huggingface")
            back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
            assert type(back) is type(theirs)
            assert torch.equal(back(x).logits, want)
        else:
            with pytest.raises(ValueError, match=r"expand is 1.5 \(whole numbers only there\)"):
                stateline.save(ours, tmp_path / "b", "huggingface")
    with pytest.raises(ValueError, match=r"b_c_dt_rms_eps is set, mamba_ssm's Mamba does not"):
        stateline.save(ours, tmp_path / "c", "mamba_ssm")


@needs_transformers
def test_a_padded_vocabulary_loses_its_padding_in_transformers(tmp_path: Path) -> None:
    for tie in (True, False):
        ours, x = small(tie_embeddings=tie), ids()
        stateline.save(ours, tmp_path / str(tie), "huggingface")
        theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / str(tie))
        assert theirs.config.vocab_size == 61
        with torch.no_grad():
            assert (theirs(x).logits - ours(x)).abs().max() < 1e-4


@needs_transformers
def test_token_ids_survive_the_trip(tmp_path: Path) -> None:
    random_hf(bos_token_id=3, eos_token_id=4, pad_token_id=5).save_pretrained(tmp_path / "a")
    stateline.save(stateline.load(tmp_path / "a"), tmp_path / "b", "huggingface")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert [written[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")] == [3, 4, 5]


@needs_transformers
def test_sharded_checkpoints_are_read_and_checked(tmp_path: Path) -> None:
    theirs, x = random_hf(), ids()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists()
    with torch.no_grad():
        assert (stateline.load(tmp_path)(x) - theirs(x).logits).abs().max() < 1e-4
    good = index.read_text()
    edit(index, weight_map={**json.loads(good)["weight_map"], "x": "../model.safetensors"})
    with pytest.raises(CheckpointError, match=r"names '../model.safetensors', expected a file beside it"):
        stateline.load(tmp_path)
    first = sorted(json.loads(good)["weight_map"].values())[0]
    edit(index, weight_map={**json.loads(good)["weight_map"], "lost": first, "x": None})
    index.write_text(index.read_text().replace('"x": null, ', "").replace(', "x": null', ""))
    with pytest.raises(CheckpointError, match="lists lost, which no shard holds"):
        stateline.load(tmp_path)
    index.write_text(good)
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} is missing"):
        stateline.load(tmp_path)


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"d_intermediate": 8}, "d_intermediate is 8"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"expand": 1.5}}, "expand is 1.5"),
    ):
        with pytest.raises(ValueError, match=rf"transformers cannot express this model: {message}"):
            stateline.save(small(**options), tmp_path / "m", "huggingface")
        assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match=r"norm_eps is 0.001, mamba_ssm has only"):
        stateline.save(small(norm_eps=1e-3), tmp_path / "m", "mamba_ssm")
    with pytest.raises(ValueError, match="format is 'keras', expected one of 'stateline'"):
        stateline.save(small(), tmp_path / "m", "keras")


@pytest.mark.parametrize("kind", ["bamba", "llama", "jamba"])
def test_other_hugging_face_models_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    stateline.save(small(), tmp_path, "huggingface")
    edit(tmp_path / "config.json", model_type=kind)
    with pytest.raises(
        CheckpointError, match=f"model_type '{kind}'; of Hugging Face's, these are supported: 'mamba', 'mamba2', 'mamb"
    ):
        stateline.load(tmp_path)


def test_hugging_face_configurations_that_contradict_themselves(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path, "huggingface")
    edit(tmp_path / "config.json", intermediate_size=41)
    with pytest.raises(CheckpointError, match="intermediate_size is 41, expand · hidden_size is 40"):
        stateline.load(tmp_path)
    edit(tmp_path / "config.json", intermediate_size=40, hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu'"):
        stateline.load(tmp_path)
    edit(tmp_path / "config.json", hidden_act="silu", state_size=-3)
    with pytest.raises(CheckpointError, match=r"config.json describes a model that is not supported.*d_state is -3"):
        stateline.load(tmp_path)


# ---- mamba_ssm -------------------------------------------------------------------------------------------------------


def test_old_files_of_mamba_ssm_lack_keys(tmp_path: Path) -> None:
    """As in state-spaces/mamba-130m: five keys, and the head stored beside the embedding it is tied to."""
    model, x = small(ssm_cfg={}), ids()
    stateline.save(model, tmp_path, "mamba_ssm")
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embedding.weight"])
    assert stored["lm_head.weight"].shape == (64, 20)
    written = json.loads((tmp_path / "config.json").read_text())
    keys = ("d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32")
    old = {key: written[key] for key in keys} | {"fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert torch.equal(stateline.load(tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [1]}, "attn_cfg is not causal"),
        ({"attn_layer_idx": [1], "attn_cfg": {"causal": True}}, "attn_cfg has no num_heads"),
        ({"attn_layer_idx": [2], "attn_cfg": {"causal": True, "num_heads": 4}}, "attn_layer_idx is 2"),
        ({"attn_layer_idx": [1], "attn_cfg": {"causal": True, "window": 4}}, "attn_cfg has unknown keys window"),
        ({"attn_layer_idx": [1], "attn_cfg": {"causal": True, "num_heads": 4, "heads": 4}}, "attn_cfg has unknown"),
        ({"attn_layer_idx": [1], "attn_cfg": {"causal": True, "num_heads": 4}}, "missing: backbone.layers.1.mixer"),
        ({"ssm_cfg": {"layer": "Mamba4"}}, "'Mamba4', expected one of"),
        ({"n_head": 3}, "unknown keys n_head"), ({"vocab_size": None}, "lacks vocab_size"),
        ({"ssm_cfg": {"d_stat": 3}}, "unknown keys d_stat"), ({"d_model": "20"}, "d_model is '20'"),
    ],
    ids=str,
)  # fmt: skip
def test_mamba_ssm_configurations_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    stateline.save(small(), tmp_path, "mamba_ssm")
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        stateline.load(tmp_path)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path, "mamba_ssm")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for content in ({"x": Evil()}, Evil()):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="holds Python objects besides tensors, which are not run"):
            stateline.load(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged"):
            stateline.load(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds something else than named tensors"):
        stateline.load(tmp_path)


# ---- what is damaged, foreign or does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_weights_are_named(tmp_path: Path, format: str) -> None:
    stateline.save(small(), tmp_path, format)
    path = next(p for p in tmp_path.iterdir() if p.name != "config.json")
    whole = path.read_bytes()
    for broken in (b"", b"garbage" * 99, whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged.* (again|alone)\."):
            stateline.load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"(missing|no weights).*Copy the whole directory"):
        stateline.load(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_every_misfit_is_listed_at_once(tmp_path: Path, format: str) -> None:
    stateline.save(small(), tmp_path, format)
    path = next(p for p in tmp_path.iterdir() if p.name != "config.json")
    binary = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if binary else load_file(path)
    tensors.pop("backbone.norm_f.weight")
    tensors["backbone.layers.0.mixer.D"] = torch.ones(3)
    tensors["backbone.layers.1.mixer.A_log"] = torch.ones(40, 5, dtype=torch.int32)
    tensors["backbone.layers.7.norm.weight"] = torch.ones(20)
    torch.save(tensors, path) if binary else save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        stateline.load(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    for part in (
        "missing: backbone.norm_f.weight (20,)", "unexpected: backbone.layers.7.norm.weight (20,)",
        "wrong shape: backbone.layers.0.mixer.D is (3,), expected (40,)",
        "wrong dtype: backbone.layers.1.mixer.A_log is torch.int32",
    ):  # fmt: skip
        assert part in message
    assert message.count("\n") == 4


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    stateline.save(small(tie_embeddings=False), tmp_path, "mamba_ssm")
    edit(tmp_path / "config.json", tie_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding. Set it to false"):
        stateline.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"), ("", "cannot be read"), ("[]", "holds a list"), ("\udcff", "cannot be read"),
        ("{}", "no known format: it has nothing"), ('{"hidden_size": 4}', "no known format: it has hidden_size"),
        ('{"d_model": 4}', "no known format"),
    ],
)  # fmt: skip
def test_configurations_of_no_known_format(tmp_path: Path, text: str, message: str) -> None:
    stateline.save(small(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"config.json .*{message}"):
        stateline.load(tmp_path)


def test_our_weights_alone_are_a_whole_checkpoint(tmp_path: Path) -> None:
    """A kill between the renames of a first save leaves them without their config.json."""
    model = small()
    stateline.save(model, tmp_path)
    (tmp_path / "config.json").unlink()
    again = stateline.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.backbone.embedding.weight, model.backbone.embedding.weight)


def test_paths_are_not_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere/at/all is no directory\.$"):
        stateline.load("nowhere/at/all")
    stateline.save(small(), "m")
    with pytest.raises(CheckpointError, match=r"config.json is a file. Give the directory"):
        stateline.load("m/config.json")
    with pytest.raises(CheckpointError, match=r"m/model is no directory\.$"):
        stateline.load("m/model")  # reads as a name too, but the folder is here
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no model: there is no config\.json"):
        stateline.load("empty")
    for wrong in (3, None):
        with pytest.raises(TypeError, match=f"^load: {wrong} is no path and no name"):
            stateline.load(wrong)  # type: ignore[arg-type]  # no path


def test_a_model_of_another_format_is_not_overwritten(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path, "huggingface")
    before = contents(tmp_path)
    for save in (stateline.save, checkpoint.save):
        with pytest.raises(ValueError, match=r"holds a.* Choose another directory"):
            save(small(), tmp_path)
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        stateline.save(small(), tmp_path / "config.json")
    assert contents(tmp_path) == before


def test_bundled_is_a_name_not_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.resources

    stateline.save(small(), tmp_path / "bundled" / "model")
    stateline.save(small(n_layer=1), tmp_path / "bundled" / "chinese")
    monkeypatch.chdir(tmp_path)  # where a folder has the name
    with monkeypatch.context() as patch:
        patch.setattr(importlib.resources, "files", lambda package: tmp_path)
        assert stateline.load("bundled").config.n_layer == 2
        assert stateline.load("bundled-zh").config.n_layer == 1
        patch.setattr(importlib.resources, "files", lambda package: tmp_path / "none")
        for name in ("bundled", "bundled-zh"):
            with pytest.raises(CheckpointError, match=f"no {name} model. Reinstall"):
                stateline.load(name)
    with pytest.raises(
        CheckpointError, match=r'bundled-cn is no directory. Models that ship: "bundled" or "bundled-zh"'
    ):
        stateline.load("bundled-cn")


def test_the_bundled_models_are_what_their_cards_say() -> None:
    """Small enough to ship, and able to predict text they have not seen."""
    poem = "聖主覃恩徧九垓，碧油紅旆出關來。鄉中父老如相問，十五年前趙秀才。"  # of the test
    speech = "Tonight, I want to speak about the choices before our Nation. "
    for name, text, worst in (("bundled", speech, 2.5), ("bundled-zh", poem, 3.0)):
        folder = bundled(name)
        assert folder is not None
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
        model = stateline.load(name)
        assert f"{model.num_parameters():,}" in (folder / "README.md").read_text(encoding="utf-8")
        bits = bits_per_byte(model, text, tokenizer=load_tokenizer(name, model.config.vocab_size))
        assert bits is not None
        assert bits < worst, name


def test_a_poem_begins_and_ends() -> None:
    """The tokenizer puts the end-of-text id before a prompt, as training did, and the model ends what it writes."""
    model = stateline.load("bundled-zh")
    tokenizer = load_tokenizer("bundled-zh", model.config.vocab_size)
    assert tokenizer.prefix == (tokenizer.end,)
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
    text = "春" + "".join(stateline.generate(model, "春", tokenizer=tokenizer, max_tokens=300, sampling=sampling))
    lines = text.rstrip("。").replace("，", "。").split("。")
    assert len(lines) >= 4
    assert len({len(line) for line in lines}) == 1, text
