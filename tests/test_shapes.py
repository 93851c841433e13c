"Shapes in signatures are true: real calls under jaxtyping and beartype, each in a process of its own (the import hook changes modules)"
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('beartype')
root = Path(__file__).resolve().parents[1]

def checked(code, *modules):
    "Run code with the modules' signatures checked at every call"
    head = f"import matplotlib; matplotlib.use('Agg')\nimport torch, numpy as np\nfrom jaxtyping import install_import_hook, TypeCheckError\nhook = install_import_hook({[f'bev_reid.{m}' for m in modules]!r}, 'beartype.beartype')\nhook.__enter__()\n"
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    r = subprocess.run([sys.executable, '-c', head+code], capture_output=True, text=True, env=env, cwd=root)
    assert r.returncode == 0, r.stderr[-3000:]

def test_geometry():
    checked('''
from bev_reid.geometry import *
grid = BEVGrid()
pose = make_pose([1., 0, 0, 0], [1., 2, 3])
assert quat2mat(torch.rand(5, 2, 4)).shape == (5, 2, 3, 3)
boxes, b = torch.rand(6, 7), torch.rand(2, 3, 7)
assert transform_points(torch.rand(9, 3), pose.float()).shape == (9, 3)
assert transform_points(torch.rand(2, 4, 9, 3), torch.eye(4).repeat(2, 4, 1, 1)).shape == (2, 4, 9, 3)
assert inverse_pose(torch.eye(4).repeat(2, 3, 1, 1)).shape == (2, 3, 4, 4)
check_matrix(pose, 'pose'); check_matrix(torch.eye(3), 'k')
assert yaw_of(rot_z(torch.tensor(.3))).shape == () and yaw_of(rot_z(torch.rand(2, 3))).shape == (2, 3)
assert box_corners(b).shape == (2, 3, 8, 3) and box_bev(boxes).shape == (6, 4, 2) and box_bev(boxes[:0]).shape == (0, 4, 2)
assert transform_boxes(boxes, pose.float()).shape == (6, 7) and transform_boxes(boxes[:0], pose.float()).shape == (0, 7)
assert points_in_boxes(torch.rand(4, 3), boxes).shape == (4, 6)
assert cells2metres(metres2cells(torch.rand(4, 2), grid), grid).shape == (4, 2)
k, c2e = torch.eye(3).repeat(2, 6, 1, 1), torch.eye(4).repeat(2, 6, 1, 1)
uvd = project(torch.rand(2, 6, 8, 3), k, c2e, c2e)
assert unproject(uvd, k, c2e).shape == (2, 6, 8, 3) and in_image(uvd, (9, 16)).shape == (2, 6, 8)
f = make_frustum(grid, (90, 160), (6, 10))
assert frustum_geometry(f, k, c2e, c2e, torch.eye(4).repeat(2, 1, 1)).shape == (2, 6, 41, 6, 10, 3)
''', 'geometry')

def test_geometry_refuses_other_shapes():
    checked('''
from bev_reid.geometry import *
for bad in (lambda: transform_points(torch.rand(9, 2), torch.eye(4)), lambda: box_corners(torch.rand(3, 9)), lambda: transform_points(torch.rand(3, 9, 3), torch.eye(4).repeat(2, 1, 1)),
            lambda: points_in_boxes(torch.rand(4, 4), torch.rand(1, 7)), lambda: frustum_geometry(torch.rand(4, 5, 6, 3), torch.rand(2, 6, 3, 3), torch.rand(2, 5, 4, 4))):
    try: bad()
    except TypeCheckError: continue
    raise SystemExit('a wrong shape was taken')
''', 'geometry')

def test_viz():
    checked('''
from bev_reid.geometry import BEVGrid
from bev_reid.viz import *
grid, boxes, k, pose = BEVGrid(xbound=(-8, 8, 1), ybound=(-8, 8, 1)), torch.rand(3, 7)+1, torch.eye(3), torch.eye(4)
assert to_rgb(torch.rand(3, 4, 5)).shape == (4, 5, 3) and id_colors([1, 'a']).shape == (2, 3) and id_colors([]).shape == (0, 3)
ax = show_img(torch.rand(3, 9, 16))
show_boxes(ax, boxes, k, pose, size=(9, 16), img_aug=pose, labels='abc', colors=list(id_colors([1, 2, 3]))); show_boxes(ax, boxes[:0], k, pose, size=(9, 16))
show_points(ax, torch.rand(7, 5), k, pose, size=(9, 16))
show_imgs(torch.rand(4, 3, 9, 16)); show_imgs([np.zeros((4, 5, 3), np.uint8)])
show_rig(torch.rand(2, 3, 9, 16), ['a', 'b'], boxes=boxes, intrins=k.repeat(2, 1, 1), cam2ego=pose.repeat(2, 1, 1), points=torch.rand(5, 4), ids=[1, 2, 3])
show_bev(torch.rand(6, 16, 16), grid, boxes=boxes, ids=['a', 'b', 'c'], points=torch.rand(5, 4)); show_bev(None, grid)
show_crops(torch.rand(3, 6, 8, 8), titles=list('abc')); show_crops([torch.rand(2, 6, 8, 8), torch.rand(1, 6, 8, 8)])
show_retrieval(torch.rand(2, 6, 8, 8), torch.rand(2, 3, 6, 8, 8), correct=torch.ones(2, 3, dtype=torch.bool), dist=torch.rand(2, 3))
show_cmc({'a': torch.rand(9)}); show_curves({'a': (range(3), [1., 2, 3])}); show_embeddings(torch.rand(5, 8), list('aabbc'))
assert fig_to_html(ax.figure).startswith('<img')
''', 'geometry', 'viz')

def test_bev_pool():
    checked('''
from bev_reid.geometry import BEVGrid
from bev_reid.bev_pool import bev_pool, make_plan
grid = BEVGrid(xbound=(-4, 4, 1), ybound=(-4, 4, 1))
geom = torch.rand(2, 3, 4, 5, 6, 3)*10-5
plan = make_plan(geom, grid)
assert bev_pool(torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 7, 5, 6), plan).shape == (2, 7, 8, 8)
assert bev_pool(torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 7, 5, 6), make_plan(geom+99, grid)).abs().sum() == 0
''', 'geometry', 'bev_pool')

def test_crops():
    checked('''
from bev_reid.geometry import BEVGrid
from bev_reid.crops import CropConfig, coverage, crop_bev, crop_points, image_boxes
grid, cfg, boxes, k = BEVGrid(), CropConfig(size=12), torch.rand(5, 7)+1, torch.tensor([0, 0, 1, 1, 1])
assert crop_points(boxes, cfg).shape == (5, 12, 12, 2)
assert crop_bev(torch.rand(2, 6, 200, 200), boxes, k, grid=grid, cfg=cfg).shape == (5, 6, 12, 12)
assert crop_bev(torch.rand(2, 6, 200, 200), boxes[:0], k[:0], grid=grid, cfg=cfg).shape == (0, 6, 12, 12)
assert coverage(torch.ones(2, 1, 200, 200), boxes, k, grid=grid).shape == (5,)
''', 'geometry', 'crops')

def test_metric():
    checked('''
from bev_reid.metric import CosineMetricNet, CosineSoftmax, MetricConfig, batch_monitors, embed, magnet_loss, triplet_loss
net, crops, y = CosineMetricNet(MetricConfig.toy(in_channels=5, crop_size=(16, 16))), torch.rand(6, 5, 16, 16), torch.tensor([0, 0, 1, 1, 2, 2])
emb = net(crops)
assert emb.shape == (6, 64) and embed(net, crops.numpy()).shape == (6, 64) and embed(net, crops[:0]).shape == (0, 64)
assert triplet_loss(emb, y).shape == (6,) and magnet_loss(emb, y).shape == (6,)
batch_monitors(emb, y)
''', 'metric')

def test_evaluate():
    checked('''
from bev_reid.evaluate import Observations, all_observations, distances, evaluate_ranking, junk_mask, position_features
x = np.random.rand(9, 4)
ids, frames = np.arange(9) % 3, np.array([f's{i//3}' for i in range(9)])
assert distances(x, x[:5]).shape == (9, 5) and distances(torch.rand(3, 4), torch.rand(2, 4), metric='euclidean').shape == (3, 2)
obs = Observations(ids, frames, np.arange(9)//3*3., np.array(['a']*9))
assert junk_mask(obs, obs).shape == (9, 9) and position_features(np.random.rand(9, 3)).shape == (9, 2)
evaluate_ranking(distances(x, x), ids, ids, junk=np.eye(9, dtype=bool))
all_observations(x, obs).to_dict()
''', 'evaluate')


def test_losses():
    checked('''
from bev_reid.losses import LOSSES, batch_monitors, first_turn, magnet_loss, metric_loss, triplet_loss
emb, y = torch.nn.functional.normalize(torch.rand(6, 8)), torch.tensor([0, 0, 1, 1, 2, 2])
for name in LOSSES: assert metric_loss(name, 3, 8)(emb, y)['loss'].shape == ()
assert triplet_loss(emb, y).shape == (6,) and magnet_loss(emb, y).shape == (6,) and len(first_turn(1., steps=2)) == 2
batch_monitors(emb, y)
''', 'losses')


def test_augment():
    checked('''
from bev_reid.augment import CropAug, augment_crops
for n in (0, 1, 5): assert augment_crops(torch.rand(n, 3, 8, 8), CropAug(flip=.5, shift=1., turn=9., erase=.5, noise=.1), extent=8., generator=torch.Generator()).shape == (n, 3, 8, 8)
''', 'augment')
