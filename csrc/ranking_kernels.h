// The inner loops of ranking.cpp, for one instruction set. Included once for each: RANK_NAME is the name of the set, RANK_TARGET its
// attribute, RANK_W its lanes and RANK_M the number of queries whose sums fit into its registers. (A template would not do:
// GCC splits vectors that are too wide for the baseline before it inlines a function into a caller that has them.)
struct RANK_NAME {
    static constexpr int W = RANK_W, M = RANK_M;
#if RANK_W > 1
    typedef float V __attribute__((vector_size(4 * RANK_W), may_alias));
    typedef int32_t I __attribute__((vector_size(4 * RANK_W), may_alias));
#define RANK_GE(a, b) ((a) >= (b))
#define RANK_ALL(a) ((a) - V{})
#else
    typedef float V;
    typedef int32_t I;
#define RANK_GE(a, b) (-I((a) >= (b)))
#define RANK_ALL(a) (a)
#endif

    // Scores of M queries, packed (k, M), with n gallery entries, packed (n / 2W, k, 2W): sums over k in order, in runs of kRun
    RANK_TARGET static void scores(const float* a, const float* b, int64_t width, int64_t n, float* out) {
        for (int64_t j = 0; j < n; j += 2 * W, b += 2 * W * width, out += 2 * W)
            for (int64_t k0 = 0; k0 < width; k0 += kRun) {
                const int64_t k1 = k0 + kRun < width ? k0 + kRun : width;
                V acc[M][2];
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = V{};
                for (int64_t k = k0; k < k1; ++k) {
                    const V b0 = *reinterpret_cast<const V*>(b + k * 2 * W), b1 = *reinterpret_cast<const V*>(b + k * 2 * W + W);
#pragma GCC unroll 16
                    for (int r = 0; r < M; ++r) {
                        const float v = a[k * M + r];
                        acc[r][0] += v * b0;
                        acc[r][1] += v * b1;
                    }
                }
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) {
                    V *o0 = reinterpret_cast<V*>(out + r * kBlock), *o1 = reinterpret_cast<V*>(out + r * kBlock + W);
                    *o0 = k0 ? *o0 + acc[r][0] : acc[r][0];
                    *o1 = k0 ? *o1 + acc[r][1] : acc[r][1];
                }
            }
    }

    // How many of the first n scores (padded to a multiple of W) reach each of N limits
    template <int N> RANK_TARGET static void reach(const float* s, int64_t n, const float* lo, const float* hi, int64_t* maybe, int64_t* sure) {
#if RANK_W == 16
        Avx2::reach<N>(s, n, lo, hi, maybe, sure);  // comparisons of 512 bits give bit masks; turning them into counts costs more than it saves
#else
        V l[N], h[N];
        I cl[N] = {}, ch[N] = {};
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) l[t] = RANK_ALL(lo[t]), h[t] = RANK_ALL(hi[t]);
        for (int64_t j = 0; j < n; j += W) {
            const V v = *reinterpret_cast<const V*>(s + j);
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) cl[t] -= RANK_GE(v, l[t]), ch[t] -= RANK_GE(v, h[t]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) maybe[t] = total(cl[t]), sure[t] = total(ch[t]);
#endif
    }

    RANK_TARGET static int64_t total(I a) {
        alignas(64) int32_t v[W];
        int64_t s = 0;
        *reinterpret_cast<I*>(v) = a;
        for (int l = 0; l < W; ++l) s += v[l];
        return s;
    }

    // Of the first n scores (padded), the largest
    RANK_TARGET static float largest(const float* s, int64_t n) {
        V m = *reinterpret_cast<const V*>(s);
        for (int64_t j = W; j < n; j += W) { const V v = *reinterpret_cast<const V*>(s + j); m = v > m ? v : m; }
        alignas(64) float v[W];
        *reinterpret_cast<V*>(v) = m;
        for (int l = 1; l < W; ++l) v[0] = v[l] > v[0] ? v[l] : v[0];
        return v[0];
    }

    // Is any of the first n scores (padded) at least lo, or at most hi?
    RANK_TARGET static bool any(const float* s, int64_t n, float lo, float hi) {
        const V l = RANK_ALL(lo), h = RANK_ALL(hi);
        I hit = {};
        for (int64_t j = 0; j < n; j += W) { const V v = *reinterpret_cast<const V*>(s + j); hit |= RANK_GE(v, l) | RANK_GE(h, v); }
        return total(hit) != 0;
    }

    // For each of 16 scores the first of k descending limits that it reaches, or k: by halving, all 16 in step
    RANK_TARGET static void first_reached(const float* s, const float* lo, int32_t k, int32_t* at) {
        for (int l = 0; l < 16; ++l) at[l] = 0;
        for (int32_t left = k; left > 1;) {
            const int32_t half = left / 2;
            for (int l = 0; l < 16; ++l) at[l] += lo[at[l] + half - 1] > s[l] ? half : 0;
            left -= half;
        }
        for (int l = 0; l < 16; ++l) at[l] += lo[at[l]] > s[l];
    }
};
#undef RANK_NAME
#undef RANK_TARGET
#undef RANK_W
#undef RANK_M
#undef RANK_GE
#undef RANK_ALL
