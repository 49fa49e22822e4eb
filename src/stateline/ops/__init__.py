"""Operations: each takes a state and gives one back, `y, state = op(…)`."""

from stateline.ops.causal_conv1d import causal_conv1d, causal_conv1d_step_
from stateline.ops.cross_entropy import cross_entropy
from stateline.ops.gated_scan import gated_scan, gated_scan_step_
from stateline.ops.kalman import kalman
from stateline.ops.kalman.smooth import kalman_smooth
from stateline.ops.kalman.step import kalman_step_
from stateline.ops.linear_scan import linear_scan, linear_scan_step_
from stateline.ops.long_conv import fuse_cascade, fuse_parallel, long_conv, long_conv_step_
from stateline.ops.packed_linear import packed_linear
from stateline.ops.rms_norm import gated_rms_norm, rms_norm
from stateline.ops.s4_kernel import s4_cauchy, s4_kernel
from stateline.ops.s4_scan import s4_scan, s4_scan_step_
from stateline.ops.selective_scan import selective_scan, selective_scan_step_
from stateline.ops.ssd import ssd, ssd_step_
from stateline.ops.trapezoid_ssd import trapezoid_ssd, trapezoid_ssd_step_

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step_",
    "cross_entropy",
    "fuse_cascade",
    "fuse_parallel",
    "gated_rms_norm",
    "gated_scan",
    "gated_scan_step_",
    "kalman",
    "kalman_smooth",
    "kalman_step_",
    "linear_scan",
    "linear_scan_step_",
    "long_conv",
    "long_conv_step_",
    "packed_linear",
    "rms_norm",
    "s4_cauchy",
    "s4_kernel",
    "s4_scan",
    "s4_scan_step_",
    "selective_scan",
    "selective_scan_step_",
    "ssd",
    "ssd_step_",
    "trapezoid_ssd",
    "trapezoid_ssd_step_",
]
