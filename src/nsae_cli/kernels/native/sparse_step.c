/* The sparse training step's inner loops, compiled once per instruction set and chosen when the library is loaded.

   Plain C on raw pointers: no Python or torch headers, no threads of its own (the caller hands ranges of rows or
   features to its threads), no allocation, no global state. `loops.h` holds the loops; it is included once per
   instruction set with VL floats to a vector. Every function is documented in loops.h; Python's side is `library.py`.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

#define NSAE_ABI 1

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define NSAE_X86 1
#include <immintrin.h>
#endif

#define PASTE(a, b) a##_##b
#define PASTE_EXPANDED(a, b) PASTE(a, b)
#define NAME(f) PASTE_EXPANDED(f, SUFFIX)

/* The machine's baseline: SSE2 on x86-64, NEON on arm64. */
#define SUFFIX base
#define VL 4
#include "loops.h"
#undef SUFFIX
#undef VL

#ifdef NSAE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SUFFIX avx2
#define VL 8
#include "loops.h"
#undef SUFFIX
#undef VL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define SUFFIX avx512
#define VL 16
#define HAVE_COMPRESS 1
#include "loops.h"
#undef HAVE_COMPRESS
#undef SUFFIX
#undef VL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif /* NSAE_X86 */

/* Number of this interface: Python refuses a library of another. */
EXPORT int32_t nsae_abi(void) { return NSAE_ABI; }

/* 0 base, 1 avx2, 2 avx512: the best instruction set that this processor and operating system have. */
EXPORT int32_t nsae_best_isa(void) {
#ifdef NSAE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
