"""Engines on a CUDA device: captured graphs, the tokens of eager steps, and a host that never waits inside a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from where import INTERPRETED

from stateline import Engine, prepare_for_decode
from stateline.generation import SamplingConfig, Stream, generate_tokens
from stateline.generation.decode import TokenStep, explain
from stateline.generation.slots import DeviceSlots
from stateline.models import LanguageModel, ModelConfig
from stateline.ops.decode_token import gpu as decode_token_gpu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="engines on a device need one, not Triton's interpreter")

V = 301
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5, "temperature": 0.7},
    {"top_p": 0.8, "repetition_penalty": 1.5},
    {"min_p": 0.1, "repetition_penalty": 1.3, "repetition_window": None},
    {"temperature": 0.0, "repetition_penalty": 2.0, "repetition_window": 200},
]


@pytest.fixture(autouse=True)
def _fenced() -> None:
    """Not here: what a graph fills at every replay is nobody's once the graph is gone."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Peaked enough that the last bits of a matrix product change no token."""
    torch.manual_seed(5)
    config = ModelConfig(d_model=64, n_layer=3, vocab_size=V, tie_embeddings=False)
    model = LanguageModel(config).cuda()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
    return model


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one at every replay of a graph."""
    seen: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return seen


@pytest.fixture
def strict() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def asked(i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    prompt = torch.randint(V, ([1, 2, 33, 70, 9][i % 5],), generator=generator).tolist()
    sampling = SamplingConfig(seed=i, **SAMPLING[i % len(SAMPLING)])
    return {"prompt": prompt, "max_tokens": [1, 9, 30, 200, 0][i % 5], "sampling": sampling}


def written(model: LanguageModel, count: int, **options: Any) -> list[list[int]]:
    engine = Engine(model, **options)
    requests = [engine.add(**asked(i)) for i in range(count)]
    said: dict[Any, list[int]] = {request: [] for request in requests}
    for event in engine.run():
        assert event.request.error is None
        said[event.request] += [event.token.id] if event.token else []
    return list(said.values())


def test_graphs_write_what_eager_steps_write(model: LanguageModel, replays: list[None]) -> None:
    eager = written(model, 30, max_batch=11, chunk=64, graphs=False)
    assert not replays
    graphs = written(model, 30, max_batch=11, chunk=64)
    assert len(replays) >= 200
    assert graphs == eager
    assert [len(ids) for ids in graphs] == [asked(i)["max_tokens"] for i in range(30)]


def test_every_text_is_what_a_stream_writes_alone(model: LanguageModel) -> None:
    together = written(model, 12, max_batch=8, chunk=32)
    for i, ids in enumerate(together):
        stream = Stream(model, sampling=asked(i)["sampling"])
        stream.feed(asked(i)["prompt"])
        assert ids == [token.id for token in stream.tokens(asked(i)["max_tokens"])], asked(i)["sampling"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_text_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(d_model=128, n_layer=3, vocab_size=V)).cuda().to(dtype)

    def tokens(others: int, place: int) -> list[Any]:
        engine = Engine(model, max_batch=24, chunk=48, deterministic=True)
        for i in range(others + 1):
            if i == place:
                mine = engine.add(list(range(100)), max_tokens=60, sampling=SamplingConfig(temperature=0))
            else:
                engine.add([i] * (7 * i + 1), max_tokens=5 + i, sampling=SamplingConfig(seed=i, top_p=0.9))
        return [event.token for event in engine.run() if event.request is mine]

    expected = tokens(0, 0)
    assert len(expected) == 60
    for others, place in ((1, 0), (23, 13), (40, 40)):
        assert tokens(others, place) == expected


def test_no_step_waits_for_the_device(model: LanguageModel, replays: list[None], strict: None) -> None:
    """Prompts that come, texts that end and rows that move included; graphs are captured before."""
    torch.cuda.set_sync_debug_mode("default")
    engine = Engine(model, max_batch=8, chunk=64)
    engine.prepare(SamplingConfig(seed=0, top_k=5), SamplingConfig(seed=0, top_p=0.9, repetition_penalty=1.2))
    for i in range(4):
        engine.add([i + 1] * 40, max_tokens=300, sampling=SamplingConfig(seed=i, top_k=5))
    for _ in range(5):  # prompts' kernels are compiled
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    for i in range(20):
        engine.add([i + 1] * (3 * i + 1), max_tokens=7 * i, sampling=SamplingConfig(seed=i, top_k=5))
    before = len(replays)
    events = list(engine.run())
    assert len(replays) - before >= 290
    assert sum(event.reason == "length" for event in events) == 24


def test_nan_ends_one_request_only(model: LanguageModel) -> None:
    damaged, prompt = Stream(model), [5, 6, 7]
    for stream in (damaged, whole := Stream(model)):
        stream.feed(prompt)
    damaged.state.layers[0].ssm.fill_(float("nan"))
    engine = Engine(model, max_batch=4)
    greedy = SamplingConfig(temperature=0)
    fine, broken = (engine.add(after=s, max_tokens=20, sampling=greedy) for s in (whole, damaged))
    said = [event.token.id for event in engine.run() if event.request is fine and event.token]
    assert said == [token.id for token in Stream.tokens(_greedy(model, prompt), 20)]
    assert str(broken.error).startswith("sample: the logits at generated token 0 hold NaN.")
    again = engine.add(after=whole, max_tokens=20, sampling=greedy)  # into the row that was left
    assert [event.token.id for event in engine.run() if event.request is again and event.token] == said


def _greedy(model: LanguageModel, prompt: list[int]) -> Stream:
    stream = Stream(model, sampling=SamplingConfig(temperature=0))
    stream.feed(prompt)
    return stream


def test_a_kept_stream_goes_on_where_the_text_ended(model: LanguageModel) -> None:
    sampling = SamplingConfig(seed=3, top_p=0.9, repetition_penalty=1.2)
    engine = Engine(model, max_batch=2)
    first = engine.add([1, 2, 3], max_tokens=100, sampling=sampling, keep=True)
    ids = [event.token.id for event in engine.run() if event.token]
    second = engine.add([4], after=first.stream, max_tokens=30)
    ids += [event.token.id for event in engine.run() if event.request is second and event.token]
    stream = Stream(model, sampling=sampling)
    stream.feed([1, 2, 3])
    expected = [token.id for token in stream.tokens(100)]
    stream.feed([4])
    assert ids == expected + [token.id for token in stream.tokens(30)]


def test_a_longer_window_of_a_penalty_comes_later(model: LanguageModel) -> None:
    """Its columns need other buffers, and other graphs, while texts are written."""
    engine = Engine(model, max_batch=4)
    short = SamplingConfig(seed=1, repetition_penalty=1.4, repetition_window=3)
    long = SamplingConfig(seed=2, repetition_penalty=1.4, repetition_window=100)
    first = engine.add([1, 2], max_tokens=150, sampling=short)
    events = [event for _ in range(20) for event in engine.step()]
    second = engine.add([3], max_tokens=150, sampling=long)
    events += engine.run()
    for request, prompt, sampling in ((first, [1, 2], short), (second, [3], long)):
        stream = Stream(model, sampling=sampling)
        stream.feed(prompt)
        said = [event.token.id for event in events if event.request is request and event.token]
        assert said == [token.id for token in stream.tokens(150)]


def test_memory_is_constant(model: LanguageModel) -> None:
    engine = Engine(model, max_batch=8, chunk=64)

    def work() -> int:
        for i in range(20):
            engine.add([i + 1] * (3 * i + 1), max_tokens=2 * i, sampling=SamplingConfig(seed=i))
        list(engine.run())
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    work()
    assert work() == work()


@pytest.mark.parametrize("kind", ["float64", "packed", "half"])
def test_models_of_every_form(kind: str, model: LanguageModel) -> None:
    """Those whose step goes layer by layer through the reference, too; captured all the same."""
    form = model.cpu()
    if kind == "packed":
        form = prepare_for_decode(form, weights="int8").cuda()
    else:
        form = copy.deepcopy(form).to("cuda", torch.float64 if kind == "float64" else torch.float16)
    model.cuda()
    engine = Engine(form, max_batch=2)
    request = engine.add([1, 2, 3], max_tokens=12, sampling=SamplingConfig(temperature=0))
    ids = [event.token.id for event in engine.run() if event.token]
    assert request.error is None
    stream = Stream(form, sampling=SamplingConfig(temperature=0))
    stream.feed([1, 2, 3])
    assert ids == [token.id for token in stream.tokens(12)]


def streams_write(model: LanguageModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    return [[token.id for token in _greedy(model, prompt).tokens(count)] for prompt in prompts]


def engine_writes(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """All of them from the same step to the same step, so by replays of one graph."""
    requests = [engine.add(p, max_tokens=count, sampling=SamplingConfig(temperature=0)) for p in prompts]
    said: dict[Any, list[int]] = {request: [] for request in requests}
    for event in engine.run():
        assert event.request.error is None
        said[event.request] += [event.token.id] if event.token else []
    return list(said.values())


def test_graphs_of_a_packed_model_are_replayed_in_any_order(model: LanguageModel) -> None:
    """They share scratch memory, which is there before the first capture, and whose content no graph relies on."""
    packed = prepare_for_decode(model, "int8")
    engine = Engine(packed, max_batch=8)
    slots = engine._slots
    assert isinstance(slots, DeviceSlots)
    engine.prepare(SamplingConfig(temperature=0))
    if explain(packed) is None:  # on devices that its kernels cover
        assert slots._aside is not None
        assert isinstance(packed.token_step, TokenStep)
        assert packed.token_step.network is not None
        scratch = decode_token_gpu._known[packed.token_step.network].scratch
        assert set(scratch) == {(1, slots._aside.cuda_stream)}  # up to 8 rows take the same kernels
    sizes = [size for size, _ in slots._captured]
    assert sorted(sizes) == [1, 2, 4, 8]
    for size in (*reversed(sizes), *sizes):
        prompts = [[3 * i + 1, i + 2, size] for i in range(size)]
        assert engine_writes(engine, prompts, 20) == streams_write(packed, prompts, 20)
    assert [size for size, _ in slots._captured] == sizes


def test_engines_of_one_packed_model_work_at_once(model: LanguageModel) -> None:
    """On streams of their own, where launches may overlap: they share the model and no scratch memory."""
    packed = prepare_for_decode(model, "int8")
    prompts = [[[7 * k + 1, i + 1] for i in range(8)] for k in range(2)]
    expected = [streams_write(packed, some, 100) for some in prompts]
    engines, streams = [Engine(packed, max_batch=8) for _ in prompts], [torch.cuda.Stream() for _ in prompts]
    said: dict[Any, list[int]] = {}
    for engine, some in zip(engines, prompts, strict=True):
        engine.prepare(SamplingConfig(temperature=0))
        for prompt in some:
            said[engine.add(prompt, max_tokens=100, sampling=SamplingConfig(temperature=0))] = []
    torch.cuda.synchronize()
    while any(engine.busy for engine in engines):
        for engine, stream in zip(engines, streams, strict=True):
            with torch.cuda.stream(stream):
                for event in engine.step():
                    said[event.request] += [event.token.id] if event.token else []
    assert list(said.values()) == expected[0] + expected[1]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_loaded_between_texts_are_those_that_graphs_read(
    packed: bool, assign: bool, model: LanguageModel
) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    first, second = (prepare_for_decode(m, "int8") if packed else copy.deepcopy(m) for m in (model, other))
    prompts = [[1, 2, 3], [4]]
    engine = Engine(first, max_batch=2)
    before = engine_writes(engine, prompts, 30)
    first.load_state_dict({name: x.clone() for name, x in second.state_dict().items()}, assign=assign)
    after = engine_writes(engine, prompts, 30)
    assert after == streams_write(second, prompts, 30)
    assert after != before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("packed", [False, True])
def test_an_engine_on_a_second_device(packed: bool, model: LanguageModel) -> None:
    """After one on the first, which is the current device throughout."""
    forms = [copy.deepcopy(model).to(f"cuda:{i}") for i in range(2)]
    if packed:
        forms = [prepare_for_decode(form, "int8") for form in forms]
    prompts = [[5 * i + 1, i + 2] for i in range(4)]
    with torch.cuda.device(0):
        engines = [Engine(form, max_batch=4) for form in forms]
        for i, (engine, form) in enumerate(zip(engines, forms, strict=True)):
            assert isinstance(engine._slots, DeviceSlots)
            assert engine._slots._aside is not None
            assert engine._slots._aside.device == torch.device("cuda", i)
            engine.prepare(SamplingConfig(temperature=0))
            assert engine_writes(engine, prompts, 40) == streams_write(form, prompts, 40)
        assert engine_writes(engines[0], prompts, 40) == streams_write(forms[0], prompts, 40)
        assert torch.cuda.current_device() == 0


def test_a_step_that_cannot_be_captured_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LanguageModel.step_

    def reads(self: LanguageModel, ids: torch.Tensor, state: Any) -> torch.Tensor:
        logits = step(self, ids, state)
        logits[0, 0] += float(logits.sum().item())
        return logits

    monkeypatch.setattr(LanguageModel, "step_", reads)
    engine = Engine(model, max_batch=1)
    engine.add([1], max_tokens=2)
    with pytest.raises(RuntimeError, match=r"(?s)cannot be captured as a CUDA graph: .*Take graphs=False"):
        engine.step()
    torch.rand(1, device="cuda")  # the failure leaves the generator of random numbers as it was
    engine = Engine(model, max_batch=1, graphs=False)
    engine.add([1], max_tokens=2)
    assert len(list(engine.run())) == 2


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("cache", [None, torch.bfloat16])
def test_engines_write_hybrids_in_graphs(layer: str, cache: torch.dtype | None) -> None:
    torch.manual_seed(1)
    attention = {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 8, "max_tokens": 64, "cache_dtype": cache}
    config = ModelConfig(
        d_model=64, n_layer=3, vocab_size=256, d_intermediate=32, attn_layer_idx=[1], attn_cfg=attention,
        ssm_cfg={"layer": layer, "d_state": 16} | ({"headdim": 16} if layer == "Mamba2" else {}),
    )  # fmt: skip
    model = LanguageModel(config).cuda().eval()
    with torch.no_grad():  # peaked enough that the last bits of a product change no token
        model.backbone.embedding.weight.mul_(30)
    prompts = [list(range(40, 40 + n)) for n in (3, 20, 9)]
    greedy = SamplingConfig(temperature=0)
    alone = [[token.id for token in generate_tokens(model, p, max_tokens=12, sampling=greedy)] for p in prompts]
    engine = Engine(model, max_batch=2)
    asked = [engine.add(p, max_tokens=12, sampling=greedy) for p in prompts]
    written: dict[int, list[int]] = {id(request): [] for request in asked}
    for event in engine.run():
        assert event.request.error is None
        if event.token is not None:
            written[id(event.request)].append(event.token.id)
    assert [written[id(request)] for request in asked] == alone
