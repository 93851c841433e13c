"""Sequences: every window of 2,000 query frames against every window of 10,000 reference frames, five frames each, the 100 nearest kept

Against the published evaluation path, restated: for each query a distance of every reference window to it, all frames with all frames
(torch.cdist on a tensor of all windows), of which the diagonal is used, and a sort of all references. The tensor of windows is made
beforehand and not timed. It takes minutes, so it is measured
on fewer queries, each of which costs the same, and its time is multiplied. And against the matrix form with one convolution.
"""
import json, re, subprocess, sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bev_reid.sequences import TrackletDistances, Tracklets, match_tracklets
from bev_reid.routes import match_sequences
from timing import ROOT, interleave, row

L, TOP = 5, 100
OURS, CONV = 'ours', 'product + convolution with the identity + topk, whole matrix'

def drives(n, m, dim, seed=0):
    r = np.random.default_rng(seed)
    return tuple(F.normalize(torch.from_numpy(r.standard_normal((k, dim), dtype=np.float32)), dim=1).numpy() for k in (n, m))

def windows(x): return torch.from_numpy(x).unfold(0, L, 1).transpose(1, 2).contiguous()      # (n-L+1, L, dim)

def per_query(wq, wr):
    "The published way, from tensors of all windows; returns the nearest"
    out = []
    for w in wq:
        d = torch.cdist(wr, w[None].expand(len(wr), -1, -1)).diagonal(dim1=1, dim2=2).mean(1)
        order = torch.argsort(d)[:TOP]; out.append((order+L//2, d[order]))
    return tuple(torch.stack(v) for v in zip(*out))

def by_conv(q, r):
    s = (2-2*torch.from_numpy(q) @ torch.from_numpy(r).T).clamp(min=0).sqrt()
    d = F.conv2d(s[None, None], torch.eye(L)[None, None])[0, 0]/L
    v, i = d.topk(TOP, largest=False); return i+L//2, v

def tracks(n): return Tracklets(np.arange(n*L), np.arange(n+1)*L, np.tile(np.arange(L)*.5, n), None, np.arange(n), np.zeros(n, int), np.arange(n))

def per_tracklet(q, r, n):
    wq, wr = (torch.from_numpy(x).reshape(-1, L, x.shape[1]) for x in (q, r)); out = []
    for w in wq[:n]: d = torch.cdist(wr, w[None].expand(len(wr), -1, -1)); out.append(((d.amin(1).mean(1)+d.amin(2).mean(1))/2).sort()[0][:TOP])
    return torch.stack(out)

MEMORY = '''
import sys; sys.path.insert(0, 'nbs/_tools/bench')
import part_sequences as p; import torch; torch.set_num_threads(1)
how, *size = sys.argv[1:]; q, r = p.drives(*map(int, size))
p.match_sequences(q[:64], r[:256], length=p.L)                                   # what the libraries need for themselves
open('/proc/self/clear_refs', 'w').write('5')                                    # forget the peak so far
before = p.resident()
p.match_sequences(q, r, length=p.L, top=p.TOP) if how == 'ours' else p.by_conv(q, r); print(p.resident()-before)
'''
def resident(): return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
def peak(*args): return float(subprocess.run([sys.executable, '-c', MEMORY, *map(str, args)], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()[-1])

def times(n): return lambda t: {k: v*n if k.endswith('_s') else v for k, v in t.items()}

def rows(quick, say):
    torch.set_num_threads(1); out = []
    for n, m, dim, few in ((300, 2000, 128, 6),) if quick else ((2000, 10000, 128, 12), (400, 10000, 4096, 2)):
        say(f'{n:,} x {m:,} frames, {dim} numbers')
        q, r = drives(n, m, dim); k = n-L+1
        got = match_sequences(q, r, length=L, top=TOP); wq, wr = windows(q[:few+L-1]), windows(r); at, d = per_query(wq, wr)
        assert np.abs(got.dist[:few]-d.numpy()).max() < 1e-4 and (got.index[:few, 0] == at[:, 0].numpy()).all()
        at, d = by_conv(q, r); assert np.abs(got.dist-d.numpy()).max() < 1e-4 and (got.index == at.numpy()).mean() > .99
        plain = f'published evaluation path: cdist of windows per query ({few} of the queries, times {k/few:.0f})'
        t = interleave({OURS: lambda: match_sequences(q, r, length=L, top=TOP), CONV: lambda: by_conv(q, r), plain: lambda: per_query(wq, wr)}, rounds=3 if dim > 1000 else 7, most_s=4, warm=0 if dim > 1000 else 1)
        t[plain] = times(k/few)(t[plain])
        out.append(row('sequences', f'mean of pairs, {n:,} x {m:,} frames, windows of {L}, {dim} numbers, nearest {TOP} (1 thread)', t, at_least={} if quick else {plain: 100}, measure='cpu_s'))
    say('tracklets')
    a, b = (100, 500) if quick else (200, 10000)
    q, r = drives(a*L, b*L, 128, seed=1); few = 4 if quick else 8; tq, tr = tracks(a), tracks(b)
    def ours(): return match_tracklets(TrackletDistances(q, r, tracklets=(tq, tr), distance='chamfer'), top=TOP)
    assert np.abs(ours()[0][:few]-per_tracklet(q, r, few).numpy()).max() < 1e-3
    plain = f'cdist of tracklets per query ({few} of the queries, times {a/few:.0f})'
    t = interleave({OURS: ours, plain: lambda: per_tracklet(q, r, few)}, rounds=3, warm=0); t[plain] = times(a/few)(t[plain])
    out.append(row('sequences', f'chamfer, {a:,} x {b:,} tracklets of {L}, 128 numbers, nearest {TOP} (1 thread)', t, measure='cpu_s'))
    if sys.platform == 'linux' and not quick:
        say('memory')
        try: small, large, conv = peak('ours', 1000, 10000, 256), peak('ours', 1000, 160000, 256), peak('conv', 1000, 10000, 256)
        except (OSError, subprocess.CalledProcessError): return out                # no leave to forget a peak
        grown = 150000*256*4/2**20
        out.append(row('sequences', 'peak memory above the descriptors, 1,000 x 10,000 frames (1 thread)', {OURS: dict(peak_mb=small), CONV: dict(peak_mb=conv)}, measure='peak_mb',
                       at_most={f'MB more per MB of gallery, for one of 160,000 frames ({grown:.0f} MB larger)': ((large-small)/grown, .15)}, note=f'{large:.0f} MB for 160,000 reference frames'))
    return out
