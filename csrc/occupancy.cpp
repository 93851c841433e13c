// Occupancy: points to boxes, points to map cells, map cells to voxel labels, rays through voxels, confusion counts.
//
// Every kernel has a NumPy twin that gives the same bits. So coordinates are computed in float64, in one written order,
// and never contracted to fused multiply-adds. One thread each: scenes run in parallel, and nothing depends on timing.
#include "arrays.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__) && defined(__FP_FAST_FMA)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

int64_t rows(const py::array& a, const char* name, int64_t width) {
    if (a.ndim() != 2 || a.shape(1) != width) refuse(std::string(name) + " must have " + std::to_string(width) + " columns");
    return a.shape(0);
}

struct Voxels {
    double lo[3], dx[3];
    int64_t nx[3];
    int64_t cells() const { return nx[0] * nx[1] * nx[2]; }
};

Voxels voxels(const py::array& lo, const py::array& dx, const std::array<int64_t, 3>& nx) {
    Voxels v;
    const double *l = input<double>(lo, "lo", 3), *d = input<double>(dx, "dx", 3);
    for (int i = 0; i < 3; ++i) {
        v.lo[i] = l[i], v.dx[i] = d[i], v.nx[i] = nx[i];
        if (!(d[i] > 0) || nx[i] <= 0) refuse("a grid needs voxels and cells above 0");
    }
    if (nx[0] > 1 << 20 || nx[1] > 1 << 20 || nx[2] > 1 << 20 || v.cells() > INT32_MAX) refuse("the grid has too many voxels");
    return v;
}

// Starts of the segments of n rows
const int64_t* starts(const py::array& ptr, int64_t segments, int64_t n) {
    const int64_t* p = input<int64_t>(ptr, "ptr", segments + 1);
    if (p[0] != 0 || p[segments] != n) refuse("ptr must begin at 0 and end at the number of points");
    for (int64_t i = 0; i < segments; ++i)
        if (p[i] > p[i + 1]) refuse("ptr must not decrease");
    return p;
}

// ---- points to boxes -------------------------------------------------------------------------------------------------

struct Box { double x, y, z, c, s, l, w, h; };  // centre, heading, half sizes

// 1: in the box; 2: in its lowest layer, where tyre and road cannot be told apart; 0: outside
inline int inside(const Box& b, double px, double py_, double pz, double clearance) {
    const double dx = px - b.x, dy = py_ - b.y, dz = pz - b.z;
    const double lx = dx * b.c + dy * b.s, ly = dy * b.c - dx * b.s;
    if (!(std::fabs(lx) <= b.l && std::fabs(ly) <= b.w && dz >= -b.h && dz <= b.h)) return 0;
    return dz < clearance - b.h ? 2 : 1;
}

void assign_py(const py::array& points, const py::array& boxes, double clearance, py::array owner) {
    const int64_t n = rows(points, "points", 3), k = rows(boxes, "boxes", 8);
    const float* p = input<float>(points, "points", 3 * n);
    const Box* b = reinterpret_cast<const Box*>(input<double>(boxes, "boxes", 8 * k));
    int32_t* o = output<int32_t>(owner, "owner", n);
    for (int64_t i = 0; i < k; ++i)
        for (int j = 0; j < 8; ++j)
            if (!std::isfinite(reinterpret_cast<const double*>(b + i)[j])) refuse("box " + std::to_string(i) + " is not finite");
    py::gil_scoped_release release;
    std::fill(o, o + n, -1);
    if (!k) return;
    // broad phase: which boxes may touch a square of the ground
    double lo[2] = {1e300, 1e300}, hi[2] = {-1e300, -1e300};
    std::vector<std::array<double, 2>> reach(k);
    for (int64_t i = 0; i < k; ++i) {
        reach[i] = {std::fabs(b[i].c) * b[i].l + std::fabs(b[i].s) * b[i].w + 1e-3, std::fabs(b[i].s) * b[i].l + std::fabs(b[i].c) * b[i].w + 1e-3};
        lo[0] = std::min(lo[0], b[i].x - reach[i][0]), hi[0] = std::max(hi[0], b[i].x + reach[i][0]);
        lo[1] = std::min(lo[1], b[i].y - reach[i][1]), hi[1] = std::max(hi[1], b[i].y + reach[i][1]);
    }
    const double cell = std::max({2., (hi[0] - lo[0]) / 1000, (hi[1] - lo[1]) / 1000});
    const int64_t nx = int64_t((hi[0] - lo[0]) / cell) + 1, ny = int64_t((hi[1] - lo[1]) / cell) + 1;
    std::vector<int32_t> ptr(nx * ny + 1, 0), list;
    auto walk = [&](auto&& f) {
        for (int64_t i = 0; i < k; ++i) {
            const int64_t x0 = int64_t((b[i].x - reach[i][0] - lo[0]) / cell), x1 = std::min(nx - 1, int64_t((b[i].x + reach[i][0] - lo[0]) / cell));
            const int64_t y0 = int64_t((b[i].y - reach[i][1] - lo[1]) / cell), y1 = std::min(ny - 1, int64_t((b[i].y + reach[i][1] - lo[1]) / cell));
            for (int64_t x = x0; x <= x1; ++x)
                for (int64_t y = y0; y <= y1; ++y) f(x * ny + y, i);
        }
    };
    walk([&](int64_t c, int64_t) { ++ptr[c + 1]; });
    for (int64_t c = 0; c < nx * ny; ++c) ptr[c + 1] += ptr[c];
    list.resize(ptr[nx * ny]);
    std::vector<int32_t> at(ptr.begin(), ptr.end() - 1);
    walk([&](int64_t c, int64_t i) { list[at[c]++] = int32_t(i); });  // ascending within a square
    for (int64_t i = 0; i < n; ++i) {
        const double x = p[3 * i], y = p[3 * i + 1], z = p[3 * i + 2];
        if (!(x >= lo[0] && x <= hi[0] && y >= lo[1] && y <= hi[1])) continue;
        const int64_t c = std::min(nx - 1, int64_t((x - lo[0]) / cell)) * ny + std::min(ny - 1, int64_t((y - lo[1]) / cell));
        for (int32_t j = ptr[c]; j < ptr[c + 1]; ++j) {
            const int hit = inside(b[list[j]], x, y, z, clearance);
            if (hit == 1) { o[i] = list[j]; break; }
            if (hit == 2) o[i] = -2;
        }
    }
}

// ---- a map of cells that grows sweep by sweep -----------------------------------------------------------------------------

class VoxelMap {
  public:
    explicit VoxelMap(double cell) : cell_(cell), table_(1 << 12, -1) {
        if (!(cell > 0)) refuse("the cell of a map must be above 0 m");
    }

    void add(const py::array& points, const py::array& labels) {
        const int64_t n = rows(points, "points", 3);
        const float* p = input<float>(points, "points", 3 * n);
        const uint8_t* l = input<uint8_t>(labels, "labels", n);
        for (int64_t i = 0; i < 3 * n; ++i)
            if (!(std::fabs(p[i] / cell_) < kHalf)) refuse("a point is not finite, or too far away for a map of cells of " + std::to_string(cell_) + " m");
        py::gil_scoped_release release;
        uint64_t last = ~uint64_t(0);
        int32_t at = -1;
        for (int64_t i = 0; i < n; ++i) {
            const uint64_t key = pack(p + 3 * i);
            if (key != last) at = find(key), last = key;
            double* s = sums_.data() + 3 * int64_t(at);
            s[0] += p[3 * i], s[1] += p[3 * i + 1], s[2] += p[3 * i + 2];
            ++counts_[at];
            if (l[i] != 255) votes_.push_back(uint64_t(at) << 8 | l[i]);
        }
    }

    int64_t size() const { return int64_t(keys_.size()); }

    // Cells in the order x, y, z: mean point, number of points, winning label (255: no votes)
    void result(py::array points, py::array counts, py::array labels) {
        const int64_t n = size();
        float* p = output<float>(points, "points", 3 * n);
        int32_t* c = output<int32_t>(counts, "counts", n);
        uint8_t* l = output<uint8_t>(labels, "labels", n);
        py::gil_scoped_release release;
        std::vector<std::pair<uint64_t, int32_t>> order(n);
        for (int64_t i = 0; i < n; ++i) order[i] = {keys_[i], int32_t(i)};
        std::sort(order.begin(), order.end());
        std::vector<uint8_t> won(n, 255);
        std::sort(votes_.begin(), votes_.end());
        for (size_t i = 0; i < votes_.size();) {
            const uint64_t cell = votes_[i] >> 8;
            size_t best = 0;
            while (i < votes_.size() && votes_[i] >> 8 == cell) {
                size_t j = i;
                while (j < votes_.size() && votes_[j] == votes_[i]) ++j;
                if (j - i > best) best = j - i, won[cell] = uint8_t(votes_[i]);  // ascending: a tie stays with the lower label
                i = j;
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const int32_t k = order[i].second;
            for (int j = 0; j < 3; ++j) p[3 * i + j] = float(sums_[3 * int64_t(k) + j] / counts_[k]);
            c[i] = counts_[k], l[i] = won[k];
        }
    }

  private:
    static constexpr double kHalf = 1 << 20;
    uint64_t pack(const float* p) const {
        uint64_t key = 0;
        for (int j = 0; j < 3; ++j) key = key << 21 | uint64_t(int64_t(std::floor(double(p[j]) / cell_)) + (1 << 20));
        return key;
    }
    static uint64_t mix(uint64_t k) { k *= 0x9E3779B97F4A7C15ull; return k ^ k >> 29; }
    int32_t find(uint64_t key) {
        if (2 * keys_.size() >= table_.size()) grow();
        const uint64_t mask = table_.size() - 1;
        for (uint64_t i = mix(key) & mask;; i = (i + 1) & mask) {
            if (table_[i] < 0) {
                if (keys_.size() >= size_t(INT32_MAX)) refuse("the map has too many cells");
                table_[i] = int32_t(keys_.size());
                keys_.push_back(key), counts_.push_back(0), sums_.insert(sums_.end(), 3, 0.);
                return table_[i];
            }
            if (keys_[table_[i]] == key) return table_[i];
        }
    }
    void grow() {
        table_.assign(4 * table_.size(), -1);
        const uint64_t mask = table_.size() - 1;
        for (size_t k = 0; k < keys_.size(); ++k) {
            uint64_t i = mix(keys_[k]) & mask;
            while (table_[i] >= 0) i = (i + 1) & mask;
            table_[i] = int32_t(k);
        }
    }
    double cell_;
    std::vector<int32_t> table_, counts_;
    std::vector<uint64_t> keys_, votes_;
    std::vector<double> sums_;
};

// ---- voting ----------------------------------------------------------------------------------------------------------------

// The most frequent class of the codes (class << 16 | instance), and the most frequent instance among its voters; ties to the lower
inline uint32_t winner(const uint32_t* code, int64_t n, std::array<uint32_t, 256>& count, std::vector<uint32_t>& same) {
    if (n == 1) return *code;
    uint32_t cls = 256, most = 0;
    for (int64_t i = 0; i < n; ++i) ++count[code[i] >> 16];
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t c = code[i] >> 16;
        if (count[c] > most || (count[c] == most && c < cls)) most = count[c], cls = c;
    }
    for (int64_t i = 0; i < n; ++i) count[code[i] >> 16] = 0;
    same.clear();
    for (int64_t i = 0; i < n; ++i)
        if (code[i] >> 16 == cls) same.push_back(code[i]);
    uint32_t best = same[0];
    if (std::all_of(same.begin(), same.end(), [&](uint32_t c) { return c == best; })) return best;
    std::sort(same.begin(), same.end());
    size_t longest = 0;
    for (size_t i = 0; i < same.size();) {
        size_t j = i;
        while (j < same.size() && same[j] == same[i]) ++j;
        if (j - i > longest) longest = j - i, best = same[i];
        i = j;
    }
    return best;
}

void vote_py(const py::array& points, const py::array& labels, const py::array& ptr, const py::array& instances, const py::array& poses,
             const py::array& lo, const py::array& dx, const std::array<int64_t, 3>& nx, int free, py::array semantics, py::array instance) {
    const Voxels v = voxels(lo, dx, nx);
    const int64_t n = rows(points, "points", 3), s = instances.size(), cells = v.cells();
    const float* p = input<float>(points, "points", 3 * n);
    const uint8_t* l = input<uint8_t>(labels, "labels", n);
    const int64_t* seg = starts(ptr, s, n);
    const uint16_t* who = input<uint16_t>(instances, "instances", s);
    const double* pose = input<double>(poses, "poses", 12 * s);
    uint8_t* sem = output<uint8_t>(semantics, "semantics", cells);
    uint16_t* ins = output<uint16_t>(instance, "instance", cells);
    if (free < 0 || free > 255) refuse("free must be 0 to 255");
    py::gil_scoped_release release;
    std::fill(sem, sem + cells, uint8_t(free));
    std::fill(ins, ins + cells, uint16_t(0));
    std::vector<std::pair<int32_t, uint32_t>> kept;  // voxel, code
    for (int64_t i = 0; i < s; ++i) {
        const double* m = pose + 12 * i;
        for (int64_t j = seg[i]; j < seg[i + 1]; ++j) {
            const double x = p[3 * j], y = p[3 * j + 1], z = p[3 * j + 2];
            const double a = ((m[0] * x + m[1] * y + m[2] * z + m[3]) - v.lo[0]) / v.dx[0];
            if (!(a >= 0 && a < double(v.nx[0]))) continue;
            const double b = ((m[4] * x + m[5] * y + m[6] * z + m[7]) - v.lo[1]) / v.dx[1];
            if (!(b >= 0 && b < double(v.nx[1]))) continue;
            const double c = ((m[8] * x + m[9] * y + m[10] * z + m[11]) - v.lo[2]) / v.dx[2];
            if (!(c >= 0 && c < double(v.nx[2]))) continue;
            kept.emplace_back(int32_t((int64_t(a) * v.nx[1] + int64_t(b)) * v.nx[2] + int64_t(c)), uint32_t(l[j]) << 16 | who[i]);
        }
    }
    std::array<uint32_t, 256> count{};
    std::vector<uint32_t> same, code(kept.size());
    auto settle = [&](int32_t cell, const uint32_t* c, int64_t k) {
        const uint32_t w = winner(c, k, count, same);
        sem[cell] = uint8_t(w >> 16), ins[cell] = uint16_t(w);
    };
    if (cells <= 10 * int64_t(kept.size()) + 100000) {  // counting sort; with few points in many voxels a plain sort reads less
        std::vector<int32_t> first(cells + 1, 0);
        for (const auto& k : kept) ++first[k.first + 1];
        for (int64_t i = 0; i < cells; ++i) first[i + 1] += first[i];
        for (const auto& k : kept) code[first[k.first]++] = k.second;  // now first[i] is where i ends
        for (int64_t i = 0; i < cells; ++i)
            if (const int32_t from = i ? first[i - 1] : 0; first[i] > from) settle(int32_t(i), code.data() + from, first[i] - from);
    } else {
        std::sort(kept.begin(), kept.end());
        for (size_t i = 0; i < kept.size(); ++i) code[i] = kept[i].second;
        for (size_t i = 0, j; i < kept.size(); i = j) {
            for (j = i; j < kept.size() && kept[j].first == kept[i].first;) ++j;
            settle(kept[i].first, code.data() + i, int64_t(j - i));
        }
    }
}

// ---- rays ------------------------------------------------------------------------------------------------------------------

void trace_py(const py::array& origins, const py::array& points, const py::array& ptr, const py::array& lo, const py::array& dx,
              const std::array<int64_t, 3>& nx, const py::object& solid, py::array seen) {
    const Voxels v = voxels(lo, dx, nx);
    const int64_t s = rows(origins, "origins", 3), n = rows(points, "points", 3);
    const double* o = input<double>(origins, "origins", 3 * s);
    const float* p = input<float>(points, "points", 3 * n);
    const int64_t* seg = starts(ptr, s, n);
    py::array solid_array;
    const uint8_t* wall = nullptr;
    if (!solid.is_none()) solid_array = py::cast<py::array>(solid), wall = input<uint8_t>(solid_array, "solid", v.cells());
    uint8_t* out_ = output<uint8_t>(seen, "seen", v.cells());
    py::gil_scoped_release release;
    for (int64_t i = 0; i < s; ++i)
        for (int64_t j = seg[i]; j < seg[i + 1]; ++j) {
            double a[3], d[3], t0 = 0, t1 = 1;
            bool hit = true;
            for (int k = 0; k < 3; ++k) {
                a[k] = (o[3 * i + k] - v.lo[k]) / v.dx[k];
                d[k] = (double(p[3 * j + k]) - v.lo[k]) / v.dx[k] - a[k];
                if (!std::isfinite(d[k])) hit = false;
                if (d[k] == 0) { if (!(a[k] >= 0 && a[k] < double(v.nx[k]))) hit = false; continue; }
                const double u = (0 - a[k]) / d[k], w = (double(v.nx[k]) - a[k]) / d[k];
                t0 = std::max(t0, std::min(u, w)), t1 = std::min(t1, std::max(u, w));
            }
            if (!hit || !(t0 <= t1)) continue;
            int64_t c[3];
            double next[3];
            for (int k = 0; k < 3; ++k) {
                c[k] = std::min(std::max(int64_t(std::floor(a[k] + d[k] * t0)), int64_t(0)), v.nx[k] - 1);
                next[k] = d[k] == 0 ? std::numeric_limits<double>::infinity() : (double(c[k] + (d[k] > 0)) - a[k]) / d[k];
            }
            for (;;) {
                const int64_t cell = (c[0] * v.nx[1] + c[1]) * v.nx[2] + c[2];
                out_[cell] = 1;
                if (wall && wall[cell]) break;
                const int k = next[0] <= next[1] ? (next[0] <= next[2] ? 0 : 2) : (next[1] <= next[2] ? 1 : 2);
                if (!(next[k] <= t1)) break;
                c[k] += d[k] > 0 ? 1 : -1;
                if (c[k] < 0 || c[k] >= v.nx[k]) break;
                next[k] = (double(c[k] + (d[k] > 0)) - a[k]) / d[k];
            }
        }
}

// ---- confusion ---------------------------------------------------------------------------------------------------------------

void confusion_py(const py::array& pred, const py::array& truth, const py::object& mask, int n, py::array counts) {
    if (n < 1 || n > 256) refuse("classes must be 1 to 256");
    const int64_t size = truth.size(), bins = int64_t(n) * n;
    const uint8_t *p = input<uint8_t>(pred, "pred", size), *t = input<uint8_t>(truth, "truth", size), *m = nullptr;
    py::array mask_array;
    if (!mask.is_none()) mask_array = py::cast<py::array>(mask), m = input<uint8_t>(mask_array, "mask", size);
    int64_t* c = output<int64_t>(counts, "counts", bins);
    uint8_t top = 0;
    if (m) for (int64_t i = 0; i < size; ++i) top = std::max<uint8_t>(top, m[i] ? std::max(p[i], t[i]) : uint8_t(0));
    else for (int64_t i = 0; i < size; ++i) top = std::max(top, std::max(p[i], t[i]));
    if (top >= n) refuse("a label is " + std::to_string(top) + ", but there are " + std::to_string(n) + " classes");
    py::gil_scoped_release release;
    // four tables, so that one voxel does not wait for the count of the one before; the last bin takes what is masked
    std::vector<int64_t> table(4 * (bins + 1), 0);
    int64_t *a = table.data(), *b = a + bins + 1, *d = b + bins + 1, *e = d + bins + 1;
    auto bin = [&](int64_t i) { return m && !m[i] ? bins : int64_t(t[i]) * n + p[i]; };
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) ++a[bin(i)], ++b[bin(i + 1)], ++d[bin(i + 2)], ++e[bin(i + 3)];
    for (; i < size; ++i) ++a[bin(i)];
    for (int64_t k = 0; k < bins; ++k) c[k] += a[k] + b[k] + d[k] + e[k];
}

}  // namespace

void bind_occupancy(py::module_& m) {
    using namespace py::literals;
    m.def("occ_assign", &assign_py, "Write the first box (x y z cos sin and half sizes) that holds each point; -1: none, -2: the lowest layer of one",
          "points"_a, "boxes"_a, "clearance"_a, "owner"_a);
    py::class_<VoxelMap>(m, "VoxelMap", "Cells of a growing point map: mean point, number of points, majority label")
        .def(py::init<double>(), "cell"_a)
        .def("add", &VoxelMap::add, "Add points with their labels (255: no vote)", "points"_a, "labels"_a)
        .def("result", &VoxelMap::result, "Write the cells in the order of x, y, z", "points"_a, "counts"_a, "labels"_a)
        .def("__len__", &VoxelMap::size);
    m.def("occ_vote", &vote_py, "Write the majority class of each voxel, and the majority instance among its voters", "points"_a, "labels"_a, "ptr"_a,
          "instances"_a, "poses"_a, "lo"_a, "dx"_a, "nx"_a, "free"_a, "semantics"_a, "instance"_a);
    m.def("occ_trace", &trace_py, "Mark the voxels between origins and points; stop in the first solid one", "origins"_a, "points"_a, "ptr"_a, "lo"_a,
          "dx"_a, "nx"_a, "solid"_a, "seen"_a);
    m.def("occ_confusion", &confusion_py, "Add the pairs (truth, prediction) to a table of counts", "pred"_a, "truth"_a, "mask"_a, "n"_a, "counts"_a);
}
