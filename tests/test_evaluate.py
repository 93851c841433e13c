"Rankings against plain restatements, hand-solved cases and real tracks"
import itertools, json, os
from pathlib import Path

import numpy as np
import pytest
from bev_reid.evaluate import (BASELINE_METRICS, Observations, all_observations, bootstrap, box_size_features, chance, colour_features, distances,
                               evaluate_all, evaluate_ranking, format_table, junk_mask, lazy_distances, lazy_junk, position_features,
                               raw_crop_features, roc, single_shot, thumbnail_features)

def restate(dist, q_ids, g_ids, junk):
    "CMC ranks, AP and INP by a full sort of each row"
    out = []
    for d, q, j in zip(dist, q_ids, junk):
        hits = (g_ids[~j] == q)[np.argsort(d[~j], kind='stable')]
        at = np.flatnonzero(hits)+1
        out.append((0, np.nan, np.nan) if not len(at) else (at[0], np.mean(np.arange(1, len(at)+1)/at), len(at)/at[-1]))
    return np.array(out)

def some(n, n_ids, seed=0, dim=6, noise=1.):
    g = np.random.default_rng(seed); ids = g.integers(0, n_ids, n)
    return g.normal(size=(n_ids, dim))[ids]+noise*g.normal(size=(n, dim)), ids

# -- answers known by hand
def test_three_by_five():
    dist = np.array([[.1, .2, .3, .4, .5], [.3, .2, .4, .1, .5], [.5, .4, .3, .2, .1]])
    r = evaluate_ranking(dist, ['a', 'b', 'x'], ['a', 'b', 'a', 'c', 'd'])
    assert r.first_hit.tolist() == [1, 2, 0] and r.valid.tolist() == [True, True, False]
    np.testing.assert_allclose(r.ap[:2], [5/6, .5]); np.testing.assert_allclose(r.inp[:2], [2/3, .5])
    np.testing.assert_allclose(r.cmc, [.5, 1, 1, 1, 1])
    d = r.to_dict()
    assert (d['n_queries'], d['n_without_match'], d['n_ids'], d['n_gallery']) == (2, 1, 2, 5)

def test_junk_changes_the_rank():
    dist = np.array([[.1, .2, .3]])
    assert evaluate_ranking(dist, [1], [0, 0, 1]).first_hit[0] == 3
    assert evaluate_ranking(dist, [1], [0, 0, 1], junk=np.array([[True, False, False]])).first_hit[0] == 2
    assert not evaluate_ranking(dist, [1], [0, 0, 1], junk=np.array([[False, False, True]])).valid[0]

def test_perfect_is_one():
    ids = np.repeat(np.arange(10), 3)
    r = evaluate_ranking(distances(np.eye(10)[ids], np.eye(10)[ids]), ids, ids, junk=np.eye(30, dtype=bool))
    assert r.rank(1) == r.mAP == r.mINP == 1 and bootstrap(r) == dict(rank1=(1, 1), mAP=(1, 1))

@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_collapsed_embeddings_score_nothing(metric, dtype):
    f = np.tile(np.random.default_rng(0).normal(size=(1, 128)), (500, 1)).astype(dtype); ids = np.repeat(np.arange(125), 4)
    r = evaluate_ranking(lazy_distances(f, f, metric=metric), ids, ids, junk=np.eye(500, dtype=bool))
    assert r.rank(1) == 0 and r.mAP < r.chance['mAP']

@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_not_finite_is_refused(bad):
    f, ids = some(20, 4); g = f.copy(); g[7, 2] = bad
    for call in (lambda: distances(g, f), lambda: distances(f, g), lambda: all_observations(g, obs_of(ids)), lambda: single_shot(g, obs_of(ids))):
        with pytest.raises(ValueError, match='1 of 20 rows'): call()
    d = distances(f, f); d[3, 4] = bad
    with pytest.raises(ValueError, match='NaN or infinite'): evaluate_ranking(d, ids, ids)
    evaluate_ranking(d, ids, ids, junk=~np.isfinite(d))     # junk may hold anything

# -- against plain restatements
@pytest.mark.parametrize('n,n_ids', [(60, 5), (300, 40), (1500, 3)])    # the last has about 500 matches: the searching branch
def test_parity_with_argsort(n, n_ids):
    f, ids = some(n, n_ids); g = np.random.default_rng(1); q = slice(0, 60)
    d, junk = distances(f[q], f), g.random((60, n)) < .2
    junk[5] = True
    r, want = evaluate_ranking(d, ids[q], ids, junk=junk, tie_eps=0, chunk=17), restate(d, ids[q], ids, junk)
    assert (r.first_hit == want[:, 0]).all() and not r.valid[5]
    np.testing.assert_allclose(r.ap, want[:, 1], atol=1e-12); np.testing.assert_allclose(r.inp, want[:, 2], atol=1e-12)
    assert (r.n_allowed == (~junk).sum(1)).all()

def test_ties_are_counted_against_the_match():
    g = np.random.default_rng(0); d = g.integers(0, 4, (40, 50)).astype(float); q, i = g.integers(0, 5, 40), g.integers(0, 5, 50)
    r = evaluate_ranking(d, q, i)
    want = restate(d+.5*(q[:, None] == i), q, i, np.zeros(d.shape, bool))      # matches pushed behind their ties
    assert (r.first_hit == want[:, 0]).all(); np.testing.assert_allclose(r.ap, want[:, 1])

def test_blocks_equal_the_whole():
    f, ids = some(100, 10); obs = obs_of(ids)
    a = evaluate_ranking(distances(f, f), ids, ids, junk=junk_mask(obs, obs))
    b = evaluate_ranking(lazy_distances(f, f), ids, ids, junk=lazy_junk(obs, obs), chunk=7)
    c = all_observations(f, obs, chunk=13)
    for r in (b, c): np.testing.assert_allclose(r.ap, a.ap); assert (r.first_hit == a.first_hit).all()

def test_identities_may_be_strings():
    f, ids = some(80, 8); names = np.array([f'veh{i:02d}' for i in ids]); me = np.eye(80, dtype=bool); d = distances(f, f)
    a, b = evaluate_ranking(d, ids, ids, junk=me), evaluate_ranking(d, names, names, junk=me)
    np.testing.assert_allclose(a.ap, b.ap); assert bootstrap(a) == bootstrap(b)

def test_both_distances_rank_unit_vectors_alike():
    f, ids = some(120, 12); f /= np.linalg.norm(f, axis=1, keepdims=True); me = np.eye(120, dtype=bool)
    a, b = (evaluate_ranking(distances(f, f, metric=m), ids, ids, junk=me, tie_eps=0) for m in ('cosine', 'euclidean'))
    assert (a.first_hit == b.first_hit).all(); np.testing.assert_allclose(a.ap, b.ap)

def test_distances_far_from_the_origin():
    xy = np.array([[650_000.25, 1_400_000.5], [650_003.25, 1_400_004.5]])
    np.testing.assert_allclose(distances(xy, xy, metric='euclidean'), [[0, 5], [5, 0]], atol=1e-6)

@pytest.mark.parametrize('K,G', [(1, 1), (1, 9), (3, 9), (9, 9), (40, 60)])
def test_chance_equals_simulation(K, G):
    g, sim = np.random.default_rng(0), []
    for _ in range(4000):
        r = np.sort(g.permutation(G)[:K])+1; sim.append([*(r[0] <= k for k in (1, 5, 10)), (np.arange(1, K+1)/r).mean(), K/r[-1]])
    np.testing.assert_allclose(list(chance([K], [G]).values()), np.mean(sim, 0), atol=.025)

def test_chance_is_exact():
    all_rankings = [np.sort(np.flatnonzero(np.isin(p, (0, 1))))+1 for p in itertools.permutations(range(5))]
    want = np.mean([[r[0] <= 1, r[0] <= 2, (np.arange(1, 3)/r).mean(), 2/r[-1]] for r in all_rankings], 0)
    np.testing.assert_allclose(list(chance([2, 2], [5, 5], ks=(1, 2)).values()), want)

def test_random_ranking_scores_chance():
    g = np.random.default_rng(0); q, i = g.integers(0, 20, 2000), g.integers(0, 20, 100)
    r = evaluate_ranking(g.random((2000, 100)), q, i, junk=g.random((2000, 100)) < .3)
    for k, v in r.chance.items(): assert abs(r.to_dict()[k]-v) < .03, k

def test_roc_against_brute_force():
    f, ids = some(60, 6); g = np.random.default_rng(2); d, junk = distances(f, f).round(2), g.random((60, 60)) < .3
    r = roc(d, ids, ids, junk=junk, fars=(1e-3, .01, .1, .5, 1), chunk=11)
    same = ids[:, None] == ids; pos, neg = d[same & ~junk], d[~same & ~junk]
    for far, tar in zip(r['far'], r['tar']):
        best = max((pos <= t).mean() if (neg <= t).mean() <= far else 0 for t in [-1, *np.unique(d)])
        assert tar == pytest.approx(best)
    assert (r['n_pos'], r['n_neg']) == (len(pos), len(neg)) and r['tar'][-1] == 1

# -- protocols
def obs_of(ids, n_scenes=1, dt=.5):
    n = len(ids); seen = np.array([(ids[:i] == ids[i]).sum() for i in range(n)])
    scene = np.array([f's{i % n_scenes}' for i in ids])
    return Observations(ids, [f'{s}-{t}' for s, t in zip(scene, seen)], seen*dt, scene)

def test_junk_rule():
    obs = Observations(['a', 'a', 'b', 'a', 'a'], ['f0', 'f1', 'f0', 'f4', 'g0'], [0, .5, 0, 2, 0], ['s', 's', 's', 's', 't'])
    assert junk_mask(obs, obs)[0].tolist() == [True, True, True, False, False]                   # a gap of exactly 2 s is allowed
    assert junk_mask(obs, obs, min_gap=0)[0].tolist() == [True, False, True, False, False]       # the same sample stays junk
    assert junk_mask(obs, obs, scope='scene')[0].tolist() == [True, True, True, False, True]
    assert junk_mask(obs, obs, scope='other')[0].tolist() == [True, True, True, True, False]
    r = all_observations(np.eye(5), obs)
    assert r.gaps[0] == 2 and np.isnan(r.gaps[4]) and r.to_dict()['gap_min'] == 2
    with pytest.raises(ValueError, match="'scene'"): junk_mask(obs, obs, scope='town')

def test_queries_can_be_a_part():
    f, ids = some(50, 5); obs, some_q = obs_of(ids), np.arange(50) % 3 == 0
    a, b = all_observations(f, obs), all_observations(f, obs, query=some_q)
    np.testing.assert_allclose(b.ap, a.ap[some_q])
    c = all_observations(distances(f, f), obs, metric='given', query=some_q)
    np.testing.assert_allclose(c.ap, b.ap)

def test_microseconds_are_refused():
    with pytest.raises(ValueError, match='microseconds'): Observations([1], [1], [1.5e15], [1])
    with pytest.raises(ValueError, match='ids 2'): Observations([1, 2], [1], [0], [1])

def test_tiny_galleries():
    obs = Observations([1, 2], ['f', 'g'], [0, 9], ['s', 's'])
    r = all_observations(np.eye(2), obs)
    assert r.n_queries == 0 and np.isnan(r.mAP) and len(r.cmc) == 1 and np.isnan(r.to_dict()['rank1']) and np.isnan(bootstrap(r)['mAP'][0])
    r = all_observations(np.eye(2), Observations([1, 1], ['f', 'g'], [0, 9], ['s', 's']))
    assert r.rank(1) == 1 and r.cmc.tolist() == [1] and r.to_dict()['rank10'] == 1
    assert evaluate_ranking(np.zeros((0, 0)), [], []).n_queries == 0
    with pytest.raises(ValueError, match='2 identities'): single_shot(np.eye(2), obs)

def test_cmc_is_monotone_and_clamped():
    f, ids = some(300, 30); r = evaluate_ranking(distances(f, f), ids, ids, junk=np.eye(300, dtype=bool))
    assert len(r.cmc) == 100 and (np.diff(r.cmc) >= 0).all()
    for k in (1, 5, 10): assert r.cmc[k-1] == pytest.approx(r.rank(k))
    f, ids = some(8, 2); assert len(evaluate_ranking(distances(f, f), ids, ids).cmc) == 8

def test_single_shot():
    f, ids = some(200, 20, noise=.3); obs = obs_of(ids)
    a, b = single_shot(f, obs), single_shot(f, obs)
    assert (a.ranks == b.ranks).all() and a.ranks.shape == (10, 20-a.n_skipped) and a.ranks.min() >= 1 and a.ranks.max() <= 20
    assert (single_shot(f, obs, seed=1).ranks != a.ranks).any()
    d = a.to_dict(); assert d['n_ids'] == a.ranks.shape[1] and d['rank1'] == pytest.approx(a.cmc[0]) and d['n_galleries'] == 10
    assert a.chance['rank1'] == pytest.approx(1/a.ranks.shape[1])
    assert single_shot(np.eye(20)[ids], obs).to_dict()['rank1'] == 1
    np.testing.assert_array_equal(single_shot(distances(f, f), obs, metric='given').ranks, a.ranks)

def test_single_shot_pairs_are_far_apart():
    ids = np.repeat(np.arange(3), 6); obs = obs_of(ids); near = np.abs(obs.times[:, None]-obs.times) < 2
    own = ids[:, None] == ids
    d = np.where(own & near, 9., np.where(own, 0., 1.))            # a pair too near in time would lose against everything
    assert (single_shot(d, obs, metric='given', n_galleries=50).ranks == 1).all()

# -- baselines and tables
def test_baselines_have_the_promised_shapes():
    g = np.random.default_rng(0); patches = [g.integers(0, 256, (3, h, w), dtype=np.uint8) for h, w in ((40, 60), (3, 2), (64, 64))]
    crops = g.normal(size=(3, 7, 28, 31)).astype(np.float16)
    assert raw_crop_features(crops).shape == (3, 7*64) and raw_crop_features(crops, size=None, chunk=2).shape == (3, 7*28*31)
    assert colour_features(patches).shape == (3, 64) and thumbnail_features(patches[::2]).shape == (2, 48)
    np.testing.assert_allclose((colour_features(patches)**2).sum(1), 1, rtol=1e-5)
    assert position_features(g.normal(size=(3, 3))).shape == (3, 2)
    wlh = np.array([[2., 4, 1.5]]*3); np.testing.assert_allclose(box_size_features(wlh), np.log(wlh))
    np.testing.assert_array_equal(box_size_features(wlh, noise=.1, seed=3), box_size_features(wlh, noise=.1, seed=3))
    assert set(BASELINE_METRICS.values()) <= {'cosine', 'euclidean'}

def test_pooling_is_the_mean():
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    np.testing.assert_allclose(raw_crop_features(x, size=8).reshape(2, 3, 8, 8), x.reshape(2, 3, 8, 2, 8, 3).mean((3, 5)), atol=1e-5)

def test_tables():
    f, ids = some(60, 6); rows = evaluate_all({'emb': f, '<pos>': (f[:, :2], 'euclidean')}, obs_of(ids), intervals=True)
    assert [r['method'] for r in rows] == ['emb', '<pos>', 'chance'] and len(rows[0]['mAP_ci']) == 2
    text, md, page = (format_table(rows, fmt=k) for k in ('text', 'markdown', 'html'))
    assert len(text.splitlines()) == 4 and md.splitlines()[1].startswith('| -') and '&lt;pos&gt;' in page
    assert 'rank1' in format_table(evaluate_all({'emb': f}, obs_of(ids), protocol='single-shot'))
    with pytest.raises(ValueError, match='single-shot'): evaluate_all({}, obs_of(ids), protocol='x')
    with pytest.raises(ValueError, match='58 features for 60'): all_observations(f[:58], obs_of(ids))
    with pytest.raises(ValueError, match='length 2'): distances(f[:, :2], f)
    with pytest.raises(ValueError, match="'cosine'"): distances(f, f, metric='manhattan')

# -- real tracks
@pytest.fixture(scope='module')
def val_boxes():
    root = Path(os.environ.get('BEV_REID_DATA', Path(__file__).parents[1]/'../shared/data'))/'nuscenes_val_boxes'/'v1.0-mini'
    if not root.exists(): pytest.skip(f'no nuScenes tables at {root}: set BEV_REID_DATA')
    table = {n: json.loads((root/f'{n}.json').read_text()) for n in ('sample', 'sample_annotation', 'instance', 'category')}
    sample, inst, cat = ({r['token']: r for r in table[n]} for n in ('sample', 'instance', 'category'))
    ann = table['sample_annotation']
    names = np.array([cat[inst[a['instance_token']]['category_token']]['name'] for a in ann])
    obs = Observations([a['instance_token'] for a in ann], [a['sample_token'] for a in ann], [sample[a['sample_token']]['timestamp']*1e-6 for a in ann], [sample[a['sample_token']]['scene_token'] for a in ann])
    return obs, np.array([a['size'] for a in ann]), np.array([a['translation'] for a in ann]), np.char.startswith(names, 'vehicle')

@pytest.mark.nuscenes
def test_annotated_box_size_is_a_leak(val_boxes):
    obs, wlh, _, _ = val_boxes
    sizes = [np.unique(wlh[obs.ids == i], axis=0) for i in np.unique(obs.ids)]
    assert all(len(s) == 1 for s in sizes) and (len(sizes), len(np.unique(np.concatenate(sizes), axis=0))) == (215, 206)
    f, junk = box_size_features(wlh), junk_mask(obs, obs, scope='scene')
    def rank1(q, **kw): return evaluate_ranking(distances(q, f, metric='euclidean'), obs.ids, obs.ids, junk=junk, **kw).rank(1)
    assert rank1(f, tie_eps=-1e-6) == 1                            # ties for the match: 9 instances share their size with another
    assert rank1(f) == pytest.approx(.92, abs=.01)                 # ties against it
    assert rank1(box_size_features(wlh, noise=.05)) == pytest.approx(.41, abs=.03)   # noise on the queries only

@pytest.mark.nuscenes
def test_vehicles_of_real_tracks(val_boxes):
    obs, wlh, xyz, vehicle = val_boxes; obs = obs.take(vehicle)
    def measure(f): return all_observations(f[vehicle], obs, metric='euclidean', scope='scene')
    r = {n: measure(box_size_features(wlh, noise=n)) for n in (0, .02, .05, .1)}
    assert [r[n].rank(1) for n in r] == pytest.approx([.95, .63, .27, .14], abs=.02)
    assert r[0].n_ids == 120 and r[0].to_dict()['gap_min'] >= 2-1e-6 and r[.1].rank(1) > r[.1].chance['rank1']
    assert measure(position_features(xyz)).rank(1) > .5           # most vehicles are parked
