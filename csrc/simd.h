// Vectors of W bytes: the compiler's own vector types, so that one body serves every instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__GNUC__)
#define BEV_INLINE inline __attribute__((always_inline))
#define BEV_LAMBDA __attribute__((always_inline))
#else
#define BEV_INLINE inline
#define BEV_LAMBDA
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define BEV_X86 1
#include <emmintrin.h>
#define BEV_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define BEV_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define BEV_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: everything that takes one is inlined
#endif
#endif

enum class Isa { base, avx2, avx512 };

// What the machine has, or less when BEV_REID_ISA asks for less (for tests and benchmarks).
inline Isa isa() {
    static const Isa chosen = [] {
        Isa best = Isa::base;
#ifdef BEV_X86
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
        if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) best = Isa::avx512;
#endif
        const char* asked = std::getenv("BEV_REID_ISA");
        const std::string name = asked ? asked : "";
        if (name == "base") best = Isa::base;
        if (name == "avx2" && best == Isa::avx512) best = Isa::avx2;
        return best;
    }();
    return chosen;
}
inline const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "base"; }

#if defined(__GNUC__)
template <typename T, int W> struct VecOf {
    typedef T type __attribute__((vector_size(W)));
    typedef T in_memory __attribute__((vector_size(W), aligned(alignof(T)), may_alias));
};
template <typename T, int W> using Vec = typename VecOf<T, W>::type;

template <typename T, int W> BEV_INLINE Vec<T, W> load(const T* p) { return *reinterpret_cast<const typename VecOf<T, W>::in_memory*>(p); }
template <typename T, int W> BEV_INLINE void store(T* p, Vec<T, W> v) { *reinterpret_cast<typename VecOf<T, W>::in_memory*>(p) = v; }

// Sum of the lanes, always in the same order.
template <typename T, int W> BEV_INLINE T sum(Vec<T, W> v) {
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (W == 64 && sizeof(T) == 4) return sum<T, 32>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    else if constexpr (W == 64) return sum<T, 32>(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
    else if constexpr (W == 32 && sizeof(T) == 4) return sum<T, 16>(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
    else if constexpr (W == 32) return sum<T, 16>(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
    else
#endif
    {
        T s = 0;
        for (int l = 0; l < W / int(sizeof(T)); ++l) s += v[l];
        return s;
    }
}
#else  // no vector types: arrays that the compiler may or may not turn into vectors
template <typename T, int W> struct Vec {
    T v[W / sizeof(T)] = {};
    Vec& operator+=(const Vec& o) { for (size_t l = 0; l < W / sizeof(T); ++l) v[l] += o.v[l]; return *this; }
    friend Vec operator*(const Vec& a, const Vec& b) { Vec r; for (size_t l = 0; l < W / sizeof(T); ++l) r.v[l] = a.v[l] * b.v[l]; return r; }
    friend Vec operator*(T a, const Vec& b) { Vec r; for (size_t l = 0; l < W / sizeof(T); ++l) r.v[l] = a * b.v[l]; return r; }
};
template <typename T, int W> inline Vec<T, W> load(const T* p) { Vec<T, W> r; std::memcpy(r.v, p, W); return r; }
template <typename T, int W> inline void store(T* p, const Vec<T, W>& v) { std::memcpy(p, v.v, W); }
template <typename T, int W> inline T sum(const Vec<T, W>& v) { T s = 0; for (size_t l = 0; l < W / sizeof(T); ++l) s += v.v[l]; return s; }
#endif

// Stores that leave the caches alone: for outputs larger than them, whose lines would be read before they are written.
template <typename T, int W> BEV_INLINE void store_past_cache(T* p, Vec<T, W> v) {
#ifdef BEV_X86
    __m128i parts[W / 16];
    std::memcpy(parts, &v, W);
    for (int i = 0; i < W / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
#else
    store<T, W>(p, v);
#endif
}
// `bytes` is a multiple of 64, and so is the address.
inline void zero_past_cache(void* p, int64_t bytes) {
#ifdef BEV_X86
    for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, _mm_setzero_si128());
#else
    std::memset(p, 0, bytes);
#endif
}
inline void fence() {
#ifdef BEV_X86
    _mm_sfence();
#endif
}
template <typename T> BEV_INLINE void prefetch(const T* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#endif
}
