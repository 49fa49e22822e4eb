from stateline.ops.kalman.reference import backward, forward, step  # noqa
