"""Mathematics of remembering by a linear system, in float64: what to remember, in which coordinates, in which steps.

hippo       systems whose state is the best approximation of the past; `project` a signal, `reconstruct` its past
dplr        the same systems as a diagonal and a few rows, which S4 computes with
"""

from stateline.theory import discretize, dplr, hippo

__all__ = ["discretize", "dplr", "hippo"]
