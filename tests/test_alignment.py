"""Scenes from many views: candidates, association, refinement, files, verbs; answers known by construction"""
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bev_reid.alignment import align_scene
from bev_reid.association import agglomerate
from bev_reid.candidates import HALF_TURN, TABLE_NOISE, BoxCandidates, NoiseModel, expand_symmetries, inv_pose, move, pose_of, rot_exp, rot_log, symmetric_distance
from bev_reid.hypotheses import AssociationConfig, Matching, chance_evidence, embedding_evidence, fit_poses, relative_poses, restrict, score_poses
from bev_reid.refinement import RefineConfig, inv_right_jacobian
from bev_reid.scene_files import read_candidates, read_models, read_scenario, write_candidates, write_scenario
from bev_reid.scene_scores import evaluate_scene, pair_scores
from bev_reid.scene_sim import SceneSpec, look_at, simulate_scene

root = Path(__file__).resolve().parents[1]
Z = np.array([0, 0, 1.])
TABLE = AssociationConfig(noise=TABLE_NOISE)


def scene(views, cars, *, label=None, size=(1.9, 4.5, 1.6), **kw):
    "Exact candidates: cars (o 4 4) seen by views (v 4 4), all by all"
    pose = np.concatenate([inv_pose(T) @ cars for T in views]); n = len(cars)
    return BoxCandidates(pose, np.repeat(np.arange(len(views)), n), np.tile(size, (len(pose), 1)), list(label or ['car']*n)*len(views), truth=np.tile(np.arange(n), len(views)), **kw)

def yaw(a, *xyz): return pose_of(rot_exp(a*Z), np.array(xyz, float))

# An asymmetric street: no turn or mirror image of it is near itself
CARS = np.array([yaw(.1, 3, 1, .8), yaw(1.7, -6, 9, .8), yaw(-2.4, 12, -4, .8), yaw(.9, -11, -13, .8), yaw(3.0, 17, 14, .8), yaw(-.6, 1, -17, .8)])
VIEWS = np.array([yaw(.4, -20, 3, 0), yaw(2.0, 5, -25, 0), yaw(-2.8, 24, 10, 0)])


# Poses and distances

def test_rotations_by_hand():
    np.testing.assert_allclose(rot_exp(np.array([0, 0, np.pi/2])), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(rot_log(np.diag([1., -1, -1])), [np.pi, 0, 0])
    g = np.random.default_rng(0); w = g.normal(size=(500, 3)); w *= (g.random(500)*3.1/np.linalg.norm(w, axis=1))[:, None]
    np.testing.assert_allclose(rot_log(rot_exp(w)), w, atol=1e-9)

def test_inverse_right_jacobian_by_differences():
    e = .9*np.random.default_rng(1).normal(size=(20, 3)); e *= np.minimum(1, 2.9/np.linalg.norm(e, axis=1))[:, None]; e[0] = 0; d = 1e-6
    for i in range(3):
        up = rot_log(rot_exp(e) @ rot_exp(d*np.eye(3)[i])); down = rot_log(rot_exp(e) @ rot_exp(-d*np.eye(3)[i]))
        np.testing.assert_allclose((up-down)/2/d, inv_right_jacobian(e)[..., i], atol=1e-6)

def test_symmetric_distance_by_hand():
    box = scene(VIEWS[:1], CARS[:1]).points[0]; T = np.eye(4)
    assert symmetric_distance(yaw(0, 3, 4, 0), T, box)[0] == pytest.approx(5)
    assert symmetric_distance(yaw(np.pi, 0, 0, 0), T, box)[0] == pytest.approx(np.hypot(1.9, 4.5))
    d, s = symmetric_distance(yaw(np.pi, .5, 0, 0), T, box, HALF_TURN)
    assert d == pytest.approx(.5) and s == 1
    # the symmetry is chosen by squares, the distance is a mean of lengths: not the same as the root of the mean square
    assert symmetric_distance(yaw(.3, 0, 0, 0), T, box)[0] == pytest.approx(2*np.sin(.15)*np.hypot(1.9, 4.5)/2)

def test_continuous_symmetries_turn_about_their_axis_and_offset():
    s = expand_symmetries(continuous=[dict(axis=[0, 0, -2], offset=[100, 0, 0])], steps=4)
    np.testing.assert_allclose(move(s, np.array([[.1, 0, 0]]))[:, 0], np.tile([.1, 0, 0], (4, 1)), atol=1e-12)
    np.testing.assert_allclose(move(s, np.array([[.2, 0, 0]]))[1, 0], [.1, -.1, 0], atol=1e-12)   # a quarter turn about an axis that points down
    both = expand_symmetries([np.diag([1., -1, -1, 1]).ravel()], [dict(axis=[0, 0, 1])], steps=64)
    assert len(both) == 128 and np.allclose(both[0], np.eye(4))

def test_discrete_symmetries_are_in_millimetres():
    T = np.diag([-1., -1, 1, 1]); T[0, 3] = 50
    assert expand_symmetries([T.ravel()])[1, 0, 3] == pytest.approx(.05)


# Files

def write_cosypose(d, rows, *, cams=(0, 4), models=None):
    d.mkdir(exist_ok=True); (d/'candidates.csv').write_text('scene_id,im_id,obj_id,score,R,t,time\n'+'\n'.join(rows)+'\n')
    (d/'scene_camera.json').write_text(json.dumps({str(c): dict(cam_K=[600, 0, 320, 0, 500, 240, 0, 0, 1], depth_scale=.1) for c in cams}))
    (d/'models_info.json').write_text(json.dumps(models or {'12': dict(diameter=300, min_x=-50, min_y=-60, min_z=0, size_x=100, size_y=120, size_z=80, symmetries_discrete=[np.diag([-1., -1, 1, 1]).ravel().tolist()])}))
    return d

ROW = '3,0,12,0.9,1 0 0 0 0 -1 0 1 0,100 200 1500,-1'

def test_cosypose_files_unchanged(tmp_path):
    c = read_scenario(write_cosypose(tmp_path/'s', [ROW, '3,4,12,0.2,1 0 0 0 1 0 0 0 1,0 0 900,0.5']))
    assert (c.scene, c.views, c.label.tolist()) == ('3', (0, 4), ['obj_000012']*2)
    np.testing.assert_allclose(c.pose[0], [[1, 0, 0, .1], [0, 0, -1, .2], [0, 1, 0, 1.5], [0, 0, 0, 1]])
    np.testing.assert_allclose(c.size[0], [.12, .1, .08])           # width along y, length along x, height
    np.testing.assert_allclose([c.points[0].min(0), c.points[0].max(0)], [[-.05, -.06, 0], [.05, .06, .08]])
    assert c.K[1, 0, 0] == 600 and c.K[1, 1, 1] == 500 and len(c.symmetries['obj_000012']) == 2
    assert len(read_scenario(tmp_path/'s', min_score=.3)) == 1

@pytest.mark.parametrize('rows, kw, says', [
    ([ROW, ROW.replace('3,', '4,', 1)], {}, 'holds 2 scenes'), ([ROW.replace('1500', 'nan')], {}, 'line 2'), ([ROW.replace(',12,', ',13,')], {}, 'unknown class obj_000013'), ([ROW.replace('3,0,', '3,9,')], {}, 'no camera for image 9'),
    ([ROW.replace('1 0 0 0 0 -1', '1 0 0 0 0')], {}, 'expected 9'), ([ROW.replace('1 0 0 0 0 -1 0 1 0', '2 0 0 0 0 -1 0 1 0')], {}, 'no rotation matrix'), ([], {}, 'no candidates'), ([ROW.replace('1 0 0 0 0 -1 0 1 0', '1 0 0 0 0 1 0 1 0')], {}, 'no rotation matrix')])
def test_bad_cosypose_files_are_named(tmp_path, rows, kw, says):
    with pytest.raises(ValueError, match=says): read_scenario(write_cosypose(tmp_path/'s', rows, **kw))

def test_models_without_a_box_are_cubes(tmp_path):
    (tmp_path/'m.json').write_text(json.dumps({'1': dict(diameter=1000*3**.5), '2': dict(size_x=1)}))
    with pytest.raises(ValueError, match='model 2'): read_models(tmp_path/'m.json')
    (tmp_path/'m.json').write_text(json.dumps({'1': dict(diameter=1000*3**.5)}))
    np.testing.assert_allclose(read_models(tmp_path/'m.json')['obj_000001']['size'], [1, 1, 1])

def test_round_trips(tmp_path):
    c, _ = simulate_scene(SceneSpec(regime='table', heading='ambiguous', embeddings='good', speed=1.), seed=4)
    write_candidates(c, tmp_path/'c.json'); d = read_candidates(tmp_path/'c.json')
    for k in 'pose view size score K embedding time velocity truth view2agent'.split(): np.testing.assert_allclose(getattr(d, k), getattr(c, k), atol=1e-12)
    write_scenario(c, tmp_path/'s'); d = read_scenario(tmp_path/'s')
    np.testing.assert_allclose(d.pose, c.pose, atol=1e-7); np.testing.assert_allclose(d.points, c.points, atol=1e-9); assert d.label.tolist() == c.label.tolist() and len(d.symmetries[d.label[0]]) == 2

@pytest.mark.parametrize('change, says', [(dict(candidates=[]), 'no candidates'), (dict(views=[]), 'unknown view'), (dict(candidates=[dict(view=0, label='car', size=[1, 1, 1])]), 'KeyError'),
    (dict(candidates=[dict(view=0, label='car', box=[0, 0, 0, 1, 2, float('nan'), 0])]), 'NaN'), (dict(candidates=[dict(view=0, label='car', box=[0, 0, 0, 1, 2, 0, 0])]), 'size above 0'),
    (dict(candidates=[dict(view=0, label='car', box=[0]*3+[1]*4, score=1), dict(view=0, label='car', box=[0]*3+[1]*4)]), 'all or none')])
def test_bad_json_is_named(tmp_path, change, says):
    (tmp_path/'c.json').write_text(json.dumps(dict(views=[dict(view=0)], candidates=[dict(view=0, label='car', box=[0, 0, 0, 1, 2, 1, 0])]) | change))
    with pytest.raises(ValueError, match=says): read_candidates(tmp_path/'c.json')

def test_json_box_is_the_house_order(tmp_path):
    (tmp_path/'c.json').write_text(json.dumps(dict(views=[dict(view='a', agent='x'), dict(view='b', agent='x')], symmetries=dict(car='pi'), candidates=[dict(view='b', label='car', box=[1, 2, 3, 1.9, 4.5, 1.6, np.pi/2])])))
    c = read_candidates(tmp_path/'c.json'); assert c.n_agents == 1 and c.view[0] == 1 and len(c.symmetries['car']) == 2
    np.testing.assert_allclose(np.ptp(move(c.pose, c.points)[0], axis=0), [1.9, 4.5, 1.6])         # turned left: its length runs along y


# Simulation

def test_look_at():
    T = look_at(np.array([[10., 0, 5]]), np.zeros((1, 3)))
    x = move(inv_pose(T), np.array([[[0, 0, 0], [0, 0, 1.], [0, 1., 0]]]))[0]
    assert x[0, :2] == pytest.approx([0, 0]) and x[0, 2] == pytest.approx(125**.5)
    assert x[1, 1] < -.5 and x[2, 0] > .5        # up is -y; seen from +x, +y is on the right

@pytest.mark.parametrize('regime, model', [('road', NoiseModel()), ('table', TABLE_NOISE)])
def test_noise_is_as_stated(regime, model):
    e = []
    for seed in range(30):
        c, t = simulate_scene(SceneSpec(regime=regime, n_objects=20, noise=2., outliers=0, false=0, missed=0), seed=seed); true = inv_pose(t.agents[c.view]) @ t.objects[c.truth]
        ref = replace(c, pose=true); L = np.linalg.inv(np.linalg.cholesky(model.cov(ref)))
        e.append(np.einsum('nij,nj->ni', L, np.concatenate([c.pose[:, :3, 3]-true[:, :3, 3], rot_log(true[:, :3, :3].swapaxes(1, 2) @ c.pose[:, :3, :3])], 1)))
    np.testing.assert_allclose(np.concatenate(e).std(0), 2, rtol=.08)

def test_shares_are_as_stated():
    cs = [simulate_scene(SceneSpec(n_objects=50, outliers=.3, missed=.2, false=3.), seed=s)[0] for s in range(12)]
    n = sum(len(c) for c in cs); true = sum((c.truth >= 0).sum() for c in cs)
    assert n == pytest.approx(12*4*(50*.8+3), rel=.05) and true == pytest.approx(12*4*50*.8*.7, rel=.06)


# Association

def test_exact_scene_is_solved_exactly():
    c = scene(VIEWS, CARS); s = align_scene(c)
    assert s.solved and s.obj.tolist() == list(range(6))*3
    for a in range(3): np.testing.assert_allclose(s.world[a], inv_pose(VIEWS[0]) @ VIEWS[a], atol=1e-6)
    np.testing.assert_allclose(s.state.objects, inv_pose(VIEWS[0]) @ CARS, atol=1e-6)

@pytest.mark.parametrize('model', ['se3', 'yaw4', 'bev3'])
def test_models_of_pose(model):
    up = VIEWS.copy(); up[1, 2, 3] = 2. if model != 'bev3' else 0.
    s = align_scene(scene(up, CARS), AssociationConfig(pose_model=model))
    assert s.solved; np.testing.assert_allclose(s.world, inv_pose(up[0]) @ up, atol=1e-6)

def test_restrict_and_fit():
    T = pose_of(rot_exp(np.array([.2, -.1, 1.])), [1., 2, 3]); flat = restrict(T, 'bev3')
    assert flat[2, 3] == 0 and np.allclose(flat[2, :3], [0, 0, 1]) and np.allclose(flat[:2, 3], [1, 2])
    x = np.random.default_rng(0).normal(size=(1, 9, 3)); y = move(T[None], x); y[0, 0] += 50; w = np.ones((1, 9)); w[0, 0] = 0
    np.testing.assert_allclose(fit_poses(y, x, w)[0], T, atol=1e-9)
    mirror = fit_poses(x*[1, 1, -1], x, np.ones((1, 9)))[0]; assert np.linalg.det(mirror[:3, :3]) == pytest.approx(1)

def test_score_counts_each_box_once():
    kw = dict(base=np.full((1, 2), 5.), va=np.ones(1), vb=np.zeros(2), seed_var=np.zeros(1), rot_var=np.zeros(1), seed=np.zeros(1, int))
    for backend in (None, 'numpy'): assert score_poses(np.eye(4)[None], np.zeros((1, 3)), np.zeros((2, 3)), backend=backend, **kw)[0] == pytest.approx(5)

def test_no_view_is_twice_in_an_object():
    for seed in range(6):
        c, _ = simulate_scene(SceneSpec(n_objects=25, n_classes=1, noise=2., false=5.), seed=seed); s = align_scene(c)
        for o in range(s.n_objects): v = c.view[s.obj == o]; assert len(v) == len(set(v)) >= 2

def test_agglomeration_starts_from_the_surest():
    ev = np.full((3, 3), -np.inf); ev[0, 1] = ev[1, 0] = 1; ev[1, 2] = ev[2, 1] = 2
    assert agglomerate(ev, np.array([0, 1, 0])).tolist() == [-1, 0, 0]
    ev[0, 2] = ev[2, 0] = -5; assert agglomerate(ev, np.array([0, 1, 2])).tolist() == [-1, 0, 0]
    ev[0, 2] = ev[2, 0] = -.5; assert agglomerate(ev, np.array([0, 1, 2])).tolist() == [0, 0, 0] and agglomerate(ev, np.array([0, 1, 2]), complete=True).tolist() == [-1, 0, 0]

def test_classes_and_sizes_keep_boxes_apart():
    cars = np.concatenate([CARS, CARS[:1]]); c = scene(VIEWS[:2], CARS); c.label[[0, 6]] = ['car', 'bus']
    assert align_scene(c).obj[[0, 6]].tolist() == [-1, -1]
    c = scene(VIEWS[:2], CARS); c.size[6] = [2.6, 11, 3.4]
    assert align_scene(c).obj[[0, 6]].tolist() == [-1, -1]

def test_square_is_ambiguous_until_something_tells():
    corner = np.array([[5., 5], [-5, 5], [-5, -5], [5, -5]]); cars = np.array([yaw(np.arctan2(y, x), x, y, 0) for x, y in corner])
    s = align_scene(scene(VIEWS[:2], cars)); assert not s.solved and 'ambiguous' in s.reason and (s.group == -1).all()
    assert all(r['margin'] < 4 and r['inliers'] == 4 for r in s.registration.rejected)
    assert align_scene(scene(VIEWS[:2], cars, label=['a', 'b', 'c', 'd'])).solved
    e = np.tile(np.eye(4), (2, 1)); many = scene(VIEWS[:2], cars, prior=np.array([VIEWS[0], VIEWS[1]]), prior_sigma=np.array([[0, 0], [.5, .05]])); s = align_scene(many)   # roughly known
    assert s.solved and s.obj.tolist() == [0, 1, 2, 3]*2; np.testing.assert_allclose(s.world[1], VIEWS[1], atol=1e-3)

def test_known_rig_is_kept():
    c = scene(VIEWS, CARS, prior=VIEWS); s = align_scene(c)
    assert s.solved and s.obj.tolist() == list(range(6))*3; np.testing.assert_allclose(s.world, VIEWS, atol=1e-12)

def test_cameras_of_one_agent_share_a_pose():
    cams = np.array([yaw(0, 1, 0, 0), yaw(1.2, 0, 1, 0)]); agents = VIEWS[:2]; views = np.array([agents[a] @ cams[k] for a in (0, 1) for k in (0, 1)])
    c = scene(views, CARS, agent=[0, 0, 1, 1], view2agent=np.tile(cams, (2, 1, 1))); s = align_scene(c)
    assert s.solved and len(s.world) == 2 and s.obj.tolist() == list(range(6))*4; np.testing.assert_allclose(s.world[1], inv_pose(agents[0]) @ agents[1], atol=1e-6)

def test_ambiguous_headings():
    c = scene(VIEWS, CARS); c.pose[::2] = c.pose[::2] @ yaw(np.pi, 0, 0, 0)
    s = align_scene(replace(c, symmetries=dict(car=HALF_TURN))); assert s.solved and s.obj.tolist() == list(range(6))*3
    np.testing.assert_allclose(s.world[2], inv_pose(VIEWS[0]) @ VIEWS[2], atol=1e-6)

def test_moving_vehicles_are_brought_to_one_time():
    c, t = simulate_scene(SceneSpec(n_objects=12, n_classes=1, speed=12., time_gap=.5, outliers=0, false=0), seed=2)
    assert align_scene(c).solved and evaluate_scene(align_scene(c), t)['recall'] > .9
    still = align_scene(replace(c, velocity=None)); assert not still.solved or evaluate_scene(still, t)['recall'] < .7

def test_embeddings_count_by_what_they_are_worth():
    def told(kind, seed): c, _ = simulate_scene(SceneSpec(n_objects=20, n_classes=1, embeddings=kind), seed=seed); ev = embedding_evidence(c); same = (c.truth[:, None] == c.truth) & (c.truth >= 0) & (c.view[:, None] != c.view); return ev[same].mean()-ev[(c.truth[:, None] != c.truth) & (c.view[:, None] != c.view)].mean()
    assert told('good', 0) > 4 and told('good', 0) > told('weak', 0)
    c, _ = simulate_scene(SceneSpec(n_objects=20, n_classes=1), seed=1); noise = np.random.default_rng(0).normal(size=(len(c), 32))
    bare, none = align_scene(c), align_scene(replace(c, embedding=noise)); assert none.solved
    score = lambda s: pair_scores(s.obj, c.truth); assert score(none)['recall'] > score(bare)['recall']-.03

def test_embeddings_tell_cars_of_one_class_apart():
    "A straight row of equal cars at equal distances: place cannot tell, looks can"
    row = np.array([yaw(0, 6*k, 0, 0) for k in range(7)]); sees = [row[:6], row[1:]]; views = VIEWS[:2]
    pose = np.concatenate([inv_pose(T) @ r for T, r in zip(views, sees)]); ids = np.r_[0:6, 1:7]; e = np.eye(12)[ids]+.01
    c = BoxCandidates(pose, np.repeat([0, 1], 6), np.tile([1.9, 4.5, 1.6], (12, 1)), ['car']*12, truth=ids, embedding=e)
    assert not align_scene(replace(c, embedding=None)).solved or pair_scores(align_scene(replace(c, embedding=None)).obj, ids)['precision'] < 1
    s = align_scene(c); assert pair_scores(s.obj, ids)['recall'] == 1.; np.testing.assert_allclose(s.world[1], inv_pose(views[0]) @ views[1], atol=1e-3)

@pytest.mark.parametrize('kw', [dict(n_objects=20, n_classes=1), dict(n_objects=30, n_classes=1), dict(n_objects=20, n_classes=1, noise=2.), dict(regime='table', n_views=8)])
def test_made_scenes_are_solved(kw):
    got = []
    for seed in range(900, 904):
        c, t = simulate_scene(SceneSpec(**kw), seed=seed); s = align_scene(c, TABLE if 'regime' in kw else AssociationConfig()); got.append(evaluate_scene(s, t))
    assert np.mean([g['recall'] for g in got]) > .9 and np.mean([g['precision'] for g in got]) > .95 and all(g['object_m'] < g['single_m'] for g in got)

def test_order_of_candidates_does_not_matter():
    c, t = simulate_scene(SceneSpec(n_objects=15, n_classes=1), seed=8); k = np.random.default_rng(0).permutation(len(c)); a, b = align_scene(c), align_scene(c.take(k))
    same = lambda o: o[:, None] == o; assert ((same(a.obj)[np.ix_(k, k)]) & (a.obj[k] >= 0)[:, None] == same(b.obj) & (b.obj >= 0)[:, None]).all(); np.testing.assert_allclose(a.world, b.world, atol=1e-5)

def test_strict_is_surer():
    p, r = [], []
    for seed in range(6):
        c, t = simulate_scene(SceneSpec(n_objects=30, n_classes=1, noise=2., embeddings='weak', outliers=.2), seed=seed); one, two = (pair_scores(align_scene(c, AssociationConfig(strict=x)).obj, c.truth) for x in (False, True)); p.append((one['precision'], two['precision'])); r.append((one['recall'], two['recall']))
    p, r = np.mean(p, 0), np.mean(r, 0); assert p[1] >= p[0] and r[1] <= r[0]

def test_cosypose_method():
    c, t = simulate_scene(SceneSpec(regime='table', noise=.5), seed=1); s = align_scene(c, replace(TABLE, method='cosypose')); e = evaluate_scene(s, t); assert e['views'] == 4 and e['precision'] == 1 and e['recall'] > .8
    assert not align_scene(scene(VIEWS, CARS[:2]), AssociationConfig(method='cosypose', max_dist=2.)).solved        # two shared: three inliers are needed
    one = align_scene(scene(VIEWS, CARS), AssociationConfig(method='cosypose', max_dist=2.)); assert one.solved and one.obj.tolist() == list(range(6))*3
    with pytest.raises(ValueError, match='no rigs'): align_scene(scene(VIEWS, CARS, agent=[0, 0, 1]), AssociationConfig(method='cosypose'))

@pytest.mark.parametrize('make, says', [(lambda: scene(VIEWS[:1], CARS), 'one view only'), (lambda: scene(VIEWS[:2], CARS).take([]), 'no candidates'), (lambda: replace(scene(VIEWS[:2], CARS), label=['a']*6+['b']*6), 'share no vehicle')])
def test_scenes_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says): align_scene(make())

@pytest.mark.parametrize('make, says', [(lambda: AssociationConfig(pose_model='se2'), 'se3, yaw4, bev3'), (lambda: RefineConfig(loss='cauchy'), 'l2, huber'), (lambda: AssociationConfig(min_inliers=1), 'at least 2'), (lambda: SceneSpec(missed=2), 'between 0 and 1')])
def test_bad_configs_are_named(make, says):
    with pytest.raises(ValueError, match=says): make()


def strangers(seed):
    "View 0 of one street and view 1 of another: nothing is shared"
    a, b = (simulate_scene(SceneSpec(n_views=2, n_objects=20, n_classes=1), seed=s)[0] for s in (2*seed, 2*seed+1)); x, y = a.take(np.flatnonzero(a.view == 0)), b.take(np.flatnonzero(b.view == 1))
    return a, BoxCandidates(np.concatenate([x.pose, y.pose]), np.r_[x.view, y.view], np.concatenate([x.size, y.size]), np.r_[x.label, y.label])

def test_strangers_do_not_find_each_other():
    got = [[align_scene(c) for c in strangers(seed)] for seed in range(12)]
    assert not any((two.group >= 0).any() for _, two in got) and sum(one.solved for one, _ in got) >= 10

def test_chance_is_far_below_a_true_pose_and_near_a_false_one():
    over = []
    for seed in range(12):
        for c in strangers(seed): m = Matching(c, AssociationConfig()); over.append(relative_poses(m, 0, 1)[0].score-chance_evidence(m, 0, 1))
    assert np.median(over[::2]) > 15 and abs(np.median(over[1::2])) < 4
    before = m.pose.copy(), m.center.copy(), m.points.copy(); chance_evidence(m, 0, 1); assert all((p == q).all() for p, q in zip(before, (m.pose, m.center, m.points)))
