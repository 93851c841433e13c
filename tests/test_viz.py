"Figures: orientation, clipping, frames, and no side effects"
import math

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb as color2rgb

from bev_reid.geometry import BEVGrid, box_corners, project, rot_z
from bev_reid.viz import (RIGHT, WRONG, box_segments, crop_pics, fig_to_html, id_colors, pca_rgb, rig_layout, show_bev, show_boxes, show_cmc,
                          show_crops, show_curves, show_embeddings, show_img, show_imgs, show_points, show_retrieval, show_rig, to_rgb)

grid = BEVGrid(xbound=(-20, 20, 1), ybound=(-10, 10, 1))
intrins = torch.tensor([[100., 0, 80], [0, 100, 45], [0, 0, 1]])
cam2ego = torch.tensor([[0., 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
size = (90, 160)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def pixels(ax, xy):
    "Where a point of the data lies in the rendered figure; row 0 is the top"
    ax.figure.canvas.draw()
    u, v = ax.transData.transform(xy)
    return u, ax.figure.canvas.get_width_height()[1]-v

def rendered(ax, u, v):
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[round(v), round(u), :3]/255


def test_box_ahead_left_is_upper_left():
    box = torch.tensor([[10., 5, 0, 2, 4, 2, 0]])
    ax = show_bev(torch.zeros(40, 20), grid, boxes=box)
    assert ax.get_xlim() == (10, -10) and ax.get_ylim() == (-20, 20)
    (u, v), (u0, v0) = pixels(ax, box_centre(ax)), pixels(ax, (0, 0))
    assert u < u0 and v < v0

def box_centre(ax): return ax.collections[0].get_paths()[0].vertices[:4].mean(0)

def test_heading_line_points_to_the_front():
    ax = show_bev(None, grid, boxes=torch.tensor([[0., 0, 0, 2, 4, 2, math.pi/2]]))
    centre, nose = ax.collections[1].get_segments()[0]
    assert np.allclose(centre, 0, atol=1e-5) and np.allclose(nose, [2, 0], atol=1e-5)  # data axes are (y, x): it looks left

def test_map_cells_lie_where_the_boxes_are():
    bev = torch.zeros(40, 20)
    bev[30:, 15:] = 1  # ahead, left
    ax = show_bev(bev, grid, cmap='gray')
    assert rendered(ax, *pixels(ax, (8, 18))).mean() > .9
    assert rendered(ax, *pixels(ax, (-8, 18))).mean() < .1
    assert rendered(ax, *pixels(ax, (8, -18))).mean() < .1

def test_crop_is_drawn_as_it_is():
    "Row 0 is ahead and column 0 left (crops.crop_points): the heading points up"
    crop = torch.zeros(3, 8, 8)
    crop[:, :2, :2] = 1  # front left
    assert crop_pics(crop[None])[0][0, 0].tolist() == [1, 1, 1] and crop_pics(crop[None])[0][7, 7].tolist() == [0, 0, 0]
    assert show_crops(crop[None])[0, 0].images[0].origin == 'upper'

def test_crops_and_patches_mix():
    pics = crop_pics([torch.zeros(3, 9, 9, dtype=torch.uint8), torch.rand(64, 8, 8), torch.rand(64, 8, 8), torch.rand(2, 8, 8), torch.rand(1, 5, 5)])
    assert [p.shape for p in pics] == [(9, 9, 3), (8, 8, 3), (8, 8, 3), (8, 8, 3), (5, 5, 3)]

def test_rows_of_crops():
    assert show_crops([torch.rand(2, 5, 8, 8), torch.rand(3, 5, 8, 8)], row_titles=['a', 'b']).shape == (2, 3)
    assert show_crops(torch.rand(5, 2, 8, 8), titles=list('abcde'), ncols=3).shape == (2, 3)
    assert show_crops([[torch.rand(3, 8, 8), torch.rand(3, 9, 9)], [torch.rand(3, 7, 7)]], titles=[['a', 'b'], ['c']]).shape == (2, 2)
    assert show_crops(np.random.rand(5, 4, 8, 8)).shape == (1, 5)


def test_straddling_box_is_cut_at_the_near_plane():
    box = torch.tensor([[0., -2, 1, 2, 6, 2, 0]])  # three metres ahead of the camera, three behind
    seg = box_segments(box, intrins, cam2ego, near=.5)[0]
    whole = ~seg.isnan().any(-1).any(-1)
    assert whole.sum() == 8  # the four edges of the rear are gone
    u = seg[whole][..., 0]
    assert (u > 80).all() and u.max() <= 80+100*3/.5+1e-3  # nothing mirrored, nothing beyond the near plane
    behind = box_segments(torch.tensor([[-9., 0, 1, 2, 4, 2, 0]]), intrins, cam2ego)
    assert behind.isnan().all()

def test_wireframe_ends_are_the_projected_corners():
    box = torch.tensor([[12., 3, 1, 2, 5, 2, .7]])
    uv = project(box_corners(box)[0], intrins, cam2ego)[:, :2]
    assert torch.allclose(box_segments(box, intrins, cam2ego)[0, 0, 0], uv[0], atol=1e-3)

def test_image_augmentation_moves_boxes_and_points_alike():
    aug = torch.tensor([[.5, 0, 0, 3], [0, .5, 0, 7], [0, 0, 1, 0], [0, 0, 0, 1]])
    box = torch.tensor([[12., 0, 1, 2, 5, 2, .7]])
    a, b = box_segments(box, intrins, cam2ego), box_segments(box, intrins, cam2ego, img_aug=aug)
    assert torch.allclose(a*.5+torch.tensor([3., 7]), b, atol=1e-3)
    ax = show_points(show_img(torch.zeros(3, *size)), box[:, :3], intrins, cam2ego, size=size, img_aug=aug)
    uv = project(box[:, :3], intrins, cam2ego)[0, :2]*.5+torch.tensor([3., 7])
    assert np.allclose(ax.collections[0].get_offsets()[0], uv, atol=1e-3)

def test_boxes_out_of_view_draw_nothing():
    ax = show_img(torch.zeros(3, *size))
    show_boxes(ax, torch.tensor([[-9., 0, 1, 2, 4, 2, 0], [5, 40, 1, 2, 4, 2, 0]]), intrins, cam2ego, size=size)
    assert len(ax.collections) == 0
    show_boxes(ax, torch.zeros(0, 7), intrins, cam2ego, size=size)
    show_points(ax, torch.tensor([[-5., 0, 0]]), intrins, cam2ego, size=size)
    assert ax.get_xlim() == (-.5, 159.5) and ax.get_ylim() == (89.5, -.5)

@pytest.mark.parametrize('colors', [None, 'red', (1., 0., 0.), ['red', 'blue'], 'ids'])
def test_box_colours(colors):
    ax = show_img(torch.zeros(3, *size))
    boxes = torch.tensor([[12., 3, 1, 2, 5, 2, .7], [12., -3, 1, 2, 5, 2, .7]])
    show_boxes(ax, boxes, intrins, cam2ego, size=size, labels=['a', 'b'], colors=id_colors([4, 9]) if colors == 'ids' else colors)
    assert len(ax.collections) == 2 and len(ax.texts) == 2


def test_frames_are_green_and_red():
    correct = torch.tensor([[True, False, True]])
    axes = show_retrieval(torch.rand(1, 6, 8, 8), torch.rand(1, 3, 6, 8, 8), correct=correct, dist=torch.tensor([[.1, .2, .3]]))
    assert axes.shape == (1, 4)
    hues = [color2rgb(a.spines['top'].get_edgecolor()) for a in axes[0, 1:]]
    assert hues == [color2rgb(RIGHT), color2rgb(WRONG), color2rgb(RIGHT)]
    assert [a.get_title()[0] for a in axes[0, 1:]] == ['✓', '✗', '✓']
    r, g, _ = color2rgb(RIGHT); assert g > r
    r, g, _ = color2rgb(WRONG); assert r > g

def test_retrieval_with_patches_and_uneven_rows():
    patch = torch.rand(3, 10, 20)
    axes = show_retrieval(torch.rand(2, 3, 8, 8), [torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)], correct=np.array([[1, 0], [1, 0]], bool),
                          patches=([patch, None], [[patch, None], [patch]]))
    assert axes.shape == (4, 3)
    assert [len(a.images) for a in axes.flat] == [1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0]
    assert show_retrieval([patch], [[patch]], correct=[[True]]).shape == (1, 2)


def test_rig_layout_of_any_rig():
    def rig(*degrees):
        pose = torch.eye(4).repeat(len(degrees), 1, 1)
        pose[:, :3, :3] = rot_z(torch.tensor(degrees).float().deg2rad()) @ cam2ego[:3, :3]
        return pose
    assert rig_layout(rig(0)) == [[0]]
    assert rig_layout(rig(180)) == [[0]]
    assert rig_layout(rig(0, 90, -90, 180)) == [[1, 0, 2], [3]]
    assert rig_layout(rig(45, -45, 135, -135, 0)) == [[0, 4, 1], [2, 3]]
    axes = show_rig([np.zeros((4, 6, 3), np.uint8), torch.rand(3, 8, 9)], ['CAM_BACK', 'CAM_FRONT'], cam2ego=rig(180, 0), intrins=intrins.repeat(2, 1, 1),
                    boxes=torch.tensor([[9., 0, 1, 2, 4, 2, 0]]), points=torch.rand(5, 4), ids=['token'])
    assert [a.get_title() for a in axes] == ['back', 'front']
    assert show_rig(torch.rand(4, 3, 5, 5), list('abcd')).shape == (4,)
    with pytest.raises(ValueError, match='intrins'): show_rig(torch.rand(1, 3, 5, 5), ['a'], boxes=torch.zeros(0, 7))


def test_pictures_in_any_form():
    base = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)*8
    for form in (base, base/255., torch.tensor(base).permute(2, 0, 1), torch.tensor(base/255.).permute(2, 0, 1).half(), base.transpose(2, 0, 1)):
        assert np.allclose(to_rgb(form), base/255, atol=1e-3)
    assert to_rgb(np.zeros((2, 4, 4))).shape == (2, 4, 3) and to_rgb(np.zeros((2, 4), bool)).shape == (2, 4, 3)
    assert to_rgb(np.full((2, 4), np.nan)).tolist() == np.full((2, 4, 3), .75).tolist()
    assert to_rgb(np.array([[-np.inf, 2.]])).tolist() == [[[.75]*3, [1.]*3]]

def test_pca_is_joint_stable_and_survives_holes():
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    both = pca_rgb(x)
    assert both.shape == (2, 6, 6, 3) and np.allclose(both[1], pca_rgb(x.flip(0))[0])
    assert np.allclose(pca_rgb(x*3), both)
    x[0, 3, 2, 2] = torch.nan
    assert pca_rgb(x)[0, 2, 2].tolist() == [.75]*3 and np.isfinite(pca_rgb(x)).all()
    assert np.isfinite(pca_rgb(torch.full((8, 3, 3), torch.nan))).all() and np.isfinite(pca_rgb(torch.zeros(2, 3, 3))).all()

@pytest.mark.parametrize('bev', [torch.zeros(40, 20), torch.zeros(1, 40, 20), torch.zeros(2, 40, 20), torch.rand(64, 40, 20).half(), np.full((40, 20), np.nan),
                                 torch.zeros(40, 20, dtype=torch.uint8), torch.zeros(40, 20, dtype=torch.bool), torch.rand(4, 40, 20, requires_grad=True)])
def test_maps_in_any_form(bev):
    show_bev(bev, grid).figure.canvas.draw()

def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match=r'\(40, 20\)'): show_bev(torch.zeros(20, 40), grid)
    with pytest.raises(ValueError, match='empty'): show_crops(torch.zeros(0, 3, 4, 4))
    with pytest.raises(ValueError, match='empty'): show_retrieval(torch.rand(0, 3, 4, 4), torch.rand(0, 1, 3, 4, 4), correct=[])
    with pytest.raises(ValueError, match='3 embeddings but 2 ids'): show_embeddings(torch.rand(3, 4), [1, 2])
    assert plt.get_fignums() == []  # nothing half-drawn is left behind


def test_closes_nothing_and_draws_on_what_it_is_given():
    mine = plt.figure()
    axes = mine.subplots(1, 4)
    before = dict(plt.rcParams)
    assert show_bev(torch.rand(40, 20), grid, ax=axes[0]) is axes[0]
    assert show_cmc({'a': torch.linspace(.5, 1, 30), 'none': []}, ax=axes[1]) is axes[1]
    show_curves({'a': ([0, 1, 2], [1., np.nan, .5])}, log=True, ax=axes[2])
    show_embeddings(torch.rand(20, 2), [f't{i}' for i in range(20)], ax=axes[3])
    assert plt.get_fignums() == [mine.number] and dict(plt.rcParams) == before
    html = fig_to_html(axes)
    assert html.startswith('<img alt=""') and plt.fignum_exists(mine.number)
    assert show_imgs(torch.rand(4, 3, 5, 5), titles=range(4)).shape == (2, 3) and plt.fignum_exists(mine.number)
