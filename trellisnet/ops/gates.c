/* The gates of one layer, forwards and backwards, in one pass over memory: what gates.py says in torch's operations.
 *
 * Optional: trellisnet/ops/compiled.py loads it if it has been built, and nothing else depends on it.
 *
 * A layer has S positions of N sequences with H channels; rows are (position, sequence). Gates lie in the order
 * i, o, g, f. Index arrays give, for each position, a row of another buffer, or -1 for none. REAL is the type of the
 * products, float or bfloat16; everything is computed in float.
 */
#include "common.h"

#define CHUNK 256 /* channels at a time, so that what is passed from loop to loop stays in the first cache */
static const float ZEROS[CHUNK];
static const int SMALL = 1 << 14; /* numbers below which a second thread does not pay */

/* exp(x) = 2^n (1 + p): n is the integer next to x / ln 2 and p = exp(r) - 1, |r| <= ln 2 / 2, a Taylor polynomial
 * whose remainder, r^8 / 8!, is below the rounding of a float. Keeping p apart keeps exp(x) - 1 exact near zero. */
INLINE void exponential(float x, float *power, float *p) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = x * 1.44269504f + round;
    uint32_t bits = as_bits(n);
    n -= round;
    float r = x - n * 0.693145752f; /* ln 2 in two parts: n times the first one is exact */
    r -= n * 1.42860677e-6f;
    float q = 1.0f / 5040;
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    *p = q * r * r + r;
    *power = as_float((bits << 23) + 0x3f800000u);
}

INLINE float sigmoid(float x) {
    float power, p;
    exponential(-x, &power, &p);
    return 1.0f / (1.0f + (power + power * p));
}

INLINE float hyperbolic_tangent(float x) { /* (exp(2x) - 1) / (exp(2x) + 1), from the side that does not overflow */
    float power, p;
    float size = as_float(as_bits(x) & 0x7fffffffu);
    exponential(-2.0f * size, &power, &p);
    float less_one = power * p + (power - 1.0f);
    float result = -less_one / (less_one + 2.0f);
    return as_float(as_bits(result) | (as_bits(x) & 0x80000000u));
}

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Arguments of a layer; both passes take the same ones and each leaves out what it does not need. */
typedef struct {
    int64_t S, N, H, k;
    int64_t product;         /* positions whose gates hold a product on entry; of the others they are x alone */
    void *gates;             /* (S, N, 4H) REAL: products, then gates */
    const void *x;           /* (P, N, 4H) REAL, x with its bias; without x_row (4H,): the bias alone */
    const int32_t *x_row;    /* (S,) or NULL */
    float *c;                /* (S, N, H) */
    const float *c_below;    /* (S of the layer below, N, H), or NULL for zero */
    const int32_t *cell_row; /* (S,): what the cell path reads; -1: c0 */
    const float *c0;         /* (N, H), or NULL for zero */
    const float *scale;      /* (N, H), or NULL for one */
    void *taps;              /* (S of the layer above, N, k H) REAL, or NULL: where h goes, masked */
    const int32_t *tap_row;  /* (k, S) */
    float *out;              /* (rows, N, H - out_from), or NULL: where h goes unmasked; backwards, its gradient */
    const int32_t *out_row;  /* (S,) */
    int64_t out_from;
    /* backwards */
    const void *dtaps;       /* gradient of the taps of the layer above, or NULL */
    const float *dc_above;   /* gradient that the cell paths of the layer above pass down, or NULL */
    const int32_t *dc_row;   /* (S,) */
    void *dz;                /* (product, N, 4H) REAL: gradient of the products */
    float *dc;               /* (S, N, H), or NULL: gradient that the cell path passes down */
    float *dx;               /* (P, N, 4H): gradient of x; without x_row (S, N, 4H) */
    int64_t add;             /* whether dx is added to, or written */
} Layer;

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define REAL_(name) JOIN(name, REAL)

#define REAL float
#include "gates.h"
#undef REAL
#define REAL bfloat16
#include "gates.h"
#undef REAL

/* Rows are shared out among threads; nothing is summed across rows, so their number changes no result. */
static void run(void (*pass)(const Layer *, int64_t, int64_t), const Layer *layer, int threads) {
    const int64_t rows = layer->S * layer->N;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (rows * layer->H > SMALL)
    {
        const int64_t of = omp_get_num_threads(), which = omp_get_thread_num();
        pass(layer, rows * which / of, rows * (which + 1) / of);
    }
#else
    (void)threads;
    pass(layer, 0, rows);
#endif
}

void trellis_gates_forward(const Layer *layer, int is_bfloat16, int threads) {
    run(is_bfloat16 ? forward_bfloat16 : forward_float, layer, threads);
}

void trellis_gates_backward(const Layer *layer, int is_bfloat16, int threads) {
    run(is_bfloat16 ? backward_bfloat16 : backward_float, layer, threads);
}

#ifndef SOURCE
#define SOURCE ""
#endif
const char *trellis_gates_source(void) { return SOURCE; } /* what it was built from */
