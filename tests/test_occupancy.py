"Occupancy: compiled kernels against NumPy twins, the road from sweeps to labels, files, shapes, scores, verbs"
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bev_reid.data import DrivingData
from bev_reid.occ_files import OccFolder, read_labels
from bev_reid.occ_kernels import FREE, OccGrid, PointMap, _C, assign_points, confusion, trace_rays, vote, voxel_index
from bev_reid.occ_scene import OccConfig, SceneMap, Track, box_pose, boxes_at, open_scene, read_splits, split_sweep, to_box_frame
from bev_reid.occ_score import OccScore, scores
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, check_no_leak, shape_ranking, shared_sweeps
from bev_reid.occupancy import camera_rays, create_occupancy, label_scene

needs_C = pytest.mark.skipif(_C is None, reason='no compiled extension')
rng = np.random.default_rng(0)
CFG = OccConfig(grid=OccGrid.preset('toy'), ground=True, lidar_mask=1, camera_mask=8)

def twins(f):
    a, b = f('cpp'), f('numpy')
    for x, y in zip(a, b): np.testing.assert_array_equal(x, y); assert x.dtype == y.dtype
    return a

# -- kernels
@needs_C
@pytest.mark.parametrize('n', [0, 1, 5000])
@pytest.mark.parametrize('k', [0, 1, 40])
def test_assign_twins(n, k):
    p = rng.uniform(-20, 20, (n, 3)).astype(np.float32)*[1, 1, .1]
    b = np.concatenate([rng.uniform(-20, 20, (k, 2)), rng.uniform(-1, 1, (k, 1)), rng.uniform(.3, 6, (k, 3)), rng.uniform(-4, 4, (k, 1))], 1)
    if k and n: p[:min(k, n)] = b[:min(k, n), :3]                                   # centres, and points on faces
    if k and n > k: b[0, 6] = 0; p[-1] = b[0, :3]+[b[0, 4]/2, 0, 0]
    owner, = twins(lambda s: (assign_points(p, b, margin=.05, clearance=.1, backend=s),))
    for i in np.nonzero(owner >= 0)[0][:200]:
        local = np.abs(to_box_frame(p[i:i+1], b[owner[i]])[0]); w, l, h = b[owner[i], 3:6]/2+.05
        assert (local <= [l+1e-4, w+1e-4, h+1e-4]).all()

@needs_C
def test_map_twins_whatever_the_parts():
    p, l = rng.normal(0, 3, (4000, 3)).astype(np.float32), rng.choice([4, 11, 13, 255], 4000).astype(np.uint8)
    p[:9] = np.float32([[.5, 0, 0], [-.5, 0, 0], [0, 0, 0]]*3)                       # on the borders of cells
    def run(backend, cuts):
        m = PointMap(.5, backend=backend)
        for a in np.split(np.arange(4000), cuts): m.add(p[a], l[a])
        return m.result()
    twins(lambda s: run(s, [1, 2, 2000])); twins(lambda s: run('cpp', [1000] if s == 'cpp' else [17, 900]))
    pts, counts, labels = run('cpp', [])
    assert counts.sum() == 4000 and len(np.unique(np.floor(pts/.5), axis=0)) >= .99*len(pts)

@needs_C
@pytest.mark.parametrize('voxel', [.5, .1])
def test_vote_twins(voxel):
    grid = OccGrid(low=(-4, -3, -1), high=(4, 3, 2), voxel=voxel)                    # few voxels: counted; many: sorted
    parts = []
    for i in range(4):
        m = np.eye(4); a = rng.uniform(-3, 3); m[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]; m[:3, 3] = rng.normal(size=3)
        parts.append((rng.normal(0, 2, (300*(i != 2), 3)).astype(np.float32), rng.choice([4, 10, 11], 300*(i != 2)).astype(np.uint8), [0, 7, 7, 65535][i], m))
    sem, ins = twins(lambda s: vote(parts, grid, backend=s))
    at = [voxel_index(np.asarray(p, np.float64) @ m[:3, :3].T+m[:3, 3], grid) for p, _, _, m in parts]
    for v in rng.permutation(np.unique(np.concatenate(at)))[:300]:
        if v < 0: continue
        c = np.concatenate([l[a == v] for (_, l, _, _), a in zip(parts, at)])
        assert sem.ravel()[v] in c and (c == sem.ravel()[v]).sum() == np.bincount(c).max()      # never a label that nobody gave
    assert sem[ins > 0].min() < FREE and (sem.ravel()[np.setdiff1d(np.arange(grid.size), np.concatenate(at))] == FREE).all()

@needs_C
def test_trace_twins_and_walls():
    grid = OccGrid(low=(-5, -4, -1), high=(5, 4, 2), voxel=.5)
    ends = rng.uniform(-9, 9, (500, 3)).astype(np.float32)
    ends[:5] = [[0, 0, 0], [9, 0, 0], [0, -9, 0], [np.nan, 0, 0], [4.999, 0, 0]]
    rays = [((0, 0, 0), ends), ((-7, .25, .25), ends), ((8, 8, 8), ends[:0]), ((2.5, .5, .5), np.float32([[2.5, .5, .5]]))]
    wall = rng.random(grid.nx) < .1
    for solid in (None, wall): twins(lambda s: (trace_rays(rays, grid, solid=solid, backend=s),))
    line = trace_rays([((-7, .25, .25), np.float32([[9, .25, .25]]))], grid)
    assert line.sum() == grid.nx[0] and line[:, 8, 2].all()
    stop = np.zeros(grid.nx, bool); stop[6, 8, 2] = True
    assert np.argwhere(trace_rays([((-7, .25, .25), np.float32([[9, .25, .25]]))], grid, solid=stop))[:, 0].tolist() == list(range(7))

@needs_C
def test_confusion_twins_and_large_counts():
    p, t, m = rng.integers(0, 18, (3, 20, 20, 7)).astype(np.uint8)
    for mask in (None, m > 9): twins(lambda s: (confusion(p, t, 18, mask=mask, backend=s),))
    with pytest.raises(ValueError, match='18'): confusion(np.uint8([18]), np.uint8([0]), 18)
    score = OccScore(OccGrid(low=(0, 0, 0), high=(2, 2, 2), voxel=1), mask='none')
    score.counts[0, 4, 4] = 2**24
    score.add(np.full((2, 2, 2), 4, np.uint8), dict(semantics=np.full((2, 2, 2), 4, np.uint8))); assert score.counts[0, 4, 4] == 2**24+8

def test_kernels_refuse():
    g = OccGrid(low=(0, 0, 0), high=(2, 2, 2), voxel=1)
    with pytest.raises(ValueError, match='not finite'): assign_points(np.zeros((1, 3)), [[0, 0, 0, 1, np.nan, 1, 0]])
    with pytest.raises(ValueError, match='too far'): PointMap(.1).add([[1e9, 0, 0]])
    with pytest.raises(ValueError, match='shapes differ'): confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 3)
    with pytest.raises(ValueError, match='half a voxel'): OccConfig(map_cell=.3)
    assert vote([], g)[0].min() == FREE and not trace_rays([], g).any()

def test_absent_class_is_not_perfect_and_present_ones_match_the_formula():
    p, t = rng.integers(0, 5, (2, 3000))
    c = confusion(p.astype(np.uint8), t.astype(np.uint8), 5)
    want = [((p == i) & (t == i)).sum()/((p == i) | (t == i)).sum() for i in range(4)]
    assert abs(scores(c)['mIoU']-np.mean(want)) < 1e-12
    c = confusion(np.uint8([0, 4]), np.uint8([0, 4]), 5)
    assert scores(c)['n_classes'] == 1 and np.isnan(scores(c)['iou'][1:4]).all()

# -- boxes in time
def test_no_ghost_after_the_last_annotation():
    "A car that drives on after its last annotation leaves nothing in the world for the time that is held"
    t = np.arange(3)*.5
    track = Track('a', 'vehicle.car', t, np.array([[8*x, 0, 1, 2, 4, 2, 0.] for x in t]))
    for time in (1.2, 1.5):
        box, state = boxes_at(track, [time])
        body = np.float32([[8*time, 0, 1], [8*time+1.8, .9, 1.5]])
        world, _, objects = split_sweep(body, np.full(2, 255, np.uint8), box, state, CFG)
        assert len(world) == 0 and not objects and state[0] == 2
    held = boxes_at(track, [1.5])[0][0, 0]; assert abs(held-12) < 1e-9

def test_rigid_points_come_back_exactly():
    "Points on a turning, driving box, seen at five moments, are the same in its frame"
    shape = rng.uniform(-.9, .9, (200, 3))*[2, 1, .7]
    for t in range(5):
        box = np.array([300.+7*t, 40+t, 1., 2, 4, 2, .4*t])
        world = (shape @ box_pose(box)[:3, :3].T+box_pose(box)[:3, 3]).astype(np.float32)
        np.testing.assert_allclose(split_sweep(world, np.full(200, 255, np.uint8), box[None], np.array([1]))[2][0], shape, atol=1e-4)
