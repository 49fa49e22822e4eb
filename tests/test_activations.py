"""Activation checkpointing: the same bits from less memory; dropout; bfloat16, which learns as float32 does."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline.models import LanguageModel, ModelConfig
from stateline.training import TrainConfig, bits_per_byte, train


def small(**options: Any) -> LanguageModel:
    shape = {"d_model": 32, "n_layer": 3, "vocab_size": 256, "ssm_cfg": {"d_state": 4}, **options}
    return LanguageModel(ModelConfig(**shape))


def results(model: LanguageModel, ids: Tensor, **where: Any) -> list[Tensor]:
    """The loss and every gradient, and those through a state that `extend` carries."""
    model.zero_grad()
    loss = model.loss(ids, ids, **where)
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    if not where:
        model.zero_grad()
        _, state = model.extend(ids[:, :7])
        logits, _ = model.extend(ids[:, 7:], state)
        logits.square().mean().backward()
        found += [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("options", [{}, {"d_intermediate": 48, "rms_norm": False, "tie_embeddings": False}])
@pytest.mark.parametrize(
    "where", [{}, {"lengths": [19, 0, 7]}, {"cu_seqlens": torch.tensor([0, 11, 11, 57], dtype=torch.int32)}]
)
def test_bits_are_the_same(options: dict[str, Any], where: dict[str, Any]) -> None:
    model = small(**options)
    ids = torch.randint(256, (1, 57) if "cu_seqlens" in where else (3, 19))
    plain = results(model, ids, **where)
    model.backbone.checkpoint_activations = True
    again = results(model, ids, **where)
    assert len(plain) == len(again) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    "mixer",
    [
        {"layer": "Mamba2", "headdim": 8}, {"layer": "Mamba3", "headdim": 8},
        {"layer": "Mamba3", "headdim": 8, "is_mimo": True, "mimo_rank": 2}, {"layer": "S4D", "mode": "scan"},
        {"layer": "S4D", "mode": "convolution"}, {"layer": "S4", "mode": "convolution"},
        {"layer": "S4", "mode": "scan"}, {"layer": "S5"}, {"layer": "GatedSSM"},
    ],
    ids=str,
)  # fmt: skip
def test_bits_are_the_same_of_every_mixer(mixer: dict[str, Any]) -> None:
    """What a backward pass has saved is read once, for it is there once."""
    attention = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "window": 5}}
    model, ids = small(n_layer=2, ssm_cfg=mixer, **attention), torch.randint(256, (2, 19))
    plain = results(model, ids)
    model.backbone.checkpoint_activations = True
    again = results(model, ids)
    assert len(plain) == len(again) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_blocks_run_twice_and_keep_less() -> None:
    """Counted: each block's forward once more per backward pass, and the bytes that autograd holds meanwhile."""
    model, calls = small(n_layer=4), []
    ids = torch.randint(256, (1, 64))
    for block in model.backbone.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    held: dict[bool, int] = {}
    for on in (False, True):
        model.backbone.checkpoint_activations = on
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(ids, ids)
        held[on] = sum(kept.values())
        loss.backward()
        assert len(calls) == 4 * (1 + on)
    assert held[True] < held[False] / 2
    with torch.no_grad():
        calls.clear()
        model.loss(ids, ids)
        assert len(calls) == 4, "nothing to compute again without gradients"


def test_compiles_into_one_graph() -> None:
    model = small(n_layer=2)
    ids = torch.randint(256, (2, 9))
    plain = results(model, ids)
    model.backbone.checkpoint_activations = True
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(ids, ids)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for got, wanted in zip(found, plain, strict=False):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_dropout_thins_what_blocks_add_and_only_in_training() -> None:
    """Of ones that every block writes, a share 1 - p is kept, as 1 / (1 - p); evaluation knows nothing of it."""
    model = small(n_layer=2, d_model=64)
    ids = torch.randint(256, (4, 100))
    plain = model.eval()(ids)
    model.backbone.dropout = 0.25
    assert torch.equal(model(ids), plain)
    written: list[Tensor] = []
    model.backbone.norm_f.register_forward_pre_hook(lambda _, given: written.append(given[0]))
    model.train()
    model.extend(ids)
    for block in model.backbone.layers:
        block.register_forward_hook(lambda *_: (torch.ones(4, 100, 64), torch.zeros(4, 100, 64)))
    model.loss(ids, ids)
    model.loss(ids, ids)
    for found in written:
        assert (found != 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(written[1][written[1] != 0], torch.tensor(1 / 0.75))
    assert not torch.equal(written[1], written[2])


@pytest.mark.parametrize(("own", "asked"), [(0.0, 0.2), (0.2, 0.2), (0.3, 0.0), (0.3, 0.2)])
def test_dropout_of_a_given_model_is_kept_or_refused(own: float, asked: float, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"To be, or not to be: that is the question. " * 40)
    model, seen = small(n_layer=1), set()
    model.backbone.dropout = own
    model.backbone.layers[0].register_forward_pre_hook(
        lambda *_: seen.add(model.backbone.dropout) if model.training else None
    )
    config = TrainConfig.of(
        path=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), steps=1, context=32, batch_size=1, eval_bytes=200,
        dropout=asked, progress="off",
    )  # fmt: skip
    if own not in (0.0, asked):
        with pytest.raises(ValueError, match=f"model.backbone.dropout is {own:g}, the settings' dropout is {asked:g}"):
            train(config, model=model)
        assert not (tmp_path / "run").exists()
    else:
        train(config, model=model)
        assert seen == {asked}
    assert model.backbone.dropout == own


def test_dropout_learns_less_by_heart(tmp_path: Path) -> None:
    """A short text many times over: the gap between what is learnt and what is held out shrinks."""
    text = (Path(str(files("stateline") / "bundled" / "excerpt")) / "train.txt").read_bytes()
    (tmp_path / "text.txt").write_bytes(text[:3000])
    (tmp_path / "val.txt").write_bytes(text[3000:6000])
    gaps = []
    for dropout in (0.0, 0.3):
        run = train(
            TrainConfig.of(
                path=str(tmp_path / "text.txt"),
                val=str(tmp_path / "val.txt"),
                out=str(tmp_path / f"{dropout}"),
                steps=120,
                d_model=32,
                n_layer=2,
                d_state=4,
                context=64,
                batch_size=16,
                lr=1e-2,
                dropout=dropout,
                sample_every=0,
                eval_every=0,
                progress="off",
            )
        )
        learnt = bits_per_byte(run.model, text[:3000])
        assert learnt is not None
        gaps.append(run.best_bpb - learnt)
    assert gaps[1] < gaps[0] - 0.1, gaps


@pytest.mark.full
def test_bfloat16_learns_as_float32_does(tmp_path: Path) -> None:
    """Real text: half the bits change the final validation by less than another seed does."""
    bits = final_bits(tmp_path, seeds=5, steps=400)
    check_within_noise(bits)


def test_bfloat16_is_within_the_noise_of_seeds(tmp_path: Path) -> None:
    check_within_noise(final_bits(tmp_path, seeds=3, steps=60))


def final_bits(folder: Path, seeds: int, steps: int) -> dict[str, list[float]]:
    """Bits per byte on the bundled validation text after training on the bundled excerpt, by dtype, one a seed."""
    excerpt = Path(str(files("stateline") / "bundled" / "excerpt"))
    settings: dict[str, Any] = {
        "path": excerpt / "train.txt", "val": excerpt / "validation.txt", "d_model": 32, "n_layer": 2, "context": 64,
        "batch_size": 4, "steps": steps, "lr": 1e-2, "eval_every": 0, "eval_bytes": 4000, "sample_every": 0,
        "save_every": 0, "progress": "off", "device": "cpu",
    }  # fmt: skip
    found: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        for seed in range(seeds):
            out = folder / f"{dtype}-{seed}"
            train(TrainConfig.of(**settings, dtype=dtype, seed=seed, out=out))
            lines = (out / "metrics.jsonl").read_text().splitlines()
            found.setdefault(dtype, []).append(float(lines[-1].split('"val_bpb": ')[1].rstrip("}")))
    return found


def check_within_noise(bits: dict[str, list[float]]) -> None:
    """For each seed the dtypes differ by less than the seeds do, and on average by a fraction of that."""
    full, half = torch.tensor(bits["float32"]), torch.tensor(bits["bfloat16"])
    spread = full.max() - full.min()
    assert full.max() < 6, "nothing was learnt"
    assert not torch.equal(full, half), "the dtype must do something"
    assert (full - half).abs().max() < spread, bits
    assert (full.mean() - half.mean()).abs() < spread / 2, bits
