// Vectors of the width this file is compiled for. The compiler's own vector types, so that one text serves every instruction
// set; intrinsics only where those have no spelling (bfloat16 products, masks) or are compiled badly (widening).
//
// Everything is in unnamed namespaces, and nothing of the C++ library is used but types: an inline function or template of its
// that a compiler doesn't inline is a symbol of the same name in every instruction set's object, of which the linker keeps one,
// and plain processors would run another's instructions. `tests/ops/test_build.py` looks for such symbols.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}

template <class To, class From>
inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}
template <class V, class T>
inline V raw(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
inline vf load(const float* p) { return raw<vf>(p); }
inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    return bits_of<vf>(__builtin_convertvector(raw<vh>(p), vu) << 16);
#endif
}
inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = p[i];
    return v;
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Bit i: whether a[i] >= b.
inline unsigned at_least(vf a, float b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_NLT_UQ);  // a NaN counts, so that it is looked at
#else
    unsigned bits = 0;
    for (int i = 0; i < W; i++) bits |= unsigned(!(a[i] < b)) << i;
    return bits;
#endif
}

// To the nearest, ties to even; a NaN stays one.
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    p->bits = uint16_t(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    const vh h = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    const vu bits = bits_of<vu>(v), nan = (vu)(v != v);
    const vu near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    const vh h = __builtin_convertvector((near & ~nan) | (quiet & nan), vh);
#endif
    memcpy(p, &h, sizeof h);
}

inline float total(vf v) {
#if defined(__AVX512BF16__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[W];
    memcpy(x, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

}  // namespace
