"""Occupancy: the vote and mIoU against the published ones at 200 x 200 x 16, points in boxes, and one whole scene of 391 sweeps

The plain ways restate what the published loader, metric and converter do: sort rows and count runs, one mask per class, one box
after the other. The scene is written as files first (391 sweeps of the toy town without cameras, point labels at keyframes) and
then labelled from them by `create_occupancy` in a process of its own: tables, sweeps, boxes, map, 40 grids and their files. The
published converter took about 700 CPU s for a scene of this size; that figure is quoted, not measured here.
"""
import json, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bev_reid.occ_kernels import FREE, OccGrid, assign_points, confusion, vote
from timing import PEAK, ROOT, interleave, row

CITED = 700.   # CPU seconds of the published converter for one scene of 391 sweeps

def street(n, seed=0):
    "Points on a road, walls and boxes, with labels"
    r = np.random.default_rng(seed)
    p = np.stack([r.uniform(-50, 50, n), r.uniform(-50, 50, n), r.exponential(.3, n)-1], 1)
    wall = r.random(n) < .3; p[wall, 1] = np.sign(p[wall, 1])*12; p[wall, 2] = r.uniform(-1, 5, wall.sum())
    return p.astype(np.float32), np.where(wall, 15, r.choice([11, 11, 11, 4, 13], n)).astype(np.uint8)

def plain_vote(p, l, grid):
    "The published loader's steps: index, lexsort the rows, count runs (its loop is compiled by Numba; here NumPy counts)"
    i = np.floor((p.astype(np.float64)-grid.low)/grid.voxel).astype(np.int64)
    keep = ((i >= 0) & (i < grid.nx)).all(1)
    rows = np.concatenate([i[keep], l[keep][:, None]], 1); rows = rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 1], rows[:, 0]))]
    run = np.concatenate([[0], np.nonzero((rows[1:] != rows[:-1]).any(1))[0]+1]); n, head = np.diff(np.r_[run, len(rows)]), rows[run]
    cell = np.concatenate([[0], np.nonzero((head[1:, :3] != head[:-1, :3]).any(1))[0]+1]); size = np.diff(np.r_[cell, len(head)])
    best = np.nonzero(n == np.repeat(np.maximum.reduceat(n, cell), size))[0][::-1]                    # backwards: the lowest label of a tie is written last
    out = np.full(grid.nx, FREE, np.uint8); out[tuple(head[best, :3].T)] = head[best, 3]
    return out

def plain_iou(p, t, n=18):
    "The published metric: masks per class, summed by torch"
    iou = []
    for c in range(n):
        seen, right, called = (t == c).sum().item(), ((t == c) & (p == c)).sum().item(), (p == c).sum().item()
        iou.append(right/max(seen+called-right, 1))
    return np.array(iou)

def our_iou(p, t, **kw): c = confusion(p, t, 18, **kw); return np.diag(c)/np.maximum(c.sum(0)+c.sum(1)-np.diag(c), 1)

def plain_boxes(p, boxes):
    "One box after the other over all points"
    owner = np.full(len(p), -1)
    for k, b in enumerate(boxes):
        d = p-b[:3]; c, s = np.cos(b[6]), np.sin(b[6])
        owner[(np.abs(d[:, 0]*c+d[:, 1]*s) <= b[4]/2) & (np.abs(d[:, 1]*c-d[:, 0]*s) <= b[3]/2) & (np.abs(d[:, 2]) <= b[5]/2)] = k
    return owner

def lidar_scene(root, *, n_samples=40, sweeps=9, n_azimuth=1125, seed=0):
    "Write one scene of the toy town for its LiDAR alone, vehicles as boxes, point labels at keyframes; returns the mean number of points of a sweep"
    from bev_reid import toy as T
    from bev_reid.occ_scene import LIDARSEG
    cfg, root, seg, count = T.ToyConfig(n_scenes=1, n_samples=n_samples, sweeps=sweeps, n_azimuth=n_azimuth, seed=seed, returns=0), Path(root), [], []
    sc, rows, rng = T.make_scene(cfg, 0), dict(sample_data=[], ego_pose=[], sample_annotation=[]), np.random.default_rng(seed)
    (local, ring), n = T.lidar_rays(n_azimuth), len(sc.actors); raw_of = np.array([LIDARSEG.index(a.category) for a in sc.actors])
    bodies = [T.box_tris((-l/2, -w/2, .25), (l/2, w/2, h)).reshape(-1, 3) for w, l, h in (a.size for a in sc.actors)]
    for step in range(len(sc.times)):
        near = (np.abs(sc.static[0][:, 0, :2]-sc.ego[step, :2]).max(1) < 110) | (sc.static[2] == T.GROUND)
        tris = [sc.static[0][near], *((b @ T._rot(p[2]).T+[p[0], p[1], 0]).reshape(-1, 3, 3) for b, p in zip(bodies, sc.poses[step]))]
        obj, kind = np.repeat(np.arange(-1, n), [len(t) for t in tris]), np.r_[sc.static[2][near], np.zeros(12*n)]
        pose = T.camera_pose(SimpleNamespace(scene=sc, step=step), 'LIDAR_TOP'); d = local @ np.float32(pose[:3, :3]).T
        hit = T.cast_rays(T._embree(np.concatenate(tris)), np.broadcast_to(np.float32(pose[:3, 3]), d.shape), d)
        ok = (hit['primID'] >= 0) & (hit['tfar'] < 100); at = hit['primID'][ok]; far = hit['tfar'][ok]+rng.normal(0, .008, ok.sum())
        pts = np.concatenate([local[ok]*far[:, None], np.full((len(far), 1), 30.), ring[ok, None]], 1).astype(np.float32); count.append(len(pts))
        key = step % (sweeps+1) == 0; T._sensor_rows(cfg, sc, root, step, 'LIDAR_TOP', key, pts.tobytes(), rows)
        if not key: continue
        T._annotate(cfg, sc, None, step, step//(sweeps+1), np.ones(n), np.ones(n), np.bincount(obj[at][obj[at] >= 0], minlength=n), rows)
        token = rows['sample_data'][-1]['token']; name = f'lidarseg/{token}.bin'; seg.append(dict(token=token, sample_data_token=token, filename=name))
        T._write(root/name, np.where(obj[at] >= 0, raw_of[obj[at]], np.select([kind[at] == T.GROUND, kind[at] == T.LEAF], [24, 30], 28)).astype(np.uint8).tobytes())
    T._chains(cfg, sc, rows); T._write(root/'scenes'/'0000.json', json.dumps(rows).encode()); T._finish(cfg, root)
    (root/T.VERSION/'lidarseg.json').write_text(json.dumps(seg))
    return np.mean(count)

LABEL = """
import json, sys, time
from bev_reid.data import DrivingData
from bev_reid.occ_scene import OccConfig
from bev_reid.occupancy import create_occupancy
t = time.process_time(); create_occupancy(DrivingData(sys.argv[1]), sys.argv[2], OccConfig(**json.loads(sys.argv[3])))
print(time.process_time()-t)
"""

def label(root, out, **cfg):
    "CPU seconds and peak memory (MB) of labelling a data set with one process of one thread"
    import os
    r = subprocess.run([sys.executable, '-c', LABEL+PEAK, str(root), str(out), json.dumps(cfg)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)})
    if r.returncode: raise RuntimeError(r.stderr[-2000:])
    return tuple(map(float, r.stdout.split()[-2:]))

def scene_rows(say):
    with tempfile.TemporaryDirectory() as tmp:
        say('writing a scene of 391 sweeps'); n, out = lidar_scene(f'{tmp}/world'), []
        for name, kw, bound in (('classes from boxes', dict(lidarseg='no', lidar_mask=-1, camera_mask=0), 8), ('classes from point labels', dict(lidarseg='yes', lidar_mask=-1, camera_mask=0), 8), ('classes from boxes, LiDAR mask of 11 keyframes', dict(lidarseg='no', camera_mask=0), None)):
            say(name); cpu, mb = min(label(f'{tmp}/world', f'{tmp}/{len(out)}{i}', **kw) for i in range(2))
            out.append(row('occupancy', f'one scene, 391 sweeps of {n:,.0f} points, 40 keyframes, map of 0.1 m, 200 x 200 x 16 voxels, one core, all files: {name}', {'ours': dict(wall_s=cpu, cpu_s=cpu)}, measure='cpu_s',
                           at_most={'CPU s': (cpu, bound), 'MB at the peak, with the interpreter and its libraries': (mb, 1000)} if bound else {}, note=f'{mb:.0f} MB at the peak; the published converter takes about {CITED:.0f} CPU s, without masks'))
    return out

def rows(quick, say):
    grid, out = OccGrid(), []
    p, l = street(20_000 if quick else 180_000)
    say('vote')
    np.testing.assert_array_equal(vote([(p, l, 0, np.eye(4))], grid)[0], plain_vote(p, l, grid))
    t = interleave({'ours': lambda: vote([(p, l, 0, np.eye(4))], grid), 'sort rows and count runs (the published loader)': lambda: plain_vote(p, l, grid), 'ours, NumPy': lambda: vote([(p, l, 0, np.eye(4))], grid, backend='numpy')}, rounds=5)
    out.append(row('occupancy', f'majority vote, {len(p):,} points, 200 x 200 x 16', t, at_least={'sort rows and count runs (the published loader)': 10}, measure='cpu_s'))
    say('mIoU')
    import torch
    a, b = np.random.default_rng(0).integers(0, 18, (2, *grid.nx)).astype(np.uint8); b = np.where(np.random.default_rng(1).random(grid.nx) < .6, a, b)
    ta, tb = torch.from_numpy(a).long(), torch.from_numpy(b).long(); np.testing.assert_allclose(our_iou(b, a), plain_iou(tb, ta))
    t = interleave({'ours': lambda: our_iou(b, a), 'masks per class (the published metric)': lambda: plain_iou(tb, ta), 'ours, NumPy': lambda: our_iou(b, a, backend='numpy')}, rounds=5)
    out.append(row('occupancy', 'mIoU of a pair, 200 x 200 x 16, 18 classes', t, at_least={'masks per class (the published metric)': 10}, measure='cpu_s'))
    say('boxes')
    q = street(34_688)[0]; r = np.random.default_rng(3); boxes = np.stack([*r.uniform(-45, 45, (2, 69)), np.zeros(69), np.full(69, 1.9), np.full(69, 4.5), np.full(69, 1.7), r.uniform(-3, 3, 69)], 1)
    t = interleave({'ours': lambda: assign_points(q, boxes), 'box by box': lambda: plain_boxes(q, boxes)}, rounds=5)
    out.append(row('occupancy', 'points to boxes, 34,688 points, 69 boxes', t, at_least={'box by box': 10}, measure='cpu_s'))
    return out if quick else out+scene_rows(say)
