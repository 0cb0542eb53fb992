/* y[m][n] = scale[n] * sum_k x[m][k] * w[n][k] + bias[n] for few rows x: the row-major weight is read once from memory.
   Sums are in float32. Vector extensions of GCC and clang: one source for AVX-512, AVX2 and NEON. */
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE floats load_f32(const float *p) {
  floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE floats load_bf16(const uint16_t *p) { /* bfloat16 is the upper half of a float32 */
  halves v;
  memcpy(&v, p, sizeof v);
  words wide = __builtin_convertvector(v, words) << 16;
  floats f;
  memcpy(&f, &wide, sizeof f);
  return f;
}
INLINE floats load_int8(const int8_t *p) {
  bytes v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, ints), floats);
}
INLINE float one_f32(const float *p) { return *p; }
INLINE float one_bf16(const uint16_t *p) {
  uint32_t wide = (uint32_t)*p << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
INLINE float one_int8(const int8_t *p) { return (float)*p; }
INLINE float total(floats v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

/* Two chains of sums for each row of x hide the latency of an addition. m is known where this is expanded. */
#define KERNEL(KIND, TYPE)                                                                                            \
  INLINE void few_##KIND(const TYPE *w, const float *scale, const float *x, const float *bias, float *y, int64_t n,   \
                         int64_t k, const int m, int threads) {                                                       \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t row = 0; row < n; row++) {         \
      const TYPE *p = w + row * k;                                                                                    \
      floats a[4] = {{0}}, b[4] = {{0}};                                                                              \
      int64_t i = 0;                                                                                                  \
      for (; i + 2 * LANES <= k; i += 2 * LANES) {                                                                    \
        floats u = load_##KIND(p + i), v = load_##KIND(p + i + LANES);                                                \
        for (int j = 0; j < m; j++) {                                                                                 \
          a[j] += u * load_f32(x + j * k + i);                                                                        \
          b[j] += v * load_f32(x + j * k + i + LANES);                                                                \
        }                                                                                                             \
      }                                                                                                               \
      for (int j = 0; j < m; j++) {                                                                                   \
        float sum = total(a[j] + b[j]);                                                                               \
        for (int64_t e = i; e < k; e++) sum += one_##KIND(p + e) * x[j * k + e];                                      \
        y[j * n + row] = sum * (scale ? scale[row] : 1.0f) + (bias ? bias[row] : 0.0f);                               \
      }                                                                                                               \
    }                                                                                                                 \
  }                                                                                                                   \
  void rows_##KIND(const TYPE *w, const float *scale, const float *x, const float *bias, float *y, int64_t n,         \
                   int64_t k, int64_t m, int threads) {                                                               \
    if (n * k < 32768) threads = 1; /* below this, starting the threads costs more than it saves */                   \
    for (; m > 0; m -= 4, x += 4 * k, y += 4 * n) switch (m) {                                                        \
        case 1: few_##KIND(w, scale, x, bias, y, n, k, 1, threads); break;                                            \
        case 2: few_##KIND(w, scale, x, bias, y, n, k, 2, threads); break;                                            \
        case 3: few_##KIND(w, scale, x, bias, y, n, k, 3, threads); break;                                            \
        default: few_##KIND(w, scale, x, bias, y, n, k, 4, threads);                                                  \
      }                                                                                                               \
  }

KERNEL(f32, float)
KERNEL(bf16, uint16_t)
KERNEL(int8, int8_t)
