"""Choosing tokens in Triton: what device_sampling defines, in three kernels, and nine more for a filter that searches.

A row's ids are cut into blocks of C, nb of them. Programs are (block, row); those that end a row are (row). What passes
between kernels lies in small tables with a line a block. Settings, counters: the columns of device_sampling.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))


@triton.jit
def _scores(x, row, v, x_row, block, C: tl.constexpr):
    """A block of a row in float32, -inf behind its end."""
    c = block * C + tl.arange(0, C)
    return tl.load(x + row.to(tl.int64) * x_row + c, mask=c < v, other=float("-inf")).to(tl.float32)


@triton.jit
def _key(x, scores, NARROW: tl.constexpr):
    """Whole numbers in the order of floats, both zeros one. NARROW: of 16 bits, as what `scores` points to."""
    if NARROW:
        bits = (x + 0.0).to(scores.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key


@triton.jit
def _number(key, scores, NARROW: tl.constexpr):
    """The float that has a key."""
    if NARROW:
        bits = (key ^ ((key >> 31) & 0x7FFF)).to(tl.int16)
        number = bits.to(scores.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        number = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _weight(x, highest, temperature):
    return tl.exp((x.to(tl.float64) - highest.to(tl.float64)) / temperature)


@triton.jit
def _line(table, row, nb, other, NB: tl.constexpr):
    """A number a block of a row."""
    i = tl.arange(0, NB)
    return tl.load(table + row * nb + i, mask=i < nb, other=other)


@triton.jit
def penalise(logits, recent, settings, scores, v, x_row, s_row, width, W: tl.constexpr):
    """Lower the scores, which are the logits so far, of the ids in W columns of recent ones."""
    row, at = tl.program_id(1), tl.program_id(0) * W + tl.arange(0, W)
    ids = tl.load(recent + row.to(tl.int64) * width + at, mask=at < width, other=0)
    live = (at < width) & (ids < v)
    lately = tl.load(logits + row.to(tl.int64) * x_row + ids, mask=live, other=0.0).to(tl.float32).to(tl.float64)
    penalty = tl.load(settings + row * 6 + 4)
    changed = tl.where(lately > 0, lately / penalty, lately * penalty)
    changed = tl.minimum(changed, 3.4028234663852886e38).to(tl.float32)
    tl.store(scores + row.to(tl.int64) * s_row + ids, changed, mask=live)  # an id in two columns gets one value twice


@triton.jit
def survey(logits, scores, highest, sums, best, place, v, x_row, s_row, nb, C: tl.constexpr):
    """Of a block: the highest logit (NaN if one is), the sum of exponentials below it, the best score and its id."""
    block, row = tl.program_id(0), tl.program_id(1)
    x = _scores(logits, row, v, x_row, block, C)
    most = tl.max(x, 0)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    level = tl.where(most > float("-inf"), most, 0.0)
    at = row * nb + block
    tl.store(sums + at, tl.sum(tl.exp(x - level).to(tl.float64), 0))
    tl.store(highest + at, tl.where(broken, float("nan"), most))
    s = _scores(scores, row, v, s_row, block, C)
    tl.store(best + at, tl.max(s, 0))
    tl.store(place + at, block * C + tl.argmax(s, 0, tie_break_left=True))


@triton.jit
def _steps(masses, row, nb, target, NB: tl.constexpr):
    """How many thresholds of a pass, its base aside, still reach the target."""
    i, j = tl.arange(0, NB)[:, None], tl.arange(0, 16)[None, :]
    lines = tl.load(masses + (row * nb + i) * 16 + j, mask=(i < nb) & (j < 16), other=0.0)
    return tl.sum(((tl.sum(lines, 0) >= target) & (tl.arange(0, 16) > 0)).to(tl.int32), 0)


@triton.jit
def _target(settings, first, row, nb, COUNT: tl.constexpr, NB: tl.constexpr):
    """k, or top_p of all that the first pass has found."""
    if COUNT:
        target = tl.load(settings + row * 6 + 1)
    else:
        i = tl.arange(0, NB)
        total = tl.sum(tl.load(first + (row * nb + i) * 16, mask=i < nb, other=0.0), 0)
        target = tl.load(settings + row * 6 + 2) * total
    return target


@triton.jit
def _measure(
    scores, best, settings, least, masses, base, row, block, v, s_row, nb, shift, COUNT: tl.constexpr,
    NARROW: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Fill a line of masses: of a block from each of 16 thresholds on."""
    s = _scores(scores, row, v, s_row, block, C)
    key = _key(s, scores, NARROW)
    live = block * C + tl.arange(0, C) < v
    top = tl.max(_line(best, row, nb, float("-inf"), NB), 0)
    if not COUNT:
        weight = _weight(s, top, tl.load(settings + row * 6))
        if least is not None:
            weight = tl.where(key >= tl.load(least + row), weight, 0.0)
    for j in tl.static_range(0, 16):
        reached = key >= base + (j << shift)
        if COUNT:
            mass = tl.sum((reached & live).to(tl.int32), 0).to(tl.float64)
        else:
            mass = tl.sum(tl.where(reached, weight, 0.0), 0)
        tl.store(masses + (row * nb + block) * 16 + j, mass)


@triton.jit(do_not_specialize=("shift",))
def search(
    scores, best, settings, least, first, before, masses, bases_before, bases, v, s_row, nb, shift, FIRST: tl.constexpr,
    COUNT: tl.constexpr, NARROW: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A pass of the search for the largest key from which on a row's weights (or ids, with COUNT) reach the target.

    Four bits a pass: thresholds are `1 << shift` apart. A block without any weight between the two thresholds that the
    pass before has found has the same mass from all of the new ones on.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    if FIRST:
        base = -32768 if NARROW else LEAST
        if block == 0:
            tl.store(bases + row, base)
        _measure(
            scores, best, settings, least, masses, base, row, block, v, s_row, nb, shift, COUNT, NARROW, NB, C
        )  # fmt: skip
    else:
        target = _target(settings, first, row, nb, COUNT, NB)
        steps = _steps(before, row, nb, target, NB)
        base = tl.load(bases_before + row) + (steps << (shift + 4))
        if block == 0:
            tl.store(bases + row, base)
        line = before + (row * nb + block) * 16
        here, beyond = tl.load(line + steps), tl.load(line + tl.minimum(steps + 1, 15))
        if (steps < 15) & (here == beyond):
            j = tl.arange(0, 16)
            tl.store(masses + (row * nb + block) * 16 + j, here + j * 0.0)
        else:
            _measure(
                scores, best, settings, least, masses, base, row, block, v, s_row, nb, shift, COUNT, NARROW, NB, C
            )  # fmt: skip


@triton.jit
def settle(settings, first, masses, bases, least, nb, COUNT: tl.constexpr, NB: tl.constexpr):
    """The key that a search ends with; the least of all where the row asks for no such filter."""
    row = tl.program_id(0)
    found = tl.load(bases + row) + _steps(masses, row, nb, _target(settings, first, row, nb, COUNT, NB), NB)
    if COUNT:
        asked = tl.load(settings + row * 6 + 1) > 0
    else:
        asked = tl.load(settings + row * 6 + 2) < 1
    tl.store(least + row, tl.where(asked, found, LEAST))


@triton.jit
def _kept(s, top, row, scores, settings, least, edge, NARROW: tl.constexpr):
    """Weights above the nucleus's edge, 0 elsewhere, and which scores lie on it."""
    key = _key(s, scores, NARROW)
    weight = _weight(s, top, tl.load(settings + row * 6))
    live = weight >= tl.load(settings + row * 6 + 3)  # min_p, of the likeliest one's 1
    if least is not None:
        live = live & (key >= tl.load(least + row))
    equal = key != key
    if edge is not None:
        limit = tl.load(edge + row)
        equal = live & (key == limit)
        live = live & (key > limit)
    return tl.where(live, weight, 0.0), equal


@triton.jit
def weigh(
    scores, best, settings, least, edge, above, equals, v, s_row, nb, NARROW: tl.constexpr, NB: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Of a block: the weight above the edge, and the number of ids on it."""
    block, row = tl.program_id(0), tl.program_id(1)
    top = tl.max(_line(best, row, nb, float("-inf"), NB), 0)
    s = _scores(scores, row, v, s_row, block, C)
    weight, equal = _kept(s, top, row, scores, settings, least, edge, NARROW)
    tl.store(above + row * nb + block, tl.sum(weight, 0))
    tl.store(equals + row * nb + block, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def _pick(
    scores, top, settings, least, edge, first, above, equals, uniform, row, v, s_row, nb, NARROW: tl.constexpr,
    NB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Inverse transform over the blocks, then inside of one."""
    i = tl.arange(0, NB)
    mass = _line(above, row, nb, 0.0, NB)
    each = mass * 0
    some = tl.zeros((NB,), tl.int32)
    if edge is not None:  # of the ids on the edge, the first that are needed to reach top_p
        count = _line(equals, row, nb, 0, NB)
        limit = tl.load(edge + row)
        each = each + _weight(_number(limit, scores, NARROW), top, tl.load(settings + row * 6))
        target = _target(settings, first, row, nb, False, NB)
        before = tl.sum(mass, 0)
        needed = tl.where(limit > LEAST, tl.floor((target - before) / tl.max(each, 0)), 0.0)
        needed += (before + needed * tl.max(each, 0) < target).to(tl.float64)
        needed = tl.minimum(tl.maximum(needed, 0.0), 2147483647.0).to(tl.int32)
        some = tl.minimum(tl.maximum(needed - (tl.cumsum(count, 0) - count), 0), count)
        mass += tl.where(some > 0, some.to(tl.float64) * each, 0.0)
    sums = tl.cumsum(mass, 0)
    total = tl.max(sums, 0)
    goal = tl.minimum(uniform * total, (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True))
    block = tl.minimum(tl.sum((sums <= goal).to(tl.int32), 0), nb - 1)
    before = tl.sum(tl.where(i == block - 1, sums, 0.0), 0)
    s = _scores(scores, row, v, s_row, block, C)
    weight, equal = _kept(s, top, row, scores, settings, least, edge, NARROW)
    if edge is not None:
        rank = tl.cumsum(equal.to(tl.int32), 0)
        here = tl.sum(tl.where(i == block, some, 0), 0)
        weight = tl.where(equal & (rank <= here), tl.max(each, 0), weight)
    inside = before + tl.cumsum(weight, 0)
    c = tl.arange(0, C)
    at = tl.sum((inside <= goal).to(tl.int32), 0)
    last = tl.max(tl.where(weight > 0, c, 0), 0)  # the block's sum may round above its cumulative one
    return block * C + tl.minimum(at, last)


@triton.jit
def finish(
    logits, scores, highest, sums, best, place, settings, counters, uniforms, recent, least, edge, first, above, equals,
    out, v, x_row, s_row, nb, width, READY: tl.constexpr, RANDOM: tl.constexpr, PENALTY: tl.constexpr,
    NARROW: tl.constexpr, NB: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The token of a row, its log-probability, and what the row remembers of it."""
    row = tl.program_id(0)
    levels = _line(highest, row, nb, float("-inf"), NB)
    most = tl.max(levels, 0)
    nan = tl.max((levels != levels).to(tl.int32), 0) > 0
    most = tl.where(nan, float("nan"), most)
    broken = nan | (most == float("inf")) | (most == float("-inf"))
    shares = tl.where(levels > float("-inf"), tl.exp(levels.to(tl.float64) - most.to(tl.float64)), 0.0)
    logz = most.to(tl.float64) + tl.log(tl.sum(_line(sums, row, nb, 0.0, NB) * shares, 0))
    tops = _line(best, row, nb, float("-inf"), NB)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, _line(place, row, nb, 2147483647, NB), 2147483647), 0)
    drawn = tl.load(counters + row * 3)
    if RANDOM:
        if tl.load(settings + row * 6 + 5) == 0:
            uniform = tl.load(uniforms + row * READY + drawn % READY)
            token = _pick(
                scores, top, settings, least, edge, first, above, equals, uniform, row, v, s_row, nb, NARROW, NB, C
            )  # fmt: skip
    token = tl.where(broken, 0, tl.minimum(token, v - 1))
    logprob = tl.load(logits + row.to(tl.int64) * x_row + token).to(tl.float32).to(tl.float64) - logz
    seen, window = tl.load(counters + row * 3 + 1), tl.load(counters + row * 3 + 2)
    tl.debug_barrier()  # every warp has read what one of them writes anew
    tl.store(out + row * 2, tl.where(broken, -1, token).to(tl.float64))
    tl.store(out + row * 2 + 1, tl.where(broken, most.to(tl.float64), logprob))
    tl.store(counters + row * 3, drawn + 1)
    if PENALTY:
        tl.store(counters + row * 3 + 1, seen + 1)
        start = 0
        while start < width:  # not a range: the interpreter's numbers are no indices
            at = start + tl.arange(0, W)
            own = (window > 0) & (at % tl.maximum(window, 1) == seen % tl.maximum(window, 1))
            own = own | ((window == 0) & (at == token))
            tl.store(recent + row.to(tl.int64) * width + at, (token + at * 0).to(tl.int64), mask=own & (at < width))
            start += W
