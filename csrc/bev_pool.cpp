// Lift-splat pooling without the lifted volume, on a CPU.
//
// Notation: a *point* is one (camera pixel, depth bin), numbered in (b n d h w) order; a *pixel* is one feature row, in
// (b n h w) order; a *cell* is one voxel of the grid, in (b x y z) order; an *interval* is the points of one cell. The
// plan lays intervals and points out in the order in which a walk along the image columns meets them: the rays of a
// column stand over one line on the ground, so neighbouring intervals read the same feature rows.
// Every output element is written by exactly one thread, in an order that the plan fixes: no atomics, and the result is
// the same for any number of threads. Indices are checked where they are used, because a plan may be made by hand.
#include "arrays.h"
#include "simd.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int64_t kSmall = 1 << 15;  // fewer points than this are not worth waking threads for
constexpr int64_t kSmallPlan = 1 << 17;  // nor is a plan of fewer: it is sorted by one thread per sample
constexpr int64_t kStream = 16 << 20;  // an output above this many bytes is written past the caches (virtual machines report caches that they do not have)
constexpr int kMaxVecs = 12;         // vectors that a pass sums up at once: what 16 registers can hold

int team(int threads, int64_t points) { return points < kSmall ? 1 : std::max(1, threads); }

// ---- plan -----------------------------------------------------------------------------------------------------------

struct Grid { double lo[3], dx[3]; int64_t nx[3]; };
struct Sizes { int64_t b, n, d, h, w; int64_t hw() const { return h * w; } int64_t camera() const { return d * h * w; } int64_t sample() const { return n * d * h * w; } };

// Cells of points [first, last), -1 outside; false if a coordinate is not finite. Blocks of 16 points: the three axes
// alternate with a period of three, so constants that repeat after 48 numbers let one loop without branches do them all.
template <typename T>
BEV_INLINE bool find_cells(const T* geom, int64_t first, int64_t last, int64_t sample, const Grid& grid, bool trunc, int32_t* cells) {
    constexpr int B = 16;
    T lo[3 * B], dx[3 * B], nx[3 * B];
    for (int j = 0; j < 3 * B; ++j) lo[j] = T(grid.lo[j % 3]), dx[j] = T(grid.dx[j % 3]), nx[j] = T(grid.nx[j % 3]);
    const int32_t ny = int32_t(grid.nx[1]), nz = int32_t(grid.nx[2]), origin = int32_t(sample * grid.nx[0] * grid.nx[1] * grid.nx[2]);
    // floor keeps [0, nx), truncation keeps (-1, nx); inside, both are a cast, and outside nothing is cast, for a cast of a huge value is undefined
    const T least = trunc ? std::nextafter(T(-1), T(0)) : T(0);
    int32_t broken = 0;
    T padded[3 * B] = {};
    for (int64_t p = first; p < last; p += B) {
        const int size = int(std::min<int64_t>(B, last - p));
        const T* g = geom + 3 * p;
        if (size < B) std::copy(g, g + 3 * size, padded), g = padded;
        int32_t idx[3 * B], cell[B];
        for (int j = 0; j < 3 * B; ++j) {
            const T v = (g[j] - lo[j]) / dx[j];
            const bool in = (v >= least) & (v < nx[j]);
            idx[j] = in ? int32_t(in ? v : T(0)) : INT32_MIN;
            broken |= !(g[j] - g[j] == 0);
        }
        for (int j = 0; j < B; ++j) {
            const int32_t x = idx[3 * j], y = idx[3 * j + 1], z = idx[3 * j + 2];
            cell[j] = (x | y | z) < 0 ? -1 : origin + int32_t((uint32_t(x) * uint32_t(ny) + uint32_t(y)) * uint32_t(nz) + uint32_t(z));
        }
        std::memcpy(cells + p, cell, size * sizeof *cells);
    }
    return !broken;
}

#define BEV_CELLS(ATTR, SUFFIX)                                                                                                            \
    ATTR bool cells_##SUFFIX(const float* g, int64_t f, int64_t l, int64_t s, const Grid& grid, bool trunc, int32_t* c) { return find_cells<float>(g, f, l, s, grid, trunc, c); }    \
    ATTR bool cells_##SUFFIX(const double* g, int64_t f, int64_t l, int64_t s, const Grid& grid, bool trunc, int32_t* c) { return find_cells<double>(g, f, l, s, grid, trunc, c); }
BEV_CELLS(, base)
#ifdef BEV_X86
BEV_CELLS(BEV_AVX2, avx2)
BEV_CELLS(BEV_AVX512, avx512)
#endif

template <typename T> using FindCells = bool (*)(const T*, int64_t, int64_t, int64_t, const Grid&, bool, int32_t*);

template <typename T> FindCells<T> choose_cells() {
#ifdef BEV_X86
    if (isa() == Isa::avx512) return cells_avx512;
    if (isa() == Isa::avx2) return cells_avx2;
#endif
    return cells_base;
}

// Visits the points of one sample along the image columns: camera, column, depth, row.
template <typename Visit> BEV_INLINE void along_columns(const Sizes& s, int64_t sample, Visit visit) {
    for (int64_t cam = sample * s.n; cam < (sample + 1) * s.n; ++cam)
        for (int64_t w = 0; w < s.w; ++w)
            for (int64_t d = 0; d < s.d; ++d) {
                int64_t p = (cam * s.d + d) * s.hw() + w, pixel = cam * s.hw() + w;
                for (int64_t h = 0; h < s.h; ++h, p += s.w, pixel += s.w) visit(int32_t(p), int32_t(pixel));
            }
}

struct Sorted { int64_t kept, intervals; };

// Counting sort of the points into intervals, both in order of first sight; a sample is sorted by one thread. Points
// outside are sorted too, into a last interval that lands behind the kept points: that costs less than a branch for each.
Sorted sort_points(const int32_t* cells, const Sizes& s, int64_t n_cells, int threads, int32_t* depth_idx, int32_t* feat_idx,
                   int32_t* indptr, int32_t* interval_cells) {
    const int64_t per_sample = s.b ? n_cells / s.b : 0, points = s.sample(), most = std::min(per_sample, points);
    const std::unique_ptr<int32_t[]> slot(new int32_t[s.b * (per_sample + 1)]);  // cell (first: outside) -> interval
    struct Place { int32_t interval, rank; };
    const std::unique_ptr<Place[]> walk(new Place[s.b * points]);                // where each point of the walk goes
    const std::unique_ptr<int32_t[]> next(new int32_t[s.b * (most + 1)]);        // size, then first place, of each interval
    const std::unique_ptr<int32_t[]> met(new int32_t[s.b * (most + 1)]);         // its cell
    std::vector<int64_t> kept(s.b + 1, 0), intervals(s.b + 1, 0);
    const int t = s.b == 1 ? 1 : team(threads, s.b * points);
#pragma omp parallel for num_threads(t) schedule(dynamic, 1)
    for (int64_t b = 0; b < s.b; ++b) {
        int32_t *own = slot.get() + b * (per_sample + 1), *size = next.get() + b * (most + 1), *cell = met.get() + b * (most + 1);
        Place* step = walk.get() + b * points;
        const int32_t first = int32_t(b * per_sample), last = int32_t(most);
        std::fill(own, own + per_sample + 1, -1);
        std::fill(size, size + most + 1, 0);
        own[0] = last;
        int32_t count = 0;
        along_columns(s, b, [&](int32_t p, int32_t) BEV_LAMBDA {
            const int32_t c = cells[p] < 0 ? 0 : cells[p] - first + 1;
            int32_t i = own[c];
            if (i < 0) i = count++, own[c] = i, cell[i] = c;
            *step++ = {i, size[i]++};
        });
        kept[b + 1] = points - size[last], intervals[b + 1] = count;
    }
    for (int64_t b = 0; b < s.b; ++b) kept[b + 1] += kept[b], intervals[b + 1] += intervals[b];
    indptr[0] = 0;
#pragma omp parallel for num_threads(t) schedule(dynamic, 1)
    for (int64_t b = 0; b < s.b; ++b) {
        int32_t *at = next.get() + b * (most + 1), *cell = met.get() + b * (most + 1), sum = int32_t(kept[b]);
        const Place* step = walk.get() + b * points;
        const int64_t count = intervals[b + 1] - intervals[b];
        for (int64_t i = 0; i < count; ++i) {
            const int32_t size = at[i];
            at[i] = sum, sum += size;
            indptr[intervals[b] + i + 1] = sum;
            interval_cells[intervals[b] + i] = int32_t(b * per_sample) + cell[i] - 1;
        }
        at[most] = int32_t(kept[s.b] + b * points - kept[b]);
        along_columns(s, b, [&](int32_t p, int32_t pixel) BEV_LAMBDA {
            const int32_t i = at[step->interval] + step->rank;
            ++step;
            depth_idx[i] = p, feat_idx[i] = pixel;
        });
    }
    return {kept[s.b], intervals[s.b]};
}

struct PlanArrays { int32_t *depth_idx, *feat_idx, *indptr, *interval_cells; };

PlanArrays plan_arrays(py::array& depth_idx, py::array& feat_idx, py::array& indptr, py::array& interval_cells, int64_t points, int64_t n_cells) {
    if (double(points) > INT32_MAX || n_cells > INT32_MAX || n_cells < 0) refuse("more cells or points than int32 can number");
    const int64_t most = std::min(points, n_cells);
    return {output<int32_t>(depth_idx, "depth_idx", points), output<int32_t>(feat_idx, "feat_idx", points),
            output<int32_t>(indptr, "indptr", most + 1), output<int32_t>(interval_cells, "interval_cells", most)};
}

using Shape = std::array<int64_t, 5>;

std::array<int64_t, 2> sort_points_py(const py::array& cells, Shape bndhw, int64_t n_cells, int threads, py::array depth_idx, py::array feat_idx,
                                      py::array indptr, py::array interval_cells) {
    const Sizes s{bndhw[0], bndhw[1], bndhw[2], bndhw[3], bndhw[4]};
    const int32_t* cell = input<int32_t>(cells, "cells", s.b * s.sample());
    if (s.b ? n_cells % s.b : n_cells) refuse("cells do not divide into the samples");
    const PlanArrays a = plan_arrays(depth_idx, feat_idx, indptr, interval_cells, s.b * s.sample(), n_cells);
    Sorted r{0, 0};
    int64_t wrong = 0;
    {
        py::gil_scoped_release nogil;
        const int64_t per_sample = s.b ? n_cells / s.b : 0;
        for (int64_t b = 0; b < s.b; ++b)
            for (int64_t p = b * s.sample(); p < (b + 1) * s.sample(); ++p) wrong += cell[p] != -1 && (cell[p] < b * per_sample || cell[p] >= (b + 1) * per_sample);
        if (!wrong) r = sort_points(cell, s, n_cells, threads, a.depth_idx, a.feat_idx, a.indptr, a.interval_cells);
    }
    if (wrong) throw py::index_error("bev_reid._C: " + std::to_string(wrong) + " entries of cells lie outside [-1, " + std::to_string(n_cells) + ") or in another sample's part of it");
    return {r.kept, r.intervals};
}

// Returns the points inside, the intervals, and the first point that is not finite, or -1.
template <typename T>
std::array<int64_t, 3> make_plan_py(const py::array& geom, Shape bndhw, std::array<double, 3> lo, std::array<double, 3> dx, std::array<int64_t, 3> nx,
                                    bool trunc, int threads, py::array cells, py::array depth_idx, py::array feat_idx, py::array indptr, py::array interval_cells) {
    const Sizes s{bndhw[0], bndhw[1], bndhw[2], bndhw[3], bndhw[4]};
    const int64_t points = s.b * s.sample();
    const T* g = input<T>(geom, "geom", points * 3);
    int32_t* cell = output<int32_t>(cells, "cells", points);
    Grid grid;
    for (int a = 0; a < 3; ++a) grid.lo[a] = lo[a], grid.dx[a] = dx[a], grid.nx[a] = nx[a];
    if (double(s.b) * nx[0] * nx[1] * nx[2] > INT32_MAX) refuse("more cells or points than int32 can number");
    const int64_t n_cells = s.b * nx[0] * nx[1] * nx[2];
    const PlanArrays a = plan_arrays(depth_idx, feat_idx, indptr, interval_cells, points, n_cells);
    Sorted r{0, 0};
    int64_t bad = -1;
    {
        py::gil_scoped_release nogil;
        const auto find = choose_cells<T>();
        const int64_t step = 4096, per = (s.sample() + step - 1) / step;
        int broken = 0;
#pragma omp parallel for num_threads(points < kSmallPlan ? 1 : threads) schedule(static) reduction(| : broken)
        for (int64_t i = 0; i < s.b * per; ++i) {
            const int64_t sample = i / per, first = sample * s.sample() + i % per * step;
            broken |= !find(g, first, std::min(first + step, (sample + 1) * s.sample()), sample, grid, trunc, cell);
        }
        for (int64_t i = 0; broken && bad < 0 && i < 3 * points; ++i)
            if (!std::isfinite(g[i])) bad = i / 3;
        if (bad < 0) r = sort_points(cell, s, n_cells, threads, a.depth_idx, a.feat_idx, a.indptr, a.interval_cells);
    }
    return {r.kept, r.intervals, bad};
}

// ---- passes over the channels ---------------------------------------------------------------------------------------

// Calls pass<V>(c0, first) for groups of at most kMaxVecs vectors, as even as possible, then V = 0 for what no vector fills.
#define BEV_PASSES(CALL)                                                                                   \
    {                                                                                                      \
        const int64_t vecs = a.c / L, passes = (vecs + kMaxVecs - 1) / kMaxVecs;                           \
        int64_t c0 = 0;                                                                                    \
        for (int64_t k = 0; k < passes; ++k) {                                                             \
            const int64_t v = vecs / passes + (k < vecs % passes);                                         \
            switch (v) {                                                                                   \
                case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break;    \
                case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; case 8: CALL(8); break;    \
                case 9: CALL(9); break; case 10: CALL(10); break; case 11: CALL(11); break; case 12: CALL(12); break; \
            }                                                                                              \
            c0 += v * L;                                                                                   \
        }                                                                                                  \
        if (c0 < a.c) CALL(0);                                                                             \
    }

// ---- forward: each cell gathers its interval ------------------------------------------------------------------------

template <typename T> struct Forward {
    static constexpr int64_t chunk = 128;  // intervals that a thread takes at a time
    static constexpr int ahead = 32;       // points between the prefetch of a weight and its use
    const T* depth;
    const T* feats;
    const int32_t *depth_idx, *feat_idx, *indptr, *interval_cells;
    T* out;
    int64_t points, pixels, kept, n_cells, row, c;  // row: distance between two feature rows
    bool stream;                                    // write past the caches: the output is larger than what they hold
};

template <typename T, int W, int V, bool Stream> BEV_INLINE void pool_pass(const Forward<T>& a, int64_t first, int64_t last, int64_t c0) {
    constexpr int L = W / int(sizeof(T));
    [[maybe_unused]] const int32_t end = int32_t(a.kept - 1);
    for (int64_t n = first; n < last; ++n) {
        const int32_t hi = a.indptr[n + 1];
        T* out = a.out + a.interval_cells[n] * a.c + c0;
        if constexpr (V > 0) {
            Vec<T, W> acc[V] = {};
            for (int32_t i = a.indptr[n]; i < hi; ++i) {
                if (Stream) prefetch(a.depth + a.depth_idx[std::min(i + Forward<T>::ahead, end)]);
                const T weight = a.depth[a.depth_idx[i]];
                const T* f = a.feats + a.feat_idx[i] * a.row + c0;
                for (int v = 0; v < V; ++v) acc[v] += weight * load<T, W>(f + v * L);
            }
            if (Stream) for (int v = 0; v < V; ++v) store_past_cache<T, W>(out + v * L, acc[v]);
            else for (int v = 0; v < V; ++v) store<T, W>(out + v * L, acc[v]);
        } else {
            for (int64_t k = 0; k < a.c - c0; ++k) out[k] = 0;
            for (int32_t i = a.indptr[n]; i < hi; ++i)
                for (int64_t k = 0; k < a.c - c0; ++k) out[k] += a.depth[a.depth_idx[i]] * a.feats[a.feat_idx[i] * a.row + c0 + k];
        }
    }
}

// Whether everything that intervals [first, last) point at exists.
template <typename Args> BEV_INLINE bool sound(const Args& a, int64_t first, int64_t last) {
    const int32_t lo = a.indptr[first], hi = a.indptr[last];
    bool ok = lo >= 0 && lo <= hi && hi <= a.kept;
    for (int64_t n = first; n < last; ++n) ok &= (a.indptr[n] <= a.indptr[n + 1]) & (a.interval_cells[n] >= 0) & (a.interval_cells[n] < a.n_cells);
    if (!ok) return false;
    uint32_t p = 0, q = 0;
    for (int32_t i = lo; i < hi; ++i) p = std::max(p, uint32_t(a.depth_idx[i])), q = std::max(q, uint32_t(a.feat_idx[i]));
    return hi == lo || (p < a.points && q < a.pixels);
}

template <typename T, int W> BEV_INLINE bool run_chunk(const Forward<T>& a, int64_t first, int64_t last) {
    constexpr int L = W / int(sizeof(T));
    // the prefetch looks beyond the interval: within the chunk's points, which are checked, or at the last point
    if (!sound(a, first, last)) return false;
    Forward<T> b = a;
    b.kept = a.indptr[last];
#define BEV_CALL(V) (b.stream ? pool_pass<T, W, V, true>(b, first, last, c0) : pool_pass<T, W, V, false>(b, first, last, c0))
    BEV_PASSES(BEV_CALL)
#undef BEV_CALL
    return true;
}

// ---- backward: each pixel visits its depth bins ---------------------------------------------------------------------

template <typename T> struct Backward {
    static constexpr int64_t chunk = 8;  // image columns that a thread takes at a time
    const T *grad, *depth;
    const T* feats;
    const int32_t* cells;
    T* grad_depth;
    T* grad_feats;
    Sizes s;
    int64_t n_cells, row, c;
};

// One pixel: the gradients of its depths are dot products, that of its feature row is a weighted sum.
template <typename T, int W, int V> BEV_INLINE bool back_pass(const Backward<T>& a, int64_t pixel, int64_t p0, int64_t c0) {
    constexpr int L = W / int(sizeof(T));
    const int64_t hw = a.s.hw();
    const T* f = a.feats + pixel * a.row + c0;
    T* out = a.grad_feats + pixel * a.c + c0;
    bool ok = true;
    if constexpr (V > 0) {
        Vec<T, W> acc[V] = {}, feat[V];
        for (int v = 0; v < V; ++v) feat[v] = load<T, W>(f + v * L);
        for (int64_t k = 0, p = p0; k < a.s.d; ++k, p += hw) {
            const int32_t cell = a.cells[p];
            if (!c0) a.grad_depth[p] = 0;
            if (cell == -1) continue;
            if (cell < 0 || cell >= a.n_cells) { ok = false; continue; }
            const T* g = a.grad + cell * a.c + c0;
            const T weight = a.depth[p];
            Vec<T, W> dot = {};
            for (int v = 0; v < V; ++v) {
                const Vec<T, W> x = load<T, W>(g + v * L);
                dot += x * feat[v], acc[v] += weight * x;
            }
            a.grad_depth[p] += sum<T, W>(dot);
        }
        for (int v = 0; v < V; ++v) store<T, W>(out + v * L, acc[v]);
    } else {
        const int64_t rest = a.c - c0;
        T sums[16] = {};  // fewer than one vector
        for (int64_t k = 0, p = p0; k < a.s.d; ++k, p += hw) {
            const int32_t cell = a.cells[p];
            if (!c0) a.grad_depth[p] = 0;
            if (cell == -1) continue;
            if (cell < 0 || cell >= a.n_cells) { ok = false; continue; }
            const T* g = a.grad + cell * a.c + c0;
            for (int64_t j = 0; j < rest; ++j) a.grad_depth[p] += g[j] * f[j], sums[j] += a.depth[p] * g[j];
        }
        for (int64_t j = 0; j < rest; ++j) out[j] = sums[j];
    }
    return ok;
}

// Columns [first, last): one column's pixels look at the same cells, which stay in the cache from row to row.
template <typename T, int W> BEV_INLINE bool run_chunk(const Backward<T>& a, int64_t first, int64_t last) {
    constexpr int L = W / int(sizeof(T));
    bool ok = true;
    for (int64_t column = first; column < last; ++column) {
        const int64_t cam = column / a.s.w, w = column % a.s.w;
        for (int64_t h = 0; h < a.s.h; ++h) {
            const int64_t pixel = cam * a.s.hw() + h * a.s.w + w, p0 = cam * a.s.camera() + h * a.s.w + w;
#define BEV_CALL(V) ok &= back_pass<T, W, V>(a, pixel, p0, c0)
            BEV_PASSES(BEV_CALL)
#undef BEV_CALL
        }
    }
    return ok;
}

// ---- channels first to rows, for the cells that hold points ------------------------------------------------------------

// grad (b, z c, x y) -> rows (b x y z) c. A block of 16 neighbouring cells of a plane is one cache line.
template <typename T> bool rows_of(const T* grad, const int32_t* interval_cells, int64_t intervals, int64_t b, int64_t xy, int64_t z, int64_t c, int threads, T* rows) {
    constexpr int64_t B = 16;
    const int64_t blocks = (xy + B - 1) / B;
    std::vector<uint8_t> used(b * blocks, 0);
    for (int64_t i = 0; i < intervals; ++i) {
        if (interval_cells[i] < 0 || interval_cells[i] >= b * xy * z) return false;
        const int64_t plane = interval_cells[i] / z;
        used[plane / xy * blocks + plane % xy / B] = 1;
    }
#pragma omp parallel for num_threads(team(threads, intervals * 4)) schedule(dynamic, 16)
    for (int64_t i = 0; i < b * blocks; ++i) {
        if (!used[i]) continue;
        const int64_t sample = i / blocks, at = i % blocks * B, size = std::min(B, xy - at);
        for (int64_t k = 0; k < z; ++k)
            for (int64_t ch = 0; ch < c; ++ch) {
                const T* from = grad + (sample * z * c + k * c + ch) * xy + at;
                T* to = rows + ((sample * xy + at) * z + k) * c + ch;
                for (int64_t j = 0; j < size; ++j) to[j * z * c] = from[j];
            }
    }
    return true;
}

// ---- one body, compiled for three instruction sets; chosen when the program runs --------------------------------------

#define BEV_ONE(ATTR, SUFFIX, W, ARGS, T) ATTR bool chunk_##SUFFIX(const ARGS<T>& a, int64_t first, int64_t last) { return run_chunk<T, W>(a, first, last); }
#define BEV_VERSIONS(ATTR, SUFFIX, W)                                                                                    \
    BEV_ONE(ATTR, SUFFIX, W, Forward, float) BEV_ONE(ATTR, SUFFIX, W, Forward, double) \
    BEV_ONE(ATTR, SUFFIX, W, Backward, float) BEV_ONE(ATTR, SUFFIX, W, Backward, double)

BEV_VERSIONS(, base, 16)
#ifdef BEV_X86
BEV_VERSIONS(BEV_AVX2, avx2, 32)
BEV_VERSIONS(BEV_AVX512, avx512, 64)
#endif

template <typename Args> using Chunk = bool (*)(const Args&, int64_t, int64_t);

template <typename Args> Chunk<Args> choose() {
#ifdef BEV_X86
    if (isa() == Isa::avx512) return chunk_avx512;
    if (isa() == Isa::avx2) return chunk_avx2;
#endif
    return chunk_base;
}

// Zeros for cells [first, last): all of them, or, past the caches, those that no interval writes.
template <typename T> void clear(const Forward<T>& a, const std::vector<uint8_t>& full, int64_t first, int64_t last) {
    if (!a.stream) { std::memset(a.out + first * a.c, 0, (last - first) * a.c * sizeof(T)); return; }
    const uint8_t *f = full.data(), *end = f + last;
    for (const uint8_t* at = f + first; at < end;) {
        const uint8_t* stop = static_cast<const uint8_t*>(std::memchr(at, 1, end - at));
        if (!stop) stop = end;
        zero_past_cache(a.out + (at - f) * a.c, (stop - at) * a.c * int64_t(sizeof(T)));
        for (at = stop; at < end && *at; ++at) {}
    }
}

template <typename T> bool forward(Forward<T> a, int64_t intervals, int threads) {
    const auto chunk = choose<Forward<T>>();
    const int t = team(threads, a.kept);
    const int64_t share = (a.n_cells + t - 1) / t, step = Forward<T>::chunk, chunks = (intervals + step - 1) / step;
    a.stream = a.n_cells * a.c * int64_t(sizeof(T)) > kStream && (a.c * sizeof(T)) % 64 == 0 && uintptr_t(a.out) % 64 == 0;
    std::vector<uint8_t> full(a.stream ? a.n_cells : 0, 0);  // 1: an interval writes this cell
    for (int64_t i = 0; a.stream && i < intervals; ++i) {
        if (a.interval_cells[i] < 0 || a.interval_cells[i] >= a.n_cells) return false;
        full[a.interval_cells[i]] = 1;
    }
    int bad = 0;
#pragma omp parallel num_threads(t) reduction(| : bad)
    {
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < t; ++i)
            if (i * share < a.n_cells) clear(a, full, i * share, std::min(a.n_cells, (i + 1) * share));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < chunks; ++i) bad |= !chunk(a, i * step, std::min(intervals, (i + 1) * step));
        if (a.stream) fence();
    }
    return !bad;
}

template <typename T> bool backward(const Backward<T>& a, int threads) {
    const auto chunk = choose<Backward<T>>();
    const int64_t columns = a.s.b * a.s.n * a.s.w, step = Backward<T>::chunk, chunks = (columns + step - 1) / step;
    int bad = 0;
#pragma omp parallel for num_threads(team(threads, a.s.b * a.s.sample())) schedule(dynamic, 1) reduction(| : bad)
    for (int64_t i = 0; i < chunks; ++i) bad |= !chunk(a, i * step, std::min(columns, (i + 1) * step));
    return !bad;
}

// Feature rows (pixels, c): the channels lie side by side, the rows may be apart (a slice of a wider tensor).
template <typename T> const T* feature_rows(const py::array& a, int64_t pixels, int64_t* row, int64_t* c) {
    check_dtype<T>(a, "img_feats");
    if (a.ndim() != 2 || a.shape(0) != pixels) refuse("img_feats must have " + std::to_string(pixels) + " rows");
    *c = a.shape(1);
    *row = *c;
    if (!a.size()) return nullptr;
    const int64_t item = sizeof(T), apart = pixels > 1 ? a.strides(0) : *c * item;
    if ((*c > 1 && a.strides(1) != item) || apart < 0 || apart % item) refuse("img_feats must have its channels side by side");
    *row = apart / item;
    return static_cast<const T*>(a.data());
}

template <typename T>
void forward_py(const py::array& depth, const py::array& img_feats, const py::array& depth_idx, const py::array& feat_idx, const py::array& indptr,
                const py::array& interval_cells, Shape bndhw, int64_t n_cells, int threads, py::array out) {
    const auto [b, n, d, h, w] = bndhw;
    const int64_t intervals = interval_cells.size();
    Forward<T> a;
    a.points = b * n * d * h * w, a.pixels = b * n * h * w, a.kept = depth_idx.size(), a.n_cells = n_cells;
    a.depth = input<T>(depth, "depth", a.points);
    a.feats = feature_rows<T>(img_feats, a.pixels, &a.row, &a.c);
    a.depth_idx = input<int32_t>(depth_idx, "depth_idx", a.kept);
    a.feat_idx = input<int32_t>(feat_idx, "feat_idx", a.kept);
    a.indptr = input<int32_t>(indptr, "indptr", intervals + 1);
    a.interval_cells = input<int32_t>(interval_cells, "interval_cells", intervals);
    a.out = output<T>(out, "out", n_cells * a.c);
    bool ok;
    {
        py::gil_scoped_release nogil;
        ok = forward(a, intervals, threads);
    }
    if (!ok) throw py::index_error("bev_reid._C: the plan holds indices out of range (depth_idx, feat_idx, indptr or interval_cells)");
}

template <typename T>
void backward_py(const py::array& grad, const py::array& depth, const py::array& img_feats, const py::array& cells,
                 Shape bndhw, int64_t n_cells, int threads, py::array grad_depth, py::array grad_feats) {
    Backward<T> a;
    a.s = {bndhw[0], bndhw[1], bndhw[2], bndhw[3], bndhw[4]};
    const int64_t points = a.s.b * a.s.sample(), pixels = a.s.b * a.s.n * a.s.hw();
    a.n_cells = n_cells;
    a.feats = feature_rows<T>(img_feats, pixels, &a.row, &a.c);
    a.grad = input<T>(grad, "grad", n_cells * a.c);
    a.depth = input<T>(depth, "depth", points);
    a.cells = input<int32_t>(cells, "cells", points);
    a.grad_depth = output<T>(grad_depth, "grad_depth", points);
    a.grad_feats = output<T>(grad_feats, "grad_feats", pixels * a.c);
    bool ok = true;
    {
        py::gil_scoped_release nogil;
        if (a.c) ok = backward(a, threads);
        else std::fill(a.grad_depth, a.grad_depth + points, T(0));
    }
    if (!ok) throw py::index_error("bev_reid._C: the plan holds indices out of range (cells)");
}

template <typename T>
void rows_py(const py::array& grad, const py::array& interval_cells, std::array<int64_t, 3> bxz, int64_t c, int threads, py::array rows) {
    const auto [b, xy, z] = bxz;
    const T* g = input<T>(grad, "grad", b * z * c * xy);
    const int32_t* cells = input<int32_t>(interval_cells, "interval_cells", interval_cells.size());
    T* out = output<T>(rows, "rows", b * xy * z * c);
    bool ok;
    {
        py::gil_scoped_release nogil;
        ok = rows_of(g, cells, interval_cells.size(), b, xy, z, c, threads, out);
    }
    if (!ok) throw py::index_error("bev_reid._C: the plan holds indices out of range (interval_cells)");
}

template <typename T> void bind_pool(py::module_& m, const std::string& dtype) {
    using namespace py::literals;
    m.def(("bev_pool_" + dtype).c_str(), &forward_py<T>, "Write the weighted sum of feature rows of each cell",
          "depth"_a, "img_feats"_a, "depth_idx"_a, "feat_idx"_a, "indptr"_a, "interval_cells"_a, "bndhw"_a, "n_cells"_a, "threads"_a, "out"_a);
    m.def(("bev_pool_backward_" + dtype).c_str(), &backward_py<T>, "Write the gradients of depth and features; cells outside of the intervals are not read",
          "grad"_a, "depth"_a, "img_feats"_a, "cells"_a, "bndhw"_a, "n_cells"_a, "threads"_a, "grad_depth"_a, "grad_feats"_a);
}

template <typename T> void bind_plan(py::module_& m, const std::string& dtype) {
    using namespace py::literals;
    m.def(("make_plan_" + dtype).c_str(), &make_plan_py<T>, "Write the plan of a geometry; return the points inside, the intervals, and the first point that is not finite, or -1",
          "geom"_a, "bndhw"_a, "lo"_a, "dx"_a, "nx"_a, "trunc"_a, "threads"_a, "cells"_a, "depth_idx"_a, "feat_idx"_a, "indptr"_a, "interval_cells"_a);
    m.def(("grad_rows_" + dtype).c_str(), &rows_py<T>, "Turn a gradient with channels first into rows; only rows near a cell of the plan are written",
          "grad"_a, "interval_cells"_a, "bxz"_a, "c"_a, "threads"_a, "rows"_a);
}

}  // namespace

void bind_bev_pool(py::module_& m) {
    using namespace py::literals;
    bind_pool<float>(m, "float32");
    bind_pool<double>(m, "float64");
    bind_plan<float>(m, "float32");
    bind_plan<double>(m, "float64");
    m.def("sort_points", &sort_points_py, "Sort the points into intervals, in order of first sight along the image columns; return the points inside and the intervals",
          "cells"_a, "bndhw"_a, "n_cells"_a, "threads"_a, "depth_idx"_a, "feat_idx"_a, "indptr"_a, "interval_cells"_a);
    m.def("instruction_set", [] { return std::string(isa_name()); }, "The instruction set that the kernels use on this machine; BEV_REID_ISA=base|avx2|avx512 lowers it");
}
