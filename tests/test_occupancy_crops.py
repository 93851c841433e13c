"Shapes as channels of a data set: what is written, who may compare it, and what is refused"
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import bev_reid.cli_occupancy as cli
import bev_reid.occ_crops as O
from bev_reid.crops import CropConfig
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, ReIDDataset, build_dataset, check_crops, shape_window, trained_features
from bev_reid.evaluate import all_observations, junk_mask, single_shot
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from bev_reid.occ_crops import add_shapes
from bev_reid.occ_shapes import ShapeBank, ShapeConfig
from bev_reid.toy import make_toy
from bev_reid.train import MetricRecipe, evaluate_reid, train_metric
from bev_reid.validate import observations, take

ROOT = Path(__file__).resolve().parents[1]
CFG = DatasetConfig(crop=CropConfig(extent=10., size=20, clip=True), features=('lidar',), patch_size=16)
WINDOW = ShapeConfig(window=.5)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A toy world with sweeps: 2 scenes (train, test), 6 keyframes of half a second, 2 sweeps between"
    base = tmp_path_factory.getbasetemp(); base = base.parent if base.name.startswith('popen-') else base
    with FileLock(str(base/'toy_crops.lock')): return make_toy(base/'toy_crops', n_scenes=2, n_samples=6, sweeps=2, img_size=(32, 56), n_azimuth=700, workers=1, seed=5, density=.7)

@pytest.fixture(scope='module')
def data(root): return DrivingData(root)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return LiftSplat(LSSConfig(grid=BEVGrid((-24, 24, 1), (-24, 24, 1), (-10, 10, 20), (2, 26, 4)), img_size=(64, 128), up_channels=8, cam_channels=4, bev_channels=6, bev_widths=(8, 8, 8), bev_up=8)).eval()

@pytest.fixture(scope='module')
def bare(net, data, tmp_path_factory): return build_dataset(net, data, tmp_path_factory.mktemp('bare')/'reid', cfg=CFG)

@pytest.fixture(scope='module')
def shaped(bare, data): return add_shapes(bare, data, bare.parent/'shaped', cfg=WINDOW)

def recipe(*features, steps=2, **kw):
    r = MetricRecipe.recipe('toy', max_steps=steps, features=features, p=4, k=2, **kw)
    return replace(r, fit=replace(r.fit, eval_every=0, checkpoint_every=steps))

@pytest.fixture(scope='module')
def run(shaped, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'metric'
    train_metric(shaped, out, recipe=recipe('lidar', 'shape'), device='cpu')
    return out

def tree(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

# -- what is written
def test_channels_are_those_of_the_points(bare, shaped, data):
    old, ds = ReIDDataset(bare), ReIDDataset(shaped); t = ds.table
    assert ds.features == ('lidar', 'shape') and ds.names == [*old.names, 'shape.footprint', 'shape.height']
    np.testing.assert_array_equal(ds.read('crops')[:, :-2], old.read('crops'))
    for k in old.table: np.testing.assert_array_equal(t[k], old.table[k])
    x = ds.choosing('shape').read('crops').astype(float); full = t['shape_points'] > 0
    assert 20 < full.sum() < len(ds) and not x[~full].any() and (x[full, 0].sum((1, 2)) > 0).all()
    banks = {n: ShapeBank(data, n) for n in data.scenes}
    for i in np.flatnonzero(full)[::7]:                                              # the points themselves: row 0 ahead, column 0 left
        s = banks[t['scene_name'][i]].sighting(t['instance_token'][i], t['sample_token'][i], WINDOW)
        p = s.points.astype(float); at = np.floor((5-p[:, :2])/.5).astype(int); want = np.zeros((20, 20), bool)
        ok = ((at >= 0) & (at < 20)).all(1); want[tuple(at[ok].T)] = True
        off = want ^ (x[i, 0] > 0)                                                   # cells of 0.1 m are drawn by their middle
        assert off.sum() <= .2*want.sum()+1 and t['shape_points'][i] == len(p), (i, off.sum(), want.sum())
        assert abs(x[i, 1].max()*4.8-(p[ok, 2]+s.wlh[2]/2).max()) < .02

def test_large_arrays_lie_on_the_disk_once(bare, shaped):
    for p in sorted(bare.glob('scenes/*/*.npy')): assert os.stat(p).st_ino == os.stat(shaped/p.relative_to(bare)).st_ino, p

def test_a_subset_of_channels_is_read_from_both_files(shaped):
    ds = ReIDDataset(shaped); whole = ds.read('crops', [3, 1]); at = [ds.names.index(n) for n in ('lidar.density', 'shape.height')]
    np.testing.assert_array_equal(ReIDDataset(shaped, features=('shape.height', 'lidar.density')).read('crops', [3, 1]), whole[:, at])
    np.testing.assert_array_equal(ReIDDataset(shaped, features='shape.footprint').read('crops', [3]), whole[:1, -2:-1])

def test_killed_between_scenes_and_called_again(bare, shaped, data, tmp_path, monkeypatch):
    real, n, out = O._write_scene, [0], tmp_path/'out'
    def dies(*a):
        n[0] += 1
        if n[0] == 2: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(O, '_write_scene', dies)
    with pytest.raises(KeyboardInterrupt): add_shapes(bare, data, out, cfg=WINDOW)
    with pytest.raises(FileNotFoundError, match='no finished ReID data set'): ReIDDataset(out)
    first, = (out/'scenes').iterdir(); before = (first/'shapes.npy').stat().st_mtime_ns
    with pytest.raises(ValueError, match='another configuration'): add_shapes(bare, data, out, cfg=replace(WINDOW, window=.2))
    monkeypatch.undo(); add_shapes(bare, data, out, cfg=WINDOW)
    assert (first/'shapes.npy').stat().st_mtime_ns == before and tree(out) == tree(shaped)

def test_misplaced_boxes_are_drawn_once(bare, shaped, data, tmp_path):
    a, b = (ReIDDataset(add_shapes(bare, data, tmp_path/n, cfg=WINDOW, box_noise=(.1, 3.))) for n in 'ab')
    x, y, exact = (d.choosing('shape').read('crops') for d in (a, b, ReIDDataset(shaped)))
    np.testing.assert_array_equal(x, y); full = a.table['shape_points'] > 0
    assert (x[full] != exact[full]).any((1, 2, 3)).mean() > .9 and not x[~full].any()

# -- the leakage rule
def test_no_sweep_stands_on_both_sides_of_a_counted_pair(shaped, data):
    "From the stored times alone, and from the sweeps themselves"
    ds = ReIDDataset(shaped); t, obs = ds.table, observations(ds)
    assert np.nanmax(t['shape_last']-ds.times) < 1e-5 and .4 < np.nanmax(ds.times-t['shape_first']) < .5+1e-5
    counted = ~junk_mask(obs, obs, min_gap=1.); scene = t['scene_token'][:, None] == t['scene_token']
    overlap = scene & (t['shape_first'][:, None] <= t['shape_last']+1e-6) & (t['shape_first'] <= t['shape_last'][:, None]+1e-6)
    assert (counted & scene).sum() > 100 and overlap.sum() > len(ds) and not (counted & overlap).any()
    free = replace(obs, window=None)
    assert (~junk_mask(free, free, min_gap=.5) & overlap).any()                       # without the check a gap of the window lets them through
    times = {s.token: s.time for n in data.scenes for s in ShapeBank(data, n).scene.sweeps}
    start = {n: min(ds.times[t['scene_name'] == n]) for n in data.scenes}; bank = {n: ShapeBank(data, n) for n in data.scenes}
    for i in np.flatnonzero(t['shape_points'] > 0)[::9]:
        n = t['scene_name'][i]; got = sorted(times[k] for k in bank[n].sighting(t['instance_token'][i], t['sample_token'][i], WINDOW).sweeps)
        assert abs(t['shape_first'][i]-start[n]-got[0]) < 1e-4 and abs(t['shape_last'][i]-start[n]-got[-1]) < 1e-4 and t['shape_sweeps'][i] == len(got)

def test_gaps_inside_the_window_are_refused_wherever_something_is_measured(shaped, run):
    ds = ReIDDataset(shaped, features=('lidar', 'shape')); obs = observations(ds); x = np.random.default_rng(0).normal(size=(len(ds), 4))
    says = r'min_gap 0\.5 s is not longer than the window of 0\.5 s'
    for f in (lambda: all_observations(x, obs, min_gap=.5), lambda: all_observations(x, obs, min_gap=.5, query=np.arange(len(ds)) < 5), lambda: junk_mask(obs.take([0, 1]), obs, min_gap=.5),
              lambda: evaluate_reid(run, shaped, min_gap=.5, min_visibility=1, baselines=False)):
        with pytest.raises(ValueError, match=says): f()
    with pytest.raises(ValueError, match='single-shot galleries with shapes'): single_shot(x, obs, min_gap=1.)
    all_observations(x, obs, min_gap=.6); all_observations(x, obs, min_gap=.5, scope='other')
    assert observations(take(ds, np.arange(len(ds)) < 9)).window == .5 and observations(ds.choosing('lidar')).window is None
    with pytest.raises(ValueError, match='no re-ranking'): evaluate_reid(run, shaped, min_gap=1., min_visibility=1, baselines=False, rerank='expand')
    got = evaluate_reid(run, shaped, min_gap=1., min_visibility=1, baselines=False)
    assert got['rows'][0]['n_queries'] > 0 and 'single-shot' in got['single_shot'][0]['method']

def test_tracklets_obey_it(shaped):
    from bev_reid.sequences import dataset_tracklets, rank_tracklets
    ds = ReIDDataset(shaped); t = dataset_tracklets(ds, length=2); x = np.random.default_rng(0).normal(size=(len(ds), 4)).astype(np.float32)
    with pytest.raises(ValueError, match='not longer than the window of 0.5 s'): rank_tracklets(x, t, min_gap=.4)
    rank_tracklets(x, t, min_gap=.6); assert t.take(slice(0, 2)).window == .5

@pytest.mark.parametrize('features', [['lidar', 'shape'], ['shape', 'lidar']])
def test_one_side_with_shapes_is_enough(shaped, monkeypatch, features):
    "Camera or LiDAR against shapes: the keyframe of the one may lie in the window of the other"
    import bev_reid.cross_modal as C
    config = dict(data=dict(kind='bev', features=[[f] for f in features], dataset=ReIDDataset(shaped).config), id_map={})
    monkeypatch.setattr(C, 'load_cross_modal', lambda *a, **kw: (None, config)); monkeypatch.setattr(C, 'embed_side', lambda net, side, m: np.random.default_rng(m).normal(size=(len(side.obs), 4)))
    with pytest.raises(ValueError, match='not longer than the window of 0.5 s'): C.evaluate_cross_modal('run', shaped, min_gap=.5, min_visibility=1)
    assert len(C.evaluate_cross_modal('run', shaped, min_gap=1., min_visibility=1)['rows']) == 4

def test_a_validation_inside_the_window_is_refused_before_the_training(bare, data, tmp_path):
    out = add_shapes(bare, data, tmp_path/'two', cfg=ShapeConfig(window=2.)); r = recipe('shape', val_gap=2.)
    with pytest.raises(ValueError, match='min_gap 2 s is not longer than the window of 2 s'): train_metric(out, tmp_path/'run', recipe=replace(r, fit=replace(r.fit, eval_every=1)), device='cpu')
    assert not (tmp_path/'run').exists()

def test_windows_that_look_ahead_are_never_ranked(bare, data, tmp_path):
    ds = ReIDDataset(add_shapes(bare, data, tmp_path/'late', cfg=ShapeConfig(window=.5, causal=False)))
    assert np.nanmax(ds.table['shape_last']-ds.times) > .1
    with pytest.raises(ValueError, match='causal=False'): observations(ds)
    observations(ds.choosing('lidar'))

def test_the_stored_times_overrule_what_the_configuration_says(shaped, tmp_path):
    "A data set whose sweeps reach farther back than its configuration admits"
    out = tmp_path/'lies'; shutil.copytree(shaped, out); c = json.loads((out/'config.json').read_text()); c['shapes']['window'] = .1
    (out/'config.json').write_text(json.dumps(c))
    assert shape_window(ReIDDataset(out)) == pytest.approx(shape_window(ReIDDataset(shaped)), abs=.01)

def test_networks_and_data_sets_have_the_same_shapes(run, shaped, bare, data, tmp_path):
    from bev_reid.metric import load_metric
    config = load_metric(run).config; assert trained_features(config) in (('lidar', 'shape'), ['lidar', 'shape'])
    other = add_shapes(bare, data, tmp_path/'other', cfg=ShapeConfig(window=1.))
    with pytest.raises(ValueError, match=r'window 0\.5 there, 1\.0 here'): evaluate_reid(run, other, min_gap=2., min_visibility=1, baselines=False)
    with pytest.raises(ValueError, match="no 'shape'.*bev_reid_occ_shapes --dataset"): evaluate_reid(run, bare, min_visibility=1)
    noisy = add_shapes(bare, data, tmp_path/'noisy', cfg=WINDOW, box_noise=(.1, 3.))
    check_crops(ReIDDataset(noisy, features=('shape',)), config['dataset'], name='n')     # other boxes are another measurement, not another input
    check_crops(ReIDDataset(bare, features=('lidar',)), config['dataset'], name='n')
    train_metric(shaped, tmp_path/'all', recipe=recipe(), device='cpu')                  # reads all that there is
    assert trained_features(load_metric(tmp_path/'all').config) == ['lidar', 'shape']

# -- what is refused, and the verb
def test_bad_input_is_refused_by_name(net, bare, shaped, data, tmp_path):
    other = DrivingData(make_toy(tmp_path/'other', n_scenes=2, n_samples=2, img_size=(16, 28), n_azimuth=30, workers=1, seed=6))
    few = DrivingData(make_toy(tmp_path/'few', n_scenes=1, n_samples=2, img_size=(16, 28), n_azimuth=30, workers=1, seed=5))
    ego = build_dataset(net, data, tmp_path/'ego', cfg=replace(CFG, crop=replace(CFG.crop, heading_up=False)))
    new = tmp_path/'new'
    for says, f in [('name the world that it was made from', lambda: add_shapes(bare, other, new)), ('which .*few lacks', lambda: add_shapes(bare, few, new)), ('has shapes already, of 0.5 s', lambda: add_shapes(shaped, data, new)),
                    ('drives up the page', lambda: add_shapes(ego, data, new)), ('is the data set itself', lambda: add_shapes(bare, data, bare)), ('metres and degrees', lambda: add_shapes(bare, data, new, box_noise=(1,))),
                    ('holds no finished', lambda: add_shapes(tmp_path, data, new)), ('--dataset needs --out', lambda: cli.bev_reid_occ_shapes(str(data.dataroot), dataset=str(bare))),
                    ('goes with --dataset', lambda: cli.bev_reid_occ_shapes(str(data.dataroot), box_noise=(.1, 3))), ('shapes are added to a finished data set', lambda: DatasetConfig(features=('shape',)))]:
        with pytest.raises((ValueError, OSError), match=says): f()
    assert not new.exists()

def test_a_joint_training_has_no_use_for_them(net, data, shaped, bare, tmp_path, monkeypatch):
    import bev_reid.joint as J
    bev = replace(CFG, features=('bev',)); seen = add_shapes(build_dataset(net, data, tmp_path/'bev', cfg=bev), data, tmp_path/'seen', cfg=WINDOW)
    monkeypatch.setattr(J, 'source_of', lambda d, **kw: (ReIDDataset(d), net, None, data, bev))
    with pytest.raises(ValueError, match='holds bev, shape: the others have no gradient'): J.train_joint(seen, tmp_path/'joint', recipe=J.JointRecipe.recipe('toy', min_visibility=1))

def test_a_missing_instance_is_named(bare, data, tmp_path):
    out = tmp_path/'cut'; shutil.copytree(bare, out)
    t = pq.read_table(out/'observations.parquet'); k = t.column_names.index('ann_token')
    import pyarrow as pa
    pq.write_table(t.set_column(k, 'ann_token', pa.array(['nobody', *t['ann_token'].to_pylist()[1:]])), out/'observations.parquet')
    with pytest.raises(ValueError, match='no annotation nobody'): add_shapes(out, data, tmp_path/'new')

def test_verb_says_what_it_made_and_ends_in_one_line(bare, data, net, tmp_path, capsys, toy_root):
    root, out = str(data.dataroot), tmp_path/'v'
    got = cli.bev_reid_occ_shapes(root, dataset=str(bare), out=str(out), window=.5, box_noise=(.1, 3.)); said = capsys.readouterr().out
    n = json.loads((out/'dataset.json').read_text()); assert n['features'] == ['lidar', 'shape'] and n['shapes'] == got and got['n_with']+got['n_without'] == n['n_obs']
    assert f"{got['n_with']} of {n['n_obs']} observations have a shape" in said and 'min_gap above 0.5' in said and 'keyframes only' not in said
    keys = DrivingData(toy_root)                                                       # no sweeps between its keyframes
    cli.bev_reid_occ_shapes(str(toy_root), dataset=str(build_dataset(net, keys, tmp_path/'k', cfg=CFG)), out=str(tmp_path/'ks')); assert 'covers keyframes only' in capsys.readouterr().out
    assert ReIDDataset(tmp_path/'ks').table['shape_sweeps'].max() == 3                 # of a second: keyframes are half a second apart
    script = tmp_path/'bev_reid_occ_shapes'; script.write_text('from bev_reid.cli_occupancy import bev_reid_occ_shapes\nbev_reid_occ_shapes()\n')
    p = subprocess.run([sys.executable, script, root, '--dataset', str(out), '--out', str(tmp_path/'w')], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode == 2 and 'Traceback' not in p.stderr and last.startswith('bev_reid_occ_shapes: error: ') and 'has shapes already' in last

# -- the table
def test_stored_rows_come_from_these_commands():
    import inspect
    import shlex
    sys.path.insert(0, str(ROOT/'nbs'/'_tools'))
    from results_shapes import ADDS, ROWS, SEEDS, steps
    from bev_reid import cli as road
    todo, got = steps('demo/shapes', False), json.loads((ROOT/'results'/'shapes.json').read_text())
    assert {c['name']: c['command'] for c in got['commands']} == {n: shlex.join(c) for n, c in todo.items()} and not got['quick']
    rows = {r['method']: r for r in got['rows']}
    assert set(ROWS) < set(rows) and all(len(rows[n]['seeds']) == len(SEEDS) for n in ROWS) and [(d['of'], d['over']) for d in got['adds']] == ADDS
    for n in ROWS: assert rows[n]['rank1'] == pytest.approx(np.mean([s['rank1'] for s in rows[n]['seeds']]), abs=2e-4)
    for d in got['adds']: assert d['mAP']['diff'] == pytest.approx(rows[d['of']]['mAP']-rows[d['over']]['mAP'], abs=2e-4) and d['rank1']['low'] <= d['rank1']['diff'] <= d['rank1']['high']
    assert got['min_gap_s'] > got['window_s']
    for c in todo.values():
        known = inspect.signature(getattr(cli if c[0].startswith('bev_reid_occ') else road, c[0])).parameters
        assert not [w for w in c if w.startswith('--') and w[2:].replace('-', '_') not in known], c
