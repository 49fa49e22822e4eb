// Gradients of the Kalman filter on CPUs.
#include "cpu_backward.h"

// There is a step at least. mean0 and cov0 are here the predicted moments of every step.
SL_KERNEL(kalman_backward) {
    const Args& a = *(const Args*)args;
    const double flops = 15.0 * double(a.n + a.m) * double(a.n + a.m) * double(a.n);
    return in_layout(a, true, [&]<class L>() { return run_back<Adjoint<L>, false>(a, flops); });
}
