"Ranks from embeddings against a plain sort; the same ranks for any block, thread and instruction set; re-ranking against its dense definition"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bev_reid import ranking
from bev_reid.evaluate import Observations, all_observations, evaluate_ranking, lazy_distances, lazy_junk
from bev_reid.ranking import GivenDistances, LazyDistances, LazyJunk, _C, camera_junk, count_within, rank_matches, same_pairs, entries
from bev_reid.rerank import expand, nearest, reciprocal_sets, rerank

root = Path(__file__).resolve().parents[1]
BACKENDS = ['numpy']+['cpp']*(_C is not None)

def isas():
    "Instruction sets that this processor runs"
    if _C is None: return []
    def runs(isa):
        try: nearest(LazyDistances(np.eye(3), np.eye(3)), 1, isa=isa); return True
        except ValueError: return False
    return [i for i in ('base', 'avx2', 'avx512') if runs(i)]
WAYS = [dict(backend=b) for b in BACKENDS]+[dict(backend='cpp', isa=i) for i in isas()]

def plain(dist, q_ids, g_ids, junk, eps=0.):
    "A full sort of each row: at equal distances (or within eps) others stand in front of matches"
    ranks, allowed = [], []
    for d, q, j in zip(dist, q_ids, junk):
        d, match = d[~j], (g_ids == q)[~j]
        order = np.lexsort((match, d-eps*~match))
        ranks.append(np.flatnonzero(match[order])+1); allowed.append((~j).sum())
    return ranks, np.array(allowed)

def matrix(q, g, metric='cosine'):
    "All distances in float64, the direct way"
    q, g = q.astype(np.float64), g.astype(np.float64)
    if metric == 'euclidean': return np.sqrt(((q[:, None]-g)**2).sum(2))
    q, g = (x/np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, g))
    return 1-(q[:, None]*g).sum(2)

def some(n_q, n_g, n_ids, dim=16, noise=1.5, seed=0, dtype=np.float32):
    r = np.random.default_rng(seed); c = r.normal(size=(n_ids, dim))
    qi, gi = r.integers(0, n_ids, n_q), r.integers(0, n_ids, n_g)
    return *((c[i]+noise*r.normal(size=(len(i), dim))).astype(dtype) for i in (qi, gi)), qi, gi

def same(r, want, allowed=None):
    assert [v.tolist() for v in np.split(r.rank, r.start[1:-1])] == [v.tolist() for v in want]
    if allowed is not None: assert r.n_allowed.tolist() == allowed.tolist()
    k = np.array([len(v) for v in want])
    np.testing.assert_allclose(r.ap, [np.mean(np.arange(1, len(v)+1)/v) if len(v) else np.nan for v in want], atol=1e-9)
    np.testing.assert_allclose(r.inp, [len(v)/v[-1] if len(v) else np.nan for v in want], atol=1e-9)
    assert r.first.tolist() == [v[0] if len(v) else 0 for v in want] and (r.n_matches == k).all()

# -- answers known by hand
@pytest.mark.parametrize('backend', BACKENDS)
def test_by_hand(backend):
    angle = np.deg2rad([10, 20, 30, 40, 50]); g = np.stack([np.cos(angle), np.sin(angle)], 1)
    r = rank_matches(LazyDistances(np.array([[1., 0], [0, 1]]), g), ['a', 'b'], ['x', 'a', 'b', 'a', 'x'], backend=backend)
    same(r, [np.array([2, 4]), np.array([3])], np.array([5, 5]))
    r = rank_matches(LazyDistances(np.array([[0.]]), np.array([[3.], [-2], [1], [2]]), metric='euclidean'), [7], [7, 0, 0, 7], backend=backend)
    same(r, [np.array([3, 4])])                                     # -2 and 2 are equally far: the other stands in front

@pytest.mark.parametrize('how', WAYS)
def test_count_within(how):
    neg, lim = np.array([.1, .2, .2, .5]), np.array([.05, .2, .3, .5])
    for many in (1, 99): assert count_within(neg, lim, many=many).tolist() == [0, 3, 3, 4]

# -- against the sort
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('shape', [(40, 1100, 20, 16), (3, 513, 5, 130), (17, 30, 40, 3), (1, 1, 1, 1), (25, 2000, 3, 7)])
def test_equals_a_sort(shape, metric):
    q, g, qi, gi = some(*shape); cams = np.random.default_rng(1).integers(0, 3, 5000)
    junk = camera_junk(qi, cams[:len(q)], gi, cams[len(q):][:len(g)])
    want, allowed = plain(matrix(q, g, metric), qi, gi, junk(slice(None)))
    for how in WAYS:
        for many in (1, 10**9): same(rank_matches(LazyDistances(q, g, metric=metric), qi, gi, junk=junk, tie_eps=0, many=many, **how), want, allowed)

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('scale,shift', [(1, 0), (1e-20, 0), (1e15, 0), (1, 6e5)])
def test_scales(scale, shift, dtype):
    "Float32 sieves; far from the origin or at odd scales it decides nothing wrong"
    q, g, qi, gi = some(20, 600, 10, dim=4, seed=2, dtype=np.float64); q, g = ((x*scale+shift).astype(dtype) for x in (q, g))
    want, _ = plain(matrix(q, g, 'euclidean'), qi, gi, np.zeros((20, 600), bool))
    for how in WAYS: same(rank_matches(LazyDistances(q, g, metric='euclidean'), qi, gi, tie_eps=0, **how), want)

def test_nearly_equal():
    "Distances that differ in the last digits of float64 are told apart"
    r = np.random.default_rng(0); c = r.normal(size=64); g = c+1e-9*r.normal(size=(400, 64)); gi = r.integers(0, 4, 400); q = g[:20]+1e-9*r.normal(size=(20, 64))
    want, _ = plain(matrix(q, g, 'euclidean'), gi[:20], gi, np.zeros((20, 400), bool))
    for how in WAYS: same(rank_matches(LazyDistances(q, g, metric='euclidean'), gi[:20], gi, tie_eps=0, **how), want)

@pytest.mark.parametrize('how', WAYS)
@pytest.mark.parametrize('eps', [0, 1e-6])
def test_duplicates_tie_wherever_they_stand(how, eps):
    "Copies of the match under another name, far apart in the gallery, all stand in front of it"
    r = np.random.default_rng(0); g = r.normal(size=(3000, 96)).astype(np.float32); q = g[:5]+.3*r.normal(size=(5, 96)).astype(np.float32)
    copies, ids = [700, 1533, 2999], np.full(3000, -1)
    for i in range(5):
        ids[:] = -1; ids[i] = 7; g[copies] = g[i]
        d = matrix(q[i:i+1], g)[0]; near = (d < d[i]-1e-4).sum()
        assert rank_matches(LazyDistances(q[i:i+1], g), [7], ids, tie_eps=eps, **how).first[0] == near+4

@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('how', WAYS)
def test_collapsed(metric, how):
    f = np.tile(np.random.default_rng(0).normal(size=(1, 40)), (300, 1)).astype(np.float32); ids = np.repeat(np.arange(100), 3)
    r = rank_matches(LazyDistances(f[:9], f, metric=metric), ids[:9], ids, junk=LazyJunk(same=(np.arange(9), np.arange(300))), **how)
    assert r.rank.tolist() == [298, 299]*9

# -- the same for any block, thread and instruction set
@pytest.mark.skipif(_C is None, reason='needs the compiled extension')
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_blocks_and_threads_change_nothing(metric):
    q, g, qi, gi = some(150, 4000, 60, dim=65); D = LazyDistances(q, g, metric=metric); want = rank_matches(D, qi, gi, threads=1).rank
    for how in WAYS[1:]+[dict(threads=2), dict(threads=5), dict(chunk=1), dict(chunk=11), dict(chunk=64, threads=2), dict(many=1), dict(many=10**6)]:
        assert (rank_matches(D, qi, gi, **how).rank == want).all(), how
    order = np.random.default_rng(3).permutation(len(g))                       # nor does the place in the gallery
    assert (rank_matches(LazyDistances(q, g[order], metric=metric), qi, gi[order]).rank == want).all()
    one = np.concatenate([rank_matches(LazyDistances(q[i:i+1], g, metric=metric), qi[i:i+1], gi).rank for i in range(40)])
    if metric == 'cosine': assert (one == want[:len(one)]).all()

def test_both_backends_agree():
    q, g, qi, gi = some(60, 900, 20, dim=33)
    for metric in ('cosine', 'euclidean'):
        a, b = (rank_matches(LazyDistances(q, g, metric=metric), qi, gi, backend=k) for k in (BACKENDS[0], BACKENDS[-1]))
        assert (a.rank == b.rank).all()

# -- junk
@pytest.mark.parametrize('scope', ['all', 'scene', 'other'])
@pytest.mark.parametrize('how', WAYS)
def test_junk_rules(scope, how):
    r = np.random.default_rng(0); n = 1300; q, g, qi, gi = some(n, n, 25)
    obs = Observations(gi, r.integers(0, 200, n), r.integers(0, 40, n)*.5, np.sort(r.integers(0, 6, n)))
    asks = np.arange(0, n, 37); junk = lazy_junk(obs.take(asks), obs, scope=scope)
    mask = np.stack([(obs.frames[i] == obs.frames) | ((obs.scenes[i] == obs.scenes) & (np.abs(obs.times[i]-obs.times) < 2-1e-6)) |
                     ((obs.scenes[i] != obs.scenes) if scope == 'scene' else (obs.scenes[i] == obs.scenes) if scope == 'other' else False) for i in asks])
    assert (junk(slice(None)) == mask).all()
    a, b = np.indices(mask.shape).reshape(2, -1); assert (junk.pairs(a, b) == mask.ravel()).all()
    want, allowed = plain(matrix(g[asks], g), gi[asks], gi, mask, eps=1e-6); D = LazyDistances(g[asks], g)
    for rule in (junk, mask, lambda rows: mask[rows]): same(rank_matches(D, gi[asks], gi, junk=rule, **how), want, allowed)
    a = all_observations(g, obs, scope=scope, query=np.isin(np.arange(n), asks))
    pairs = (gi[asks, None] == gi) & (obs.scenes[asks, None] == obs.scenes) & ~mask
    gaps = np.where(pairs, np.abs(obs.times[asks, None]-obs.times), np.inf).min(1)
    np.testing.assert_array_equal(a.gaps, np.where(np.isfinite(gaps), gaps, np.nan)); assert (a.n_allowed == allowed).all()

@pytest.mark.parametrize('backend', BACKENDS)
def test_given_distances(backend):
    q, g, qi, gi = some(70, 400, 12); d = matrix(q, g); r = np.random.default_rng(0); junk = r.random(d.shape) < .2
    for x in (d, d.astype(np.float32), np.round(d, 1)):
        want, allowed = plain(x, qi, gi, junk)
        for given in (x, lambda rows: x[rows]):
            for many in (1, 999): same(rank_matches(given, qi, gi, junk=junk, tie_eps=0, many=many, chunk=9, backend=backend), want, allowed)
    d[3, 5] = np.nan
    with pytest.raises(ValueError, match='1 distances of queries 0 to 69 are NaN or infinite'): rank_matches(d, qi, gi, backend=backend)
    junk[3, 5] = True; rank_matches(d, qi, gi, junk=junk, backend=backend)
    d[3, 5] = np.inf
    with pytest.raises(ValueError, match='NaN or infinite'): rank_matches(d, qi, gi, backend=backend)

# -- bad and empty input
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad):
    x = np.ones((5, 3)); y = x.copy(); y[2, 1] = bad
    with pytest.raises(ValueError, match='gallery holds 1 of 5 rows that are NaN or infinite'): LazyDistances(x, y)
    with pytest.raises(ValueError, match='query holds 1 of 5 rows'): LazyDistances(y, x)

@pytest.mark.parametrize('how', WAYS)
def test_empty(how):
    D = LazyDistances(np.zeros((0, 4)), np.ones((3, 4))); r = rank_matches(D, [], [1, 2, 3], **how); assert len(r.rank) == 0 and len(r.ap) == 0
    r = rank_matches(LazyDistances(np.ones((2, 4)), np.zeros((0, 4))), [1, 2], [], **how); assert r.first.tolist() == [0, 0] and r.n_allowed.tolist() == [0, 0] and np.isnan(r.ap).all()
    r = rank_matches(LazyDistances(np.ones((2, 4)), np.ones((3, 4))), ['x', 'b'], ['b', 'c', 'b'], **how); assert r.first.tolist() == [0, 2] and np.isnan(r.inp[0])
    e = evaluate_ranking(lazy_distances(np.ones((2, 4)), np.zeros((0, 4))), [1, 2], []); assert e.n_queries == 0 and np.isnan(e.mAP)

def test_messages():
    x = np.ones((4, 3)); D = LazyDistances(x, x)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean'"): LazyDistances(x, x, metric='l1')
    with pytest.raises(ValueError, match='length 3, gallery features 2'): LazyDistances(x, x[:, :2])
    with pytest.raises(ValueError, match=r'\(4, 4\) must be \(queries, gallery\) = \(4, 5\)'): rank_matches(D, range(4), range(5))
    with pytest.raises(ValueError, match=r'junk \(4, 3\)'): rank_matches(D, range(4), range(4), junk=np.zeros((4, 3), bool))
    with pytest.raises(ValueError, match='backend'): rank_matches(D, range(4), range(4), backend='gpu')
    with pytest.raises(ValueError, match='scenes and times'): LazyJunk(scenes=([1], [1]))
    with pytest.raises(ValueError, match='needs labels'): LazyJunk()
    with pytest.raises(ValueError, match='pass 1 to 4'): nearest(D, 5)
    with pytest.raises(ValueError, match='lam=2'): rerank(x, x, lam=2)
    with pytest.raises(ValueError, match='too large'): LazyDistances(x*1e200, x)

@pytest.mark.skipif(_C is None, reason='needs the compiled extension')
def test_kernel_refuses_what_it_cannot_read():
    x, n, none = np.ones((2, 3)), np.ones(2), np.zeros(0)
    args = lambda **k: {**dict(q=x, g=x, qn=n, gn=n, s=none, lim=np.ones(2), ptr=np.array([0, 1, 2]), junk=[], own=[], timed=None, mask=None, many=9, threads=1, isa='', out=np.zeros(2, np.int64), nj=np.zeros(2, np.int64)), **k}.values()
    _C.count_within(*args())
    bad = (dict(q=x.astype(np.float32)), dict(gn=np.ones(3)), dict(ptr=np.array([0, 2, 1])), dict(ptr=np.array([0, 1, 3])), dict(lim=np.array([1, np.nan])), dict(ptr=np.array([0, 2, 2]), lim=np.array([2., 1])),
           dict(own=[(np.zeros(2, np.int32), np.array([0, 1]), np.array([2], np.int32))]), dict(own=[(np.ones(2, np.int32), np.array([0, 1]), np.array([0], np.int32))]),
           dict(mask=np.zeros((2, 3), np.uint8)), dict(isa='neon'), dict(q=x[:, ::2]), dict(out=np.zeros(3, np.int64)))
    for b in bad:
        with pytest.raises(ValueError, match='bev_reid._C'): _C.count_within(*args(**b))

def test_without_the_extension(monkeypatch):
    q, g, qi, gi = some(20, 200, 8); D, want = LazyDistances(q, g), rank_matches(LazyDistances(q, g), qi, gi).rank
    monkeypatch.setattr(ranking, '_C', None); ranking._warn_no_C.cache_clear()
    with pytest.warns(UserWarning, match='pip install'): assert (rank_matches(D, qi, gi).rank == want).all()
    with pytest.raises(ValueError, match="'numpy'"): rank_matches(D, qi, gi, backend='cpp')

def test_pairs_of_codes():
    q, g = np.array([2, 0, 5]), np.array([0, 2, 2, 1])
    a, b = same_pairs(q, entries(g, 6)); assert list(zip(a, b)) == [(0, 1), (0, 2), (1, 0)]

# -- neighbours, re-ranking, expansion
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('how', WAYS)
def test_nearest(metric, how):
    q, g, _, _ = some(50, 1700, 30, dim=21); g[900:1000] = g[:100]
    d = LazyDistances(q, g, metric=metric); full = d.pairs(*np.divmod(np.arange(50*1700), 1700)).reshape(50, -1)
    np.testing.assert_allclose(full, matrix(q, g, metric), atol=1e-12)
    for k in (1, 7, 130):
        idx, near, far = nearest(d, k, threads=2, chunk=19, **how)
        want = np.argsort(full, 1, kind='stable')[:, :k]
        assert (idx == want).all(); np.testing.assert_allclose(near, np.take_along_axis(full, want, 1), atol=1e-12); np.testing.assert_allclose(far, full.max(1), atol=1e-12)
    assert (nearest(LazyDistances(q[:3], g[:4], metric=metric), 4, **how)[0] == np.argsort(full[:3, :4], 1)).all()
    same_row = np.ones((40, 5)); assert (nearest(LazyDistances(same_row, same_row, metric=metric), 3, **how)[0] == [0, 1, 2]).all()

def dense_rerank(q, g, k1, k2, lam, metric):
    "The definition on the whole matrix, with loops"
    x = np.concatenate([q, g]); n = len(x); d = matrix(x, x, metric)**2; d /= d.max(1, keepdims=True); order = np.argsort(d, 1, kind='stable')
    def recip(i, k): return np.array([j for j in order[i, :k+1] if i in order[j, :k+1]], int)
    V = np.zeros((n, n))
    for i in range(n):
        own = recip(i, k1); grown = own
        for j in own:
            more = recip(j, int(np.around(k1/2)))
            if len(np.intersect1d(more, own)) > 2/3*len(more): grown = np.append(grown, more)
        grown = np.unique(grown); V[i, grown] = np.exp(-d[i, grown]); V[i] /= V[i].sum()
    if k2 > 1: V = np.stack([V[order[i, :k2]].mean(0) for i in range(n)])
    m = np.minimum(V[:len(q), None], V[None, len(q):]).sum(2)
    return (1-lam)*(1-m/(2-m))+lam*d[:len(q), len(q):]

@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('k1,k2,lam', [(20, 6, .3), (5, 1, 0.), (9, 3, 1.), (200, 2, .5)])
def test_reranking_equals_its_dense_definition(metric, k1, k2, lam):
    n_q, n_g = (30, 150) if k1 < 100 else (10, 40)                   # more neighbours than rows, too
    q, g, qi, gi = some(n_q, n_g, 12, dim=8); F = dense_rerank(q, g, k1, k2, lam, metric)
    cams = np.arange(180) % 3; junk = camera_junk(qi, cams[:n_q], gi, cams[n_q:n_q+n_g])
    want, allowed = plain(F, qi, gi, junk(slice(None)), eps=1e-6)
    for backend in BACKENDS:
        R = rerank(q, g, metric=metric, k1=k1, k2=k2, lam=lam, backend=backend)
        np.testing.assert_allclose(R(slice(None)), F, atol=1e-9); np.testing.assert_allclose(R(slice(4, 9)), F[4:9], atol=1e-9)
        np.testing.assert_allclose(R.pairs(np.arange(n_q), np.arange(n_q)*2), F[np.arange(n_q), np.arange(n_q)*2], atol=1e-9)
        for how in (dict(), dict(chunk=7), dict(many=1)): same(rank_matches(R, qi, gi, junk=junk, backend=backend, **how), want, allowed)
        same(rank_matches(R, qi, gi, junk=junk(slice(None)), backend=backend), want, allowed)
    e = evaluate_ranking(R, qi, gi, junk=junk); np.testing.assert_allclose(e.mAP, np.nanmean([np.mean(np.arange(1, len(v)+1)/v) for v in want if len(v)]))

def test_reciprocal_sets_do_not_depend_on_blocks():
    x, _, _, _ = some(400, 1, 20); near = nearest(LazyDistances(x, x), 21)[0]
    def all_pairs(chunk): s, r, c = zip(*reciprocal_sets(near, chunk=chunk)); return np.concatenate(r), np.concatenate(c)
    for a, b in zip(all_pairs(1024), all_pairs(33)): assert (a == b).all()

def test_reranking_helps_and_a_collapse_does_not():
    q, g, qi, gi = some(60, 600, 30, dim=16, noise=1.2)
    plain_map, better = (evaluate_ranking(d, qi, gi).mAP for d in (lazy_distances(q, g), rerank(q, g)))
    assert better > plain_map+.05
    flat = np.ones((50, 4)); ids = np.arange(50) % 5
    assert evaluate_ranking(rerank(flat[:10], flat), ids[:10], ids).first_hit.min() > 1

@pytest.mark.parametrize('backend', BACKENDS)
def test_expansion(backend):
    x, y, _, _ = some(60, 90, 10, dtype=np.float64); unit = lambda v: v/np.linalg.norm(v, axis=1, keepdims=True)
    for among, alpha in ((x, 3.), (y, 0.), (y, 2.)):
        s = unit(x) @ unit(among).T; top = np.argsort(-s, 1)[:, :5]
        want = unit(np.einsum('ik,ike->ie', np.take_along_axis(s, top, 1).clip(0)**alpha, among[top]))
        np.testing.assert_allclose(expand(x, alpha=alpha, among=among, backend=backend), want, atol=1e-9)
    assert expand(x.astype(np.float32)).dtype == np.float32 and expand(x[:3], k=5).shape == (3, 16)

# -- memory
@pytest.mark.skipif(_C is None or sys.platform != 'linux', reason='needs the compiled extension, and Linux to read its memory')
def test_memory_stays_bounded():
    "4,000 x 100,000: the matrix would take 1.6 GB; the ranking takes tens of MB beside the features"
    code = '''
import json, re
import numpy as np
from bev_reid.ranking import LazyDistances, camera_junk, rank_matches
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024     # ru_maxrss would keep that of the parent
r = np.random.default_rng(0); q, g = (r.standard_normal((n, 16), dtype=np.float32) for n in (4000, 100_000)); qi, gi = (r.integers(0, 5000, n) for n in (4000, 100_000))
before = peak()
out = rank_matches(LazyDistances(q, g), qi, gi, junk=camera_junk(qi, qi % 3, gi, gi % 7), threads=1)
print(json.dumps(dict(mb=peak()-before, n=len(out.rank))))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, env={**os.environ, 'PYTHONPATH': str(root)})
    assert r.returncode == 0, r.stderr
    got = json.loads(r.stdout); assert got['mb'] < 120 and got['n'] > 10_000, got
