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
