// Threads and scratch memory for kernels. Compiled once, for the baseline instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Calls run(context, task) for every task in [0, tasks), on at most `threads` threads. `cost_us`: an estimate of all the work,
// in microseconds; small work stays on the calling thread. Tasks are handed out in order but may end in any: results must not
// depend on who runs what. Denormal numbers count as zero inside.
extern "C" void sl_parallel(int64_t tasks, int64_t threads, double cost_us, void (*run)(void*, int64_t), void* context);

// This thread's scratch memory, aligned to 64 bytes, valid until its next call. Null if there is none.
extern "C" void* sl_scratch(size_t bytes);
