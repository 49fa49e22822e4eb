"""SequenceModel: however a signal is cut, padded or fed, its answer is the same; and the loop that fits one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stateline import state
from stateline.models.sequence import POOLS, ChannelNorm, SequenceConfig, SequenceModel
from stateline.models.signal_input import SignalInput
from stateline.training.series import FitConfig, Series, answers, batches, fit_series

MIXERS = {"S4D": {"d_state": 4}, "Mamba1": {"d_state": 4}, "Mamba2": {"headdim": 8, "d_state": 4}}


def make(pool: str = "mean", mixer: str = "S4D", **options: object) -> SequenceModel:
    config = SequenceConfig(
        3, 2, d_model=8, mixer=mixer, mixer_args=MIXERS[mixer], pool=pool, own_scale=False, **options
    )  # type: ignore[arg-type]
    return SequenceModel(config).eval()


def close(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_cuts_steps_and_padding_change_nothing(pool: str, mixer: str) -> None:
    model = make(pool, mixer)
    x = torch.randn(2, 9, 3)
    whole = model(x)
    for sizes in ([9], [0, 4, 5], [1] * 9):
        carried, answer = model.init_state(2), None
        for piece in x.split(sizes, 1):
            before = pytree.tree_map(torch.clone, carried)
            answer, after = model.extend(piece, carried)
            assert all(map(torch.equal, pytree.tree_leaves(before), pytree.tree_leaves(carried)))
            carried = after
        assert answer is not None
        close(answer, whole)
    stepped = model.init_state(2)
    for i in range(9):
        answer = model.step_(x[:, i], stepped)
        close(answer, model(x[:, : i + 1]))  # the running answer is the prefix's
    close(stepped.pooled, carried.pooled)
    x[0, 5:] = math.nan
    close(model(x, lengths=[5, 9]), torch.cat([model(x[:1, :5]), model(x[1:])]))
    answer, after = model.extend(x[:, 2:], model.extend(x[:, :2])[1], lengths=[3, 7])
    close(answer, model(x, lengths=[5, 9]))
    assert after.count.tolist() == [5, 9]


def test_no_signal_at_all_gives_the_heads_bias() -> None:
    for pool in POOLS:
        model = make(pool)
        close(model.extend(torch.zeros(2, 0, 3))[0], model.head.bias.expand(2, 2))
        close(model(torch.zeros(1, 4, 3), lengths=[0]), model.head.bias[None])


def test_gradients_of_padding_are_zero() -> None:
    model = make()
    x = torch.randn(2, 6, 3)
    x[0, 3:] = math.nan
    model(x, lengths=[3, 6]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_input_standardises_in_double_precision_and_marks_what_is_missing() -> None:
    reads = SignalInput(3, own=False, missing=True)
    reads.mean.copy_(torch.tensor([1e9, 0, 2], dtype=torch.float64))
    reads.scale.copy_(torch.tensor([1, 2, 4], dtype=torch.float64))
    got, _ = reads.extend(torch.tensor([[[1e9 + 0.5, math.nan, 6]]], dtype=torch.float64))
    assert got.tolist() == [[[0.5, 0, 1, 0, 1, 0]]]
    assert got.dtype == torch.float32
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 2\), expected \(b, t, 3\)"):
        reads.extend(torch.zeros(1, 4, 2))


def test_input_scales_a_signal_by_what_it_was_so_far() -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64) * 1e-4 + 50
    x[0, 2:5, 1] = math.nan
    x[1, :3, 0] = math.nan  # the first value comes later
    reads = SignalInput(3, missing=True)
    assert reads.width == 12
    whole, end = reads.extend(x)
    for i in range(1, 9):
        seen = x[0, : i + 1, 1].numpy()
        spread = float(np.nanstd(seen))
        if spread > 0:
            want = 0 if np.isnan(seen[-1]) else (seen[-1] - np.nanmean(seen)) / spread
            assert float(whole[0, i, 4]) == pytest.approx(want, abs=1e-4)
            assert float(whole[0, i, 7]) == pytest.approx(math.log10(spread) / 3, abs=1e-4)
    state = reads.init_state(2)
    pieces = []
    for piece in x.split([0, 1, 5, 3], 1):
        got, state = reads.extend(piece, state)
        pieces.append(got)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.squares, end.squares)
    constant, _ = reads.extend(torch.full((1, 5, 3), 0.1))
    assert (constant[..., 3:6] == 0).all()  # rounding is not blown up


def test_channel_norm_leaves_padding_out_and_remembers_what_it_saw() -> None:
    norm = ChannelNorm(3).train()
    x = torch.randn(2, 6, 3) * 4 + 7
    x[0, 4:] = 1e6
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[0, 4:] = True
    seen = x[~padded]
    want = (x - seen.mean(0)) / seen.var(0, unbiased=False).add(1e-5).sqrt()
    torch.testing.assert_close(norm(x, padded)[~padded], want[~padded], atol=1e-4, rtol=1e-4)
    norm.eval()
    torch.testing.assert_close(norm(x)[~padded], want[~padded], atol=1e-4, rtol=1e-4)  # after one batch, that batch
    assert torch.equal(norm(x)[1:], norm(x[1:]))  # and nothing of what lies beside


def test_state_has_constant_size_and_is_saved(tmp_path: object) -> None:
    model = make()
    carried = model.extend(torch.randn(1, 5, 3))[1]
    assert state.num_bytes(carried) == state.num_bytes(model.extend(torch.randn(1, 500, 3))[1])
    path = f"{tmp_path}/state"
    state.save(carried, path, model)
    assert torch.equal(state.load(path, model).pooled, carried.pooled)


def test_bidirectional_reads_the_end_and_cannot_be_continued() -> None:
    model = make(bidirectional=True)
    x = torch.randn(1, 6, 3)
    close(model(torch.nn.functional.pad(x, (0, 0, 0, 3)), lengths=[6]), model(x))
    with pytest.raises(TypeError, match="looks at tokens to come"):
        model.init_state(1)


def test_dropout_takes_channels_of_whole_sequences_in_training_alone() -> None:
    model = make(dropout=0.5)
    x = torch.randn(1, 6, 3)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    thinned = model._thinned(torch.ones(4, 5, 8))
    assert (thinned == thinned[:, :1]).all()
    assert set(thinned.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool is 'median'"),
        ({"mixer": "LSTM"}, "mixer is 'LSTM'"),
        ({"mixer_args": {"heads": 3}}, "unknown keys heads; S4D knows d_state"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"channels": 0}, "channels is 0"),
    ],
)
def test_configurations_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**{"channels": 1, "outputs": 1, **options})  # type: ignore[arg-type]


def test_batches_hold_every_series_once_within_their_bounds() -> None:
    lengths = [int(n) for n in torch.randint(1, 90, (103,))]
    for generator in (None, torch.Generator().manual_seed(0)):
        found = list(batches(lengths, 16, 400, generator))
        assert sorted(i for batch in found for i in batch) == list(range(103))
        assert all(len(b) <= 16 and (len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 400) for b in found)
    same = [list(batches(lengths, 16, 400, torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    assert list(batches([900, 1000], 16, 400, None)) == [[1], [0]]  # longer than a batch may be: alone


def test_answers_come_in_the_order_of_the_signals() -> None:
    model = make()
    inputs = [torch.randn(n, 3) for n in (4, 9, 2, 9, 1)]
    got = answers(model, inputs, FitConfig(batch_tokens=18))
    close(got, torch.cat([model(x[None]).detach() for x in inputs]))


def test_the_best_epoch_is_kept_and_patience_ends() -> None:
    """The score is made to be best in the third epoch."""
    model = make(dropout=0.1)
    data = Series([torch.randn(5, 3) for _ in range(12)], torch.arange(12) % 2)
    scores, weights = iter([0.1, 0.2, 0.9, 0.5, 0.5, 0.5]), []

    def report(figures: dict[str, float], epochs: int) -> None:
        weights.append(model.head.weight.detach().clone())

    outcome = fit_series(
        model, data, data, torch.nn.functional.cross_entropy, FitConfig(max_epochs=6, patience=2),
        score=lambda *_: next(scores), generator=torch.Generator().manual_seed(0), report=report,
    )  # fmt: skip
    assert outcome.best == 3
    assert len(outcome.history) == 5
    assert torch.equal(model.head.weight, weights[2])
    assert not torch.equal(model.head.weight, weights[4])
    assert not model.training


def test_training_reads_pieces_that_differ_and_predicting_the_whole() -> None:
    """Signals are ramps, so a piece tells where it is from."""
    ramps = [torch.arange(n, dtype=torch.float32)[:, None].expand(-1, 3) for n in (20, 20, 30, 7)]
    model, seen = make(), []

    def record(module: object, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> None:
        lengths = kwargs["lengths"]
        pieces = args[0] if lengths is None else [x[:n] for x, n in zip(args[0], lengths.tolist(), strict=True)]
        assert not model.training or args[0].shape[0] * args[0].shape[1] <= 30
        seen.extend((model.training, x[:, 0]) for x in pieces)

    model.register_forward_pre_hook(record, with_kwargs=True)
    data = Series(ramps, torch.tensor([0, 1, 0, 1]))
    fit_series(
        model, data, data, torch.nn.functional.cross_entropy, FitConfig(max_epochs=20, batch_tokens=30, crop=0.5),
        score=lambda *_: 0.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert sorted({len(x) for training, x in seen if not training}) == [7, 20, 30]
    pieces = [x for training, x in seen if training]
    assert sorted(len(x) for x in pieces) == 20 * [4] + 40 * [10] + 20 * [15]
    assert all((x.diff() == 1).all() for x in pieces)
    assert {float(x[0]) for x in pieces if len(x) == 4} == {0, 1, 2, 3}  # the ends are learnt from too


def test_a_mixer_that_wants_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SequenceModel: mixer GatedSSM .* wants a gate, which signals do not bring"):
        SequenceModel(SequenceConfig(3, 2, mixer="GatedSSM", mixer_args={"gate": "given"}))


def test_a_loss_that_is_no_number_is_reported() -> None:
    model = make()
    data = Series([torch.full((5, 3), math.inf)], torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 1\. Take a smaller learning_rate"):
        fit_series(
            model, data, None, torch.nn.functional.cross_entropy, FitConfig(), score=lambda *_: 0.0,
            generator=torch.Generator(),
        )  # fmt: skip
