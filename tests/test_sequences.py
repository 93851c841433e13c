"""Tracklets, distances of sequences, routes, learning and the verbs: plain restatements, cases by hand, and what must not happen at the ends of tracks"""
import itertools, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bev_reid.evaluate import Observations, all_observations, evaluate_ranking
from bev_reid.fit import FitConfig, checkpoints, load_checkpoint
from bev_reid.routes import SequenceMatches, match_sequences, read_descriptors, read_route, recall_at_n, slide, split_route, window_starts
from bev_reid.sequence_learning import (SequenceLearner, SequenceProjection, SequenceRecipe, SequenceSet, encode, load_projection, mine_negatives, route_set, sequence_distances,
                                        sequence_triplet_loss, simulate_passes, train_on_route, train_sequences, vehicle_set)
from bev_reid.sequences import (DISTANCES, TrackletDistances, dataset_tracklets, evaluate_tracklets, frame_distances, from_frames, match_tracklets, offsets, rank_tracklets, same_place,
                                tracklet_distances, tracklet_gap, tracklet_junk, tracklets, view_angle)

root = Path(__file__).resolve().parents[1]
rng = lambda seed=0: np.random.default_rng(seed)
WAYS = [(d, 'time') for d in DISTANCES]+[('mean_of_pairs', 'angle'), ('mean_of_pairs', 'none'), ('center', 'angle')]

def unit(x): return x/np.linalg.norm(x, axis=-1, keepdims=True)
def apart(a, b): return abs((a-b+np.pi) % (2*np.pi)-np.pi)

def plain(q, r, distance, align='time', qa=None, ra=None):
    "Distance of two sequences, sighting by sighting, in float64"
    q, r = unit(q.astype(float)), unit(r.astype(float)); i, j = len(q), len(r)
    D = np.array([[np.linalg.norm(a-b) for b in r] for a in q])
    if distance == 'mean_descriptor': return np.linalg.norm(unit(q.mean(0))-unit(r.mean(0)))
    if distance == 'nearest': return D.min()
    if distance == 'chamfer': return (D.min(1).mean()+D.min(0).mean())/2
    if distance == 'best_offset': return min(np.mean([D[k, k+s] for k in range(i) if 0 <= k+s < j]) for s in range(-i, j) if sum(0 <= k+s < j for k in range(i)) >= -(-min(i, j)//2))
    if align == 'none': return D.mean()
    if align == 'angle':
        near = [np.argmin([apart(a, b) for b in ra]) for a in qa]; back = [np.argmin([apart(a, b) for a in qa]) for b in ra]
        return D[i//2, near[i//2]] if distance == 'center' else (np.mean([D[k, near[k]] for k in range(i)])+np.mean([D[back[k], k] for k in range(j)]))/2
    return D[i//2, j//2] if distance == 'center' else np.mean([D[k, l] for k, l in zip(*same_place(i, j))])

def passes(n=12, seed=0, dim=8, longest=7):
    "Tracks of many lengths with holes, as shuffled observations"
    g = rng(seed); rows = []
    for track in range(2*n):
        for t in np.sort(g.permutation(40)[:g.integers(1, longest+1)]): rows.append((track % n, track, t*.5+30*(track >= n)))
    rows = np.array(rows)[g.permutation(len(rows))]
    obs = Observations(rows[:, 0].astype(int), [f'{a}-{b}' for a, b in rows[:, 1:]], rows[:, 2], ['s']*len(rows))
    return obs, rows[:, 1].astype(int), g.normal(size=(len(rows), dim)).astype(np.float32), g.uniform(-np.pi, np.pi, len(rows))


# -- tracklets
@pytest.mark.parametrize('length, stride', [(None, 1), (1, 1), (2, 1), (3, 2), (4, 4)])
def test_tracklets_are_ordered_and_never_cross_the_end_of_a_track(length, stride):
    obs, tracks, _, a = passes()
    t = tracklets(obs, tracks, length=length, stride=stride, max_gap=4., angles=a)
    want = []
    for k in np.unique(tracks):                                                            # the same, track by track
        own = np.flatnonzero(tracks == k); own = own[obs.times[own].argsort()]
        for piece in np.split(own, np.flatnonzero(np.diff(obs.times[own]) > 4)+1): want += [piece.tolist()] if length is None else [piece[i:i+length].tolist() for i in range(0, len(piece)-length+1, stride)]
    assert [t[k].tolist() for k in range(len(t))] == want
    assert (t.angles == a[t.rows]).all() and (t.times == obs.times[t.rows]).all()
    for k in range(len(t)):
        assert {t.tracks[k]} == set(tracks[t[k]]) and {t.ids[k]} == set(obs.ids[t[k]])
        gaps = t.gaps[t.ptr[k]:t.ptr[k+1]]; assert np.isnan(gaps[0]) and (gaps[1:] > 0).all() and (gaps[1:] <= 4).all()

def test_middles():
    t = tracklets(Observations(['a']*6, list('uvwxyz'), np.arange(6)*.5, ['s']*6), [0]*6)
    assert [t.central(n)[0].tolist() for n in (1, 2, 3, 9)] == [[3], [2, 3], [2, 3, 4], [0, 1, 2, 3, 4, 5]]      # a middle of n has its centre where the whole has it
    assert t.take([0, 0]).rows.tolist() == list(range(6))*2

def test_tracklets_say_what_is_wrong():
    obs = Observations(['a', 'a', 'b'], list('xyz'), [0, .5, 0], ['s']*3)
    with pytest.raises(ValueError, match='longest of 2 pieces .* has 2; lower the length to 2'): tracklets(obs, [0, 0, 1], length=3)
    with pytest.raises(ValueError, match='seen twice at 0 s'): tracklets(Observations(['a', 'a'], list('xy'), [0, 0], ['s']*2), [7, 7])
    with pytest.raises(ValueError, match='2 tracks for 3 observations'): tracklets(obs, [0, 0])
    with pytest.raises(ValueError, match='no observation'): tracklets(obs.take(np.zeros(3, bool)), [])
    with pytest.raises(ValueError, match='1 or more'): tracklets(obs, [0, 0, 1], length=0)
    assert len(tracklets(obs, [0, 0, 1], length=1)) == 3

def test_view_angle_does_not_depend_on_the_frame():
    g = rng(); x, y, yaw = g.uniform(-30, 30, (3, 50)); turn = .7
    a = view_angle(x, y, yaw); assert (abs(a) <= np.pi).all()
    assert apart(a, view_angle(np.cos(turn)*x-np.sin(turn)*y, np.sin(turn)*x+np.cos(turn)*y, yaw+turn)).max() < 1e-9
    np.testing.assert_allclose(view_angle([5, 0, -5], [0, 5, 0], [np.pi, np.pi/2, 0]), [0, -np.pi, 0], atol=1e-9)    # from the front, from behind, from the front

# -- distances
@pytest.mark.parametrize('distance, align', WAYS)
def test_distances_of_any_lengths(distance, align):
    obs, tracks, x, a = passes(); t = tracklets(obs, tracks, max_gap=5., angles=a)
    assert len(set(t.lengths)) >= 4
    D = TrackletDistances(x, x, tracklets=(t, t), distance=distance, align=align, most=300)(slice(0, 9))
    at = lambda k: slice(t.ptr[k], t.ptr[k+1])
    want = [[plain(x[t[i]], x[t[j]], distance, align, t.angles[at(i)], t.angles[at(j)]) for j in range(len(t))] for i in range(9)]
    np.testing.assert_allclose(D, want, atol=1e-3)                                         # float32: a distance of 0 is known to about 3e-4
    off = ~np.eye(9, len(t), dtype=bool); np.testing.assert_allclose(D[off], np.array(want)[off], atol=1e-5 if distance != 'nearest' else 1e-3)

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_duplicates_are_no_nan(dtype):
    x = np.repeat(rng().normal(size=(3, 64)).astype(dtype), 40, 0); obs = Observations(np.repeat([0, 1, 2], 40), np.arange(120), np.tile(np.arange(40)*.5, 3), ['s']*120)
    t = tracklets(obs, obs.ids, length=4)
    for d in DISTANCES:
        D = TrackletDistances(x, x, tracklets=(t, t), distance=d)(slice(None)); assert np.isfinite(D).all() and (D >= 0).all() and D.diagonal().max() < 2e-3
    m = match_sequences(x, x, length=4); assert np.isfinite(m.dist).all()
    assert np.isfinite(TrackletDistances(0*x, x, tracklets=(t, t))(slice(None))).all()     # an empty descriptor is as far from everything

def test_nearest_tracklets_in_any_blocks():
    obs, tracks, x, a = passes(40); t = tracklets(obs, tracks, length=3, max_gap=9); D = TrackletDistances(x, x, tracklets=(t, t), distance='chamfer')
    junk = lambda i, j: t.tracks[i][:, None] == t.tracks[j]; full = D(slice(None)); full[t.tracks[:, None] == t.tracks] = np.inf
    for block in ((1000, 1000), (7, 11), (64, 10)):
        d, i = match_tracklets(D, top=6, junk=junk, block=block)
        np.testing.assert_allclose(d, np.sort(full, 1)[:, :6], atol=1e-3); np.testing.assert_allclose(np.take_along_axis(full, i, 1), d, atol=1e-3)
    d, i = match_tracklets(D, top=len(t), junk=junk); assert ((i == -1) == np.isinf(d)).all() and (i == -1).any()

def test_distances_say_what_is_wrong():
    obs, tracks, x, a = passes(); t = tracklets(obs, tracks); T = dict(tracklets=(t, t))
    for kw, says in ((dict(distance='dtw'), "no distance of tracklets 'dtw': choose one of mean_of_pairs, center"), (dict(align='space'), 'align must be'), (dict(distance='chamfer', align='none'), 'finds its pairs itself'),
                     (dict(align='angle'), 'needs the angle of view')):
        with pytest.raises(ValueError, match=says): TrackletDistances(x, x, **T, **kw)
    bad = x.copy(); bad[3, 1] = np.nan
    for q, r, says in ((bad, x, 'query holds 1 of .* NaN'), (x, x[:, :5], 'length 8, those of the gallery 5'), (x[0], x, 'table'), (x[:4], x, 'but 4 descriptors')):
        with pytest.raises(ValueError, match=says): TrackletDistances(q, r, **T)

# -- ranking
def test_junk_is_measured_between_the_ends():
    obs = Observations(['a']*8+['b']*4, [f'{i}' for i in range(12)], [*np.arange(8)*.5, *np.arange(4)*.5], ['s']*8+['z']*4)
    t = tracklets(obs, [0]*8+[1]*4, length=2)                                              # of a: 0 to .5, .5 to 1, ..., 3 to 3.5
    gap = tracklet_gap(t, t); np.testing.assert_allclose(gap[0, :7], [-.5, 0, .5, 1, 1.5, 2, 2.5])
    assert tracklet_junk(t, t, min_gap=2.)(slice(0, 1))[0].tolist() == [True]*5+[False]*5
    assert tracklet_junk(t, t, min_gap=2., scope='scene')(slice(0, 1))[0].tolist() == [True]*5+[False]*2+[True]*3
    assert tracklet_junk(t, t, min_gap=2., scope='other')(slice(0, 1))[0].tolist() == [True]*7+[False]*3
    with pytest.raises(ValueError, match='scope'): tracklet_junk(t, t, scope='city')

def test_tracklets_of_one_rank_as_observations():
    obs, tracks, x, _ = passes(30, longest=9); t = tracklets(obs, tracks, length=1)
    got, want = rank_tracklets(x, t), all_observations(x, obs)
    for k in ('first_hit', 'n_matches', 'n_allowed'): assert (getattr(got, k) == getattr(want, k)[t.rows]).all(), k
    np.testing.assert_allclose(got.ap, want.ap[t.rows], atol=1e-6); np.testing.assert_allclose(got.gaps, want.gaps[t.rows])

def test_lengths_rank_the_same_queries():
    obs, tracks, x, a = passes(30, longest=9); t = tracklets(obs, tracks, length=5, max_gap=30, angles=a)
    rs = [rank_tracklets(x, t.central(n), junk_by=t, min_gap=1.) for n in (1, 2, 5)]
    assert all((r.n_allowed == rs[0].n_allowed).all() and (r.n_matches == rs[0].n_matches).all() and r.to_dict()['gap_median'] == rs[0].to_dict()['gap_median'] for r in rs)
    D = TrackletDistances(x, x, tracklets=(t, t))(slice(None)); want = evaluate_ranking(D, t.ids, t.ids, junk=tracklet_junk(t, t, min_gap=1.))
    assert (rs[2].first_hit == want.first_hit).all() and rs[2].to_dict()['protocol'] == 'tracklet'

# -- routes
@pytest.mark.parametrize('length', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('distance', DISTANCES)
def test_windows_of_a_route(length, distance):
    g = rng(length); q, r = g.normal(size=(23, 6)).astype(np.float32), g.normal(size=(41, 6)).astype(np.float32)
    qt, rt = np.repeat([0, 1], [9, 14]), np.repeat([5, 6, 5], [11, 3, 27])                 # a label that comes back is another stretch
    c = length//2; ok = lambda t: [s for s in range(len(t)-length+1) if len(set(t[s:s+length])) == 1 and (np.diff(t[s:s+length]) == 0).all()]
    qs, rs = ok(qt), ok(rt)
    want = np.array([[plain(q[i:i+length], r[j:j+length], distance) for j in rs] for i in qs])
    for block in ((512, 4096), (5, 7), (4, 40)):
        m = match_sequences(q, r, length=length, distance=distance, top=6, q_tracks=qt, r_tracks=rt, block=block)
        assert (m.query == np.array(qs)+c).all() and (m.candidates == np.array(rs)+c).all()
        np.testing.assert_allclose(m.dist, np.sort(want, 1)[:, :6], atol=2e-4)
        np.testing.assert_allclose(np.take_along_axis(want, np.searchsorted(m.candidates, m.index), 1), m.dist, atol=2e-4)
    if distance != 'mean_descriptor':
        D = frame_distances(*(F.normalize(torch.tensor(v), dim=1) for v in (q, r))); np.testing.assert_allclose(slide(D, length, distance)[np.ix_(qs, rs)], want, atol=2e-4); assert (D == frame_distances(*(F.normalize(torch.tensor(v), dim=1) for v in (q, r)))).all()

def test_a_gallery_on_disk_and_what_does_not_count(tmp_path):
    x = rng().normal(size=(300, 16)).astype(np.float32); np.save(tmp_path/'r.npy', x); r, _ = read_descriptors(tmp_path/'r.npy')
    assert isinstance(r, np.memmap)
    m = match_sequences(x[:50], r, length=4, top=3, block=(16, 32)); assert (m.index[:, 0] == m.query).all()
    m = match_sequences(x, r, length=4, top=400, junk=lambda a, b: abs(a[:, None]-b) < 5, block=(100, 64))
    assert m.index.shape == (297, 297) and ((m.index == -1) == np.isinf(m.dist)).all() and (abs(m.index-m.query[:, None])[m.index >= 0] >= 5).all()
    assert ((m.index >= 0).sum(1) == [(abs(m.candidates-i) >= 5).sum() for i in m.query]).all()

def test_the_best_stay_the_best():
    "A gallery whose every block is better than the last, and one where no later block matters"
    q = np.eye(8, dtype=np.float32)[:1].repeat(6, 0)+.01*rng().normal(size=(6, 8)).astype(np.float32); w = np.linspace(3, .1, 400)[:, None]
    r = (np.eye(8)[0]+w*np.eye(8)[1]).astype(np.float32)
    for x in (r, r[::-1].copy()):
        full = slide(frame_distances(*(F.normalize(torch.tensor(v), dim=1) for v in (q, x))), 3)
        for block in ((4, 16), (4, 50), (512, 4096)): np.testing.assert_allclose(match_sequences(q, x, length=3, top=10, block=block).dist, full.sort(1)[0][:, :10], atol=1e-6)

def test_routes_say_what_is_wrong():
    x = rng().normal(size=(20, 4)).astype(np.float32); bad = x.copy(); bad[17] = np.inf
    for q, r, kw, says in ((x[:3], x, {}, 'query has no run of 5 frames: its longest has 3'), (x, x, dict(r_tracks=np.arange(20)//4), 'reference has no run of 5'), (x, x[:, :3], {}, 'length 4, references'),
                           (x, x, dict(length=0), '1 or more'), (x, x, dict(top=0), 'top'), (x, x, dict(distance='x'), 'choose one'), (x, bad, {}, r'reference, frames 0 to 19, holds 1 of'), (bad, x, {}, 'query holds 1'), (x, x, dict(q_tracks=[0]), '1 route labels'),
                           (x, x[0], {}, 'shape')):
        with pytest.raises(ValueError, match=says): match_sequences(q, r, **kw)
    one = match_sequences(x[:1], x, length=1, top=1); assert one.index.tolist() == [[0]]

def test_recall_by_hand():
    m = SequenceMatches(query=np.array([1, 2, 3]), index=np.array([[5, 1, 2], [0, 1, 3], [1, -1, -1]]), dist=np.zeros((3, 3)), candidates=np.array([0, 1, 2, 3, 5]))
    got = recall_at_n(m, [0, 1, 2, 90.], np.arange(6), radius=1, ns=(1, 2, 3, 5))          # frame 1 lies at 1, frame 2 at 2, frame 3 at 90: no positive
    assert got == {'R@1': 0., 'R@2': 1., 'R@3': 1., 'n_queries': 2, 'n_without': 1, 'radius': 1}
    with pytest.raises(ValueError, match='one position per frame'): recall_at_n(m, [0, 1], np.arange(6), radius=1)
    with pytest.raises(ValueError, match='finite'): recall_at_n(m, [0, 1, np.nan, 3], np.arange(6), radius=1)

# -- files
def struct(path, *, q, r, radius=10., near=25., **more):
    "A route file in the published layout: positions transposed, names as a column of cells"
    from scipy.io import savemat
    names = lambda n: np.array([f'{i}.png' for i in range(n)], dtype=object).reshape(-1, 1)
    d = dict(whichSet='test', dbImageFns=names(len(r)), qImageFns=names(len(q)), numImages=len(r), numQueries=len(q), posDistThr=radius, posDistSqThr=radius**2, dataset='toy', nonTrivPosDistSqThr=near, utmDb=np.asarray(r).T, utmQ=np.asarray(q).T)
    savemat(path, dict(dbStruct={k: v for k, v in {**d, **more}.items() if v is not None}), appendmat=False); return path

@pytest.mark.parametrize('n', [1, 2, 3, 40])
def test_published_route_files(tmp_path, n):
    q, r = rng().normal(size=(n, 2)), rng(1).normal(size=(n+5, 2))
    got = read_route(struct(tmp_path/'a.db', q=q, r=r))
    np.testing.assert_allclose(got.q_pos, q); np.testing.assert_allclose(got.r_pos, r); assert (got.radius, got.near, got.q_names[0], len(got.r_names)) == (10, 5, '0.png', n+5)
    frames = read_route(struct(tmp_path/'b.db', q=np.arange(n)[:, None], r=np.arange(n)[:, None], nonTrivPosDistSqThr=None)); assert frames.q_pos.shape == (n, 1) and frames.near == 10

def test_files_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError): read_route(tmp_path/'x.db')
    (tmp_path/'bad.db').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is no MATLAB file'): read_route(tmp_path/'bad.db')
    p = np.arange(8.)[:, None]
    with pytest.raises(ValueError, match='dbStruct has no posDistThr'): read_route(struct(tmp_path/'c.db', q=p, r=p, posDistThr=None))
    with pytest.raises(ValueError, match='numQueries is 5, but there are 8'): read_route(struct(tmp_path/'d.db', q=p, r=p, numQueries=5))
    np.save(tmp_path/'ids.npy', np.arange(5)); np.save(tmp_path/'cube.npy', np.zeros((2, 2, 2))); (tmp_path/'cut.npy').write_bytes((tmp_path/'cube.npy').read_bytes()[:90]); (tmp_path/'x.txt').write_text('')
    for name, says in (('ids.npy', 'int64 of the shape'), ('cube.npy', 'one row of numbers'), ('cut.npy', 'damaged'), ('x.txt', '.npy, .npz or .parquet')):
        with pytest.raises(ValueError, match=says): read_descriptors(tmp_path/name)
    assert split_route(np.zeros((0, 2)), 5.).shape == (0,)

# -- learning
def small(n=40, part=1, noise=3., **kw):
    q, r, *_ = simulate_passes(n, 5, part=part, noise=noise, **kw); rows, ids = np.arange(5*n).reshape(n, 5), np.arange(n)
    return SequenceSet(q.reshape(-1, 64), r.reshape(-1, 64), rows, rows, lambda i: ids == i, lambda i: ids != i)

@pytest.mark.parametrize('distance', DISTANCES)
def test_loss(distance):
    g = rng(3); q, p, n = (unit(g.normal(size=s)) for s in ((4, 5, 6), (4, 5, 6), (4, 3, 5, 6)))
    d = [plain(q[i], p[i], distance) for i in range(4)]; dn = [[plain(q[i], n[i, k], distance) for k in range(3)] for i in range(4)]
    t = [torch.tensor(v, requires_grad=True) for v in (q, p, n)]
    np.testing.assert_allclose(sequence_distances(t[0], t[2], distance).detach(), dn, atol=1e-9)
    loss = np.maximum(np.array(d)[:, None]-dn+.2, 0)
    assert sequence_triplet_loss(*t, margin=.2, distance=distance).item() == pytest.approx(loss.mean())
    valid = torch.tensor([[True, False, True]]*4); assert sequence_triplet_loss(*t, margin=.2, distance=distance, valid=valid).item() == pytest.approx(loss[:, [0, 2]].mean())
    assert sequence_triplet_loss(*t, valid=valid & False, distance=distance).item() == 0
    same = torch.tensor(q, requires_grad=True); sequence_triplet_loss(same, same, same[:, None], distance=distance).backward()
    assert same.grad.isfinite().all()                                                      # identical sequences

def test_the_hardest_that_violate_the_margin():
    d = torch.tensor([.9, .2, .7, .4, .45])
    assert mine_negatives(.3, d, margin=.2, n_keep=100, n_negatives=10).tolist() == [1, 3, 4]
    assert mine_negatives(.3, d, margin=.2, n_keep=2, n_negatives=10).tolist() == [1, 3] and mine_negatives(.3, d, margin=.2, n_negatives=1).tolist() == [1]
    assert mine_negatives(.0, d, margin=.1).tolist() == []

def test_mining_follows_positions():
    g = rng(); q, r = g.normal(size=(60, 8)).astype(np.float32), g.normal(size=(60, 8)).astype(np.float32)
    data = route_set(q, r, q_pos=np.arange(60), r_pos=np.arange(60), length=4, near=2, far=10)
    learner = SequenceLearner(SequenceProjection(8), data, SequenceRecipe(length=4, n_negatives=4)); learner.look()
    for i in data.queries[::7]:
        p, n = learner.mine(int(i)); gaps = abs(data.r_rows[:, 2]-data.q_rows[i, 2])
        near = np.flatnonzero(gaps <= 2); D = [plain(q[data.q_rows[i]], r[data.r_rows[k]], 'mean_of_pairs') for k in range(len(data.r_rows))]
        assert p == near[np.argmin(np.array(D)[near])] and (gaps[n] > 10).all()
        hard = [k for k in np.argsort(D) if gaps[k] > 10 and D[k] < D[p]+.3162][:4]; assert n.tolist() == hard      # 1,000 draws of some 40
        assert learner.memory[i][:len(n)].tolist() == hard
    with pytest.raises(ValueError, match='near 5 must not be larger than far 2'): route_set(q, r, q_pos=np.arange(60), r_pos=np.arange(60), near=5, far=2)
    with pytest.raises(ValueError, match='60 frames and 59 positions'): route_set(q, r, q_pos=np.arange(60), r_pos=np.arange(59), near=1, far=2)
    with pytest.raises(ValueError, match='no distance of tracklets'): SequenceRecipe(mining='hardest')

def test_vehicles_learn_from_other_times():
    obs, tracks, x, _ = passes(10, longest=9); t = tracklets(obs, tracks, length=3, max_gap=9); data = vehicle_set(x, t)
    for i in data.queries: assert (t.ids[data.near(i)] == t.ids[i]).all() and (tracklet_gap(t.take([i]), t.take(np.flatnonzero(data.near(i)))) >= 2).all() and (t.ids[data.far(i)] != t.ids[i]).all()
    with pytest.raises(ValueError, match='equal length'): vehicle_set(x, tracklets(obs, tracks))

@pytest.mark.parametrize('at', [7, 11])
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, at, monkeypatch):
    recipe = SequenceRecipe(refresh=4, n_negatives=3, batch_size=8, fit=FitConfig(max_steps=14, lr=1e-2, weight_decay=0., checkpoint_every=3))
    def go(run): net = SequenceProjection(64); train_sequences(net, small(), tmp_path/run, recipe=recipe); return net.linear.weight.detach()
    want = go('a'); forward = SequenceLearner.forward; n = [0]
    def dying(self, b):
        n[0] += 1
        if n[0] == at: raise KeyError('killed')
        return forward(self, b)
    monkeypatch.setattr(SequenceLearner, 'forward', dying)
    with pytest.raises(KeyError): go('b')
    monkeypatch.setattr(SequenceLearner, 'forward', forward)
    torch.testing.assert_close(go('b'), want, rtol=0, atol=0)
    state = load_checkpoint(tmp_path/'b'); assert state['model']['clock'] == 14 and (state['model']['memory'] >= 0).any() and state['config']['projection'] == dict(dim=64, out=64)
    torch.testing.assert_close(load_projection(tmp_path/'b').linear.weight, want)

def test_a_projection_begins_as_the_identity_and_learns(tmp_path):
    x = torch.randn(5, 64); torch.testing.assert_close(encode(SequenceProjection(64), x), F.normalize(x, dim=1)); assert SequenceProjection(64, 16)(x).shape == (5, 16)
    q, r, *_ = simulate_passes(150, 5, part=2, common=6., noise=1.5, aligned=False)                                 # what is common to all is most of it
    def rank1(net): d = tracklet_distances(*(encode(net, v.reshape(-1, 64)).unflatten(0, (150, 5)) for v in (q, r))); return (d.argmin(1) == torch.arange(150)).float().mean().item()
    net = SequenceProjection(64); before = rank1(net)
    train_sequences(net, small(600, noise=1.5, common=6., aligned=False), tmp_path/'run', recipe=SequenceRecipe(fit=FitConfig(max_steps=40, lr=1e-3, weight_decay=1e-3)))
    assert rank1(net) > before+.05

# -- the road, and the verbs
@pytest.fixture(scope='module')
def road(tmp_path_factory):
    "A toy world, a data set of an untrained network, and a metric network of two steps"
    from bev_reid.cli import set_fields
    from bev_reid.crops import CropConfig
    from bev_reid.data import DrivingData
    from bev_reid.dataset import DatasetConfig, build_dataset
    from bev_reid.lss import LiftSplat
    from bev_reid.toy import make_toy
    from bev_reid.train import LSSRecipe, MetricRecipe, train_metric
    from road import SMALL
    d = tmp_path_factory.mktemp('sequences'); data = DrivingData(make_toy(d/'world', n_scenes=2, n_samples=9, img_size=(112, 200), workers=2, seed=5))
    torch.manual_seed(0); lss = LiftSplat(set_fields(LSSRecipe.recipe('toy'), SMALL).lss).eval()
    build_dataset(lss, data, d/'reid', cfg=DatasetConfig(crop=CropConfig(extent=16., size=16)))
    recipe = set_fields(MetricRecipe.recipe('toy', max_steps=2), ['p=6', 'net.widths=[8,8]', 'net.embedding_dim=16'])
    train_metric(d/'reid', d/'metric', recipe=recipe, device='cpu'); return d

def test_tracklets_of_a_data_set(road):
    from bev_reid.dataset import ReIDDataset
    ds = ReIDDataset(road/'reid'); t = dataset_tracklets(ds, length=3)
    assert (ds.table['instance_token'][t.rows].reshape(-1, 3) == t.tracks[:, None]).all() and np.isfinite(t.angles).all()
    k = np.flatnonzero(ds.table['speed'] < .1)[0]; assert abs(view_angle(*(ds.table[c][k] for c in ('x', 'y', 'yaw')))) <= np.pi

def test_evaluation_of_tracklets(road):
    kw = dict(length=2, min_gap=1.); got = evaluate_tracklets(road/'metric', road/'reid', distance='chamfer', **kw)
    assert [r['method'] for r in got['rows']] == ['chamfer', 'center, one view', 'mean_descriptor', 'chance'] and got['settings']['ids_seen_in_training'] == 0
    assert [r['method'] for r in got['differences']] == ['chamfer - center, one view', 'chamfer - mean_descriptor']
    r = got['rows'][0]; assert r['n_queries'] > 0 and r['gap_min'] >= 1 and r['rank1_ci'][0] <= r['rank1'] <= r['rank1_ci'][1]
    plainly = evaluate_tracklets(road/'metric', road/'reid', distance='center', **kw)['rows']; assert [x['method'] for x in plainly] == ['center, one view', 'mean_descriptor', 'chance'] and plainly[0]['rank1'] == got['rows'][1]['rank1']
    flat = evaluate_tracklets(road/'metric', road/'reid', project=lambda e: torch.ones(len(e), 4), **kw)['rows'][0]; assert flat['rank1'] == 0      # all alike: ties count against the match
    for bad, says in ((dict(length=10), 'no tracklet of 10 sightings'), (dict(distance='dtw'), 'choose one of'), (dict(length=2, min_gap=60.), 'has a match 60 s away')):
        with pytest.raises(ValueError, match=says): evaluate_tracklets(road/'metric', road/'reid', **bad)

@pytest.mark.parametrize('what', ['projection', 'network'])
def test_learning_from_vehicles(road, tmp_path, what):
    from bev_reid.metric import load_metric
    from bev_reid.sequence_learning import train_on_vehicles
    recipe = SequenceRecipe(length=2, min_gap=1., batch_size=4, fit=FitConfig(max_steps=4, lr=1e-3, weight_decay=0.))
    assert train_on_vehicles(road/'metric', road/'reid', tmp_path/'run', recipe=recipe, what=what)['step'] == 4
    if what == 'projection':
        net = load_projection(tmp_path/'run'); got = evaluate_tracklets(road/'metric', road/'reid', length=2, min_gap=1., project=lambda e: encode(net, e))
    else:
        new, old = (load_metric(road/'metric' if p is None else p) for p in (tmp_path/'run', None)); assert not torch.equal(new.net.state_dict()[k := next(iter(dict(new.net.named_parameters())))], old.net.state_dict()[k])
        got = evaluate_tracklets(tmp_path/'run', road/'reid', length=2, min_gap=1.)
    assert got['rows'][0]['n_queries'] > 0
    with pytest.raises(ValueError, match="'projection' or 'network'"): train_on_vehicles(road/'metric', road/'reid', tmp_path/'x', what='all')

def shell(tmp, verb, *args, code=0):
    "Run a verb as an installed command"
    script = tmp/verb; script.write_text(f'from bev_reid.cli_sequences import {verb}\n{verb}()\n')
    r = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True, cwd=root, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == code, r.stderr
    return r.stdout if not code else r.stderr.strip().splitlines()[-1]

@pytest.fixture(scope='module')
def drives(tmp_path_factory):
    d, g = tmp_path_factory.mktemp('drives'), rng(); place, off = g.normal(size=(160, 16)), 3*g.normal(size=16)
    for n in 'qr': np.save(d/f'{n}.npy', (place+off*g.normal(size=(160, 1))+.8*g.normal(size=(160, 16))).astype(np.float32))
    for n, k in (('train', 100), ('test', 60)): struct(d/f'{n}.db', q=2.*np.arange(k)[:, None], r=2.*np.arange(k)[:, None], radius=20. if n == 'train' else 2., near=16.)
    return d

def test_verbs_match_and_learn(drives, tmp_path):
    files, part = (drives/'q.npy', drives/'r.npy'), ('--q-frames', '100:', '--r-frames', '100:')
    said = shell(tmp_path, 'bev_reid_match_sequences', *files, '--route', drives/'test.db', *part, '--length', 4, '--top', 20, '--out', tmp_path/'m.npz')
    assert '57 windows of 4 frames against 57, 20 kept' in said and 'n_queries 57' in said
    m = np.load(tmp_path/'m.npz'); assert m['query'][0] == 102 and m['index'].min() >= 102 and m['dist'].shape == (57, 20)
    from bev_reid.cli_sequences import bev_reid_match_sequences as match, bev_reid_train_sequences as train
    files, test = tuple(map(str, files)), str(drives/'test.db')
    got = train(str(tmp_path/'run'), q=files[0], r=files[1], route=str(drives/'train.db'), q_frames=':100', r_frames=':100', val_route=test, val_q_frames='100:', val_r_frames='100:', length=4, steps=30, device='cpu', set=['fit.patience=2'])
    assert 'R@5' in got['metrics'] and load_checkpoint(tmp_path/'run')['config']['fit']['best_by'] == 'R@5'
    assert match(*files, route=test, q_frames='100:', r_frames='100:', projection=str(tmp_path/'run'), length=4)['R@20'] > .2

def test_verbs_end_in_one_message(drives, tmp_path):
    from bev_reid.cli_sequences import bev_reid_match_sequences as match, bev_reid_train_sequences as train
    files = (str(drives/'q.npy'), str(drives/'r.npy')); bad = np.load(files[0]); bad[5] = np.nan; np.save(tmp_path/'nan.npy', bad); np.save(tmp_path/'thin.npy', bad[:, :3]); np.save(tmp_path/'one.npy', bad[:1])
    line = shell(tmp_path, 'bev_reid_match_sequences', tmp_path/'nan.npy', files[1], code=2); assert line.startswith('bev_reid_match_sequences: error: query holds 1 of 160 rows that are NaN'), line
    for args, kw, says in (((str(tmp_path/'one.npy'), files[1]), {}, 'query has no run of 5 frames: its longest has 1'), ((files[0], str(tmp_path/'thin.npy')), {}, 'query descriptors have length 16'), (files, dict(distance='dtw'), 'choose one of'),
                           (files, dict(route=str(drives/'test.db')), '160 frames, but the route file has 60'), (files, dict(q_frames='x'), 'first:last'), (files, dict(q_frames='900:'), 'none of them')):
        with pytest.raises(ValueError, match=says): match(*args, **kw)
    with pytest.raises(FileNotFoundError, match='no descriptors at'): match(str(drives/'none.npy'), files[1])
    with pytest.raises(ValueError, match='to learn from two drives'): train(str(tmp_path/'run'))
    with pytest.raises(ValueError, match='no distance of tracklets'): train(str(tmp_path/'run'), q=files[0], r=files[1], route=str(drives/'train.db'), loss='x', device='cpu')

def test_help(tmp_path):
    for v in ('bev_reid_match_sequences', 'bev_reid_train_sequences'): assert '--length' in shell(tmp_path, v, '--help')
    r = subprocess.run([sys.executable, '-c', "import sys, bev_reid.cli_sequences; print(*{'torch', 'numpy', 'scipy'} & set(sys.modules))"], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0 and not r.stdout.strip(), r.stdout+r.stderr                     # help answers at once

def test_embeddings_are_put_into_order(road, tmp_path):
    from bev_reid.cli_sequences import bev_reid_match_sequences, load_frames
    from bev_reid.export import export_embeddings
    from bev_reid.dataset import ReIDDataset
    p = export_embeddings(road/'metric', road/'reid', tmp_path/'e.npz', split='test'); x, tracks, rows = load_frames(p); t = ReIDDataset(road/'reid', split='test').table
    assert (t['instance_token'][rows] == tracks).all() and all((np.diff(t['timestamp'][rows[tracks == k]]) > 0).all() for k in set(tracks))
    got = bev_reid_match_sequences(str(p), str(p), length=2, top=3); assert (t['instance_token'][got['query']] != t['instance_token'][got['index'][:, 0]]).all()      # a track is no match of its own

def test_the_experiment_goes_on_where_it_stopped(tmp_path):
    cmd = [sys.executable, root/'nbs'/'_tools'/'results_sequences.py', '--quick', '--out', tmp_path/'s.json']; env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    r = subprocess.run(cmd, capture_output=True, text=True, env=env); assert r.returncode == 0, r.stderr
    got = json.loads((tmp_path/'s.json').read_text()); raw = got['summary']['aligned']['curves']['raw']
    assert set(got['seeds']) == {'0', '1'} and len({round(c['mean'][0], 6) for c in raw.values()}) == 1                                                              # at length 1 all distances are one
    del got['seeds']['1'], got['summary']; got['seeds']['0']['mark'] = 1; (tmp_path/'s.json').write_text(json.dumps(got))
    r = subprocess.run(cmd, capture_output=True, text=True, env=env); again = json.loads((tmp_path/'s.json').read_text())
    assert 'seed 0' not in r.stderr and 'seed 1' in r.stderr and again['seeds']['0']['mark'] == 1 and again['summary']['aligned']['curves']['raw'] == raw

def test_shapes_in_signatures_are_true():
    from test_shapes import checked
    checked('''
from bev_reid.evaluate import Observations
from bev_reid.sequences import *; from bev_reid.routes import *; from bev_reid.sequence_learning import *
from bev_reid.fit import FitConfig
import tempfile
q, r, qa, ra = simulate_passes(12, 5)
x, a, t = np.concatenate([q, r]).reshape(-1, 64), np.concatenate([qa, ra]).ravel(), np.repeat([0., 60.], 60)+np.tile(.5*np.arange(5), 24)
obs = Observations(np.tile(np.repeat(np.arange(12), 5), 2), np.arange(120), t, ['s']*120); tracks = np.repeat(np.arange(24), 5)
t = tracklets(obs, tracks, length=3, angles=a); t.gaps, t.take([0, 1]), t.central(2)
assert view_angle(np.ones(3), np.ones(3), np.ones(3)).shape == (3,) and tracklet_gap(t, t).shape == (72, 72)
for d in DISTANCES: rank_tracklets(x, t, distance=d)
rank_tracklets(x, t, align='angle'); match_tracklets(TrackletDistances(x, x, tracklets=(t, t)), top=3); film(np.zeros((120, 3, 8, 8), np.float32), t, [0, 1])
m = match_sequences(x[:60], x[60:], length=3, distance='mean_descriptor', q_tracks=tracks[:60]); recall_at_n(m, np.arange(60), np.arange(60), radius=2.)
slide(torch.rand(9, 8), 3, 'chamfer'); window_starts(9, 3); split_route(np.zeros((5, 2)), 3.)
for d in DISTANCES: sequence_triplet_loss(torch.rand(4, 5, 6), torch.rand(4, 5, 6), torch.rand(4, 3, 5, 6), distance=d, valid=torch.ones(4, 3, dtype=torch.bool))
with tempfile.TemporaryDirectory() as tmp:
    for kind in ('mean_of_pairs', 'mean_descriptor', 'chamfer'): train_sequences(SequenceProjection(64, 32), vehicle_set(x, t), tmp+'/'+kind, recipe=SequenceRecipe(length=3, loss=kind, mining=kind, fit=FitConfig(max_steps=2)))
    assert encode(load_projection(tmp+'/chamfer'), x).shape == (120, 32)
''', 'sequences', 'routes', 'sequence_learning')
