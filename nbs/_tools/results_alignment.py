"""Measures the alignment of scenes and writes results/alignment.json.

    python nbs/_tools/results_alignment.py [--quick] [--seeds 12] [--real ../shared/data/lyft_scene]
    python nbs/_tools/results_alignment.py --solvers       only time the solvers in one run, GTSAM's too where it is installed; writes nothing

Made scenes with seeds that no choice was made on (90000 and on), every number with a 95 % interval (bootstrap over scenes), beside CosyPose's own code as measured in
the same regimes on its own seeds. A part that is in the file already is kept; --quick measures three scenes a row and writes nothing. About fifteen minutes on one core, most of it CosyPose's matching among cars of one class.
"""
import argparse
import json
import os
import platform
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np

from bev_reid.alignment import align_scene
from bev_reid.hypotheses import AssociationConfig
from bev_reid.candidates import TABLE_NOISE, NoiseModel
from bev_reid.refinement import RefineConfig, refine_scene
from bev_reid.scene_files import candidates_of_drive, candidates_of_frames
from bev_reid.scene_scores import evaluate_scene, pair_scores, pose_errors
from bev_reid.scene_sim import SceneSpec, SceneTruth, simulate_scene

T, ONE = dict(regime='table'), dict(n_classes=1)
HARD = dict(ONE, outliers=.3, noise=2., heading='ambiguous')
FIRST = 90000
# name: scene, then CosyPose as measured (views, precision, recall, camera deg, camera m, object m, object deg), then an earlier prototype where there is one (precision, recall, camera deg, camera m)
ROWS = {
    'table 4x10, noise x0.5': (dict(T, noise=.5), (4.0, 1.00, .96, .59, .011, .0037, 1.5), None),
    'table 4x10': (T, (2.8, 1.00, .26, 2.4, .043, .0092, 3.4), None),
    'table 4x10, threshold swept': (T, (None, 1.00, .96, 1.21, .022, None, None), None),
    'table 4x10, 30 % outliers': (dict(T, outliers=.3), (2.2, .90, .22, 2.4, .032, .0079, 3.2), None),
    'table 4x10, noise x2': (dict(T, noise=2.), (0., 0., 0., None, None, None, None), None),
    'table 8x10, noise x0.5': (dict(T, n_views=8, noise=.5), (8.0, 1.00, 1.00, .59, .012, .0028, 1.1), None),
    'table 8x10': (dict(T, n_views=8), (7.5, 1.00, .59, 1.6, .024, .0075, 3.0), None),
    'table 8x10, 30 % outliers': (dict(T, n_views=8, outliers=.3), (5.3, .90, .31, 2.8, .038, .010, 3.3), None),
    'table 8x10, noise x2': (dict(T, n_views=8, noise=2.), (.2, .10, .00, None, None, None, None), None),
    'road 4x10, own classes': (dict(), (4.0, .99, .94, .71, .52, None, None), (.97, 1.00, .72, .52)),
    'road 8x10, own classes': (dict(n_views=8), (8.0, 1.00, .99, .63, .40, None, None), (.98, .99, .63, .38)),
    'road 4x10, one class': (ONE, (3.5, 1.00, .58, .98, .56, None, None), (.97, .95, .76, .38)),
    'road 4x10, one class, heading ambiguous': (dict(ONE, heading='ambiguous'), (3.8, .99, .73, .87, .62, None, None), (.95, 1.00, .86, .90)),
    'road 4x10, own classes, noise x2': (dict(noise=2.), (3.4, 1.00, .56, 3.1, 1.5, None, None), (.96, .84, 1.6, 1.1)),
    'road 4x10, own classes, 30 % outliers': (dict(outliers=.3), (3.7, 1.00, .87, 1.4, .89, None, None), (.93, .94, 1.4, .82)),
    'road 4x20, one class': (dict(ONE, n_objects=20), (1.0, .50, .07, None, None, None, None), (.94, .97, .42, .36)),
    'road 4x30, one class': (dict(ONE, n_objects=30), (0., 0., 0., None, None, None, None), (.93, .99, None, None)),
    'road 4x20, one class, noise x2': (dict(ONE, n_objects=20, noise=2.), None, None),
    'road 4x30, one class, noise x2': (dict(ONE, n_objects=30, noise=2.), None, None),
    'road 4x10, one class, good embeddings': (dict(ONE, embeddings='good'), None, (.98, .98, .64, .31)),
    'road 4x20, one class, good embeddings': (dict(ONE, n_objects=20, embeddings='good'), None, (.96, .99, .43, .34)),
    'road 4x30, hard': (dict(HARD, n_objects=30), None, (.31, .30, 76., None)),
    'road 4x30, hard, good embeddings': (dict(HARD, n_objects=30, embeddings='good'), None, (.86, .80, 1.1, .90)),
    'road 4x30, hard, weak embeddings': (dict(HARD, n_objects=30, embeddings='weak'), None, (.78, .18, None, None)),
    'road 4x20, one class, driving up to 10 m/s': (dict(ONE, n_objects=20, speed=10.), None, None),
}
KEYS = 'solved views precision recall camera_deg camera_m object_m object_deg single_m single_deg missed doubled false'.split()


def threshold(name, kw): return 2. if kw.get('regime') != 'table' else .04 if 'swept' in name else .02   # metres: as shipped on a table, as swept on a road

def interval(x, stat, g=None):
    x = np.asarray(x, float); x = x[np.isfinite(x)]
    if not len(x): return None
    boot = stat(np.random.default_rng(0).choice(x, (2000, len(x))), axis=1)
    return [round(float(v), 6) for v in (stat(x), *np.quantile(boot, [.025, .975]))]

def noise(kw): return TABLE_NOISE if kw.get('regime') == 'table' else NoiseModel()

def one(kw, seed, **assoc):
    c, truth = simulate_scene(SceneSpec(**kw), seed=seed)
    s = align_scene(c, AssociationConfig(noise=noise(kw), **assoc)); e = evaluate_scene(s, truth, auc_max=.1 if kw.get('regime') == 'table' else 2.)
    return e | dict(ms_associate=1e3*s.seconds['associate'], ms_refine=1e3*s.seconds['refine'])

def cosypose_row(kw, n, max_dist):
    "CosyPose's matching on the same scenes, refined by ours: what its rule finds, not what its own solver makes of it"
    rs = [one(kw, FIRST+k, method='cosypose', max_dist=max_dist) for k in range(n)]; mean = {'solved', 'views', 'precision', 'recall'}
    return {k: interval([r[k] for r in rs], np.mean if k in mean else np.median) for k in 'solved views precision recall camera_deg camera_m object_m object_deg ms_associate'.split()} | dict(seeds=n, max_dist=max_dist)

def row(kw, cosy, proto, n):
    rs = [one(kw, FIRST+k) for k in range(n)]
    mean = {'solved', 'views', 'precision', 'recall', 'missed', 'doubled', 'false'}
    out = {k: interval([r[k] for r in rs], np.mean if k in mean else np.median) for k in [*KEYS, 'ms_associate', 'ms_refine']} | dict(seeds=n)
    val = lambda k: out[k][0] if out[k] else np.nan
    if cosy:
        names = 'views precision recall camera_deg camera_m object_m object_deg'.split(); out['cosypose'] = dict(zip(names, cosy))
        out['at_least_cosypose'] = {k: bool(val(k) >= v if k in ('views', 'recall') else val(k) <= v) for k, v in zip(names, cosy) if v is not None and k != 'precision'}
    if proto: out['prototype'] = dict(zip('precision recall camera_deg camera_m'.split(), proto))
    return out

ROWED = dict(ONE, layout='rows')
AMBIGUOUS = [dict(HARD, n_objects=30), dict(HARD, n_objects=20), dict(HARD, n_objects=10), dict(HARD, n_objects=10, n_views=3), dict(HARD, n_objects=20, n_views=2), dict(HARD, n_objects=12, n_views=2, overlap=.6), dict(HARD, n_objects=20, embeddings='weak'),
             dict(ONE, n_objects=8, n_views=3, overlap=.6, outliers=.3), dict(ONE, n_objects=12, n_views=2, overlap=.5), dict(ONE, n_objects=20, n_views=3, overlap=.4, heading='ambiguous'), dict(T, noise=2., outliers=.3, n_views=3), dict(T, **ONE, outliers=.3, noise=2.), dict(T, **ONE, outliers=.3, noise=2., n_views=2, overlap=.6),
             dict(ROWED), dict(ROWED, n_objects=20, n_views=2), dict(ROWED, n_objects=20, overlap=.6), dict(ROWED, heading='ambiguous'), dict(ROWED, n_views=2, overlap=.8), dict(ROWED, n_objects=20, n_views=3, overlap=.6, noise=2.), dict(ROWED, n_objects=20, n_views=3, overlap=.7, embeddings='weak')]

def is_wrong(e, kw):
    "Some agent is far off, or most of what was put together does not belong together (a row of parked cars shifted by one place)"
    return bool(e['camera_deg_max'] > (25 if 'regime' in kw else 15) or e['camera_m_max'] > (.4 if 'regime' in kw else 8) or (e['views'] > 1 and e['precision'] < .5))

def ambiguous_case(kw, ks):
    "Of scenes whose answer would be wrong if one had to be given: how many are not called solved and wrong?"
    r = dict.fromkeys('wrong_if_forced flagged right_if_forced right_but_not_called_solved solved_and_wrong'.split(), 0)
    for k in ks:
        forced, own = one(kw, FIRST+1000+k, min_margin=-1e9, lead=-1e9), one(kw, FIRST+1000+k); bad = own['solved'] and is_wrong(own, kw); r['solved_and_wrong'] += bad
        if is_wrong(forced, kw): r['wrong_if_forced'] += 1; r['flagged'] += not bad
        elif forced['solved']: r['right_if_forced'] += 1; r['right_but_not_called_solved'] += not own['solved']
    return r | dict(scenes=len(ks))

def said(kw): return ' '.join(f'{k}={v}' for k, v in kw.items())

def ambiguity(cases):
    "All cases together"
    total = {k: sum(r[k] for r in cases.values()) for k in next(iter(cases.values()))}
    return dict(**total, share_flagged=round(total['flagged']/max(total['wrong_if_forced'], 1), 4), share_flagged_interval=wilson(total['flagged'], total['wrong_if_forced']), by_case=cases)

def wilson(k, n, z=1.96):
    "95 % interval of a share, k of n (Wilson): a bootstrap of all-hits has no width"
    if not n: return None
    p = k/n; mid, half = (p+z*z/2/n)/(1+z*z/n), z*np.sqrt(p*(1-p)/n+z*z/4/n/n)/(1+z*z/n)
    return [round(float(mid-half), 4), round(float(min(mid+half, 1)), 4)]

WEAK = {'10': dict(ONE), '20': dict(ONE, n_objects=20), '30': dict(ONE, n_objects=30), '20, noise x2': dict(ONE, n_objects=20, noise=2.), '30, hard': dict(HARD, n_objects=30)}
QUALITY = ('noise', 'weak', 'fair', 'good')                           # embeddings that say nothing at all, and rank-1 of 0.4, 0.7 and 0.95

def weak(n):
    "Recall and precision with embeddings of four qualities against none, on the same scenes"
    out = {}
    for name, kw in WEAK.items():
        a = [one(kw, FIRST+k) for k in range(n)]; out[name] = dict(recall_none=interval([r['recall'] for r in a], np.mean))
        for q in QUALITY:
            b = [one(dict(kw, embeddings=q), FIRST+k) for k in range(n)]
            out[name][q] = dict(recall=interval([r['recall'] for r in b], np.mean), **{f'{k}_gain': interval([y[k]-x[k] for x, y in zip(a, b)], np.mean) for k in ('recall', 'precision')}, wrong=sum(r['solved'] and is_wrong(r, kw) for r in b), wrong_none=sum(r['solved'] and is_wrong(r, kw) for r in a))
    return out

def strict(n):
    "Precision and recall where matches shall be sure rather than many"
    out = {}
    for name, (kw, cosy, _) in ROWS.items():
        if not cosy: continue
        rs = [one(kw, FIRST+k, strict=True) for k in range(n)]; out[name] = {k: interval([r[k] for r in rs], np.mean) for k in ('solved', 'precision', 'recall')}
    return out

def timing(n):
    "CPU milliseconds, the best of nine runs of each scene: a shared machine is slow by turns"
    out = {}
    for name, kw in {'8x10': dict(n_views=8), '8x50': dict(n_views=8, n_objects=50)}.items():
        ts, numpy_s = [], []
        for k in range(n):
            c, truth = simulate_scene(SceneSpec(**kw, outliers=0., false=0.), seed=FIRST+k); g = np.random.default_rng(k)
            start = truth.agents.copy(); start[:, :3, 3] += .5*g.normal(size=(len(start), 3))
            def clock(f): t = time.process_time(); f(); return 1e3*(time.process_time()-t)
            ts.append([min(clock(lambda: refine_scene(c, c.truth, start, RefineConfig())) for _ in range(9)), min(clock(lambda: align_scene(c)) for _ in range(9)) if name == '8x10' else np.nan]); numpy_s.append(clock(lambda: refine_scene(c, c.truth, start, RefineConfig(backend='numpy'))))
        ts = np.array(ts); out[name] = dict(refine_ms=interval(ts[:, 0], np.median), refine_numpy_ms=interval(numpy_s, np.median), all_ms=interval(ts[:, 1], np.median))
    return out

def solvers(n):
    "CPU milliseconds of refinement by each solver, on the same scenes and from the same start, interleaved; and how far GTSAM's answer is from ours"
    from importlib.util import find_spec
    backends = ['cpp', 'numpy', *(['gtsam'] if find_spec('gtsam') else [])]; out = {}
    if len(backends) < 3: print("GTSAM is not installed (pip install 'bev_reid[gtsam]'): its column is left out")
    for name, kw in {'4x10': dict(), '8x10': dict(n_views=8), '8x50': dict(n_views=8, n_objects=50)}.items():
        for loss in 'l2', 'huber', 'graduated':
            ms, far = {b: [] for b in backends}, []
            for k in range(n):
                c, truth = simulate_scene(SceneSpec(**kw, outliers=0., false=0.), seed=FIRST+k); g = np.random.default_rng(k); start = truth.agents.copy(); start[:, :3, 3] += .5*g.normal(size=(len(start), 3)); got = {b: [] for b in backends}
                for _ in range(4):                                                                   # the first warms up
                    for b in backends: t = time.process_time(); s = refine_scene(c, c.truth, start, RefineConfig(loss=loss, backend=b)); got[b].append((1e3*(time.process_time()-t), s))
                for b in backends: ms[b].append(min(x for x, _ in got[b][1:]))
                if 'gtsam' in got: far.append(np.abs(got['gtsam'][-1][1].world-got['cpp'][-1][1].world).max())
            out[f'{name}, {loss}'] = {f'{b}_ms': interval(ms[b], np.median) for b in backends} | (dict(largest_difference_of_poses=float(max(far))) if far else {}); print(f'{name}, {loss}', json.dumps(out[f'{name}, {loss}']), flush=True)
    return out

def real(root, n):
    "Annotated boxes of a real scene with their places hidden, and with a detector's error added"
    from bev_reid.data import DrivingData
    data = DrivingData(root); tokens, out = data.sample_tokens(), {}
    def measure(c, T):
        s = align_scene(c, AssociationConfig(pose_model='yaw4'))
        deg, m = pose_errors(s.world, T, s.group); return dict(solved=s.solved, agents=int((s.group == 0).sum()), **pair_scores(s.obj, c.truth), camera_deg=float(np.median(deg)) if len(deg) else np.nan, camera_m=float(np.median(m)) if len(m) else np.nan, wrong=bool(s.solved and len(deg) and (max(deg) > 15 or max(m) > 8)), wrong_groups=sum(bool(len(d) and (max(d) > 15 or max(t) > 8)) for g in range(s.group.max()+1) for d, t in [pose_errors(s.world, T, np.where(s.group == g, 0, -1))]))
    for name, noisy in ('as annotated', None), ('with error', NoiseModel()):
        for gap in 1, 3, 8:
            rs = [measure(*candidates_of_frames(data, [tokens[i], tokens[i+gap]], noise=noisy, seed=i)) for i in range(0, len(tokens)-gap, max(1, len(tokens)//n))]
            out[f'two keyframes, {gap} apart, {name}'] = {k: interval([r[k] for r in rs], np.median if k.startswith('camera') else np.mean) for k in rs[0]} | dict(scenes=len(rs))
        rs = []
        for i in range(0, len(tokens), max(1, len(tokens)//n)):
            try: rs.append(measure(*candidates_of_frames(data, [tokens[i]], cams=True, noise=noisy, level=True, seed=i)))
            except ValueError: rs.append(dict(solved=False, agents=0, precision=0., recall=0., camera_deg=np.nan, camera_m=np.nan, wrong=False, wrong_groups=0))
        out[f'six cameras of one keyframe, {name}'] = {k: interval([r[k] for r in rs], np.median if k.startswith('camera') else np.mean) for k in rs[0]} | dict(scenes=len(rs))
    return out

def rig(root, n):
    "Extrinsics of the six cameras hidden, and found again from the boxes of one drive, its motion and embeddings"
    from bev_reid.data import DrivingData
    from bev_reid.rig import find_rig
    from bev_reid.scene_sim import embed_identities
    data, out = DrivingData(root), {}; tokens = data.sample_tokens()
    for noisy in None, NoiseModel():
        for radius in 50., 80.:
            for emb in 'none', 'weak', 'good':
                rs = []
                for k in range(n if noisy or emb != 'none' else 1):
                    c, cam, motion, true = candidates_of_drive(data, tokens, noise=noisy, seed=1000*k, radius=radius)
                    if emb != 'none': c = replace(c, embedding=embed_identities(c.truth, emb, seed=k))
                    t = time.process_time(); r = find_rig(c, cam, motion); deg, m = pose_errors(r.cams, true, r.group)
                    rs.append(dict(cameras=int((r.group == 0).sum()), found=int((r.group >= 0).sum()), camera_deg=float(np.median(deg)), camera_m=float(np.median(m)), camera_deg_max=float(max(deg)), camera_m_max=float(max(m)), shared=int(r.shared.min()), s=time.process_time()-t))
                out[f"{'with error' if noisy else 'as annotated'}, within {radius:.0f} m, embeddings: {emb}"] = {k: interval([x[k] for x in rs], np.median if k.startswith('camera_') else np.mean) for k in rs[0]} | dict(runs=len(rs))
    return out


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); a.add_argument('--quick', action='store_true'); a.add_argument('--solvers', action='store_true'); a.add_argument('--seeds', type=int, default=12); a.add_argument('--real', default=None); a.add_argument('--out', default='results/alignment.json'); a.add_argument('--only', default='')
    args = a.parse_args(); path, n = Path(args.out), 3 if args.quick else args.seeds
    if args.solvers: solvers(n); raise SystemExit
    root = Path(args.real or os.environ.get('BEV_REID_DATA', '../shared/data')+'/lyft_scene')
    got = json.loads(path.read_text()) if path.exists() and not args.quick else dict(about='Made scenes only but for "real": the generator is ours, embeddings are simulated. [value, low, high]: means or medians with 95 % intervals. CosyPose and prototype: measured in the same regimes on other seeds. CPU milliseconds of one core.', rows={})
    got['machine'] = f'{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}'
    def keep():
        if args.quick: return
        path.parent.mkdir(exist_ok=True); Path(f'{path}.part').write_text(json.dumps(got, indent=1)); os.replace(f'{path}.part', path)
    def measure(parts):
        for name, make in parts.items():
            if name in got or (args.only and args.only != name): continue
            got[name] = make(); keep(); print(name, json.dumps(got[name]), flush=True)
    for name, (kw, cosy, proto) in ROWS.items():
        if name in got['rows'] or not name.startswith(args.only): continue
        got['rows'][name] = r = row(kw, cosy, proto, n) | dict(settings=kw); keep()
        f = lambda k, d=3: f"{r[k][0]:.{d}g}" if r[k] else '-'
        print(f"{name:44s} solved {f('solved')} views {f('views')} P {f('precision')} R {f('recall')} camera {f('camera_deg')} deg {f('camera_m')} m, object {f('object_m')} m {f('object_deg')} deg, {f('ms_associate')}+{f('ms_refine')} ms {r.get('at_least_cosypose', '')}", flush=True)
    measure(dict(real=lambda: real(root, 3 if args.quick else 10) if root.is_dir() else None, rig=lambda: rig(root, 1 if args.quick else 5) if root.is_dir() else None))
    cases, want = got.get('ambiguity', {}).get('by_case', {}), 2 if args.quick else 4*n
    for kw in AMBIGUOUS:
        have = cases.get(said(kw), dict(scenes=0))
        if have['scenes'] >= want or args.only not in ('', 'ambiguity'): continue
        more = ambiguous_case(kw, range(have['scenes'], want)); cases[said(kw)] = {k: x+have.get(k, 0) for k, x in more.items()}; got['ambiguity'] = ambiguity(cases); keep(); print(said(kw), json.dumps(cases[said(kw)]), flush=True)
    measure(dict(weak_embeddings=lambda: weak(n)))
    for name, (kw, *_) in ROWS.items():
        if 'embeddings' in kw or name in got.get('cosypose', {}) or (args.only and args.only != 'cosypose'): continue
        got.setdefault('cosypose', {})[name] = r = cosypose_row(kw, n, threshold(name, kw)); keep()
        print(f"{name:44s} CosyPose's matching: "+' '.join(f"{k} {r[k][0]:.3g}" for k in ('solved', 'views', 'precision', 'recall', 'camera_deg', 'camera_m', 'ms_associate') if r[k]), flush=True)
    measure(dict(strict=lambda: strict(n)))
    measure(dict(timing=lambda: timing(3 if args.quick else 5)))                # last: by now nothing else of ours runs
