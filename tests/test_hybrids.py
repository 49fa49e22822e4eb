"""Models with attention among their blocks: streams, batches and files treat them like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import edit, small

import stateline
import stateline.interop
from stateline import nn as sl
from stateline import state as states
from stateline.cli import main
from stateline.generation import SamplingConfig, Stream, generate_batch
from stateline.generation.decode import explain
from stateline.models import MIXERS, LanguageModel, ModelConfig
from stateline.training import TrainConfig, train

HEADS = {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4}
#: Attention that keeps everything up to a bound, and attention that goes on for ever.
KINDS: dict[str, dict[str, Any]] = {
    "bound": {**HEADS, "max_tokens": 300},
    "window": {**HEADS, "window": 7, "d_conv": 2},
}
SAMPLING = SamplingConfig(temperature=0.9, top_p=0.9, seed=3)


def hybrid(kind: str = "bound", **options: Any) -> LanguageModel:
    torch.manual_seed(2)
    model = small(n_layer=3, vocab_size=256, attn_layer_idx=[1], attn_cfg=KINDS[kind], d_intermediate=9, **options)
    with torch.no_grad():  # neither uniform nor certain, so that a slip in the state shows in the text
        model.backbone.embedding.weight.mul_(5)
    return model


def test_blocks_are_of_the_kinds_asked_for() -> None:
    model = hybrid()
    kinds = [type(block.mixer) for block in model.backbone.layers]
    assert kinds == [sl.Mamba, sl.Attention, sl.Mamba]
    assert all(block.mlp is not None for block in model.backbone.layers)
    assert [type(s) for s in model.init_state(1).layers] == [sl.MambaState, sl.AttentionState, sl.MambaState]
    everywhere = ModelConfig(d_model=8, n_layer=2, attn_layer_idx=(1, 0, 1), attn_cfg={"num_heads": 2})
    assert everywhere.attn_layer_idx == [0, 1]
    names = {n for n, _ in model.named_parameters() if ".layers.1.mixer." in n}
    assert {n.partition("mixer.")[2] for n in names} == {
        "in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer_idx": [2]}, "attn_layer_idx is 2, expected a whole number"),
        ({"attn_layer_idx": ["1"]}, "attn_layer_idx is '1'"),
        ({"attn_layer_idx": 1}, "attn_layer_idx is 1, expected"),
        ({"attn_layer_idx": [1]}, "attn_cfg has no num_heads"), ({"attn_cfg": HEADS}, "attn_layer_idx names no block"),
        ({"attn_layer_idx": [1], "attn_cfg": [4]}, r"attn_cfg is \[4\], expected a dict"),
        ({"attn_layer_idx": [1], "attn_cfg": {**HEADS, "heads": 2}}, "attn_cfg has unknown keys heads; Attention"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_configurations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^ModelConfig: .*{message}"):
        ModelConfig(d_model=20, n_layer=2, **options)
    with pytest.raises(ValueError, match="Attention: causal is False"):
        ModelConfig(d_model=20, n_layer=2, attn_layer_idx=[0], attn_cfg={"num_heads": 2, "causal": False})


def test_models_without_attention_are_described_as_before() -> None:
    """Their states and streams, saved with a digest of the configuration, stay readable."""
    assert not [key for key in ModelConfig().to_dict() if key.startswith("attn")]
    config = hybrid().config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_any_mixer_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(sl.Attention):
        def __init__(self, d_model: int, window: int, **made: Any) -> None:
            super().__init__(d_model, 1, window=window, **made)

    monkeypatch.setitem(MIXERS, "Mean", Mean)
    model = LanguageModel(ModelConfig(d_model=8, n_layer=2, vocab_size=9, ssm_cfg={"layer": "Mean", "window": 3}))
    assert [type(block.mixer) for block in model.backbone.layers] == [Mean, Mean]
    with pytest.raises(ValueError, match=r"'Median', expected one of 'Mamba1'.*'Mean'"):
        ModelConfig(ssm_cfg={"layer": "Median"})


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_saved_forked_and_rolled_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = hybrid(kind)
    stream = Stream(model, sampling=SAMPLING, rollback=30, chunk=16)
    stream.feed("My fellow citizens, we meet today")
    ids = [t.id for t in stream.tokens(20)]
    stream.save(tmp_path / "stream")
    fork = stream.fork()
    rest = [t.id for t in stream.tokens(20)]
    assert [t.id for t in fork.tokens(20)] == rest
    stream.rollback(27)
    assert [t.id for t in stream.tokens(27)] == (ids + rest)[-27:]
    assert [t.id for t in Stream.load(tmp_path / "stream", model).tokens(20)] == rest
    uncut = Stream(model, sampling=SAMPLING)
    uncut.feed("My fellow citizens, we meet today")
    assert [t.id for t in uncut.tokens(40)] == ids + rest


@pytest.mark.full
def test_a_saved_stream_goes_on_in_another_process(tmp_path: Path) -> None:
    model = hybrid("window")
    stateline.save(model, tmp_path / "model")
    stream = Stream(model, sampling=SAMPLING)
    stream.feed("once")
    list(stream.tokens(12))
    stream.save(tmp_path / "stream")
    code = (
        "import sys, stateline; from stateline.generation import Stream\n"
        "stream = Stream.load(sys.argv[2], stateline.load(sys.argv[1]))\n"
        "print([t.id for t in stream.tokens(15)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "stream")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [t.id for t in stream.tokens(15)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_write_what_each_prompt_gets_alone(kind: str) -> None:
    model, prompts = hybrid(kind), ["a", "", "a much longer prompt than the others", "bcd"]
    texts = generate_batch(model, prompts, max_tokens=20, sampling=SAMPLING, chunk=24)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        own = SamplingConfig(temperature=0.9, top_p=0.9, seed=3 + i)
        assert text == "".join(stateline.generate(model, prompt, max_tokens=20, sampling=own))


@pytest.mark.parametrize("kind", KINDS)
def test_step_many_takes_in_what_is_committed(kind: str) -> None:
    model = hybrid(kind)
    ids = torch.randint(256, (2, 12))
    _, state = model.extend(ids[:, :5], model.init_state(2))
    logits = model.step_many(ids[:, 5:], state, torch.tensor([3, 0]))
    torch.testing.assert_close(logits, model(ids)[:, 5:], rtol=1e-4, atol=1e-4)
    assert state.layers[1].position.tolist() == [8, 5]
    after = model.step_(ids[0, 8:9], states.index(state, 0))
    torch.testing.assert_close(after, model(ids[:1])[:, 8], rtol=1e-4, atol=1e-4)


def test_the_bound_is_the_models_to_set(tmp_path: Path) -> None:
    model = small(vocab_size=256, attn_layer_idx=[0], attn_cfg=HEADS)
    with pytest.raises(ValueError, match=r"nothing says how many may come.*model\.max_tokens = 8192"):
        next(stateline.generate(model, "My", max_tokens=3))
    model.max_tokens = 8
    assert len(list(Stream(model).tokens(8))) == 8  # the last is drawn, not read; a newline came first
    stream = Stream(model)
    with pytest.raises(ValueError, match="becomes 9 tokens long, its state has room for 8"):
        list(stream.tokens(100))
    assert stream.length == 9
    stream.save(tmp_path / "full")  # whole: no layer took the token that another refused
    assert all(s.position.tolist() == [8] for s in stream.state.layers[:1])
    model.max_tokens = 12
    with pytest.raises(ValueError, match=r"^Stream\.load: .*\(8, .*the model's state is float32 \(12, .*max_tokens"):
        Stream.load(tmp_path / "full", model)
    model.max_tokens = None
    with pytest.raises(ValueError, match=r"^Attention: .*nothing says how many may come"):
        Stream.load(tmp_path / "full", model)
    assert model.init_state(1, max_tokens=5).layers[0].keys.shape[1] == 5


def test_convert_takes_the_bound_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stateline.save(small(vocab_size=256, attn_layer_idx=[0], attn_cfg=HEADS), tmp_path / "m")
    command = ["convert", str(tmp_path / "m"), str(tmp_path / "m.pt2"), "--to", "export"]
    assert main(command) == 2
    assert "--room" in capsys.readouterr().err
    assert main([*command, "--room", "5"]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "n"), "--room", "5"]) == 2
    assert "--room is for --to export and onnx" in capsys.readouterr().err


def test_states_of_different_room_are_not_stacked() -> None:
    model = hybrid()
    with pytest.raises(ValueError, match=r"^state\.stack: .*\(5, 2, 5\) and \(7, 2, 5\).*the same max_tokens"):
        states.stack([model.init_state(1, max_tokens=n) for n in (7, 5)])


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_models_step_layer_by_layer_and_say_why(kind: str) -> None:
    model = hybrid(kind)
    packed = stateline.prepare_for_decode(model, "int8")
    assert packed.token_step is None
    reason = explain(packed)
    assert reason is not None
    assert "Attention" in reason or "native" in reason
    ids = torch.randint(256, (2, 9))
    exact = model(ids)
    state = packed.init_state(2)
    logits = torch.stack([packed.step_(ids[:, i], state) for i in range(9)], 1)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@torch.no_grad()
def test_packed_hybrids_keep_the_law(weights: str, layer: str) -> None:
    """With an MLP after each mixer, and one inside attention beside a convolution."""
    ssm = {"layer": layer, "d_state": 5} | ({"headdim": 8} if layer == "Mamba2" else {})
    inner = {**HEADS, "mlp_dim": 9, "d_conv": 3, "max_tokens": 12}
    model = small(
        d_model=32, n_layer=3, vocab_size=256, d_intermediate=9, ssm_cfg=ssm, attn_layer_idx=[1], attn_cfg=inner
    )
    packed = stateline.prepare_for_decode(model, weights)
    kinds = {name.rpartition(".")[2] for name, m in packed.named_modules() if isinstance(m, sl.PackedLinear)}
    assert {"in_proj", "out_proj", "fc1", "fc2", "lm_head"} <= kinds
    ids = torch.randint(256, (2, 12))
    whole = packed(ids)
    first, state = packed.extend(ids[:, :5], packed.init_state(2))
    rest = torch.stack([packed.step_(ids[:, i], state) for i in range(5, 12)], 1)
    got = torch.cat([first, rest], 1)
    got = torch.cat([first, rest], 1)
    assert (got - whole).abs().max() < 1e-3 * whole.abs().max()  # products round x to 16 bits a row
    if weights != "int4":  # which loses much of so small a model
        assert (whole - model(ids)).abs().max() < 0.05 * whole.abs().max()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_our_format_keeps_everything(kind: str, tied: bool, tmp_path: Path) -> None:
    model, ids = hybrid(kind, tie_embeddings=tied), torch.randint(256, (2, 9))
    stateline.save(model, tmp_path / "a")
    again = stateline.load(tmp_path / "a")
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))
    stateline.save(again, tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    _, state = model.extend(ids, model.init_state(2), lengths=[9, 4])
    states.save(state, tmp_path / "state", model)
    loaded = states.load(tmp_path / "state", again)
    assert loaded.layers[1].position.tolist() == [9, 4]
    assert torch.equal(again.step_(ids[:, 0], loaded), model.step_(ids[:, 0], state))


def test_mamba_ssms_format_both_ways(tmp_path: Path) -> None:
    """Its files do not say how many tokens a state has room for; its attention has no window."""
    model, ids = hybrid(), torch.randint(256, (2, 9))
    stateline.save(model, tmp_path, "mamba_ssm")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["attn_layer_idx"] == [1]
    assert written["attn_cfg"] == {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "causal": True}
    again = stateline.load(tmp_path)
    assert torch.equal(again(ids), model(ids))
    with pytest.raises(ValueError, match="nothing says how many"):
        again.init_state(1)
    edit(tmp_path / "config.json", attn_cfg={**written["attn_cfg"], "causal": False})
    with pytest.raises(stateline.interop.CheckpointError, match="attn_cfg is not causal"):
        stateline.load(tmp_path)
    with pytest.raises(ValueError, match="window of 7 tokens, mamba_ssm's has none"):
        stateline.save(hybrid("window"), tmp_path / "other", "mamba_ssm")
    assert not (tmp_path / "other").exists()


def test_transformers_mamba_has_no_attention(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers cannot.*attn_layer_idx is \[1\] \(no attention there\)"):
        stateline.save(hybrid(), tmp_path / "hf", "huggingface")


def test_the_command_line_describes_and_runs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unbound = small(vocab_size=256, attn_layer_idx=[0], attn_cfg=HEADS)
    stateline.save(unbound, tmp_path / "unbound")
    assert main(["info", str(tmp_path / "unbound"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["state bytes per sequence"]
    sizes = [states.num_bytes(unbound.init_state(1, max_tokens=n)) for n in (1, 10)]
    assert said == f"{sizes[0] - (sizes[1] - sizes[0]) // 9:,} and {(sizes[1] - sizes[0]) // 9:,} a token"
    assert main(["generate", "My", "--model", str(tmp_path / "unbound"), "--max-tokens", "4"]) != 0
    assert "--room" in capsys.readouterr().err
    command = ["generate", "My", "--model", str(tmp_path / "unbound"), "--max-tokens", "4", "--room", "10"]
    assert main(command) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_training_makes_them(packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Round and round the rugged rock the ragged rascal ran.\n\n" * 60)
    shape = ["--d-model", "24", "--n-layer", "4", "--attention-every", "2", "--attention-window", "8"]
    run = ["--out", str(tmp_path / "run"), "--context", "24", "--batch-size", "2", "--progress", "off"]
    data = ["--packing", packing, "--document-separator", "\n\n", "--eval-every", "2", "--sample-every", "0"]
    assert main(["train", str(text), "--steps", "2", *shape, *run, *data]) == 0
    assert main(["train", str(text), "--steps", "4", "--resume", *run, *data]) == 0
    model = stateline.load(tmp_path / "run")
    assert model.config.attn_layer_idx == [1, 3]
    assert model.config.attn_cfg["window"] == 8
    capsys.readouterr()
    assert main(["generate", "Round", "--model", str(tmp_path / "run"), "--max-tokens", "30"]) == 0
    unbound = small(vocab_size=256, attn_layer_idx=[0], attn_cfg=HEADS)
    with pytest.raises(ValueError, match="attention has no window, and validation and samples read texts"):
        train(TrainConfig.of(path=str(text), out=str(tmp_path / "other"), steps=1, progress="off"), model=unbound)
    assert not (tmp_path / "other").exists()
    for mode in ("document", "sliding"):
        given = ["--context", "32", "--stride", "16"] if mode == "sliding" else []
        assert main(["eval", str(tmp_path / "run"), str(text), "--limit", "500", "--mode", mode, *given]) == 0
