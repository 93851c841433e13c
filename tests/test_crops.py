"""Heading-up crops: the vehicle alone decides where and how the window lies, and its box size decides nothing."""
import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon

from bev_reid.crops import *
from bev_reid.data import bev_target
from bev_reid.geometry import BEVGrid, box_bev, cells2metres

GRID = BEVGrid(xbound=(-20, 20, .25), ybound=(-20, 20, .25))
CFG = CropConfig(extent=6., size=24)
i, j = torch.meshgrid(*map(torch.arange, GRID.nx[:2]), indexing='ij')
XY = cells2metres(torch.stack([i, j], -1).float(), GRID)

def painted(box):
    "A smooth vehicle: red at the front, green on its left, blue all over; no symmetry is left"
    c, s = box[6].cos(), box[6].sin()
    d = XY-box[:2]
    ahead, left = d[..., 0]*c+d[..., 1]*s, -d[..., 0]*s+d[..., 1]*c
    blob = lambda a, l, w: torch.exp(-((ahead-a)**2+(left-l)**2)/w)
    return torch.stack([blob(1.5, 0, 1), blob(0, .8, 1), blob(0, 0, 4)])[None]

def box(x=1., y=-2., yaw=0., w=2., l=4.5): return torch.tensor([x, y, 0, w, l, 1.6, yaw])

def crop(raster, *boxes, cfg=CFG): return crop_bev(raster, torch.stack(boxes), torch.zeros(len(boxes)).long(), grid=GRID, cfg=cfg)

@pytest.mark.parametrize('yaw', [.4, 1.2, np.pi/2, 2.7, np.pi, -.9, -np.pi/2])
def test_every_heading_gives_the_same_crop(yaw):
    want, got = crop(painted(box()), box())[0], crop(painted(b := box(x=-3.1, y=4.7, yaw=yaw)), b)[0]
    assert (want-got).abs().max() < .03
    r, c = np.unravel_index(got[0].argmax(), got[0].shape); assert r < 10 and 10 <= c <= 13       # the front is up
    r, c = np.unravel_index(got[1].argmax(), got[1].shape); assert c < 10 and 10 <= r <= 13       # its left is left

def test_without_heading_up_the_crop_keeps_the_egos_directions():
    cfg = CropConfig(extent=6., size=24, heading_up=False)
    got = crop(painted(b := box(yaw=np.pi/2)), b, cfg=cfg)[0]
    r, c = np.unravel_index(got[0].argmax(), got[0].shape); assert c < 10 and 10 <= r <= 13       # the vehicle drives to the left

def test_box_size_does_not_enter():
    raster = torch.rand(1, 5, *GRID.nx[:2])
    a, b = crop(raster, box(yaw=.7), box(yaw=.7, w=.6, l=1.8))
    assert torch.equal(a, b)

def test_zero_beyond_the_border():
    got = crop(torch.ones(1, 1, *GRID.nx[:2]), box(x=19.9, y=0), box(x=100., y=0))
    assert got[0, 0, :11].max() == 0 and got[0, 0, 13:].min() == 1 and got[1].max() == 0

def test_batch_and_order():
    # boxes of two samples in any order: each window comes from the map of its own sample
    raster = torch.stack([torch.zeros(1, *GRID.nx[:2]), torch.ones(1, *GRID.nx[:2])])
    got = crop_bev(raster, torch.stack([box()]*4), torch.tensor([1, 0, 0, 1]), grid=GRID, cfg=CFG)
    assert got.mean((1, 2, 3)).tolist() == [1, 0, 0, 1]
    assert crop_bev(raster, torch.zeros(0, 7), torch.zeros(0).long(), grid=GRID, cfg=CFG).shape == (0, 1, 24, 24)

def test_one_call_equals_one_call_per_vehicle():
    g = torch.Generator().manual_seed(0)
    raster, n = torch.rand(4, 5, *GRID.nx[:2], generator=g), torch.tensor([3, 0, 7, 1])
    sample = torch.repeat_interleave(torch.arange(4), n)[torch.randperm(11, generator=g)]
    boxes = torch.stack([box(*(30*torch.rand(2, generator=g)-15).tolist(), yaw=float(6*torch.rand((), generator=g))) for _ in sample])
    each = torch.cat([crop_bev(raster[i:i+1], b[None], torch.zeros(1).long(), grid=GRID, cfg=CFG) for b, i in zip(boxes, sample)])
    assert torch.allclose(crop_bev(raster, boxes, sample, grid=GRID, cfg=CFG), each, atol=1e-4)

def test_gradient_flows_into_the_map():
    raster = torch.rand(1, 2, *GRID.nx[:2], requires_grad=True)
    crop(raster, box(yaw=.3), box(x=8, y=3.)).sum().backward()
    touched = raster.grad[0, 0] != 0
    far = ((XY-box()[:2]).norm(dim=-1) > 5) & ((XY-torch.tensor([8., 3])).norm(dim=-1) > 5)
    assert touched.sum() > 500 and not (touched & far).any()
    small = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    g = BEVGrid(xbound=(-2, 2, .5), ybound=(-2, 2, .5))
    assert torch.autograd.gradcheck(lambda r: crop_bev(r, box(0, 0, .3).double()[None], torch.zeros(1).long(), grid=g, cfg=CropConfig(extent=2., size=3)), small)

@pytest.mark.parametrize('yaw', [0., .5, 1.3])
@pytest.mark.parametrize('cut', [-30., -.5, .6, 30.])
def test_coverage_counts_the_polygon(yaw, cut):
    b, mask = box(yaw=yaw, w=4., l=9.), (XY[..., 0] > cut+1).float()[None, None]
    fine = torch.tensor(np.stack(np.meshgrid(*[np.arange(-19.99, 20, .05)]*2), -1).reshape(-1, 2))
    inside = fine[Polygon(box_bev(b[None])[0].numpy()).contains_points(fine)]
    want = (inside[:, 0] > cut+1).double().mean()
    assert coverage(mask, b[None], torch.zeros(1).long(), grid=GRID)[0] == pytest.approx(want.item(), abs=.06)

def test_coverage_of_the_true_mask_and_of_the_outside():
    b = torch.stack([box(yaw=.6), box(x=20., y=5.)])
    got = coverage(bev_target(b, GRID)[None, None], b, torch.zeros(2).long(), grid=GRID)
    assert got[0] == 1 and .3 < got[1] < .7                          # the half beyond the border cannot be covered

def test_extent():
    with pytest.raises(ValueError, match=r'crop extent 6\.0 m is smaller than the longest box \(12\.3 m, instance bus\): pass extent>=13 or clip=True'):
        check_extent(torch.stack([box(), box(l=12.3)]), CFG, names=['car', 'bus'])
    check_extent(torch.stack([box(l=12.3)]), CropConfig(extent=6., clip=True)); check_extent(torch.zeros(0, 7), CFG)
    with pytest.raises(ValueError, match='extent > 0'): CropConfig(extent=0)

def test_patches():
    cam2ego = torch.tensor([[0., 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])[None]
    K = torch.tensor([[[100., 0, 100], [0, 100, 50], [0, 0, 1]]])
    boxes = torch.tensor([[10., 0, 1.5, 2, 2, 2, 0], [-10, 0, 1.5, 2, 2, 2, 0], [10, 9.3, 1.5, 2, 2, 2, 0]])
    rects, share = image_boxes(boxes, K, cam2ego, sizes=[(100, 200)])
    # its front face is 9 m away and 2 m wide: 100/9 px to either side
    assert rects[0, 0].tolist() == pytest.approx([100-100/9, 50-100/9, 100+100/9, 50+100/9], abs=1e-3) and share[0, 0] == pytest.approx(1)
    assert share[1, 0] == 0 and 0 < share[2, 0] < 1
    img = torch.zeros(3, 100, 200, dtype=torch.uint8); img[0, 40:60, 90:110] = 255
    patch, cam, px = best_patch(rects[0], [img], size=16)
    assert cam == 0 and px == pytest.approx(200/9, abs=1e-3) and patch[0, 8, 8] == 255 and patch[0, 0, 0] < 64
    assert best_patch(rects[1], [img], size=16)[1] == -1
    half = torch.nn.functional.avg_pool2d(img[None].float(), 2)[0].byte()
    small, cam, px = best_patch(rects[0], [half], size=16, sizes=[(100, 200)])         # from a shrunk copy
    assert cam == 0 and px == pytest.approx(200/9, abs=1e-3) and (small.int()-patch.int()).abs().float().mean() < 16

@pytest.mark.parametrize('heading_up', [True, False])
@pytest.mark.parametrize('yaw', [0., .5, np.pi/2, -2.])
def test_mask(heading_up, yaw):
    "1 in the footprint, falling to 0 over the margin; it turns with the window"
    cfg, b = CropConfig(extent=8., size=160, heading_up=heading_up, mask=True, mask_margin=.5), box(yaw=yaw)
    p = crop_points(b[None], cfg)
    m = crop_mask(p, b[None], cfg)[0]
    inside = torch.tensor(Polygon(box_bev(b[None])[0].numpy()).contains_points(p[0].reshape(-1, 2).numpy())).view(160, 160)
    assert (inside != (m == 1)).float().mean() < .002 and m.min() == 0
    share = lambda w, l: w*l/64
    assert (m > 0).float().mean() == pytest.approx(share(2, 4.5)+(2*.5*6.5+np.pi*.25)/64, abs=.003)     # a rounded margin
    hard = crop_mask(p, b[None], CropConfig(extent=8., size=160, heading_up=heading_up, mask_margin=0.))[0]
    assert set(hard.unique().tolist()) == {0., 1.} and hard.mean() == pytest.approx(share(2, 4.5), abs=.003)
    got = crop(torch.ones(1, 3, *GRID.nx[:2]), b, cfg=cfg)[0]
    assert torch.allclose(got, m.expand(3, -1, -1), atol=1e-5)

def test_masks_leak_the_size_and_plain_crops_do_not():
    raster = torch.rand(1, 5, *GRID.nx[:2])
    for mask in (False, True):
        a, b = crop(raster, box(yaw=.7), box(yaw=.7, w=.6, l=1.8), cfg=CropConfig(extent=6., size=24, mask=mask))
        assert torch.equal(a, b) is not mask
    with pytest.raises(ValueError, match='mask_margin must be'): CropConfig(mask_margin=-1)
