"""Occupancy of the toy world by construction: its triangles say what fills each voxel, and what shape a vehicle has

Points are drawn on the triangles of the scene at a keyframe, as densely on a wall as on a car, and vote on the same grid.
What the generator makes of LiDAR sweeps must agree where both are occupied. Tests and results/occupancy.json use it.
"""
import json
from pathlib import Path

import numpy as np

from bev_reid.data import DrivingData
from bev_reid.occ_kernels import FREE, vote, voxel_index
from bev_reid.occ_scene import LIDARSEG, OccConfig, SceneMap, category_class, open_scene, read_splits
from bev_reid.occupancy import label_scene
from bev_reid.toy import GROUND, LEAF, VERSION, _restored, _rot, _token, camera_pose, cast_rays, make_scene, snapshot


def scene_of(root, index=0):
    cfg = _restored(json.loads((Path(root)/VERSION/'toy.json').read_text()))
    return cfg, make_scene(cfg, index)

def on_triangles(tris, per_m2, rng):
    "Points drawn evenly on triangles, and the triangle of each"
    area = np.linalg.norm(np.cross(tris[:, 1]-tris[:, 0], tris[:, 2]-tris[:, 0]), axis=1)/2
    n = rng.poisson(area*per_m2)
    at = np.repeat(np.arange(len(tris)), n); u = rng.random((len(at), 2)); u = np.where(u.sum(1, keepdims=True) > 1, 1-u, u)
    t = tris[at]
    return (t[:, 0]+u[:, :1]*(t[:, 1]-t[:, 0])+u[:, 1:]*(t[:, 2]-t[:, 0])).astype(np.float32), at

def clipped(tris, centre, half):
    "Triangles that reach into a square around the centre, cut small, so that huge ones cost no points outside"
    out, ids = [], []
    todo, who = tris, np.arange(len(tris))
    while len(todo):
        near = ((todo[..., :2].max(1) > centre-half) & (todo[..., :2].min(1) < centre+half)).all(1)
        todo, who = todo[near], who[near]
        small = np.ptp(todo[..., :2], axis=1).max(1) < 20
        out.append(todo[small]); ids.append(who[small]); todo, who = todo[~small], who[~small]
        m = (todo+np.roll(todo, -1, 1))/2
        todo = np.concatenate([np.stack([todo[:, i], m[:, i], m[:, i-1]], 1) for i in range(3)]+[m]); who = np.tile(who, 4)
    return np.concatenate(out), np.concatenate(ids)

def in_sight(sc, steps, points, owner, step):
    "Which points a LiDAR at one of the steps could see; points are those of `step`, in the street's frame, and move with their owners (-1: nobody)"
    seen = np.zeros(len(points), bool)
    for s in steps:
        snap, p = snapshot(sc, s), points.astype(np.float64).copy()
        for i in np.unique(owner[owner >= 0]):
            m, (a, b) = owner == i, (sc.poses[step, i], sc.poses[s, i])
            local = (p[m]-[a[0], a[1], 0]) @ _rot(a[2]); p[m] = local @ _rot(b[2]).T+[b[0], b[1], 0]
        o = camera_pose(snap, 'LIDAR_TOP')[:3, 3]
        todo = np.nonzero(~seen)[0]; d = p[todo]-o; far = np.linalg.norm(d, axis=1); near = far < 100
        todo, d, far = todo[near], d[near], far[near]
        hit = cast_rays(snap.embree, np.broadcast_to(np.float32(o), d.shape), d/far[:, None])
        seen[todo[hit['tfar'] > far-.02]] = True
    return seen

def truth(sc, step, grid, *, labelled, per_m2=80, seed=0):
    "Class and object (numbers of sc.actors, from 1) of each voxel, of all surfaces that the LiDAR passed in sight of"
    rng, centre = np.random.default_rng(seed), sc.ego[step, :2]
    c, s = np.cos(sc.ego[step, 2]), np.sin(sc.ego[step, 2])
    to_ego = np.eye(4); to_ego[:2, :2] = [[c, s], [-s, c]]; to_ego[:2, 3] = -to_ego[:2, :2] @ centre
    half = np.abs([grid.low, grid.high]).max(0)[:2].max()*1.5
    tris, ids = clipped(np.float64(sc.static[0]), centre, half)
    p, at = on_triangles(tris, per_m2, rng); kind = sc.static[2][ids[at]]
    cls = [np.where(kind == GROUND, 11, np.where(kind == LEAF, 16, 15) if labelled else 0).astype(np.uint8)]; p, owner = [p], [np.full(len(p), -1)]
    for i, (a, pose) in enumerate(zip(sc.actors, sc.poses[step])):
        if np.hypot(*(pose[:2]-centre)) > half+10: continue
        q, _ = on_triangles(a.tris, per_m2, rng)
        p.append((q @ _rot(pose[2]).T+[pose[0], pose[1], 0]).astype(np.float32)); owner.append(np.full(len(q), i)); cls.append(np.full(len(q), category_class(a.category), np.uint8))
    p, owner, cls = (np.concatenate(v) for v in (p, owner, cls))
    local = p @ to_ego[:3, :3].T+to_ego[:3, 3]
    inside = voxel_index(local, grid) >= 0
    p, owner, cls = p[inside], owner[inside], cls[inside]
    ok = in_sight(sc, range(0, len(sc.times), 7), p, owner, step)
    order = np.argsort(owner[ok], kind='stable'); p, owner, cls = p[ok][order], owner[ok][order], cls[ok][order]
    cut = np.split(np.arange(len(p)), np.nonzero(np.diff(owner))[0]+1)
    return vote([(p[i], cls[i], owner[i[0]]+1, to_ego) for i in cut], grid)

def agreement(root, grid, *, labelled=False, scene=0, keys=(4,), **kw):
    "Share of voxels, occupied in labels and truth alike, that have the same class: of all, of those that are objects; counts"
    data, (cfg, sc) = DrivingData(root), scene_of(root, scene)
    same = total = same_obj = n_obj = 0
    for k, (_, token, out) in enumerate(label_scene(data, data.scenes[scene], OccConfig(grid=grid, ground=True, lidar_mask=-1, camera_mask=0, **kw))):
        if k not in keys: continue
        sem, ins = truth(sc, k*(cfg.sweeps+1), grid, labelled=labelled)
        both = (sem != FREE) & (out['semantics'] != FREE)
        same, total = same+(sem == out['semantics'])[both].sum(), total+both.sum()
        things = both & (sem > 0) & (sem < 11)
        same_obj, n_obj = same_obj+(sem == out['semantics'])[things].sum(), n_obj+things.sum()
    return dict(all=float(same/total), objects=float(same_obj/max(n_obj, 1)), voxels=int(total), object_voxels=int(n_obj))

def write_lidarseg(root, scenes=1):
    "Point labels of a toy world's keyframes, in the form of nuScenes-lidarseg: every point is cast again and asked what it hit"
    data, rows = DrivingData(root), []
    for name, (cfg, sc) in [(data.scenes[i], scene_of(root, i)) for i in range(scenes)]:
        raw_of = np.array([LIDARSEG.index(a.category) for a in sc.actors])
        for k, token in enumerate(data.sample_tokens(scenes=[name])):
            snap = snapshot(sc, k*(cfg.sweeps+1)); pose = camera_pose(snap, 'LIDAR_TOP')
            sd = data.tables.keyframe(token)[1]['LIDAR_TOP']
            p = np.fromfile(root/sd['filename'], np.float32).reshape(-1, 5)[:, :3]
            d = (p/np.linalg.norm(p, axis=1, keepdims=True)) @ np.float32(pose[:3, :3]).T
            hit = cast_rays(snap.embree, np.broadcast_to(np.float32(pose[:3, 3]), d.shape), d)['primID']
            kind, obj = snap.kind[hit], snap.obj[hit]
            raw = np.where(obj >= 0, raw_of[obj], np.where(kind == GROUND, 24, np.where(kind == LEAF, 30, 28))); raw[hit < 0] = 0
            (root/'lidarseg').mkdir(exist_ok=True); raw.astype(np.uint8).tofile(root/f'lidarseg/{token}.bin')
            rows.append(dict(token=token, sample_data_token=sd['token'], filename=f'lidarseg/{token}.bin'))
    (root/VERSION/'lidarseg.json').write_text(json.dumps(rows))

def moving_shapes(root, *, scene=0, min_points=300, min_way=5.):
    "Distance of every point of a moving vehicle's whole track to its mesh: one row per vehicle, metres"
    from scipy.spatial import cKDTree
    data, (world, sc) = DrivingData(root), scene_of(root, scene)
    cfg = OccConfig(object_cell=.05); s = open_scene(data, data.scenes[scene], cfg); m = SceneMap(s, cfg)
    for _, *part in read_splits(data, s, cfg): m.add(*part)
    actor = {_token(world.seed, sc.name, 'instance', i): a for i, a in zip(sc.ids, sc.actors)}; rows = []
    for k, p in m.finish()[2].items():
        path = s.boxes[s.state[:, k] > 0, k, :2]; way = float(np.linalg.norm(path[-1]-path[0]))
        if len(p) < min_points or way < min_way or not s.tracks[k].category.startswith('vehicle'): continue
        a = actor[s.tracks[k].instance_token]; mesh, _ = on_triangles(a.tris, 8000, np.random.default_rng(0))
        far = cKDTree(mesh-[0, 0, a.size[2]/2]).query(p)[0]
        rows.append(dict(category=a.category, way=way, points=len(p), rms=float(np.sqrt((far**2).mean())), **{f'q{q}': float(np.quantile(far, q/100)) for q in (50, 95, 99, 100)}))
    return rows
