/* y[m][n] = scale[n] * sum_k x[m][k] * w[n][k] + bias[n] for few rows x: the row-major weight is read once from memory.
   Sums are in float32. Vector extensions of GCC and clang: one source for AVX-512, AVX2 and NEON. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef int16_t shorts __attribute__((vector_size(LANES * 2)));
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
  shorts wide = __builtin_convertvector(v, shorts); /* in two steps, for which compilers know an instruction each */
  return __builtin_convertvector(__builtin_convertvector(wide, ints), floats);
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
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
}

/* Up to 4 rows: the features of one output lie in the lanes. Two chains of sums for each row of x hide the latency of
   an addition. m is known where this is expanded. */
#define FEW(KIND, TYPE)                                                                                               \
  INLINE void few_##KIND(const TYPE *w, const float *scale, const float *x, const float *bias, float *y, int64_t n,   \
                         int64_t k, const int m, int threads) {                                                       \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t row = 0; row < n; row++) {         \
      const TYPE *p = w + row * k;                                                                                    \
      floats a[4] = {{0}}, b[4] = {{0}};                                                                              \
      int64_t i = 0;                                                                                                  \
      for (; i + 2 * LANES <= k; i += 2 * LANES) {                                                                    \
        floats u = load_##KIND(p + i), v = load_##KIND(p + i + LANES);                                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < m; j++) {                                                         \
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
  }

/* Scratch of the calling thread, kept: fresh pages would cost more than the product. */
static float *room(int64_t values) {
  static _Thread_local float *held;
  static _Thread_local int64_t size;
  if (values > size) {
    free(held);
    held = aligned_alloc(LANES * 4, (values + LANES - 1) / LANES * LANES * 4);
    size = values;
  }
  return held;
}

/* What the next outputs read: the machine itself does not foresee it where several rows of w are read side by side. */
#define SOON(at) __builtin_prefetch(at, 0, 2)

/* Up to 8 rows: three outputs share what is read of x, which is more than lies nearest. The loops are written out here
   and below, because arrays of sums would not be kept in registers. */
#define DO8(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define THREE(j) floats s##j = {0}, t##j = {0}, r##j = {0};
#define ADD_THREE(j) { floats one = load_f32(x + j * k + i); s##j += u * one; t##j += v * one; r##j += z * one; }
#define TOTAL_THREE(j) sums[j * 3] = total(s##j), sums[j * 3 + 1] = total(t##j), sums[j * 3 + 2] = total(r##j);

#define EIGHT(KIND, TYPE)                                                                                             \
  INLINE void eight_##KIND(const TYPE *w, const float *scale, const float *given, const float *bias, float *y,        \
                           int64_t n, int64_t k, int64_t m, int threads) {                                            \
    float *x = room(8 * k);                                                                                           \
    memcpy(x, given, sizeof(float) * m * k);                                                                          \
    memset(x + m * k, 0, sizeof(float) * (8 - m) * k);                                                                \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t o = 0; o < n; o += 3) {            \
      int tall = n - o < 3 ? n - o : 3;                                                                               \
      const TYPE *p = w + o * k, *q = tall > 1 ? p + k : p, *l = tall > 2 ? q + k : p;                                \
      int64_t i = 0;                                                                                                  \
      float sums[24];                                                                                                 \
      DO8(THREE) for (; i + LANES <= k; i += LANES) {                                                                 \
        floats u = load_##KIND(p + i), v = load_##KIND(q + i), z = load_##KIND(l + i);                                \
        DO8(ADD_THREE)                                                                                                \
        SOON(p + 3 * k + i), SOON(q + 3 * k + i), SOON(l + 3 * k + i);                                                \
      }                                                                                                               \
      DO8(TOTAL_THREE) for (int j = 0; j < m; j++) for (int e = 0; e < tall; e++) {                                   \
        float sum = sums[j * 3 + e];                                                                                  \
        for (int64_t at = i; at < k; at++) sum += one_##KIND(p + e * k + at) * x[j * k + at];                         \
        y[j * n + o + e] = sum * (scale ? scale[o + e] : 1.0f) + (bias ? bias[o + e] : 0.0f);                         \
      }                                                                                                               \
    }                                                                                                                 \
  }

/* Long sums of float32 are made of shorter ones: `sum` goes into `flat`, and begins anew. */
INLINE void keep(float *flat, floats *sum) {
  floats all = load_f32(flat) + *sum;
  memcpy(flat, &all, sizeof all);
  *sum = (floats){0};
}

/* More rows: the rows of x lie in the lanes, 32 (pair) or 16 of them at a time, and the sums of 12, 4 or 1 outputs
   stay in registers. `turned` is x transposed: for each 32 rows, k times 32 values. `wide` has 16 features of each
   output, as float32 and side by side. */
#define DO1(M) M(0)
#define DO4(M) M(0) M(1) M(2) M(3)
#define DO12(M) DO4(M) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define SUMS(o) floats a##o = {0}, b##o = {0};
#define ADD(o) { float one = wide[o * LANES + c]; a##o += one * x; if (pair) b##o += one * z; }
#define WIDEN(o, KIND) { floats f = load_##KIND(w + o * k + i); memcpy(wide + o * LANES, &f, sizeof f); AFTER(o) }
#define AFTER(o) SOON(w + (tall + o) * k + i);
#define KEEP(o) keep(flat + o * 2 * LANES, &a##o), keep(flat + (o * 2 + 1) * LANES, &b##o);

#define WIDEN_f32(o) WIDEN(o, f32)
#define WIDEN_bf16(o) WIDEN(o, bf16)
#define WIDEN_int8(o) WIDEN(o, int8)
#define TILE(KIND, TYPE, TALL)                                                                                        \
  INLINE void tile##TALL##_##KIND(const TYPE *w, const float *scale, const float *turned, const float *bias,          \
                                  float *y, int64_t n, int64_t k, int m, const int pair) {                            \
    const int tall = TALL;                                                                                            \
    float wide[TALL * LANES], flat[TALL * 2 * LANES] = {0};                                                           \
    DO##TALL(SUMS) for (int64_t i = 0; i < k;) {                                                                      \
      int some = k - i < LANES ? k - i : LANES;                                                                       \
      if (some == LANES) { DO##TALL(WIDEN_##KIND) }                                                                   \
      else for (int o = 0; o < tall; o++) for (int c = 0; c < some; c++)                                              \
          wide[o * LANES + c] = one_##KIND(w + o * k + i + c);                                                        \
      for (int c = 0; c < some; c++) {                                                                                \
        floats x = load_f32(turned + (i + c) * 2 * LANES), z = load_f32(turned + ((i + c) * 2 + 1) * LANES);          \
        DO##TALL(ADD)                                                                                                 \
      }                                                                                                               \
      i += some;                                                                                                      \
      if (i % 256 == 0 || i == k) { DO##TALL(KEEP) }                                                                  \
    }                                                                                                                 \
    for (int j = 0; j < m; j++) for (int o = 0; o < tall; o++)                                                        \
        y[j * n + o] = flat[o * 2 * LANES + j] * (scale ? scale[o] : 1.0f) + (bias ? bias[o] : 0.0f);                 \
  }

#define TILES(KIND, TYPE)                                                                                             \
  TILE(KIND, TYPE, 1)                                                                                                 \
  TILE(KIND, TYPE, 4)                                                                                                 \
  TILE(KIND, TYPE, 12)                                                                                                \
  INLINE void tiles_##KIND(const TYPE *w, const float *scale, const float *x, const float *bias, float *y, int64_t n, \
                           int64_t k, int64_t m, int threads) {                                                       \
    int64_t blocks = (m + 31) / 32, high = n / 12, middle = (n - high * 12) / 4, low = n - high * 12 - middle * 4;    \
    float *turned = room(blocks * k * 32);                                                                            \
    _Pragma("omp parallel num_threads(threads)") {                                                                    \
      _Pragma("omp for schedule(static) collapse(2)") for (int64_t block = 0; block < blocks; block++)                \
        for (int64_t i = 0; i < k; i += LANES) for (int64_t j = block * 32; j < block * 32 + 32; j++)                 \
          for (int64_t c = i; c < i + LANES && c < k; c++)                                                            \
            turned[(block * k + c) * 32 + j % 32] = j < m ? x[j * k + c] : 0.0f;                                      \
      _Pragma("omp for schedule(static)") for (int64_t at = 0; at < high + middle + low; at++) {                      \
        int64_t last = high * 12 + middle * 4 + at - high - middle;                                                   \
        int64_t o = at < high ? at * 12 : at < high + middle ? high * 12 + (at - high) * 4 : last;                    \
        const float *s = scale ? scale + o : 0, *b = bias ? bias + o : 0;                                             \
        for (int64_t block = 0; block < blocks; block++) {                                                            \
          const float *t = turned + block * k * 32;                                                                   \
          float *out = y + block * 32 * n + o;                                                                        \
          int rows = m - block * 32 < 32 ? m - block * 32 : 32, pair = rows > LANES;                                  \
          if (at < high && pair) tile12_##KIND(w + o * k, s, t, b, out, n, k, rows, 1);                               \
          else if (at < high) tile12_##KIND(w + o * k, s, t, b, out, n, k, rows, 0);                                  \
          else if (at < high + middle) tile4_##KIND(w + o * k, s, t, b, out, n, k, rows, 1);                          \
          else tile1_##KIND(w + o * k, s, t, b, out, n, k, rows, 1);                                                  \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
  }

#define KERNEL(KIND, TYPE)                                                                                            \
  FEW(KIND, TYPE)                                                                                                     \
  EIGHT(KIND, TYPE)                                                                                                   \
  TILES(KIND, TYPE)                                                                                                   \
  void rows_##KIND(const TYPE *w, const float *scale, const float *x, const float *bias, float *y, int64_t n,         \
                   int64_t k, int64_t m, int threads) {                                                               \
    if (n * k < 32768) threads = 1; /* below this, starting the threads costs more than it saves */                   \
    /* Long rows of x crowd each other out of the nearest cache. */                                                   \
    switch (m > 2 && m <= 8 && k >= 1024 ? 8 : m) {                                                                   \
      case 1: few_##KIND(w, scale, x, bias, y, n, k, 1, threads); break;                                              \
      case 2: few_##KIND(w, scale, x, bias, y, n, k, 2, threads); break;                                              \
      case 3: few_##KIND(w, scale, x, bias, y, n, k, 3, threads); break;                                              \
      case 4: few_##KIND(w, scale, x, bias, y, n, k, 4, threads); break;                                              \
      case 5: case 6: case 7: case 8: eight_##KIND(w, scale, x, bias, y, n, k, m, threads); break;                    \
      default: tiles_##KIND(w, scale, x, bias, y, n, k, m, threads);                                                  \
    }                                                                                                                 \
  }

KERNEL(f32, float)
KERNEL(bf16, uint16_t)
KERNEL(int8, int8_t)
