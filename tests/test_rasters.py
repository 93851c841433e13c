"""Maps made of points alone: every point in its cell, in front in front and left on the left, and no colour on what is hidden."""
import numpy as np
import pytest
import torch

from bev_reid.crops import CropConfig, crop_bev
from bev_reid.data import DrivingData
from bev_reid.geometry import BEVGrid, points_in_boxes
from bev_reid.rasters import *
from bev_reid.rasters import LIDAR_CHANNELS, cell_index

GRID = BEVGrid((-16, 16, .5), (-8, 8, .5))
FRONT = torch.tensor([[0., 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])           # 1.5 m high, looks ahead
BACK = torch.tensor([[0., 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
K = torch.tensor([[60., 0, 59.5], [0, 60, 39.5], [0, 0, 1]])

def lidar(*rows, **kw): return lidar_bev(torch.tensor(rows).reshape(-1, 4), GRID, cfg=RasterConfig(**kw))

def cell(x, y): return tuple(round(float(v)) for v in ((x+16)/.5-.5, (y+8)/.5-.5))

@pytest.mark.parametrize('x, y', [(10.3, 5.2), (10.3, -5.2), (-10.3, 5.2), (-15.9, -7.9), (15.9, 7.9)])
def test_a_point_lands_where_it_lies(x, y):
    got = lidar((x, y, 1., 100.))
    assert got.shape == (4, 64, 32) and got[3].nonzero().tolist() == [list(cell(x, y))]

def test_channels():
    "Highest, mean, intensity, density by hand; a bridge is left out, what lies below the range counts as its floor"
    got = dict(zip(LIDAR_CHANNELS, lidar((2.2, 1.2, 0., 0.), (2.2, 1.2, 2., 255.), (2.2, 1.2, -4., 510.), (2.2, 1.2, 5.5, 9.))[(slice(None), *cell(2.2, 1.2))].tolist()))
    assert got == pytest.approx(dict(height_max=.5, height_mean=(1+3+0)/18, intensity=2/3, density=np.log(4)/np.log(65)), abs=1e-6)
    assert lidar((2.2, 1.2, 0., 0.), height=(0., 4.), max_density=1.)[(slice(None), *cell(2.2, 1.2))].tolist() == [0, 0, 0, 1]

def test_outside_and_nothing():
    assert not lidar((16.1, 0., 0., 9.), (0., -8.1, 0., 9.)).any() and not lidar().any()
    rgb = rgb_lidar_bev(torch.zeros(0, 5), torch.ones(1, 3, 80, 120), GRID, intrins=K[None], cam2ego=FRONT[None])
    assert rgb.shape == (4, 64, 32) and not rgb.any()

def test_order_of_the_points_does_not_show():
    g = torch.Generator().manual_seed(0)
    pts = torch.rand(5000, 5, generator=g)*torch.tensor([32, 16, 3, 255, 1.])-torch.tensor([16., 8, 0, 0, 0])
    order, img = torch.randperm(5000, generator=g), torch.rand(2, 3, 80, 120, generator=g)
    kw = dict(intrins=K.expand(2, 3, 3), cam2ego=torch.stack([FRONT, BACK]))
    assert torch.equal(lidar_bev(pts, GRID), lidar_bev(pts[order], GRID))
    assert torch.equal(rgb_lidar_bev(pts, img, GRID, **kw), rgb_lidar_bev(pts[order], img, GRID, **kw))

def colours(*points, imgs=None, **kw):
    if imgs is None: imgs = torch.zeros(2, 3, 80, 120); imgs[0, 0, :, :60], imgs[0, 1, :, 60:], imgs[1, 2] = 1, 1, 1   # ahead: red left, green right; behind: blue
    return rgb_lidar_bev(torch.tensor(points), imgs, GRID, intrins=K.expand(2, 3, 3), cam2ego=torch.stack([FRONT, BACK]), **kw)

@pytest.mark.parametrize('at, want', [((10.2, 3.2), (1, 0, 0)), ((10.2, -3.2), (0, 1, 0)), ((-10.2, 3.2), (0, 0, 1))])
def test_a_point_takes_the_colour_of_the_pixel_that_shows_it(at, want):
    got = colours((*at, 1.))
    assert got[(slice(None, 3), *cell(*at))].tolist() == pytest.approx(want, abs=.002) and 0 < got[(3, *cell(*at))] < 1
    assert int((got[3] > 0).sum()) == 9                                                       # a gap of one cell is filled, no more
    assert not colours((.2, at[1], 1.))[3].any()                                              # beside the cameras nobody sees it

def test_hidden_points_stay_without_colour():
    near, far, ground = (6.2, 1.2, 1.2), (12.2, 2.4, .9), (14.2, -2.2, 0.)
    assert colours(far)[(3, *cell(*far[:2]))] > 0 and colours(near, far)[(3, *cell(*far[:2]))] == 0 and colours(near, far)[(3, *cell(*near[:2]))] > 0
    assert colours(near, far, cfg=RasterConfig(hidden=20.))[(3, *cell(*far[:2]))] > 0
    flat = (13.2, -2.1, 0.)                                                                   # the ground in front hides nothing
    assert colours(flat, ground, cfg=RasterConfig(hidden=.5))[(3, *cell(*ground[:2]))] > 0

def test_image_augmentation():
    "A shrunk and shifted copy of an image with its matrix gives the same colours"
    g = torch.Generator().manual_seed(1)
    img = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 8, generator=g), (80, 120), mode='bilinear')
    pts = torch.rand(300, 3, generator=g)*torch.tensor([10., 8, 2])+torch.tensor([5., -4, 0])
    kw, aug = dict(intrins=K[None], cam2ego=FRONT[None], cfg=RasterConfig(hidden=99.)), torch.eye(4)[None].clone()   # patches move with the cut
    aug[0, 1, 3] = -10.
    a, b = rgb_lidar_bev(pts, img, GRID, **kw), rgb_lidar_bev(pts, img[:, :, 10:], GRID, img_aug=aug, **kw)
    both = (a[3] > 0) & (b[3] > 0)
    assert both.sum() > 50 and (a-b)[:3, both].abs().quantile(.9) < 1e-3

def test_the_toy_world(toy_root):
    "In a crop the points lie as they lie in the box: ahead is up, left is left"
    data = DrivingData(toy_root)
    frame, pts, grid = data.frame(t := data.sample_tokens()[1]), data.lidar(t), BEVGrid((-24, 24, .25), (-24, 24, .25))
    keep = [i for i in frame.num_lidar_pts.argsort(descending=True).tolist() if frame.boxes[i, :2].abs().max() < 18][:5]
    crops = crop_bev(lidar_bev(pts, grid)[None], b := frame.boxes[keep], torch.zeros(5).long(), grid=grid, cfg=CropConfig(extent=8, size=16, clip=True))
    for box, crop, n in zip(b, crops, points_in_boxes(pts[:, :3], b).sum(0)):
        c, s, d = box[6].cos(), box[6].sin(), pts[:, :2]-box[:2]
        ahead, left = d[:, 0]*c+d[:, 1]*s, -d[:, 0]*s+d[:, 1]*c
        want, _ = np.histogramdd(torch.stack([-ahead, -left], 1).numpy(), bins=[np.linspace(-4, 4, 17)]*2)
        got, turned = (np.corrcoef(np.log1p(w).ravel(), crop[3].numpy().ravel())[0, 1] for w in (want, want[::-1, ::-1]))
        assert got > .75 and got > turned+.2, (n, got, turned)

@pytest.mark.parametrize('kw, says', [(dict(height=(2, 1)), 'lowest, highest'), (dict(cell=-1.), 'cell must be'), (dict(sweeps=0), 'sweeps at least 1'), (dict(patch=(4, 0)), 'patch must be')])
def test_bad_settings(kw, says):
    with pytest.raises(ValueError, match=says): RasterConfig(**kw)

def test_grid():
    assert RasterConfig(cell=.25).grid(GRID).nx[:2] == (128, 64) and RasterConfig().grid(GRID) == GRID == RasterConfig().grid(GRID, .5)
    assert [RasterConfig().grid(GRID, w).dx[0] for w in (2., .49, .25, .1)] == [.5, .25, .25, .1] and RasterConfig(cell=.5).grid(GRID, .1) == GRID
    with pytest.raises(ValueError, match='does not divide'): RasterConfig(cell=.3).grid(GRID)
    assert [bool(v) for v in cell_index(torch.tensor([[0., 0], [17, 0]]), GRID)[1]] == [True, False]
