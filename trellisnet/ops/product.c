/* A few rows times a large matrix, added to what is there: y += x Wᵀ, for the steps of a stream.
 *
 * Such a product takes as long as W takes to read. So W is packed (compiled.py) in the order in which it is read: blocks of
 * 64 outputs, in a block one input after the other (in bfloat16 two, so that a pair makes a word), and every thread reads
 * its blocks from one end to the other. Rows are in the type of W, float or bfloat16, sums in float.
 */
#include "common.h"

#define BLOCK 64 /* outputs: four vectors */
typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
    int64_t N, inputs, outputs;
    const void *w; /* (blocks, inputs, 64) float, or (blocks, inputs / 2, 64, 2) bfloat16; inputs made even, by zeros */
    const void *x; /* (N, inputs) */
    void *y;       /* (N, outputs) */
    float *copy;   /* (N, inputs made even): room for x in float */
} Product;

#define EVEN(inputs) ((inputs) + ((inputs) & 1))

/* Outputs of a block, of which the last one may be cut short. */
INLINE int64_t width(const Product *p, int64_t block) {
    const int64_t left = p->outputs - block * BLOCK;
    return left < BLOCK ? left : BLOCK;
}

/* Both compute blocks first to last of y. */
CLONES static void product_float(const Product *p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++)
        for (int64_t n = 0; n < p->N; n++) {
            const vector *w = (const vector *)((const float *)p->w + block * EVEN(p->inputs) * BLOCK);
            const float *x = p->copy + n * EVEN(p->inputs);
            vector a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
            for (int64_t k = 0; k < p->inputs; k += 2, w += 8) { /* two sums an output: they need not wait */
                const float u = x[k], v = x[k + 1];
                a += w[0] * u, b += w[1] * u, c += w[2] * u, d += w[3] * u;
                e += w[4] * v, f += w[5] * v, g += w[6] * v, h += w[7] * v;
            }
            const vector sums[4] = {a + e, b + f, c + g, d + h};
            const float *sum = (const float *)sums;
            float *y = (float *)p->y + n * p->outputs + block * BLOCK;
            for (int64_t u = 0; u < width(p, block); u++) y[u] += sum[u];
        }
}

/* The first and the second number of each pair. */
#define LOW(w) ((vector)((w) << 16))
#define HIGH(w) ((vector)((w) & 0xffff0000u))

CLONES static void product_bfloat16(const Product *p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++)
        for (int64_t n = 0; n < p->N; n++) {
            const words *w = (const words *)((const bfloat16 *)p->w + block * EVEN(p->inputs) * BLOCK);
            const float *x = p->copy + n * EVEN(p->inputs);
            vector a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
            for (int64_t k = 0; k < p->inputs; k += 2, w += 4) {
                const float u = x[k], v = x[k + 1];
                a += LOW(w[0]) * u, b += LOW(w[1]) * u, c += LOW(w[2]) * u, d += LOW(w[3]) * u;
                e += HIGH(w[0]) * v, f += HIGH(w[1]) * v, g += HIGH(w[2]) * v, h += HIGH(w[3]) * v;
            }
            const vector sums[4] = {a + e, b + f, c + g, d + h};
            const float *sum = (const float *)sums;
            bfloat16 *y = (bfloat16 *)p->y + n * p->outputs + block * BLOCK;
            for (int64_t u = 0; u < width(p, block); u++) store_bfloat16(y + u, load_bfloat16(y + u) + sum[u]);
        }
}

/* Blocks are shared out among threads; an output is summed by one of them, so their number changes no result. */
void trellis_product(const Product *p, int is_bfloat16, int threads) {
    const int64_t even = EVEN(p->inputs);
    for (int64_t n = 0; n < p->N; n++) {
        const float *x = (const float *)p->x + n * p->inputs;
        const bfloat16 *low = (const bfloat16 *)p->x + n * p->inputs;
        float *copy = p->copy + n * even;
        copy[even - 1] = 0;
        for (int64_t k = 0; k < p->inputs; k++) copy[k] = is_bfloat16 ? load_bfloat16(low + k) : x[k];
    }
    const int64_t blocks = (p->outputs + BLOCK - 1) / BLOCK;
    void (*product)(const Product *, int64_t, int64_t) = is_bfloat16 ? product_bfloat16 : product_float;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (p->inputs * p->outputs > 1 << 16)
    {
        const int64_t of = omp_get_num_threads(), which = omp_get_thread_num();
        product(p, blocks * which / of, blocks * (which + 1) / of);
    }
#else
    (void)threads;
    product(p, 0, blocks);
#endif
}
