"""Refinement of scenes: derivatives, gauge, constraints, robustness, SciPy as the oracle, the compiled kernel, covariances; files and verbs"""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bev_reid.alignment import align_scene, load_scene, read_predicted, save_scene, write_scene
from bev_reid.candidates import HALF_TURN, NoiseModel, inv_pose, move, pose_of, rot_exp, rot_log
from bev_reid.hypotheses import AssociationConfig
from bev_reid.refinement import LOSSES, RefineConfig, covariances, loss, make_problem, normal_equations, prior_residual, refine_scene, residuals, retract, rho, scene_graph, _C, _refine_C, _refine_gtsam, _refine_numpy
from bev_reid.scene_files import candidates_of_drive, candidates_of_frames
from bev_reid.scene_scores import auc, average_precision, evaluate_scene, majority, object_errors, pair_scores, pose_errors
from bev_reid.rig import find_rig
from bev_reid.scene_show import turn_scene, write_ply
from bev_reid.scene_sim import SceneSpec, simulate_scene

root = Path(__file__).resolve().parents[1]
needs_C = pytest.mark.skipif(_C is None, reason='the compiled extension is not built')


def shake(T, g, m, deg): return T @ pose_of(rot_exp(np.radians(deg)*g.normal(size=(len(T), 3))), m*g.normal(size=(len(T), 3)))

def problem(seed=0, *, residual='box', model='se3', prior=False, **kw):
    c, t = simulate_scene(SceneSpec(**(dict(n_views=3, n_objects=6, level=True, outliers=0, false=0) | kw)), seed=seed); g = np.random.default_rng(seed)
    if prior: c = replace(c, prior=shake(t.agents, g, .3, 1.), prior_sigma=np.tile([.3, .02], (3, 1)))
    p, rows, used = make_problem(c, c.truth, t.agents, RefineConfig(residual=residual, pose_model=model)); A = inv_pose(t.agents)
    if model == 'se3': A = np.where(p.free_a[:, None, None], inv_pose(shake(t.agents, g, .4, 2.)), A)
    else: p.V[:] = p.V
    return c, t, p, A, (shake(t.objects, g, .3, 2.) if model == 'se3' else t.objects @ pose_of(rot_exp(.03*g.normal(size=(6, 1))*[0, 0, 1.]), .3*g.normal(size=(6, 3))))

CASES = [dict(), dict(residual='reprojection'), dict(model='yaw4'), dict(heading='ambiguous'), dict(prior=True), dict(model='bev3'), dict(residual='reprojection', heading='ambiguous')]

@pytest.mark.parametrize('kw', CASES)
def test_gradient_by_differences(kw):
    c, t, p, A, X = problem(**kw); p = replace(p, center=p.center+.2, points=p.points+.2); kind, scale = 1, 3.
    Haa, Hoo, W, ga, go = normal_equations(p, A, X, kind, scale); d = 1e-6
    for grad, of in (ga, 0), (go, 1):
        for k in range(len(grad)):
            for i in range(grad.shape[1]):
                def at(x): z = [np.zeros_like(ga), np.zeros_like(go)]; z[of][k, i] = x; return loss(p, *retract(p, A, X, *z), kind, scale)
                if of == 0 and not p.free_a[k]: assert grad[k, i] == 0; continue
                assert (at(d)-at(-d))/4/d == pytest.approx(grad[k, i], rel=2e-3, abs=2e-3*abs(grad).max())

@pytest.mark.parametrize('kw', CASES[:5])
def test_scipy_finds_the_same_optimum(kw):
    from scipy.optimize import least_squares
    c, t, p, A, X = problem(n_views=3, n_objects=5, **{k: v for k, v in kw.items()}) if kw.get('model') != 'yaw4' else problem(**kw)
    X = X[:len(p.free_o)]; fa = np.flatnonzero(p.free_a); da, do = map(len, p.dims)
    def state(z): xa = np.zeros((len(A), da)); xa[fa] = z[:len(fa)*da].reshape(-1, da); return retract(p, A, X, xa, z[len(fa)*da:].reshape(-1, do))
    def r(z): B, Y = state(z); return np.r_[residuals(p, B, Y, jac=False)[0].ravel(), prior_residual(p, B)[0].ravel()]
    want = 2*least_squares(r, np.zeros(len(fa)*da+len(X)*do), xtol=1e-12, ftol=1e-12, gtol=1e-9).cost
    for f in (_refine_numpy, *([_refine_C] if _C is not None else [])):
        got = f(p, A, X, [(0, 1.)], 200, 1e-13); assert got[4][-1] == pytest.approx(want, rel=1e-5); assert (np.diff(got[4]) <= 0).all()

@needs_C
@pytest.mark.parametrize('kw', CASES+[dict(regime='table', n_objects=6)])
@pytest.mark.parametrize('kind', LOSSES)
def test_kernel_is_the_reference(kw, kind):
    c, t, p, A, X = problem(3, **kw); stages = [(k, 4*s) for k, s in LOSSES[kind]]
    one, two = _refine_numpy(p, A, X, stages, 100, 1e-9), _refine_C(p, A, X, stages, 100, 1e-9)
    np.testing.assert_allclose(one[4][-1], two[4][-1], rtol=1e-6); np.testing.assert_allclose(one[0], two[0], atol=1e-4); np.testing.assert_allclose(one[1], two[1], atol=1e-4)

@needs_C
def test_kernel_is_deterministic_and_refuses():
    c, t, p, A, X = problem(1); a, b = (_refine_C(p, A, X, [(1, 4.)], 50, 1e-9) for _ in range(2)); assert (a[0] == b[0]).all() and a[4] == b[4]
    for bad, says in (replace(p, obj=p.obj+100), 'obj holds'), (replace(p, n_sym=p.n_sym+3), 'n_sym holds'), (replace(p, L=p.L[1:]), 'L has'), (replace(p, dims=([7], [0])), 'dim_a holds'):
        with pytest.raises(ValueError, match=says): _refine_C(bad, A, X, [(1, 4.)], 50, 1e-9)

@pytest.mark.parametrize('kw', CASES+[dict(regime='table', n_objects=6, missed=0)])                       # of two views alone, Huber's loss is flat between them
@pytest.mark.parametrize('kind', LOSSES)
def test_gtsam_finds_the_same_optimum(kw, kind):
    pytest.importorskip('gtsam', reason="GTSAM is not installed: pip install 'bev_reid[gtsam]'")
    c, t, p, A, X = problem(3, **kw)
    if kind == 'gm': A, X, *_ = _refine_numpy(p, A, X, [(1, 4.)], 100, 1e-12)                          # not convex: from far, each solver finds a valley of its own
    stages = [(k, 4*s) for k, s in LOSSES[kind]]; one, two = _refine_numpy(p, A, X, stages, 100, 1e-13), _refine_gtsam(p, A, X, stages, 100, 1e-13)
    np.testing.assert_allclose(one[4][-1], two[4][-1], rtol=1e-7); np.testing.assert_allclose(one[0], two[0], atol=1e-5); np.testing.assert_allclose(one[1], two[1], atol=1e-5)
    assert two[4][-1] == pytest.approx(loss(p, *two[:2], *stages[-1]), rel=1e-9)

def test_gtsam_keeps_what_is_fixed_and_gives_a_whole_state():
    pytest.importorskip('gtsam', reason="GTSAM is not installed: pip install 'bev_reid[gtsam]'")
    c, t = simulate_scene(SceneSpec(outliers=.1, n_objects=8, n_views=4), seed=2); g = np.random.default_rng(0); start = shake(t.agents, g, .2, 1.)
    known, soft = np.full((4, 4, 4), np.nan), t.agents.copy(); known[1:3] = start[1:3]; soft[:, 0, 3] += 100
    for kw, d in (dict(), c), (dict(fix_agents=True), c), (dict(fix_objects=True), c), (dict(), replace(c, prior=known)), (dict(), replace(c, prior=soft, prior_sigma=np.full((4, 2), .01))):
        one, two = (refine_scene(d, d.truth, start, RefineConfig(loss='huber', backend=b, tol=1e-13, **kw), objects=t.objects) for b in ('numpy', 'gtsam'))
        for k, eps in dict(world=1e-5, objects=1e-5, cov_agents=1e-6, cov_objects=1e-6, residual=1e-4, weight=1e-4, noise_factor=1e-4).items(): np.testing.assert_allclose(getattr(one, k), getattr(two, k), atol=eps)
        assert two.converged and (np.diff(two.history) <= 0).all()
        if 'fix_agents' in kw: np.testing.assert_allclose(two.world, start, atol=1e-12)
        if 'fix_objects' in kw: np.testing.assert_allclose(two.objects, t.objects, atol=1e-12)
    left = start.copy(); left[3] = np.nan; s = refine_scene(c, c.truth, left, RefineConfig(backend='gtsam')); assert np.isnan(s.world[3]).all() and np.isfinite(s.world[:3]).all()

@pytest.mark.parametrize('model', ['se3', 'yaw4', 'bev3'])
def test_marginals_of_gtsam_are_the_covariances(model):
    gtsam = pytest.importorskip('gtsam', reason="GTSAM is not installed: pip install 'bev_reid[gtsam]'"); order = [3, 4, 5, 0, 1, 2]
    c, t, p, A, X = problem(5, model=model); A, X, *_ = _refine_numpy(p, A, X, [(1, 4.)], 100, 1e-12); m = gtsam.Marginals(*scene_graph(p, A, X, 1, 4.))
    for letter, ours, dims, free in (('a', covariances(p, A, X, 1, 4.)[0], p.dims[0], p.free_a), ('o', covariances(p, A, X, 1, 4.)[1], p.dims[1], p.free_o)):
        for i in np.flatnonzero(free):
            theirs = m.marginalCovariance(gtsam.symbol(letter, i))[np.ix_(order, order)]; np.testing.assert_allclose(theirs[np.ix_(dims, dims)], ours[i][np.ix_(dims, dims)], rtol=1e-5, atol=1e-10)

def test_without_gtsam_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gtsam', None); c, t = simulate_scene(seed=0)
    with pytest.raises(ImportError, match=r"pip install 'bev_reid\[gtsam\]'"): refine_scene(c, c.truth, t.agents, RefineConfig(backend='gtsam'))
    with pytest.raises(ValueError, match='cpp, numpy, gtsam'): RefineConfig(backend='ceres')

def test_exact_candidates_give_exact_poses_in_the_gauge_of_the_first():
    for residual in ('box', 'reprojection'):
        c, t = simulate_scene(SceneSpec(noise=0, outliers=0, false=0, missed=0), seed=1); g = np.random.default_rng(0)
        s = refine_scene(c, c.truth, shake(t.agents, g, .3, 1.), RefineConfig(residual=residual), objects=shake(t.objects, g, .3, 2.))
        T = t.agents[0] @ inv_pose(s.world[0]); np.testing.assert_allclose(T @ s.world, t.agents, atol=1e-5); np.testing.assert_allclose(T @ s.objects, t.objects, atol=1e-5); assert s.converged and s.history[-1] < 1e-6

def test_fixed_stays_and_the_rest_is_the_constrained_optimum():
    c, t = simulate_scene(SceneSpec(outliers=0, false=0, n_objects=6), seed=2); g = np.random.default_rng(0); start = shake(t.agents, g, .2, 1.)
    held = refine_scene(c, c.truth, start, RefineConfig(loss='l2', fix_agents=True)); np.testing.assert_allclose(held.world, start, atol=1e-12)
    free = refine_scene(c, c.truth, start, RefineConfig(loss='l2')); assert held.history[-1] > free.history[-1]
    # no small motion of an object lowers the loss: it is the optimum under the constraint, not the free one cut off
    p, rows, _ = make_problem(c, c.truth, start, RefineConfig(fix_agents=True)); A = inv_pose(held.world); *_, go = normal_equations(p, A, held.objects, 0, 1.); assert abs(go).max() < 1e-2
    still = refine_scene(c, c.truth, start, RefineConfig(fix_objects=True), objects=t.objects); np.testing.assert_allclose(still.objects, t.objects, atol=1e-12)
    np.testing.assert_allclose(refine_scene(c, c.truth, start).world[0], start[0], atol=1e-12)       # the gauge

def test_exact_prior_is_kept_and_soft_prior_pulls():
    c, t = simulate_scene(SceneSpec(outliers=0, false=0), seed=3); prior = t.agents.copy(); prior[2:] = np.nan
    s = refine_scene(replace(c, prior=prior), c.truth, t.agents); np.testing.assert_allclose(s.world[:2], t.agents[:2], atol=1e-9); assert abs(s.world[2]-t.agents[2]).max() > 1e-4
    off = t.agents.copy(); off[:, 0, 3] += 100                                                         # the world is where the priors say it is
    s = refine_scene(replace(c, prior=off, prior_sigma=np.full((4, 2), .01)), c.truth, t.agents); np.testing.assert_allclose(s.world[:, 0, 3], off[:, 0, 3], atol=.1)

def test_robust_loss_by_hand():
    s = np.array([0., 9, 400.])
    np.testing.assert_allclose(rho(s, 1, 4.)[0], [0, 9, 2*4*20-16]); np.testing.assert_allclose(rho(s, 1, 4.)[1], [1, 1, .2])
    np.testing.assert_allclose(rho(s, 2, 4.)[0], 16*s/(16+s)); np.testing.assert_allclose(rho(s, 2, 4.)[1], (16/(16+s))**2)
    for k in (1, 2): d = 1e-6; np.testing.assert_allclose((rho(s+d, k, 4.)[0]-rho(np.maximum(s-d, 0), k, 4.)[0])/(d+np.minimum(s, d)), rho(s, k, 4.)[1], rtol=1e-4)

def test_outlier_loses_its_say():
    c, t = simulate_scene(SceneSpec(outliers=0, false=0, missed=0), seed=4); c.pose[5, :3, 3] += [8., 0, 3]; g = np.random.default_rng(0); start = shake(t.agents, g, .2, .5)
    err = lambda loss: np.median(pose_errors(refine_scene(c, c.truth, start, RefineConfig(loss=loss)).world, t.agents, np.zeros(4, int))[1]); s = refine_scene(c, c.truth, start)
    assert err('graduated') < err('l2') and s.weight[5] < .05 and np.median(s.weight) > .8 and s.residual[5] > 8 and np.argmax(s.residual) == 5

def test_symmetry_does_not_matter_to_refinement():
    c, t = simulate_scene(SceneSpec(outliers=0, false=0), seed=5); d = replace(c, pose=c.pose.copy(), symmetries={str(l): HALF_TURN for l in c.label}); d.pose[::3] = d.pose[::3] @ pose_of(rot_exp(np.array([0, 0, np.pi])), np.zeros(3))
    a, b = refine_scene(c, c.truth, t.agents, objects=t.objects), refine_scene(d, d.truth, t.agents, objects=t.objects); np.testing.assert_allclose(a.world, b.world, atol=1e-5); np.testing.assert_allclose(a.objects, b.objects, atol=1e-5)

def test_covariances_are_what_many_scenes_show():
    "Errors of agent 1 seen from agent 0, and of an object, over what the covariance says"
    e, f = [], []
    for seed in range(60):
        c, t = simulate_scene(SceneSpec(n_views=3, n_objects=6, outliers=0, false=0, missed=0), seed=seed); s = refine_scene(c, c.truth, t.agents, RefineConfig(loss='l2'), objects=t.objects)
        E = inv_pose(s.world[1]) @ t.agents[1]; F = inv_pose(s.objects[2]) @ t.objects[2]; x, y = (np.r_[M[:3, 3], rot_log(M[:3, :3])] for M in (E, F))
        e.append(x @ np.linalg.solve(s.cov_agents[1], x)); f.append(y @ np.linalg.solve(s.cov_objects[2], y)); assert (s.cov_agents[0] == 0).all()
    assert 4.5 < np.mean(e) < 8 and 4.5 < np.mean(f) < 8                    # chi-square of six

def test_noise_factor_sees_the_true_error():
    for k in (.5, 1., 2.):
        got = [refine_scene(c, c.truth, t.agents).noise_factor for c, t in (simulate_scene(SceneSpec(noise=k, outliers=0, false=0, n_objects=20), seed=s) for s in range(5))]; assert np.mean(got) == pytest.approx(k, rel=.2)

def test_nothing_to_refine_says_so():
    c, t = simulate_scene(seed=0)
    with pytest.raises(ValueError, match='nothing to refine'): refine_scene(c, np.full(len(c), -1), t.agents)
    with pytest.raises(ValueError, match='needs intrinsics'): refine_scene(replace(c, K=None), c.truth, t.agents, RefineConfig(residual='reprojection'))


# Metrics

def test_metrics_by_hand():
    assert pair_scores(np.array([0, 0, 1, 1, -1]), np.array([3, 3, 3, 4, 4])) == dict(precision=.5, recall=.25)
    assert majority(np.array([0, 0, 0, 1, 1, -1]), np.array([5, 5, 2, 1, -1, 9])).tolist() == [5, -1]
    assert auc(np.array([0., .1, .05]), .1) == pytest.approx(.5)
    lab = np.array(['a', 'a']); assert average_precision(np.array([False, True]), np.array([.9, .8]), 0, lab, np.array(['a'])) == pytest.approx(.5)
    assert average_precision(np.array([True, True]), np.array([.9, .8]), 0, lab, np.array(['a', 'a', 'b'])) == pytest.approx(.5)        # a class without a hit counts
    box = np.array([[x, y, z] for x in (-2., 2) for y in (-1., 1) for z in (-1., 1)])[None]; turn = pose_of(rot_exp(np.array([[0, 0, np.pi]])), np.zeros((1, 3)))
    m, deg, add, adds = object_errors(turn, np.eye(4)[None], box, np.eye(4)[None, None]); assert (m[0], deg[0], adds[0]) == (pytest.approx(0), pytest.approx(180), pytest.approx(0, abs=1e-12)) and add[0] == pytest.approx(2*5**.5)
    assert object_errors(turn, np.eye(4)[None], box, HALF_TURN[None])[1][0] == pytest.approx(0, abs=1e-6)

def test_pose_errors_do_not_depend_on_the_world():
    c, t = simulate_scene(seed=0); W = pose_of(rot_exp(np.array([.1, .2, 2.])), [5., 6, 7]); d, m = pose_errors(W @ t.agents, t.agents, np.zeros(4, int)); assert len(d) == 6 and d.max() < 1e-5 and m.max() < 1e-9
    off = t.agents.copy(); off[1] = off[1] @ pose_of(rot_exp(np.array([0, 0, np.radians(10)])), np.zeros(3)); d, _ = pose_errors(off, t.agents, np.zeros(4, int)); assert sorted(np.round(d).tolist()) == [0, 0, 0, 10, 10, 10]
    assert len(pose_errors(off, t.agents, np.array([0, 1, -1, -1]))[0]) == 0


# Files and verbs

def aligned(seed=7, **kw): c, t = simulate_scene(SceneSpec(**kw), seed=seed); return align_scene(c), t

def test_poses_and_labels_belong_together(tmp_path):
    s, t = aligned(); write_scene(s, tmp_path); got = read_predicted(tmp_path/'results'/'subscene=0'/'predicted_scene.json'); F = t.agents[0] @ inv_pose(got['cameras'][0]['TWC'])
    assert len(got['objects']) == 10
    for o in got['objects']:
        near = np.linalg.norm((F @ o['TWO'])[:3, 3]-t.objects[:, :3, 3], axis=1).argmin(); assert o['label'] == t.label[near]
    rows = read_rows(tmp_path/'results'/'subscene=0'/'scene_reprojected.csv'); assert len(rows) == 10*4
    for r in rows[:8]: T = np.eye(4); T[:3, :3] = np.array(r['R'].split(), float).reshape(3, 3); T[:3, 3] = np.array(r['t'].split(), float)/1e3; W = F @ got['cameras'][int(r['im_id'])]['TWC'] @ T; assert t.label[np.linalg.norm(W[:3, 3]-t.objects[:, :3, 3], axis=1).argmin()] == f"obj_{int(r['obj_id']):06d}" and float(r['score']) > 1
    assoc = (tmp_path/'associations.csv').read_text().splitlines(); assert len(assoc) == len(s.candidates)+1 and assoc[1].split(',')[3] == str(s.obj[0])

def read_rows(path):
    import csv
    with open(path) as f: return list(csv.DictReader(f))

def test_report_says_what_and_why(tmp_path):
    c, t = simulate_scene(SceneSpec(n_objects=12, n_classes=1), seed=3); c.pose[c.view == 3] = c.pose[c.view == 3][:, :, :] @ np.eye(4); far = np.flatnonzero(c.view == 3); c.label[far] = 'bus'
    s = align_scene(c); r = write_scene(s, tmp_path); assert not s.solved and s.group.tolist() == [0, 0, 0, -1] and 'no shared vehicle' in r['reason'] and r['rejected'][0]['agent'] == 3
    assert r == json.loads((tmp_path/'report.json').read_text()) and set(far) <= set(r['not_in_objects']) and len(read_predicted(tmp_path/'results'/'subscene=0'/'predicted_scene.json')['cameras']) == 3

def test_same_input_same_bytes(tmp_path):
    for d in 'ab': write_scene(aligned(n_objects=15, n_classes=1)[0], tmp_path/d)
    for f in ('report.json', 'associations.csv', 'results/subscene=0/predicted_scene.json', 'results/subscene=0/scene_reprojected.csv'): assert (tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes()

def test_kept_scene_is_the_scene(tmp_path):
    s, t = aligned(); save_scene(s, tmp_path); got = load_scene(tmp_path); a, b = evaluate_scene(s, t), evaluate_scene(got, t)
    for k in a: assert b[k] == pytest.approx(a[k], abs=1e-6, nan_ok=True)
    (tmp_path/'scene.npz').write_bytes(b'PK'); 
    with pytest.raises((ValueError, OSError)): load_scene(tmp_path)

def test_turn(tmp_path): 
    from PIL import Image
    im = Image.open(turn_scene(aligned()[0], tmp_path/'t.gif', frames=5)); assert im.n_frames == 5

def verb(name, *args, cwd):
    script = cwd/name; script.write_text(f'import sys\nfrom bev_reid.cli_scene import {name}\n{name}()\n')
    return subprocess.run([sys.executable, str(script), *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1'))

def test_verbs(tmp_path):
    from bev_reid.cli_scene import bev_reid_scene_eval as ev, bev_reid_scene_run as run, bev_reid_scene_show as show, bev_reid_scene_simulate as sim
    sim(str(tmp_path/'s'), n=3, spec=['n_objects=15', 'n_classes=1']); reports = run(str(tmp_path/'s'), str(tmp_path/'r'), min_score=0.); assert len(reports) == 3 and all(r['solved'] for r in reports)
    stamp = (tmp_path/'r'/'00001'/'scene.npz').stat().st_mtime_ns; (tmp_path/'r'/'00002'/'scene.npz').unlink(); run(str(tmp_path/'s'), str(tmp_path/'r'), min_score=0.)
    assert (tmp_path/'r'/'00001'/'scene.npz').stat().st_mtime_ns == stamp and (tmp_path/'r'/'00002'/'scene.npz').exists()
    total = ev(str(tmp_path/'r'), str(tmp_path/'s'), out=str(tmp_path/'e.json')); assert total['solved'] == 1 and total['recall'] > .9 and len(json.loads((tmp_path/'e.json').read_text())['scenes']) == 3
    show(str(tmp_path/'r'), str(tmp_path/'s'), out=str(tmp_path/'x.png')); assert (tmp_path/'x.png').stat().st_size > 5000

def test_shares_of_processes(tmp_path, monkeypatch):
    from bev_reid.cli_scene import bev_reid_scene_run as run, bev_reid_scene_simulate as sim
    sim(str(tmp_path/'s'), n=3)
    for rank in '01': monkeypatch.setenv('RANK', rank); monkeypatch.setenv('WORLD_SIZE', '2'); run(str(tmp_path/'s'), str(tmp_path/'r'))
    assert sorted(p.name for p in (tmp_path/'r').iterdir()) == ['00000', '00001', '00002']

def test_workers_do_the_same(tmp_path):
    from bev_reid.cli_scene import bev_reid_scene_run as run, bev_reid_scene_simulate as sim
    sim(str(tmp_path/'s'), n=2)
    for w in (1, 2): run(str(tmp_path/'s'), str(tmp_path/f'r{w}'), workers=w)
    assert (tmp_path/'r1'/'00001'/'report.json').read_bytes() == (tmp_path/'r2'/'00001'/'report.json').read_bytes()

@pytest.mark.parametrize('name, args, says', [('bev_reid_scene_run', ['--scenario', 'none', '--out', 'x'], 'does not exist'), ('bev_reid_scene_eval', ['none', 'none'], 'no result')])
def test_bad_input_ends_in_one_line(tmp_path, name, args, says):
    r = verb(name, *args, cwd=tmp_path); assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr

def test_scenario_flag_of_the_issue(tmp_path):
    from bev_reid.cli_scene import bev_reid_scene_simulate as sim
    sim(str(tmp_path/'t'), n=1, cosypose=True, spec=['regime=table', 'noise=.5']); r = verb('bev_reid_scene_run', '--scenario', tmp_path/'t'/'00000', '--out', tmp_path/'o', '--noise', 'table', cwd=tmp_path)
    assert r.returncode == 0 and 'solved' in r.stdout, r.stderr

def test_command_line_starts_light():
    r = subprocess.run([sys.executable, '-c', "import sys, bev_reid.cli_scene; print(*{'torch', 'numpy', 'scipy'} & set(sys.modules))"], capture_output=True, text=True, cwd=root, env=os.environ | dict(PYTHONPATH=str(root))); assert r.stdout.strip() == '', r.stdout


# Real boxes

DATA = Path(os.environ.get('BEV_REID_DATA', root.parent/'shared'/'data'))/'lyft_scene'

@pytest.mark.skipif(not DATA.exists(), reason=f'{DATA} is not there')
def test_real_keyframes_find_each_other():
    from bev_reid.data import DrivingData
    data = DrivingData(DATA); tokens = data.sample_tokens(); solved, bad = 0, 0
    for i in range(0, 40, 8):
        c, T = candidates_of_frames(data, tokens[i:i+2], noise=NoiseModel(), seed=i); s = align_scene(c, AssociationConfig(pose_model='yaw4')); d, m = pose_errors(s.world, T, s.group)
        solved += s.solved; bad += s.solved and (max(d) > 5 or max(m) > 3)
    assert bad == 0 and solved >= 2


# Meshes and rigs

def test_mesh_has_every_box_and_view(tmp_path):
    s, _ = aligned(); text = write_ply(s, tmp_path/'s.ply').read_text().splitlines(); n = 8*10+5*4; assert f'element vertex {n}' in text and f'element face {12*10+6*4}' in text
    start = text.index('end_header')+1; xyz = np.array([l.split()[:3] for l in text[start:start+n]], float); corners = move(s.state.objects[0], s.candidates.points[s.obj == 0].mean(0))
    np.testing.assert_allclose(xyz[:8], corners, atol=2e-5); np.testing.assert_allclose(xyz[80], s.world[0][:3, 3], atol=1e-5)
    faces = np.array([l.split() for l in text[start+n:]], int); assert (faces[:, 0] == 3).all() and faces[:, 1:].max() == n-1
    empty = replace(s, state=None)
    with pytest.raises(ValueError, match='nothing to write'): write_ply(empty, tmp_path/'e.ply')

@pytest.mark.skipif(not DATA.exists(), reason=f'{DATA} is not there')
def test_rig_of_a_real_drive():
    "Six cameras that share next to nothing at one moment; the whole drive tells where they are"
    from bev_reid.data import DrivingData
    data = DrivingData(DATA); tokens = data.sample_tokens(); c, cam, motion, true = candidates_of_drive(data, tokens, noise=NoiseModel(), radius=80.); rig = find_rig(c, cam, motion); deg, m = pose_errors(rig.cams, true, rig.group)
    assert rig.group.tolist() == [0]*6 and max(deg) < 4 and max(m) < 1.6 and np.median(m) < .8 and min(rig.shared) >= 3
    alone = find_rig(c.take(np.flatnonzero(cam[c.view] != 3)), cam, motion); assert alone.group[3] == -1 and alone.reason[3] and np.isnan(alone.cams[3]).all()
    with pytest.raises(ValueError, match='as many cameras'): find_rig(c, cam[:-1], motion)

@pytest.mark.skipif(not DATA.exists(), reason=f'{DATA} is not there')
def test_cameras_of_one_keyframe_are_not_put_together_by_chance():
    from bev_reid.data import DrivingData
    data = DrivingData(DATA); tokens = data.sample_tokens(); wrong = []
    for i in range(0, 42, 6):
        try: c, T = candidates_of_frames(data, [tokens[i]], cams=True, level=True)
        except ValueError: continue
        s = align_scene(c, AssociationConfig(pose_model='yaw4')); assert not s.solved and s.reason
        for g in range(s.group.max()+1): deg, m = pose_errors(s.world, T, np.where(s.group == g, 0, -1)); wrong += [i]*bool(len(deg) and (max(deg) > 15 or max(m) > 8))
    assert wrong == []
