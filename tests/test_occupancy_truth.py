"Occupancy labels against a world whose surfaces are known: the toy world's triangles are the truth"
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_tools'))
from occ_truth import agreement, moving_shapes, write_lidarseg

from bev_reid.occ_kernels import OccGrid
from bev_reid.toy import make_toy


@pytest.fixture(scope='session')
def sweep_root(tmp_path_factory):
    "A toy world with sweeps: 1 scene, 8 keyframes, 4 sweeps between two"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith('popen-') else base
    with FileLock(str(base/'toy_sweeps.lock')): return make_toy(base/'toy_sweeps', n_scenes=1, n_samples=8, sweeps=4, img_size=(32, 56), workers=1, seed=3, returns=0)

@pytest.mark.parametrize('grid, least', [('toy', .98), ('occ3d', .98), ('lss', .975)])
def test_labels_agree_with_the_surfaces(sweep_root, grid, least):
    "In the grid `lss` the road lies on the border of two layers: the upper one holds road and the lower half metre of every car, and where the LiDAR saw little road the car outvotes it"
    got = agreement(sweep_root, OccGrid.preset(grid), lidarseg='no')
    assert got['voxels'] > 8000 and got['all'] >= least and got['objects'] >= .98, got

def test_labels_agree_with_point_labels_too(sweep_root, tmp_path):
    root = tmp_path/'labelled'; shutil.copytree(sweep_root, root)
    write_lidarseg(root)
    got = agreement(root, OccGrid.preset('toy'), labelled=True, lidarseg='yes')
    assert got['all'] >= .975 and got['objects'] >= .98, got

def test_moving_vehicle_has_the_shape_of_its_mesh(sweep_root):
    "Points of the whole track, gathered in the frame of the box, lie within 5 cm of the vehicle's triangles"
    rows = moving_shapes(sweep_root)
    assert len(rows) >= 2
    for r in rows: assert r["rms"] < .02 and r["q99"] < .05, list(r.values())
