/* GELU by its tanh formula, x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.

   The tanh of torch's kernel is three quarters of its time; a sigmoid needs one exponential, which is a polynomial here
   that the compiler turns into vector instructions. Every element is computed by the same instructions wherever it
   stands: what is left over at the end is padded to a whole vector. */

#include <stdint.h>
#include <string.h>

enum { LANES = 64, PIECE = 1 << 14 };

static inline float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t narrow(float value) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

static inline float exponential(float x) { /* 2^n 2^f with |f| <= 1/2: within 2e-7 of its value */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float scaled = x * 1.44269504f;
    float whole = __builtin_rintf(scaled);
    float f = scaled - whole;
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline float share(float x) { /* sigmoid(2 u) */
    float u = 0.79788456f * (x + 0.044715f * x * x * x);
    return 1.0f / (1.0f + exponential(-2.0f * u));
}

static inline float value(float x) { return x * share(x); }

static inline float slope(float x) {
    float s = share(x);
    float steep = 2.0f * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    return s + x * s * (1.0f - s) * steep;
}

#define SAME(x) (x)
#define FUNCTIONS(NAME, TYPE, READ, WRITE)                                                                          \
    static inline void NAME##_value(const TYPE *restrict x, TYPE *restrict y) {                                     \
        for (int i = 0; i < LANES; i++) y[i] = WRITE(value(READ(x[i])));                                            \
    }                                                                                                               \
    static inline void NAME##_slope(const TYPE *restrict x, const TYPE *restrict g, TYPE *restrict y) {             \
        for (int i = 0; i < LANES; i++) y[i] = WRITE(READ(g[i]) * slope(READ(x[i])));                               \
    }                                                                                                               \
    void gelu_##NAME(const TYPE *x, const TYPE *g, TYPE *y, int64_t count, int threads) {                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                           \
        for (int64_t begin = 0; begin < count; begin += PIECE) {                                                    \
            int64_t end = begin + PIECE < count ? begin + PIECE : count, i = begin;                                 \
            for (; i + LANES <= end; i += LANES)                                                                    \
                if (g) NAME##_slope(x + i, g + i, y + i);                                                           \
                else NAME##_value(x + i, y + i);                                                                    \
            if (i < end) {                                                                                          \
                TYPE some[LANES] = {0}, given[LANES] = {0}, out[LANES];                                             \
                memcpy(some, x + i, (end - i) * sizeof(TYPE));                                                      \
                if (g) memcpy(given, g + i, (end - i) * sizeof(TYPE));                                              \
                if (g) NAME##_slope(some, given, out);                                                              \
                else NAME##_value(some, out);                                                                       \
                memcpy(y + i, out, (end - i) * sizeof(TYPE));                                                       \
            }                                                                                                       \
        }                                                                                                           \
    }

FUNCTIONS(f32, float, SAME, SAME)
FUNCTIONS(bf16, uint16_t, widen, narrow)
