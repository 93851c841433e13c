// Scenes of boxes: scores of relative poses, and object-level bundle adjustment. The same steps as in
// 22c_association and 22d_refinement, which are the reference; one thread, one order, so the same answer always.
#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add rounds otherwise than two operations
#endif

namespace {

struct V3 { double x[3]; };
struct M3 { double m[3][3]; };

inline V3 operator+(const V3& a, const V3& b) { return {{a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2]}}; }
inline V3 operator-(const V3& a, const V3& b) { return {{a.x[0] - b.x[0], a.x[1] - b.x[1], a.x[2] - b.x[2]}}; }
inline V3 operator*(const M3& A, const V3& b) {
    V3 o;
    for (int i = 0; i < 3; ++i) o.x[i] = A.m[i][0] * b.x[0] + A.m[i][1] * b.x[1] + A.m[i][2] * b.x[2];
    return o;
}
inline M3 operator*(const M3& A, const M3& B) {
    M3 o;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) o.m[i][j] = A.m[i][0] * B.m[0][j] + A.m[i][1] * B.m[1][j] + A.m[i][2] * B.m[2][j];
    return o;
}
inline M3 t(const M3& A) {
    M3 o;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) o.m[i][j] = A.m[j][i];
    return o;
}
inline M3 hat(const V3& w) { return {{{0, -w.x[2], w.x[1]}, {w.x[2], 0, -w.x[0]}, {-w.x[1], w.x[0], 0}}}; }
inline double dot(const V3& a, const V3& b) { return a.x[0] * b.x[0] + a.x[1] * b.x[1] + a.x[2] * b.x[2]; }

struct Pose { M3 R; V3 p; };
inline Pose load(const double* a) {
    Pose T;
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) T.R.m[i][j] = a[4 * i + j];
        T.p.x[i] = a[4 * i + 3];
    }
    return T;
}
inline void store(const Pose& T, double* a) {
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) a[4 * i + j] = T.R.m[i][j];
        a[4 * i + 3] = T.p.x[i];
    }
    a[12] = a[13] = a[14] = 0;
    a[15] = 1;
}
inline Pose operator*(const Pose& A, const Pose& B) { return {A.R * B.R, A.R * B.p + A.p}; }
inline V3 operator*(const Pose& A, const V3& x) { return A.R * x + A.p; }

M3 identity() { return {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}}; }

M3 rot_exp(const V3& w) {
    const double a = std::sqrt(dot(w, w)), b = std::max(a, 1e-12);
    const double s = a < 1e-6 ? 1 - a * a / 6 : std::sin(a) / b, c = a < 1e-4 ? .5 - a * a / 24 : (1 - std::cos(a)) / (b * b);
    const M3 W = hat(w), W2 = W * W;
    M3 o = identity();
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) o.m[i][j] += s * W.m[i][j] + c * W2.m[i][j];
    return o;
}

V3 rot_log(const M3& R) {
    const auto& m = R.m;
    const double q[4][4] = {{1 + m[0][0] + m[1][1] + m[2][2], m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]},
                            {m[2][1] - m[1][2], 1 + m[0][0] - m[1][1] - m[2][2], m[0][1] + m[1][0], m[0][2] + m[2][0]},
                            {m[0][2] - m[2][0], m[0][1] + m[1][0], 1 - m[0][0] + m[1][1] - m[2][2], m[1][2] + m[2][1]},
                            {m[1][0] - m[0][1], m[0][2] + m[2][0], m[1][2] + m[2][1], 1 - m[0][0] - m[1][1] + m[2][2]}};
    int k = 0;
    for (int i = 1; i < 4; ++i)
        if (q[i][i] > q[k][k]) k = i;
    const double n = std::sqrt(q[k][0] * q[k][0] + q[k][1] * q[k][1] + q[k][2] * q[k][2] + q[k][3] * q[k][3]), g = (q[k][0] < 0 ? -1 : 1) / n;
    const double w = q[k][0] * g;
    V3 v{{q[k][1] * g, q[k][2] * g, q[k][3] * g}};
    const double s = std::sqrt(dot(v, v)), f = s < 1e-9 ? 2. : 2 * std::atan2(s, w) / std::max(s, 1e-12);
    for (double& x : v.x) x *= f;
    return v;
}

M3 inv_right_jacobian(const V3& e) {
    const double a = std::sqrt(dot(e, e)), s = std::max(a, 1e-5);
    const double c = a < 1e-3 ? 1. / 12 : 1 / (s * s) - (1 + std::cos(s)) / (2 * s * std::max(std::sin(s), 1e-9));
    const M3 W = hat(e), W2 = W * W;
    M3 o = identity();
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) o.m[i][j] += .5 * W.m[i][j] + c * W2.m[i][j];
    return o;
}

void rho(double s, int kind, double scale, double& value, double& weight) {
    const double c2 = scale * scale;
    if (kind == 0) value = s, weight = 1;
    else if (kind == 1) {
        const double root = std::sqrt(std::max(s, 1e-300));
        value = s <= c2 ? s : 2 * scale * root - c2;
        weight = s <= c2 ? 1 : scale / root;
    } else {
        const double f = c2 / (c2 + s);
        value = s * f;
        weight = f * f;
    }
}

// In place: A = L L', then solve for m right-hand sides (row-major n x m). False where A is not positive definite.
bool cholesky(std::vector<double>& A, int n) {
    for (int j = 0; j < n; ++j) {
        double d = A[j * n + j];
        for (int k = 0; k < j; ++k) d -= A[j * n + k] * A[j * n + k];
        if (!(d > 0)) return false;
        A[j * n + j] = d = std::sqrt(d);
        for (int i = j + 1; i < n; ++i) {
            double s = A[i * n + j];
            for (int k = 0; k < j; ++k) s -= A[i * n + k] * A[j * n + k];
            A[i * n + j] = s / d;
        }
    }
    return true;
}
void substitute(const std::vector<double>& L, int n, double* b, int m) {
    for (int i = 0; i < n; ++i) {
        for (int k = 0; k < i; ++k)
            for (int c = 0; c < m; ++c) b[i * m + c] -= L[i * n + k] * b[k * m + c];
        for (int c = 0; c < m; ++c) b[i * m + c] /= L[i * n + i];
    }
    for (int i = n - 1; i >= 0; --i) {
        for (int k = i + 1; k < n; ++k)
            for (int c = 0; c < m; ++c) b[i * m + c] -= L[k * n + i] * b[k * m + c];
        for (int c = 0; c < m; ++c) b[i * m + c] /= L[i * n + i];
    }
}

struct Problem {
    int n, S, na, no, da, do_, m;
    std::vector<Pose> V, M, prior;
    const int32_t *n_sym, *agent, *obj, *free_a, *free_o, *dim_a, *dim_o;
    const double *center, *points, *L, *K, *prior_w;
    bool reprojection;
    std::vector<double> measured;  // centres (n S 3), or corners in the image (n S 8 2)
};

V3 at(const double* p) { return {{p[0], p[1], p[2]}}; }

// The residual (6 or 16), and its derivatives (m x 6, row-major) where they are wanted.
double residual(const Problem& p, int k, const Pose& A, const Pose& X, double* r, double* Ja, double* Jo) {
    const Pose AX = A * X, T = p.V[k] * AX;
    double best = 0, trial[16];
    V3 e{};
    if (!p.reprojection) {
        const double* L = p.L + 36 * k;
        const V3 o = at(p.center + 3 * k), c = T * o;
        for (int s = 0; s < p.n_sym[k]; ++s) {
            const V3 es = rot_log(t(p.M[k * p.S + s].R) * T.R), d = c - at(&p.measured[3 * (k * p.S + s)]);
            double cost = 0;
            for (int i = 0; i < 6; ++i) {
                double v = 0;
                for (int j = 0; j < 3; ++j) v += L[6 * i + j] * d.x[j];
                for (int j = 0; j < 3; ++j) v += L[6 * i + 3 + j] * es.x[j];
                trial[i] = v;
                cost += v * v;
            }
            if (s == 0 || cost < best) best = cost, e = es, std::copy(trial, trial + 6, r);
        }
        if (!Ja) return best;
        const M3 VR = p.V[k].R, Ji = inv_right_jacobian(e), Aq = VR * hat(AX * o), Ar = Ji * t(AX.R), Oq = T.R * hat(o);
        double a[6][6] = {}, b[6][6] = {};
        for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j) {
                a[i][j] = VR.m[i][j], a[i][3 + j] = -Aq.m[i][j], a[3 + i][3 + j] = Ar.m[i][j];
                b[i][j] = T.R.m[i][j], b[i][3 + j] = -Oq.m[i][j], b[3 + i][3 + j] = Ji.m[i][j];
            }
        for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
                double u = 0, v = 0;
                for (int h = 0; h < 6; ++h) u += L[6 * i + h] * a[h][j], v += L[6 * i + h] * b[h][j];
                Ja[6 * i + j] = u, Jo[6 * i + j] = v;
            }
        return best;
    }
    const double f[2] = {p.K[9 * k], p.K[9 * k + 4]}, norm = std::sqrt(8.);
    double uv[16], z[8];
    bool ok[8];
    for (int c = 0; c < 8; ++c) {
        const V3 x = T * at(p.points + 24 * k + 3 * c);
        z[c] = std::max(x.x[2], 1e-2), ok[c] = x.x[2] > 1e-2;
        uv[2 * c] = x.x[0] / z[c], uv[2 * c + 1] = x.x[1] / z[c];
    }
    for (int s = 0; s < p.n_sym[k]; ++s) {
        double cost = 0;
        for (int c = 0; c < 16; ++c) trial[c] = (uv[c] - p.measured[16 * (k * p.S + s) + c]) * f[c & 1] / norm, cost += trial[c] * trial[c];
        if (s == 0 || cost < best) best = cost, std::copy(trial, trial + 16, r);
    }
    if (!Ja) return best;
    for (int c = 0; c < 8; ++c) {
        const V3 x = at(p.points + 24 * k + 3 * c), q = AX * x;
        for (int d = 0; d < 2; ++d) {
            const double g = f[d] / z[c] / norm;
            V3 D{};
            D.x[d] = g;
            D.x[2] = ok[c] ? -g * uv[2 * c + d] : 0;
            const V3 DV = t(p.V[k].R) * D, DR = t(T.R) * D, a = t(hat(q)) * DV, b = t(hat(x)) * DR;
            double *ja = Ja + 6 * (2 * c + d), *jo = Jo + 6 * (2 * c + d);
            for (int j = 0; j < 3; ++j) ja[j] = DV.x[j], ja[3 + j] = -a.x[j], jo[j] = DR.x[j], jo[3 + j] = -b.x[j];
        }
    }
    return best;
}

void prior_residual(const Problem& p, int a, const Pose& A, double* e, double* J) {
    const V3 c = t(A.R) * A.p, c0 = t(p.prior[a].R) * p.prior[a].p, w = rot_log(A.R * t(p.prior[a].R));
    for (int i = 0; i < 3; ++i) e[i] = (c0.x[i] - c.x[i]) * p.prior_w[2 * a], e[3 + i] = w.x[i] * p.prior_w[2 * a + 1];
    if (!J) return;
    const M3 Jl = inv_right_jacobian({{-w.x[0], -w.x[1], -w.x[2]}});
    std::fill(J, J + 36, 0.);
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) J[6 * i + j] = -A.R.m[j][i] * p.prior_w[2 * a], J[6 * (3 + i) + 3 + j] = Jl.m[i][j] * p.prior_w[2 * a + 1];
}

double loss(const Problem& p, const std::vector<Pose>& A, const std::vector<Pose>& X, int kind, double scale) {
    double sum = 0, r[16], v, w, e[6];
    for (int k = 0; k < p.n; ++k) rho(residual(p, k, A[p.agent[k]], X[p.obj[k]], r, nullptr, nullptr), kind, scale, v, w), sum += v;
    for (int a = 0; a < p.na; ++a) {
        if (p.prior_w[2 * a] == 0 && p.prior_w[2 * a + 1] == 0) continue;
        prior_residual(p, a, A[a], e, nullptr);
        for (double x : e) sum += x * x;
    }
    return sum;
}

struct Normal { std::vector<double> Haa, Hoo, W, ga, go; };

void normal_equations(const Problem& p, const std::vector<Pose>& A, const std::vector<Pose>& X, int kind, double scale, Normal& N) {
    const int da = p.da, d = p.do_;
    N.Haa.assign(size_t(p.na) * da * da, 0), N.Hoo.assign(size_t(p.no) * d * d, 0), N.W.assign(size_t(p.na) * p.no * da * d, 0);
    N.ga.assign(size_t(p.na) * da, 0), N.go.assign(size_t(p.no) * d, 0);
    double r[16], Ja[96], Jo[96], v, w;
    for (int k = 0; k < p.n; ++k) {
        const int a = p.agent[k], o = p.obj[k];
        rho(residual(p, k, A[a], X[o], r, Ja, Jo), kind, scale, v, w);
        double *Haa = &N.Haa[size_t(a) * da * da], *Hoo = &N.Hoo[size_t(o) * d * d], *W = &N.W[(size_t(a) * p.no + o) * da * d];
        for (int row = 0; row < p.m; ++row) {
            double ja[6], jo[6];
            for (int i = 0; i < da; ++i) ja[i] = p.free_a[a] ? Ja[6 * row + p.dim_a[i]] : 0;
            for (int i = 0; i < d; ++i) jo[i] = p.free_o[o] ? Jo[6 * row + p.dim_o[i]] : 0;
            for (int i = 0; i < da; ++i) {
                for (int j = 0; j < da; ++j) Haa[i * da + j] += w * ja[i] * ja[j];
                for (int j = 0; j < d; ++j) W[i * d + j] += w * ja[i] * jo[j];
                N.ga[a * da + i] += w * ja[i] * r[row];
            }
            for (int i = 0; i < d; ++i) {
                for (int j = 0; j < d; ++j) Hoo[i * d + j] += w * jo[i] * jo[j];
                N.go[o * d + i] += w * jo[i] * r[row];
            }
        }
    }
    double e[6], J[36];
    for (int a = 0; a < p.na; ++a) {
        if (!p.free_a[a] || (p.prior_w[2 * a] == 0 && p.prior_w[2 * a + 1] == 0)) continue;
        prior_residual(p, a, A[a], e, J);
        for (int row = 0; row < 6; ++row)
            for (int i = 0; i < da; ++i) {
                const double ji = J[6 * row + p.dim_a[i]];
                for (int j = 0; j < da; ++j) N.Haa[(size_t(a) * da + i) * da + j] += ji * J[6 * row + p.dim_a[j]];
                N.ga[a * da + i] += ji * e[row];
            }
    }
}

void damp(double* H, int d, double lam) {
    for (int i = 0; i < d; ++i) H[i * d + i] = H[i * d + i] > 0 ? H[i * d + i] * (1 + lam) + 1e-12 : 1;
}

bool solve_step(const Problem& p, const Normal& N, double lam, std::vector<double>& xa, std::vector<double>& xo) {
    const int da = p.da, d = p.do_, na = p.na, m = na * da;
    std::vector<double> S(size_t(m) * m, 0), b(m), L(d * d), E(size_t(d) * (m + 1)), all(size_t(p.no) * d * (m + 1));
    for (int a = 0; a < na; ++a) {
        std::vector<double> H(&N.Haa[size_t(a) * da * da], &N.Haa[size_t(a) * da * da] + da * da);
        damp(H.data(), da, lam);
        for (int i = 0; i < da; ++i) {
            for (int j = 0; j < da; ++j) S[size_t(a * da + i) * m + a * da + j] = H[i * da + j];
            b[a * da + i] = -N.ga[a * da + i];
        }
    }
    std::vector<int> seen;
    for (int o = 0; o < p.no; ++o) {
        std::copy(&N.Hoo[size_t(o) * d * d], &N.Hoo[size_t(o) * d * d] + d * d, L.begin());
        damp(L.data(), d, lam);
        if (!cholesky(L, d)) return false;
        seen.clear();
        for (int a = 0; a < na; ++a) {
            const double* W = &N.W[(size_t(a) * p.no + o) * da * d];
            if (std::any_of(W, W + da * d, [](double v) { return v != 0; })) seen.push_back(a);
        }
        for (int i = 0; i < d; ++i) {
            for (int a = 0; a < na; ++a)
                for (int j = 0; j < da; ++j) E[i * (m + 1) + a * da + j] = N.W[((size_t(a) * p.no + o) * da + j) * d + i];
            E[i * (m + 1) + m] = N.go[o * d + i];
        }
        substitute(L, d, E.data(), m + 1);
        for (int a : seen)
            for (int i = 0; i < da; ++i) {
                const double* W = &N.W[((size_t(a) * p.no + o) * da + i) * d];
                for (int h = 0; h < d; ++h) {
                    for (int c : seen)
                        for (int j = 0; j < da; ++j) S[size_t(a * da + i) * m + c * da + j] -= W[h] * E[h * (m + 1) + c * da + j];
                    b[a * da + i] += W[h] * E[h * (m + 1) + m];
                }
            }
        std::copy(E.begin(), E.end(), &all[size_t(o) * d * (m + 1)]);
    }
    if (!cholesky(S, m)) return false;
    substitute(S, m, b.data(), 1);
    xa = b;
    xo.assign(size_t(p.no) * d, 0);
    for (int o = 0; o < p.no; ++o)
        for (int i = 0; i < d; ++i) {
            const double* e = &all[(size_t(o) * d + i) * (m + 1)];
            double v = -e[m];
            for (int j = 0; j < m; ++j) v -= e[j] * b[j];
            xo[o * d + i] = v;
        }
    return true;
}

Pose motion(const double* x, const int32_t* dims, int d) {
    double full[6] = {};
    for (int i = 0; i < d; ++i) full[dims[i]] = x[i];
    return {rot_exp({{full[3], full[4], full[5]}}), {{full[0], full[1], full[2]}}};
}

void check_index(const int32_t* x, int64_t n, int64_t top, const char* name) {
    for (int64_t i = 0; i < n; ++i)
        if (x[i] < 0 || x[i] >= top) refuse(std::string(name) + " holds " + std::to_string(x[i]) + ", outside 0.." + std::to_string(top - 1));
}

void refine_scene(py::array A_, py::array X_, py::array V, py::array M, py::array n_sym, py::array agent, py::array obj, py::array center, py::array points, py::array L, py::array K, py::array free_a, py::array free_o,
                  py::array prior, py::array prior_w, py::array dim_a, py::array dim_o, bool reprojection, py::array stages_, int max_iter, double tol, py::array history_, py::array info_) {
    Problem p;
    const int64_t n = agent.size(), na = A_.size() / 16, no = X_.size() / 16, S = n ? M.size() / (16 * n) : 1, ns = stages_.size() / 2;
    if (max_iter < 0) refuse("max_iter must not be negative");
    double *A = output<double>(A_, "A", na * 16), *X = output<double>(X_, "X", no * 16), *history = output<double>(history_, "history", ns * (int64_t(max_iter) + 1));
    int32_t* info = output<int32_t>(info_, "info", 3);
    const double *v = input<double>(V, "V", n * 16), *m = input<double>(M, "M", n * S * 16), *pr = input<double>(prior, "prior", na * 16), *stages = input<double>(stages_, "stages", ns * 2);
    p.n = int(n), p.S = int(S), p.na = int(na), p.no = int(no), p.da = int(dim_a.size()), p.do_ = int(dim_o.size()), p.m = reprojection ? 16 : 6, p.reprojection = reprojection;
    p.n_sym = input<int32_t>(n_sym, "n_sym", n), p.agent = input<int32_t>(agent, "agent", n), p.obj = input<int32_t>(obj, "obj", n);
    p.free_a = input<int32_t>(free_a, "free_a", na), p.free_o = input<int32_t>(free_o, "free_o", no), p.dim_a = input<int32_t>(dim_a, "dim_a", dim_a.size()), p.dim_o = input<int32_t>(dim_o, "dim_o", dim_o.size());
    p.center = input<double>(center, "center", n * 3), p.points = input<double>(points, "points", n * 24), p.L = input<double>(L, "L", n * 36), p.K = input<double>(K, "K", n * 9), p.prior_w = input<double>(prior_w, "prior_w", na * 2);
    if (p.da > 6 || p.do_ > 6) refuse("a pose has six dimensions at most");
    check_index(p.agent, n, na, "agent"), check_index(p.obj, n, no, "obj"), check_index(p.dim_a, p.da, 6, "dim_a"), check_index(p.dim_o, p.do_, 6, "dim_o");
    for (int64_t k = 0; k < n; ++k)
        if (p.n_sym[k] < 1 || p.n_sym[k] > S) refuse("n_sym holds " + std::to_string(p.n_sym[k]) + ", expected 1.." + std::to_string(S));
    py::gil_scoped_release release;
    for (int64_t k = 0; k < n; ++k) p.V.push_back(load(v + 16 * k));
    for (int64_t k = 0; k < n * S; ++k) p.M.push_back(load(m + 16 * k));
    for (int64_t a = 0; a < na; ++a) p.prior.push_back(load(pr + 16 * a));
    p.measured.resize(size_t(n * S) * (reprojection ? 16 : 3));
    for (int64_t k = 0; k < n; ++k)
        for (int64_t s = 0; s < S; ++s) {
            const Pose& T = p.M[size_t(k * S + s)];
            if (!reprojection) {
                const V3 c = T * at(p.center + 3 * k);
                std::copy(c.x, c.x + 3, &p.measured[size_t(k * S + s) * 3]);
            } else
                for (int c = 0; c < 8; ++c) {
                    const V3 x = T * at(p.points + 24 * k + 3 * c);
                    const double z = std::max(x.x[2], 1e-2);
                    p.measured[size_t(k * S + s) * 16 + 2 * c] = x.x[0] / z, p.measured[size_t(k * S + s) * 16 + 2 * c + 1] = x.x[1] / z;
                }
        }
    std::vector<Pose> a, x;
    for (int64_t i = 0; i < na; ++i) a.push_back(load(A + 16 * i));
    for (int64_t i = 0; i < no; ++i) x.push_back(load(X + 16 * i));
    std::vector<Pose> b(a), y(x);
    std::vector<double> xa, xo;
    Normal N;
    int n_iter = 0, why = 0, n_hist = 0;
    for (int64_t s = 0; s < ns; ++s) {
        const int kind = int(stages[2 * s]);
        const double scale = stages[2 * s + 1];
        double lam = 1e-4, now = loss(p, a, x, kind, scale);
        history[n_hist++] = now;
        bool fresh = true;
        why = 2;
        for (int it = 0; it < max_iter; ++it) {
            ++n_iter;
            if (fresh) normal_equations(p, a, x, kind, scale, N), fresh = false;
            double next = INFINITY;
            if (solve_step(p, N, lam, xa, xo)) {
                for (int i = 0; i < p.na; ++i) b[i] = motion(&xa[size_t(i) * p.da], p.dim_a, p.da) * a[i];
                for (int i = 0; i < p.no; ++i) y[i] = x[i] * motion(&xo[size_t(i) * p.do_], p.dim_o, p.do_);
                next = loss(p, b, y, kind, scale);
            }
            if (next < now) {
                const double gain = now - next;
                std::swap(a, b), std::swap(x, y);
                now = next, lam = std::max(lam / 9, 1e-9), fresh = true, history[n_hist++] = now;
                if (gain <= tol * now + 1e-14) { why = 0; break; }
            } else {
                lam *= 11;
                if (lam > 1e8) { why = std::abs(next - now) <= 1e-6 * now + 1e-12 ? 0 : 1; break; }
            }
        }
    }
    for (int64_t i = 0; i < na; ++i) store(a[size_t(i)], A + 16 * i);
    for (int64_t i = 0; i < no; ++i) store(x[size_t(i)], X + 16 * i);
    info[0] = n_iter, info[1] = why, info[2] = n_hist;
}

// Evidence of hypotheses by the centres that they bring together; each box counts once at most, on either side.
void score_poses(py::array T_, py::array xa_, py::array xb_, py::array base_, py::array va_, py::array vb_, py::array seed_var_, py::array rot_var_, py::array seed_, py::array out_) {
    const int64_t h = seed_.size(), n = va_.size(), m = vb_.size();
    const double *T = input<double>(T_, "T", h * 16), *xa = input<double>(xa_, "xa", n * 3), *xb = input<double>(xb_, "xb", m * 3), *base = input<double>(base_, "base", n * m), *va = input<double>(va_, "va", n), *vb = input<double>(vb_, "vb", m),
                 *sv = input<double>(seed_var_, "seed_var", h), *rv = input<double>(rot_var_, "rot_var", h);
    const int32_t* seed = input<int32_t>(seed_, "seed", h);
    double* out = output<double>(out_, "out", h);
    check_index(seed, h, std::max<int64_t>(n, 1), "seed");
    py::gil_scoped_release release;
    std::vector<double> top(static_cast<size_t>(m));
    std::vector<V3> y(static_cast<size_t>(m));
    for (int64_t k = 0; k < h; ++k) {
        const Pose P = load(T + 16 * k);
        for (int64_t j = 0; j < m; ++j) y[size_t(j)] = P * at(xb + 3 * j);
        std::fill(top.begin(), top.end(), 0.);
        double left = 0, right = 0;
        for (int64_t i = 0; i < n; ++i) {
            const V3 x = at(xa + 3 * i), l = x - at(xa + 3 * seed[k]);
            const double slack = va[i] + sv[k] + rv[k] * dot(l, l);
            double best = 0;
            for (int64_t j = 0; j < m; ++j) {
                const double var = slack + vb[j], b = base[i * m + j];
                const V3 d = x - y[size_t(j)];
                const double q = .5 * dot(d, d);
                if (q > 30 * var) continue;  // no evidence is worth that distance
                const double gain = b - std::log(var) - q / var;
                if (gain > best) best = gain;
                if (gain > top[size_t(j)]) top[size_t(j)] = gain;
            }
            left += best;
        }
        for (double v : top) right += v;
        out[k] = std::min(left, right);
    }
}

}  // namespace

void bind_alignment(py::module_& m) {
    using namespace py::literals;
    m.def("refine_scene", &refine_scene, "Object-level bundle adjustment; A (world to agent) and X (object to world) are changed in place", "A"_a, "X"_a, "V"_a, "M"_a, "n_sym"_a, "agent"_a, "obj"_a, "center"_a, "points"_a, "L"_a, "K"_a,
          "free_a"_a, "free_o"_a, "prior"_a, "prior_w"_a, "dim_a"_a, "dim_o"_a, "reprojection"_a, "stages"_a, "max_iter"_a, "tol"_a, "history"_a, "info"_a);
    m.def("score_poses", &score_poses, "Evidence of relative poses by the centres of boxes that they bring together", "T"_a, "xa"_a, "xb"_a, "base"_a, "va"_a, "vb"_a, "seed_var"_a, "rot_var"_a, "seed"_a, "out"_a);
}
