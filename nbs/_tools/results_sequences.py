#!/usr/bin/env python
"""What is a tracklet worth? Rank-1 against its length, for every distance, aligned and not, raw and after learning

    python nbs/_tools/results_sequences.py                                   simulated passes, five seeds; writes results/sequences.json (5 CPU minutes)
    python nbs/_tools/results_sequences.py --run RUN ... --dataset DATASET   also tracklets of trained networks' held-out vehicles: runs of several seeds
    python nbs/_tools/results_sequences.py --quick --out FILE                small sizes, to see that it works

(a) Simulated passes (`bev_reid.sequence_learning.simulate_passes`): 500 test vehicles pass twice, the first pass asks, the second passes are the
gallery. Another seed is another world, with other vehicles to train on (1,500), to choose the state by (500) and to test on. `aligned`: both
passes begin at about the same angle; `unaligned`: up to 90 degrees apart, in training too. Weights of the simulation: chosen once, in a world
with another seed (1000), so that the mean of five raw pairs finds 84 % when aligned, as in the published pilot's setting.

Learning: a linear projection, the identity at the start; every value as published (SequenceRecipe: windows of 5, margin 0.3162, batch of 16,
learning rate 1e-3, weight decay 1e-3, 1,000 negatives looked at, 10 used), 10 epochs at the most, and as published the state of the best
Recall@5 (mean of pairs) on validation vehicles counts. Nothing was tuned on what is reported.

(b) Trained runs; after `make results` those of one row, `--run demo/standard/runs/conditions_every_condition_s? --dataset demo/standard/data/base`: windows of the
greatest length up to 9 that still leaves 50 queries of 30 vehicles with a match, two seconds and more apart; shorter tracklets are their middles, so
every length ranks the same queries in the same gallery. Intervals are over vehicles, for one training each.
"""
import argparse, json, os, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bev_reid.fit import FitConfig, plain, write_json
from bev_reid.sequence_learning import SequenceProjection, SequenceRecipe, SequenceSet, encode, load_projection, simulate_passes, train_sequences
from bev_reid.sequences import DISTANCES, tracklet_distances

ROOT, LENGTHS, MOST, ENOUGH = Path(__file__).resolve().parents[2], tuple(range(1, 10)), 9, (50, 30) # queries, vehicles
WAYS = {**{d: dict(distance=d) for d in DISTANCES}, 'mean_of_pairs, by angle': dict(distance='mean_of_pairs', align='angle'), 'mean_of_pairs, all with all': dict(distance='mean_of_pairs', align='none')}
LEARNED = {'loss and mining on single views': ('center', 'center'), 'loss and mining on pairs': ('mean_of_pairs', 'mean_of_pairs'), 'loss and mining on the mean': ('mean_descriptor', 'mean_descriptor'),
           'loss on pairs, mining on single views': ('mean_of_pairs', 'center'), 'loss on single views, mining on pairs': ('center', 'mean_of_pairs')}

def passes(n, part, seed, kind, length=MOST):
    q, r, qa, ra = simulate_passes(n, length, part=part, seed=seed, aligned=kind == 'aligned')
    return torch.from_numpy(q), torch.from_numpy(r), torch.from_numpy(qa), torch.from_numpy(ra)

def middle(x, n): a = x.shape[1]//2-n//2; return x[:, a:a+n]

def rank1(net, data, lengths, ways=WAYS):
    "Rank-1 of each way for each length"
    q, r, *angles = data
    q, r = (F.normalize(x, dim=-1) if net is None else encode(net, x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (q, r))
    me = torch.arange(len(q))
    def one(n, distance, align='time'):
        d = tracklet_distances(middle(q, n), middle(r, n), distance, align=align, angles=tuple(middle(a, n) for a in angles))
        own = d[me, me]                                                       # ties count against the match
        return ((d <= own[:, None]+1e-6).sum(1) == 1).float().mean().item()
    return {w: [one(n, **how) for n in lengths] for w, how in ways.items()}

def learn(kind, seed, loss, mining, sizes, folder):
    "The projection of the best Recall@5 on validation vehicles"
    n, n_val, epochs = sizes['train'], sizes['val'], sizes['epochs']
    q, r, *_ = passes(n, 1, seed, kind, 5); rows, ids = np.arange(5*n).reshape(n, 5), np.arange(n)
    data, val = SequenceSet(q.flatten(0, 1), r.flatten(0, 1), rows, rows, lambda i: ids == i, lambda i: ids != i), passes(n_val, 3, seed, kind, 5)
    def validate(net):
        q, r = (encode(net, x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in val[:2]); d = tracklet_distances(q, r)
        return {'R@5': ((d <= d.diagonal()[:, None]).sum(1) <= 5).float().mean().item()}
    steps = n//16
    recipe = SequenceRecipe(loss=loss, mining=mining, fit=FitConfig(max_steps=epochs*steps, lr=1e-3, weight_decay=1e-3, checkpoint_every=10*steps, eval_every=steps, best_by='R@5', patience=3, log_every=steps, seed=seed))
    out = train_sequences(SequenceProjection(q.shape[2]), data, folder, recipe=recipe, validate=validate)
    return load_projection(folder), out['best']['step']//steps

def one_seed(seed, sizes, lengths):
    "All numbers of one world"
    out = {}
    for kind in ('aligned', 'unaligned'):
        data = passes(sizes['test'], 2, seed, kind); got = dict(raw=rank1(None, data, lengths)); epochs = {}
        for name, (loss, mining) in LEARNED.items():
            with tempfile.TemporaryDirectory() as tmp: net, epochs[name] = learn(kind, seed, loss, mining, sizes, tmp)
            got[name] = rank1(net, data, lengths)
        out[kind] = dict(rank1=got, best_epoch=epochs)
    return out

def spread(v): v = np.asarray(v, dtype=float); return dict(mean=float(v.mean()), sd=float(v.std(ddof=1)) if len(v) > 1 else None, better=int((v > 0).sum()), n=len(v))

def summarise(seeds, lengths):
    "Means and spreads over seeds, and paired differences at a length of 5"
    runs = list(seeds.values()); out = {}; five = list(lengths).index(5)
    for kind in ('aligned', 'unaligned'):
        v = {e: {w: np.array([r[kind]['rank1'][e][w] for r in runs]) for w in WAYS} for e in runs[0][kind]['rank1']}
        curves = {e: {w: dict(mean=x.mean(0).tolist(), sd=x.std(0, ddof=1).tolist() if len(x) > 1 else None) for w, x in ways.items()} for e, ways in v.items()}
        at = lambda e, w: v[e][w][:, five]
        diffs = [dict(a=w, b=b, encoder='raw', **spread(at('raw', w)-at('raw', b))) for b in ('center', 'mean_descriptor') for w in WAYS if w != b]
        diffs += [dict(a=e, b='raw', way=w, **spread(at(e, w)-at('raw', w))) for e in LEARNED for w in WAYS]
        diffs += [dict(a=e, b='loss and mining on single views', way=w, **spread(at(e, w)-at('loss and mining on single views', w))) for e in LEARNED if e != 'loss and mining on single views' for w in WAYS]
        out[kind] = dict(curves=curves, differences=diffs, best_epochs={e: [r[kind]['best_epoch'][e] for r in runs] for e in LEARNED})
    return out

def trained(run, dataset, split='', min_gap=2.):
    "Tracklets of the held-out vehicles of one trained run"
    from bev_reid.dataset import ReIDDataset, held_out_split, trained_features
    from bev_reid.evaluate import bootstrap
    from bev_reid.measure import paired_difference
    from bev_reid.metric import embed, load_metric
    from bev_reid.sequences import dataset_tracklets, rank_tracklets
    from bev_reid.validate import parts
    ck, split = load_metric(run), split or held_out_split(dataset)
    ds = ReIDDataset(dataset, split=split, min_visibility=2, features=trained_features(ck.config))
    emb = torch.cat([embed(ck.net, c) for c in parts(ds, 'crops')]).numpy()
    for most in range(MOST, 1, -1):
        try: t = dataset_tracklets(ds, length=most)
        except ValueError: continue
        n = rank_tracklets(emb, t, distance='center', min_gap=min_gap).to_dict()
        if n['n_queries'] >= ENOUGH[0] and n['n_ids'] >= ENOUGH[1]: break
    else: raise SystemExit(f'{dataset} has no tracklets of two sightings with matches {min_gap:g} s away for {ENOUGH[0]} queries of {ENOUGH[1]} vehicles')
    lengths, rows, diffs = range(1, most+1), [], []
    for n in lengths:
        res = {w: rank_tracklets(emb, t.central(n), junk_by=t, min_gap=min_gap, **how) for w, how in WAYS.items()}
        rows += [dict(length=n, way=w, **r.to_dict(), **{k+'_ci': v for k, v in bootstrap(r).items()}) for w, r in res.items()]
        if n == min(5, most): diffs = [dict(a=w, b=b, length=n, **{k: v for k, v in paired_difference(res[w], res[b])['rank1'].items()}) for b in ('center', 'mean_descriptor') for w in WAYS if w != b]
    return dict(run=str(run), dataset=str(dataset), split=split, longest=most, n_tracklets=len(t), n_tracks=len(set(t.tracks)), min_gap=min_gap, chance=res['center'].chance['rank1'], rows=rows, differences=diffs)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true'); p.add_argument('--out', type=Path, default=ROOT/'results'/'sequences.json'); p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--run', nargs='+'); p.add_argument('--dataset'); p.add_argument('--split', default='', help='of that data set; left out: what it holds out')
    a = p.parse_args(); torch.set_num_threads(1)
    if bool(a.run) != bool(a.dataset): p.error('--run and --dataset go together')
    if a.quick and a.out == ROOT/'results'/'sequences.json': p.error('--quick needs --out: its numbers are not to be kept')
    sizes = dict(train=64, val=40, test=60, epochs=1) if a.quick else dict(train=1500, val=500, test=500, epochs=10)
    lengths, n_seeds = ((1, 5) if a.quick else LENGTHS), (2 if a.quick else a.seeds)
    settings = plain(dict(sizes=sizes, lengths=lengths, recipe=SequenceRecipe(), simulation={k: v for k, v in simulate_passes.__kwdefaults__.items() if k not in ('part', 'seed', 'aligned')}))
    old = json.loads(a.out.read_text()) if a.out.exists() else {}
    seeds, toy = ({k: v for k, v in old['seeds'].items() if int(k) < n_seeds} if old.get('settings') == settings else {}), old.get('trained')
    for s in range(n_seeds):
        if str(s) in seeds: continue
        t = time.process_time(); seeds[str(s)] = one_seed(s, sizes, lengths)
        write_json(a.out, dict(settings=settings, seeds=seeds, trained=toy))             # killed, it goes on with the next seed
        print(f'seed {s}: {time.process_time()-t:.0f} CPU s', file=sys.stderr, flush=True)
    if a.run: toy = [trained(r, a.dataset, a.split) for r in a.run]
    out = dict(settings=settings, summary=summarise(seeds, lengths), seeds=seeds, trained=toy); write_json(a.out, out)
    for kind, v in out['summary'].items():
        print(f'\n{kind}, rank-1 in % (mean over {len(seeds)} seeds), lengths '+' '.join(map(str, lengths)))
        for e, ways in v['curves'].items():
            for w, c in ways.items():
                if e == 'raw' or w in ('mean_of_pairs', 'mean_descriptor'): print(f'  {e:40s}{w:30s}'+' '.join(f'{100*x:5.1f}' for x in c['mean']))
    for t in toy or []:
        print(f"\n{t['run']}: {t['n_tracklets']} tracklets of {t['longest']}, {t['rows'][0]['n_queries']} queries, {t['rows'][0]['n_ids']} vehicles, chance {100*t['chance']:.1f}")
        for w in WAYS: print(f'  {w:30s}'+' '.join(f"{100*r['rank1']:5.1f}" for r in t['rows'] if r['way'] == w))

if __name__ == '__main__': main()
