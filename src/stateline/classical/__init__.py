"""Linear-Gaussian state space models: simulated, filtered, smoothed, learned and controlled."""

from stateline.classical.kalman import Forecast, forecast, kalman_filter
from stateline.classical.layer import KalmanFilter
from stateline.classical.model import StateSpace, simulate
from stateline.classical.nonlinear import NonlinearModel, extended_kalman_filter, unscented_kalman_filter
from stateline.classical.smoother import Smoothed, kalman_smoother, posterior_sample
from stateline.ops.kalman import Filtered, KalmanState, SquareRootState

__all__ = [
    "Filtered",
    "Forecast",
    "KalmanFilter",
    "KalmanState",
    "NonlinearModel",
    "Smoothed",
    "SquareRootState",
    "StateSpace",
    "extended_kalman_filter",
    "forecast",
    "kalman_filter",
    "kalman_smoother",
    "posterior_sample",
    "simulate",
    "unscented_kalman_filter",
]
