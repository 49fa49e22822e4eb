"""The rows that an engine's texts are written in: their states, their last tokens, and a step of all of them.

On the host, tokens are drawn one row after another. On a CUDA device nothing waits: a captured graph reads the last
tokens, advances the states and draws the next tokens, which the host hears of when it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stateline import state
from stateline.checks import fail
from stateline.generation import device_sampling
from stateline.generation.device_sampling import HALF, READY, Plan
from stateline.generation.request import Request
from stateline.generation.sampling import GeneratedToken, SamplingConfig
from stateline.ops import cuda

if TYPE_CHECKING:
    from stateline.models import LanguageModel

Drawn = list[GeneratedToken | Exception | None]
#: Steps that are launched before the tokens of an earlier one are looked at, on a device.
BEHIND = 1
WARM_UP = 2
#: Tokens that a penalty may look back at on a device, where there is room for them in every row; or as many as ids.
LONGEST = 2**16


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; nobody waits for the copy."""
    return values.to(device) if device.type != "cuda" else values.pin_memory().to(device, non_blocking=True)


class Rows:
    """A tree of tensors with a row a slot, which are never allocated anew: graphs know their addresses."""

    def __init__(self, **tree: Any) -> None:
        self.tree = tree
        self._views: dict[int, Any] = {}

    def view(self, b: int) -> Any:
        """The first b rows; the same tensors every time."""
        if b not in self._views:
            self._views[b] = pytree.tree_map(lambda x: x[:b], self.tree)
        return self._views[b]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put another tensor in place of one, of another size."""
        self.tree[name] = tensor
        self._views.clear()

    def put(self, index: Tensor, **values: Any) -> None:
        """Write rows: `values` has one for each of `index` (n), distinct."""
        for name, value in values.items():
            for own, new in zip(pytree.tree_leaves(self.tree[name]), pytree.tree_leaves(value), strict=True):
                own.index_copy_(0, index, new)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows over others, each (source, target); no target is a source.

        Tensors of one dtype go together: one kernel for all of them, where one each would take milliseconds.
        """
        leaves = pytree.tree_leaves(self.tree)
        for dtype in {x.dtype for x in leaves}:
            same = [x for x in leaves if x.dtype == dtype and x.numel()]
            targets = [x[target] for x in same for _, target in moves]
            torch._foreach_copy_(targets, [x[source] for x in same for source, _ in moves])


class HostSlots:
    """Slots whose tokens are drawn on the host, by each request's own sampler, as in a `Stream`."""

    behind = 0
    #: Any number of rows is computed at its own cost; a graph serves one.
    exact = True

    def __init__(self, model: LanguageModel, memory: Any, ids: Tensor, v: int) -> None:
        """memory: the state of all slots.   ids: (slots) of the last tokens.   v: ids that may be drawn."""
        self._model, self._v = model, v
        self.rows = Rows(state=memory, ids=ids)

    def check(self, config: SamplingConfig) -> None:
        """Every way to draw is possible here."""

    def put(self, rows: Sequence[int], memory: Any, requests: Sequence[Request]) -> None:
        """Place requests, whose prompts were read, in rows; memory: their states."""
        device = self.rows.tree["ids"].device
        pending = torch.tensor([request.unread[-1] for request in requests])
        self.rows.put(upload(torch.tensor(rows), device), state=memory, ids=upload(pending, device))

    def launch(self, b: int, requests: Sequence[Request | None]) -> Callable[[], Drawn]:
        """A step of the first b rows. What comes back says what was drawn, where there is a request."""
        view = self.rows.view(b)
        logits = self._model.step_(view["ids"], view["state"])[:, : self._v]
        drawn = [None if request is None else _drawn(request, logits[i]) for i, request in enumerate(requests)]
        view["ids"].copy_(torch.tensor([token.id if isinstance(token, GeneratedToken) else 0 for token in drawn]))
        return lambda: drawn

    def capture(self, b: int, configs: Sequence[SamplingConfig]) -> None:
        """Nothing can be prepared here."""


def _drawn(request: Request, logits: Tensor) -> GeneratedToken | Exception:
    try:
        return request.sampler.draw(logits)
    except ValueError as error:  # the request's end, not the engine's
        return error


class DeviceSlots:
    """Slots whose tokens are drawn where the logits are, from the random numbers that the host would take."""

    behind = BEHIND
    exact = False

    def __init__(self, model: LanguageModel, memory: Any, ids: Tensor, v: int, graphs: bool) -> None:
        """memory, ids, v: as for `HostSlots`.   graphs: capture a step of each kind and replay it, on CUDA."""
        self._model, self._v, self._graphs = model, v, graphs
        self._device = ids.device
        made = device_sampling.new_rows(len(ids), 0)
        out = torch.zeros(len(ids), 2, dtype=torch.float64)
        self.rows = Rows(
            state=memory, ids=ids, **{n: x.to(ids.device) for n, x in made.items()}, out=out.to(ids.device)
        )
        self._told = [torch.empty_like(out, pin_memory=self._device.type == "cuda") for _ in range(BEHIND + 2)]
        self._turn = 0
        self._captured: dict[tuple[int, Plan], torch.cuda.CUDAGraph] = {}
        self._reads: tuple[Any, ...] = ()  # where graphs read the model
        names = [name.rpartition(".") for name, _ in model.named_parameters()]
        self._ends = [(model.get_submodule(module), name) for module, _, name in (names[0], names[-1])]
        # A step is warmed up and captured on this stream, which belongs to these slots. Kernels may keep scratch memory
        # for each stream (`ops.decode_token` does): so the warm-up makes it, outside the memory of any graph, and
        # another engine's graphs have their own. (Torch gives out 32 streams a device in turn: of more engines than
        # that, those that share one must not run at once.) Torch's default stream for captures serves the whole
        # process, and lies on the device of the first capture.
        self._aside = torch.cuda.Stream(self._device) if graphs else None
        self._planned: tuple[list[Request | None], Plan] | None = None

    def check(self, config: SamplingConfig) -> None:
        """Raise ValueError for a penalty that looks back further than there is room for."""
        longest = max(LONGEST, self._v)
        if device_sampling.width_for(config, self._v) > longest:
            problem = f"repetition_window is {config.repetition_window}, on a device it is at most {longest} tokens."
            raise fail("Engine", problem, "Take less, or None to look at the whole text.")

    def put(self, rows: Sequence[int], memory: Any, requests: Sequence[Request]) -> None:
        """As in `HostSlots`; a row of the sampler for each request, too."""
        self._make_room(max(device_sampling.width_for(r.sampler.config, self._v) for r in requests))
        width = self.rows.tree["recent"].shape[1]
        made = []
        for request in requests:
            sampler, request.numbers = request.sampler, torch.Generator()
            request.numbers.set_state(sampler.generator.get_state())  # the sampler itself stays where the text is
            uniforms = torch.rand(READY, dtype=torch.float64, generator=request.numbers)
            made.append(device_sampling.row(sampler.config, sampler.history, uniforms, self._v, width))
        values = {name: torch.cat([row[name] for row in made]) for name in made[0]}
        values["ids"] = torch.tensor([request.unread[-1] for request in requests])
        index = upload(torch.tensor(rows), self._device)
        self.rows.put(index, state=memory, **{name: upload(x, self._device) for name, x in values.items()})

    def launch(self, b: int, requests: Sequence[Request | None]) -> Callable[[], Drawn]:
        """As in `HostSlots`; what comes back waits for this step only."""
        self._refill(requests)
        self._run(b, self._plan(requests))
        told = self._told[self._turn % len(self._told)][:b]
        self._turn += 1
        told.copy_(self.rows.tree["out"][:b], non_blocking=True)
        done = torch.cuda.Event() if self._device.type == "cuda" else None
        if done is not None:
            done.record()

        def fetch() -> Drawn:
            if done is not None:
                done.synchronize()
            drawn: Drawn = [GeneratedToken(int(token), logprob) for token, logprob in told.tolist()]
            for request, token in zip(requests, drawn, strict=True):
                if request is not None and request.options.keep and isinstance(token, GeneratedToken) and token.id >= 0:
                    request.sampler.repeat(token.id, random=not request.sampler.config.greedy)
            return drawn

        return fetch

    def capture(self, b: int, configs: Sequence[SamplingConfig]) -> None:
        """Have a graph ready for steps of b rows that are drawn so."""
        for config in configs:
            self.check(config)
        self._make_room(max(device_sampling.width_for(config, self._v) for config in configs))
        plan = device_sampling.plan_for(configs, self._v)
        if self._graphs:
            self._graph(b, plan)

    def _graph(self, b: int, plan: Plan) -> torch.cuda.CUDAGraph:
        """The graph of such a step, captured unless there is one that reads the model where it is now."""
        if self._captured and self._reads != self._places():
            self._forget()
        if (b, plan) not in self._captured:
            self._capture(b, plan)
        return self._captured[b, plan]

    def _places(self) -> tuple[Any, ...]:
        """What shows that a model's tensors are where graphs read them, in a few microseconds.

        What a packed model's step reads is made anew after weights were loaded or tensors moved, and is kept from being
        freed here; of the model's own, the first and the last tell.
        """
        network = getattr(getattr(self._model, "token_step", None), "network", None)  # a `decode.TokenStep`, if any
        ends = (getattr(module, name).data_ptr() for module, name in self._ends)
        return network, network is None or network.at_home(), *ends

    def _forget(self) -> None:
        """Drop the graphs, which read or write tensors that are no more."""
        if self._captured:
            torch.cuda.synchronize()
            self._captured.clear()

    def _capture(self, b: int, plan: Plan) -> None:
        """Capture a step, which is tried on copies first: the rows stay as they are."""
        assert self._aside is not None
        copies = state.clone(self.rows.view(b))
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            for _ in range(WARM_UP):
                self._step(copies, plan)
        torch.cuda.current_stream().wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._captured.values())).pool() if self._captured else None
        try:
            with cuda.capture(graph, self._aside, pool):
                self._step(self.rows.view(b), plan)
        except RuntimeError as error:
            problem = f"a step of this model cannot be captured as a CUDA graph: {error}"
            raise fail("Engine", problem, "Take graphs=False.", error=RuntimeError) from error
        self._captured[b, plan], self._reads = graph, self._places()

    def _run(self, b: int, plan: Plan) -> None:
        if self._graphs:
            self._graph(b, plan).replay()
        else:
            self._step(self.rows.view(b), plan)

    def _step(self, view: Any, plan: Plan) -> None:
        logits = self._model.step_(view["ids"], view["state"])[:, : self._v]
        out = device_sampling.draw(logits, view, plan)
        view["out"].copy_(out)
        view["ids"].copy_(out[:, 0].clamp(min=0))

    def _plan(self, requests: Sequence[Request | None]) -> Plan:
        if self._planned is None or self._planned[0] != requests:
            configs = [request.sampler.config for request in requests if request is not None]
            self._planned = list(requests), device_sampling.plan_for(configs, self._v)
        return self._planned[1]

    def _refill(self, requests: Sequence[Request | None]) -> None:
        """Random numbers in place of the half that was used up, before the other half is."""
        for row, request in enumerate(requests):
            if request is None or request.numbers is None or not request.launched or request.launched % HALF:
                continue
            start = (request.launched - HALF) % READY
            numbers = torch.rand(HALF, dtype=torch.float64, generator=request.numbers)
            self.rows.tree["uniforms"][row, start : start + HALF].copy_(upload(numbers, self._device))

    def _make_room(self, width: int) -> None:
        """Columns for the recent ids of a penalty that looks further back than any before."""
        if width > self.rows.tree["recent"].shape[1]:
            self._forget()
            self.rows.replace("recent", device_sampling.widened(self.rows.tree, width))
