"""The Triton kernels against float64 `index_add_`: on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set

Not collected by itself: Triton chooses its interpreter for a whole process, so test_bev_pool_gpu.py runs this file in a process of its own.
"""
import os

import pytest
import torch

from bev_reid import bev_pool_gpu as m
from bev_reid.bev_pool import plan_from_cells

interpreted = os.environ.get('TRITON_INTERPRET') == '1'
device = 'cpu' if interpreted else 'cuda'
floats = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def poison():
    "Fresh memory holds NaN, so an element that no program writes is seen"
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(b=1, n=2, d=3, h=2, w=4, c=12, nx=(4, 3, 1), dtype=torch.float32, outside=.3):
    per = nx[0]*nx[1]*nx[2]
    cells = torch.randint(0, per, (b, n, d, h, w)) + per*torch.arange(b).view(-1, 1, 1, 1, 1)
    cells[torch.rand(cells.shape) < outside] = -1
    return torch.randn(b, n, d, h, w).softmax(2).to(dtype), torch.randn(b, n, c, h, w).to(dtype), plan_from_cells(cells, nx)


def reference(depth, img_feats, plan):
    b, c = depth.shape[0], img_feats.shape[2]
    lifted = (depth.double()[..., None]*img_feats.double().permute(0, 1, 3, 4, 2)[:, :, None]).reshape(depth.numel(), c)
    keep = plan.cells >= 0
    bev = torch.zeros(plan.n_cells, c, dtype=torch.double).index_add(0, plan.cells[keep].long(), lifted[keep])
    return bev.reshape(b, *plan.nx, c).permute(0, 3, 4, 1, 2).flatten(1, 2)


def forward(depth, img_feats, plan, **blocks):
    plan = plan.to(device)
    return m.pool_triton(depth.to(device), img_feats.to(device), plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, plan.nx, **blocks).cpu()

def backward(grad, depth, img_feats, plan, **blocks):
    return [g.cpu() for g in m.pool_triton_backward(grad.to(device), depth.to(device), img_feats.to(device), plan.cells.to(device), plan.nx, **blocks)]

def same(got, want, tol=2e-6):
    want = want.detach().double()
    scale = max(1, float(want.abs().max())) if want.numel() else 1
    torch.testing.assert_close(got.double()/scale, want/scale, rtol=0, atol=tol)

def check(depth, img_feats, plan, **blocks):
    "Forward and backward against the reference; half-precision gradients only lose what their own format cannot hold"
    bev = forward(depth, img_feats, plan)
    d, x = depth.double().requires_grad_(), img_feats.double().requires_grad_()
    want = reference(d, x, plan)
    assert bev.dtype == torch.float32 and bev.shape == want.shape and bev.permute(0, 2, 3, 1).is_contiguous()
    same(bev, want)
    grad = torch.randn(want.shape)
    want.backward(grad.double())
    got = backward(grad, depth, img_feats, plan)
    for g, w, t in zip(got, (d.grad, x.grad), (depth, img_feats)):
        assert g.shape == t.shape and g.dtype == t.dtype
        same(g, w, max(2e-6, torch.finfo(t.dtype).eps))
    return bev


every_c = pytest.mark.parametrize('c', [1, 5, 32, 64, 80, 96, 130])

@floats
@every_c
def test_matches_index_add(c, dtype): check(*make(c=c, dtype=dtype))

@every_c
def test_odd_sizes_and_layers(c): check(*make(c=c, b=2, n=1, d=5, h=3, w=3, nx=(3, 3, 2)))


def test_channel_order_by_hand():
    "One point in layer z=1 of a 2-layer grid: channel c of layer z is z*C+c"
    plan = plan_from_cells(torch.tensor(2*(1*4+3)+1).view(1, 1, 1, 1, 1), (2, 4, 2))
    bev = forward(torch.full((1, 1, 1, 1, 1), 2.), torch.tensor([1., 2, 3]).view(1, 1, 3, 1, 1), plan)
    want = torch.zeros(1, 6, 2, 4); want[0, 3:, 1, 3] = torch.tensor([2., 4, 6])
    assert torch.equal(bev, want)


@pytest.mark.parametrize('size', [dict(b=0), dict(n=0), dict(d=0), dict(h=0), dict(c=0), dict(nx=(0, 3, 1))])
def test_nothing_to_do(size):
    sizes = dict(b=1, n=2, d=3, h=2, w=4, c=12, nx=(4, 3, 1)) | size
    depth = torch.rand(*(sizes[k] for k in 'bndhw'))
    img_feats = torch.rand(*(sizes[k] for k in 'bnchw'))
    plan = plan_from_cells(torch.full(depth.shape, -1), sizes['nx'])
    assert not check(depth, img_feats, plan).any()


@floats
def test_all_points_outside(dtype): assert not check(*make(dtype=dtype, outside=2)).any()


@pytest.mark.parametrize('cell', [0, 11])
def test_all_points_in_one_cell(cell):
    depth, img_feats, _ = make(d=41, h=3, w=5, c=64)
    check(depth, img_feats, plan_from_cells(torch.full(depth.shape, cell), (4, 3, 1)))


@pytest.mark.parametrize('points', [3, 40], ids=['sparse', 'dense'])
def test_both_kinds_of_tile(points):
    "Few points in a cell: several cells a program; many: one"
    depth, img_feats, plan = make(n=1, d=points, h=3, w=4, c=64, nx=(5, 4, 1), outside=0)
    assert (m._forward_blocks(64, plan.n_kept, len(plan.interval_cells))['POINTS'] == 16) == (points == 40)
    check(depth, img_feats, plan)


@pytest.mark.parametrize('blocks', [dict(CELLS=1, POINTS=1, num_warps=1), dict(CELLS=32, POINTS=2, num_warps=1), dict(CELLS=2, POINTS=32, CHANNELS=8, num_warps=4)])
def test_any_tile_gives_the_same(blocks):
    depth, img_feats, plan = make(b=2, c=20)
    same(forward(depth, img_feats, plan, **blocks), reference(depth, img_feats, plan))

@pytest.mark.parametrize('blocks', [dict(PIXELS=1, DEPTHS=1), dict(PIXELS=16, DEPTHS=2), dict(PIXELS=1, DEPTHS=8)])
def test_any_backward_tile_gives_the_same(blocks):
    depth, img_feats, plan = make(b=2, d=5, c=20)
    grad = torch.randn(2, 20, 4, 3)
    for a, b in zip(backward(grad, depth, img_feats, plan, **blocks), backward(grad, depth, img_feats, plan)): same(a, b)


def test_memory_layouts():
    depth, img_feats, plan = make(b=2, n=3, c=32)
    want, grad = forward(depth, img_feats, plan), torch.randn(2, 32, 4, 3)
    want_grads = backward(grad, depth, img_feats, plan)
    wide = torch.zeros(6, 35, 2, 4).to(memory_format=torch.channels_last)            # as a depth net gives it: depth and features side by side
    wide[:, 3:] = img_feats.flatten(0, 1)
    every_other = torch.zeros(2, 3, 64, 2, 4)[:, :, ::2].copy_(img_feats)
    turned = img_feats.transpose(3, 4).contiguous().transpose(3, 4)
    for x in (img_feats.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 3)), wide[:, 3:].unflatten(0, (2, 3)), every_other, turned):
        assert not x.is_contiguous() and torch.equal(forward(depth, x, plan), want)
        for a, b in zip(backward(grad, depth, x, plan), want_grads): assert torch.equal(a, b)
    deep = depth.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.equal(forward(deep, img_feats, plan), want)
    for g in (grad.to(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        for a, b in zip(backward(g, deep, img_feats, plan), want_grads): assert torch.equal(a, b)
    ones = torch.ones(()).expand(2, 32, 4, 3)                                           # what `.sum().backward()` sends: all strides zero
    for a, b in zip(backward(ones, depth, img_feats, plan), backward(torch.ones(2, 32, 4, 3), depth, img_feats, plan)): assert torch.equal(a, b)
    shared = img_feats[:, :, :, :1, :1].expand_as(img_feats)
    same(forward(depth, shared, plan), reference(depth, shared, plan))


def test_rows_of_a_wider_tensor_are_not_copied():
    x = torch.randn(6, 35, 2, 4).to(memory_format=torch.channels_last)
    rows = m._rows(x[:, 3:].unflatten(0, (2, 3)))
    assert rows.data_ptr() == x[:, 3:].data_ptr() and rows.stride() == (35, 1)


def test_mixed_dtypes():
    depth, img_feats, plan = make(c=8)
    for d, x in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)): check(depth.to(d), img_feats.to(x), plan)


def test_broken_features_stay_in_their_cells():
    "A NaN or infinity of one pixel reaches the cells of its points and no other, not through idle slots either"
    depth, img_feats, plan = make(c=8, n=1, d=2, h=2, w=3, outside=.4)
    img_feats[0, 0, :, 1, 1], img_feats[0, 0, :, 0, 0] = torch.nan, torch.inf
    bev, want = forward(depth, img_feats, plan), reference(depth, img_feats, plan)
    assert not want.isfinite().all() and want.isfinite().any()
    torch.testing.assert_close(bev.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_half_inputs_are_summed_in_float32():
    "Ones in one cell: a sum in half precision would stop at 2048 or 256"
    for dtype in (torch.float16, torch.bfloat16):
        depth, img_feats = torch.ones(1, 1, 300, 3, 3, dtype=dtype), torch.ones(1, 1, 1, 3, 3, dtype=dtype)
        plan = plan_from_cells(torch.zeros(depth.shape, dtype=torch.int64), (1, 1, 1))
        assert float(forward(depth, img_feats, plan)) == 300*9
        assert all(float(g.double().mean()) == w for g, w in zip(backward(torch.ones(1, 1, 1, 1), depth, img_feats, plan), (1, 300)))


def test_same_bits_every_time():
    args = make(b=2, n=3, d=9, c=40)
    grad = torch.randn(2, 40, 4, 3)
    a, b = ((forward(*args), *backward(grad, *args)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_one_sample_or_many_gives_the_same_bits():
    depth, img_feats, plan = make(b=3, n=2, d=6, c=40, nx=(4, 4, 1))
    cells = torch.randint(-1, 16, depth.shape)                                          # each sample's points in its own cells
    own = [plan_from_cells(cells[i:i+1], plan.nx) for i in range(3)]
    whole = plan_from_cells(torch.where(cells < 0, -1, cells+16*torch.arange(3).view(3, 1, 1, 1, 1)), plan.nx)
    bev = forward(depth, img_feats, whole)
    for i in range(3): assert torch.equal(forward(depth[i:i+1], img_feats[i:i+1], own[i])[0], bev[i])
