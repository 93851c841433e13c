"Completion of shapes: a world of boxes that one side gives away, marks, the leakage rule, mirror images, runs that go on, verbs"
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bev_reid.cli_occupancy as cli
from bev_reid.data import DrivingData
from bev_reid.fit import FitConfig, read_metrics, save_atomic
from bev_reid.occ_complete import CompletionRecipe, as_input, as_target, complete, completion_pairs, completion_scores, load_completion, make_completion, outline, predict_shapes, train_completion
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, check_no_leak, make_shape, shape_descriptor, shape_ranking, shared_sweeps

ROOT = Path(__file__).resolve().parents[1]
SMALL = CompletionRecipe(width=24, windows=(0.,), batch_size=16, fit=FitConfig(max_steps=80, lr=3e-3, decoupled=True, checkpoint_every=20, amp='no'))

class Boxes:
    "A bank of vehicles that are boxes: a sighting shows the rear and one side, a track the whole shell"
    def __init__(self, seed, n=24, keys=4):
        rng = np.random.default_rng(seed); self.number, self.shapes, tracks, self.whole = {}, [], [], {}
        for k in range(n):
            w, l, h = rng.uniform(.8, 2.6), rng.uniform(2, 9), rng.uniform(1.2, 3.2); name = f'{seed}-{k}'; self.number[name] = k
            tracks.append(SimpleNamespace(category='vehicle.car'))
            def shell(m): return rng.uniform(-.5, .5, (m, 3))*[l, w, h]
            def at(p, axis, side): p = p.copy(); p[:, axis] = side*np.array([l, w, h])[axis]/2*.999; return p
            about = dict(instance_token=name, scene=str(seed), latest=0.)
            self.whole[name] = np.concatenate([at(shell(900), 0, 1), at(shell(900), 0, -1), at(shell(900), 1, 1), at(shell(900), 1, -1)]), (w, l, h), dict(about, sample_token='', time=0., kind='track', sweeps=('all',))
            for i in range(keys):
                p = np.concatenate([at(shell(60), 0, -1), at(shell(120), 1, rng.choice([-1, 1]))])
                self.shapes.append(make_shape(p, (w, l, h), SMALL.shapes, **{**about, 'sample_token': f'{seed}-{k}-{i}', 'time': 10.*i, 'latest': 10.*i, 'kind': 'window', 'sweeps': (f'{seed}-{i}',)}))
        self.scene = SimpleNamespace(tracks=tracks)
    def track(self, token, cfg): p, wlh, about = self.whole[token]; return make_shape(p, wlh, cfg, **about)
    def sightings(self, cfg): return self.shapes

@pytest.fixture(scope='module')
def learned(tmp_path_factory):
    "A network trained on boxes, and boxes that it has not seen"
    run = tmp_path_factory.mktemp('run'); train, test = Boxes(0, 48), Boxes(1, 16)
    train_completion(completion_pairs([train], SMALL), run, SMALL, val=completion_pairs([test], SMALL), device='cpu')
    return run, load_completion(run)[0], train, test

def test_learns_to_fill_boxes_it_has_not_seen(learned):
    run, net, train, test = learned
    loss = read_metrics(run)['train/loss'][1]; assert loss[-1] < .75*loss[0]                # it starts from the mean shape
    p, t = completion_pairs([test], SMALL), completion_pairs([train], SMALL)
    assert len(p) == 64 and len(p.instances) == 16
    def unseen(filled, h=np.zeros((64, 24))): return np.nanmean(completion_scores(filled, h, p)['iou_unseen'])
    prob, height = predict_shapes(net, p.inputs); mean = np.broadcast_to(t.outlines.mean(0) >= .5, prob.shape)
    got = unseen(prob >= .5); assert unseen(p.inputs[:, 0] > 0) == 0 < unseen(mean) < got-.1 and got > .75
    assert np.nanmean(completion_scores(prob >= .5, height, p)['iou']) > got
    assert np.nanmean(completion_scores(prob >= .5, height, p)['cm_unseen']) < np.nanmean(completion_scores(prob >= .5, np.full_like(height, 2.2), p)['cm_unseen'])

def test_what_is_predicted_is_marked_and_what_is_observed_stays(learned):
    _, net, _, test = learned
    for s, d in zip(test.shapes, complete(net, test.shapes)):
        assert set(np.unique(d.footprint)) == {0, 1, 3} and set(np.unique(s.footprint)) == {0, 1}
        np.testing.assert_array_equal(d.footprint == 1, s.footprint == 1); np.testing.assert_array_equal(d.height[s.footprint == 1], s.height[s.footprint == 1])
        assert (d.height[d.footprint == 3] > 0).all() and not d.height[d.footprint == 0].any()
        assert d.coverage == s.coverage and d.points is s.points and (d.sweeps, d.kind, d.time) == (s.sweeps, s.kind, s.time)
    again, = complete(net, [d]); np.testing.assert_array_equal(again.footprint, d.footprint)   # what was predicted is no input
    assert complete(net, []) == [] and (complete(net, [s], cut=.99)[0].footprint == 3).sum() < (d.footprint == 3).sum()
    with pytest.raises(ValueError, match='mirrored'): complete(net, [make_shape(s.points, s.wlh, ShapeConfig(symmetry=True), **test.whole['1-0'][2])])

def test_no_annotated_size_reaches_the_network(learned):
    _, net, _, test = learned; s = test.shapes[0]
    a, b = complete(net, [s, replace(s, wlh=s.wlh*[3, .5, 2], instance_token='x', sides=s.sides*0, coverage=0.)])
    np.testing.assert_array_equal(a.footprint, b.footprint); np.testing.assert_array_equal(a.height, b.height)
    p = np.asarray(s.points, float); w, l, h = s.wlh; about = {k: getattr(s, k) for k in ('instance_token', 'scene', 'sample_token', 'time', 'kind', 'sweeps', 'latest')}
    first = make_shape(p, s.wlh, **about); other = make_shape(p-[0, 0, .5], (w+1, l+2, h+1), **about)            # the same surface in a larger box on the same road
    np.testing.assert_allclose(as_input(first, SMALL), as_input(other, SMALL), atol=2e-3)

def test_the_leakage_rule_holds_for_completed_shapes(learned):
    _, net, _, test = learned; shapes = test.shapes; done = complete(net, shapes)
    np.testing.assert_array_equal(shared_sweeps(done, done), shared_sweeps(shapes, shapes)); assert shared_sweeps(done, shapes).any()
    with pytest.raises(ValueError, match='share a sweep'): check_no_leak(done, shapes, np.eye(len(done), dtype=bool))
    check_no_leak(done, done, shared_sweeps(shapes, shapes))
    whole, = complete(net, [test.track('1-0', SMALL.shapes)])
    with pytest.raises(ValueError, match='whole track'): check_no_leak(done, [whole])
    r = shape_ranking(done, np.stack([shape_descriptor(d) for d in done])); assert (r.n_allowed < len(done)).all()

def test_a_mirrored_vehicle_gives_the_mirrored_pair():
    b = Boxes(2, 6); pairs = completion_pairs([b], SMALL)
    for i, s in enumerate(b.shapes):
        p = np.asarray(s.points, float); about = {k: getattr(s, k) for k in ('instance_token', 'scene', 'sample_token', 'time', 'kind', 'sweeps', 'latest')}
        p = p[(np.abs((p[:, :2]/.1) % 1-.5) < .45).all(1)]                                      # a point on a border belongs to the cell on its left, mirrored too
        np.testing.assert_allclose(as_input(make_shape(p*[1, -1, 1], s.wlh, **about), SMALL), as_input(make_shape(p, s.wlh, **about), SMALL)[..., ::-1], atol=1e-6)
    turned = replace(pairs, flip=True); seen = set()
    for epoch in range(4):
        turned.set_epoch(epoch)
        for i in range(len(pairs)):
            a, c = pairs[i], turned[i]; same = torch.equal(a['x'], c['x']); seen.add(same)
            for k in a: assert torch.equal(c[k], a[k] if same else a[k].flip(-1))
            again = turned[i]; assert all(torch.equal(c[k], again[k]) for k in c)
    assert seen == {True, False}

def test_outlines_and_targets():
    m = np.zeros((6, 5), bool); m[1, 1] = m[1, 3] = m[4, 1] = True
    assert np.argwhere(outline(m)).tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1], [4, 1]]
    p, (w, l, h), about = Boxes(3, 1).whole['3-0']
    full, height, share = as_target(make_shape(p, (w, l, h), ShapeConfig(symmetry=True), **about), SMALL)
    assert share == 1 and full.sum() == 4*np.ceil(w/.4)*np.ceil(l/.4) and height.max() <= h+1e-3 and (height > 0).sum() < full.sum()
    half = make_shape(p[p[:, 0] > 0], (w, l, h), ShapeConfig(symmetry=True), **about); assert .35 < as_target(half, SMALL)[2] < .65
    b = Boxes(3, 1); b.whole['3-0'] = (p[p[:, 0] > 0], (w, l, h), about)                       # a track that shows half of its vehicle is no target
    got = completion_pairs([b], SMALL); assert len(got) == 0 and .35 < got.best < .65
    with pytest.raises(ValueError, match='no vehicle has a track'): train_completion(got, 'nowhere', SMALL)
    assert not Path('nowhere').exists()

def test_scores_by_hand():
    p = completion_pairs([Boxes(4, 1, keys=1)], SMALL)
    seen, full, h = p.inputs[0, 0] > 0, p.outlines[0], p.heights[0].astype(np.float32)
    one = completion_scores(seen[None], h[None], p); assert one['iou'][0] == pytest.approx((seen & full).sum()/(seen | full).sum()) and one['iou_unseen'][0] == 0 and np.isnan(one['cm_unseen'][0])
    all_ = completion_scores(full[None], h[None]+.25, p); assert all_['iou_unseen'][0] == 1 and all_['cm_unseen'][0] == pytest.approx(25, abs=.1)
    more = full.copy(); more[0, 0] = True; k = (full & ~seen).sum(); assert completion_scores(more[None], h[None], p)['iou_unseen'][0] == pytest.approx(k/(k+1))

def test_a_run_goes_on_and_ends_the_same(tmp_path):
    pairs = completion_pairs([Boxes(5, 12)], SMALL); r = replace(SMALL, fit=replace(SMALL.fit, max_steps=12, checkpoint_every=4))
    train_completion(pairs, tmp_path/'a', r, device='cpu')
    train_completion(pairs, tmp_path/'b', replace(r, fit=replace(r.fit, max_steps=7)), device='cpu'); out = train_completion(pairs, tmp_path/'b', r, device='cpu')
    a, b = (load_completion(tmp_path/k)[0].state_dict() for k in 'ab'); assert out['step'] == 12 and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match='another configuration'): train_completion(pairs, tmp_path/'a', replace(r, coverage=.5), device='cpu')

def test_verbs_complete_and_rank(toy_root, tmp_path, capsys):
    root, run = str(toy_root), str(tmp_path/'run'); tiny = ['coverage=.3', 'width=8', 'batch_size=4', 'shapes.min_points=1']
    rows = cli.bev_reid_occ_complete(root, run, steps=2, set=tiny, device='cpu'); said = capsys.readouterr().out
    assert set(rows) == {'input', 'mirrored and filled', 'mean training shape', 'network'} and rows['input']['iou_unseen'] == 0 and 'step 2' in said
    table = cli.bev_reid_occ_shapes(root, window=.5, min_gap=1., complete=run, out=str(tmp_path/'g.png')); said = capsys.readouterr().out
    assert {'one sweep, completed', '0.5 s, completed'} < set(table) and 'was trained on 1 of these scenes' in said and (tmp_path/'g.png').stat().st_size > 5000
    with pytest.raises(ValueError, match='--test train: all of its scenes are trained on'): cli.bev_reid_occ_complete(root, str(tmp_path/'none'), test='train', steps=2, set=tiny, device='cpu')
    assert not (tmp_path/'none').exists()
    for k in ('one sweep', '0.5 s'): assert table[k]['queries'] == table[f'{k}, completed']['queries'] and table[k]['coverage'] == table[f'{k}, completed']['coverage']

def test_bad_input_is_refused_by_name(toy_root, tmp_path):
    root, new = str(toy_root), str(tmp_path/'new')
    save_atomic(dict(model={}, config={'occ': {}}), tmp_path/'other.pt')
    blind = tmp_path/'blind'; shutil.copytree(toy_root, blind); version = DrivingData(toy_root).version
    table = lambda t: blind/version/f'{t}.json'
    gone = {r['token'] for r in json.loads(table('sensor').read_text()) if r['channel'] == 'LIDAR_TOP'}
    for t in ('sensor', 'calibrated_sensor', 'sample_data'): table(t).write_text(json.dumps([r for r in json.loads(table(t).read_text()) if r['token'] not in gone and r.get('sensor_token') not in gone and 'LIDAR' not in r.get('filename', '')]))
    for says, f, args, kw in [('has no LiDAR sweep', cli.bev_reid_occ_complete, (str(blind), new), {}), ('no vehicle has a track whose outline fills 65 %', cli.bev_reid_occ_complete, (root, new), dict(set=['shapes.min_points=1000000'])),
                              ("no completion model 'diffusion'", cli.bev_reid_occ_complete, (root, new), dict(set=['model=diffusion'])), ('unknown or empty split', cli.bev_reid_occ_complete, (root, new), dict(split='dawn')),
                              ('must divide the cells', cli.bev_reid_occ_complete, (root, new), dict(set=['block=5'])), ('completes no shapes', cli.bev_reid_occ_shapes, (root,), dict(complete=str(tmp_path/'other.pt'))),
                              ('no checkpoint at', cli.bev_reid_occ_shapes, (root,), dict(complete=new))]:
        with pytest.raises((ValueError, OSError), match=re.escape(says.replace('65 %', '65%'))): f(*args, **kw)
    assert not Path(new).exists()
    net = make_completion(SMALL); bank = ShapeBank(DrivingData(toy_root), DrivingData(toy_root).scenes[0]); other = bank.sightings(ShapeConfig(size=(64, 24), cell=.2))
    with pytest.raises(ValueError, match='was made for'): complete(net, other)

def test_the_kept_figures_come_from_the_script_as_it_stands(monkeypatch):
    path = ROOT/'results'/'completion.json'
    if not path.exists(): pytest.skip('completion has not been measured')
    monkeypatch.syspath_prepend(str(ROOT/'nbs'/'_tools')); import results_completion as script, results_occupancy
    got = json.loads(path.read_text()); s = got['settings']
    assert s['train_world']['seed'] != s['test_world']['seed'] and all(s['test_world'][k] == (list(v) if isinstance(v, tuple) else v) for k, v in results_occupancy.WORLD.items()) and s['cuts'] == list(script.CUTS)
    assert len(s['seeds']) >= 3 and {f'network|{k}' for k in s['seeds']} < set(got['rows']) and got['chosen']['lr'] in s['rates'] and 'TOY' in got['title'] and got['command'].startswith('python nbs/_tools/results_completion.py')
    whole = {k: r['test']['0']['all'] for k, r in got['rows'].items() if '|' not in k}
    assert len({r['iou']['sightings'] for r in whole.values()}) == 1 and whole['input alone']['iou_unseen']['mean'] == 0 and len(got['pictures']) == 4
    kept = {r['method']: r['rank1'] for r in json.loads((ROOT/'results'/'occupancy.json').read_text())['reid']['result']['rows']}; mine = {r['method']: r['rank1'] for r in got['reid']['rows']}
    assert mine['one sweep'] == pytest.approx(kept['shape, one sweep'], abs=1e-3) and mine['1 s'] == pytest.approx(kept['shape, 1 s'], abs=1e-3)      # the same sightings, the same protocol
