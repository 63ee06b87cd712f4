/* The loops, for one instruction set: VL floats to a vector, names suffixed _SUFFIX. Included by sparse_step.c.

   Shapes: B rows, d inputs, F features. W_enc and W_dec are both [F, d], row-major: a feature's weights are contiguous.
   Entries are the active (row, feature) pairs: by row (row_ptr [B+1], cols) or by feature (col_ptr [F+1], rows).
   Every sum has an order that depends on the shapes only, not on how callers cut the ranges among threads.
*/

typedef float NAME(vf) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
#define VF NAME(vf)
#define LOAD(p) (*(const VF *)(p))
#define STORE(p, v) (*(VF *)(p) = (v))

static inline float NAME(hsum)(VF v) {
#if VL == 16 && defined(HAVE_COMPRESS)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[VL];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = VL / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
#endif
}

static inline VF NAME(splat)(float s) {
    VF v;
    for (int l = 0; l < VL; l++) v[l] = s;
    return v;
}

static inline VF NAME(vsqrt)(VF v) {
#if VL == 16 && defined(HAVE_COMPRESS)
    return (VF)_mm512_sqrt_ps((__m512)v);
#else
    for (int l = 0; l < VL; l++) v[l] = sqrtf(v[l]);
    return v;
#endif
}

static inline void NAME(prefetch_row)(const float *p, int64_t d) {
    for (int64_t k = 0; k < d; k += 16) __builtin_prefetch(p + k);
}

/* a·b over d. */
static inline float NAME(dot)(const float *a, const float *b, int64_t d) {
    VF s0 = NAME(splat)(0), s1 = s0, s2 = s0, s3 = s0;
    int64_t k = 0;
    for (; k + 4 * VL <= d; k += 4 * VL) {
        s0 += LOAD(a + k) * LOAD(b + k);
        s1 += LOAD(a + k + VL) * LOAD(b + k + VL);
        s2 += LOAD(a + k + 2 * VL) * LOAD(b + k + 2 * VL);
        s3 += LOAD(a + k + 3 * VL) * LOAD(b + k + 3 * VL);
    }
    for (; k + VL <= d; k += VL) s0 += LOAD(a + k) * LOAD(b + k);
    float s = NAME(hsum)((s0 + s1) + (s2 + s3));
    for (; k < d; k++) s += a[k] * b[k];
    return s;
}

/* Appends to cols the j with z[j] + bias[j] (+ noise[j]) > threshold, and that sum to values. Returns how many.
   There is room for F of them. "Not ≤" throughout: a NaN is an entry, so that it is found and not lost. */
static inline int64_t NAME(scan_f32)(const float *z, const float *bias, const float *noise, float threshold, int64_t F,
                                     int32_t *cols, float *values) {
    int64_t n = 0, j = 0;
#ifdef HAVE_COMPRESS
    const __m512 least = _mm512_set1_ps(threshold);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= F; j += 16) {
        __m512 v = _mm512_add_ps(_mm512_loadu_ps(z + j), _mm512_loadu_ps(bias + j));
        if (noise) v = _mm512_add_ps(v, _mm512_loadu_ps(noise + j));
        const __mmask16 above = _mm512_cmp_ps_mask(v, least, _CMP_NLE_UQ);
        if (above) { /* compressed in a register: compressing to memory is microcoded on some processors */
            int32_t c[16];
            float f[16];
            const int count = __builtin_popcount(above);
            _mm512_storeu_si512(c, _mm512_maskz_compress_epi32(above, index));
            _mm512_storeu_ps(f, _mm512_maskz_compress_ps(above, v));
            memcpy(cols + n, c, sizeof(int32_t) * count);
            memcpy(values + n, f, sizeof(float) * count);
            n += count;
        }
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
#endif
    for (; j < F; j++) {
        const float v = z[j] + bias[j] + (noise ? noise[j] : 0.0f);
        if (!(v <= threshold)) {
            cols[n] = (int32_t)j;
            values[n++] = v;
        }
    }
    return n;
}

static inline float NAME(from_bf16)(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Appends to cols every j whose exact pre-activation may exceed the threshold (see `certified.py` for the bound):
   z + relative·|z| + bias[j] (+ noise[j] + 2⁻²⁰|noise[j]|) + row_a·norm[j] + row_b·rest[j] > threshold − slack
*/
static inline int64_t NAME(scan_bf16)(const uint16_t *z, const float *bias, const float *noise, const float *norm,
                                      const float *rest, float row_a, float row_b, float slack, float relative,
                                      float threshold, int64_t F, int32_t *cols) {
    const float of_noise = 1.0f / (1 << 20);
    int64_t n = 0, j = 0;
#ifdef HAVE_COMPRESS
    const __m512 least = _mm512_set1_ps(threshold - slack), A = _mm512_set1_ps(row_a), C = _mm512_set1_ps(row_b),
                 R = _mm512_set1_ps(relative);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + 16 <= F; j += 16) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)(z + j));
        const __m512 zz = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        __m512 v = _mm512_add_ps(zz, _mm512_loadu_ps(bias + j));
        v = _mm512_fmadd_ps(A, _mm512_loadu_ps(norm + j), v);
        v = _mm512_fmadd_ps(C, _mm512_loadu_ps(rest + j), v);
        v = _mm512_fmadd_ps(R, _mm512_abs_ps(zz), v);
        if (noise) {
            const __m512 e = _mm512_loadu_ps(noise + j);
            v = _mm512_fmadd_ps(_mm512_set1_ps(of_noise), _mm512_abs_ps(e), _mm512_add_ps(v, e));
        }
        const __mmask16 above = _mm512_cmp_ps_mask(v, least, _CMP_NLE_UQ);
        if (above) {
            int32_t c[16];
            const int count = __builtin_popcount(above);
            _mm512_storeu_si512(c, _mm512_maskz_compress_epi32(above, index));
            memcpy(cols + n, c, sizeof(int32_t) * count);
            n += count;
        }
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
#endif
    for (; j < F; j++) {
        const float zz = NAME(from_bf16)(z[j]);
        float v = zz + bias[j] + row_a * norm[j] + row_b * rest[j] + relative * fabsf(zz);
        if (noise) v += noise[j] + of_noise * fabsf(noise[j]);
        if (!(v <= threshold - slack)) cols[n++] = (int32_t)j;
    }
    return n;
}

/* Moves the k largest of n values to the front, in no order; ties go to the lower column. */
static void NAME(largest)(int32_t *cols, float *values, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const float pivot = values[middle];
        const int32_t pivot_col = cols[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot || (values[i] == pivot && cols[i] < pivot_col)) i++;
            while (values[j] < pivot || (values[j] == pivot && cols[j] > pivot_col)) j--;
            if (i <= j) {
                const float v = values[i];
                const int32_t c = cols[i];
                values[i] = values[j];
                cols[i] = cols[j];
                values[j] = v;
                cols[j] = c;
                i++;
                j--;
            }
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
}

/* Keeps the k largest of n entries that are in the order of their columns, in that order. `scratch_*` hold n each. */
static int64_t NAME(keep_largest)(int32_t *cols, float *values, int64_t n, int64_t k, int32_t *scratch_cols,
                                  float *scratch_values) {
    if (n <= k) return n;
    memcpy(scratch_cols, cols, sizeof(int32_t) * n);
    memcpy(scratch_values, values, sizeof(float) * n);
    NAME(largest)(scratch_cols, scratch_values, n, k);
    float least = scratch_values[0];
    int32_t least_col = scratch_cols[0];
    for (int64_t q = 1; q < k; q++)
        if (scratch_values[q] < least || (scratch_values[q] == least && scratch_cols[q] > least_col)) {
            least = scratch_values[q];
            least_col = scratch_cols[q];
        }
    int64_t kept = 0;
    for (int64_t q = 0; q < n; q++)
        if (!(values[q] <= least) || (values[q] == least && cols[q] <= least_col)) { /* a NaN stays */
            cols[kept] = cols[q];
            values[kept++] = values[q];
        }
    return kept;
}

/* Active entries of `rows` rows of pre-activations, by row.

   z [rows, F]: the product without bias, float32, or bfloat16 if bf16 ≠ 0. In bf16, every entry whose bound exceeds
   the threshold is computed anew in float32 from x [rows, d] and W_enc; only then compared.
   top_k = 0: entries with pre-activation > thresholds[row] (0 where thresholds is NULL).
   top_k > 0: the top_k largest of those. A guess of the row's threshold saves most of the work; it is
   lowered until enough are found, so the result does not depend on it.
   counts [rows] receives the number of entries of each row; cols and values, of `capacity` entries, the entries.
   scratch_cols, scratch_values hold F each. bias: of the test; bias_exact, norm, rest, row_a, row_b, row_slack:
   see `certified.py` (all but bias unused in float32).
   candidates [1] is increased by the number of entries computed anew.
   Returns how many rows were done: fewer than `rows` when less than F of the capacity is left.
*/
EXPORT int64_t NAME(nsae_collect)(const void *z, int32_t bf16, int64_t rows, int64_t F, int64_t d, const float *bias,
                                  const float *noise, const float *thresholds, int64_t top_k, const float *x,
                                  const float *W_enc, const float *bias_exact, const float *norm, const float *rest,
                                  const float *row_a, const float *row_b, const float *row_slack, float relative,
                                  int64_t capacity, int32_t *counts, int32_t *cols, float *values,
                                  int32_t *scratch_cols, float *scratch_values, int64_t *candidates) {
    int64_t used = 0;
    float guess = 0; /* carried from row to row */
    for (int64_t i = 0; i < rows; i++) {
        if (capacity - used < F) return i;
        int32_t *c = cols + used;
        float *v = values + used;
        const float *row_noise = noise ? noise + i * F : 0;
        const float *xi = x + i * d;
        const float floor = thresholds ? thresholds[i] : 0.0f;
        float least = top_k && guess > floor ? guess : floor;
        int lowered = 0; /* a row may have fewer than top_k positive entries: then the last attempt is at 0 */
        int64_t n;
        for (;;) {
            if (bf16) {
                const int64_t found =
                    NAME(scan_bf16)((const uint16_t *)z + i * F, bias, row_noise, norm, rest, row_a[i], row_b[i],
                                    row_slack[i], relative, least, F, c);
                n = 0;
                for (int64_t q = 0; q < found; q++) {
                    if (q + 2 < found) NAME(prefetch_row)(W_enc + (int64_t)c[q + 2] * d, d);
                    const int32_t j = c[q];
                    float exact = NAME(dot)(xi, W_enc + (int64_t)j * d, d) + bias_exact[j];
                    if (row_noise) exact += row_noise[j];
                    if (!(exact <= least)) {
                        c[n] = j;
                        v[n++] = exact;
                    }
                }
                *candidates += found;
            } else {
                n = NAME(scan_f32)((const float *)z + i * F, bias, row_noise, least, F, c, v);
            }
            if (!top_k || n >= top_k || least <= floor) break;
            least = ++lowered < 10 && least * 0.5f > floor ? least * 0.5f : floor;
        }
        if (top_k) {
            n = NAME(keep_largest)(c, v, n, top_k, scratch_cols, scratch_values);
            float smallest = n ? v[0] : 0.0f;
            for (int64_t q = 1; q < n; q++) smallest = v[q] < smallest ? v[q] : smallest;
            guess = n < top_k ? 0.0f : smallest * 0.9f;
        }
        counts[i] = (int32_t)n;
        used += n;
    }
    return rows;
}

/* For rows first ≤ i < last: error[i] = Σ acts·W_dec + b_dec − x[i], sq_error[i] = ‖error[i]‖², and for each entry
   dots = error[i]·W_dec[col], while the decoder's rows are in cache. */
EXPORT void NAME(nsae_decode)(int64_t first, int64_t last, int64_t d, const int64_t *row_ptr, const int32_t *cols,
                              const float *acts, const float *W_dec, const float *b_dec, const float *x, float *error,
                              float *sq_error, float *dots) {
    for (int64_t i = first; i < last; i++) {
        const int64_t begin = row_ptr[i], end = row_ptr[i + 1];
        float *e = error + i * d;
        const float *xi = x + i * d;
        for (int64_t k = 0; k < d; k++) e[k] = b_dec[k] - xi[k];
        int64_t q = begin;
        for (; q + 4 <= end; q += 4) {
            const float *w0 = W_dec + (int64_t)cols[q] * d, *w1 = W_dec + (int64_t)cols[q + 1] * d,
                        *w2 = W_dec + (int64_t)cols[q + 2] * d, *w3 = W_dec + (int64_t)cols[q + 3] * d;
            for (int64_t ahead = q + 4; ahead < q + 8 && ahead < end; ahead++)
                NAME(prefetch_row)(W_dec + (int64_t)cols[ahead] * d, d);
            const float a0 = acts[q], a1 = acts[q + 1], a2 = acts[q + 2], a3 = acts[q + 3];
            const VF v0 = NAME(splat)(a0), v1 = NAME(splat)(a1), v2 = NAME(splat)(a2), v3 = NAME(splat)(a3);
            int64_t k = 0;
            for (; k + VL <= d; k += VL) {
                VF y = v0 * LOAD(w0 + k); /* four first: the chain of roundings is a quarter as long */
                y += v1 * LOAD(w1 + k);
                y += v2 * LOAD(w2 + k);
                y += v3 * LOAD(w3 + k);
                STORE(e + k, LOAD(e + k) + y);
            }
            for (; k < d; k++) e[k] += a0 * w0[k] + a1 * w1[k] + a2 * w2[k] + a3 * w3[k];
        }
        for (; q < end; q++) {
            const float *w = W_dec + (int64_t)cols[q] * d;
            const float a = acts[q];
            const VF v = NAME(splat)(a);
            int64_t k = 0;
            for (; k + VL <= d; k += VL) STORE(e + k, LOAD(e + k) + v * LOAD(w + k));
            for (; k < d; k++) e[k] += a * w[k];
        }
        sq_error[i] = NAME(dot)(e, e, d);
        q = begin;
        for (; q + 4 <= end; q += 4) { /* four at a time share the loads of e */
            const float *w0 = W_dec + (int64_t)cols[q] * d, *w1 = W_dec + (int64_t)cols[q + 1] * d,
                        *w2 = W_dec + (int64_t)cols[q + 2] * d, *w3 = W_dec + (int64_t)cols[q + 3] * d;
            VF s0 = NAME(splat)(0), s1 = s0, s2 = s0, s3 = s0;
            int64_t k = 0;
            for (; k + VL <= d; k += VL) {
                const VF y = LOAD(e + k);
                s0 += y * LOAD(w0 + k);
                s1 += y * LOAD(w1 + k);
                s2 += y * LOAD(w2 + k);
                s3 += y * LOAD(w3 + k);
            }
            float t0 = NAME(hsum)(s0), t1 = NAME(hsum)(s1), t2 = NAME(hsum)(s2), t3 = NAME(hsum)(s3);
            for (; k < d; k++) {
                t0 += e[k] * w0[k];
                t1 += e[k] * w1[k];
                t2 += e[k] * w2[k];
                t3 += e[k] * w3[k];
            }
            dots[q] = t0;
            dots[q + 1] = t1;
            dots[q + 2] = t2;
            dots[q + 3] = t3;
        }
        for (; q < end; q++) dots[q] = NAME(dot)(e, W_dec + (int64_t)cols[q] * d, d);
    }
}

/* From [B, d] to chunks of `chunk` columns, [⌈d/chunk⌉][B][chunk], zeros behind the last column: a chunk of all rows
   stays in a core's cache while every feature gathers from it. Rows first ≤ i < last. */
EXPORT void NAME(nsae_pack)(int64_t first, int64_t last, int64_t B, int64_t d, int64_t chunk, const float *x,
                            float *packed) {
    for (int64_t i = first; i < last; i++)
        for (int64_t k = 0; k < d; k += chunk) {
            const int64_t width = d - k < chunk ? d - k : chunk;
            float *to = packed + k * B + i * chunk;
            memcpy(to, x + i * d + k, sizeof(float) * width);
            for (int64_t l = width; l < chunk; l++) to[l] = 0;
        }
}

/* Columns of a feature that are gathered at a time: few enough for the first-level cache. */
#define WIDE 512

/* `width` ≤ WIDE columns of a feature's two gradients: enc = Σ delta·x[row], dec = Σ pull·error[row] over its entries.
   x and error point at the first of the columns in row 0; rows are `stride` floats apart and may be read up to the next
   multiple of 4·VL. */
static inline void NAME(gather)(int64_t begin, int64_t end, const int32_t *rows, const float *delta, const float *pull,
                                const float *x, const float *error, int64_t stride, int64_t width, float *enc,
                                float *dec) {
    if (width <= 4 * VL) { /* the sums fit into registers */
        VF g_enc[4], g_dec[4];
        for (int u = 0; u < 4; u++) g_enc[u] = g_dec[u] = NAME(splat)(0);
        for (int64_t q = begin; q < end; q++) {
            const float *xr = x + (int64_t)rows[q] * stride, *er = error + (int64_t)rows[q] * stride;
            const VF g = NAME(splat)(delta[q]), a = NAME(splat)(pull[q]);
            if (q + 4 < end)
                for (int64_t k = 0; k < 4 * VL; k += 16) {
                    __builtin_prefetch(x + (int64_t)rows[q + 4] * stride + k);
                    __builtin_prefetch(error + (int64_t)rows[q + 4] * stride + k);
                }
            for (int u = 0; u < 4; u++) {
                g_enc[u] += g * LOAD(xr + u * VL);
                g_dec[u] += a * LOAD(er + u * VL);
            }
        }
        for (int u = 0; u < 4; u++) {
            STORE(enc + u * VL, g_enc[u]);
            STORE(dec + u * VL, g_dec[u]);
        }
        return;
    }
    memset(enc, 0, sizeof(float) * width);
    memset(dec, 0, sizeof(float) * width);
    int64_t q = begin;
    for (; q + 2 <= end; q += 2) { /* rows are read in long pieces: the processor fetches ahead by itself */
        const float *x0 = x + (int64_t)rows[q] * stride, *x1 = x + (int64_t)rows[q + 1] * stride,
                    *e0 = error + (int64_t)rows[q] * stride, *e1 = error + (int64_t)rows[q + 1] * stride;
        const VF g0 = NAME(splat)(delta[q]), g1 = NAME(splat)(delta[q + 1]), a0 = NAME(splat)(pull[q]),
                 a1 = NAME(splat)(pull[q + 1]);
        for (int64_t k = 0; k < width; k += VL) {
            STORE(enc + k, LOAD(enc + k) + g0 * LOAD(x0 + k) + g1 * LOAD(x1 + k));
            STORE(dec + k, LOAD(dec + k) + a0 * LOAD(e0 + k) + a1 * LOAD(e1 + k));
        }
    }
    if (q < end) {
        const float *x0 = x + (int64_t)rows[q] * stride, *e0 = error + (int64_t)rows[q] * stride;
        const VF g0 = NAME(splat)(delta[q]), a0 = NAME(splat)(pull[q]);
        for (int64_t k = 0; k < width; k += VL) {
            STORE(enc + k, LOAD(enc + k) + g0 * LOAD(x0 + k));
            STORE(dec + k, LOAD(dec + k) + a0 * LOAD(e0 + k));
        }
    }
}

/* How many columns to gather at a time when `left` of a chunk and of the row are left. */
static inline int64_t NAME(piece)(int64_t chunk, int64_t o) {
    const int64_t left = chunk - o, most = chunk <= 64 ? 4 * VL : WIDE;
    return left < most ? left : most;
}

/* Gradients of features first ≤ j < last: grad_enc[j] = Σ delta·x, grad_dec[j] = Σ pull·error + along[j]·W_dec[j],
   both [F, d], overwritten. x and error are packed in chunks, a multiple of 64 columns. */
EXPORT void NAME(nsae_gradients)(int64_t first, int64_t last, int64_t B, int64_t d, int64_t chunk,
                                 const int64_t *col_ptr, const int32_t *rows, const float *delta, const float *pull,
                                 const float *x, const float *error, const float *along, const float *W_dec,
                                 float *grad_enc, float *grad_dec) {
    float enc[WIDE], dec[WIDE];
    for (int64_t k = 0; k < d; k += chunk)
        for (int64_t j = first; j < last; j++)
            for (int64_t o = 0, wide; o < chunk && k + o < d; o += wide) {
                wide = NAME(piece)(chunk, o);
                NAME(gather)(col_ptr[j], col_ptr[j + 1], rows, delta, pull, x + k * B + o, error + k * B + o, chunk,
                             wide, enc, dec);
                const int64_t left = d - k - o, width = left < wide ? left : wide;
                float *to_enc = grad_enc + j * d + k + o, *to_dec = grad_dec + j * d + k + o;
                const float *w = W_dec + j * d + k + o;
                memcpy(to_enc, enc, sizeof(float) * width);
                for (int64_t l = 0; l < width; l++) to_dec[l] = dec[l] + along[j] * w[l];
            }
}

/* Rounds to the nearest bfloat16, ties to even; NaN stays NaN. */
static inline uint16_t NAME(to_bf16)(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

/* For features first ≤ j < last: the encoder's bfloat16 copy, norm[j] = ‖W_enc[j]‖ and rest[j] = ‖W_enc[j] − copy‖,
   each rounded up; both [F]. */
EXPORT void NAME(nsae_shadow)(int64_t first, int64_t last, int64_t d, const float *W_enc, uint16_t *copy, float *norm,
                              float *rest) {
    for (int64_t j = first; j < last; j++) {
        const float *w = W_enc + j * d;
        uint16_t *c = copy + j * d;
        double sum = 0, sum_rest = 0;
        int64_t k = 0;
#ifdef HAVE_COMPRESS
        __m512d s0 = _mm512_setzero_pd(), s1 = s0, r0 = s0, r1 = s0;
        for (; k + 16 <= d; k += 16) {
            const __m512 v = _mm512_loadu_ps(w + k);
            const __m512i bits = _mm512_castps_si512(v);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            __m512i up = _mm512_srli_epi32(
                _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
            const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            up = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256((__m256i *)(c + k), _mm512_cvtepi32_epi16(up));
            const __m512 off = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(up, 16)));
            const __m512d v0 = _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                          v1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)),
                          o0 = _mm512_cvtps_pd(_mm512_castps512_ps256(off)),
                          o1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(off, 1));
            s0 = _mm512_fmadd_pd(v0, v0, s0);
            s1 = _mm512_fmadd_pd(v1, v1, s1);
            r0 = _mm512_fmadd_pd(o0, o0, r0);
            r1 = _mm512_fmadd_pd(o1, o1, r1);
        }
        sum = _mm512_reduce_add_pd(_mm512_add_pd(s0, s1));
        sum_rest = _mm512_reduce_add_pd(_mm512_add_pd(r0, r1));
#endif
        for (; k < d; k++) {
            c[k] = NAME(to_bf16)(w[k]);
            const double off = (double)w[k] - NAME(from_bf16)(c[k]);
            sum += (double)w[k] * w[k];
            sum_rest += off * off;
        }
        norm[j] = (float)(sqrt(sum) * (1 + 1e-6));
        rest[j] = (float)(sqrt(sum_rest) * (1 + 1e-6));
    }
}

/* Adam's numbers for one step: p −= step_size · m / (√v · inverse_root + eps). gain1 = 1 − β1 and gain2 = 1 − β2 come
   rounded once: taken from a float32 β2 of .999 the difference would be off by 5e-5. */
typedef struct {
    float gain1, beta2, gain2, eps, step_size, inverse_root;
} NAME(adam);

static inline VF NAME(adam_vector)(VF p, VF g, float *m, float *v, const NAME(adam) * a) {
    VF first = LOAD(m), second = LOAD(v);
    first += (g - first) * a->gain1;
    second = second * a->beta2 + g * g * a->gain2;
    STORE(m, first);
    STORE(v, second);
    return p - a->step_size * first / (NAME(vsqrt)(second) * a->inverse_root + a->eps);
}

static inline float NAME(adam_scalar)(float p, float g, float *m, float *v, const NAME(adam) * a) {
    *m += (g - *m) * a->gain1;
    *v = *v * a->beta2 + g * g * a->gain2;
    return p - a->step_size * *m / (sqrtf(*v) * a->inverse_root + a->eps);
}

/* Gradients and Adam of features first ≤ j < last at once: the gradients never reach memory.

   grad_enc = Σ delta·x, grad_dec = Σ pull·error + along[j]·W_dec[j] (the caller has the projection in along).
   decoder: 0 free, 1 rows scaled to norm 1 afterwards, 2 rows longer than 1 scaled to 1.
   m_*, v_*: Adam's moments, [F, d] as the weights. gain1 … inverse_root: NAME(adam).
   copy, norm, rest: as nsae_shadow, or NULL. Subnormal results are flushed to 0 on x86.
*/
EXPORT void NAME(nsae_update)(int64_t first, int64_t last, int64_t B, int64_t d, int64_t chunk, const int64_t *col_ptr,
                              const int32_t *rows, const float *delta, const float *pull, const float *x,
                              const float *error, const float *along, int32_t decoder, float *W_enc, float *W_dec,
                              float *m_enc, float *v_enc, float *m_dec, float *v_dec, float gain1, float beta2,
                              float gain2, float eps, float step_size, float inverse_root, uint16_t *copy, float *norm,
                              float *rest) {
    float enc[WIDE], dec[WIDE];
    const NAME(adam) a = {gain1, beta2, gain2, eps, step_size, inverse_root};
#ifdef NSAE_X86
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040); /* flush to zero, denormals are zero: a silent feature's moments decay for ever */
#endif
    for (int64_t k = 0; k < d; k += chunk)
        for (int64_t j = first; j < last; j++) {
            if (j + 1 < last && chunk <= 64) { /* longer pieces the processor fetches ahead by itself */
                const int64_t next = (j + 1) * d + k;
                for (int64_t o = 0; o < chunk && k + o < d; o += 16) {
                    __builtin_prefetch(W_enc + next + o, 1);
                    __builtin_prefetch(W_dec + next + o, 1);
                    __builtin_prefetch(m_enc + next + o, 1);
                    __builtin_prefetch(v_enc + next + o, 1);
                    __builtin_prefetch(m_dec + next + o, 1);
                    __builtin_prefetch(v_dec + next + o, 1);
                }
            }
            for (int64_t o = 0, wide; o < chunk && k + o < d; o += wide) {
                wide = NAME(piece)(chunk, o);
                NAME(gather)(col_ptr[j], col_ptr[j + 1], rows, delta, pull, x + k * B + o, error + k * B + o, chunk,
                             wide, enc, dec);
                const int64_t at = j * d + k + o, left = d - k - o, width = left < wide ? left : wide;
                const VF pull_along = NAME(splat)(along[j]);
                int64_t l = 0;
                for (; l + VL <= width; l += VL) {
                    const int64_t t = at + l;
                    STORE(W_enc + t, NAME(adam_vector)(LOAD(W_enc + t), LOAD(enc + l), m_enc + t, v_enc + t, &a));
                    const VF w = LOAD(W_dec + t);
                    STORE(W_dec + t,
                          NAME(adam_vector)(w, LOAD(dec + l) + pull_along * w, m_dec + t, v_dec + t, &a));
                }
                for (; l < width; l++) {
                    const int64_t t = at + l;
                    W_enc[t] = NAME(adam_scalar)(W_enc[t], enc[l], m_enc + t, v_enc + t, &a);
                    const float w = W_dec[t];
                    W_dec[t] = NAME(adam_scalar)(w, dec[l] + along[j] * w, m_dec + t, v_dec + t, &a);
                }
            }
        }
    if (decoder)
        for (int64_t j = first; j < last; j++) {
            float *w = W_dec + j * d;
            const float length = sqrtf(NAME(dot)(w, w, d));
            if (decoder == 2 && length <= 1) continue;
            const float scale = 1 / (length > 1e-30f ? length : 1e-30f);
            for (int64_t k = 0; k < d; k++) w[k] *= scale;
        }
#ifdef NSAE_X86
    _mm_setcsr(control);
#endif
    if (copy) NAME(nsae_shadow)(first, last, d, W_enc, copy, norm, rest);
}

/* Entries from by-row to by-feature order; within a feature in the order of rows.
   col_ptr [F + 1] is filled; to_rows, to_delta, to_pull [nnz] receive row, delta and pull of each entry;
   sum_delta[j] = Σ delta, sum_along[j] = Σ pull·dots over the feature's entries, in double, [F]. */
EXPORT void NAME(nsae_by_feature)(int64_t B, int64_t F, const int64_t *row_ptr, const int32_t *cols,
                                  const float *delta, const float *pull, const float *dots, int64_t *col_ptr,
                                  int32_t *to_rows, float *to_delta, float *to_pull, double *sum_delta,
                                  double *sum_along) {
    memset(col_ptr, 0, sizeof(int64_t) * (F + 1));
    memset(sum_delta, 0, sizeof(double) * F);
    memset(sum_along, 0, sizeof(double) * F);
    for (int64_t q = 0; q < row_ptr[B]; q++) col_ptr[cols[q] + 1]++;
    for (int64_t j = 0; j < F; j++) col_ptr[j + 1] += col_ptr[j];
    /* col_ptr[j] runs to the end of feature j and is shifted back afterwards. */
    for (int64_t i = 0; i < B; i++)
        for (int64_t q = row_ptr[i]; q < row_ptr[i + 1]; q++) {
            const int32_t j = cols[q];
            const int64_t to = col_ptr[j]++;
            to_rows[to] = (int32_t)i;
            to_delta[to] = delta[q];
            to_pull[to] = pull[q];
            sum_delta[j] += delta[q];
            sum_along[j] += (double)pull[q] * dots[q];
        }
    for (int64_t j = F; j > 0; j--) col_ptr[j] = col_ptr[j - 1];
    col_ptr[0] = 0;
}

/* sums[i] = Σ values over row i's entries, added up in double. */
EXPORT void NAME(nsae_row_sums)(int64_t B, const int64_t *row_ptr, const float *values, float *sums) {
    for (int64_t i = 0; i < B; i++) {
        double sum = 0;
        for (int64_t q = row_ptr[i]; q < row_ptr[i + 1]; q++) sum += values[q];
        sums[i] = (float)sum;
    }
}

#undef WIDE
#undef VF
#undef LOAD
#undef STORE
