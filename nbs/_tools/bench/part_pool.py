"""Pooling: the kernel with its buffers reused, the op as users call it, the plan, memory, bandwidth

Against the published way (lifted volume, ranks, argsort, cumulative sum; restated here from its formulas) and what PyTorch offers.
"""
import torch
import torch.nn.functional as F

from bev_reid import bev_pool as pooling
from bev_reid.bev_pool import bev_pool, make_plan
from bev_reid.geometry import BEVGrid, frustum_geometry, make_frustum, rot_z
from timing import interleave, peak_mb, row

SIZES = dict(
    lss=dict(title='LSS size (6 cameras, 41 depths, 8 x 22, 64 channels, 200 x 200 cells)', final=(128, 352), feat=(8, 22), c=64, grid=BEVGrid()),
    bevdet=dict(title='BEVDet-like size (6 cameras, 59 depths, 16 x 44, 80 channels, 128 x 128 cells)', final=(256, 704), feat=(16, 44), c=80,
                grid=BEVGrid(xbound=(-51.2, 51.2, .8), ybound=(-51.2, 51.2, .8), dbound=(1., 60., 1.))),
    small=dict(title='small size (6 cameras, 41 depths, 8 x 22, 64 channels, 100 x 100 cells)', final=(128, 352), feat=(8, 22), c=64,
               grid=BEVGrid(xbound=(-50., 50., 1.), ybound=(-50., 50., 1.))))
KERNEL, OP, COPY = 'ours, the kernel', 'ours, the op', 'one pass at copy bandwidth'
PUBLISHED, INDEX_ADD, BAG = 'published: lift, argsort, cumulative sum', 'lift + index_add_ on precomputed cells', 'embedding_bag on a cached plan'

def rig(b, final):
    "Six cameras as on a nuScenes car: intrinsics of the 1600 x 900 image, poses, and the matrix of the validation crop"
    g = torch.Generator().manual_seed(0)
    yaw = torch.tensor([55., 0, -55, 110, 180, -110]).deg2rad()+.02*torch.randn(6, generator=g)
    axes = torch.tensor([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])                       # camera x right, y down, z forward -> ego
    f = torch.tensor([1266., 1266, 1266, 1266, 809, 1266])
    cam2ego, intrins, img_aug = (torch.eye(n).repeat(b, 6, 1, 1) for n in (4, 3, 4))
    cam2ego[..., :3, :3] = rot_z(yaw) @ axes @ rot_z(.01*torch.randn(6, generator=g))
    cam2ego[..., :3, 3] = torch.stack([1.5*yaw.cos(), .5*yaw.sin(), torch.full((6,), 1.5)], -1)
    intrins[..., 0, 0] = intrins[..., 1, 1] = f
    intrins[..., 0, 2], intrins[..., 1, 2] = 816, 491
    s = max(final[0]/900, final[1]/1600)
    img_aug[..., 0, 0] = img_aug[..., 1, 1] = s
    img_aug[..., 1, 3] = -(.89*900*s-final[0])-.11*0                                # the bottom of the picture is kept but for 11 %
    return intrins, cam2ego, img_aug

def case(size, b):
    s = SIZES[size]
    g = torch.Generator().manual_seed(1)
    geom = frustum_geometry(make_frustum(s['grid'], s['final'], s['feat']), *rig(b, s['final']))
    depth = torch.randn(b, 6, s['grid'].n_depths, *s['feat'], generator=g).softmax(2)
    feats = torch.randn(b*6, s['c'], *s['feat'], generator=g).contiguous(memory_format=torch.channels_last).unflatten(0, (b, 6))
    return geom.contiguous(), depth, feats, s['grid']

class QuickSum(torch.autograd.Function):
    "Differences of a running sum at the ends of runs of equal ranks; the gradient of a run goes to each of its rows"
    @staticmethod
    def forward(ctx, x, coords, ranks):
        x = x.cumsum(0)
        last = torch.ones(len(x), dtype=torch.bool); last[:-1] = ranks[1:] != ranks[:-1]
        x, coords = x[last], coords[last]
        ctx.save_for_backward(last)
        return torch.cat([x[:1], x[1:]-x[:-1]]), coords
    @staticmethod
    def backward(ctx, grad, _):
        last, = ctx.saved_tensors
        run = last.cumsum(0); run[last] -= 1
        return grad[run], None, None

def published(depth, feats, geom, grid):
    "LSS: the product of depth and features for every point, sorted by rank, pooled by cumulative sums, scattered into zeros"
    b, nx = len(depth), torch.tensor(grid.nx)
    lifted = (depth.unsqueeze(3)*feats.unsqueeze(2)).permute(0, 1, 2, 4, 5, 3)      # b n d h w c
    x = lifted.reshape(-1, lifted.shape[-1])
    coords = ((geom-torch.tensor(grid.lo))/torch.tensor(grid.dx)).long().view(-1, 3)
    coords = torch.cat([coords, torch.arange(b).repeat_interleave(len(x)//b)[:, None]], 1)
    kept = ((coords[:, :3] >= 0) & (coords[:, :3] < nx)).all(1)
    x, coords = x[kept], coords[kept]
    ranks = ((coords[:, 0]*nx[1]+coords[:, 1])*nx[2]+coords[:, 2])*b+coords[:, 3]
    order = ranks.argsort()
    x, coords = QuickSum.apply(x[order], coords[order], ranks[order])
    out = x.new_zeros(b, x.shape[1], *grid.nx[2:], *grid.nx[:2])
    out[coords[:, 3], :, coords[:, 2], coords[:, 0], coords[:, 1]] = x
    return torch.cat(out.unbind(2), 1)

def index_add(depth, feats, plan, kept, cells):
    lifted = depth.unsqueeze(-1)*feats.permute(0, 1, 3, 4, 2).unsqueeze(2)
    out = lifted.new_zeros(plan.n_cells, feats.shape[2]).index_add_(0, cells, lifted.view(-1, feats.shape[2])[kept])
    return pooling._to_bev(out, len(depth), plan.nx)

def raw(depth, feats, plan):
    "The compiled kernel on prepared arrays, writing into the same buffer again and again"
    arrays = [t.numpy() for t in (plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells)]
    out = torch.empty(plan.n_cells, feats.shape[2])
    args = depth.numpy(), pooling._np_rows(feats), *arrays, depth.shape, plan.n_cells
    view, kernel = out.numpy(), pooling._C.bev_pool_float32
    return out, lambda: kernel(*args, torch.get_num_threads(), view)

def bags(plan):
    "A plan as an embedding bag likes it best: sorted by cell, an interval for every cell"
    flat = plan.cells.long()
    kept = (flat >= 0).nonzero()[:, 0]
    order = kept[flat[kept].argsort(stable=True)]
    b, n, d, h, w = plan.sizes
    pixels = order//(d*h*w)*(h*w)+order%(h*w)
    return order.int(), pixels.int(), F.pad(torch.bincount(flat[kept], minlength=plan.n_cells).cumsum(0), (1, 0)).int()

def bag(depth, feats, order, pixels, starts, nx):
    rows = feats.permute(0, 1, 3, 4, 2).flatten(0, 3)
    out = F.embedding_bag(pixels, rows, starts, mode='sum', per_sample_weights=depth.reshape(-1)[order], include_last_offset=True)
    return pooling._to_bev(out, len(depth), nx)

def close(a, b, rtol=1e-4, atol=1e-4): assert torch.allclose(a, b, rtol=rtol, atol=atol), (a-b).abs().max()

def ways_of(depth, feats, geom, grid, plan):
    flat = plan.cells.long()
    kept = (flat >= 0).nonzero()[:, 0]; cells, sorted_ = flat[kept], bags(plan)
    return {OP: lambda d=depth, f=feats: bev_pool(d, f, plan), PUBLISHED: lambda d=depth, f=feats: published(d, f, geom, grid),
            INDEX_ADD: lambda d=depth, f=feats: index_add(d, f, plan, kept, cells), BAG: lambda d=depth, f=feats: bag(d, f, *sorted_, plan.nx)}

def with_backward(way, depth, feats, grad):
    d, f = (t.detach().requires_grad_() for t in (depth, feats))
    return lambda: torch.autograd.grad(way(d, f), (d, f), grad)

MEMORY = """
import sys, torch
sys.path.insert(0, 'nbs/_tools/bench')
import part_pool as p
torch.set_num_threads(1)

def make(size, b):
    geom, depth, feats, grid = p.case(size, b)
    plan = p.make_plan(geom, grid, index_mode='trunc')
    grad = torch.ones(b, feats.shape[2], *grid.nx[:2]).contiguous(memory_format=torch.channels_last)
    return p.ways_of(depth, feats, geom, grid, plan), depth, feats, grad

ways, *rest = make('small', 1)
for w in ways.values(): p.with_backward(w, *rest)()          # whatever is loaded at a first call, for everybody
ways, depth, feats, grad = make(sys.argv[1], int(sys.argv[2]))
held = [torch.zeros_like(t) for t in (grad, depth, feats)]   # output and gradients: everybody needs these
del held
if sys.argv[3] != 'nothing': p.with_backward(ways[sys.argv[3]], depth, feats, grad)()
"""

def copy_of(n_bytes):
    "A plain copy of as many bytes (half read, half written): one pass at the bandwidth of the memory that the kernel works in"
    a = torch.ones(max(n_bytes//8, 1)); b = torch.empty_like(a)
    return lambda: b.copy_(a)

def rows(quick, say):
    out, sizes = [], [('small', 1)] if quick else [('lss', 1), ('lss', 4), ('bevdet', 1), ('bevdet', 4)]
    slot = dict(rounds=5, slot_s=.02) if quick else dict(rounds=7, slot_s=.03, most_s=1.5)
    most = 1 if quick else torch.get_num_threads()
    for size, b in sizes:
        torch.set_num_threads(most)
        geom, depth, feats, grid = case(size, b)
        plan = make_plan(geom, grid, index_mode='trunc')
        ways = ways_of(depth, feats, geom, grid, plan)
        title = f"{SIZES[size]['title']}, batch {b}"
        say(title)
        ref = ways[OP]()
        grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=torch.channels_last)
        back = {n: with_backward(w, depth, feats, grad) for n, w in ways.items()}
        for n, w in ways.items():
            loose = dict(rtol=1e-2, atol=2e-3) if n == PUBLISHED else {}            # its float32 running sum loses digits
            close(w(), ref, **loose)
            for a, r in zip(back[n](), back[OP]()): close(a, r, **{**dict(rtol=1e-3, atol=1e-3), **loose})
        buffer, kernel = raw(depth, feats, plan)
        kernel(); close(pooling._to_bev(buffer, b, plan.nx), ref)
        gathered = f'each of {plan.n_kept:,} points reads a feature row, {4*plan.n_kept*feats.shape[2]/1e6:.0f} MB from the inner caches, and both ways wait for those'
        short = 'a call this short gained little from the second thread in this run, the way that it is compared with gained more'
        moved = 4*(depth.numel()+feats.numel()+buffer.numel())
        for threads in sorted({1, most} if b == 1 else {most}):
            torch.set_num_threads(threads)
            t = f"{title}, {threads} thread{'s'*(threads > 1)}"
            forward = interleave({KERNEL: kernel, **ways, COPY: copy_of(moved)}, warm=0, **slot)
            pick = lambda *names: {n: forward[n] for n in names}
            passes = forward[KERNEL]['wall_s']/forward[COPY]['wall_s']
            out.append(row('bev_pool', f'kernel forward, buffers used again: {t}', pick(KERNEL, PUBLISHED, INDEX_ADD, BAG, COPY), at_least={PUBLISHED: 100, INDEX_ADD: 10, BAG: 2.5},
                           at_most={'passes over inputs and output at copy bandwidth': (passes, 2)}, note=f'{moved/1e6:.1f} MB in and out; not an end-to-end ratio: pooling is 2 to 9 % of a step',
                           why={'passes over inputs and output at copy bandwidth': gathered if size == 'bevdet' else 'what is beyond two passes is gathering rows and starting threads', BAG: gathered, PUBLISHED: short}))
            out.append(row('bev_pool', f'op forward: {t}', pick(OP, PUBLISHED, INDEX_ADD, BAG), at_least={PUBLISHED: 30, BAG: 2 if b == 1 else 1},
                           why={BAG: f"calling the op takes {1e6*(forward[OP]['wall_s']-forward[KERNEL]['wall_s']):.0f} µs more than its kernel"+(f'; {short}' if threads > 1 else '')}))
            out.append(row('bev_pool', f'op forward and backward: {t}', interleave(back, warm=0, **slot), at_least={PUBLISHED: 25, BAG: 2 if b == 1 else 1}))
        torch.set_num_threads(1)
        plans = interleave({'ours, compiled': lambda: make_plan(geom, grid), 'PyTorch': lambda: make_plan(geom, grid, backend='torch')}, **slot)
        limit = {'milliseconds for a plan': (plans['ours, compiled']['wall_s']*1e3, .3)} if size == 'lss' and b == 1 else None
        out.append(row('bev_pool', f'plan from the geometry: {title}, 1 thread', plans, at_most=limit))
        if (size, b) in (('lss', 1), ('bevdet', 4)):
            base = peak_mb(MEMORY, size, b, 'nothing')
            peak = {n: dict(peak_mb=max(1, peak_mb(MEMORY, size, b, n)-base)) for n in ways}
            volume = 4*depth.numel()*feats.shape[2]/1e6
            out.append(row('bev_pool', f'peak memory of forward and backward beyond inputs, output and gradients: {title}', peak, measure='peak_mb',
                           at_most={'MB (the lifted volume alone would be the bound)': (peak[OP]['peak_mb'], volume)} if volume > 100 else None,
                           note='each way in a process of its own, after a first small call'))
    return out
