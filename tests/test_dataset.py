"""The ReID data set: builds that die and go on, processes that share the scenes, splits that never share a vehicle."""
import errno, json, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import bev_reid.dataset as D
from bev_reid.crops import CropConfig
from bev_reid.data import DrivingData
from bev_reid.dataset import *
from bev_reid.fit import plain, save_atomic
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from road import BIN, env, halves, verb

CFG = DatasetConfig(crop=CropConfig(extent=16., size=12), patch_size=16)

def network(seed=0):
    torch.manual_seed(seed)
    return LiftSplat(LSSConfig(grid=BEVGrid((-24, 24, 1), (-24, 24, 1), (-10, 10, 20), (2, 26, 4)), img_size=(64, 128), up_channels=8, cam_channels=4, bev_channels=6, bev_widths=(8, 8, 8), bev_up=8)).eval()

@pytest.fixture(scope='module')
def data(toy_root): return DrivingData(toy_root)

@pytest.fixture(scope='module')
def model(): return network()

@pytest.fixture(scope='module')
def whole(data, model, tmp_path_factory): return build_dataset(model, data, tmp_path_factory.mktemp('whole')/'reid', cfg=CFG)

def same(a, b):
    assert pq.read_table(a/'observations.parquet').equals(pq.read_table(b/'observations.parquet'))
    for p in sorted(a.glob('scenes/*/*.npy')): assert np.array_equal(np.load(p), np.load(b/p.relative_to(a))), p


def test_table_and_crops(whole, data):
    ds, cats = ReIDDataset(whole), set(data.match_category('vehicle.*'))
    t = ds.table
    assert set(t['category']) <= cats and len(ds) == json.loads((whole/'dataset.json').read_text())['n_obs'] and halves(whole) == []
    assert np.isfinite(ds.read('crops')).all() and ds[0]['crop'].shape == (6, 12, 12) and ds[0]['crop'].dtype == torch.float32 and ds.channels == 6
    k = len(ds)//2
    frame = data.frame(t['sample_token'][k])
    at = frame.ann_tokens.index(t['ann_token'][k])
    assert frame.boxes[at, :2].tolist() == pytest.approx([t['x'][k], t['y'][k]])
    ann = data.nusc.get('sample_annotation', t['ann_token'][k])
    assert [t[c][k] for c in ('global_x', 'global_y', 'global_z')] == pytest.approx(ann['translation'], abs=1e-3)
    # each observation once, and only vehicles on the grid
    assert len(set(t['ann_token'])) == len(t['ann_token']) and (np.abs(t['x']) < 24).all() and (np.abs(t['y']) < 24).all()

def test_killed_between_scenes(whole, data, model, tmp_path, monkeypatch):
    real, n = D._write_scene, [0]
    def dies(folder, *a):
        n[0] += 1
        if n[0] == 2: raise KeyboardInterrupt
        return real(folder, *a)
    monkeypatch.setattr(D, '_write_scene', dies)
    with pytest.raises(KeyboardInterrupt): build_dataset(model, data, tmp_path/'reid', cfg=CFG)
    with pytest.raises(FileNotFoundError, match='no finished ReID data set.*it goes on'): ReIDDataset(tmp_path/'reid')
    first = next((tmp_path/'reid/scenes').iterdir()).stat().st_mtime_ns
    monkeypatch.undo()
    build_dataset(model, data, tmp_path/'reid', cfg=CFG)
    same(whole, tmp_path/'reid')
    assert min(p.stat().st_mtime_ns for p in (tmp_path/'reid/scenes').iterdir()) == first      # it did not begin again

def test_two_processes(whole, data, model, tmp_path):
    for rank in (1, 0): build_dataset(model, data, tmp_path/'reid', cfg=CFG, rank=rank, world=2)
    same(whole, tmp_path/'reid')
    build_dataset(model, data, tmp_path/'three', cfg=CFG, rank=2, world=3)                     # nothing to do for the third
    assert not (tmp_path/'three/dataset.json').exists()

def test_progress_counts_what_was_done_before(data, model, tmp_path, capsys):
    build_dataset(model, data, tmp_path/'reid', cfg=CFG, rank=0, world=2)
    assert capsys.readouterr() == ('', '')                                                     # the library is silent
    build_dataset(model, data, tmp_path/'reid', cfg=CFG, progress=True)
    said = capsys.readouterr().err
    assert ' 4/8 ' in said and '8/8' in said and 'keyframes' in said

def test_two_processes_of_torchrun(toy_root, model, tmp_path):
    "Every file is the same, byte for byte, as one process makes it"
    save_atomic(dict(model=model.state_dict(), config=dict(lss=plain(model.cfg))), tmp_path/'lss.pt')
    args = [tmp_path/'lss.pt', toy_root]
    crop = ['--extent', '16', '--size', '12', '--device', 'cpu']
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', BIN/'bev_reid_dataset', *args, tmp_path/'two', *crop]
    p = subprocess.Popen([str(a) for a in run], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env(), cwd=tmp_path)
    verb('dataset', *args, tmp_path/'one', *crop, tmp=tmp_path)
    said, _ = p.communicate(timeout=240)
    assert p.returncode == 0 and 'n_obs' in said, said
    files = sorted(f.relative_to(tmp_path/'one') for f in (tmp_path/'one').rglob('*') if f.is_file())
    assert len(files) == 3+2*5 and files == sorted(f.relative_to(tmp_path/'two') for f in (tmp_path/'two').rglob('*') if f.is_file())
    for f in files: assert (tmp_path/'one'/f).read_bytes() == (tmp_path/'two'/f).read_bytes(), f

def test_workers_and_batches(whole, data, model, tmp_path):
    same(whole, build_dataset(model, data, tmp_path/'workers', cfg=CFG, n_workers=2))
    alone = build_dataset(model, data, tmp_path/'alone', cfg=CFG, batch_size=3, n_workers=1)   # another batch size moves the last bits alone
    a, b = ReIDDataset(whole), ReIDDataset(alone)
    assert list(a.table['ann_token']) == list(b.table['ann_token']) and np.array_equal(a.read('patches'), b.read('patches'))
    x, y = a.read('crops').astype(float), b.read('crops').astype(float)
    assert np.abs(x-y).max() < 2e-3*np.abs(x).max() and np.abs(a.read('rgb').astype(int)-b.read('rgb')).max() <= 1

def test_precision(whole, data, model, tmp_path):
    a, b = (ReIDDataset(build_dataset(model, data, tmp_path/amp, cfg=CFG, amp=amp)).read('crops').astype(float) for amp in ('no', 'bf16'))
    assert 0 < np.linalg.norm(a-b) < .05*np.linalg.norm(a)
    with pytest.raises(ValueError, match='amp: bf16 there, no now'): build_dataset(model, data, tmp_path/'bf16', cfg=CFG, amp='no')

def test_patches_from_shrunk_images(whole, data, model, tmp_path):
    "The same patches where nothing is smaller than they are, and softer ones elsewhere"
    ds = ReIDDataset(build_dataset(model, data, tmp_path/'shrunk', cfg=replace(CFG, patch_from='shrunk')))
    want, got, large = ReIDDataset(whole).read('patches').astype(int), ds.read('patches').astype(int), ds.table['patch_px'] > 30
    off = np.abs(want-got).mean((1, 2, 3))
    assert large.any() and off[large].mean() < 12 and np.array_equal(want.any((1, 2, 3)), got.any((1, 2, 3)))
    assert np.array_equal(ds.read('crops'), ReIDDataset(whole).read('crops'))

def test_errors_of_workers_are_told_as_they_are(data, model, toy_root, tmp_path):
    root = tmp_path/'world'; shutil.copytree(toy_root, root)
    Path(DrivingData(root).frame(data.sample_tokens()[2]).img_paths[1]).unlink()
    with pytest.raises(FileNotFoundError, match='^image .* is missing'): build_dataset(model, DrivingData(root), tmp_path/'reid', cfg=CFG, n_workers=1)

@pytest.mark.parametrize('at', [1, 2, 4])
def test_full_disk(whole, data, model, tmp_path, monkeypatch, at):
    save, n = np.save, [0]
    def full(path, a):
        n[0] += 1
        if n[0] == at: Path(path).write_bytes(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
        return save(path, a)
    monkeypatch.setattr(np, 'save', full)
    with pytest.raises(OSError, match='cannot write .*No space left.*before are intact'): build_dataset(model, data, tmp_path/'reid', cfg=CFG)
    assert halves(tmp_path) == [] and len(list((tmp_path/'reid/scenes').iterdir())) == (at > 3)
    monkeypatch.undo()
    same(whole, build_dataset(model, data, tmp_path/'reid', cfg=CFG))

def test_other_configuration(whole, data, model):
    with pytest.raises(ValueError, match=r'dataset\.crop\.extent: 16\.0 there, 20\.0 now'): build_dataset(model, data, whole, cfg=replace(CFG, crop=CropConfig(extent=20., size=12)))
    with pytest.raises(ValueError, match=r'weights: \w+ there, \w+ now'): build_dataset(network(1), data, whole, cfg=CFG)     # a network trained further

@pytest.mark.parametrize('cfg, says', [(replace(CFG, crop=CropConfig(extent=3., size=12)), 'smaller than the longest box.*instance'), (replace(CFG, classes=('vehicle.boat',)), "unknown class 'vehicle.boat'")])
def test_bad_input_leaves_nothing(data, model, tmp_path, cfg, says):
    with pytest.raises(ValueError, match=says): build_dataset(model, data, tmp_path/'reid', cfg=cfg)
    assert not (tmp_path/'reid').exists()

def test_filters(whole, data, model, tmp_path):
    all_rows = ReIDDataset(whole).table
    some = float(np.median(all_rows['coverage']))+1e-6
    if (all_rows['coverage'] >= some).any():
        t = ReIDDataset(build_dataset(model, data, tmp_path/'covered', cfg=replace(CFG, min_coverage=some))).table
        assert set(t['ann_token']) == set(all_rows['ann_token'][all_rows['coverage'] >= some])
    t = ReIDDataset(build_dataset(model, data, tmp_path/'cars', cfg=replace(CFG, classes=('vehicle.car',), min_visibility=3))).table
    assert set(t['category']) == {'vehicle.car'} and t['visibility'].min() >= 3
    with pytest.raises(ValueError, match='is empty after filtering'): ReIDDataset(whole, min_coverage=1.1)
    with pytest.raises(ValueError, match='no observation of'): build_dataset(model, data, tmp_path/'none', cfg=replace(CFG, min_coverage=1.1))

def test_splits_never_share_a_vehicle(whole, data, model, tmp_path):
    a, b = ReIDDataset(whole, split='train'), ReIDDataset(whole, split='test')
    check_disjoint(a, b)
    assert set(a.table['scene_name']) == set(data.splits()['train']) and set(b.table['scene_name']) == set(data.splits()['test'])
    with pytest.raises(ValueError, match='identities stand in both'): check_disjoint(a, b, a)
    by_id = build_dataset(model, data, tmp_path/'by_id', cfg=replace(CFG, split_by='identity', held_out=.3))
    a, b = ReIDDataset(by_id, split='train'), ReIDDataset(by_id, split='test')
    check_disjoint(a, b)
    sides = identity_sides(data, replace(CFG, split_by='identity', held_out=.3))
    assert all(sides[i] == 'train' for i in a.table['identity']) and all(sides[i] == 'test' for i in b.table['identity'])
    assert sum(s == 'test' for s in sides.values()) == round(.3*len(sides))

def test_skip_missing(whole, data, model, toy_root, tmp_path):
    root = tmp_path/'world'; shutil.copytree(toy_root, root)
    broken = DrivingData(root)
    first, scene = broken.sample_tokens()[0], broken.scenes[1]
    img = Path(broken.frame(first).img_paths[2]); img.write_bytes(img.read_bytes()[:500])
    for t in broken.sample_tokens(scenes=[scene]): Path(broken.frame(t).img_paths[0]).unlink()
    with pytest.raises(ValueError, match=f'image .*{img.name} is truncated'): build_dataset(model, broken, tmp_path/'reid', cfg=CFG)
    assert not (tmp_path/'reid').exists()
    out = build_dataset(model, broken, tmp_path/'reid', cfg=replace(CFG, skip_missing=True))
    t, want = ReIDDataset(out).table, ReIDDataset(whole).table
    assert json.loads((out/'dataset.json').read_text())['n_skipped'] == 5                      # one keyframe, and a whole scene of four
    assert set(t['ann_token']) == set(want['ann_token'][(want['sample_token'] != first) & (want['scene_name'] != scene)])

def test_pk_order():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(11), rng.integers(1, 7, 11))
    usable = {i for i in range(11) if (labels == i).sum() > 1}
    order = pk_order(labels, p=3, k=4, seed=5)
    for epoch in range(3):
        batches = order(epoch)
        seen = [i for b in batches for i in sorted(set(labels[b]))]
        assert len(batches) == len(usable)//3 and len(seen) == len(set(seen)) and set(seen) <= usable   # no identity twice an epoch
        for b in batches:
            assert len(b) == 12 and len(set(labels[b])) == 3
            for i in set(labels[b]):
                mine = [j for j in b if labels[j] == i]
                assert len(mine) == 4 and (len(set(mine)) == 4 or (labels == i).sum() < 4)              # repeats only where there are too few
    assert order(1) == pk_order(labels, p=3, k=4, seed=5)(1) and order(1) != order(2) != pk_order(labels, p=3, k=4, seed=6)(2)
    assert len(pk_order(labels, p=64, k=2)(0)) == 1                                                     # more identities asked for than there are
    with pytest.raises(ValueError, match='at least two identities'): pk_order([0, 0, 1, 2], p=2)

def test_split_identities():
    ids = np.repeat([f'v{i}' for i in range(20)], 3)
    s = split_identities(ids, held_out=.25)
    assert (s == 'test').sum() == 15 and all(len(set(s[ids == i])) == 1 for i in set(ids))
    assert (s == split_identities(ids, held_out=.25)).all() and (s != split_identities(ids, held_out=.25, seed=2)).any()
    with pytest.raises(ValueError, match='cannot be split'): split_identities(ids[:9], held_out=.1)

def test_a_map_that_knows_a_held_out_vehicle_is_refused(tmp_path, toy_root):
    data = DrivingData(toy_root)
    held = [n for n, s in D.identity_sides(data, CFG).items() if s != 'train']
    model = network(); model.company_ids = held[:1]
    with pytest.raises(ValueError, match='would hold out'): D.build_dataset(model, data, tmp_path/'reid', cfg=CFG)
    assert not (tmp_path/'reid').exists()

EVERY = replace(CFG, features=D.FEATURES)

@pytest.fixture(scope='module')
def every(data, model, tmp_path_factory): return build_dataset(model, data, tmp_path_factory.mktemp('every')/'reid', cfg=EVERY)

def test_every_feature_in_one_build(whole, every):
    a, b = ReIDDataset(whole), ReIDDataset(every)
    assert (b.features, b.channels, b.names[5:8], b.names[-1]) == (D.FEATURES, 6+4+4+4, ['bev.5', 'rgb.red', 'rgb.green'], 'lidar.density') and b[0]['crop'].shape == (18, 12, 12)
    crops = b.read('crops')
    assert np.array_equal(a.read('crops'), crops[:, :6]) and np.array_equal(a.read('rgb'), b.read('rgb')) and a.table['ann_token'].tolist() == b.table['ann_token'].tolist()
    assert np.abs(crops[:, 6:9].astype(float)-b.read('rgb')/255).max() < 1/255 and np.isfinite(crops).all()
    assert 0 <= crops[:, 6:].min() and crops[:, 6:].max() <= 1 and all(crops[:, k].max() > .1 for k in range(6, 18))
    assert json.loads((every/'dataset.json').read_text())['features'] == list(D.FEATURES)
    known = json.loads((every/'config.json').read_text())['channels']                          # names and normalisation are written down
    assert [c['name'] for c in known] == b.names and known[-4] == dict(name='lidar.height_max', zero=-1., one=5., unit='m') and known[-2]['one'] == 255
    many = b.table['num_lidar_pts'] > 40                                                       # where the LiDAR sees a vehicle, its crop shows it
    assert many.any() and (crops[many, -1, 3:9, 3:9].max((1, 2)) > .1).all()

def test_subsets_of_the_features(every):
    full = ReIDDataset(every).read('crops')
    for asked, at in ((('rgb',), [6, 7, 8, 9]), ('bev', range(6)), (('lidar', 'rgb'), [6, 7, 8, 9, 14, 15, 16, 17]), (('lidar.intensity', 'bev.2'), [2, 16]), (None, range(18)), ((), range(18))):
        ds = ReIDDataset(every, features=asked)
        assert np.array_equal(ds.read('crops'), full[:, list(at)]) and ds.channels == len(at) == len(ds.names) and ds[1]['crop'].shape == (len(at), 12, 12), asked
    assert ReIDDataset(every, features=('lidar', 'bev.2')).features == ('lidar', 'bev.2')
    with pytest.raises(ValueError, match="hold bev, rgb, rgb_lidar, lidar, no 'depth': build a data set"): ReIDDataset(every, features=('depth',))

@pytest.mark.parametrize('features', [('rgb',), ('rgb_lidar',), ('lidar',)])
def test_each_feature_alone(every, data, model, tmp_path, features):
    alone = build_dataset(model, data, tmp_path/'reid', cfg=replace(CFG, features=features))
    assert np.array_equal(ReIDDataset(alone).read('crops'), ReIDDataset(every, features=features).read('crops'))

def test_features_and_processes(every, data, model, tmp_path):
    for rank in (1, 0): build_dataset(model, data, tmp_path/'reid', cfg=EVERY, rank=rank, world=2, n_workers=1-rank)
    same(every, tmp_path/'reid')

def test_another_choice_does_not_go_on(every, data, model):
    for cfg, says in ((replace(EVERY, features=('bev',)), r"dataset\.features: \['bev', 'rgb', 'rgb_lidar', 'lidar'\] there, \['bev'\] now"), (replace(EVERY, crop=replace(EVERY.crop, mask=True)), r'crop\.mask: False there, True now'),
                      (replace(EVERY, crop=replace(EVERY.crop, heading_up=False)), r'heading_up: True there, False now'), (replace(EVERY, raster=D.RasterConfig(cell=.5)), r'raster\.cell: 0\.0 there, 0\.5 now')):
        with pytest.raises(ValueError, match=says): build_dataset(model, data, every, cfg=cfg)
    assert build_dataset(model, data, every, cfg=replace(EVERY, features=D.FEATURES[::-1])) == every      # the same in another order

def test_turned_and_masked(every, data, model, tmp_path):
    "Each kind of window is one of the features alike"
    up, got = ReIDDataset(every), {}
    for name, kw in dict(turned=dict(heading_up=False), masked=dict(mask=True, mask_margin=1.)).items():
        ds = got[name] = ReIDDataset(build_dataset(model, data, tmp_path/name, cfg=replace(EVERY, crop=replace(EVERY.crop, **kw))))
        assert ds.table['ann_token'].tolist() == up.table['ann_token'].tolist() and np.array_equal(ds.read('patches'), up.read('patches'))
    a, m, t = (d.read('crops').astype(float) for d in (up, got['masked'], got['turned']))
    corner = np.s_[:, :, :2, :2]                                                               # 6 m ahead and to the left: beyond a vehicle
    assert not m[corner].any() and a[corner].any() and (np.abs(m) <= np.abs(a)+1e-6).all() and not got['masked'].read('rgb')[corner].any()
    for k, yaw in enumerate(up.table['yaw']): assert (np.abs(t[k]-a[k]).max() < .01) == (abs(yaw) < 1e-3)

def test_data_sets_written_before_there_was_a_choice(whole, data, model, tmp_path):
    old = tmp_path/'old'; shutil.copytree(whole, old)
    made = json.loads((old/'config.json').read_text()); del made['channels']
    for k in ('features', 'raster'): del made['dataset'][k]
    for k in ('mask', 'mask_margin'): del made['dataset']['crop'][k]
    (old/'config.json').write_text(json.dumps(made))
    ds = ReIDDataset(old, features='bev')
    assert ds.names == [f'bev.{i}' for i in range(6)] and np.array_equal(ds.read('crops'), ReIDDataset(whole).read('crops'))
    check_crops(ReIDDataset(whole), made, name='a checkpoint'); check_crops(ds, ReIDDataset(whole).config, name='a checkpoint')
    shutil.rmtree(next((old/'scenes').iterdir())); (old/'dataset.json').unlink()
    same(whole, build_dataset(model, data, old, cfg=CFG))                                      # an unfinished one goes on
    with pytest.raises(ValueError, match='dataset.features'): build_dataset(model, data, old, cfg=EVERY)

def test_crops_of_another_kind_are_refused(every, whole):
    ds, made = ReIDDataset(every, features='lidar'), ReIDDataset(every).config
    def but(**kw): return {**made, 'dataset': {**made['dataset'], **kw}}
    check_crops(ds, made, name='net')
    with pytest.raises(ValueError, match='net was trained on rasters'): check_crops(ds, but(raster={**made['dataset']['raster'], 'cell': .5}), name='net')
    check_crops(ReIDDataset(every, features='rgb'), but(raster={**made['dataset']['raster'], 'cell': .5}), name='net')
    with pytest.raises(ValueError, match='net was trained on crops'): check_crops(ds, but(crop={**made['dataset']['crop'], 'mask': True}), name='net')

def test_features_that_cannot_be_had(data, model, toy_root, tmp_path):
    blind = DrivingData(toy_root); blind.lidar_channel = None                                  # a rig without one
    with pytest.raises(ValueError, match='need a LiDAR, and .* has none: bev and rgb do without'): build_dataset(model, blind, tmp_path/'reid', cfg=EVERY)
    with pytest.raises(ValueError, match="there is no 'lidra'"): DatasetConfig(features=('bev', 'lidra'))
    with pytest.raises(ValueError, match='no feature is given'): DatasetConfig(features=())
    with pytest.raises(ValueError, match='does not divide'): build_dataset(model, data, tmp_path/'reid', cfg=replace(EVERY, raster=D.RasterConfig(cell=.7)))
    assert not (tmp_path/'reid').exists()

def test_a_missing_sweep(data, model, toy_root, tmp_path):
    "Matters to the features that need it alone"
    root = tmp_path/'world'; shutil.copytree(toy_root, root)
    broken = DrivingData(root)
    Path(broken.frame(broken.sample_tokens()[0]).lidar_path).unlink()
    with pytest.raises(FileNotFoundError, match='LIDAR_TOP'): build_dataset(model, broken, tmp_path/'reid', cfg=replace(CFG, features=('lidar',)))
    out = build_dataset(model, broken, tmp_path/'reid', cfg=replace(CFG, features=('lidar',), skip_missing=True))
    assert json.loads((out/'dataset.json').read_text())['n_skipped'] == 1
    assert json.loads((build_dataset(model, broken, tmp_path/'bev', cfg=replace(CFG, skip_missing=True))/'dataset.json').read_text())['n_skipped'] == 0
