/* Both passes over some rows of a layer for one type REAL; included by gates.c once for each. */

/* Where the cell path of position s of sequence n reads; NULL: zero. */
INLINE const float *REAL_(cell_before)(const Layer *layer, int64_t s, int64_t n) {
    const int64_t row = layer->cell_row[s];
    const float *cells = row < 0 ? layer->c0 : layer->c_below;
    return cells ? cells + ((row < 0 ? 0 : row * layer->N) + n) * layer->H : NULL;
}

/* `size` channels of h from channel a on, masked, to every tap of the layer above that reads them. */
INLINE void REAL_(write_taps)(const Layer *layer, int64_t s, int64_t n, int64_t a, int64_t size, const float *h) {
    const float *scale = layer->scale ? layer->scale + n * layer->H + a : NULL;
    for (int64_t j = 0; layer->taps && j < layer->k; j++) {
        const int64_t row = layer->tap_row[j * layer->S + s];
        if (row < 0) continue;
        REAL *restrict tap = (REAL *)layer->taps + ((row * layer->N + n) * layer->k + j) * layer->H + a;
        if (scale)
            for (int64_t u = 0; u < size; u++) REAL_(store)(tap + u, h[u] * scale[u]);
        else
            for (int64_t u = 0; u < size; u++) REAL_(store)(tap + u, h[u]);
    }
}

CLONES static void REAL_(forward)(const Layer *layer, int64_t first, int64_t last) {
    const int64_t N = layer->N, H = layer->H;
    float h[CHUNK];
    for (int64_t row = first; row < last; row++) {
        const int64_t s = row / N, n = row % N;
        const float *cell = REAL_(cell_before)(layer, s, n);
        const REAL *x = (const REAL *)layer->x + (layer->x_row ? (layer->x_row[s] * N + n) * 4 * H : 0);
        float *out = layer->out && layer->out_row[s] >= 0
                         ? layer->out + (layer->out_row[s] * N + n) * (H - layer->out_from) : NULL;
        for (int64_t a = 0; a < H; a += CHUNK) {
            const int64_t size = MIN(CHUNK, H - a);
            REAL *i = (REAL *)layer->gates + row * 4 * H + a, *o = i + H, *g = o + H, *f = g + H;
            const REAL *x_i = x + a, *x_o = x_i + H, *x_g = x_o + H, *x_f = x_g + H;
            const float *c_before = cell ? cell + a : ZEROS;
            float *c = layer->c + row * H + a;
            if (s >= layer->product)
                for (int gate = 0; gate < 4; gate++) memset(i + gate * H, 0, size * sizeof(REAL));
#pragma omp simd
            for (int64_t u = 0; u < size; u++) {
                const float input = sigmoid(REAL_(load)(i + u) + REAL_(load)(x_i + u));
                const float output = sigmoid(REAL_(load)(o + u) + REAL_(load)(x_o + u));
                const float candidate = hyperbolic_tangent(REAL_(load)(g + u) + REAL_(load)(x_g + u));
                const float forget = sigmoid(REAL_(load)(f + u) + REAL_(load)(x_f + u));
                const float now = input * candidate + forget * c_before[u];
                REAL_(store)(i + u, input);
                REAL_(store)(o + u, output);
                REAL_(store)(g + u, candidate);
                REAL_(store)(f + u, forget);
                c[u] = now;
                h[u] = output * hyperbolic_tangent(now);
            }
            REAL_(write_taps)(layer, s, n, a, size, h);
            if (out)
                for (int64_t u = MAX(layer->out_from - a, 0); u < size; u++) out[a + u - layer->out_from] = h[u];
        }
    }
}

CLONES static void REAL_(backward)(const Layer *layer, int64_t first, int64_t last) {
    const int64_t S = layer->S, N = layer->N, H = layer->H, k = layer->k;
    float dh[CHUNK], h[CHUNK], dz_i[CHUNK], dz_o[CHUNK], dz_g[CHUNK], dz_f[CHUNK];
    for (int64_t row = first; row < last; row++) {
        const int64_t s = row / N, n = row % N;
        const float *cell = REAL_(cell_before)(layer, s, n);
        const float *dout = layer->out && layer->out_row[s] >= 0
                                ? layer->out + (layer->out_row[s] * N + n) * (H - layer->out_from) : NULL;
        const float *dc_above = layer->dc_above && layer->dc_row[s] >= 0
                                    ? layer->dc_above + (layer->dc_row[s] * N + n) * H : NULL;
        float *dx = layer->dx + ((layer->x_row ? layer->x_row[s] : s) * N + n) * 4 * H;
        for (int64_t a = 0; a < H; a += CHUNK) {
            const int64_t size = MIN(CHUNK, H - a);
            const REAL *i = (const REAL *)layer->gates + row * 4 * H + a, *o = i + H, *g = o + H, *f = g + H;
            const float *c = layer->c + row * H + a, *c_before = cell ? cell + a : ZEROS;
            const float *dc_now = dc_above ? dc_above + a : ZEROS;
            for (int64_t u = 0; u < size; u++) dh[u] = 0;
            for (int64_t j = 0; layer->dtaps && j < k; j++) {
                const int64_t tap = layer->tap_row[j * S + s];
                if (tap < 0) continue;
                const REAL *dtap = (const REAL *)layer->dtaps + ((tap * N + n) * k + j) * H + a;
                for (int64_t u = 0; u < size; u++) dh[u] += REAL_(load)(dtap + u);
            }
            if (layer->scale)
                for (int64_t u = 0; u < size; u++) dh[u] *= layer->scale[n * H + a + u];
            if (dout)
                for (int64_t u = MAX(layer->out_from - a, 0); u < size; u++) dh[u] += dout[a + u - layer->out_from];
            float *dc = layer->dc ? layer->dc + row * H + a : NULL;
            float dc_below[CHUNK];
#pragma omp simd
            for (int64_t u = 0; u < size; u++) {
                const float input = REAL_(load)(i + u), output = REAL_(load)(o + u);
                const float candidate = REAL_(load)(g + u), forget = REAL_(load)(f + u);
                const float t = hyperbolic_tangent(c[u]);
                /* dL/dc: through h = o tanh(c), and through the cell path of the layer above */
                const float d = dh[u] * output * (1 - t * t) + dc_now[u];
                h[u] = output * t;
                dz_i[u] = d * candidate * (input * (1 - input));
                dz_o[u] = dh[u] * t * (output * (1 - output));
                dz_g[u] = d * input * (1 - candidate * candidate);
                dz_f[u] = d * c_before[u] * (forget * (1 - forget));
                dc_below[u] = d * forget;
            }
            if (dc) memcpy(dc, dc_below, size * sizeof(float));
            REAL_(write_taps)(layer, s, n, a, size, h);
            const float *dz[4] = {dz_i, dz_o, dz_g, dz_f};
            for (int gate = 0; gate < 4; gate++) {
                float *dx_gate = dx + gate * H + a;
                if (layer->add)
                    for (int64_t u = 0; u < size; u++) dx_gate[u] += dz[gate][u];
                else
                    memcpy(dx_gate, dz[gate], size * sizeof(float));
                if (s < layer->product) {
                    REAL *dz_gate = (REAL *)layer->dz + (row * 4 + gate) * H + a;
                    for (int64_t u = 0; u < size; u++) REAL_(store)(dz_gate + u, dz[gate][u]);
                }
            }
        }
    }
}
