// Lift-splat pooling without the lifted volume, on a CPU.
//
// Notation: a *point* is one (camera pixel, depth bin), numbered in (b n d h w) order; a *pixel* is one feature row, in
// (b n h w) order; a *cell* is one voxel of the grid, in (b x y z) order. The plan sorts the points by cell.
// Every output element is written by exactly one thread, in an order that the plan fixes: no atomics, and the result is
// the same for any number of threads. Indices are checked where they are used, because a plan may be made by hand.
#include "arrays.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define BEV_X86 1
#define BEV_INLINE inline __attribute__((always_inline))
#else
#define BEV_INLINE inline
#endif

namespace {

constexpr int64_t kSmall = 1 << 15;  // fewer points than this are not worth waking threads for
constexpr int kLanes = 16;           // partial sums of a dot product: fixed, so that the compiler may vectorise it

int team(int threads, int64_t points) { return points < kSmall ? 1 : std::max(1, threads); }

// ---- plan -----------------------------------------------------------------------------------------------------------

struct Grid { double lo[3], dx[3]; int64_t nx[3]; };

// Cell of each point, -1 outside. Returns the number of points inside; `bad` gets the first non-finite point or -1.
template <typename T>
int64_t find_cells(const T* geom, int64_t points, int64_t per_sample, const Grid& grid, bool trunc, int threads,
                   int32_t* cells, int64_t* bad) {
    const T lo[3] = {T(grid.lo[0]), T(grid.lo[1]), T(grid.lo[2])}, dx[3] = {T(grid.dx[0]), T(grid.dx[1]), T(grid.dx[2])};
    const T nx[3] = {T(grid.nx[0]), T(grid.nx[1]), T(grid.nx[2])};
    int64_t kept = 0, broken = 0;
#pragma omp parallel for num_threads(team(threads, points)) schedule(static) reduction(+ : kept, broken)
    for (int64_t p = 0; p < points; ++p) {
        int64_t cell = p / per_sample;
        bool inside = true, finite = true;
        for (int a = 0; a < 3; ++a) {
            const T v = (geom[3 * p + a] - lo[a]) / dx[a];
            const T i = trunc ? std::trunc(v) : std::floor(v);
            finite &= bool(std::isfinite(geom[3 * p + a]));
            inside &= i >= 0 && i < nx[a];  // compared as a float: a cast of a huge or NaN value is undefined
            cell = cell * grid.nx[a] + (inside ? int64_t(i) : 0);
        }
        cells[p] = inside ? int32_t(cell) : -1;
        kept += inside;
        broken += !finite;
    }
    *bad = -1;
    for (int64_t i = 0; broken && *bad < 0; ++i)
        if (!std::isfinite(geom[i])) *bad = i / 3;
    return kept;
}

template <typename T>
std::pair<int64_t, int64_t> find_cells_py(const py::array& geom, int64_t samples, std::array<double, 3> lo,
                                          std::array<double, 3> dx, std::array<int64_t, 3> nx, bool trunc, int threads,
                                          py::array cells) {
    const int64_t points = cells.size();
    const T* g = input<T>(geom, "geom", points * 3);
    int32_t* out = output<int32_t>(cells, "cells", points);
    if (samples < 0 || (samples == 0 ? points != 0 : points % samples != 0)) refuse("geom does not divide into the samples");
    Grid grid;
    for (int a = 0; a < 3; ++a) grid.lo[a] = lo[a], grid.dx[a] = dx[a], grid.nx[a] = nx[a];
    if (double(samples) * nx[0] * nx[1] * nx[2] > INT32_MAX || points > INT32_MAX) refuse("more cells or points than int32 can number");
    int64_t bad = -1, kept = 0;
    {
        py::gil_scoped_release nogil;
        if (points) kept = find_cells<T>(g, points, points / samples, grid, trunc, threads, out, &bad);
    }
    return {kept, bad};
}

// Stable counting sort of the points by cell.
void sort_points_py(const py::array& cells, std::array<int64_t, 5> bndhw, int64_t n_cells, py::array indptr, py::array depth_idx,
                    py::array feat_idx) {
    const auto [b, n, d, h, w] = bndhw;
    const int64_t points = b * n * d * h * w, hw = h * w, kept = depth_idx.size();
    const int32_t* cell = input<int32_t>(cells, "cells", points);
    int32_t* ptr = output<int32_t>(indptr, "indptr", n_cells + 1);
    int32_t* di = output<int32_t>(depth_idx, "depth_idx", kept);
    int32_t* fi = output<int32_t>(feat_idx, "feat_idx", kept);
    if (points > INT32_MAX || n_cells > INT32_MAX || n_cells < 0) refuse("more cells or points than int32 can number");
    int64_t inside = 0, outside_range = 0;
    {
        py::gil_scoped_release nogil;
        std::fill(ptr, ptr + n_cells + 1, 0);
        for (int64_t p = 0; p < points; ++p) {
            if (cell[p] == -1) continue;
            if (cell[p] < 0 || cell[p] >= n_cells) { ++outside_range; continue; }
            ++ptr[cell[p] + 1];
            ++inside;
        }
        if (!outside_range && inside == kept) {
            for (int64_t c = 0; c < n_cells; ++c) ptr[c + 1] += ptr[c];
            std::vector<int32_t> next(ptr, ptr + n_cells);
            int64_t p = 0;
            for (int64_t cam = 0; cam < b * n; ++cam)
                for (int64_t k = 0; k < d; ++k)
                    for (int64_t pix = cam * hw; pix < (cam + 1) * hw; ++pix, ++p)
                        if (cell[p] >= 0) {
                            const int32_t at = next[cell[p]]++;
                            di[at] = int32_t(p);
                            fi[at] = int32_t(pix);
                        }
        }
    }
    if (outside_range) throw py::index_error("bev_reid._C: " + std::to_string(outside_range) + " entries of cells lie outside [-1, " + std::to_string(n_cells) + ")");
    if (inside != kept) refuse("depth_idx and feat_idx must have one element per point inside (" + std::to_string(inside) + "), got " + std::to_string(kept));
}

// ---- forward: each cell gathers its interval ------------------------------------------------------------------------

template <typename T> struct Forward {
    static constexpr int64_t chunk = 512;  // cells that a thread takes at a time: 128 kB of output at 64 channels
    const T *depth, *feats;
    const int32_t *depth_idx, *feat_idx, *indptr;
    T* out;
    int64_t points, pixels, kept, row, c;  // row: distance between two feature rows
};

// Cells [first, last). N is the number of channels when known at compile time (sums stay in registers), else 0.
template <typename T, int N> BEV_INLINE bool pool_cells(const Forward<T>& a, int64_t first, int64_t last) {
    const int64_t c = N ? N : a.c;
    bool ok = true;
    std::fill(a.out + first * c, a.out + last * c, T(0));  // most cells are empty: zero the whole chunk while it is in cache
    for (int64_t cell = first; cell < last; ++cell) {
        const int32_t lo = a.indptr[cell], hi = a.indptr[cell + 1];
        if (lo == hi) continue;
        if (lo < 0 || hi < lo || hi > a.kept) { ok = false; continue; }
        T* out = a.out + cell * c;
        T sums[N ? N : 1] = {};
        T* acc = N ? sums : out;
        for (int32_t i = lo; i < hi; ++i) {
            const int32_t p = a.depth_idx[i], q = a.feat_idx[i];
            if (p < 0 || p >= a.points || q < 0 || q >= a.pixels) { ok = false; break; }
            const T weight = a.depth[p];
            const T* f = a.feats + q * a.row;
            for (int64_t k = 0; k < c; ++k) acc[k] += weight * f[k];
        }
        if (N) std::copy(sums, sums + N, out);
    }
    return ok;
}

// ---- backward: each pixel visits its depth bins ---------------------------------------------------------------------

template <typename T> struct Backward {
    static constexpr int64_t chunk = 64;  // pixels
    const T *grad, *depth, *feats;
    const int32_t* cells;
    T *grad_depth, *grad_feats;
    int64_t d, hw, n_cells, row, c;
};

// Pixels [first, last): one pass makes the gradient of their depths (dot products) and of their feature row.
template <typename T, int N> BEV_INLINE bool back_pixels(const Backward<T>& a, int64_t first, int64_t last) {
    const int64_t c = N ? N : a.c, whole = c / kLanes * kLanes;
    bool ok = true;
    for (int64_t pix = first; pix < last; ++pix) {
        const T* f = a.feats + pix * a.row;
        T* out = a.grad_feats + pix * c;
        T sums[N ? N : 1] = {};
        T* acc = N ? sums : out;
        if (!N) std::fill(out, out + c, T(0));
        const int64_t start = pix / a.hw * a.d * a.hw + pix % a.hw;
        for (int64_t k = 0, p = start; k < a.d; ++k, p += a.hw) {
            const int32_t cell = a.cells[p];
            a.grad_depth[p] = 0;
            if (cell == -1) continue;
            if (cell < 0 || cell >= a.n_cells) { ok = false; continue; }
            const T* g = a.grad + cell * c;
            const T weight = a.depth[p];
            T lanes[kLanes] = {}, dot = 0;
            for (int64_t j = 0; j < whole; j += kLanes)
                for (int l = 0; l < kLanes; ++l) lanes[l] += g[j + l] * f[j + l];
            for (int64_t j = whole; j < c; ++j) dot += g[j] * f[j];
            for (int l = 0; l < kLanes; ++l) dot += lanes[l];
            for (int64_t j = 0; j < c; ++j) acc[j] += weight * g[j];
            a.grad_depth[p] = dot;
        }
        if (N) std::copy(sums, sums + N, out);
    }
    return ok;
}

// ---- one body, compiled for the baseline and for AVX2; chosen when the program runs ----------------------------------

#define BEV_SWITCH(KERNEL, T)                                         \
    switch (a.c) {                                                    \
        case 32: return KERNEL<T, 32>(a, first, last);                \
        case 64: return KERNEL<T, 64>(a, first, last);                \
        case 80: return KERNEL<T, 80>(a, first, last);                \
        case 96: return KERNEL<T, 96>(a, first, last);                \
        case 128: return KERNEL<T, 128>(a, first, last);              \
        default: return KERNEL<T, 0>(a, first, last);                 \
    }
#define BEV_VERSIONS(ATTR, SUFFIX)                                                                             \
    ATTR bool chunk_##SUFFIX(const Forward<float>& a, int64_t first, int64_t last) { BEV_SWITCH(pool_cells, float) }    \
    ATTR bool chunk_##SUFFIX(const Forward<double>& a, int64_t first, int64_t last) { BEV_SWITCH(pool_cells, double) }  \
    ATTR bool chunk_##SUFFIX(const Backward<float>& a, int64_t first, int64_t last) { BEV_SWITCH(back_pixels, float) }  \
    ATTR bool chunk_##SUFFIX(const Backward<double>& a, int64_t first, int64_t last) { BEV_SWITCH(back_pixels, double) }

BEV_VERSIONS(, base)
#ifdef BEV_X86
BEV_VERSIONS(__attribute__((target("avx2,fma"))), avx2)
#endif

template <typename Args> bool run(const Args& args, int64_t total, int64_t points, int threads) {
    bool (*chunk)(const Args&, int64_t, int64_t) = chunk_base;
#ifdef BEV_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) chunk = chunk_avx2;
#endif
    int bad = 0;
    const int64_t step = Args::chunk, chunks = (total + step - 1) / step;
#pragma omp parallel for num_threads(team(threads, points)) schedule(dynamic, 1) reduction(| : bad)
    for (int64_t i = 0; i < chunks; ++i) bad |= !chunk(args, i * step, std::min(total, (i + 1) * step));
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
void forward_py(const py::array& depth, const py::array& img_feats, const py::array& depth_idx, const py::array& feat_idx,
                const py::array& indptr, std::array<int64_t, 5> bndhw, int threads, py::array out) {
    const auto [b, n, d, h, w] = bndhw;
    Forward<T> a;
    a.points = b * n * d * h * w, a.pixels = b * n * h * w, a.kept = depth_idx.size();
    const int64_t n_cells = int64_t(indptr.size()) - 1;
    if (n_cells < 0) refuse("indptr must have one element per cell and one more");
    a.depth = input<T>(depth, "depth", a.points);
    a.feats = feature_rows<T>(img_feats, a.pixels, &a.row, &a.c);
    a.depth_idx = input<int32_t>(depth_idx, "depth_idx", a.kept);
    a.feat_idx = input<int32_t>(feat_idx, "feat_idx", a.kept);
    a.indptr = input<int32_t>(indptr, "indptr", n_cells + 1);
    a.out = output<T>(out, "out", n_cells * a.c);
    bool ok;
    {
        py::gil_scoped_release nogil;
        ok = run(a, n_cells, a.kept, threads);
    }
    if (!ok) throw py::index_error("bev_reid._C: the plan holds indices out of range (depth_idx, feat_idx or indptr)");
}

template <typename T>
void backward_py(const py::array& grad, const py::array& depth, const py::array& img_feats, const py::array& cells,
                 std::array<int64_t, 5> bndhw, int64_t n_cells, int threads, py::array grad_depth, py::array grad_feats) {
    const auto [b, n, d, h, w] = bndhw;
    const int64_t points = b * n * d * h * w, pixels = b * n * h * w;
    Backward<T> a;
    a.d = d, a.hw = h * w, a.n_cells = n_cells;
    a.feats = feature_rows<T>(img_feats, pixels, &a.row, &a.c);
    a.grad = input<T>(grad, "grad", n_cells * a.c);
    a.depth = input<T>(depth, "depth", points);
    a.cells = input<int32_t>(cells, "cells", points);
    a.grad_depth = output<T>(grad_depth, "grad_depth", points);
    a.grad_feats = output<T>(grad_feats, "grad_feats", pixels * a.c);
    bool ok;
    {
        py::gil_scoped_release nogil;
        ok = run(a, pixels, points, threads);
    }
    if (!ok) throw py::index_error("bev_reid._C: the plan holds indices out of range (cells)");
}

}  // namespace

template <typename T> static void bind_kernels(py::module_& m, const std::string& dtype) {
    using namespace py::literals;
    m.def(("find_cells_" + dtype).c_str(), &find_cells_py<T>, "Write the cell of each point; return the number inside and the first point that is not finite, or -1",
          "geom"_a, "samples"_a, "lo"_a, "dx"_a, "nx"_a, "trunc"_a, "threads"_a, "cells"_a);
    m.def(("bev_pool_" + dtype).c_str(), &forward_py<T>, "Write the weighted sum of feature rows of each cell",
          "depth"_a, "img_feats"_a, "depth_idx"_a, "feat_idx"_a, "indptr"_a, "bndhw"_a, "threads"_a, "out"_a);
    m.def(("bev_pool_backward_" + dtype).c_str(), &backward_py<T>, "Write the gradients of depth and features",
          "grad"_a, "depth"_a, "img_feats"_a, "cells"_a, "bndhw"_a, "n_cells"_a, "threads"_a, "grad_depth"_a, "grad_feats"_a);
}

void bind_bev_pool(py::module_& m) {
    using namespace py::literals;
    bind_kernels<float>(m, "float32");
    bind_kernels<double>(m, "float64");
    m.def("sort_points", &sort_points_py, "Stable counting sort of the points by cell",
          "cells"_a, "bndhw"_a, "n_cells"_a, "indptr"_a, "depth_idx"_a, "feat_idx"_a);
}
