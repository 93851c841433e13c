"""How ranking grows: time and peak memory against the size of the gallery, written to results/ranking_scale.json

    python nbs/_tools/bench/ranking_scale.py                                        10,000 to 1,000,000 (some minutes on one core)
    python nbs/_tools/bench/ranking_scale.py --gallery 1000000 --queries 20000      one size; its row replaces the old one
    python nbs/_tools/bench/ranking_scale.py --rerank 100000                        re-ranking of 1,000 queries in such a gallery

Every run is a process of its own, so that its peak memory is its own. --pieces 4 runs the queries in four processes after one
another and adds up their times; the answer is the mean over all of them. A bar shows the progress.
"""
import argparse, json, os, subprocess, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from timing import ROOT, machine

RUN = '''
import json, re, sys, time
import numpy as np
from bev_reid.ranking import LazyDistances, camera_junk, rank_matches
n_q, n_g, piece, pieces, threads, kind = (*map(int, sys.argv[1:6]), sys.argv[6])
r = np.random.default_rng(0)
n_ids, dim = max(n_g//20, 50), 128
qi, gi = (r.integers(0, n_ids, n) for n in (n_q, n_g)); qc, gc = (r.integers(0, 6, n) for n in (n_q, n_g))
centre = r.standard_normal((n_ids, dim), dtype=np.float32)
def views(ids):
    x = np.empty((len(ids), dim), np.float32)
    for i in range(0, len(ids), 8192):
        v = centre[ids[i:i+8192]]+1.5*r.standard_normal((len(ids[i:i+8192]), dim), dtype=np.float32)
        x[i:i+8192] = v/np.linalg.norm(v, axis=1, keepdims=True)
    return x
g, q = views(gi), views(qi); del centre
part = slice(n_q*piece//pieces, n_q*(piece+1)//pieces)
wall, cpu = time.perf_counter(), time.process_time()
if kind == 'rerank':
    from bev_reid.rerank import rerank
    D = rerank(q[part], g, threads=threads, progress=True)
else: D = LazyDistances(q[part], g)
res = rank_matches(D, qi[part], gi, junk=camera_junk(qi[part], qc[part], gi, gc), threads=threads, progress=True)
wall, cpu = time.perf_counter()-wall, time.process_time()-cpu
ap = res.ap[res.n_matches > 0]
print(json.dumps(dict(wall_s=wall, cpu_s=cpu, peak_mb=int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024, features_mb=(q.nbytes+g.nbytes)/2**20, mAP=float(ap.mean()), n=len(ap))))
'''

def measure(n_q, n_g, threads, pieces, kind):
    got = []
    for p in range(pieces):
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': str(ROOT)}
        r = subprocess.run([sys.executable, '-c', RUN, *map(str, (n_q, n_g, p, pieces, threads, kind))], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        if r.returncode: sys.exit(f'the run of {n_q} x {n_g} failed')
        got.append(json.loads(r.stdout))
    total = lambda k: round(sum(g[k] for g in got), 2)
    return dict(kind=kind, queries=n_q, gallery=n_g, threads=threads, pieces=pieces, wall_s=total('wall_s'), cpu_s=total('cpu_s'), peak_mb=round(max(g['peak_mb'] for g in got)),
                features_mb=round(got[0]['features_mb']), mAP=sum(g['mAP']*g['n'] for g in got)/sum(g['n'] for g in got))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--gallery', type=int, nargs='+', default=[10_000, 100_000, 1_000_000]); p.add_argument('--queries', type=int, default=20_000); p.add_argument('--rerank', type=int, default=0)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--pieces', type=int, default=1); p.add_argument('--out', type=Path, default=ROOT/'results'/'ranking_scale.json')
    a = p.parse_args()
    runs = [measure(1000, a.rerank, a.threads, a.pieces, 'rerank')] if a.rerank else [measure(a.queries, n, a.threads, a.pieces, 'ranking') for n in a.gallery]
    key = lambda r: (r['kind'], r['queries'], r['gallery'], r['threads'])
    old = json.loads(a.out.read_text())['runs'] if a.out.exists() else []
    kept = [r for r in old if key(r) not in {key(n) for n in runs}]
    part = a.out.with_suffix('.part'); part.write_text(json.dumps(dict(machine=machine(), runs=sorted(kept+runs, key=key)), indent=1)+'\n'); os.replace(part, a.out)
    for r in runs: print(r)
