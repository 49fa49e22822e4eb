"""gated_rms_norm on a CPU: PyTorch's own operations, which are the reference's; layers gate inside `ssd` there."""

from stateline.ops.gated_rms_norm.reference import backward, forward

__all__ = ["backward", "forward"]
