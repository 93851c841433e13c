"""Ranking: CMC, mAP and mINP of 3,000 queries in a gallery of 15,000, from embeddings; memory; many matches; re-ranking

Against sorting, which every common evaluator does. The compiled (Cython) evaluators of the field are not run here: their time
on the machine of our measurements is quoted (CITED), and since they sort with np.argsort, which took 2.49 s of it there,
the time of np.argsort in this run tells what they would take on this machine.
"""
import json, os, re, subprocess, sys
from pathlib import Path

import numpy as np
import torch

from bev_reid.ranking import LazyDistances, camera_junk, rank_matches
from bev_reid.rerank import rerank
from timing import ROOT, interleave, row, target

CITED = dict(ranking=3.14, distances=.23, argsort=2.49)   # CPU seconds, 1 thread: the faster Cython evaluator, the faster distances, np.argsort alone
OURS, FLOOR, SORT, TORCH, COUNT = 'ours, from embeddings', 'distances + np.argsort alone (no evaluation)', 'distances + np.argsort + vectorised NumPy', 'torch: sort in chunks + cumulative sums', 'distances + NumPy counting in chunks'

def market(n_q, n_g, n_ids, *, dim=128, cams=6, seed=0, noise=None):
    "Random unit embeddings with identities and cameras; with noise: around a centre per identity"
    r = np.random.default_rng(seed)
    ids, cam = (tuple(r.integers(0, k, n) for n in (n_q, n_g)) for k in (n_ids, cams))
    x = [r.standard_normal((n, dim), dtype=np.float32) for n in (n_q, n_g)]
    if noise: c = r.standard_normal((n_ids, dim), dtype=np.float32); x = [c[i]+noise*v for i, v in zip(ids, x)]
    for v in x: v /= np.linalg.norm(v, axis=1, keepdims=True)
    return *x, *ids, *cam

def ours(q, g, qi, gi, qc, gc, threads=1):
    r = rank_matches(LazyDistances(q, g), qi, gi, junk=camera_junk(qi, qc, gi, gc), threads=threads)
    return np.nanmean(r.ap), np.nanmean(r.inp), (r.first[r.n_matches > 0] == 1).mean()

def matrix(q, g): return (1-torch.from_numpy(q) @ torch.from_numpy(g).T).numpy()

def from_hits(hits, keep):
    "mAP, mINP and rank-1 of rows of hits in order of distance; `keep` is False for junk"
    place, so_far, hits = keep.cumsum(1), (hits & keep).cumsum(1), hits & keep
    ok = so_far[:, -1] > 0
    ap = np.where(hits, so_far/np.maximum(place, 1), 0).sum(1)[ok]/so_far[ok, -1]
    last = np.where(hits, place, 0).max(1)[ok]; first = np.where(hits, place, place.shape[1]+1).min(1)[ok]
    return ap.mean(), (so_far[ok, -1]/last).mean(), (first == 1).mean()

def merge(parts, weights): return tuple(np.average(p, weights=weights) for p in zip(*parts))

def by_sort(q, g, qi, gi, qc, gc):
    order = np.argsort(matrix(q, g), axis=1); parts, n = [], []
    for i in range(0, len(q), 500):
        o = order[i:i+500]; same = gi[o] == qi[i:i+500, None]
        parts.append(from_hits(same, ~(same & (gc[o] == qc[i:i+500, None])))); n.append(len(o))
    return merge(parts, n)

def by_torch(q, g, qi, gi, qc, gc):
    q, g, qi, gi, qc, gc = (torch.from_numpy(v) for v in (q, g, qi, gi, qc, gc)); parts, n = [], []
    for i in range(0, len(q), 500):
        o = (1-q[i:i+500] @ g.T).sort(dim=1, stable=True).indices
        same = gi[o] == qi[i:i+500, None]; keep = ~(same & (gc[o] == qc[i:i+500, None]))
        place, hits = keep.cumsum(1), same & keep; so_far = hits.cumsum(1); k = so_far[:, -1]
        ap = torch.where(hits, so_far/place.clamp(min=1).double(), 0.).sum(1)/k
        last, first = torch.where(hits, place, 0).amax(1), torch.where(hits, place, place.shape[1]+1).amin(1)
        parts.append((float(ap.mean()), float((k/last.double()).mean()), float((first == 1).double().mean()))); n.append(len(o))
    return merge(parts, n)

def by_count(q, g, qi, gi, qc, gc):
    ap, inp, hit = [], [], []
    for i in range(0, len(q), 256):
        for r, d in enumerate(matrix(q[i:i+256], g), i):
            own = gi == qi[r]; pos, neg = np.sort(d[own & (gc != qc[r])]), d[~own]; k = len(pos)
            if k: rank = np.arange(1, k+1)+[np.count_nonzero(neg <= p) for p in pos]; ap.append((np.arange(1, k+1)/rank).mean()); inp.append(k/rank[-1]); hit.append(rank[0] == 1)
    return np.mean(ap), np.mean(inp), np.mean(hit)

def dense_rerank(q, g, k1=20, k2=6, lam=.3):
    "k-reciprocal re-ranking from its definition, on the matrix of all rows"
    x, n_q = np.concatenate([q, g]), len(q); n = len(x)
    d = np.maximum(matrix(x, x).astype(np.float64), 0)**2; d /= d.max(1, keepdims=True)
    order, V = np.argsort(d, 1, kind='stable'), np.zeros((n, n))
    def recip(i, k): f = order[i, :k+1]; return f[(order[f, :k+1] == i).any(1)]
    for i in range(n):
        own = recip(i, k1); grown = [own]
        for j in own:
            more = recip(j, round(k1/2))
            if len(np.intersect1d(more, own)) > 2/3*len(more): grown.append(more)
        grown = np.unique(np.concatenate(grown)); V[i, grown] = np.exp(-d[i, grown]); V[i] /= V[i].sum()
    V = np.stack([V[order[i, :k2]].mean(0) for i in range(n)])
    m = np.stack([np.minimum(v, V[n_q:]).sum(1) for v in V[:n_q]])
    return (1-lam)*(1-m/(2-m))+lam*d[:n_q, n_q:]

MEMORY = '''
import sys; sys.path.insert(0, 'nbs/_tools/bench')
import part_ranking as p; import torch; torch.set_num_threads(1)
how, *size = sys.argv[1:]; data = p.market(*map(int, size))
open('/proc/self/clear_refs', 'w').write('5')     # forget the peak so far
before = p.resident(); getattr(p, how)(*data); print(p.resident()-before)
'''

def resident():
    "Peak resident memory of this process, MB (ru_maxrss would keep that of the process that started it)"
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def peak(*args): return float(subprocess.run([sys.executable, '-c', MEMORY, *map(str, args)], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()[-1])

def rows(quick, say):
    torch.set_num_threads(1); out = []
    size = (300, 3000, 150) if quick else (3000, 15000, 750)
    data = market(*size); ways = {OURS: lambda: ours(*data), FLOOR: lambda: np.argsort(matrix(*data[:2]), axis=1), SORT: lambda: by_sort(*data), COUNT: lambda: by_count(*data)}
    say(f'{size[0]:,} x {size[1]:,}')
    first = {}
    def keep(name, f):
        def call(): first[name] = f()
        return call
    t = interleave({n: keep(n, f) for n, f in ways.items()}, rounds=3 if quick else 2, warm=int(quick))
    for n in (SORT, COUNT): np.testing.assert_allclose(first[n], first[OURS], atol=2e-6 if quick else 1e-7)   # they order near ties by float32 distances
    cpu = t[OURS]['cpu_s']
    cited = CITED['ranking']+CITED['distances']
    r = row('ranking', f'CMC, mAP and mINP, {size[0]:,} queries x {size[1]:,}, 128 numbers, {size[2]} identities, 6 cameras, 1 thread', t, at_least={FLOOR: 2 if quick else 8, SORT: 3 if quick else 10}, measure='cpu_s',
            note='' if quick else f'the Cython evaluators took {cited:.2f} CPU s where np.argsort took {CITED["argsort"]} s; here distances and np.argsort take {t[FLOOR]["cpu_s"]:.2f} s',
            why={FLOOR: 'distances and argsort alone are the floor of all that sort'})
    if not quick: r['targets'] += [target('at_least', 'times less CPU time than the cited figure of the Cython evaluators', 10, cited/cpu), target('at_least', 'the same, scaled to this machine by np.argsort', 10, cited*(t[FLOOR]['cpu_s']/(CITED['argsort']+CITED['distances']))/cpu)]
    out.append(r)
    if not quick and (os.cpu_count() or 1) > 1:
        t = interleave({'2 threads': lambda: ours(*data, threads=2), '1 thread': lambda: ours(*data)}, rounds=3)
        out.append(row('ranking', 'the same with 2 threads, wall time', t, at_least={'1 thread': 1.5}, why={'1 thread': 'the other core was busy with other work during this run'}))
    part = (data[0][:size[0]//4], data[1], data[2][:size[0]//4], data[3], data[4][:size[0]//4], data[5])
    np.testing.assert_allclose(by_torch(*part), ours(*part), atol=2e-6)
    t = interleave({OURS: lambda: ours(*part), TORCH: lambda: by_torch(*part)}, rounds=2, warm=0)
    out.append(row('ranking', f'{len(part[0]):,} of the queries, 1 thread', t, at_least={TORCH: 3 if quick else 10}, measure='cpu_s'))
    say('many matches')
    many = market(size[0]//6, size[1], 25)
    t = interleave({OURS: lambda: ours(*many), COUNT: lambda: by_count(*many)}, rounds=2)
    np.testing.assert_allclose(by_count(*many), ours(*many), atol=2e-6)
    out.append(row('ranking', f'{len(many[0]):,} queries x {size[1]:,}, {size[1]//25} matches each, 1 thread', t, at_least={COUNT: 2 if quick else 3}, measure='cpu_s'))
    say('re-ranking')
    n = (60, 300, 30) if quick else (150, 1500, 80)
    q, g, qi, gi, _, _ = market(*n, noise=1.5)
    np.testing.assert_allclose(rerank(q, g)(slice(0, 20)), dense_rerank(q, g)[:20], atol=1e-5)
    t = interleave({'ours, neighbours only': lambda: rank_matches(rerank(q, g, threads=1), qi, gi, threads=1), 'matrix of all rows (argsort, dense vectors)': lambda: rank_matches(dense_rerank(q, g), qi, gi, threads=1)}, rounds=1, warm=0)
    out.append(row('ranking', f'k-reciprocal re-ranking and its ranks, {n[0]} queries x {n[1]:,}, 1 thread', t, at_least={'matrix of all rows (argsort, dense vectors)': 3}, measure='cpu_s'))
    if quick: return out
    say('memory')
    if os.access('/proc/self/clear_refs', os.W_OK):
        mb = {n: peak(how, *size) for n, how in ((OURS, 'ours'), (SORT, 'by_sort'))}
        out.append(row('ranking', 'peak memory beside the embeddings, 3,000 x 15,000', {n: dict(wall_s=0, cpu_s=0, peak_mb=v) for n, v in mb.items()}, measure='peak_mb',
                       at_least={SORT: 10}, at_most={'MB': (mb[OURS], 64)}, note=', '.join(f'{n}: {v:.0f} MB' for n, v in mb.items())))
    path = ROOT/'results'/'ranking_scale.json'
    for s in json.loads(path.read_text())['runs'] if path.exists() else []:
        if s['gallery'] >= 1_000_000 and s['kind'] == 'ranking':
            out.append(row('ranking', f"{s['queries']:,} queries x {s['gallery']:,}, {s['threads']} thread(s), recorded by nbs/_tools/bench/ranking_scale.py", {OURS: dict(wall_s=s['wall_s'], cpu_s=s['cpu_s'])}, at_most={'MB, everything': (s['peak_mb'], 2000)}, measure='cpu_s', note=f"peak memory {s['peak_mb']:.0f} MB, {s['features_mb']:.0f} MB of it embeddings"))
    return out
