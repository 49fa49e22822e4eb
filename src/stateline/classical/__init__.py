"""Linear-Gaussian state space models: simulated, filtered, smoothed, learned and controlled."""

from stateline.classical.components import (
    arma,
    constant_acceleration,
    constant_velocity,
    local_level,
    local_trend,
    oscillator,
    seasonal,
    side_by_side,
    sum_of,
)
from stateline.classical.control import analyse, from_control, gramians, lqr, to_control
from stateline.classical.horizon import Limits, RecedingHorizon
from stateline.classical.kalman import Forecast, forecast, kalman_filter
from stateline.classical.layer import KalmanFilter
from stateline.classical.learn import Fit, FitOptions, fit
from stateline.classical.model import StateSpace, from_scan, simulate, to_scan
from stateline.classical.nonlinear import NonlinearModel, extended_kalman_filter, unscented_kalman_filter
from stateline.classical.regulator import lqg
from stateline.classical.sampled import discretize
from stateline.classical.smoother import Smoothed, kalman_smoother, posterior_sample
from stateline.classical.steady import steady_filter, steady_state
from stateline.classical.structural import StructuralModel
from stateline.classical.subspace import Subspace, n4sid
from stateline.ops.kalman import Filtered, KalmanState, SquareRootState

__all__ = [
    "Filtered",
    "Fit",
    "FitOptions",
    "Forecast",
    "KalmanFilter",
    "KalmanState",
    "Limits",
    "NonlinearModel",
    "RecedingHorizon",
    "Smoothed",
    "SquareRootState",
    "StateSpace",
    "StructuralModel",
    "Subspace",
    "analyse",
    "arma",
    "constant_acceleration",
    "constant_velocity",
    "discretize",
    "extended_kalman_filter",
    "fit",
    "forecast",
    "from_control",
    "from_scan",
    "gramians",
    "kalman_filter",
    "kalman_smoother",
    "local_level",
    "local_trend",
    "lqg",
    "lqr",
    "n4sid",
    "oscillator",
    "posterior_sample",
    "seasonal",
    "side_by_side",
    "simulate",
    "steady_filter",
    "steady_state",
    "sum_of",
    "to_control",
    "to_scan",
    "unscented_kalman_filter",
]
