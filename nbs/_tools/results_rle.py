#!/usr/bin/env python
"""What random linear enhancement is worth: a small synthetic study with paired seeds, written to results/rle.json

    python nbs/_tools/results_rle.py             about twelve CPU minutes on one core; killed and called again it goes on
    python nbs/_tools/results_rle.py --quick     the same road in seconds, for the tests: no number of it means anything

SYNTHETIC, and said so in the title of every table: vehicles seen from above as 24 x 24 pixels of five parts, each of one of four materials.
The gallery is by day. Queries are other views of vehicles that no training has seen, under three conditions:

    day       as the gallery
    linear    one band, in which each material is brighter or darker by a gain of its own: the model behind RLE, to the letter; colour is gone
    night     dim, another gamma, glare and shot noise: breaks the model; colour is kept

Everything was fixed before the first run: amounts of every method at their published values, one network, one length of training, no selection.
A seed draws the vehicles, the gains of the materials, the views, the weights and the batches; all methods of a seed share them, so differences are paired.
"""
import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bev_reid.enhance import Enhance, enhance
from bev_reid.evaluate import evaluate_ranking, lazy_distances
from bev_reid.fit import check_same_config, plain, write_json
from bev_reid.metric import MetricConfig, MetricModel, embed, triplet_loss

ROOT = Path(__file__).resolve().parents[2]
METHODS = 'none', 'grey', 'grey+erasing', 'jitter', 'mrle', 'rrle', 'rle', 'rle+erasing' # the last is the authors' final form
CONDITIONS = 'day', 'linear', 'night'
SETTINGS = {'day': ('day',), 'day and linear': ('day', 'linear')} # what a training sees

@dataclass(frozen=True)
class Study:
    "All that was fixed beforehand"
    seeds:tuple = (0, 1, 2, 3, 4)
    size:int = 24 # Side of a picture, px
    train_ids:int = 100
    test_ids:int = 80
    views:int = 8 # Of each training vehicle, per condition
    gallery:int = 4 # Views of each test vehicle by day
    queries:int = 4 # Views of each test vehicle, per condition
    steps:int = 300
    p:int = 16 # Vehicles per batch
    k:int = 4 # Views of each
    lr:float = 4e-3
    net:MetricConfig = MetricConfig(in_channels=3, crop_size=(24, 24), widths=(8, 16, 32), blocks=1, embedding_dim=64, dropout=0., final_elu=False)

def vehicles(n, rng):
    "Length and width, where the five parts end, and the material and the colour of each"
    cuts = np.sort(rng.uniform(.12, .88, (n, 4)), 1)
    return dict(size=np.stack([rng.uniform(14, 20, n), rng.uniform(7, 10, n)], 1), cuts=cuts, material=rng.integers(0, 4, (n, 5)), colour=rng.uniform(.1, .9, (n, 5, 3)))

def view(cars, i, condition, gains, s, rng):
    "One view of vehicle i (3 s s): another light, another place, noise; then the condition"
    (l, w), y, x = cars['size'][i], *np.meshgrid(np.arange(s)+.5, np.arange(s)+.5, indexing='ij')
    y, x = (y-s/2-rng.uniform(-1.5, 1.5))/l+.5, (x-s/2-rng.uniform(-1.5, 1.5))/w+.5
    part = (y[..., None] > cars['cuts'][i]).sum(-1)
    on = (y > 0) & (y < 1) & (x > 0) & (x < 1)
    street = np.full(3, .35)+rng.uniform(-.05, .05, 3)
    img = np.where(on[..., None], cars['colour'][i][part], street)*rng.uniform(.7, 1.1)
    if condition == 'linear':
        gain = np.where(on, gains[cars['material'][i]][part], gains[4])
        img = np.repeat((img[..., 1]*gain)[..., None], 3, -1)                                   # the green band, times a gain per material
    if condition == 'night':
        cy, cx, r = rng.uniform(0, s, 2).tolist()+[rng.uniform(2, 4)]
        lamp = np.exp(-((np.arange(s)[:, None]+.5-cy)**2+(np.arange(s)[None]+.5-cx)**2)/(2*r*r))
        img = .25*img.clip(0, 1)**1.3+.6*lamp[..., None]
        img = rng.poisson(img.clip(0, None)*120)/120
    return (img+rng.normal(0, .02, img.shape)).clip(0, 1).transpose(2, 0, 1).astype(np.float32)

def pictures(cars, n, condition, gains, cfg, rng):
    "n views of every vehicle, and whose they are"
    ids = np.repeat(np.arange(len(cars['size'])), n)
    return torch.from_numpy(np.stack([view(cars, i, condition, gains, cfg.size, rng) for i in ids])), torch.from_numpy(ids)

def world(seed, cfg):
    "Training and test pictures of a seed"
    rng = np.random.default_rng([seed, 1])
    train, test, gains = vehicles(cfg.train_ids, rng), vehicles(cfg.test_ids, rng), np.exp(rng.uniform(np.log(.3), np.log(1.1), 5))
    return dict(train={c: pictures(train, cfg.views, c, gains, cfg, rng) for c in ('day', 'linear')}, gallery=pictures(test, cfg.gallery, 'day', gains, cfg, rng),
                queries={c: pictures(test, cfg.queries, c, gains, cfg, rng) for c in CONDITIONS})

def run(seed, method, seen, cfg, data):
    "Train with one method, and measure under every condition"
    x, y = (torch.cat([data['train'][c][k] for c in seen]) for k in (0, 1))
    torch.manual_seed(seed); rng, draws = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    model, aug = MetricModel(cfg.net, cfg.train_ids), Enhance('' if method == 'none' else method)
    opt, groups = torch.optim.Adam(model.param_groups(), lr=cfg.lr), [np.flatnonzero(y.numpy() == i) for i in range(cfg.train_ids)]
    model.train()
    for step in range(cfg.steps):
        for g in opt.param_groups: g['lr'] = cfg.lr*min(1, (step+1)/(.1*cfg.steps))*.5*(1+np.cos(np.pi*step/cfg.steps))
        who = rng.choice(cfg.train_ids, min(cfg.p, cfg.train_ids), replace=False)
        at = np.concatenate([rng.choice(groups[i], cfg.k, replace=False) for i in who])
        crops = enhance(x[at], aug, generator=draws)
        emb, label = F.normalize(model.net.raw(crops), dim=1), y[at]
        loss = model.head(emb, label)['loss']+triplet_loss(emb, label).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    def features(v): return embed(model.net, v[0]).numpy()
    g, out = features(data['gallery']), {}
    for c, v in data['queries'].items():
        r = evaluate_ranking(lazy_distances(features(v), g), v[1].numpy(), data['gallery'][1].numpy())
        out[c] = dict(rank1=r.rank(1), mAP=r.mAP)
    return out

def tables(runs, cfg):
    "Mean and spread over the seeds, and paired differences to the baselines"
    rows, diffs = [], []
    def of(s, m, c, k): return np.array([runs[f'{s}|{m}|{seed}'][c][k] for seed in cfg.seeds])
    for s in SETTINGS:
        for m in METHODS:
            for c in CONDITIONS:
                v = {k: of(s, m, c, k) for k in ('rank1', 'mAP')}
                rows.append(dict(training=s, method=m, condition=c, **{k: x.mean() for k, x in v.items()}, **{k+'_std': x.std(ddof=1) for k, x in v.items()}, n_seeds=len(cfg.seeds)))
                for b in ('none', 'grey', 'grey+erasing', 'jitter'):
                    if m in ('mrle', 'rrle', 'rle', 'rle+erasing'):
                        d = v['rank1']-of(s, b, c, 'rank1')
                        diffs.append(dict(training=s, method=m, against=b, condition=c, rank1_diff=d.mean(), rank1_diff_std=d.std(ddof=1), better=int((d > 0).sum()), n_seeds=len(d)))
    return dict(rows=rows, differences=diffs)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='a minute measure of everything'); p.add_argument('--out', type=Path, default=ROOT/'results'/'rle.json')
    a = p.parse_args()
    torch.set_num_threads(1)
    cfg = Study()
    if a.quick: cfg = replace(cfg, seeds=(0, 1), train_ids=12, test_ids=8, views=4, steps=3, p=6, k=2)
    old = json.loads(a.out.read_text()) if a.out.exists() else {}
    if old: check_same_config(old['study'], asdict(cfg), a.out)
    runs, title = old.get('runs', {}), 'SYNTHETIC: vehicles of five parts and four materials, drawn as 24 x 24 pixels'
    for seed in cfg.seeds:
        data = None
        for s, seen in SETTINGS.items():
            for m in METHODS:
                if (key := f'{s}|{m}|{seed}') in runs: continue
                data = data or world(seed, cfg)
                runs[key] = plain(run(seed, m, seen, cfg, data))
                write_json(a.out, dict(title=title, study=plain(cfg), runs=runs))                 # what is done stays done
                print(key, *(f"{c} {100*v['rank1']:.1f}" for c, v in runs[key].items()), flush=True)
    write_json(a.out, dict(title=title, study=plain(cfg), chance=1/cfg.test_ids, **tables(runs, cfg), runs=runs))
    for s in SETTINGS:
        print(f'\n{title}\ntrained on {s}; rank-1 in %, mean (standard deviation) of {len(cfg.seeds)} seeds')
        for r in [r for r in tables(runs, cfg)['rows'] if r['training'] == s]: print(f"{r['method']:14s} {r['condition']:8s} {100*r['rank1']:5.1f} ({100*r['rank1_std']:.1f})")

if __name__ == '__main__': main()
