#!/usr/bin/env python
"""Measures occupancy on a toy world, whose surfaces are known, and writes results/occupancy.json

    python nbs/_tools/results_occupancy.py                        all tables; world and labels are made in demo/occupancy first (WORLD below)
    python nbs/_tools/results_occupancy.py --only reid miou       some tables anew; the others stay as they are in the file
    python nbs/_tools/results_occupancy.py --runs head=RUN        also networks of bev_reid_occ_train, as rows of the mIoU table; --world and --labels say what they were trained on
    python nbs/_tools/results_occupancy.py --quick --out FILE     a small world, to see that it works

agreement  labels against points drawn on the triangles of the scene: voxels that both have occupied
shapes     moving vehicles: points of the whole track against the mesh; and how much of a footprint one sweep, windows and the track cover
reid       what shapes add: every row ranks the same sightings; windows are causal and shorter than the least gap, so no sweep is on both sides (checked)
miou       held-out scenes: empty, majority, and the networks of --runs

Nothing is learned or tuned for `reid`: shape and colour are joined with equal weights.
"""
import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from occ_truth import agreement, moving_shapes, write_lidarseg

from bev_reid.crops import best_patch, image_boxes
from bev_reid.data import DrivingData
from bev_reid.dataset import identities
from bev_reid.evaluate import Observations, all_observations, box_size_features, colour_features, evaluate_all, format_table, junk_mask, position_features
from bev_reid.fit import write_json
from bev_reid.measure import paired_difference
from bev_reid.occ_crops import misplace
from bev_reid.occ_files import OccFolder
from bev_reid.occ_kernels import OccGrid
from bev_reid.occ_scene import OccConfig
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, check_no_leak, shape_descriptor
from bev_reid.occupancy import create_occupancy
from bev_reid.toy import make_toy

ROOT = Path(__file__).resolve().parents[2]
WORLD = dict(n_scenes=10, n_samples=12, sweeps=4, img_size=(112, 200), seed=11)
QUICK = dict(n_scenes=2, n_samples=8, sweeps=4, img_size=(112, 200), seed=3)
WINDOW, GAP = 1., 2.   # seconds of sweeps before a sighting; sightings of one scene nearer than this are not compared

def agreement_table(a):
    "Shares of voxels of the same class, per grid"
    names, at = DrivingData(a.world).scenes[:a.n], (4,) if a.quick else (2, 6)
    def row(grid, root, **kw):
        got = [agreement(root, OccGrid.preset(grid), scene=i, keys=at, **kw) for i in range(len(names))]
        n, m = (np.array([g[k] for g in got]) for k in ('voxels', 'object_voxels'))
        return dict(grid=grid, keyframes=len(got)*len(at), voxels=int(n.sum()), all=float(n @ [g['all'] for g in got]/n.sum()), worst_scene=min(g['all'] for g in got), objects=float(m @ [g['objects'] for g in got]/max(m.sum(), 1)))
    rows = [dict(labels='boxes and height', **row(g, a.world, lidarseg='no')) for g in ('toy', 'occ3d', 'lss')]
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)/'world'; root.mkdir()
        for p in Path(a.world).iterdir(): (shutil.copytree if p.name.startswith('v1.0') else lambda s, d: d.symlink_to(s.resolve()))(p, root/p.name)
        write_lidarseg(root, scenes=len(names))
        rows.append(dict(labels='points of keyframes', **row('toy', root, labelled=True, lidarseg='yes')))
    return rows

def shapes_table(a):
    "Moving vehicles against their meshes, and coverage"
    data, far, cover = DrivingData(a.world), [], {}
    for i, name in enumerate(data.scenes[:a.n]):
        far += [dict(scene=name, **r) for r in moving_shapes(a.world, scene=i)]
        bank = ShapeBank(data, name); last = {}
        for s in bank.sightings(ShapeConfig(window=WINDOW)): last[s.instance_token] = s.sample_token
        for token, sample in last.items():
            for label, s in {'one sweep': bank.sighting(token, sample, ShapeConfig(window=0, min_points=1)), f'{WINDOW:g} s': bank.sighting(token, sample, ShapeConfig(window=WINDOW)), 'whole track': bank.track(token)}.items():
                cover.setdefault(label, []).append(s.coverage if s else 0.)
    q = lambda k: dict(median=float(np.median([r[k] for r in far])), worst=float(max(r[k] for r in far)))
    return dict(vehicles=far, mesh=dict(n=len(far), **{k: q(k) for k in ('rms', 'q50', 'q95', 'q99')}), coverage={k: dict(median=float(np.median(v)), n=len(v)) for k, v in cover.items()})

def sightings(data, names):
    "Every vehicle at every keyframe where a camera sees it and its window has points enough: shapes, patches, places, sizes"
    cfg = ShapeConfig(window=WINDOW); rows = []
    for name in names:
        bank, frames = ShapeBank(data, name), {}
        for s in bank.sightings(cfg):
            one = bank.sighting(s.instance_token, s.sample_token, replace(cfg, window=0, min_points=1))
            f = frames.setdefault(s.sample_token, data.frame(s.sample_token)); k = list(f.instance_tokens).index(s.instance_token)
            rects, _ = image_boxes(f.boxes[k:k+1], f.intrins, f.cam2ego, sizes=f.img_sizes)
            cam = int((rects[0, :, 2:]-rects[0, :, :2]).prod(1).argmax()); imgs = [data.image(p) if c == cam else None for c, p in enumerate(f.img_paths)]
            patch, cam, _ = best_patch(rects[0], imgs)
            if one is None or cam < 0: continue
            world = f.ego2global @ torch.tensor([*f.boxes[k, :3].double().tolist(), 1.], dtype=torch.float64)
            rows.append(dict(one=one, window=s, mirrored=bank.sighting(s.instance_token, s.sample_token, replace(cfg, symmetry=True)), patch=patch.numpy(), xyz=world[:3].numpy(), scene=f.scene_token, time=f.timestamp*1e-6))
    return rows

def reid_table(a):
    "Rankings under the leakage rule"
    data = DrivingData(a.world); rows, ident = sightings(data, data.scenes), identities(data)
    shapes, cfg, rng = [r['window'] for r in rows], ShapeConfig(window=WINDOW), np.random.default_rng(0)
    obs = Observations(ids=[ident[s.instance_token] for s in shapes], frames=[s.sample_token for s in shapes], times=[r['time'] for r in rows], scenes=[r['scene'] for r in rows])
    check_no_leak(shapes, shapes, junk_mask(obs, obs, min_gap=GAP))
    f = {k: np.stack([shape_descriptor(r[k]) for r in rows]) for k in ('one', 'window', 'mirrored')}
    colour, wlh = colour_features([r['patch'] for r in rows]), np.stack([s.wlh for s in shapes])
    off = np.stack([shape_descriptor(misplace(s, rng, cfg)) for s in shapes])
    both = lambda x, y: np.concatenate([v/np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)], 1)
    methods = {'shape, one sweep': f['one'], f'shape, {WINDOW:g} s': f['window'], f'shape, {WINDOW:g} s, mirrored': f['mirrored'], f'shape, {WINDOW:g} s, boxes off by 0.1 m and 3 degrees': off,
               'colour histogram of the patch': colour, f'colour and shape, {WINDOW:g} s': both(colour, f['window']), 'colour and shape, boxes off': both(colour, off),
               'position (nobody moves)': (position_features(np.stack([r['xyz'] for r in rows])), 'euclidean'),
               'box size as annotated (leak)': (box_size_features(wlh), 'euclidean'), 'box size, 5 % noise (leak)': (box_size_features(wlh, noise=.05), 'euclidean')}
    table = evaluate_all(methods, obs, min_gap=GAP, intervals=True)
    res = {k: all_observations(methods[k], obs, min_gap=GAP) for k in ('colour histogram of the patch', f'colour and shape, {WINDOW:g} s', 'colour and shape, boxes off')}
    adds = {k: paired_difference(v, res['colour histogram of the patch']) for k, v in res.items() if k != 'colour histogram of the patch'}
    print(format_table(table)); print(json.dumps(adds, indent=1))
    return dict(window_s=WINDOW, min_gap_s=GAP, sightings=len(rows), rows=[{k: v for k, v in r.items() if k != 'cmc'} for r in table], shape_adds_to_colour=adds)

def miou_table(data, folder, runs=(), *, split='test', masks=('camera', 'none'), device='cpu'):
    "Scores on held-out scenes under each mask; `runs` are pairs of a name and a run of bev_reid_occ_train"
    from bev_reid.occ_model import OccRecipe, baselines, eval_occ, load_occ, occ_samples
    from bev_reid.occ_score import format_scores
    train = [t for t in data.sample_tokens('train') if t in folder]; nets = {n: load_occ(p, device=device) for n, p in runs}
    plain = occ_samples(data, folder, split, next((r for _, r in nets.values()), OccRecipe.recipe('toy', grid=folder.grid))); out = {}
    for mask in masks:
        rows = {n: eval_occ(m, plain, mask=mask) for n, m in baselines(folder, train).items()}
        for n, (m, recipe) in nets.items(): rows[n] = dict(eval_occ(m, occ_samples(data, folder, split, recipe), mask=mask, ignore=recipe.loss.ignore), trained_with_mask=recipe.loss.mask)
        out[mask] = rows; print(format_scores(rows))
    return dict(split=split, train_keyframes=len(train), masks=out)

def miou_section(a): return miou_table(DrivingData(a.world), OccFolder(a.labels), [r.split('=', 1) for r in a.runs])

TABLES = dict(agreement=agreement_table, shapes=shapes_table, reid=reid_table, miou=miou_section)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=TABLES, default=list(TABLES)); p.add_argument('--quick', action='store_true')
    p.add_argument('--world', help='toy world; made where it is missing'); p.add_argument('--labels', help='labels of bev_reid_occ_create; made where they are missing'); p.add_argument('--runs', nargs='*', default=[], help='name=run')
    p.add_argument('--out', type=Path, default=ROOT/'results'/'occupancy.json')
    a = p.parse_args(); kw = QUICK if a.quick else WORLD; base = ROOT/'demo'/('occupancy_quick' if a.quick else 'occupancy')
    a.n = 1 if a.quick else 4
    a.world = Path(a.world) if a.world else make_toy(base/'world', workers=1, **kw)
    own, a.labels = not a.labels, Path(a.labels or base/'labels')
    if 'miou' in a.only and (own or not a.labels.exists()): create_occupancy(DrivingData(a.world), a.labels, OccConfig(grid=OccGrid.preset('toy'), ground=True, camera_mask=2))
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name in a.only:
        t = time.process_time(); got = TABLES[name](a)
        out[name] = dict(world=json.loads((a.world/'v1.0-toy'/'toy.json').read_text()), result=got)
        write_json(a.out, out); print(f'{name}: {time.process_time()-t:.0f} CPU s', flush=True)
        if name in ('agreement', 'shapes'): print(json.dumps(got if name == 'agreement' else {k: v for k, v in got.items() if k != 'vehicles'}, indent=1))

if __name__ == '__main__': main()
