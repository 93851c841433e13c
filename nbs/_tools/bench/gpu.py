"""The pooling kernels on a GPU, beside plain PyTorch and the published CUDA scheme, in one run

    python nbs/_tools/bench/gpu.py            on a machine with a GPU (some minutes); writes results/bench_gpu.json
    python nbs/_tools/bench/gpu.py --sweep    also other tile sizes of our kernels, to see whether the chosen ones are good
    python nbs/_tools/bench/gpu.py --check    every way against float64 on a small size; without a GPU in Triton's interpreter

What is timed: `gpu_us` is the time between two CUDA events while the GPU is kept busy until the host has queued the whole call, so launches
cost nothing and what is left is the GPU's work (a way that waits for the GPU in the middle shows its gap); `call_us` is the wall time of a
call in a row of calls, which is what a caller sees. All ways take turns in every round; medians are reported. The L2 cache is overwritten
before each `gpu_us`. Every way is compared with a float64 sum before it is timed. Half-precision inputs: our kernels read them as they are;
the others, float32 only as published, convert them inside the timed call.

Exit status 2: no GPU, or no Triton.
"""
import argparse, json, os, statistics, sys, time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
GPU = torch.cuda.is_available()
if not GPU: os.environ['TRITON_INTERPRET'] = '1'   # for --check; chosen before Triton is imported
try: import triton, triton.language as tl
except ImportError: sys.exit(print("gpu.py needs Triton, which CUDA builds of PyTorch bring: pip install triton", file=sys.stderr) or 2)

from bev_reid import bev_pool as op, bev_pool_gpu as ours
from bev_reid.bev_pool import _pool_cumsum, _pool_torch, bev_pool, make_plan, plan_from_cells
from bev_reid.geometry import BEVGrid, frustum_geometry, make_frustum, rot_z

DEVICE = 'cuda' if GPU else 'cpu'
SIZES = {'LSS: 6 cameras, 41 x 8 x 22, 64 channels, 200 x 200 cells': (BEVGrid(), (128, 352), (8, 22), 64, .22),
         'BEVDet-like: 6 cameras, 59 x 16 x 44, 80 channels, 128 x 128 cells': (BEVGrid((-51.2, 51.2, .8), (-51.2, 51.2, .8), (-10, 10, 20), (1, 60, 1)), (256, 704), (16, 44), 80, .44)}

# ---- the sizes ----

def rig_geometry(grid, size, feat, scale, batch):
    "A nuScenes-like rig of six cameras, a little different in each sample"
    yaw = torch.deg2rad(torch.tensor([55., 0, -55, 110, 180, -110])) + .01*torch.arange(batch).view(-1, 1)
    cam2ego = torch.eye(4).repeat(batch, 6, 1, 1)
    cam2ego[..., :3, :3] = rot_z(yaw) @ torch.tensor([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])
    cam2ego[..., :3, 3] = torch.stack([1+.7*yaw.cos(), .5*yaw.sin(), torch.full_like(yaw, 1.5)], -1)
    intrins = torch.tensor([[1266., 0, 800], [0, 1266, 450], [0, 0, 1]]).repeat(batch, 6, 1, 1)
    intrins[:, 4, 0, 0] = intrins[:, 4, 1, 1] = 809
    aug = torch.diag(torch.tensor([scale, scale, 1, 1])); aug[1, 3] = -.7*(900*scale-size[0])
    return frustum_geometry(make_frustum(grid, size, feat), intrins, cam2ego, aug.expand(batch, 6, 4, 4))

class Case:
    "Inputs on the device, and what the other ways keep beside the plan"
    def __init__(self, plan, c, dtype, seed=0):
        g = torch.Generator().manual_seed(seed)
        b, n, d, h, w = plan.sizes
        self.plan, self.c, self.dtype = plan.to(DEVICE), c, dtype
        self.depth = torch.randn(plan.sizes, generator=g).softmax(2).to(DEVICE, dtype)
        self.feats = torch.randn(b*n, c, h, w, generator=g).to(DEVICE, dtype).to(memory_format=torch.channels_last).unflatten(0, (b, n))
        self.grad = torch.randn(b, plan.nx[2]*c, *plan.nx[:2], generator=g).to(DEVICE).to(memory_format=torch.channels_last)
        self.filled = self.plan.interval_cells
        self.starts, self.lengths = self.plan.indptr[:-1].contiguous(), self.plan.indptr.diff()
        self.trash = torch.where(self.plan.cells < 0, self.plan.n_cells, self.plan.cells).long()
        self.point_cells = self.plan.cells[self.plan.depth_idx.long()].contiguous()

    def floats(self, *tensors): return [t.float() for t in tensors]
    def to_bev(self, rows): return rows.view(self.depth.shape[0], *self.plan.nx[:2], self.plan.nx[2]*self.c).permute(0, 3, 1, 2)
    def rows(self, feats): return feats.permute(0, 1, 3, 4, 2).flatten(0, 3)

    def least_bytes(self, backward):
        "Inputs and plan read once, results written once; what any way must move"
        item, points = self.depth.element_size(), self.depth.numel()
        read = item*(points+self.feats.numel()) + 8*self.plan.n_kept + 8*len(self.filled)
        out = 4*self.plan.n_cells*self.c
        if not backward: return read+out
        return 2*item*(points+self.feats.numel()) + item*(points+self.feats.numel()) + 8*self.plan.n_kept + 8*len(self.filled) + 4*points + 2*out

# ---- the published CUDA scheme, restated from its description: one thread for each channel of each non-empty cell ----

@triton.jit
def channel_threads(weight, feats, depth_idx, feat_idx, starts, lengths, cells, out, n, C, WEIGHTED:tl.constexpr, T:tl.constexpr):
    i = tl.program_id(0)*T + tl.arange(0, T)
    at, c = i//C, i%C
    real = at < n
    start, length = tl.load(starts+at, mask=real, other=0), tl.load(lengths+at, mask=real, other=0)
    acc = tl.zeros((T,), tl.float32)
    for k in range(0, tl.max(length, 0)):
        on = k < length
        if WEIGHTED: row, w = tl.load(feat_idx+start+k, mask=on, other=0), tl.load(weight+tl.load(depth_idx+start+k, mask=on, other=0), mask=on, other=0)
        else: row, w = start+k, 1.
        acc += w*tl.load(feats+row.to(tl.int64)*C+c, mask=on, other=0)
    tl.store(out+tl.load(cells+at, mask=real, other=0).to(tl.int64)*C+c, acc, mask=real)

@triton.jit
def pixel_threads(grad, depth, feats, depth_idx, feat_idx, point_cells, starts, lengths, grad_depth, grad_feats, n, C, T:tl.constexpr):
    i = tl.program_id(0)*T + tl.arange(0, T)
    start, length = tl.load(starts+i, mask=i < n, other=0), tl.load(lengths+i, mask=i < n, other=0)
    longest, pixel = tl.max(length, 0), tl.load(feat_idx+start, mask=i < n, other=0).to(tl.int64)
    for k in range(0, longest):
        on = k < length
        cell, dot = tl.load(point_cells+start+k, mask=on, other=0).to(tl.int64), tl.zeros((T,), tl.float32)
        for c in range(0, C): dot += tl.load(grad+cell*C+c, mask=on, other=0)*tl.load(feats+pixel*C+c, mask=on, other=0)
        tl.store(grad_depth+tl.load(depth_idx+start+k, mask=on, other=0), dot, mask=on)
    for c in range(0, C):
        acc = tl.zeros((T,), tl.float32)
        for k in range(0, longest):
            on = k < length
            cell = tl.load(point_cells+start+k, mask=on, other=0).to(tl.int64)
            acc += tl.load(grad+cell*C+c, mask=on, other=0)*tl.load(depth+tl.load(depth_idx+start+k, mask=on, other=0), mask=on, other=0)
        tl.store(grad_feats+pixel*C+c, acc, mask=i < n)

# The same two in CUDA C, where each thread has its own loop: built where PyTorch can call NVRTC
CUDA = r'''
extern "C" __global__ void channel_threads(const float* weight, const float* feats, const int* depth_idx, const int* feat_idx, const int* starts,
                                           const int* lengths, const int* cells, float* out, int n, int c_all) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const int at = i / c_all, c = i % c_all;
    if (at >= n) return;
    float sum = 0;
    for (int k = starts[at]; k < starts[at] + lengths[at]; ++k) sum += weight[depth_idx[k]] * feats[(long long)feat_idx[k] * c_all + c];
    out[(long long)cells[at] * c_all + c] = sum;
}
extern "C" __global__ void pixel_threads(const float* grad, const float* depth, const float* feats, const int* depth_idx, const int* feat_idx,
                                         const int* point_cells, const int* starts, const int* lengths, float* grad_depth, float* grad_feats,
                                         int n, int c_all) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int first = starts[i], last = first + lengths[i];
    const float* f = feats + (long long)feat_idx[first] * c_all;
    for (int k = first; k < last; ++k) {
        const float* g = grad + (long long)point_cells[k] * c_all;
        float dot = 0;
        for (int c = 0; c < c_all; ++c) dot += g[c] * f[c];
        grad_depth[depth_idx[k]] = dot;
    }
    for (int c = 0; c < c_all; ++c) {
        float sum = 0;
        for (int k = first; k < last; ++k) sum += grad[(long long)point_cells[k] * c_all + c] * depth[depth_idx[k]];
        grad_feats[(long long)feat_idx[first] * c_all + c] = sum;
    }
}'''

class Published:
    "Launches the two kernels, from CUDA C where that can be built, else from Triton with the same mapping of threads"
    def __init__(self):
        self.built, self.language = None, 'Triton, same mapping of threads'
        if not GPU: return
        try:
            self.built = [torch.cuda._compile_kernel(CUDA, k) for k in ('channel_threads', 'pixel_threads')]
            case = Case(plan_from_cells(torch.arange(12).view(1, 1, 3, 2, 2)-1, (3, 4, 1)), 4, torch.float32)
            rows, grad = case.rows(case.feats), case.grad.permute(0, 2, 3, 1).contiguous()
            bev, gd, gx = self.pool(case, case.depth, rows), *self.backward(case, grad, case.depth, rows, self.by_pixel(case))
            want = truth(case)
            if not error((bev, gd, gx), (*want[:2], case.rows(want[2]))) < 1e-5: raise RuntimeError('its results are wrong')
            self.language = 'CUDA C (NVRTC)'
        except Exception as e:
            self.built = None
            print(f'CUDA C cannot be built here ({type(e).__name__}: {str(e)[:200]}): the published scheme runs in Triton', file=sys.stderr)

    def pool(self, case, depth, rows):
        "BEVPoolv2: weight and row are fetched for each point"
        p = case.plan
        out = rows.new_zeros(p.n_cells, case.c)
        args = depth, rows, p.depth_idx, p.feat_idx, case.starts, case.lengths, case.filled, out, len(case.filled), case.c
        n = len(case.filled)*case.c
        if n and self.built: self.built[0](grid=(triton.cdiv(n, 256), 1, 1), block=(256, 1, 1), args=list(args))
        elif n: channel_threads[(triton.cdiv(n, 256),)](*args, WEIGHTED=True, T=256)
        return case.to_bev(out)

    def pool_lifted(self, case, depth, rows):
        "bevfusion: the lifted volume is made, its rows are sorted by cell (the order is given here), then summed"
        p = case.plan
        lifted = (depth[..., None]*rows.view(*depth.shape[:2], 1, *depth.shape[3:], case.c)).flatten(0, 4)[p.depth_idx]
        out, n = rows.new_zeros(p.n_cells, case.c), len(case.filled)*case.c
        if n: channel_threads[(triton.cdiv(n, 256),)](depth, lifted, p.depth_idx, p.feat_idx, case.starts, case.lengths, case.filled, out, len(case.filled), case.c, WEIGHTED=False, T=256)
        return case.to_bev(out)

    def by_pixel(self, case):
        "Points in the order of their pixels, which BEVPoolv2 finds anew in each backward call"
        p = case.plan
        order = p.feat_idx.argsort(stable=True)
        pixels, lengths = p.feat_idx[order].unique_consecutive(return_counts=True)
        return p.depth_idx[order], p.feat_idx[order], case.point_cells[order], (lengths.cumsum(0)-lengths).int(), lengths.int()

    def backward(self, case, grad, depth, rows, order):
        depth_idx, feat_idx, cells, starts, lengths = order
        grad_depth, grad_rows = torch.zeros_like(depth), torch.zeros_like(rows)
        args = grad, depth, rows, depth_idx, feat_idx, cells, starts, lengths, grad_depth, grad_rows, len(starts), case.c
        if len(starts) and self.built: self.built[1](grid=(triton.cdiv(len(starts), 64), 1, 1), block=(64, 1, 1), args=list(args))
        elif len(starts): pixel_threads[(triton.cdiv(len(starts), 64),)](*args, T=64)
        return grad_depth, grad_rows

# ---- the ways: each returns the map, or the map and both gradients ----

def index_add(case, depth, feats):
    "Lift, then add each row to its cell, one more cell taking what falls outside"
    lifted = (depth[..., None]*feats.permute(0, 1, 3, 4, 2)[:, :, None]).flatten(0, 4)
    return case.to_bev(lifted.new_zeros(case.plan.n_cells+1, case.c).index_add(0, case.trash, lifted)[:-1])

def forward_ways(case, published):
    p = case.plan
    idx = p.depth_idx, p.feat_idx, p.indptr, p.interval_cells
    def f(way): return lambda: way(*case.floats(case.depth, case.feats))
    return {
        'ours': lambda: ours.pool_triton(case.depth, case.feats, *idx, p.nx),
        'ours, as the op': lambda: bev_pool(case.depth, case.feats, p),
        'BEVPoolv2 scheme, a thread per channel and cell': f(lambda d, x: published.pool(case, d, case.rows(x))),
        'bevfusion scheme: lift, then a thread per channel and cell': f(lambda d, x: published.pool_lifted(case, d, case.rows(x))),
        'embedding_bag on the plan': f(lambda d, x: _pool_torch(d, x, *idx, p.nx)),
        'lift and index_add': f(lambda d, x: index_add(case, d, x)),
        'lift and cumulative sum (LSS)': f(lambda d, x: _pool_cumsum(d, x, *idx, p.nx))}

def both_ways(case, published):
    p = case.plan
    idx = p.depth_idx, p.feat_idx, p.indptr, p.interval_cells
    leaves = [t.detach().requires_grad_() for t in (case.depth, case.feats)]
    def auto(way, cast=True):
        def run():
            bev = way(*(case.floats(*leaves) if cast else leaves))
            return bev, *torch.autograd.grad(bev, leaves, case.grad)
        return run
    def raw():
        bev = ours.pool_triton(case.depth, case.feats, *idx, p.nx)
        return bev, *ours.pool_triton_backward(case.grad, case.depth, case.feats, p.cells, p.nx)
    def v2(order):
        def run():
            d, x = case.floats(case.depth, case.feats)
            rows, g = case.rows(x), case.grad.permute(0, 2, 3, 1).contiguous()
            bev = published.pool(case, d, rows)
            gd, gx = published.backward(case, g, d, rows, order() if callable(order) else order)
            b, n, _, h, w = case.depth.shape
            return bev, gd.to(case.dtype), gx.to(case.dtype).view(b, n, h, w, case.c).permute(0, 1, 4, 2, 3)
        return run
    return {
        'ours': raw,
        'ours, as the op, through autograd': auto(lambda d, x: bev_pool(d, x, p), cast=False),
        'BEVPoolv2 scheme, sorted in each backward': v2(lambda: published.by_pixel(case)),
        'BEVPoolv2 scheme, sorted beforehand': v2(published.by_pixel(case)),
        'embedding_bag on the plan': auto(lambda d, x: _pool_torch(d, x, *idx, p.nx)),
        'lift and index_add': auto(lambda d, x: index_add(case, d, x)),
        'lift and cumulative sum (LSS)': auto(lambda d, x: _pool_cumsum(d, x, *idx, p.nx))}

# ---- are they right? ----

def truth(case):
    "Map and gradients in float64"
    d, x = (t.double().requires_grad_() for t in (case.depth, case.feats))
    bev = index_add(case, d, x)
    return bev.detach(), *torch.autograd.grad(bev, (d, x), case.grad.double())

def error(got, want):
    "Largest of |got - want| / |want| over the map and the gradients that there are"
    pairs = zip((got,) if torch.is_tensor(got) else got, want)
    return max(float((g.detach().double()-w).norm()/w.norm().clamp(min=1e-30)) for g, w in pairs)

def bound(name, dtype, backward):
    if 'cumulative' in name: return 1e-2
    return 1e-5 if dtype == torch.float32 or not backward else 2*torch.finfo(dtype).eps          # gradients come back in the inputs' dtype

def tried(ways, case, want, backward):
    "Error of each way; a way that cannot run here, or is wrong, is left out and named"
    errors = {}
    for name, way in ways.items():
        try: e = error(way(), want)
        except Exception as x: print(f'  left out: {name}: {type(x).__name__}: {str(x)[:200]}', file=sys.stderr); continue
        if not e < bound(name, case.dtype, backward):
            if name == 'ours': sys.exit(f'ours is wrong: error {e:.2g}')
            print(f'  left out: {name}: error {e:.2g}', file=sys.stderr); continue
        errors[name] = e
    return errors

# ---- time ----

class Clock:
    def __init__(self):
        l2 = getattr(torch.cuda.get_device_properties(0), 'L2_cache_size', 0) or 50_000_000
        self.flush = torch.empty(4*l2, dtype=torch.uint8, device='cuda')
        self.cycles = 3_000_000                                                            # about 2 ms: longer than the host needs to queue a call

    def gpu(self, f):
        "Seconds of GPU work of one call, caches cold, launches hidden"
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.fill_(1)
        torch.cuda._sleep(self.cycles)
        a.record(); f(); b.record(); torch.cuda.synchronize()
        return a.elapsed_time(b)/1e3

    def call(self, f, n=20):
        "Seconds of one of n calls in a row"
        torch.cuda.synchronize(); t = time.perf_counter()
        for _ in range(n): f()
        torch.cuda.synchronize()
        return (time.perf_counter()-t)/n

    def interleave(self, ways, rounds=30):
        times = {n: ([], []) for n in ways}
        for f in ways.values():
            for _ in range(3): f()
        for r in range(rounds):
            for name, f in ways.items():
                times[name][0].append(self.gpu(f))
                if r % 5 == 0: times[name][1].append(self.call(f))
        return {n: dict(gpu_us=1e6*statistics.median(g), gpu_us_spread=[1e6*v for v in statistics.quantiles(g, n=10)[::8]], call_us=1e6*statistics.median(c)) for n, (g, c) in times.items()}

def copy_bandwidth(clock, rounds=20):
    "Bytes per second, read and written, of a copy of 1 GB"
    a = torch.randint(0, 255, (10**9,), dtype=torch.uint8, device='cuda'); b = torch.empty_like(a)
    return 2*a.numel()/statistics.median(clock.gpu(lambda: b.copy_(a)) for _ in range(rounds))

def peak_bytes(f):
    "Memory of one call above what was there, its results included"
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
    kept = f(); torch.cuda.synchronize(); del kept
    return torch.cuda.max_memory_allocated()-before

def measure(clock, published, copy, say):
    rows = []
    for title, (grid, size, feat, c, scale) in SIZES.items():
        for batch in (1, 4):
            plan = make_plan(rig_geometry(grid, size, feat, scale, batch), grid, backend='torch')
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                case = Case(plan, c, dtype)
                want = truth(case)
                for job, make in (('forward', forward_ways), ('forward and backward', both_ways)):
                    ways, backward = make(case, published), job != 'forward'
                    errors = tried(ways, case, want, backward)
                    times = clock.interleave({n: ways[n] for n in errors})
                    least = case.least_bytes(backward)
                    for n, t in times.items():
                        bandwidth = least/t['gpu_us']*1e6
                        t.update(error=errors[n], peak_mb=peak_bytes(ways[n])/1e6, gb_per_s=bandwidth/1e9, share_of_copy=bandwidth/copy, times_ours=t['gpu_us']/times['ours']['gpu_us'])
                    rows.append(dict(case=title, batch=batch, dtype=str(dtype)[6:], job=job, least_mb=least/1e6, points=plan.n_kept, gathered_mb=plan.n_kept*c*case.depth.element_size()/1e6, ways=times))
                    say(rows[-1])
                del case, want, ways
                torch.cuda.empty_cache()
    return rows

def show(row):
    print(f"\n{row['case']}, batch {row['batch']}, {row['dtype']}, {row['job']}: {row['least_mb']:.1f} MB at least")
    for n, t in row['ways'].items():
        print(f"  {n:60s}{t['gpu_us']:9.1f} µs on the GPU {t['call_us']:9.1f} µs a call {t['times_ours']:7.2f} x  {t['gb_per_s']:6.0f} GB/s = {t['share_of_copy']:4.0%} of a copy  {t['peak_mb']:7.1f} MB", flush=True)

def sweep(clock):
    "Time of our two kernels for other tile sizes; the choice itself stays one of sizes alone"
    out = []
    for title, (grid, size, feat, c, scale) in SIZES.items():
        for batch in (1, 4):
            case = Case(make_plan(rig_geometry(grid, size, feat, scale, batch), grid, backend='torch'), c, torch.float32)
            p, k = case.plan, ours._pow2(c)
            fwd = [dict(CELLS=g, POINTS=u, STAGES=s, num_warps=w) for s in (1, 3) for g in (1, 2, 4, 8) for u in (4, 8, 16, 32) for w in (1, 2, 4, 8) if 256 <= g*u*k//w <= 1024]
            bwd = [dict(PIXELS=q, DEPTHS=d, STAGES=s, num_warps=w) for s in (1, 3) for q in (1, 2, 4, 8) for d in (2, 4, 8, 16) for w in (1, 2, 4) if 256 <= q*d*k//w <= 1024]
            for job, options, chosen, run in (('forward', fwd, ours._forward_blocks(c, p.n_kept, len(p.interval_cells)), lambda **o: ours.pool_triton(case.depth, case.feats, p.depth_idx, p.feat_idx, p.indptr, p.interval_cells, p.nx, **o)),
                                              ('backward', bwd, ours._backward_blocks(c), lambda **o: ours.pool_triton_backward(case.grad, case.depth, case.feats, p.cells, p.nx, **o))):
                ways = {json.dumps(o): (lambda o=o: run(**o)) for o in [{n: v for n, v in chosen.items() if n != 'CHANNELS'}, *options]}
                times = clock.interleave(ways, rounds=10)
                ranked = sorted(((t['gpu_us'], n) for n, t in times.items()))
                mine = times[next(iter(ways))]['gpu_us']
                out.append(dict(case=title, batch=batch, job=job, chosen=chosen, chosen_us=mine, best=[dict(us=t, **json.loads(n)) for t, n in ranked[:5]]))
                print(f'{title}, batch {batch}, {job}: chosen {mine:.1f} µs; best', *(f'{t:.1f} µs {n}' for t, n in ranked[:3]), sep='\n    ', flush=True)
    return out

def random_plan(generator=None):
    cells = torch.randint(-4, 30, (2, 2, 3, 2, 3), generator=generator)
    return plan_from_cells(torch.where(cells < 0, -1, cells+30*torch.arange(2).view(2, 1, 1, 1, 1)), (3, 5, 2))

def check():
    "Every way on a small size; returns whether all agree with float64"
    published, fine = Published(), True
    for c, dtype in ((12, torch.float32), (5, torch.bfloat16), (8, torch.float16)):
        g = torch.Generator().manual_seed(c)
        case = Case(random_plan(g), c, dtype)
        want = truth(case)
        for job, make in (('forward', forward_ways), ('forward and backward', both_ways)):
            ways, backward = make(case, published), job != 'forward'
            errors = tried(ways, case, want, backward)
            fine &= len(errors) == len(ways)
            print(f'{c} channels, {str(dtype)[6:]}, {job}: {len(errors)} of {len(ways)} ways agree, largest error {max(errors.values()):.1g}')
            assert case.least_bytes(backward) > 0
    return fine

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true'); p.add_argument('--sweep', action='store_true')
    p.add_argument('--out', type=Path, default=ROOT/'results'/'bench_gpu.json')
    a = p.parse_args()
    if a.check: sys.exit(0 if check() else 1)
    if not GPU: sys.exit(print('no GPU that PyTorch can use was found on this machine: nothing was measured. Run this where there is one; --check compares the results of all ways without one', file=sys.stderr) or 2)
    if not check(): print('some ways do not agree on the small size: see above', file=sys.stderr)
    clock, published = Clock(), Published()
    copy, gpu = copy_bandwidth(clock), torch.cuda.get_device_properties(0)
    print(f'{gpu.name}: a copy moves {copy/1e9:.0f} GB/s; published scheme in {published.language}', flush=True)
    out = dict(device=dict(name=gpu.name, multiprocessors=gpu.multi_processor_count, memory_gb=round(gpu.total_memory/1e9), l2_mb=round(len(clock.flush)/4e6), capability=f'{gpu.major}.{gpu.minor}'),
               torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda, copy_gb_per_s=copy/1e9, published=published.language, l2='overwritten before each gpu_us', rows=measure(clock, published, copy, show))
    if a.sweep: out['sweep'] = sweep(clock)
    part = a.out.with_suffix('.part'); a.out.parent.mkdir(exist_ok=True, parents=True)
    part.write_text(json.dumps(out, indent=1)+'\n'); os.replace(part, a.out)
    print(f'wrote {a.out}')

if __name__ == '__main__': main()
