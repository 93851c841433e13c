"The pooling op against a float64 `index_add_`, at its edges, and as a citizen of PyTorch"
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bev_reid import bev_pool as m
from bev_reid.bev_pool import bev_pool, make_plan, plan_from_cells
from bev_reid.geometry import BEVGrid

needs_C = pytest.mark.skipif(m._C is None, reason='the compiled extension is not built')
backends = pytest.mark.parametrize('backend', [None, pytest.param('cpp', marks=needs_C), 'torch', 'cumsum'])


def make(b=1, n=2, d=3, h=2, w=4, c=64, nx=(6, 5, 1), dtype=torch.float32, seed=0, outside=.3):
    "Random depth, features and plan"
    g = torch.Generator().manual_seed(seed)
    per = nx[0]*nx[1]*nx[2]
    cells = torch.randint(0, max(1, per), (b, n, d, h, w), generator=g) + per*torch.arange(b).view(-1, 1, 1, 1, 1)
    cells[torch.rand(cells.shape, generator=g) < outside] = -1
    depth = torch.randn(b, n, d, h, w, generator=g, dtype=dtype).softmax(2)
    return depth, torch.randn(b, n, c, h, w, generator=g, dtype=dtype), plan_from_cells(cells, nx)


def reference(depth, img_feats, plan):
    "Lift, then index_add_, in float64; differentiable"
    b, c, nx = depth.shape[0], img_feats.shape[2], plan.nx
    lifted = (depth.double()[..., None]*img_feats.double().permute(0, 1, 3, 4, 2)[:, :, None]).reshape(-1, c)
    keep = plan.cells >= 0
    bev = torch.zeros(plan.n_cells, c, dtype=torch.double).index_add(0, plan.cells[keep].long(), lifted[keep])
    return bev.reshape(b, *nx, c).permute(0, 3, 4, 1, 2).flatten(1, 2)  # b z c x y -> b (z c) x y


def grads(f, depth, img_feats, weight):
    d, x = depth.detach().clone().requires_grad_(), img_feats.detach().clone().requires_grad_()
    (f(d, x)*weight).sum().backward()
    return d.grad.double(), x.grad.double()


def same(got, want, tol=1e-5): torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol)


@backends
@pytest.mark.parametrize('c', [1, 3, 32, 64, 65, 80, 96, 128])
@pytest.mark.parametrize('b,nx', [(1, (6, 5, 1)), (3, (4, 7, 3))])
def test_matches_index_add(c, b, nx, backend):
    depth, img_feats, plan = make(b=b, c=c, nx=nx)
    bev, truth = bev_pool(depth, img_feats, plan, backend=backend), reference(depth, img_feats, plan)
    assert bev.dtype == torch.float32 and bev.shape == (b, nx[2]*c, *nx[:2])
    assert bev.permute(0, 2, 3, 1).is_contiguous()
    tol = 1e-3 if backend == 'cumsum' else 1e-5                                     # a running sum loses digits, forward and backward
    same(bev, truth, tol)
    weight = torch.randn(bev.shape, generator=torch.Generator().manual_seed(1))
    got, want = (grads(f, depth, img_feats, weight) for f in (lambda d, x: bev_pool(d, x, plan, backend=backend), lambda d, x: reference(d, x, plan)))
    for g, r in zip(got, want): same(g, r, tol)


def test_channel_order_by_hand():
    "One point in layer z=1 of a 2-layer grid: channel c of layer z is z*C+c; x runs forward, y left"
    geom = torch.tensor([2.5, -1.5, 1.5]).view(1, 1, 1, 1, 1, 3)
    plan = make_plan(geom, BEVGrid((0, 4, 1), (-2, 1, 1), (0, 2, 1), (1, 2, 1)))
    bev = bev_pool(torch.full((1, 1, 1, 1, 1), .5), torch.tensor([2., 4, 6]).view(1, 1, 3, 1, 1), plan)
    assert bev.nonzero().tolist() == [[0, 3, 2, 0], [0, 4, 2, 0], [0, 5, 2, 0]]
    assert bev[0, 3:, 2, 0].tolist() == [1, 2, 3]


@backends
def test_nothing_inside(backend):
    depth, img_feats, plan = make(outside=1.1)
    assert plan.n_kept == 0
    bev = bev_pool(depth, img_feats, plan, backend=backend)
    assert bev.shape == (1, 64, 6, 5) and not bev.any()
    for g in grads(lambda d, x: bev_pool(d, x, plan, backend=backend), depth, img_feats, 1): assert not g.any()


@pytest.mark.parametrize('backend', [None, 'torch', 'cumsum'])
@pytest.mark.parametrize('size', [dict(n=0), dict(d=0), dict(h=0), dict(b=0)])
def test_empty(size, backend):
    depth, img_feats, plan = make(**size)
    bev = bev_pool(depth, img_feats, plan, backend=backend)
    assert bev.shape == (size.get('b', 1), 64, 6, 5) and not bev.any()
    for g in grads(lambda d, x: bev_pool(d, x, plan, backend=backend), depth, img_feats, 1): assert not g.any()


def test_all_in_one_cell():
    depth, img_feats, _ = make(d=9)
    plan = plan_from_cells(torch.full(depth.shape, 7), (6, 5, 1))
    same(bev_pool(depth, img_feats, plan), reference(depth, img_feats, plan))


def test_memory_layouts():
    depth, img_feats, plan = make(b=2, n=3, c=32)
    want = bev_pool(depth, img_feats, plan)
    wide = torch.zeros(6, 35, 2, 4).to(memory_format=torch.channels_last)           # as a depth net gives it: depth and features side by side
    wide[:, 3:] = img_feats.flatten(0, 1)
    every_other = torch.zeros(2, 3, 64, 2, 4)[:, :, ::2].copy_(img_feats)
    turned = img_feats.transpose(3, 4).contiguous().transpose(3, 4)
    for x in (img_feats.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 3)), wide[:, 3:].unflatten(0, (2, 3)), every_other, turned):
        assert not x.is_contiguous() and torch.equal(bev_pool(depth, x, plan), want)
    d = depth.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert not d.is_contiguous() and torch.equal(bev_pool(d, img_feats, plan), want)
    shared = img_feats[:, :, :, :1, :1].expand_as(img_feats)                            # strides of zero
    same(bev_pool(depth, shared, plan), reference(depth, shared, plan))
    weight = torch.randn(want.shape)
    got = grads(lambda d, x: bev_pool(d, x, plan), d, img_feats.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 3)), weight.to(memory_format=torch.channels_last))
    for a, b in zip(got, grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight)): assert torch.equal(a, b)


def test_channels_last_features_are_not_copied():
    x = torch.randn(6, 35, 2, 4).to(memory_format=torch.channels_last)
    rows = m._np_rows(x[:, 3:].unflatten(0, (2, 3)))
    assert rows.ctypes.data == x[:, 3:].data_ptr() and rows.strides == (35*4, 4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_float32(dtype):
    depth, img_feats, plan = make(d=64)
    depth, img_feats = depth.to(dtype), img_feats.to(dtype)
    bev = bev_pool(depth, img_feats, plan)
    assert bev.dtype == torch.float32
    same(bev, reference(depth, img_feats, plan))
    d, x = depth.requires_grad_(), img_feats.requires_grad_()
    bev_pool(d, x, plan).sum().backward()
    assert d.grad.dtype == x.grad.dtype == dtype


def test_mixed_dtypes():
    depth, img_feats, plan = make()
    assert bev_pool(depth.bfloat16(), img_feats, plan).dtype == torch.float32
    assert bev_pool(depth, img_feats.double(), plan).dtype == torch.float64


@pytest.mark.parametrize('backend', [None, 'torch', 'cumsum'])
@pytest.mark.parametrize('c', [2, 17])
def test_gradcheck(backend, c):
    depth, img_feats, plan = make(b=2, c=c, nx=(3, 3, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d, x: bev_pool(d, x, plan, backend=backend), (depth.requires_grad_(), img_feats.requires_grad_()))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_opcheck(dtype, channels_last):
    depth, img_feats, plan = make(b=2, c=5, nx=(3, 4, 2), dtype=dtype)
    if channels_last: img_feats = img_feats.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 2))
    rest = plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, plan.cells, plan.nx
    grad = torch.randn(2, 10, 3, 4, dtype=dtype)
    torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (depth, img_feats, *rest))
    torch.library.opcheck(torch.ops.bev_reid.bev_pool_backward.default, (grad, depth, img_feats, plan.interval_cells, plan.cells, plan.nx))
    torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (depth.requires_grad_(), img_feats.requires_grad_(), *rest))


@pytest.mark.slow
def test_compiles_in_one_graph():
    depth, img_feats, plan = make(c=8)
    f = torch.compile(lambda d, x: bev_pool(d, x, plan).relu(), fullgraph=True)
    same(f(depth, img_feats), reference(depth, img_feats, plan).relu())


def test_traces_in_one_graph():
    "What `torch.compile` needs, without the time of its code generator"
    depth, img_feats, plan = make(c=8)
    f = torch.compile(lambda d, x: bev_pool(d, x, plan).relu(), fullgraph=True, backend='aot_eager')
    got, want = (grads(g, depth, img_feats, 1) for g in (f, lambda d, x: bev_pool(d, x, plan).relu()))
    for a, b in zip(got, want): assert torch.equal(a, b)


@needs_C
@pytest.mark.parametrize('c', [64, 50])
def test_same_bits_for_any_number_of_threads(c):
    depth, img_feats, plan = make(b=2, n=6, d=41, h=8, w=22, c=c, nx=(50, 50, 1))  # enough points for more than one thread
    assert plan.n_kept > 2**15
    weight, before, outs = torch.randn(2, c, 50, 50), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append((bev_pool(depth, img_feats, plan), *grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight)))
    finally: torch.set_num_threads(before)
    for out in outs[1:]:
        for a, b in zip(out, outs[0]): assert torch.equal(a, b)
    same(outs[0][0], reference(depth, img_feats, plan), 1e-4)


def random_geom(dtype=torch.float32, b=2):
    g = torch.Generator().manual_seed(0)
    geom = torch.randn(b, 3, 5, 4, 7, 3, generator=g, dtype=dtype)*torch.tensor([6., 6, 3], dtype=dtype)
    geom[:, 0, 0] = geom[:, 0, 0].round()                                       # points exactly on cell edges
    geom[0, 1, 0, 0, 0], geom[0, 1, 0, 0, 1] = 1e30, -1e30                     # finite, but no int holds them
    return geom

GRID = BEVGrid((-8, 8, .5), (-6, 6, .1), (-4, 2, 2), (1, 6, 1))


@needs_C
@pytest.mark.parametrize('index_mode', ['floor', 'trunc'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_plans_agree(dtype, index_mode):
    geom = random_geom(dtype)
    for g in (geom, geom.flip(4), geom.transpose(3, 4).contiguous().transpose(3, 4)):
        a, b = (make_plan(g, GRID, index_mode=index_mode, backend=k) for k in ('cpp', 'torch'))
        for k in ('depth_idx', 'feat_idx', 'indptr', 'interval_cells', 'cells'): assert torch.equal(getattr(a, k), getattr(b, k)), k
        assert a.sizes == b.sizes and a.nx == b.nx == (32, 120, 3)


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=needs_C), 'torch'])
def test_plan_follows_the_image_columns(backend):
    plan = make_plan(random_geom(), GRID, backend=backend)
    cells = plan.cells[plan.depth_idx.long()]
    assert torch.equal(torch.repeat_interleave(plan.interval_cells, plan.indptr.diff()), cells) and len(plan.interval_cells.unique()) == len(plan.interval_cells)
    walk = torch.arange(len(plan.cells)).view(plan.sizes).permute(0, 1, 4, 2, 3).flatten()
    when = torch.empty_like(walk); when[walk] = torch.arange(len(walk))                # the place of each point in the walk
    when = when[plan.depth_idx.long()]
    assert (when.diff()[cells.diff() == 0] > 0).all() and (when[plan.indptr[:-1].long()].diff() > 0).all()
    b, n, d, h, w = plan.sizes
    pixels = torch.arange(b*n*h*w, dtype=torch.int32).view(b, n, 1, h, w).expand(plan.sizes).flatten()
    assert torch.equal(pixels[plan.depth_idx.long()], plan.feat_idx)


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=needs_C), 'torch'])
def test_trunc_keeps_one_more_cell_below(backend):
    grid = BEVGrid((0, 2, 1), (0, 2, 1), (0, 1, 1), (1, 2, 1))
    x = torch.tensor([-1.5, -1, -.5, 0, .5, 1.99, 2])
    geom = torch.stack([x, torch.full_like(x, .5), torch.full_like(x, .5)], -1).view(1, 1, 1, 1, 7, 3)
    cells = {k: make_plan(geom, grid, index_mode=k, backend=backend).cells.tolist() for k in ('floor', 'trunc')}
    assert cells == dict(floor=[-1, -1, -1, 0, 0, 2, -1], trunc=[-1, -1, 0, 0, 0, 2, -1])


@pytest.mark.parametrize('backend', [pytest.param('cpp', marks=needs_C), 'torch'])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_broken_geometry_is_named(backend, value):
    geom = random_geom(); geom[1, 2, 3, 1, 1, 2] = value; geom[1, 2, 4, 1, 1, 2] = value
    with pytest.raises(ValueError, match='sample 1, camera 2'): make_plan(geom, GRID, backend=backend)


def test_plan_moves_and_compares():
    plan = make_plan(random_geom(), GRID)
    assert torch.equal(plan.to('cpu').interval_cells, plan.interval_cells) and plan.to('meta').cells.device.type == 'meta'
    assert 0 < plan.n_kept < len(plan.cells)


@pytest.mark.parametrize('change, words', [
    (lambda d, x, p: (d[:, :1], x, p), ['depth has shape', 'make a plan']),
    (lambda d, x, p: (d.flatten(0, 1), x, p), ['depth has shape']),
    (lambda d, x, p: (d, x[..., :1], p), ['img_feats has shape']),
    (lambda d, x, p: (d, x.flatten(0, 1), p), ['img_feats has shape']),
    (lambda d, x, p: (d.long(), x, p), ['depth must be floating point']),
    (lambda d, x, p: (d, x, make(h=3)[2]), ['make a plan']),
    (lambda d, x, p: (d, x, p.to('meta')), ['plan.to']),
    (lambda d, x, p: (d, x, replace(p, depth_idx=p.depth_idx.long())), ['depth_idx must be int32']),
    (lambda d, x, p: (d, x, replace(p, feat_idx=p.feat_idx[1:])), ['feat_idx', 'shape']),
    (lambda d, x, p: (d, x, replace(p, nx=(1, 1, 1))), ['intervals', 'cells']),
    (lambda d, x, p: (d, x, replace(p, indptr=p.indptr[1:])), ['indptr', 'shape']),
    (lambda d, x, p: (d, x, replace(p, cells=p.cells.repeat(2)[::2])), ['cells', 'contiguous']),
    (lambda d, x, p: (d, x, plan_from_cells(torch.full(d.shape, 30), p.nx)), ['cells must lie in']),
    (lambda d, x, p: (d, x, plan_from_cells(torch.full(d.shape, -2), p.nx)), ['cells must lie in']),
])
def test_errors_name_what_is_wrong(change, words):
    with pytest.raises(ValueError) as e: bev_pool(*change(*make()))
    assert all(w in str(e.value) for w in words), str(e.value)


def test_unknown_names():
    depth, img_feats, plan = make()
    with pytest.raises(ValueError, match='backend'): bev_pool(depth, img_feats, plan, backend='cuda')
    with pytest.raises(ValueError, match='backend'): make_plan(random_geom(), GRID, backend='cumsum')
    with pytest.raises(ValueError, match='index_mode'): make_plan(random_geom(), GRID, index_mode='round')
    with pytest.raises(ValueError, match='geom must have'): make_plan(torch.zeros(5, 3), GRID)


def test_too_many_for_int32():
    geom = torch.zeros(1).expand(3, 1, 1, 1, 1, 3)
    with pytest.raises(ValueError, match='int32'): make_plan(geom, BEVGrid((0, 40000, 1), (0, 40000, 1), (0, 1, 1), (1, 2, 1)))


@needs_C
@pytest.mark.parametrize('field, value', [('depth_idx', -1), ('depth_idx', 48), ('feat_idx', 16), ('feat_idx', -7), ('indptr', 10**6), ('indptr', -1), ('interval_cells', 30), ('interval_cells', -1)])
def test_indices_out_of_range_are_errors(field, value):
    depth, img_feats, plan = make()
    broken = getattr(plan, field).clone(); broken[5] = value
    with pytest.raises(IndexError, match=field): bev_pool(depth, img_feats, replace(plan, **{field: broken}))


@needs_C
@pytest.mark.parametrize('value', [-2, 30, 2**31-1])
def test_cells_out_of_range_are_errors_in_backward(value):
    depth, img_feats, plan = make()
    cells = plan.cells.clone(); cells[5] = value
    with pytest.raises(IndexError, match='cells'): bev_pool(depth.requires_grad_(), img_feats, replace(plan, cells=cells)).sum().backward()


@needs_C
def test_the_module_itself_checks():
    "The compiled functions refuse what the Python side would never pass"
    depth, img_feats, plan = make()
    ok = dict(depth=depth, img_feats=img_feats.permute(0, 1, 3, 4, 2).reshape(-1, 64), depth_idx=plan.depth_idx, feat_idx=plan.feat_idx, indptr=plan.indptr, interval_cells=plan.interval_cells, out=torch.empty(30, 64))
    def run(**kw): return m._C.bev_pool_float32(**{k: v.numpy() for k, v in {**ok, **kw}.items()}, bndhw=depth.shape, n_cells=30, threads=1)
    run()
    for name, bad in dict(depth=depth.double(), img_feats=ok['img_feats'][1:], depth_idx=plan.depth_idx.long(), feat_idx=plan.feat_idx[1:], indptr=plan.indptr[1:]).items():
        with pytest.raises(ValueError, match=name): run(**{name: bad})
    with pytest.raises(ValueError, match='depth must be contiguous'): run(depth=depth.transpose(3, 4))
    with pytest.raises(ValueError, match='img_feats must have its channels side by side'): run(img_feats=ok['img_feats'].T.contiguous().T)
    with pytest.raises(ValueError, match='out has'): run(out=torch.empty(29, 64))
    frozen = torch.empty(30, 64).numpy(); frozen.flags.writeable = False
    with pytest.raises(ValueError, match='out is read-only'): m._C.bev_pool_float32(**{k: v.numpy() for k, v in ok.items() if k != 'out'}, out=frozen, bndhw=depth.shape, n_cells=30, threads=1)
    cells = torch.full((48,), 7, dtype=torch.int32).numpy()
    def room(points=48, most=8): return [torch.empty(k, dtype=torch.int32).numpy() for k in (points, points, most+1, most)]
    assert m._C.sort_points(cells, (1, 2, 3, 2, 4), 8, 1, *room()) == [48, 1]
    with pytest.raises(IndexError, match='48 entries of cells'): m._C.sort_points(cells, (1, 2, 3, 2, 4), 5, 1, *room(most=5))
    with pytest.raises(ValueError, match='depth_idx has 47'): m._C.sort_points(cells, (1, 2, 3, 2, 4), 8, 1, *room(points=47))


@needs_C
@pytest.mark.parametrize('isa', ['base', 'avx2', 'avx512'])
def test_every_instruction_set_gives_the_same_sums(isa, tmp_path):
    "The choice is made once per process, so each set has a process of its own; a machine without it takes what it has"
    code = """
import sys, torch
sys.path.insert(0, 'tests')
from test_bev_pool import bev_pool, grads, make, reference, same
from bev_reid import _C
for c in (1, 7, 16, 64, 80, 130, 200):
    for dtype in (torch.float32, torch.float64):
        depth, img_feats, plan = make(b=2, c=c, dtype=dtype, nx=(6, 5, 2))
        same(bev_pool(depth, img_feats, plan), reference(depth, img_feats, plan))
        weight = torch.randn(2, 2*c, 6, 5)
        for a, b in zip(grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight), grads(lambda d, x: reference(d, x, plan), depth, img_feats, weight)): same(a, b)
print(_C.instruction_set())
"""
    r = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'BEV_REID_ISA': isa, 'OMP_NUM_THREADS': '1'}, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert ['base', 'avx2', 'avx512'].index(r.stdout.strip()) <= ['base', 'avx2', 'avx512'].index(isa)


@needs_C
def test_outputs_larger_than_the_caches():
    "Above 16 MB the kernel writes past the caches and clears only the cells without points; the memory is used again"
    for c in (64, 80, 50):                                                             # the last has rows that do not fill cache lines
        depth, img_feats, plan = make(b=2, n=6, d=10, h=4, w=22, c=c, nx=(200, 200, 1))
        want = reference(depth, img_feats, plan)
        bev = bev_pool(depth, img_feats, plan)
        address = bev.data_ptr(); same(bev, want)
        bev.fill_(torch.nan); del bev
        again = bev_pool(depth, img_feats, plan)
        assert again.data_ptr() == address; same(again, want)
        kept = bev_pool(depth, img_feats, plan)
        assert kept.data_ptr() != again.data_ptr(); same(again, want)
    del again, kept
    assert m.release_buffers() > 0 and m.release_buffers() == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@backends
def test_half_precision_in_float32_sums(dtype, backend):
    depth, img_feats, plan = make(b=2, c=32)
    d, x = (t.to(dtype).requires_grad_() for t in (depth, img_feats))
    bev = bev_pool(d, x, plan, backend=backend)
    assert bev.dtype == torch.float32
    want = reference(d.detach(), x.detach(), plan)                                   # of the rounded inputs: the sums themselves lose nothing
    same(bev, want, 1e-3 if backend == 'cumsum' else 1e-5)
    bev.square().sum().backward()
    assert d.grad.dtype == x.grad.dtype == dtype
    for a, b in zip((d.grad, x.grad), grads(lambda u, v: reference(u, v, plan), d.detach().double(), x.detach().double(), want*2)): same(a, b, 2e-2)
    if backend is None: torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (d, x, plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, plan.cells, plan.nx))


@pytest.mark.parametrize('nx', [(6, 5, 1), (6, 5, 3), (40, 50, 2)])
def test_gradients_with_channels_first(nx):
    depth, img_feats, plan = make(b=2, c=20, nx=nx)
    weight = torch.randn(2, 20*nx[2], *nx[:2])
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight[:, :1].expand_as(weight)):
        d, x = depth.clone().requires_grad_(), img_feats.clone().requires_grad_()
        got = torch.autograd.grad(bev_pool(d, x, plan), (d, x), w)
        for a, b in zip(got, torch.autograd.grad(reference(d, x, plan), (d, x), w.double())): same(a, b)


def test_without_the_extension_torch_steps_in_with_one_warning(monkeypatch):
    depth, img_feats, plan = make(b=2, c=16)
    want, weight = bev_pool(depth, img_feats, plan), torch.randn(2, 16, 6, 5)
    want_grads, geom = grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight), random_geom()
    cells = make_plan(geom, GRID).cells
    monkeypatch.setattr(m, '_C', None)
    monkeypatch.setattr(m, '_why_no_C', 'not built')
    m._warn_no_C.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        same(bev_pool(depth, img_feats, plan), want)
        for a, b in zip(grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight), want_grads): same(a, b)
        assert torch.equal(make_plan(geom, GRID).cells, cells)
        rest = plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, plan.cells, plan.nx
        torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (depth.requires_grad_(), img_feats.requires_grad_(), *rest))
        torch.library.opcheck(torch.ops.bev_reid.bev_pool_backward.default, (weight, depth.detach(), img_feats.detach(), plan.interval_cells, plan.cells, plan.nx))
    assert sum('compiled extension' in str(w.message) for w in caught) == 1
    with pytest.raises(ValueError, match="backend='torch' does without"): bev_pool(depth, img_feats, plan, backend='cpp')


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    depth, img_feats, plan = make(b=2, n=6, d=41, h=8, w=22, nx=(50, 50, 2))
    gpu, weight = plan.to('cuda'), torch.randn(2, 128, 50, 50)
    same(bev_pool(depth.cuda(), img_feats.cuda(), gpu).cpu(), bev_pool(depth, img_feats, plan), 1e-4)
    got = grads(lambda d, x: bev_pool(d, x, gpu), depth.cuda(), img_feats.cuda(), weight.cuda())
    for a, b in zip(got, grads(lambda d, x: bev_pool(d, x, plan), depth, img_feats, weight)): same(a.cpu(), b, 1e-4)
    geom = random_geom()
    for a, b in zip(vars(make_plan(geom.cuda(), GRID)).values(), vars(make_plan(geom, GRID)).values()):
        assert torch.equal(a.cpu(), b) if isinstance(a, torch.Tensor) else a == b
    with pytest.raises(ValueError, match='plan.to'): bev_pool(depth.cuda(), img_feats.cuda(), plan)
    with pytest.raises(ValueError, match="backend 'cpp' needs"): bev_pool(depth.cuda(), img_feats.cuda(), gpu, backend='cpp')
