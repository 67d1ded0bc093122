// Products of several tokens with several rows at once, in the two layouts there are.
#pragma once

#include "vectors.h"

// Loops over a tile must vanish, or the compiler keeps the sums in memory and stores them at every step.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// ---- rows as they are: x_t · w_r over n numbers. Both run along memory, so a sum's lanes are added up at its end.

// out[t · MR + r] = x_t · w_r. Not inlined: there are many callers, and compiling takes long enough.
template <int MT, int MR, class X, class T>
__attribute__((noinline)) void dots(const X* const* x, const T* const* w, int64_t n, float* out) {
    vf acc[MT][MR] = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf row[MR];
        UNROLL
        for (int r = 0; r < MR; r++) row[r] = load(w[r] + i);
        UNROLL
        for (int t = 0; t < MT; t++) {
            const vf token = load(x[t] + i);
            UNROLL
            for (int r = 0; r < MR; r++) acc[t][r] += token * row[r];
        }
    }
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int r = 0; r < MR; r++) {
            float sum = total(acc[t][r]);
            for (int64_t j = i; j < n; j++) sum += widen(x[t][j]) * widen(w[r][j]);
            out[t * MR + r] = sum;
        }
}

#if defined(__AVX512BF16__)
// The sums over the lanes of 16 vectors, side by side.
inline __m512 totals(const __m512* v) {
    __m512 two[8], four[4], eight[2];
    UNROLL
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    UNROLL
    for (int i = 0; i < 2; i++) eight[i] = halves(four[2 * i], four[2 * i + 1]);
    return halves(eight[0], eight[1]);
}

template <int MT, int MR>
__attribute__((noinline)) void dots(const bf16* const* x, const bf16* const* w, int64_t n, float* out) {
    __m512 acc[MT][MR];
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int r = 0; r < MR; r++) acc[t][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 mask = n - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (n - i)) - 1;
        __m512bh row[MR];
        UNROLL
        for (int r = 0; r < MR; r++) row[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[r] + i);
        UNROLL
        for (int t = 0; t < MT; t++) {
            const __m512bh token = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[t] + i);
            UNROLL
            for (int r = 0; r < MR; r++) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], token, row[r]);
        }
    }
    __m512 sums[16] = {};  // a plain copy, or the compiler keeps the accumulators in memory
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int r = 0; r < MR; r++) sums[t * MR + r] = acc[t][r];
    float flat[16];
    _mm512_storeu_ps(flat, totals(sums));
    memcpy(out, flat, sizeof(float) * MT * MR);
}
#endif

// Every token with every row, in tiles of at most 4 by 4: put(token, row, value).
template <class X, class T, class Put>
inline void products(const X* const* x, int64_t tokens, const T* const* w, int64_t rows, int64_t n, Put put) {
    float out[16];
    for (int64_t r = 0; r < rows;) {
        const int mr = rows - r >= 4 ? 4 : 1;
        for (int64_t t = 0; t < tokens; t += 4) {
            const int mt = int(min<int64_t>(4, tokens - t));
            switch (mt * 8 + mr) {
                case 36: dots<4, 4>(x + t, w + r, n, out); break;
                case 28: dots<3, 4>(x + t, w + r, n, out); break;
                case 20: dots<2, 4>(x + t, w + r, n, out); break;
                case 12: dots<1, 4>(x + t, w + r, n, out); break;
                case 33: dots<4, 1>(x + t, w + r, n, out); break;
                case 25: dots<3, 1>(x + t, w + r, n, out); break;
                case 17: dots<2, 1>(x + t, w + r, n, out); break;
                default: dots<1, 1>(x + t, w + r, n, out);
            }
            for (int i = 0; i < mt; i++)
                for (int j = 0; j < mr; j++) put(t + i, r + j, out[i * mr + j]);
        }
        r += mr;
    }
}

// ---- gates, 16 of them side by side: [d][16]. A token's numbers are broadcast, and 16 scores come out together.

constexpr int LANES = 16;

// out[t · stride + lane] = Σ_i x_t[i] · codes[i][lane]; T is int8_t or float.
template <int MT, class T>
__attribute__((noinline)) void lanes_tile(const float* const* x, const T* codes, int64_t d, float* out, int64_t stride) {
    constexpr int V = LANES / W, U = MT * V >= 8 ? 1 : 4;  // enough sums under way to hide how long one addition takes
    vf acc[U][MT][V] = {};
    int64_t i = 0;
    const auto step = [&](int u) {
        UNROLL
        for (int v = 0; v < V; v++) {
            const vf code = load(codes + (i + u) * LANES + v * W);
            UNROLL
            for (int t = 0; t < MT; t++) acc[u][t][v] += x[t][i + u] * code;
        }
    };
    for (; i + U <= d; i += U)
        UNROLL
        for (int u = 0; u < U; u++) step(u);
    for (; i < d; i++) step(0);
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int v = 0; v < V; v++) {
            vf sum = acc[0][t][v];
            UNROLL
            for (int u = 1; u < U; u++) sum += acc[u][t][v];
            store(out + t * stride + v * W, sum);
        }
}

template <class T>
inline void lanes(const float* const* x, int64_t tokens, const T* codes, int64_t d, float* out, int64_t stride) {
    constexpr int M = W == 16 ? 8 : W == 8 ? 4 : 2;  // so that the sums fit the registers
    int64_t t = 0;
    for (; t + M <= tokens; t += M) lanes_tile<M>(x + t, codes, d, out + t * stride, stride);
    for (; t < tokens; t++) lanes_tile<1>(x + t, codes, d, out + t * stride, stride);
}

#if defined(__AVX512BF16__)
// Codes as pairs of bfloat16, in which whole numbers below 128 are exact: [⌈d/2⌉][16][2].
inline void pair_up(const int8_t* codes, int64_t d, bf16* out) {
    const __m512i weave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < d; i += 2) {
        const vf first = load(codes + i * LANES), second = i + 1 < d ? load(codes + (i + 1) * LANES) : vf{};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        _mm512_storeu_si512(out + i * LANES, _mm512_permutexvar_epi16(weave, both));
    }
}

template <int MT, int NB>
__attribute__((noinline)) void lanes_tile(const bf16* const* x, const bf16* codes, int64_t block, int64_t d, float* out,
                                          int64_t stride) {
    __m512 acc[MT][NB];
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int b = 0; b < NB; b++) acc[t][b] = _mm512_setzero_ps();
    const auto step = [&](int64_t i, uint32_t mask) {
        __m512bh row[NB];
        UNROLL
        for (int b = 0; b < NB; b++) row[b] = (__m512bh)_mm512_loadu_si512(codes + b * block + i * LANES);
        UNROLL
        for (int t = 0; t < MT; t++) {
            uint32_t pair = 0;
            memcpy(&pair, x[t] + i, mask ? 4 : 2);
            const __m512bh token = (__m512bh)_mm512_set1_epi32(int(pair));
            UNROLL
            for (int b = 0; b < NB; b++) acc[t][b] = _mm512_dpbf16_ps(acc[t][b], token, row[b]);
        }
    };
    int64_t i = 0;
    for (; i + 2 <= d; i += 2) step(i, 1);
    if (i < d) step(i, 0);
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int b = 0; b < NB; b++) _mm512_storeu_ps(out + t * stride + b * LANES, acc[t][b]);
}

// `blocks` (1 or 2) blocks of 16, `block` numbers apart.
inline void lanes(const bf16* const* x, int64_t tokens, const bf16* codes, int64_t block, int blocks, int64_t d, float* out,
                  int64_t stride) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8)
        if (blocks == 2) lanes_tile<8, 2>(x + t, codes, block, d, out + t * stride, stride);
        else lanes_tile<8, 1>(x + t, codes, block, d, out + t * stride, stride);
    for (; t < tokens; t++)
        if (blocks == 2) lanes_tile<1, 2>(x + t, codes, block, d, out + t * stride, stride);
        else lanes_tile<1, 1>(x + t, codes, block, d, out + t * stride, stride);
}
#endif

// ---- outer products: sums_t[i] += Σ_r h_t[r] · rows[r · stride + i], MT tokens at once.

template <int MT, int NV, class T>
__attribute__((noinline)) void outer_tile(const float* const* h, int64_t rank, const T* rows, int64_t stride,
                                          float* const* sums, int64_t at) {
    vf acc[MT][NV];
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int v = 0; v < NV; v++) acc[t][v] = load(sums[t] + at + v * W);
    for (int64_t r = 0; r < rank; r++) {
        vf row[NV];
        UNROLL
        for (int v = 0; v < NV; v++) row[v] = load(rows + r * stride + at + v * W);
        UNROLL
        for (int t = 0; t < MT; t++)
            UNROLL
            for (int v = 0; v < NV; v++) acc[t][v] += h[t][r] * row[v];
    }
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int v = 0; v < NV; v++) store(sums[t] + at + v * W, acc[t][v]);
}

#if defined(__AVX512BF16__)
// Two rows at a time, their numbers woven into pairs; h_t is padded to an even length with zeros.
template <int MT, int NV>
__attribute__((noinline)) void outer_tile(const bf16* const* h, int64_t rank, const bf16* rows, int64_t stride,
                                          float* const* sums, int64_t at) {
    static_assert(NV % 2 == 0, "a load holds two vectors of sums");
    alignas(64) static const auto order = [] {
        struct { uint16_t low[32], high[32]; } o{};
        for (int i = 0; i < 16; i++) {
            o.low[2 * i] = uint16_t(i), o.low[2 * i + 1] = uint16_t(i + 32);
            o.high[2 * i] = uint16_t(i + 16), o.high[2 * i + 1] = uint16_t(i + 48);
        }
        return o;
    }();
    const __m512i low = _mm512_loadu_si512(order.low), high = _mm512_loadu_si512(order.high);
    __m512 acc[MT][NV];
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int v = 0; v < NV; v++) acc[t][v] = _mm512_loadu_ps(sums[t] + at + v * W);
    for (int64_t r = 0; r < rank; r += 2) {
        const bf16 *first = rows + r * stride + at, *second = r + 1 < rank ? first + stride : first;
        __m512bh row[NV];
        UNROLL
        for (int v = 0; v < NV; v += 2) {
            const __m512i a = _mm512_loadu_si512(first + v * W), b = _mm512_loadu_si512(second + v * W);
            row[v] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
            row[v + 1] = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
        }
        UNROLL
        for (int t = 0; t < MT; t++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(raw<int>(h[t] + r));
            UNROLL
            for (int v = 0; v < NV; v++) acc[t][v] = _mm512_dpbf16_ps(acc[t][v], pair, row[v]);
        }
    }
    UNROLL
    for (int t = 0; t < MT; t++)
        UNROLL
        for (int v = 0; v < NV; v++) _mm512_storeu_ps(sums[t] + at + v * W, acc[t][v]);
}
#endif

template <int MT, class H, class T>
inline void outer(const H* const* h, int64_t rank, const T* rows, int64_t stride, int64_t n, float* const* sums) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) outer_tile<MT, 4>(h, rank, rows, stride, sums, i);
    for (; i + 2 * W <= n; i += 2 * W) outer_tile<MT, 2>(h, rank, rows, stride, sums, i);
    for (; i < n; i++)
        UNROLL
        for (int t = 0; t < MT; t++)
            for (int64_t r = 0; r < rank; r++) sums[t][i] += widen(h[t][r]) * widen(rows[r * stride + i]);
}

}  // namespace
