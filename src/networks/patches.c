/* What the gradient of 3x3 filters is a matrix product of, for bf16 maps on CPUs.

   Maps are NHWC. `src/networks/native.py` builds this, `src/networks/convolution.py` calls it. */

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

/* out[pixel] = the 3x3 patch around it, row by row, zeros outside of the map: [b, h, w, 3, 3, c]. */
void patches3x3(const bf16 *x, bf16 *out, long b, long h, long w, long c) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < b; i++)
        for (long y = 0; y < h; y++)
            for (long z = 0; z < w; z++) {
                bf16 *to = out + ((i * h + y) * w + z) * 9 * c;
                long first = z > 0 ? z - 1 : 0, last = z + 1 < w ? z + 1 : w - 1;
                for (long row = y - 1; row <= y + 1; row++, to += 3 * c) {
                    if (row < 0 || row >= h) {
                        memset(to, 0, 3 * c * sizeof(bf16));
                        continue;
                    }
                    if (z == 0) memset(to, 0, c * sizeof(bf16));
                    memcpy(to + (first - z + 1) * c, x + ((i * h + row) * w + first) * c,
                           (last - first + 1) * c * sizeof(bf16));
                    if (z == w - 1) memset(to + 2 * c, 0, c * sizeof(bf16));
                }
            }
}

#define SIDE 32

/* out = x transposed; x has `rows` rows of c, and goes by blocks that stay in registers and the first cache. */
void transpose(const bf16 *x, bf16 *out, long rows, long c) {
#pragma omp parallel for schedule(static)
    for (long k = 0; k < c; k += SIDE) {
        long wide = c - k < SIDE ? c - k : SIDE;
        for (long r = 0; r < rows; r += SIDE) {
            long high = rows - r < SIDE ? rows - r : SIDE;
            bf16 block[SIDE][SIDE];
            for (long j = 0; j < high; j++) memcpy(block[j], x + (r + j) * c + k, wide * sizeof(bf16));
            for (long m = 0; m < wide; m++) {
                bf16 *restrict to = out + (k + m) * rows + r;
                for (long j = 0; j < high; j++) to[j] = block[j][m];
            }
        }
    }
}
