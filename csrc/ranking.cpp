// Rankings straight from embeddings: how many gallery entries lie within a given distance of each query?
//
// The rank of a match is one plus the number of entries in front of it, so counting replaces sorting, and a block of
// distances lives only as long as it takes to count in it. Counts are exact, in this sense: float32 scores *decide* only
// where they are farther from a limit than their rounding error can be (a proven bound, `Filter`); every pair nearer than
// that is computed again in float64 by one function (`exact`) with one order of additions. So the answer depends neither on
// block sizes, threads nor instruction sets, and equal vectors have equal distances wherever they stand.
#include "arrays.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define RANK_X86 1
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a function's border
#endif

namespace {

constexpr int64_t kBlock = 512;  // gallery entries at a time: their scores for one group of queries stay in the first cache
constexpr int64_t kRun = 32;     // products added up in one float32 sum before it joins the total: bounds the rounding error
constexpr float kOut = -std::numeric_limits<float>::infinity();  // the score of an entry that is left out

struct alignas(64) Line { float v[16]; };  // aligned storage
struct Floats {
    std::vector<Line> lines;
    void resize(int64_t n) { lines.resize(size_t((n + 15) / 16)); }
    float* data() { return lines.empty() ? nullptr : lines[0].v; }
    const float* data() const { return lines.empty() ? nullptr : lines[0].v; }
};

// ---- features and their distances --------------------------------------------------------------------------------------

template <typename T> struct Rows {
    const T* x;
    const double* norm;  // cosine: length of each row; euclidean: length after the shift
    int64_t n;
};

template <typename T> struct Pairs {
    Rows<T> q, g;
    int64_t e;
    const double* shift;  // euclidean: subtracted from both; null: cosine
    bool cosine() const { return !shift; }
    int64_t width() const { return e + (cosine() ? 0 : 1); }
};

double inverse(double norm) { return 1 / std::max(norm, 1e-12); }

// The distance of one pair, in float64, always in the same order. Not compiled per instruction set, on purpose.
template <typename T> double exact(const Pairs<T>& p, int64_t i, int64_t j) {
    const T *a = p.q.x + i * p.e, *b = p.g.x + j * p.e;
    double lanes[8] = {}, sum = 0;
    const int64_t whole = p.e / 8 * 8;
    if (p.cosine()) {
        for (int64_t k = 0; k < whole; k += 8)
            for (int l = 0; l < 8; ++l) lanes[l] += double(a[k + l]) * double(b[k + l]);
        for (int64_t k = whole; k < p.e; ++k) sum += double(a[k]) * double(b[k]);
    } else {
        for (int64_t k = 0; k < whole; k += 8)
            for (int l = 0; l < 8; ++l) { const double d = double(a[k + l]) - double(b[k + l]); lanes[l] += d * d; }
        for (int64_t k = whole; k < p.e; ++k) { const double d = double(a[k]) - double(b[k]); sum += d * d; }
    }
    for (int l = 0; l < 8; ++l) sum += lanes[l];
    return p.cosine() ? 1 - sum * inverse(p.q.norm[i]) * inverse(p.g.norm[j]) : std::sqrt(sum);
}

// Scores: larger is nearer. Cosine: the cosine. Euclidean: s^2 (q.g - |g|^2/2) after the shift, with s = 1 / (longest row);
// the second term is one more column. Both are bounded by 1.5, so float32 neither overflows nor loses small rows.
template <typename T> struct Filter {
    double scale = 1, slack, g_max = 0;
    explicit Filter(const Pairs<T>& p) {
        const int64_t runs = (p.width() + kRun - 1) / kRun;
        slack = 1.001 * std::ldexp(double(kRun + runs + 8), -24);  // (n + 1) roundings of a sum, two of the inputs, some to spare
        if (p.cosine()) return;
        for (int64_t j = 0; j < p.g.n; ++j) g_max = std::max(g_max, p.g.norm[j]);
        double longest = g_max;
        for (int64_t i = 0; i < p.q.n; ++i) longest = std::max(longest, p.q.norm[i]);
        scale = longest > 0 ? 1 / longest : 1;
        g_max *= scale;
    }
    // How far a float32 score of query i may lie from the true one
    double error(const Pairs<T>& p, int64_t i) const {
        return (p.cosine() ? slack : slack * (p.q.norm[i] * scale * g_max + g_max * g_max / 2)) + 1e-14;
    }
    // The scores that stand for a distance: surely beyond it below `lo`, surely within it from `hi` on
    void limits(const Pairs<T>& p, int64_t i, double dist, float* lo, float* hi) const {
        dist = std::clamp(dist, -1e100, 1e100);  // a limit may be infinite
        const double q = p.cosine() ? 0 : p.q.norm[i] * scale, d = p.cosine() ? dist : dist * scale;
        const double at = p.cosine() ? 1 - d : d < 0 ? 9 : (q * q - d * d) / 2, err = error(p, i) + (p.cosine() ? 0 : 1e-15 * d * d);
        constexpr double most = 3e38;
        *lo = std::nextafter(float(std::clamp(at - err, -most, most)), -std::numeric_limits<float>::max());
        *hi = std::nextafter(float(std::clamp(at + err, -most, most)), std::numeric_limits<float>::max());
    }
    // Row i in float32, `step` floats between two columns
    void pack(const Pairs<T>& p, const Rows<T>& rows, int64_t i, bool query, float* to, int64_t step) const {
        const T* x = rows.x + i * p.e;
        if (p.cosine()) {
            const double s = inverse(rows.norm[i]);
            for (int64_t k = 0; k < p.e; ++k) to[k * step] = float(double(x[k]) * s);
        } else {
            for (int64_t k = 0; k < p.e; ++k) to[k * step] = float((double(x[k]) - p.shift[k]) * scale);
            const double n = rows.norm[i] * scale;
            to[p.e * step] = query ? 1.f : float(-n * n / 2);
        }
    }
};

// ---- the inner loops: one struct for each instruction set ---------------------------------------------------------------

#define RANK_NAME Base
#define RANK_TARGET
#if defined(__GNUC__)
#define RANK_W 4
#else
#define RANK_W 1
#endif
#define RANK_M 4
#include "ranking_kernels.h"
#ifdef RANK_X86
#define RANK_NAME Avx2
#define RANK_TARGET __attribute__((target("avx2,fma")))
#define RANK_W 8
#define RANK_M 6
#include "ranking_kernels.h"
#define RANK_NAME Avx512
#define RANK_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,popcnt")))
#define RANK_W 16
#define RANK_M 12
#include "ranking_kernels.h"
#endif

// ---- who is left out ---------------------------------------------------------------------------------------------------

// Gallery entries by code: entries idx[ptr[c]] ... idx[ptr[c + 1] - 1], ascending; `code` of each query, -1 for none
struct Lists {
    const int32_t *code, *idx;
    const int64_t* ptr;
    std::pair<const int32_t*, const int32_t*> part(int64_t i, int64_t first, int64_t last) const {
        const int32_t c = code[i];
        if (c < 0) return {nullptr, nullptr};
        const int32_t *a = idx + ptr[c], *b = idx + ptr[c + 1];
        a = std::lower_bound(a, b, int32_t(first));
        return {a, std::lower_bound(a, b, int32_t(last))};
    }
};

struct Rules {
    std::vector<Lists> junk, own;     // in these lists: junk; of one identity: no rivals of its matches
    bool timed = false;               // same scene and nearer in time than `gap`: junk
    Lists scene{};
    const double *q_time = nullptr, *g_time = nullptr;
    double gap = 0;
    int scope = 0;                    // 0: all scenes, 1: the own scene alone, 2: other scenes alone
    const uint8_t* mask = nullptr;    // (queries, gallery), nonzero: junk
    int64_t n_gallery = 0;
};

// The entries of one block that are left out for one query
struct Marks {
    std::vector<uint8_t> out;
    std::vector<int32_t> list;
    bool dense = false;  // look at `out` in place of `list`
    int64_t junk = 0, all = 0;
    explicit Marks(int64_t n) : out(size_t(n), 0) {}
    void put(int64_t j) { if (!out[j]) { out[j] = 1; list.push_back(int32_t(j)); } }
    void find(const Rules& r, int64_t i, int64_t first, int64_t last) {
        if (dense) std::fill(out.begin(), out.end(), 0);
        else for (int32_t j : list) out[j] = 0;
        list.clear();
        dense = r.mask || (r.timed && r.scope == 1);
        if (r.timed && r.scope == 1) {
            std::fill(out.begin(), out.begin() + (last - first), 1);
            for (auto [a, b] = r.scene.part(i, first, last); a != b; ++a)
                if (!(std::abs(r.q_time[i] - r.g_time[*a]) < r.gap)) out[*a - first] = 0;
        } else if (r.timed) {
            for (auto [a, b] = r.scene.part(i, first, last); a != b; ++a)
                if (r.scope == 2 || std::abs(r.q_time[i] - r.g_time[*a]) < r.gap) put(*a - first);
        }
        if (r.mask)
            for (int64_t j = first; j < last; ++j) out[j - first] |= r.mask[i * r.n_gallery + j] != 0;
        for (const Lists& l : r.junk)
            for (auto [a, b] = l.part(i, first, last); a != b; ++a) put(*a - first);
        junk = count(last - first);
        for (const Lists& l : r.own)
            for (auto [a, b] = l.part(i, first, last); a != b; ++a) put(*a - first);
        all = count(last - first);
    }
    int64_t count(int64_t n) const { return dense ? std::count_if(out.begin(), out.begin() + n, [](uint8_t v) { return v; }) : int64_t(list.size()); }
    template <typename T> void apply(T* s, int64_t n, T value) const {
        if (dense) for (int64_t j = 0; j < n; ++j) s[j] = out[j] ? value : s[j];
        else for (int32_t j : list) s[j] = value;
    }
};

// ---- counting ----------------------------------------------------------------------------------------------------------

template <typename T> struct Count {
    Pairs<T> p;
    Filter<T> f;
    Rules rules;
    const double* limits;      // ascending within each query
    const int64_t* ptr;        // limits of query i: ptr[i] to ptr[i + 1]
    std::vector<float> lo, hi; // the same as scores: descending
    Floats packed;             // queries, in groups of M
    int64_t many;              // from this many limits on: search
};

struct Scratch {
    Floats b, s;
    Marks marks{kBlock};
    std::vector<double> dist;       // exact distances of one row of the block, NaN where not needed yet
    bool fresh = true;              // nothing in `dist` belongs to this row
    std::vector<int64_t> counts, junk, hist;
};

// Limits in groups of N: compare each score with each limit
template <typename K, int N, typename T> void count_group(const Count<T>& c, int64_t i, int64_t first, int64_t n, const float* s, int64_t t, Scratch& w) {
    int64_t maybe[N], sure[N];
    K::template reach<N>(s, (n + K::W - 1) / K::W * K::W, &c.lo[t], &c.hi[t], maybe, sure);
    for (int u = 0; u < N; ++u) {
        w.counts[t + u] += sure[u];
        if (maybe[u] > sure[u] && w.fresh) std::fill(w.dist.begin(), w.dist.end(), std::numeric_limits<double>::quiet_NaN()), w.fresh = false;
        for (int64_t j = 0, left = maybe[u] - sure[u]; left > 0; ++j) {
            if (!(s[j] >= c.lo[t + u]) || s[j] >= c.hi[t + u]) continue;
            double& d = w.dist[j];
            if (std::isnan(d)) d = exact(c.p, i, first + j);
            w.counts[t + u] += d <= c.limits[t + u];
            --left;
        }
    }
}

// Many limits: find the first limit that each score reaches by halving, and count per limit
template <typename K, typename T> void count_search(const Count<T>& c, int64_t i, int64_t first, int64_t n, const float* s, Scratch& w) {
    const int64_t t0 = c.ptr[i], k = c.ptr[i + 1] - t0;
    const float *lo = &c.lo[t0], *hi = &c.hi[t0];
    w.hist.assign(size_t(k + 1), 0);
    for (int64_t j = 0; j < n; j += 16) {
        int32_t at[16];
        K::first_reached(s + j, lo, int32_t(k), at);
        for (int l = 0; l < 16; ++l) {
            int64_t a = at[l];
            if (a < k && s[j + l] < hi[a]) a = std::lower_bound(c.limits + t0, c.limits + t0 + k, exact(c.p, i, first + j + l)) - (c.limits + t0);
            ++w.hist[size_t(a)];
        }
    }
    for (int64_t t = 0, sum = 0; t < k; ++t) w.counts[t0 + t] += sum += w.hist[t];
}

template <typename K, typename T> void count_block(const Count<T>& c, int64_t block, Scratch& w) {
    constexpr int64_t W = K::W, M = K::M;
    const int64_t first = block * kBlock, last = std::min(c.p.g.n, first + kBlock), n = last - first, width = c.p.width();
    const int64_t padded = (n + 2 * W - 1) / (2 * W) * 2 * W;
    w.b.resize(padded * width);
    w.s.resize(M * kBlock);
    if (n < padded) std::fill(w.b.data() + (padded - 2 * W) * width, w.b.data() + padded * width, 0.f);
    for (int64_t j = 0; j < n; ++j) c.f.pack(c.p, c.p.g, first + j, false, w.b.data() + j / (2 * W) * 2 * W * width + j % (2 * W), 2 * W);
    for (int64_t i0 = 0; i0 < c.p.q.n; i0 += M) {
        const int64_t i1 = std::min(c.p.q.n, i0 + M);
        bool any = false;
        for (int64_t i = i0; i < i1 && !any; ++i) {
            any = c.ptr[i + 1] > c.ptr[i];
            if (any && c.rules.timed && c.rules.scope == 1) { auto [a, b] = c.rules.scene.part(i, first, last); any = a != b; }
        }
        if (any) K::scores(c.packed.data() + i0 * width, w.b.data(), width, padded, w.s.data());
        for (int64_t i = i0; i < i1; ++i) {
            float* s = w.s.data() + (i - i0) * kBlock;
            w.marks.find(c.rules, i, first, last);
            w.junk[i] += w.marks.junk;
            const int64_t t0 = c.ptr[i], t1 = c.ptr[i + 1];
            if (!any || t0 == t1 || w.marks.all == n) continue;
            w.marks.apply(s, n, kOut);
            std::fill(s + n, s + std::min(kBlock, (n + 15) / 16 * 16), kOut);
            const float top = K::largest(s, (n + W - 1) / W * W);
            if (top < c.lo[t1 - 1]) continue;  // nothing here reaches even the farthest limit
            if (t1 - t0 >= c.many) { count_search<K>(c, i, first, n, s, w); continue; }
            w.fresh = true;
            int64_t t = t0;
            while (t < t1 && top < c.lo[t]) ++t;  // nor the nearest ones
            for (; t + 4 <= t1; t += 4) count_group<K, 4>(c, i, first, n, s, t, w);
            for (; t < t1; ++t) count_group<K, 1>(c, i, first, n, s, t, w);
        }
    }
}

// ---- the nearest k -----------------------------------------------------------------------------------------------------

template <typename T> struct Nearest {
    static constexpr int64_t chunk = 384;  // queries that a thread takes at a time
    Pairs<T> p;
    Filter<T> f;
    int64_t k;
    int32_t* idx;               // (n, k) ascending by distance, ties by index
    double *dist, *far;         // (n, k); the largest distance in each row
};

struct Best {  // candidates of one query: nothing is dropped that could still be among the k nearest
    std::vector<std::pair<float, int32_t>> near, far;
    float at_least = kOut, at_most = std::numeric_limits<float>::infinity();
    size_t room = 0;
    void add(float s, int32_t j, int64_t k, float twice) {
        if (s >= at_least) {
            near.emplace_back(s, j);
            if (near.size() >= room) prune(k, twice);
        }
        if (s <= at_most) {
            if (s < at_most - twice) {
                at_most = std::nextafter(s + twice, std::numeric_limits<float>::infinity());
                far.erase(std::remove_if(far.begin(), far.end(), [&](auto& c) { return c.first > at_most; }), far.end());
            }
            far.emplace_back(s, j);
        }
    }
    void prune(int64_t k, float twice) {
        std::nth_element(near.begin(), near.begin() + (k - 1), near.end(), [](auto& a, auto& b) { return a.first > b.first; });
        at_least = std::nextafter(near[size_t(k - 1)].first - twice, kOut);
        near.erase(std::remove_if(near.begin(), near.end(), [&](auto& c) { return c.first < at_least; }), near.end());
        room = std::max(room, 2 * near.size());
    }
};

template <typename K, typename T> void nearest_chunk(const Nearest<T>& c, int64_t from, int64_t to) {
    constexpr int64_t W = K::W, M = K::M;
    const int64_t width = c.p.width();
    Floats a, b, s;
    a.resize((to - from + M - 1) / M * M * width), b.resize(kBlock * width), s.resize(M * kBlock);
    for (int64_t i = from; i < to; ++i) c.f.pack(c.p, c.p.q, i, true, a.data() + (i - from) / M * M * width + (i - from) % M, M);
    std::vector<Best> best(size_t(to - from));
    for (Best& t : best) t.room = size_t(2 * c.k + 64);
    for (int64_t first = 0; first < c.p.g.n; first += kBlock) {
        const int64_t n = std::min(kBlock, c.p.g.n - first), padded = (n + 2 * W - 1) / (2 * W) * 2 * W;
        for (int64_t j = 0; j < n; ++j) c.f.pack(c.p, c.p.g, first + j, false, b.data() + j / (2 * W) * 2 * W * width + j % (2 * W), 2 * W);
        for (int64_t i0 = from; i0 < to; i0 += M) {
            K::scores(a.data() + (i0 - from) * width, b.data(), width, padded, s.data());
            for (int64_t i = i0; i < std::min(to, i0 + M); ++i) {
                Best& t = best[size_t(i - from)];
                const float* row = s.data() + (i - i0) * kBlock;
                const float twice = float(2.1 * c.f.error(c.p, i));
                for (int64_t j = 0; j < n; j += 4 * W) {
                    if (!K::any(row + j, std::min(padded - j, 4 * W), t.at_least, t.at_most)) continue;
                    for (int64_t u = j; u < std::min(n, j + 4 * W); ++u) if (row[u] >= t.at_least || row[u] <= t.at_most) t.add(row[u], int32_t(first + u), c.k, twice);
                }
            }
        }
    }
    std::vector<std::pair<double, int32_t>> out;
    for (int64_t i = from; i < to; ++i) {
        Best& t = best[size_t(i - from)];
        t.prune(c.k, float(2.1 * c.f.error(c.p, i)));
        out.clear();
        for (auto& v : t.near) out.emplace_back(exact(c.p, i, v.second), v.second);
        std::partial_sort(out.begin(), out.begin() + c.k, out.end());
        for (int64_t j = 0; j < c.k; ++j) c.dist[i * c.k + j] = out[size_t(j)].first, c.idx[i * c.k + j] = out[size_t(j)].second;
        double far = -1;
        for (auto& v : t.far) far = std::max(far, exact(c.p, i, v.second));
        c.far[i] = far;
    }
}

// ---- chosen when the program runs ----------------------------------------------------------------------------------------

template <typename T> struct Isa {
    int64_t m;
    void (*count)(const Count<T>&, int64_t, Scratch&);
    void (*nearest)(const Nearest<T>&, int64_t, int64_t);
};

template <typename T> Isa<T> pick(const std::string& isa) {
#ifdef RANK_X86
    const bool v2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (v4 && (isa.empty() || isa == "avx512")) return {Avx512::M, count_block<Avx512, T>, nearest_chunk<Avx512, T>};
    if (v2 && (isa.empty() || isa == "avx2")) return {Avx2::M, count_block<Avx2, T>, nearest_chunk<Avx2, T>};
#endif
    if (!isa.empty() && isa != "base") refuse("this processor does not run isa='" + isa + "'");
    return {Base::M, count_block<Base, T>, nearest_chunk<Base, T>};
}

// ---- bindings ----------------------------------------------------------------------------------------------------------

template <typename T> Pairs<T> pairs(const py::array& q, const py::array& g, const py::array& q_norm, const py::array& g_norm, const py::array& shift) {
    if (q.ndim() != 2 || g.ndim() != 2 || q.shape(1) != g.shape(1)) refuse("q and g must be (n, e) with the same e");
    const int64_t e = q.shape(1);
    if (g.shape(0) > INT32_MAX || q.shape(0) > INT32_MAX) refuse("more rows than int32 can number");
    return {{input<T>(q, "q", q.size()), input<double>(q_norm, "q_norm", q.shape(0)), q.shape(0)},
            {input<T>(g, "g", g.size()), input<double>(g_norm, "g_norm", g.shape(0)), g.shape(0)}, e,
            shift.size() || e == 0 ? input<double>(shift, "shift", e) : nullptr};
}

using ListsPy = std::tuple<py::array, py::array, py::array>;

Lists lists(const ListsPy& l, int64_t n_q, int64_t n_g) {
    const auto& [code, ptr, idx] = l;
    const int64_t n = int64_t(ptr.size()) - 1;
    Lists out{input<int32_t>(code, "code", n_q), input<int32_t>(idx, "idx", idx.size()), input<int64_t>(ptr, "ptr", ptr.size())};
    bool ok = n >= 0 && out.ptr[0] == 0 && out.ptr[n] == idx.size();
    for (int64_t c = 0; ok && c < n; ++c) {
        ok = out.ptr[c] <= out.ptr[c + 1] && out.ptr[c + 1] <= idx.size();
        for (int64_t k = out.ptr[c]; ok && k < out.ptr[c + 1]; ++k) ok = out.idx[k] >= 0 && out.idx[k] < n_g && (k == out.ptr[c] || out.idx[k] > out.idx[k - 1]);
    }
    for (int64_t i = 0; ok && i < n_q; ++i) ok = out.code[i] < n;
    if (!ok) refuse("lists of gallery entries must ascend within [0, gallery) and codes must name a list");
    return out;
}

Rules rules(const std::vector<ListsPy>& junk, const std::vector<ListsPy>& own, const py::object& timed, const py::object& mask, int64_t n_q, int64_t n_g) {
    Rules r;
    r.n_gallery = n_g;
    for (const auto& l : junk) r.junk.push_back(lists(l, n_q, n_g));
    for (const auto& l : own) r.own.push_back(lists(l, n_q, n_g));
    if (!timed.is_none()) {
        const auto [scene, q_time, g_time, gap, scope] = timed.cast<std::tuple<ListsPy, py::array, py::array, double, int>>();
        r.timed = true, r.scene = lists(scene, n_q, n_g), r.gap = gap, r.scope = scope;
        r.q_time = input<double>(q_time, "q_time", n_q), r.g_time = input<double>(g_time, "g_time", n_g);
    }
    if (!mask.is_none()) {
        const py::array m = mask.cast<py::array>();
        if (!py::isinstance<py::array_t<uint8_t>>(m) || !(m.flags() & py::array::c_style) || m.size() != n_q * n_g) refuse("mask must be contiguous uint8 (queries, gallery)");
        r.mask = static_cast<const uint8_t*>(m.data());
    }
    return r;
}

void check_limits(const double* limits, const int64_t* ptr, int64_t n_q, int64_t n) {
    bool ok = ptr[0] == 0 && ptr[n_q] == n;
    for (int64_t i = 0; ok && i < n_q; ++i) {
        ok = ptr[i] <= ptr[i + 1] && ptr[i + 1] <= n;
        for (int64_t t = ptr[i]; ok && t < ptr[i + 1]; ++t) ok = !std::isnan(limits[t]) && (t == ptr[i] || limits[t] >= limits[t - 1]);
    }
    if (!ok) refuse("limits must ascend within each query, and ptr must divide them");
}

template <typename T>
void count_py(const py::array& q, const py::array& g, const py::array& q_norm, const py::array& g_norm, const py::array& shift, const py::array& limits,
              const py::array& ptr, const std::vector<ListsPy>& junk, const std::vector<ListsPy>& own, const py::object& timed, const py::object& mask, int64_t many,
              int threads, const std::string& isa, py::array counts, py::array n_junk) {
    const Pairs<T> p = pairs<T>(q, g, q_norm, g_norm, shift);
    const int64_t n_q = p.q.n, n = limits.size();
    int64_t* out = output<int64_t>(counts, "counts", n);
    int64_t* out_junk = output<int64_t>(n_junk, "n_junk", n_q);
    Count<T> c{p, Filter<T>(p), rules(junk, own, timed, mask, n_q, p.g.n), input<double>(limits, "limits", n), input<int64_t>(ptr, "ptr", n_q + 1), {}, {}, {}, std::max<int64_t>(many, 1)};
    check_limits(c.limits, c.ptr, n_q, n);
    const Isa<T> run = pick<T>(isa);
    py::gil_scoped_release nogil;
    std::fill(out, out + n, 0), std::fill(out_junk, out_junk + n_q, 0);
    c.lo.resize(size_t(n)), c.hi.resize(size_t(n));
    c.packed.resize((n_q + run.m - 1) / run.m * run.m * p.width());
    for (int64_t i = 0; i < n_q; ++i) {
        for (int64_t t = c.ptr[i]; t < c.ptr[i + 1]; ++t) c.f.limits(p, i, c.limits[t], &c.lo[t], &c.hi[t]);
        c.f.pack(p, p.q, i, true, c.packed.data() + i / run.m * run.m * p.width() + i % run.m, run.m);
    }
    const int64_t blocks = (p.g.n + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)))
    {
        Scratch w;
        w.counts.assign(size_t(n), 0), w.junk.assign(size_t(n_q), 0), w.dist.resize(kBlock);
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < blocks; ++b) run.count(c, b, w);
#pragma omp critical
        {
            for (int64_t t = 0; t < n; ++t) out[t] += w.counts[t];
            for (int64_t i = 0; i < n_q; ++i) out_junk[i] += w.junk[i];
        }
    }
}

template <typename T>
void nearest_py(const py::array& q, const py::array& g, const py::array& q_norm, const py::array& g_norm, const py::array& shift, int64_t k, int threads,
                const std::string& isa, py::array idx, py::array dist, py::array far) {
    const Pairs<T> p = pairs<T>(q, g, q_norm, g_norm, shift);
    if (k < 1 || k > p.g.n) refuse("k must be 1 to the size of the gallery");
    Nearest<T> c{p, Filter<T>(p), k, output<int32_t>(idx, "idx", p.q.n * k), output<double>(dist, "dist", p.q.n * k), output<double>(far, "far", p.q.n)};
    const Isa<T> run = pick<T>(isa);
    py::gil_scoped_release nogil;
    const int64_t chunks = (p.q.n + c.chunk - 1) / c.chunk;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(dynamic, 1)
    for (int64_t b = 0; b < chunks; ++b) run.nearest(c, b * c.chunk, std::min(p.q.n, (b + 1) * c.chunk));
}

template <typename T>
void pair_py(const py::array& q, const py::array& g, const py::array& q_norm, const py::array& g_norm, const py::array& shift, const py::array& qi,
             const py::array& gi, int threads, py::array dist) {
    const Pairs<T> p = pairs<T>(q, g, q_norm, g_norm, shift);
    const int64_t n = qi.size();
    const int32_t *a = input<int32_t>(qi, "qi", n), *b = input<int32_t>(gi, "gi", n);
    double* out = output<double>(dist, "dist", n);
    for (int64_t t = 0; t < n; ++t) if (a[t] < 0 || a[t] >= p.q.n || b[t] < 0 || b[t] >= p.g.n) refuse("qi or gi names a row that is not there");
    py::gil_scoped_release nogil;
#pragma omp parallel for num_threads(std::max(1, threads)) if (n > 4096) schedule(static)
    for (int64_t t = 0; t < n; ++t) out[t] = exact(p, a[t], b[t]);
}

// Lengths of the rows, after the shift if there is one; not finite where a row is not
template <typename T> void norms_py(const py::array& x, const py::array& shift, int threads, py::array norm) {
    if (x.ndim() != 2) refuse("x must be (n, e)");
    const int64_t n = x.shape(0), e = x.shape(1);
    const T* v = input<T>(x, "x", x.size());
    const double* c = shift.size() ? input<double>(shift, "shift", e) : nullptr;
    double* out = output<double>(norm, "norm", n);
    py::gil_scoped_release nogil;
#pragma omp parallel for num_threads(std::max(1, threads)) if (n > 4096) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T* r = v + i * e;
        double lanes[8] = {}, sum = 0;
        const int64_t whole = e / 8 * 8;
        for (int64_t k = 0; k < whole; k += 8)
            for (int l = 0; l < 8; ++l) { const double d = double(r[k + l]) - (c ? c[k + l] : 0); lanes[l] += d * d; }
        for (int64_t k = whole; k < e; ++k) { const double d = double(r[k]) - (c ? c[k] : 0); sum += d * d; }
        for (int l = 0; l < 8; ++l) sum += lanes[l];
        out[i] = std::sqrt(sum);
    }
}

// The same counts from distances that somebody else has computed: compared as they are, in their own type
template <typename T>
int64_t count_rows_py(const py::array& dist, const py::array& limits, const py::array& ptr, const std::vector<ListsPy>& junk, const std::vector<ListsPy>& own,
                      const py::object& timed, const py::object& mask, int threads, py::array counts, py::array n_junk) {
    if (dist.ndim() != 2) refuse("dist must be (queries, gallery)");
    const int64_t n_q = dist.shape(0), n_g = dist.shape(1), n = limits.size();
    const T* d = input<T>(dist, "dist", dist.size());
    const T* lim = input<T>(limits, "limits", n);
    const int64_t* at = input<int64_t>(ptr, "ptr", n_q + 1);
    int64_t *out = output<int64_t>(counts, "counts", n), *out_junk = output<int64_t>(n_junk, "n_junk", n_q), bad = 0;
    const Rules r = rules(junk, own, timed, mask, n_q, n_g);
    if (at[0] != 0 || at[n_q] != n || !std::is_sorted(at, at + n_q + 1)) refuse("ptr must divide the limits");
    py::gil_scoped_release nogil;
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min<int64_t>(threads, n_q))) reduction(+ : bad)
    {
        Marks marks(n_g);
        std::vector<T> row(static_cast<size_t>(n_g));
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < n_q; ++i) {
            marks.find(r, i, 0, n_g);
            out_junk[i] = marks.junk;
            std::copy(d + i * n_g, d + (i + 1) * n_g, row.begin());
            marks.apply(row.data(), n_g, std::numeric_limits<T>::infinity());
            int64_t finite = 0;
            for (int64_t j = 0; j < n_g; ++j) finite += std::abs(row[j]) <= std::numeric_limits<T>::max();
            bad += n_g - finite - marks.all;
            const int64_t k = at[i + 1] - at[i];
            if (k < 100) {
                for (int64_t t = at[i]; t < at[i + 1]; ++t) {
                    int64_t c = 0;
                    for (int64_t j = 0; j < n_g; ++j) c += row[j] <= lim[t];
                    out[t] = c;
                }
            } else {
                std::vector<int64_t> hist(size_t(k + 1), 0);
                for (int64_t j = 0; j < n_g; ++j) ++hist[std::lower_bound(lim + at[i], lim + at[i + 1], row[j]) - (lim + at[i])];
                for (int64_t t = 0, sum = 0; t < k; ++t) out[at[i] + t] = sum += hist[t];
            }
        }
    }
    return bad;
}

bool is_double(const py::array& x) { return py::isinstance<py::array_t<double>>(x); }

}  // namespace

void bind_ranking(py::module_& m) {
    using A = const py::array&;
    using L = const std::vector<ListsPy>&;
    m.def("count_within", [](A q, A g, A qn, A gn, A shift, A limits, A ptr, L junk, L own, const py::object& timed, const py::object& mask, int64_t many, int threads,
                             const std::string& isa, py::array counts, py::array n_junk) {
        (is_double(q) ? count_py<double> : count_py<float>)(q, g, qn, gn, shift, limits, ptr, junk, own, timed, mask, many, threads, isa, counts, n_junk);
    });
    m.def("count_rows", [](A dist, A limits, A ptr, L junk, L own, const py::object& timed, const py::object& mask, int threads, py::array counts, py::array n_junk) {
        return (is_double(dist) ? count_rows_py<double> : count_rows_py<float>)(dist, limits, ptr, junk, own, timed, mask, threads, counts, n_junk);
    });
    m.def("nearest", [](A q, A g, A qn, A gn, A shift, int64_t k, int threads, const std::string& isa, py::array idx, py::array dist, py::array far) {
        (is_double(q) ? nearest_py<double> : nearest_py<float>)(q, g, qn, gn, shift, k, threads, isa, idx, dist, far);
    });
    m.def("pair_distances", [](A q, A g, A qn, A gn, A shift, A qi, A gi, int threads, py::array dist) {
        (is_double(q) ? pair_py<double> : pair_py<float>)(q, g, qn, gn, shift, qi, gi, threads, dist);
    });
    m.def("row_norms", [](A x, A shift, int threads, py::array norm) { (is_double(x) ? norms_py<double> : norms_py<float>)(x, shift, threads, norm); });
}
