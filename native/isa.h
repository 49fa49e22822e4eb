// One source, one object file per instruction set. Everything in a kernel file is file-local, so that nothing compiled for a wide
// instruction set can be picked by the linker for a machine without it; only the C entry points below leave the file.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifndef SL_ISA
#error "SL_ISA must name the instruction set: base, avx2, avx512, avx512bf16 or neon"
#endif
#define SL_JOIN_(a, b) a##_##b
#define SL_JOIN(a, b) SL_JOIN_(a, b)
// Defines the entry point of a kernel listed in kernels.def, for this instruction set.
#define SL_KERNEL(name) extern "C" int SL_JOIN(sl_##name, SL_ISA)(const void* args)

#if defined(__AVX512F__)
#define SL_BYTES 64
#elif defined(__AVX2__)
#define SL_BYTES 32
#else
#define SL_BYTES 16
#endif
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SL_INLINE static inline __attribute__((always_inline))

// What a kernel returns; the Python side turns it into an exception.
enum { SL_OK = 0, SL_NO_MEMORY = 1, SL_BAD_SEGMENTS = 2, SL_BAD_INDEX = 3 };
