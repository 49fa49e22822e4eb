"""Mathematics of linear systems and of remembering by them, in float64.

hippo       systems whose state is the best approximation of the past; `project` a signal, `reconstruct` its past
dplr        the same systems as a diagonal and a few rows, which S4 computes with
discretize  from differential equations to recurrences, one function a rule
feedback    what a system becomes when its input is made from its own state, and whether that is stable
"""

from stateline.theory import discretize, dplr, hippo
from stateline.theory.feedback import Loop, feedback

__all__ = ["Loop", "discretize", "dplr", "feedback", "hippo"]
