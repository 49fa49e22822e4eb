"""Mathematics of linear systems, in float64.

feedback    what a system becomes when its input is made from its own state, and whether that is stable
"""

from stateline.theory.feedback import Loop, feedback

__all__ = ["Loop", "feedback"]
