/* Max pooling, batch normalization and GELU of bf16 maps in one sweep forward and two back, for CPUs.

   Maps are NHWC: a pixel's channels lie side by side, so every inner loop runs over channels and is vectorized by the
   compiler. Sums over pixels are taken image by image in a fixed order: the result depends on the number of threads
   alone. `src/networks/native.py` builds this, `src/networks/fused.py` calls it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float widen(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded; /* NaN stays NaN */
}

/* exp(x) for x <= 0, to 2e-7. */
static inline float exp_negative(float x) {
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    float whole = floorf(t), part = t - whole;
    float p = 1.8775767e-3f;
    p = p * part + 8.9893397e-3f;
    p = p * part + 5.5826318e-2f;
    p = p * part + 2.4015361e-1f;
    p = p * part + 6.9315308e-1f;
    p = p * part + 9.9999994e-1f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* The normal distribution: density e * 0.399 and, by Abramowitz and Stegun 7.1.26, its integral to 1.5e-7. */
static inline float normal(float z, float *e) {
    float a = fabsf(z) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * a);
    *e = exp_negative(-a * a);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * *e;
    return z > 0 ? 1.0f - tail : tail;
}

/* x [b, h, w, c] -> p [b, h/2, w/2, c] with where its maximum was, and per channel sum and sum of squares of p. Without
   pooling (arg is null) p is x. `partial` has room for 2 * c floats an image. */
void pool_and_sum(const bf16 *x, bf16 *p, uint8_t *arg, float *partial, double *sums, long b, long h, long w, long c) {
    long oh = arg ? h / 2 : h, ow = arg ? w / 2 : w;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < b; i++) {
        float *restrict sum = partial + 2 * c * i, *restrict square = sum + c;
        memset(sum, 0, 2 * c * sizeof(float));
        for (long y = 0; y < oh; y++)
            for (long z = 0; z < ow; z++) {
                long at = ((i * oh + y) * ow + z) * c;
                if (arg) {
                    const bf16 *restrict q0 = x + ((i * h + 2 * y) * w + 2 * z) * c, *restrict q1 = q0 + c,
                               *restrict q2 = q0 + w * c, *restrict q3 = q2 + c;
                    bf16 *restrict out = p + at;
                    uint8_t *restrict index = arg + at;
#pragma omp simd
                    for (long k = 0; k < c; k++) {
                        float m = widen(q0[k]), v1 = widen(q1[k]), v2 = widen(q2[k]), v3 = widen(q3[k]);
                        uint32_t n = 0;
                        int t1 = v1 > m || v1 != v1;
                        m = t1 ? v1 : m, n = t1 ? 1 : n;
                        int t2 = v2 > m || v2 != v2;
                        m = t2 ? v2 : m, n = t2 ? 2 : n;
                        int t3 = v3 > m || v3 != v3;
                        m = t3 ? v3 : m, n = t3 ? 3 : n;
                        uint32_t bits;
                        memcpy(&bits, &m, 4);
                        out[k] = (bf16)(bits >> 16);
                        index[k] = (uint8_t)n;
                        sum[k] += m;
                        square[k] += m * m;
                    }
                } else {
                    const bf16 *restrict q = x + at;
#pragma omp simd
                    for (long k = 0; k < c; k++) {
                        float m = widen(q[k]);
                        sum[k] += m;
                        square[k] += m * m;
                    }
                }
            }
    }
    for (long k = 0; k < 2 * c; k++) sums[k] = 0;
    for (long i = 0; i < b; i++)
        for (long k = 0; k < 2 * c; k++) sums[k] += partial[2 * c * i + k];
}

/* y = gelu(p * scale + shift), n pixels. */
void norm_gelu(const bf16 *p, bf16 *y, const float *scale, const float *shift, long n, long c) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        const bf16 *restrict q = p + i * c;
        bf16 *restrict out = y + i * c;
#pragma omp simd
        for (long k = 0; k < c; k++) {
            float e, z = widen(q[k]) * scale[k] + shift[k];
            out[k] = narrow(z * normal(z, &e));
        }
    }
}

/* d = g * gelu'(z), and per channel the sums of d and of d * p. */
void gelu_back(const bf16 *g, const bf16 *p, bf16 *d, const float *scale, const float *shift, float *partial,
               double *sums, long b, long pixels, long c) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < b; i++) {
        float *restrict sum = partial + 2 * c * i, *restrict dot = sum + c;
        memset(sum, 0, 2 * c * sizeof(float));
        for (long j = 0; j < pixels; j++) {
            long at = (i * pixels + j) * c;
            const bf16 *restrict gr = g + at, *restrict q = p + at;
            bf16 *restrict out = d + at;
#pragma omp simd
            for (long k = 0; k < c; k++) {
                float e, v = widen(q[k]), z = v * scale[k] + shift[k];
                float cumulative = normal(z, &e);
                float of_z = widen(gr[k]) * (cumulative + 0.39894228f * z * e);
                out[k] = narrow(of_z);
                sum[k] += of_z;
                dot[k] += of_z * v;
            }
        }
    }
    for (long k = 0; k < 2 * c; k++) sums[k] = 0;
    for (long i = 0; i < b; i++)
        for (long k = 0; k < 2 * c; k++) sums[k] += partial[2 * c * i + k];
}

/* The gradient of x: of p it is scale * d + of_p * p + of_one; it goes to where the maximum was. */
void norm_pool_back(const bf16 *d, const bf16 *p, const uint8_t *arg, bf16 *gx, const float *scale, const float *of_p,
                    const float *of_one, long b, long h, long w, long c) {
    long oh = arg ? h / 2 : h, ow = arg ? w / 2 : w;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < b; i++) {
        for (long y = 0; y < oh; y++)
            for (long z = 0; z < ow; z++) {
                long at = ((i * oh + y) * ow + z) * c;
                const bf16 *restrict dr = d + at, *restrict q = p + at;
                if (arg) {
                    bf16 *restrict q0 = gx + ((i * h + 2 * y) * w + 2 * z) * c, *restrict q1 = q0 + c,
                         *restrict q2 = q0 + w * c, *restrict q3 = q2 + c;
                    const uint8_t *restrict index = arg + at;
#pragma omp simd
                    for (long k = 0; k < c; k++) {
                        bf16 v = narrow(widen(dr[k]) * scale[k] + widen(q[k]) * of_p[k] + of_one[k]);
                        uint8_t n = index[k];
                        q0[k] = n == 0 ? v : 0;
                        q1[k] = n == 1 ? v : 0;
                        q2[k] = n == 2 ? v : 0;
                        q3[k] = n == 3 ? v : 0;
                    }
                } else {
                    bf16 *restrict out = gx + at;
#pragma omp simd
                    for (long k = 0; k < c; k++)
                        out[k] = narrow(widen(dr[k]) * scale[k] + widen(q[k]) * of_p[k] + of_one[k]);
                }
            }
        if (arg && w % 2)
            for (long y = 0; y < h; y++) memset(gx + ((i * h + y) * w + w - 1) * c, 0, c * sizeof(bf16));
        if (arg && h % 2) memset(gx + (i * h + h - 1) * w * c, 0, w * c * sizeof(bf16));
    }
}
