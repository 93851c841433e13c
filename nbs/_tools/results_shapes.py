#!/usr/bin/env python
"""Measures what shapes add beside a learned embedding, under the leakage rule, and writes results/shapes.json

    python nbs/_tools/results_shapes.py            about 45 minutes on one core; interrupted and called again it goes on
    python nbs/_tools/results_shapes.py --list     the commands, without running them
    python nbs/_tools/results_shapes.py --quick    the same road with a tiny world and a few steps: no number of it means anything

One toy world with sweeps, its own splits by scene. Crops, recipe and steps are those of the row "10 m, 0.25 m cells, layers" of results.py; every row differs in what it reads and in nothing else, three seeds each.
The colours of `rgb_lidar` come from images and LiDAR, and `lidar` from LiDAR: the BEV network cuts the crops and says nothing in them, so it is trained for a few steps only.
Three data sets: shapes of a second of sweeps, the same as boxes would show them that are off by 0.1 m and 3 degrees, and shapes of one sweep, which tell what comes from knowing the vehicle's own points alone.
Every step is one of the package's own commands, in a process of its own; runs go to demo/shapes, which git ignores. Nothing is chosen on the held-out scenes; descriptors are joined with equal weights.
Differences are paired: the same queries, seed by seed, and intervals over vehicles.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from results import LAYERS, short, word

from bev_reid.data import DrivingData
from bev_reid.dataset import ReIDDataset, check_crops
from bev_reid.evaluate import RankingResult, all_observations, bootstrap, box_size_features, format_table, position_features
from bev_reid.fit import write_json
from bev_reid.measure import paired_difference, query_strata, stratify
from bev_reid.metric import embed, load_metric
from bev_reid.occ_crops import misplace
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, shape_descriptor
from bev_reid.validate import observations, parts

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 0, 1, 2
WINDOW, GAP, NOISE = 1., 2., (.1, 3.)   # seconds of sweeps; seconds between query and match; metres and degrees
SETS = dict(shaped=['--window', WINDOW], noisy=['--window', WINDOW, '--box-noise', *NOISE], sweep=['--window', 0])
BOTH = 'rgb_lidar', 'lidar'
ROWS = {'shape': ('shaped', ['shape']), 'lidar': ('shaped', ['lidar']), 'lidar + shape': ('shaped', ['lidar', 'shape']),
        'rgb_lidar + lidar': ('shaped', [*BOTH]), 'rgb_lidar + lidar + shape': ('shaped', [*BOTH, 'shape']),
        'rgb_lidar + lidar + shape, boxes off': ('noisy', [*BOTH, 'shape']), 'rgb_lidar + lidar + shape of one sweep': ('sweep', [*BOTH, 'shape'])}
ADDS = [('lidar + shape', 'lidar'), ('rgb_lidar + lidar + shape', 'rgb_lidar + lidar'), ('rgb_lidar + lidar + shape, boxes off', 'rgb_lidar + lidar'), ('rgb_lidar + lidar + shape of one sweep', 'rgb_lidar + lidar'),
        ('rgb_lidar + lidar + shape', 'rgb_lidar + lidar + shape of one sweep'), ('rgb_lidar + lidar, joined with the descriptor', 'rgb_lidar + lidar'), ('rgb_lidar + lidar, joined with the descriptor, boxes off', 'rgb_lidar + lidar')]

def steps(at, quick):
    "Name -> command, in the order in which they can run"
    size = ['--n-scenes', 5, '--n-samples', 8] if quick else ['--n-scenes', 24, '--n-samples', 12]
    out = dict(world=['bev_reid_toy', f'{at}/world', *size, '--sweeps', 4, '--height', 112, '--width', 200, '--seed', 11, '--workers', 1],
               lss=['bev_reid_train_lss', f'{at}/world', f'{at}/lss', '--recipe', 'toy', '--steps', 4 if quick else 20],
               data=['bev_reid_dataset', f'{at}/lss', f'{at}/world', f'{at}/data', '--extent', 10, '--size', 40, '--clip', '--features', *BOTH, '--set', LAYERS])
    for n in SETS: out[n] = ['bev_reid_occ_shapes', f'{at}/world', '--dataset', f'{at}/data', '--out', f'{at}/{n}', *SETS[n]]
    for name, (data, features) in ROWS.items():
        for s in SEEDS[:2] if quick else SEEDS:
            out[f'{name}/{s}'] = ['bev_reid_train', f'{at}/{data}', f'{at}/runs/{word(name)}_s{s}', '--recipe', 'toy', '--steps', 4 if quick else 300, '--features', *features, '--set', f'fit.seed={s}', 'fit.amp=auto']
    return {k: [str(w) for w in c] for k, c in out.items()}

def run(todo, folder):
    "Run every command that has not run as it stands"
    env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive')
    for k, (name, c) in enumerate(todo.items()):
        note = folder/'done'/(word(name)+'.json')
        if note.exists() and json.loads(note.read_text())['command'] == c: continue
        print(f'[{k+1}/{len(todo)}] {name}', flush=True)
        log = folder/'logs'/(word(name)+'.log'); log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, 'a') as f:
            p = subprocess.Popen([str(Path(sys.executable).parent/c[0]), *c[1:]], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(p.pid, 0); p.returncode = status
        if status: raise SystemExit(f'{name} failed: see {log}')
        write_json(note, dict(command=c, cpu=round(used.ru_utime+used.ru_stime, 1)))

def descriptors(ds, data, noise=None):
    "The unlearned descriptor of each observation; zeros where its window has too few points"
    t, out, cfg = ds.table, {}, ShapeConfig(window=WINDOW)
    for name in sorted(set(t['scene_name'])):
        bank = ShapeBank(data, name)
        for i in np.flatnonzero(t['scene_name'] == name):
            s = bank.sighting(t['instance_token'][i], t['sample_token'][i], cfg)
            if s and noise: s = misplace(s, np.random.default_rng(zlib.crc32((s.instance_token+s.sample_token).encode())), cfg, metres=noise[0], degrees=noise[1])
            if s: out[i] = shape_descriptor(s)
    n = len(next(iter(out.values())))
    return np.stack([out.get(i, np.zeros(n)) for i in range(len(ds))])

def joined(a, b):
    "Two embeddings of unit length side by side"
    return np.concatenate([v/np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9) for v in (a, b)], 1)

def stack(results):
    "Seeds one after the other: means are those over seeds, and a draw of a vehicle draws it with all of them"
    return RankingResult(*(np.concatenate([getattr(r, k) for r in results]) for k in ('ids', 'first_hit', 'ap', 'inp', 'n_matches', 'n_allowed')), ks=results[0].ks, settings=results[0].settings)

def measure(at, todo, seeds):
    "All rows on the same held-out observations"
    data, found = DrivingData(ROOT/at/'world'), {}
    def rank(x, ds, metric='cosine'): return all_observations(x, observations(ds), metric=metric, min_gap=GAP)
    base = ReIDDataset(ROOT/at/'shaped', split='test', min_visibility=2); emb = {}
    for name, (where, features) in ROWS.items():
        found[name] = []
        for s in seeds:
            path = ROOT/at/'runs'/f'{word(name)}_s{s}'
            ck, ds = load_metric(path), ReIDDataset(ROOT/at/where, split='test', min_visibility=2, features=features)
            check_crops(ds, ck.config['dataset'], name=path); assert (ds.table['ann_token'] == base.table['ann_token']).all()
            e = torch.cat([embed(ck.net, c) for c in parts(ds, 'crops')]).numpy(); emb[name, s] = e
            found[name].append(rank(e, ds))
    plain = {'shape, nothing learned': descriptors(base, data), 'shape, nothing learned, boxes off': descriptors(base, data, NOISE)}
    for name, x in plain.items():
        end = ', boxes off' if 'off' in name else ''
        found[name] = [rank(x, base)]
        found[f'rgb_lidar + lidar, joined with the descriptor{end}'] = [rank(joined(emb['rgb_lidar + lidar', s], x), base) for s in seeds]
    t = base.table
    found['position (nobody moves)'] = [rank(position_features(np.stack([t[k] for k in ('global_x', 'global_y', 'global_z')], 1)), base, 'euclidean')]
    found['box size, 5 % noise (leak)'] = [rank(box_size_features(np.stack([t[k] for k in ('width', 'length', 'height')], 1), noise=.05), base, 'euclidean')]
    motion, rows, all_of = query_strata(t)['motion'], [], {k: stack(v) for k, v in found.items()}
    for name, r in all_of.items():
        n, w = len(found[name]), all_of[name]
        strata = stratify(w, dict(motion=(np.tile(motion[0], n), motion[1])))
        rows.append(dict(method=name, rank1=w.rank(1), rank5=w.rank(5), mAP=w.mAP, **{k+'_ci': v for k, v in bootstrap(w).items()}, seeds=[dict(rank1=x.rank(1), mAP=x.mAP) for x in found[name]],
                         motion=[{k: v for k, v in x.items() if k in ('part', 'rank1', 'mAP', 'n_ids')} | dict(n_queries=x['n_queries']//n) for x in strata], n_queries=found[name][0].n_queries, n_ids=found[name][0].n_ids))
    adds = [dict(of=a, over=b, **paired_difference(all_of[a], all_of[b])) for a, b in ADDS]
    chance = found['lidar'][0].chance
    rows.append(dict(method='chance', rank1=chance['rank1'], rank5=chance['rank5'], mAP=chance['mAP']))
    made = {n: json.loads((ROOT/at/n/'dataset.json').read_text())['shapes'] for n in SETS}
    summary = json.loads((ROOT/at/'data'/'dataset.json').read_text())
    return dict(window_s=WINDOW, min_gap_s=GAP, box_noise=NOISE, seeds=list(seeds), splits=summary['splits'], test_shapes=int((t['shape_points'] > 0).sum()), test_observations=len(base), shapes=made, rows=rows, adds=adds)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--list', action='store_true', help='print the commands and end'); p.add_argument('--quick', action='store_true', help='a tiny world and a few steps')
    p.add_argument('--out', type=Path, help='file for the numbers')
    a = p.parse_args()
    at = 'demo/shapes_quick' if a.quick else 'demo/shapes'; todo = steps(at, a.quick)
    if a.list: return print(*map(shlex.join, todo.values()), sep='\n')
    out = a.out or (ROOT/at/'shapes.json' if a.quick else ROOT/'results'/'shapes.json')
    run(todo, ROOT/at)
    got = measure(at, todo, SEEDS[:2] if a.quick else SEEDS)
    done = {n: json.loads((ROOT/at/'done'/(word(n)+'.json')).read_text()) for n in todo}
    write_json(out, short(dict(**got, commands=[dict(name=n, command=shlex.join(d['command']), cpu=d['cpu']) for n, d in done.items()], quick=a.quick)))
    print(format_table(got['rows'], columns=('method', 'rank1', 'rank1_ci', 'mAP', 'mAP_ci', 'n_queries', 'n_ids')))
    for d in got['adds']: print(f"{d['of']}, over {d['over']}: "+', '.join(f"{k} {100*d[k]['diff']:+.1f} [{100*d[k]['low']:.1f}, {100*d[k]['high']:.1f}]" for k in ('rank1', 'mAP')))

if __name__ == '__main__': main()
