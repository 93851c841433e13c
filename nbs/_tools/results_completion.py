#!/usr/bin/env python
"""A vehicle's whole outline from one sighting, on a toy world; writes results/completion.json

    python nbs/_tools/results_completion.py            a few CPU minutes on one core, and some more to make the worlds; killed and called again it goes on
    python nbs/_tools/results_completion.py --quick    the same road with tiny worlds and a few steps: no number of it means anything
    python nbs/_tools/results_completion.py --show     only print what is in the file

Worlds: a network trains on the scenes of one world (24 scenes, `TRAIN`; two of them, with vehicles of their own, to choose on) and is measured on
the world of results_occupancy.py, all of it, which has another seed: other streets, and other vehicles, since seed and identity decide how a vehicle
looks. So the re-identification here ranks the very sightings of that table.

Everything stands in the frames of the annotated boxes: position and heading are given to every method, the size to none but the one named a leak.
Beside the tracks, which are the target, stand the triangles of the vehicles themselves.

Chosen on the validation scenes, for windows of both lengths together: the learning rate, with short trainings, and the probability from which
on a cell counts as filled, of each network and of the mean shapes alike. Intervals: draws of vehicles with all their sightings.
"""
import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from occ_truth import on_triangles, scene_of
from results_occupancy import GAP, QUICK as QUICK_TEST, WINDOW, WORLD as TEST, sightings

from bev_reid.data import DrivingData
from bev_reid.dataset import identities
from bev_reid.evaluate import Observations, all_observations, bootstrap, format_table, junk_mask
from bev_reid.fit import check_same_config, plain, write_atomic, write_json
from bev_reid.measure import paired_difference
from bev_reid.occ_complete import CompletionPairs, CompletionRecipe, complete, completion_pairs, completion_scores, load_completion, outline, predict_shapes, train_completion
from bev_reid.occ_crops import misplace
from bev_reid.occ_scene import open_scene
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, check_no_leak, shape_descriptor
from bev_reid.toy import _token, make_toy

ROOT = Path(__file__).resolve().parents[2]
TRAIN = dict(TEST, n_scenes=24, seed=12)
QUICK_TRAIN = dict(QUICK_TEST, n_scenes=3, n_samples=4, seed=4)
COVER = (0, .02, .05, .1) # Lower edges of the coverage of the input
CUTS = (.3, .35, .4, .45, .5, .55, .6, .65, .7)

def settings(a):
    "All that was fixed beforehand"
    s = dict(train_world=TRAIN, test_world=TEST, recipe=plain(recipe_of(a)), seeds=[0, 1, 2], steps=a.steps, rates=[1e-3, 3e-3], choice_steps=120, cuts=CUTS, coverage_bins=COVER)
    return plain({**s, 'train_world': QUICK_TRAIN, 'test_world': QUICK_TEST, 'steps': 6, 'choice_steps': 3} if a.quick else s)

def recipe_of(a, lr=3e-3, seed=0, steps=1):
    r = CompletionRecipe(seed=seed, windows=(0., WINDOW))
    return replace(r, fit=replace(r.fit, lr=lr, max_steps=steps, checkpoint_every=100, keep=1, amp='auto'))

def cached(path, make):
    "Pairs from a file, or made and kept"
    if not path.exists():
        p = make(); path.parent.mkdir(parents=True, exist_ok=True)
        def write(f):
            with open(f, 'wb') as o: np.savez_compressed(o, **{k: v for k, v in vars(p).items() if isinstance(v, (np.ndarray, float))})
        write_atomic(path, write)
    with np.load(path) as z: return CompletionPairs(**{k: z[k] if z[k].ndim else float(z[k]) for k in z.files})

def pairs_of(a, data, part, scenes): return cached(a.at/f'pairs_{part}.npz', lambda: completion_pairs((ShapeBank(data, n) for n in scenes), recipe_of(a)))

def by_vehicle(values, ids, *, n=1000, seed=0):
    "Mean over sightings, and the interval of draws of vehicles"
    ok = np.isfinite(values)
    if not ok.any(): return None
    _, i = np.unique(np.asarray(ids)[ok], return_inverse=True); k = i.max()+1
    w = np.random.default_rng(seed).multinomial(k, np.full(k, 1/k), size=n)
    low, high = np.quantile((w @ np.bincount(i, values[ok]))/np.maximum(w @ np.bincount(i), 1), [.025, .975])
    return dict(mean=float(values[ok].mean()), low=float(low), high=float(high), sightings=int(ok.sum()), vehicles=int(k))

# Baselines: what each fills, and its heights

def box_rasters(data, scenes, p):
    "Annotated boxes of the tracks, filled, with their height: the leak"
    n = p.outlines.shape[1:]; at = [np.abs((np.arange(k)+.5-k/2)*.2) for k in n]
    wlh = {t.instance_token: t.boxes[0, 3:6] for s in scenes for t in open_scene(data, s).tracks}
    return np.stack([(at[0][:, None] <= wlh[t][1]/2) & (at[1] <= wlh[t][0]/2) for t in p.instances]), np.stack([np.full(n, wlh[t][2]) for t in p.instances])

def mean_shapes(train, keys=None):
    "Share of the training tracks that fill each cell, and their mean heights; per key where there are keys"
    out = {}
    for k in sorted(set(keys)) if keys is not None else ['']:
        use = np.ones(len(train.instances), bool) if keys is None else keys == k
        h = train.heights[use].astype(np.float32); out[str(k)] = train.outlines[use].mean(0), h.sum(0)/np.maximum((h > 0).sum(0), 1)
    return out

def best_cut(prob, height, val):
    "The cut with the greatest IoU over unseen cells of the validation scenes"
    return max(CUTS, key=lambda c: np.nanmean(completion_scores(prob >= c, height, val)['iou_unseen']))

def baselines(train, val, test, box):
    "Name -> (filled, height) for the test sightings"
    seen, h = test.inputs[:, 0] > 0, test.inputs[:, 1].astype(np.float32)
    turned = seen[..., ::-1] & ~seen; level = h.sum((1, 2))/np.maximum(seen.sum((1, 2)), 1)
    both = np.where(seen, h, np.where(turned, h[..., ::-1], level[:, None, None])); full = np.stack([outline(m) for m in seen | turned])
    out = {'input alone': (seen, h), 'input and its mirror image': (seen | turned, both), 'the same, filled between its borders': (full, both)}
    for name, keys in (('mean training shape', None), ('mean training shape of its category (reads the label)', train.categories)):
        means = mean_shapes(train, keys); whole = mean_shapes(train)['']
        def at(p): got = [means.get(str(c) if keys is not None else '', whole) for c in p.categories]; return (np.stack(v)[p.track] for v in zip(*got))
        cut = best_cut(*at(val), val); prob, height = at(test); out[name] = (prob >= cut, height)
    return {**out, 'annotated box, filled (a leak)': tuple(b[test.track] for b in box)}

def meshes(root, data, p):
    "Outlines of the vehicles' triangles, in the cells of the network"
    n, out = np.array(p.outlines.shape[1:]), {}
    for i in range(len(data.scenes)):
        cfg, sc = scene_of(root, i)
        for k, actor in zip(sc.ids, sc.actors):
            if (t := _token(cfg.seed, sc.name, 'instance', k)) not in set(p.instances): continue
            pts, _ = on_triangles(actor.tris, 400, np.random.default_rng(0)); c = np.floor(pts[:, :2]/.2+n/2).astype(int); m = np.zeros(n, bool); m[tuple(c[((c >= 0) & (c < n)).all(1)].T)] = True
            out[t] = m
    return np.stack([out[t] for t in p.instances])

# The study

def clocked(a, name, f):
    "Run a part, and add its CPU seconds to its clock"
    path = a.at/'cpu.json'; before = json.loads(path.read_text()) if path.exists() else {}
    t = sum(os.times()[:4])                                                       # with those of processes that it starts
    try: return f()
    finally: write_json(path, {**before, name: before.get(name, 0.)+sum(os.times()[:4])-t})

def run_of(a, name, r, train, val): return clocked(a, 'training', lambda: train_completion(train, a.at/'runs'/name, r, val=val, about=dict(world=str(a.train)), device='cpu'))['metrics']

def table(scores, p, ids, s):
    "Means and intervals by window, and by coverage for one sweep"
    out = {}
    for w in sorted(set(p.windows)):
        use = p.windows == w; part = {'all': use}
        for lo, hi in zip(s['coverage_bins'], [*s['coverage_bins'][1:], 2]): part[f'{100*lo:g} to {100*hi:g} %' if hi < 2 else f'{100*lo:g} % or more'] = use & (p.coverage >= lo) & (p.coverage < hi)
        out[f'{w:g}'] = {k: {m: by_vehicle(v[u], ids[u]) for m, v in scores.items()} for k, u in part.items()}
    return out

def reid(s, nets, cuts, test):
    "Descriptors of completed shapes against those of raw ones: the sightings and the protocol of results_occupancy.py"
    whose, cfg, rng = identities(test), ShapeConfig(window=WINDOW), np.random.default_rng(0)
    feats, light, times, scenes = {}, [], [], []
    for name in test.scenes:
        rows = sightings(test, [name]); one, win = [r['one'] for r in rows], [r['window'] for r in rows]
        parts = {'one sweep': one, f'{WINDOW:g} s': win, 'one sweep, boxes off': [misplace(x, rng, replace(cfg, window=0)) for x in one]}
        for k, shapes in parts.items():
            feats.setdefault(k, []).append(np.stack([shape_descriptor(x) for x in shapes]))
            for seed, net in nets.items(): done = complete(net, shapes, cut=cuts[str(seed)]); feats.setdefault(f'{k}, completed|{seed}', []).append(np.stack([shape_descriptor(x) for x in done]))
        light += [replace(x, points=x.points[:0], footprint=None, height=None, voxels=None) for x in complete(nets[s['seeds'][0]], win)]
        times += [r['time'] for r in rows]; scenes += [r['scene'] for r in rows]
    obs = Observations(ids=[whose[x.instance_token] for x in light], frames=[x.sample_token for x in light], times=times, scenes=scenes)
    check_no_leak(light, light, junk_mask(obs, obs, min_gap=GAP))
    f = {k: np.concatenate(v) for k, v in feats.items()}; res = {k: all_observations(v, obs, min_gap=GAP) for k, v in f.items()}
    rows = [dict(method=k, rank1=r.rank(1), mAP=r.mAP, **{f'{m}_ci': v for m, v in bootstrap(r).items()}, n_queries=r.n_queries, n_ids=r.n_ids) for k, r in res.items()]; base = [k for k in f if '|' not in k]
    print(format_table(rows, columns=('method', 'rank1', 'mAP', 'n_queries', 'n_ids')))
    return dict(window_s=WINDOW, min_gap_s=GAP, sightings=len(light), rows=rows, completed_minus_raw={k: [paired_difference(res[f'{k}, completed|{seed}'], res[k]) for seed in s['seeds']] for k in base})

SHOWN = (.1, .4, .7, .95) # So large a share of the sightings is completed better than the one that is shown

def pictures(p, filled, iou):
    "Rasters of held-out vehicles after one sweep, from well completed to badly, of other categories where there are some nearby"
    use = np.flatnonzero((p.windows == 0) & (p.coverage >= .02) & np.isfinite(iou)); order, top, seen = use[np.argsort(-iou[use], kind='stable')], [], set()
    for q in SHOWN:
        near = order[int(q*(len(order)-1)):][:max(1, len(order)//30)]; top.append(next((i for i in near if p.categories[p.track[i]] not in seen), near[0])); seen.add(p.categories[p.track[top[-1]]])
    text = lambda m: [''.join(map(str, r)) for r in np.asarray(m, int)]
    row = lambda i: dict(instance=str(p.instances[p.track[i]]), sample=str(p.samples[i]), category=str(p.categories[p.track[i]]), iou_unseen=float(iou[i]), coverage=float(p.coverage[i]), input=text(p.inputs[i, 0] > 0), predicted=text(np.where(p.inputs[i, 0] > 0, 1, 3*filled[i])), track=text(p.outlines[p.track[i]]))
    return [row(i) for i in top]

def study(a):
    s = settings(a); out = json.loads(a.out.read_text()) if a.out.exists() else {}
    if out: check_same_config(out['settings'], s, a.out)
    out = {**dict(title='TOY WORLD: rendered scenes, frames of annotated boxes', command=' '.join(['python', 'nbs/_tools/results_completion.py', *sys.argv[1:]]), settings=s, choices={}, rows={}), **out}
    def keep(): out['cpu_minutes'] = {k: v/60 for k, v in json.loads((a.at/'cpu.json').read_text()).items()}; write_json(a.out, out)
    clocked(a, 'worlds', lambda: [make_toy(root, workers=1, **{k: tuple(v) if isinstance(v, list) else v for k, v in kw.items()}) for root, kw in ((a.train, s['train_world']), (a.test, s['test_world']))])
    data, test_data = DrivingData(a.train), DrivingData(a.test)
    scenes = dict(val=data.splits()['val'], train=[n for n in data.scenes if n not in data.splits()['val']], test=test_data.scenes)
    val, train, test = (clocked(a, 'pairs', lambda: pairs_of(a, test_data if k == 'test' else data, k, scenes[k])) for k in ('val', 'train', 'test'))
    whose, others = identities(test_data), identities(data); ids = np.array([whose[t] for t in test.instances])[test.track]
    assert not {others[t] for t in val.instances} & {others[t] for t in train.instances} and not set(train.instances) & set(test.instances) and a.train != a.test
    out['counts'] = {k: dict(scenes=len(scenes[k]), vehicles=len(set(p.instances)), sightings=len(p)) for k, p in (('train', train), ('val', val), ('test', test))}; keep()
    for lr in s['rates']:
        if (key := f'{lr:g}') in out['choices']: continue
        run_of(a, f'choice_{key}', recipe_of(a, lr, 1000, s['choice_steps']), train, val); net, _ = load_completion(a.at/'runs'/f'choice_{key}')    # a seed that no final training has
        prob, h = predict_shapes(net, val.inputs); cut = best_cut(prob, h, val)
        out['choices'][key] = dict(lr=lr, steps=s['choice_steps'], cut=cut, val={k: float(np.nanmean(v)) for k, v in completion_scores(prob >= cut, h, val).items()}); keep(); print('choice', key, out['choices'][key], flush=True)
    best = max(out['choices'].values(), key=lambda c: c['val']['iou_unseen']); lr = best['lr']; out['chosen'] = dict(lr=lr, cut={})
    nets, mine, cuts = {}, [], out['chosen']['cut']
    for seed in s['seeds']:
        val_row = run_of(a, f's{seed}', recipe_of(a, lr, seed, s['steps']), train, val); nets[seed], _ = load_completion(a.at/'runs'/f's{seed}')
        cut = cuts[str(seed)] = best_cut(*predict_shapes(nets[seed], val.inputs), val)
        prob, h = clocked(a, 'scores', lambda: predict_shapes(nets[seed], test.inputs)); mine.append((prob >= cut, h, completion_scores(prob >= cut, h, test)))
        out['rows'][f'network|{seed}'] = dict(seed=seed, lr=lr, steps=s['steps'], parameters=sum(p.numel() for p in nets[seed].parameters()), val=val_row, test={f'{w:g}': {k: float(np.nanmean(v[test.windows == w])) for k, v in mine[-1][2].items()} for w in sorted(set(test.windows))}); keep()
        print('seed', seed, out['rows'][f'network|{seed}']['test'], flush=True)
    def scores():
        mean = {k: np.mean([m[2][k] for m in mine], 0) for k in mine[0][2]}                       # of the seeds, per sighting
        base = baselines(train, val, test, box_rasters(test_data, scenes['test'], test)); got = {k: completion_scores(*v, test) for k, v in base.items()}
        for k, v in got.items(): out['rows'][k] = dict(test=table(v, test, ids, s))
        out['rows']['network, mean of the seeds'] = dict(test=table(mean, test, ids, s))
        one = test.windows == 0
        out['differences'] = {k: {m: by_vehicle((mean[m]-v[m])[one], ids[one]) for m in mean} for k, v in got.items()}          # one sweep
        real = replace(test, outlines=meshes(a.test, test_data, test)); tracks = completion_scores(test.outlines[test.track], test.heights[test.track].astype(np.float32), real)
        against = {'whole track (the target)': tracks, **{k: completion_scores(*v, real) for k, v in base.items()}, 'network, mean of the seeds': {k: np.mean([completion_scores(p, h, real)[k] for p, h, _ in mine], 0) for k in ('iou', 'iou_unseen')}}
        out['triangles'] = {k: {m: by_vehicle(v[m][one], ids[one]) for m in ('iou', 'iou_unseen')} for k, v in against.items()}
        out['pictures'] = pictures(test, mine[0][0], mine[0][2]['iou_unseen'])
    clocked(a, 'scores', scores); keep()
    if 'reid' not in out: out['reid'] = clocked(a, 'reid', lambda: reid(s, nets, cuts, test_data)); keep()
    return out

def show(out):
    "The tables, as text"
    num = lambda v: '-' if v is None else f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"; cm = lambda v: '-' if v is None else f"{v['mean']:.1f}"
    text = [f"chosen: {out['chosen']}; {out['counts']}"]
    for w in next(iter(r['test'] for k, r in out['rows'].items() if '|' not in k)):
        text += [f"\nwindow {w} s", format_table([dict(method=k, IoU=num(r['test'][w]['all']['iou']), unseen=num(r['test'][w]['all']['iou_unseen']), cm=cm(r['test'][w]['all']['cm']), cm_unseen=cm(r['test'][w]['all']['cm_unseen'])) for k, r in out['rows'].items() if '|' not in k], columns=('method', 'IoU', 'unseen', 'cm', 'cm_unseen'))]
        bins = [b for b in out['rows']['input alone']['test'][w] if b != 'all']
        text += [f"unseen cells, by coverage of the input; window {w} s", format_table([dict(method=k, **{b: '-' if (v := r['test'][w][b]['iou_unseen']) is None else f"{v['mean']:.3f}" for b in bins}) for k, r in out['rows'].items() if '|' not in k], columns=('method', *bins))]
    text += ['\nagainst the triangles, one sweep', format_table([dict(method=k, IoU=num(v['iou']), unseen=num(v['iou_unseen'])) for k, v in out['triangles'].items()], columns=('method', 'IoU', 'unseen'))]
    text += ['\nnetwork minus baseline, one sweep', format_table([dict(method=k, IoU=num(v['iou']), unseen=num(v['iou_unseen']), cm_unseen=num(v['cm_unseen'])) for k, v in out['differences'].items()], columns=('method', 'IoU', 'unseen', 'cm_unseen'))]
    for k, v in out['reid']['completed_minus_raw'].items(): text.append(f"re-identification, {k}: completed minus raw, of each seed: rank-1 "+', '.join(f"{100*d['rank1']['diff']:+.1f} [{100*d['rank1']['low']:.1f}, {100*d['rank1']['high']:.1f}]" for d in v)+'; mAP '+', '.join(f"{100*d['mAP']['diff']:+.1f} [{100*d['mAP']['low']:.1f}, {100*d['mAP']['high']:.1f}]" for d in v))
    return '\n'.join(text+[f"CPU minutes: { {k: round(v, 1) for k, v in out['cpu_minutes'].items()} }"])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--at', type=Path, default=Path('demo/completion'), help='world to train on, pairs and runs'); p.add_argument('--test', type=Path, default=Path('demo/occupancy/world'), help='the world of results_occupancy.py; made where it is missing')
    p.add_argument('--steps', type=int, default=600, help='of each final training'); p.add_argument('--out', type=Path, default=ROOT/'results'/'completion.json')
    p.add_argument('--quick', action='store_true'); p.add_argument('--show', action='store_true')
    a = p.parse_args(); torch.set_num_threads(1)
    if a.quick:
        a.at = a.at.with_name(a.at.name+'_quick') if a.at == p.get_default('at') else a.at
        a.test, a.out = a.at/'test_world' if a.test == p.get_default('test') else a.test, a.at/'completion.json' if a.out == p.get_default('out') else a.out
    a.train = a.at/'world'
    print(show(json.loads(a.out.read_text()) if a.show else study(a)))

if __name__ == '__main__': main()
