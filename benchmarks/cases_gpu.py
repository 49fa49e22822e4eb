"""Cases of one GPU: ours beside the least time the bytes allow and beside torch's own layers.

Shapes are those of a Mamba of 130 million to 2.8 billion parameters in training and decoding. Each case says how many
bytes must move (inputs read once, results written once), so that a figure can stand beside copying as many.
b batch, t time step, d channel, n state, k taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmarks import peers
from benchmarks.cases import OURS, with_backward, without_grad
from benchmarks.measure import Work
from torch import Tensor, nn

from stateline import Engine, backends, ops, prepare_for_decode
from stateline.generation import SamplingConfig
from stateline.models import LanguageModel, ModelConfig
from stateline.nn import Mamba
from stateline.training.data import Batch
from stateline.training.graphs import Gradients

DEVICE = "cuda"
BF16 = torch.bfloat16
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Case:
    """Candidates by name, made when asked; `needs` are the ops whose GPU kernels the case is about.

    bytes: that must move.   exponentials: that must be taken.   operations: of a matrix product.
    tokens: of a call.   bar: milliseconds to be under.
    many: launches too much to queue, so only whole calls are timed.
    steps: that a call makes; all figures are of one.   dtype: of the data.
    """

    op: str
    shape: str
    make: Callable[[], dict[str, Work]]
    needs: tuple[str, ...] = ()
    bytes: int | None = None
    exponentials: int | None = None
    operations: int | None = None
    tokens: int | None = None
    bar: float | None = None
    many: bool = False
    steps: int = 1
    dtype: str = "bfloat16"

    def missing(self) -> str | None:
        """Why a kernel that this case is about does not run here, or None."""
        for op in self.needs:
            if (why := backends.gpu_problem(op, torch.float32)) is not None:
                return f"{op}: {why}"
        return None


def cases() -> Iterator[Case]:
    """Every case: limits first, since floors need them."""
    yield from limits()
    for b, t, d, bars in ((8, 2048, 2048, (0.065, 0.22)), (1, 8192, 5120, (None, None))):
        yield from convolution(b, t, d, 4, bars)
    for rows, d in ((16384, 768), (16384, 2560)):
        yield from norm(rows, d)
    yield from loss(2048, 50280)
    for b, t, d, bars in (
        (8, 2048, 2048, (0.31, 1.5)), (1, 8192, 5120, (0.45, 2.1)), (1, 65536, 2048, (1.3, 6.5)),
        (8, 1024, 1536, (0.12, 0.6)),
    ):  # fmt: skip
        yield from scan(b, t, d, 16, bars)
    for n, constant in ((64, True), (64, False)):
        yield from complex_scan(8, 2048, 512, n, constant)
    yield from scan(8, 2048, 512, 256, (None, None))
    for b in (64, 256):
        yield scan_step(b, 5120, 16, {64: 0.0196, 256: 0.0698}[b])
    yield from block(8, 2048, 1024, (0.9, 3.2))
    yield from training(768, 24, 8, 2048, 240_000)
    for d, layers, b, bar in ((768, 24, 1, 0.45), (768, 24, 64, 0.75), (2560, 64, 1, 2.6), (2560, 64, 64, 4.5)):
        yield decoding(d, layers, b, bar)
    yield from serving()
    yield from family()


def limits() -> Iterator[Case]:
    """What the device itself can do."""

    def copy() -> dict[str, Work]:
        x = torch.randn(2**29, device=DEVICE).to(BF16)
        y = torch.empty_like(x)
        return {"torch": lambda: y.copy_(x)}

    def product() -> dict[str, Work]:
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
        return {"torch": lambda: a @ b}

    yield Case("limit: copying", "1 GiB", copy, bytes=2 * 2**30)
    yield Case("limit: matrix product", "8192³", product, operations=2 * 8192**3)


def convolution(b: int, t: int, d: int, k: int, bars: tuple[float | None, float | None]) -> Iterator[Case]:
    """The short convolution with silu; torch's own beside it, channels first as it wants them."""

    def leaves() -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = {"x": (b, t, d), "weight": (d, k), "bias": (d,)}
        return {name: torch.randn(shape, device=DEVICE, dtype=BF16) for name, shape in made.items()}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, activation="silu")[0]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=k - 1, groups=d)[..., :t])

    channels_first = {"F.conv1d": theirs} | named("causal_conv1d", peers.cuda_convolution())

    def forward() -> dict[str, Work]:
        x = leaves()
        y = x | {"x": x["x"].transpose(1, 2).contiguous()}
        others = {name: without_grad(lambda run=run: run(**y)) for name, run in channels_first.items()}
        return {OURS: without_grad(lambda: ours(**x))} | others

    def both() -> dict[str, Work]:
        x = leaves()
        y = x | {"x": x["x"].transpose(1, 2).contiguous()}
        return {OURS: gradients(ours, x)} | {name: gradients(run, y) for name, run in channels_first.items()}

    shape, moved, needs = f"b{b} t{t} d{d} k{k}", b * t * d * 2, ("causal_conv1d",)
    yield Case("causal_conv1d+silu fwd", shape, forward, needs, 2 * moved, tokens=b * t, bar=bars[0])
    yield Case("causal_conv1d+silu fwd+bwd", shape, both, needs, 5 * moved, tokens=b * t, bar=bars[1])


def named(name: str, run: Callable[..., Tensor] | None) -> dict[str, Callable[..., Tensor]]:
    """A peer by name, if it is installed."""
    return {} if run is None else {name: run}


def gradients(forward: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Work:
    """Forward and gradients of all leaves, from a dense random gradient."""
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    with torch.no_grad():
        dy = torch.randn_like(forward(**leaves))
    return lambda: torch.autograd.grad(forward(**leaves), list(leaves.values()), dy)


def norm(rows: int, d: int) -> Iterator[Case]:
    """Addition to a float32 residual stream and normalisation; torch's two operations beside it."""

    def leaves() -> dict[str, Tensor]:
        torch.manual_seed(0)
        x, residual = torch.randn(rows, d, device=DEVICE, dtype=BF16), torch.randn(rows, d, device=DEVICE)
        return {"x": x, "residual": residual, "weight": torch.randn(d, device=DEVICE, dtype=BF16)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, weight, residual=residual, residual_dtype=torch.float32)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, (d,), weight.float(), 1e-5).to(BF16), h

    def both(run: Callable[..., tuple[Tensor, Tensor]]) -> Work:
        x = {name: v.requires_grad_() for name, v in leaves().items()}
        grads = [torch.randn_like(v) for v in run(**x)]
        return lambda: torch.autograd.grad(run(**x), list(x.values()), grads)

    def forward() -> dict[str, Work]:
        x = leaves()
        return {OURS: without_grad(lambda: ours(**x)), "torch": without_grad(lambda: theirs(**x))}

    shape, needs = f"rows{rows} d{d}", ("rms_norm",)
    yield Case("add+rms_norm fwd", shape, forward, needs, 12 * rows * d)
    yield Case("add+rms_norm fwd+bwd", shape, lambda: {OURS: both(ours), "torch": both(theirs)}, needs, 28 * rows * d)


def loss(rows: int, v: int) -> Iterator[Case]:
    """The loss of logits; torch's own beside it, which computes in float32 where it is told to."""

    def both(run: Callable[[Tensor, Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        x = torch.randn(rows, v, device=DEVICE).to(BF16).requires_grad_()
        targets = torch.randint(v, (rows,), device=DEVICE)
        return lambda: torch.autograd.grad(run(x, targets), x)

    def make() -> dict[str, Work]:
        ours = lambda x, targets: ops.cross_entropy(x, targets).sum()  # noqa: E731
        return {OURS: both(ours), "torch": both(lambda x, y: F.cross_entropy(x.float(), y, reduction="sum"))}

    yield Case("cross_entropy fwd+bwd", f"rows{rows} v{v}", make, ("cross_entropy",), 6 * rows * v)


def scan_leaves(b: int, t: int, d: int, n: int) -> dict[str, Tensor]:
    """As in a Mamba block: u, dt, z, B, C in bfloat16, the system in float32."""
    torch.manual_seed(0)
    token = {name: torch.randn(b, t, d, device=DEVICE, dtype=BF16) for name in ("u", "z")}
    token["dt"] = (0.5 * torch.rand(b, t, d, device=DEVICE)).to(BF16)
    token |= {name: torch.randn(b, t, n, device=DEVICE, dtype=BF16) for name in ("B", "C")}
    A = -torch.arange(1.0, n + 1, device=DEVICE).repeat(d, 1) * (1 + 0.1 * torch.rand(d, 1, device=DEVICE))
    return token | {"A": A, "D": torch.randn(d, device=DEVICE), "dt_bias": torch.rand(d, device=DEVICE) - 4}


def scan(b: int, t: int, d: int, n: int, bars: tuple[float | None, float | None]) -> Iterator[Case]:
    """The scan as a Mamba block calls it: softplus with bias, skip and gate."""

    def ours(**x: Tensor) -> Tensor:
        return ops.selective_scan(**x, dt_softplus=True)[0]

    theirs = named("mamba_ssm", peers.cuda_scan())

    def forward() -> dict[str, Work]:
        x = scan_leaves(b, t, d, n)
        y = channels_first(x)
        return {OURS: without_grad(lambda: ours(**x))} | {
            name: without_grad(lambda run=run: run(**y)) for name, run in theirs.items()
        }

    def both() -> dict[str, Work]:
        x = scan_leaves(b, t, d, n)
        return {OURS: gradients(ours, x)} | {name: gradients(run, channels_first(x)) for name, run in theirs.items()}

    shape, needs, moved, updates = f"b{b} t{t} d{d} n{n}", ("selective_scan",), 2 * b * t, b * t * d * n
    yield Case(
        "selective_scan fwd", shape, forward, needs, moved * (4 * d + 2 * n), updates, tokens=b * t, bar=bars[0]
    )  # fmt: skip
    yield Case(
        "selective_scan fwd+bwd", shape, both, needs, moved * (11 * d + 6 * n), 2 * updates, tokens=b * t, bar=bars[1]
    )  # fmt: skip


def channels_first(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Data (b, t, …) as (b, …, t), which is how the older libraries keep it; parameters as they are."""
    return {name: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for name, v in x.items()}


def complex_scan(b: int, t: int, d: int, n: int, constant: bool) -> Iterator[Case]:
    """The scan of a complex system, with B and C constant as in S4D or per token; the reference beside it."""

    def leaves() -> dict[str, Tensor]:
        x = scan_leaves(b, t, d, n)
        x["A"] = torch.complex(-torch.rand(d, n, device=DEVICE) - 0.1, 10 * torch.randn(d, n, device=DEVICE))
        for name in ("B", "C"):
            per_token = torch.randn(b, t, n, 2, device=DEVICE, dtype=BF16)
            x[name] = torch.randn(d, n, dtype=x["A"].dtype, device=DEVICE) if constant else per_token
        return x

    def run(backend: str | None) -> Callable[..., Tensor]:
        return lambda **x: ops.selective_scan(**x, dt_softplus=True, backend=backend)[0]

    def forward() -> dict[str, Work]:
        x = leaves()
        return {OURS: without_grad(lambda: run(None)(**x)), "reference": without_grad(lambda: run("reference")(**x))}

    def both() -> dict[str, Work]:
        return {OURS: gradients(run(None), leaves()), "reference": gradients(run("reference"), leaves())}

    system = "constant" if constant else "per token"
    shape, needs, moved = f"b{b} t{t} d{d} n{n} complex, B and C {system}", ("selective_scan",), 2 * b * t
    per_token = 0 if constant else 4 * n
    yield Case("selective_scan fwd", shape, forward, needs, moved * (4 * d + per_token), tokens=b * t, many=True)
    yield Case("selective_scan fwd+bwd", shape, both, needs, moved * (11 * d + 3 * per_token), tokens=b * t, many=True)


def scan_step(b: int, d: int, n: int, bar: float) -> Case:
    """One token of many streams."""

    def make() -> dict[str, Work]:
        x = scan_leaves(b, 1, d, n)
        x = {name: v if name in ("A", "D", "dt_bias") else v[:, 0].contiguous() for name, v in x.items()}
        x |= {name: x[name][:, None] for name in ("B", "C")}
        state = torch.zeros(b, d, n, device=DEVICE)
        y = {name: v[:, 0] if name in ("B", "C") else v for name, v in x.items()}
        theirs = named("mamba_ssm", peers.cuda_scan_step())
        return {OURS: lambda: ops.selective_scan_step_(state, **x, dt_softplus=True)} | {
            name: without_grad(lambda run=run: run(state, **y)) for name, run in theirs.items()
        }

    moved = 2 * b * d * n * 4 + 4 * b * d * 2
    return Case("selective_scan step", f"b{b} d{d} n{n}", make, ("selective_scan",), moved, tokens=b, bar=bar)


ALL = ("causal_conv1d", "selective_scan", "rms_norm")


def block(b: int, t: int, d: int, bars: tuple[float, float]) -> Iterator[Case]:
    """A Mamba-1 block with its projections, weights in bfloat16."""

    def make(backward: bool) -> dict[str, Work]:
        torch.manual_seed(0)
        layer, x = Mamba(d, device=DEVICE, dtype=BF16), torch.randn(b, t, d, device=DEVICE, dtype=BF16)
        if not backward:
            return {OURS: without_grad(lambda: layer(x))}
        leaves, dy = [x.requires_grad_(), *layer.parameters()], torch.randn_like(x)
        return {OURS: lambda: torch.autograd.grad(layer(x), leaves, dy)}

    shape, needs = f"b{b} t{t} d{d}", ALL[:2]
    yield Case("Mamba block fwd", shape, lambda: make(False), needs, tokens=b * t, bar=bars[0])
    yield Case("Mamba block fwd+bwd", shape, lambda: make(True), needs, tokens=b * t, bar=bars[1])


def language_model(d: int, layers: int, mixer: str = "Mamba1") -> LanguageModel:
    """Random weights in bfloat16, GPT-NeoX's vocabulary."""
    torch.manual_seed(0)
    config = ModelConfig(d_model=d, n_layer=layers, vocab_size=50280, ssm_cfg={"layer": mixer})
    return LanguageModel(config, device=DEVICE, dtype=BF16)  # on the device: billions of numbers take a CPU minutes


def training_step(d: int, layers: int, b: int, t: int, how: str, mixer: str = "Mamba1") -> Work:
    """One step of AdamW on random tokens: "eager", "recorded" as a CUDA graph, or "compiled" by torch."""
    model = language_model(d, layers, mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, targets = torch.randint(0, 50280, (2, b, t), device=DEVICE).unbind()
    loss = torch.compile(model.loss) if how == "compiled" else model.loss
    recorded, batch = Gradients(model, None), Batch(ids, targets)

    def step() -> None:
        if how == "recorded":
            recorded(batch, 1.0)
        else:
            loss(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=how != "recorded")

    return step


def training(d: int, layers: int, b: int, t: int, bar: float) -> Iterator[Case]:
    """Tokens a second in training; `bar` is in tokens a second. One case each, so that none holds another's memory."""
    for how in ("eager", "recorded", "compiled"):
        shape = f"d{d} layers{layers} b{b} t{t} {how}"
        make = lambda how=how: {OURS: training_step(d, layers, b, t, how)}  # noqa: E731
        needs = (*ALL, "cross_entropy")
        yield Case(
            "language model training step", shape, make, needs, tokens=b * t, bar=1e3 * b * t / bar, many=True
        )  # fmt: skip


DRAWN = {
    "greedy": SamplingConfig(temperature=0),
    "plain": SamplingConfig(seed=0),
    "top-k 50": SamplingConfig(top_k=50, seed=0),
    "top-p 0.95, penalty": SamplingConfig(top_p=0.95, repetition_penalty=1.1, seed=0),
}


def serving() -> Iterator[Case]:
    """A step of an engine, from launch to events: sampled in every way, and after texts of any length."""

    @functools.cache
    def model() -> LanguageModel:
        return language_model(768, 24).eval()

    def written(b: int, sampling: SamplingConfig, read: int, steps: int) -> Work:
        engine, generator = Engine(model(), max_batch=b), torch.Generator().manual_seed(0)
        for _ in range(b):
            prompt = torch.randint(50280, (read,), generator=generator)
            engine.add(prompt, max_tokens=None, sampling=sampling)

        def work() -> None:
            for _ in range(steps):
                engine.step()

        while not engine.step():  # prompts are read
            pass
        return work

    steps = 20
    for b in (1, 64):
        for name, sampling in DRAWN.items():
            yield Case(
                "engine decode", f"130M b{b} {name}", lambda b=b, s=sampling: {OURS: written(b, s, 8, steps)}, ALL,
                token_bytes(768, 24, b), tokens=b, many=True, steps=steps,
            )  # fmt: skip
    for read in (1024, 65536):
        yield Case(
            "engine decode", f"130M b1 after {read}", lambda r=read: {OURS: written(1, DRAWN["greedy"], r, steps)}, ALL,
            token_bytes(768, 24, 1), tokens=1, many=True, steps=steps,
        )  # fmt: skip

    def churn() -> Work:
        engine, generator = Engine(model(), max_batch=64), torch.Generator().manual_seed(0)
        prompts = torch.randint(50280, (128, 128), generator=generator)

        def work() -> None:
            for i, prompt in enumerate(prompts):
                engine.add(prompt, max_tokens=32 + 37 * i % 65, sampling=DRAWN["plain"])
            for _ in engine.run():
                pass

        return work

    tokens = sum(32 + 37 * i % 65 for i in range(128))
    yield Case("engine, texts that come and go", "130M b64 128 × (128 + 32 to 96)", lambda: {OURS: churn()}, ALL,
               tokens=tokens, many=True)  # fmt: skip


def token_bytes(d: int, layers: int, b: int) -> int:
    """Bytes of a step of b sequences: all weights in 16 bits, states in float32, read and written."""
    weights = 2 * (50280 * d + layers * (2 * d * 2 * d + 2 * d * d + 2 * d * (d // 16 + 32) + d // 16 * 2 * d))
    return weights + b * layers * 2 * d * (16 + 3) * 4 * 2


def decoding(d: int, layers: int, b: int, bar: float) -> Case:
    """One token of every stream by a captured graph: packed, in one call, and as loaded, layer by layer."""

    def make() -> dict[str, Work]:
        plain = language_model(d, layers).eval()
        models = {f"{OURS}, {form} packed": prepare_for_decode(plain, form) for form in ("bf16", "int8", "int4")}
        return {name: captured(model, b) for name, model in (models | {f"{OURS}, layer by layer": plain}).items()}

    moved = token_bytes(d, layers, b)
    return Case("decoding step", f"d{d} layers{layers} b{b}", make, ALL, moved, tokens=b, bar=bar)


def captured(model: LanguageModel, b: int) -> Work:
    """A greedy step of b streams, to be replayed."""
    ids, state = torch.randint(0, 50280, (b,), device=DEVICE), model.init_state(b)
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        for _ in range(3):
            model.step_(ids, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        ids.copy_(model.step_(ids, state).argmax(-1))
    keep = model, state, ids  # what the graph reads
    return lambda: graph.replay() if keep else None


def family() -> Iterator[Case]:
    """Time against length: sequence mixers of 1,024 channels on one sequence, forward and gradient."""
    d, heads = 1024, 16

    def attention(t: int) -> Work:
        x = {
            name: torch.randn(1, heads, t, d // heads, device=DEVICE, dtype=BF16) for name in ("query", "key", "value")
        }
        return gradients(lambda **x: F.scaled_dot_product_attention(**x, is_causal=True), x)

    def lstm(t: int) -> Work:
        layer = nn.LSTM(d, d, batch_first=True, device=DEVICE, dtype=BF16)
        return with_backward(lambda x: layer(x)[0], {"x": torch.randn(1, t, d, device=DEVICE, dtype=BF16)})

    def convolve(t: int) -> Work:
        x = {"x": torch.randn(1, t, d, device=DEVICE, dtype=BF16), "w": torch.randn(d, 4, device=DEVICE, dtype=BF16)}
        return gradients(lambda x, w: ops.causal_conv1d(x, w, activation="silu")[0], x)

    def scanned(t: int) -> Work:
        return gradients(lambda **x: ops.selective_scan(**x, dt_softplus=True)[0], scan_leaves(1, t, d, 16))

    for t in LENGTHS:

        def make(t: int = t) -> dict[str, Work]:
            work = {"causal_conv1d, 4 taps": convolve(t)} if backends.gpu_problem("causal_conv1d") is None else {}
            if backends.gpu_problem("selective_scan", torch.float32) is None:
                work["selective_scan, 16 states"] = scanned(t)
            work["scaled_dot_product_attention"] = attention(t)
            return work | ({"LSTM": lstm(t)} if t <= 8192 else {})

        yield Case("mixer length", f"b1 t{t} d{d}", make, tokens=t, many=True)
