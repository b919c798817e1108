/* What gates.c and product.c share: threads, versions of a loop, bfloat16. */
#ifndef TRELLIS_COMMON_H
#define TRELLIS_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Several versions of the loops, of which the processor at hand takes the best. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bfloat16;

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float load_float(const float *p) { return *p; }
INLINE void store_float(float *p, float x) { *p = x; }
INLINE float load_bfloat16(const bfloat16 *p) { return as_float((uint32_t)*p << 16); }
INLINE void store_bfloat16(bfloat16 *p, float x) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = (bfloat16)(x == x ? rounded : 0x7fc0);
}

#endif
