// Chooses the instruction set once, when the library is loaded, and forwards every kernel to that variant.
// STATELINE_ISA forces one; a name that is unknown or that this machine cannot run is refused by sl_isa_problem().
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SL_PUBLIC extern "C" __attribute__((visibility("default")))
typedef int (*Kernel)(const void*);

namespace {

enum Name {
#define SL_ROW(name) k_##name,
#include "kernels.def"
#undef SL_ROW
    n_kernels
};

}  // namespace

#if defined(__x86_64__) || defined(__i386__)
#define SL_ROW(name)
#define SL_BF16_ROW(name) extern "C" int sl_##name##_avx512bf16(const void*);
#include "kernels.def"
#undef SL_ROW
#endif
#define SL_ROW(name) extern "C" int SL_PASTE(sl_##name, SL_NOW)(const void*);
#define SL_PASTE_(a, b) a##_##b
#define SL_PASTE(a, b) SL_PASTE_(a, b)
#if defined(__x86_64__) || defined(__i386__)
#define SL_NOW avx512
#include "kernels.def"
#undef SL_NOW
#define SL_NOW avx2
#include "kernels.def"
#undef SL_NOW
#define SL_NOW base
#include "kernels.def"
#undef SL_NOW
#elif defined(__aarch64__)
#define SL_NOW neon
#include "kernels.def"
#undef SL_NOW
#else
#define SL_NOW base
#include "kernels.def"
#undef SL_NOW
#endif
#undef SL_ROW

namespace {

struct Isa {
    const char* name;
    Kernel kernels[n_kernels];
};

// Widest first.
const Isa isas[] = {
#if defined(__x86_64__) || defined(__i386__)
#define SL_ROW(name) sl_##name##_avx512,
#define SL_BF16_ROW(name) sl_##name##_avx512bf16,
    {"avx512bf16", {
#include "kernels.def"
    }},
#undef SL_ROW
#endif
#define SL_ROW(name) SL_PASTE(sl_##name, SL_NOW),
#if defined(__x86_64__) || defined(__i386__)
#define SL_NOW avx512
    {"avx512", {
#include "kernels.def"
    }},
#undef SL_NOW
#define SL_NOW avx2
    {"avx2", {
#include "kernels.def"
    }},
#undef SL_NOW
#endif
#if defined(__aarch64__)
#define SL_NOW neon
    {"neon", {
#include "kernels.def"
    }},
#else
#define SL_NOW base
    {"base", {
#include "kernels.def"
    }},
#endif
#undef SL_NOW
};
#undef SL_ROW

bool runs_here([[maybe_unused]] const char* name) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (!strncmp(name, "avx512", 6)) {
        const bool plain = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (!strcmp(name, "avx512")) return plain;
        return plain && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    }
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return true;
}

const Isa* chosen = nullptr;
char problem[256];
char supported[64];

__attribute__((constructor)) void choose() {
    const char* forced = getenv("STATELINE_ISA");
    if (forced && !*forced) forced = nullptr;
    bool known = false;
    for (const Isa& isa : isas) {
        const bool runs = runs_here(isa.name);
        known |= forced && !strcmp(forced, isa.name);
        if (!runs) continue;
        if (*supported) strcat(supported, " ");
        strcat(supported, isa.name);
        if (!chosen && (!forced || !strcmp(forced, isa.name))) chosen = &isa;
    }
    if (!chosen)
        snprintf(problem, sizeof problem, "STATELINE_ISA is '%.40s', %s; this machine runs: %s. Unset it, or pick one of these.",
                 forced, known ? "which this machine cannot run" : "which is unknown", supported);
}

}  // namespace

// The layout of the records that kernels read. Python refuses a library of another layout; count up when a record changes
// or a kernel is new.
SL_PUBLIC int sl_layout() { return 4; }
// Name of the instruction set in use, or an empty string if there is a problem.
SL_PUBLIC const char* sl_isa() { return chosen ? chosen->name : ""; }
// Why no instruction set was chosen, or an empty string.
SL_PUBLIC const char* sl_isa_problem() { return problem; }
// All that this machine can run, separated by spaces, widest first.
SL_PUBLIC const char* sl_isas() { return supported; }

#define SL_ROW(name) \
    SL_PUBLIC int sl_##name(const void* args) { return chosen ? chosen->kernels[k_##name](args) : -1; }
#include "kernels.def"
