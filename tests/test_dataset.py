"""The ReID data set: builds that die and go on, processes that share the scenes, splits that never share a vehicle."""
import errno, json, shutil
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
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from road import halves

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
