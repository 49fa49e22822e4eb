"""cross_entropy in Triton: a program takes a row, for the gradient a piece of one."""

import triton
import triton.language as tl


@triton.jit
def forward(logits, targets, loss, log_sum, classes, ignore, stride, C: tl.constexpr):
    """loss and log Σ exp of a row, in one pass: the largest number so far, and sums that follow it."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    logits += row * stride
    c = tl.arange(0, C)
    value = 0.0
    result = 0.0
    if target != ignore:
        top = -float("inf")
        total = tl.zeros((C,), tl.float32)
        first = 0
        while first < classes:  # not a range: the interpreter's numbers are no indices
            x = tl.load(logits + first + c, mask=first + c < classes, other=-float("inf")).to(tl.float32)
            highest = tl.maximum(top, tl.max(x, 0))
            shift = tl.where(highest == -float("inf"), 0.0, highest)
            total = total * tl.exp(top - shift) + tl.exp(x - shift)
            top = highest
            first += C
        value = tl.where(top == -float("inf"), 0.0, top) + tl.log(tl.sum(total, 0))
        inside = (target >= 0) & (target < classes)  # NaN for a target that is none: nothing is read beyond the row
        result = value - tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(loss + row, result)
    tl.store(log_sum + row, value)


@triton.jit
def backward(dloss, logits, log_sum, targets, dlogits, classes, width, ignore, stride, C: tl.constexpr):
    """The gradient of C columns of a row; those beyond `classes` have none."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    target = tl.load(targets + row).to(tl.int64)
    live = (c < classes) & (target != ignore)
    x = tl.load(logits + row * stride + c, mask=live, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(log_sum + row)) - tl.where(c == target, 1.0, 0.0)
    grad = tl.where(live, p * tl.load(dloss + row), 0.0)
    tl.store(dlogits + row * width + c, grad.to(dlogits.dtype.element_ty), mask=c < width)
