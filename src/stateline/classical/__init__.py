"""Linear-Gaussian state space models: simulated, filtered, smoothed, learned and controlled."""

from stateline.classical.assembly import Structure
from stateline.classical.batch_fit import StructureFit
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
from stateline.classical.control import (
    Gramians,
    Lqr,
    Report,
    analyse,
    controllability,
    from_control,
    gramians,
    lqr,
    observability,
    to_control,
)
from stateline.classical.diagnosis import Diagnosis
from stateline.classical.horizon import Limits, Plan, RecedingHorizon
from stateline.classical.kalman import Forecast, forecast, kalman_filter
from stateline.classical.layer import KalmanFilter
from stateline.classical.learn import Fit, FitOptions, fit
from stateline.classical.mixture import StructuralForecast
from stateline.classical.model import StateSpace, from_scan, simulate, to_scan
from stateline.classical.nonlinear import NonlinearModel, extended_kalman_filter, unscented_kalman_filter
from stateline.classical.panel import Panel
from stateline.classical.regulator import Decision, Lqg, Rest, equilibrium, lqg
from stateline.classical.sampled import Sampled, discretize
from stateline.classical.smoother import Smoothed, kalman_smoother, posterior_sample
from stateline.classical.steady import Steady, SteadyFiltered, steady_filter, steady_state
from stateline.classical.structural import Coefficients, Components, StructuralModel
from stateline.classical.subspace import Subspace, n4sid
from stateline.ops.kalman import Filtered, KalmanState, SquareRootState, State
from stateline.theory.feedback import Loop

__all__ = [
    "Coefficients",
    "Components",
    "Decision",
    "Diagnosis",
    "Filtered",
    "Fit",
    "FitOptions",
    "Forecast",
    "Gramians",
    "KalmanFilter",
    "KalmanState",
    "Limits",
    "Loop",
    "Lqg",
    "Lqr",
    "NonlinearModel",
    "Panel",
    "Plan",
    "RecedingHorizon",
    "Report",
    "Rest",
    "Sampled",
    "Smoothed",
    "SquareRootState",
    "State",
    "StateSpace",
    "Steady",
    "SteadyFiltered",
    "StructuralForecast",
    "StructuralModel",
    "Structure",
    "StructureFit",
    "Subspace",
    "analyse",
    "arma",
    "constant_acceleration",
    "constant_velocity",
    "controllability",
    "discretize",
    "equilibrium",
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
    "observability",
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
