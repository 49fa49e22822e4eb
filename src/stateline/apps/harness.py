"""lm-evaluation-harness on models of ours: what texts have in common is read once, and its state forked.

>>> import stateline
>>> model = stateline.load("bundled")
>>> likely, unlikely = log_likelihoods(model, [(list(b"The Unit"), list(b"ed")), (list(b"The Unit"), list(b"zz"))])
>>> likely.logprob > unlikely.logprob
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import checks
from stateline import state as states
from stateline.generation import SamplingConfig, Tokenizer, generate
from stateline.generation.stream import default_tokenizer, device_of, no_tokenizer, opening
from stateline.models import LanguageModel
from stateline.models.score import CHUNK, Span, score

__all__ = ["Likelihood", "harness_model", "log_likelihoods"]

OP = "harness"
#: Continuations of one context that are read together.
FORKS = 64
MAX_TOKENS = 256  # generated where a task does not say
#: gen_kwargs of tasks that we obey, besides until, max_gen_toks and do_sample.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class Likelihood(NamedTuple):
    """logprob: of a continuation, in nats.   greedy: whether each of its tokens was the most likely one."""

    logprob: float
    greedy: bool


Pair = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, pairs: Sequence[Pair], done: Callable[[int], object] = lambda _: None
) -> list[Likelihood]:
    """How likely each continuation is after its context; ids, in the order of `pairs` of (context, continuation).

    Contexts are taken in alphabetical order, so that what follow each other share beginnings: each token of a shared
    beginning is read once, however many contexts and continuations go on from it. `done` is called with the number of
    pairs finished.

    Raises ValueError if a context is empty: something has to predict the first token.
    """
    if any(not len(context) for context, _ in pairs):
        raise checks.fail(OP, "a context is empty.", "Start it with the vocabulary's start id.")
    found: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: tuple(pairs[i][0]))
    groups = [(context, list(rows)) for context, rows in groupby(order, key=lambda i: tuple(pairs[i][0]))]
    contexts = _read_in_order(model, [context for context, _ in groups])
    for (logits, state), (_, rows) in zip(contexts, groups, strict=True):
        for at in range(0, len(rows), FORKS):
            some = rows[at : at + FORKS]
            for i, answer in zip(some, _continue(model, logits, state, [pairs[i][1] for i in some]), strict=True):
                found[i] = answer
            done(len(some))
    return [answer for answer in found if answer is not None]


def _read_in_order(model: LanguageModel, contexts: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, Any]]:
    """(logits (v) after the last token, state) of each, from memories of the beginnings that earlier ones had too."""
    kept: list[tuple[int, Tensor | None, Any]] = [(0, None, None)]
    for context, places in zip(contexts, _branches(contexts), strict=True):
        at, logits, state = kept[-1]
        for stop in [place for place in places if place > at] + [len(context)]:
            while at < stop:
                piece = context[at : min(stop, at + CHUNK)]
                ids = torch.tensor([piece], device=device_of(model))
                given = model.init_state(1, device=ids.device) if state is None else state
                logits, state = model.extend(ids, given, last_only=True)
                at += len(piece)
            if stop in places and stop > kept[-1][0]:
                kept.append((stop, logits, state))
        assert logits is not None  # no context is empty
        yield logits[0], state
        while kept[-1][0] > (places[-1] if places else 0):  # no later one begins like that
            kept.pop()


def _branches(contexts: list[tuple[int, ...]]) -> list[list[int]]:
    """For each of the sorted contexts the lengths of beginnings, rising, that later ones share with it."""
    found: list[list[int]] = [[]]
    for context, following in zip(contexts[-2::-1], contexts[:0:-1], strict=True):
        shared = _common(context, following)
        found.append([place for place in found[-1] if place < shared] + [shared] * (shared > 0))
    return found[::-1][: len(contexts)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _continue(model: LanguageModel, logits: Tensor, state: Any, tails: list[Sequence[int]]) -> Iterator[Likelihood]:
    """The likelihood of each tail after one state, which has given `logits` (v) for their first tokens."""
    lengths = [max(len(tail) - 1, 0) for tail in tails]  # the last token is no input
    after = logits.new_zeros(len(tails), 0, len(logits))
    if max(lengths):
        ids = torch.zeros(len(tails), max(lengths), dtype=torch.int64)
        for row, tail, length in zip(ids, tails, lengths, strict=True):
            row[:length] = torch.tensor(list(tail[:length]))
        forks = states.index(state, [0] * len(tails))
        after, _ = model.extend(ids.to(logits.device), forks, lengths=torch.tensor(lengths, device=logits.device))
    for row, tail in zip(after, tails, strict=True):
        before = torch.cat([logits[None], row[: max(len(tail) - 1, 0)]])[: len(tail)].float()
        targets = torch.tensor(list(tail), dtype=torch.int64, device=before.device)
        nats = F.cross_entropy(before, targets, reduction="sum") if len(tail) else before.new_zeros(())
        yield Likelihood(-float(nats), bool((before.argmax(-1) == targets).all()))


class _Ids(list[int]):
    """Tokens as `score` reads them."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop)."""
        return np.array(self[start:stop], dtype=np.int64)


def harness_model(model: LanguageModel, tokenizer: Tokenizer | None = None) -> Any:
    """The model as lm-evaluation-harness wants it (a `TemplateLM`), for `lm_eval.simple_evaluate(model=…)`.

    tokenizer: None means bytes for a model of 256 ids; others need `load_tokenizer`.

    Raises ImportError naming the extra `eval`, ValueError if the vocabulary says neither how texts start nor end.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError(f"{OP}: lm-evaluation-harness is missing. pip install 'stateline[eval]'") from error
    known = default_tokenizer(model, tokenizer)
    if known is None:
        raise no_tokenizer()
    words: Tokenizer = known
    start = words.start if words.start is not None else words.end
    if start is None:
        raise checks.fail(OP, "the vocabulary has no start id and no end id.", "Name one in tokenizer_config.json.")
    first: int = start

    class Harness(TemplateLM):
        tokenizer_name = type(words).__name__

        @property
        def eot_token_id(self) -> int:
            return first if words.end is None else words.end

        @property
        def prefix_token_id(self) -> int:
            return first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return words.encode(string)

        def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
            pairs = [(_opened(words, context, first), tail) for _, context, tail in requests]
            with _bar(len(pairs), disable_tqdm) as bar:
                answers = [tuple(answer) for answer in log_likelihoods(model, pairs, bar.update)]
            for (texts, _, _), answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            spans = [_span(_opened(words, [first], first) + words.encode(r.args[0]), words) for r in requests]
            sums = {id(span): 0.0 for span in spans}
            with _bar(len(spans), disable_tqdm) as bar:
                for part in score(model, spans):
                    sums[id(part.span)] -= float(part.nats().double().sum())
                    bar.update(part.first + len(part.targets) == part.span.stop)
            for request, span in zip(requests, spans, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[id(span)])
            return [sums[id(span)] for span in spans]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = []
            with _bar(len(requests), disable_tqdm) as bar:
                for request in requests:
                    context, options = request.args
                    texts.append(_generate(model, words, context, options))
                    self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
                    bar.update(1)
            return texts

    return Harness()


def _opened(words: Tokenizer, context: Sequence[int], first: int) -> list[int]:
    """A context after what was put before every text in training, unless it is that already."""
    before = opening(words)
    return list(context) if list(context[: len(before)]) == before else before + list(context)


def _span(ids: list[int], words: Tokenizer) -> Span:
    given = max(len(opening(words)), 1)
    return Span(_Ids(ids), given - 1, len(ids))


def _generate(model: LanguageModel, words: Tokenizer, context: str, options: dict[str, Any]) -> str:
    """A text as a task asks for it: greedy unless it says otherwise."""
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    if not options.get("do_sample", chosen.get("temperature", 0) > 0):
        chosen["temperature"] = 0.0
    sampling = SamplingConfig(**chosen)
    limit = options.get("max_gen_toks", MAX_TOKENS)
    return "".join(generate(model, context, max_tokens=limit, sampling=sampling, stop=stop, tokenizer=words))


def _bar(total: int, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=disable, desc="requests")
