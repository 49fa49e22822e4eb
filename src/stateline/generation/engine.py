"""Many texts at once, for as long as they come: prompts are read while others are written, in constant memory.

>>> import stateline
>>> engine = stateline.Engine(stateline.load("bundled"), max_batch=8)
>>> texts = engine.generate(["My fellow citizens", "War"], max_tokens=8)
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stateline import checks, state
from stateline.checks import fail
from stateline.generation.prompt import Prompt, pieces
from stateline.generation.request import Event, Options, Request, beginning, configs
from stateline.generation.sampling import SamplingConfig
from stateline.generation.slots import DeviceSlots, Drawn, HostSlots, upload
from stateline.generation.stream import (
    CHUNK,
    DEFAULT,
    Stream,
    check_max_tokens,
    default_tokenizer,
    device_of,
    no_tokenizer,
    stream_at,
    vocabulary,
)
from stateline.generation.text import stop_strings
from stateline.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stateline.models import LanguageModel

OP = "Engine"
#: Where requests queue, this part of all rows is filled at once, unless it does not come free within so many steps.
GROUP, PATIENCE = 8, 16
Flight = tuple[list[Request | None], Callable[[], Drawn]]


class Engine:
    """Writes many texts with one model, each as `generate` would write it alone.

    `add` requests at any time, also while `run` tells what happens; `cancel` those no longer wanted. Each step reads at
    most `chunk` tokens of prompts and draws a token for every text that is being written, so a long prompt delays the
    others by no more than a chunk a token. A request that fails (a file that cannot be read, NaN in its logits) ends
    with reason "error" and harms no other.

    On the CPU tokens are drawn on the host. On CUDA a step is a captured graph, sampling included, and the host looks
    at tokens one step later, so that the device never waits; a text that turns out to have ended is dropped then. Both
    take the same random numbers: a seed gives the same text in any batch, apart from the last bits of matrix products.

    `add` and `cancel` may be called from other threads than the one that steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch: int = 64,
        tokenizer: Tokenizer | None = None,
        chunk: int = CHUNK,
        deterministic: bool = False,
        graphs: bool | None = None,
        context: int | None = None,
    ) -> None:
        """An engine without requests; the states of `max_batch` texts are allocated here, and no more later.

        max_batch: texts that are written at once; further requests wait.
        tokenizer: None means bytes for a model of 256 ids, ids alone for others.
        chunk: prompt tokens a step, of all prompts together, padding included.
        deterministic: every step computes all `max_batch` rows and prompts are read one by one, so that a text has the
            same bits alone and among any others. Costs time where fewer texts are written.
        graphs: capture steps as CUDA graphs; None: where the model is on CUDA.
        context: tokens that a text may have, prompt included, for layers whose state grows; texts end there.

        Raises ValueError or TypeError naming the argument.
        """
        checks.number(OP, "max_batch", max_batch, low=1, integer=True)
        checks.number("generate", "chunk", chunk, low=1, integer=True)
        if context is not None:
            checks.number(OP, "context", context, low=1, integer=True)
        self.model = model
        self.tokenizer = default_tokenizer(model, tokenizer)
        self.max_batch, self.chunk, self.deterministic = max_batch, chunk, bool(deterministic)
        self._context, self._device = context, device_of(model)
        self._slots = self._new_slots(graphs)
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._reading: list[Request] = []
        self._rows: list[Request | None] = [None] * max_batch
        self._flying: deque[Flight] = deque()
        self._events: deque[Event] = deque()
        self._held = 0  # steps that free rows have waited for others
        self._torn = False

    def _new_slots(self, graphs: bool | None) -> HostSlots | DeviceSlots:
        on_cuda = self._device.type == "cuda"
        if graphs and not on_cuda:
            raise fail(OP, f"graphs is True and the model is on {self._device}.", "Only CUDA devices capture graphs.")
        v = vocabulary(self.model, self.tokenizer)
        with torch.inference_mode(False), torch.no_grad():
            memory, ids = self._new_state(self.max_batch), torch.zeros(self.max_batch, dtype=torch.int64)
            if on_cuda:
                return DeviceSlots(self.model, memory, ids.to(self._device), v, graphs is not False)
            return HostSlots(self.model, memory, ids.to(self._device), v)

    def add(
        self,
        prompt: Prompt = (),
        *,
        max_tokens: int | None = 256,
        sampling: SamplingConfig | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        after: Stream | None = None,
        keep: bool = False,
    ) -> Request:
        """Ask for a text that continues `prompt`; it is written by `step` or `run`.

        Args:
            prompt, max_tokens, stop, ignore_end: as for `generate`. max_tokens 0 only reads the prompt.
            sampling: None takes the stream's where there is one, else the defaults.
            after: go on from this stream, which stays as it is: a prefix is read once and serves many.
            keep: leave a `Stream` in `request.stream` that goes on where the text ends. On CUDA the device then waits
                for the host at every token while such a request is written.

        Raises ValueError or TypeError naming the argument; what lies in a file or is still to be encoded is looked at
        later and ends the request with an error.
        """
        request = self._request(prompt, max_tokens, sampling, stop, ignore_end, after, keep, self._events)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next step, wherever it is; nothing happens to one that has ended.

        Raises ValueError for a request of another engine.
        """
        if request.told is not self._events:
            raise fail("cancel", "request is of another engine.", "Cancel it with the engine whose `add` gave it.")
        self._cancelled.append(request)

    def prepare(self, *sampling: SamplingConfig) -> None:
        """Capture the graphs of every batch size for texts drawn so, which would else be done when first needed.

        Several configurations: for texts of all of them together, and texts of each alone. Without graphs nothing
        happens.
        """
        wanted = sampling or (DEFAULT,)
        sizes = [self.max_batch] if self.deterministic else [1 << i for i in range(self.max_batch.bit_length())]
        with torch.no_grad(), self._current():
            for size in {*sizes, self.max_batch}:
                for together in (wanted, *((config,) for config in wanted)):
                    self._slots.capture(size, together)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        working = self._waiting or self._cancelled or self._reading or self._flying or self._events
        return bool(working) or any(self._rows)

    def step(self) -> list[Event]:
        """Read at most a chunk of prompts, draw one token a text, and tell what has happened; [] with nothing to do.

        Raises what the model raises; after that, or after an interrupt inside it, the engine is of no more use.
        """
        self._step()
        events = list(self._events)
        self._events.clear()
        return events

    def run(self) -> Iterator[Event]:
        """Step until every request has ended, also those added meanwhile. Leaving the loop loses nothing.

        What happens to the prompts of a `stream` is told there.
        """
        while self.busy:
            while self._events:
                yield self._events.popleft()
            self._step()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        sampling: SamplingConfig | Sequence[SamplingConfig] = DEFAULT,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
    ) -> list[str]:
        """The texts that continue `prompts`, each what `stateline.generate` gives for it alone with its own seed.

        sampling: one configuration a prompt, or one for all, whose seed s then becomes s, s + 1, … from row to row.
        The other arguments as for `stateline.generate`. Raises what a request ended with; then the others are dropped.
        """
        checks.number("generate", "max_tokens", max_tokens, low=0, integer=True)
        each = configs("Engine.generate", prompts, sampling)
        texts = [""] * len(prompts)
        for row, piece in self.stream(prompts, max_tokens=max_tokens, sampling=each, stop=stop, ignore_end=ignore_end):
            texts[row] += piece
        return texts

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None = 256,
        sampling: SamplingConfig | Sequence[SamplingConfig] = DEFAULT,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """Pieces of the texts that continue `prompts`, as (row, piece); arguments as for `generate`.

        They are queued at the call, and share the engine with whatever else it is asked. Leaving the loop cancels them.
        """
        each = configs("Engine.stream", prompts, sampling)
        if self.tokenizer is None:
            raise no_tokenizer()
        told: deque[Event] = deque()
        requests = [
            self._request(prompt, max_tokens, config, stop, ignore_end, None, False, told)
            for prompt, config in zip(prompts, each, strict=True)
        ]
        pieces = self._pieces(requests, told)
        next(pieces)  # so that its requests are queued now, and cancelled should nobody look at it
        return pieces

    def _pieces(self, requests: list[Request], told: deque[Event]) -> Iterator[tuple[int, str]]:
        row_of = {request: row for row, request in enumerate(requests)}
        left = len(requests)
        self._waiting.extend(requests)
        try:
            yield 0, ""
            while left:
                if not told:
                    self._step()
                    continue
                event = told.popleft()
                left -= event.reason is not None
                if event.request.error is not None:
                    raise event.request.error
                if event.text:
                    yield row_of[event.request], event.text
        finally:
            self._cancelled.extend(request for request in requests if request.reason is None)

    def _request(
        self,
        prompt: Prompt,
        max_tokens: int | None,
        sampling: SamplingConfig | None,
        stop: str | Sequence[str],
        ignore_end: bool,
        after: Stream | None,
        keep: bool,
        told: deque[Event],
    ) -> Request:
        check_max_tokens(max_tokens)
        stops = stop_strings(stop)
        if stops and self.tokenizer is None:
            raise no_tokenizer()
        ids = pieces(prompt, self.tokenizer, self.model.config.vocab_size, self.chunk)
        sampler, start = beginning(after, sampling, self.model, self._slots.rows.tree["state"])
        self._slots.check(sampler.config)
        end = None if ignore_end else getattr(self.tokenizer, "end", None)
        options = Options(max_tokens, end, stops, bool(keep), self._context)
        return Request(next(self._numbers), ids, sampler, options, self.tokenizer, start, told)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._torn:
            problem = "it was interrupted inside a step, so its states are neither before nor after it."
            raise fail(OP, problem, "Make a new engine and add the requests again.")
        self._torn = True
        with torch.no_grad(), self._current():
            self._drop()
            self._read()
            # A stream that is kept goes on where its text is, so no state may be ahead of what was told. The last step
            # of a text has left its row already, and is still under way.
            launched = self._launch()
            waits = not launched or any(r is not None and r.options.keep for step, _ in self._flying for r in step)
            while len(self._flying) > (0 if waits else self._slots.behind):
                self._look()
        self._torn = False

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """The model's device is the one that kernels are launched on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _drop(self) -> None:
        """End what was cancelled; where it still waits or is read, it is left out when its turn comes."""
        while self._cancelled:
            request = self._cancelled.popleft()
            if request.reason is None:
                self._end(request.cancel())

    def _read(self) -> None:
        """Let the model read the next of the prompts, and place those that are read in rows."""
        if not self._waiting and not self._reading:
            return
        self._reading = [request for request in self._reading if request.reason is None]
        self._begin(self._next())
        batch = self._reading[: 1 if self.deterministic else self.chunk]
        given: dict[Request, list[int]] = {}
        for request in batch:
            try:
                given[request] = request.read(max(1, self.chunk // len(batch)))
            except Exception as error:  # its prompt is at fault: the others go on
                self._end(request.fail(error))
        self._extend({request: ids for request, ids in given.items() if ids})
        ready = [request for request in given if request.ready and request.reason is None]
        self._reading = [request for request in self._reading if request not in ready]
        self._place(ready)

    def _next(self) -> list[Request]:
        """Those of the waiting whose turn it is: as many as there are free rows.

        While more wait than can be served, a few rows are left free for a few steps, until there is a group to read
        together: a call of the model for one short prompt takes as long as several steps of all texts.
        """
        free = self.max_batch - len(self._reading) - self._occupied
        new: list[Request] = []
        if 0 < free < min(self.max_batch // GROUP, len(self._waiting)) and self._occupied and self._held < PATIENCE:
            self._held += 1
            return new
        self._held = 0
        while self._waiting and len(new) < free:
            request = self._waiting.popleft()
            if request.reason is None:
                new.append(request)
        return new

    def _begin(self, requests: list[Request]) -> None:
        """New requests, from their streams' states or from the beginning."""
        fresh = [request for request in requests if request.part is None]
        for group in [[request] for request in fresh] if self.deterministic else [fresh] if fresh else []:
            memory = self._new_state(len(group))
            for at, request in enumerate(group):
                request.part = (memory, at)
        self._reading += requests

    def _extend(self, given: dict[Request, list[int]]) -> None:
        """One call of the model for some ids of several prompts, padded right."""
        if not given:
            return
        lengths = [len(ids) for ids in given.values()]
        longest = max(lengths)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in given.values()])
        known = None if min(lengths) == longest else upload(torch.tensor(lengths), self._device)
        try:
            before = self._gathered(list(given))
            _, after = self.model.extend(upload(padded, self._device), before, lengths=known, last_only=True)
        except Exception as error:  # what was read before is unchanged, and so are all rows
            for request in given:
                self._end(request.fail(error))
            return
        for at, request in enumerate(given):
            request.part = (after, at)

    def _gathered(self, requests: list[Request]) -> Any:
        """The states of prompts that are being read, as one."""
        parts = [request.part for request in requests if request.part is not None]
        found = []
        for _, group in itertools.groupby(parts, key=lambda part: id(part[0])):
            members = list(group)
            memory, rows = members[0][0], [at for _, at in members]
            whole = rows == list(range(_rows_of(memory)))
            found.append(memory if whole else state.index(memory, upload(torch.tensor(rows), self._device)))
        return found[0] if len(found) == 1 else state.stack(found)

    def _place(self, ready: list[Request]) -> None:
        """Prompts that are read become texts that are written."""
        for request in [request for request in ready if request.limit == 0]:
            ready.remove(request)
            self._end(request.fill())
        if not ready:
            return
        free = [row for row, request in enumerate(self._rows) if request is None][: len(ready)]
        self._slots.put(free, self._gathered(ready), ready)
        for row, request in zip(free, ready, strict=True):
            request.row, request.part, self._rows[row] = row, None, request

    def _launch(self) -> bool:
        """Draw a token for every text that is being written; whether there was one."""
        if not self._occupied:
            return False
        requests = self._rows[: self._compact()]
        self._flying.append((requests, self._slots.launch(len(requests), requests)))
        for request in requests:
            if request is not None:
                request.launched += 1
                if request.launched == request.limit:  # its row is free, though its last token is still to be seen
                    self._release(request)
        return True

    def _compact(self) -> int:
        """How many rows a step computes, after texts were moved into free ones among those."""
        count = self._occupied
        if self.deterministic:
            return self.max_batch
        size = count if self._slots.exact else min(self.max_batch, 1 << (count - 1).bit_length())
        free = (row for row in range(size) if self._rows[row] is None)
        moves = [(row, next(free)) for row in range(size, self.max_batch) if self._rows[row] is not None]
        if moves:
            self._slots.rows.move(moves)
        for source, target in moves:
            request = self._rows[target] = self._rows[source]
            self._rows[source] = None
            if request is not None:
                request.row = target
        return size

    def _look(self) -> None:
        """Tell of the oldest step that was not looked at."""
        requests, fetch = self._flying.popleft()
        for request, drawn in zip(requests, fetch(), strict=True):
            if request is None or drawn is None or request.reason is not None:
                continue
            event = request.take(drawn)
            if event.reason is None:
                request.told.append(event)
            else:
                self._end(event)

    def _release(self, request: Request) -> None:
        """Free a text's row; its state is kept aside if that was wanted."""
        if request.row is not None:
            if request.options.keep:
                request.part = (state.index(self._slots.rows.tree["state"], slice(request.row, request.row + 1)), 0)
            self._rows[request.row] = None
            request.row = None

    def _end(self, event: Event) -> None:
        request = event.request
        self._release(request)
        if request.options.keep and request.error is None and request.part is not None and request.ready:
            memory = self._gathered([request])
            config, tokenizer = request.sampler.config, self.tokenizer
            request.stream = stream_at(request.moment(memory), self.model, config, tokenizer, self.chunk)
        request.part = request.numbers = None
        request.told.append(event)

    @property
    def _occupied(self) -> int:
        return self.max_batch - self._rows.count(None)

    def _new_state(self, b: int) -> Any:
        return self.model.init_state(b) if self._context is None else self.model.init_state(b, max_tokens=self._context)


def _rows_of(memory: Any) -> int:
    return len(next(x for x in pytree.tree_leaves(memory) if isinstance(x, Tensor)))
