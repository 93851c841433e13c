"""The reader of nuScenes-format sets: real folders, an odd little rig with answers known by hand, and broken input."""
import json, os, pickle, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bev_reid.data import *
from bev_reid.geometry import *

REAL = Path(os.environ.get('BEV_REID_DATA') or Path(__file__).parents[1]/'../shared/data')
N_REAL = dict(lyft_scene=(1, 42), nuscenes_one=(1, 1), nuscenes_real=(2, 3), nuscenes_val_boxes=(2, 81))   # scenes, samples

def real(name):
    if not (REAL/name).is_dir(): pytest.skip(f"{REAL/name} is absent: set BEV_REID_DATA to the folder of real data")
    return DrivingData(REAL/name)

# --- a set that resembles nuScenes in nothing but the schema: two cameras of two sizes, odd names, no map, no visibility ---
FRONT = [.5, -.5, .5, -.5]                        # camera axes (right, down, forward) in ego axes, as a quaternion
ROOT2 = float(np.sqrt(.5))
SIZES = dict(eye_left=(60, 90), eye_right=(48, 64))

def write_set(root, *, n=3, lidar=True, version='v1.0-odd'):
    "Scene `drive`: the ego moves 1 m along x per sample (1 s) and looks left (+90 degrees); each camera fires 0.1 s early"
    rng, t = np.random.default_rng(0), {k: [] for k in ('attribute category visibility instance sensor calibrated_sensor ego_pose log scene sample sample_data sample_annotation').split()}
    t['log'] = [dict(token='log', logfile='', vehicle='', date_captured='', location='')]
    t['category'] = [dict(token=c, name=c, description='') for c in ('vehicle.car', 'vehicle.bicycle', 'animal')]
    t['instance'] = [dict(token=f'i{k}', category_token=c, nbr_annotations=n, first_annotation_token='', last_annotation_token='') for k, c in enumerate(('vehicle.car', 'vehicle.bicycle', 'animal'))]
    t['scene'] = [dict(token='s', log_token='log', nbr_samples=n, first_sample_token='k0', last_sample_token=f'k{n-1}', name='drive', description='')]
    chans = list(SIZES)+['spinner']*lidar
    for c in chans:
        t['sensor'].append(dict(token=c, channel=c, modality='lidar' if c == 'spinner' else 'camera'))
        k = [] if c == 'spinner' else [[50., 0, SIZES[c][1]/2], [0, 50, SIZES[c][0]/2], [0, 0, 1]]
        t['calibrated_sensor'].append(dict(token=f'cs_{c}', sensor_token=c, translation=[0, 0, 1.5], rotation=[1, 0, 0, 0] if c == 'spinner' else FRONT, camera_intrinsic=k))
    for i in range(n):
        t['sample'].append(dict(token=f'k{i}', timestamp=1_000_000*(i+1), scene_token='s', prev=f'k{i-1}' if i else '', next=f'k{i+1}' if i < n-1 else ''))
        for c in chans:
            late, is_lidar = (0 if c == 'spinner' else -.1), c == 'spinner'
            name, tok = f'samples/{c}/{i}.'+('pcd.bin' if is_lidar else 'jpg'), f'{c}{i}'
            (root/'samples'/c).mkdir(parents=True, exist_ok=True)
            if is_lidar: np.array([[5., 0, 0, 7, 0], [0, 1, 0, 7, 0], [np.nan, 3, 0, 7, 0]], np.float32).tofile(root/name)   # one far, one on the own car, one lost
            else: Image.fromarray(rng.integers(0, 255, (*SIZES[c], 3), np.uint8)).save(root/name)
            t['ego_pose'].append(dict(token=tok, timestamp=0, rotation=[ROOT2, 0, 0, ROOT2], translation=[100+i+late, 50, 0]))
            h, w = (0, 0) if is_lidar else SIZES[c]
            t['sample_data'].append(dict(token=tok, sample_token=f'k{i}', ego_pose_token=tok, calibrated_sensor_token=f'cs_{c}', timestamp=int(1e6*(i+1+late)), fileformat='', is_key_frame=True,
                height=h, width=w, filename=name, prev=f'{c}{i-1}' if i else '', next=f'{c}{i+1}' if i < n-1 else ''))
        for k in range(3):   # 10 m and more to the left of the road, that is ahead of the ego; instance 0 drives along global x with 2 m/s
            t['sample_annotation'].append(dict(token=f'a{k}_{i}', sample_token=f'k{i}', instance_token=f'i{k}', visibility_token='', attribute_tokens=[], translation=[100+2*i if k == 0 else 103., 60+5*k, .8],
                size=[2., 4, 1.6], rotation=[1, 0, 0, 0], prev=f'a{k}_{i-1}' if i else '', next=f'a{k}_{i+1}' if i < n-1 else '', num_lidar_pts=3, num_radar_pts=0))
    (root/version).mkdir(parents=True)
    for name, rows in t.items(): (root/version/f'{name}.json').write_text(json.dumps(rows))
    return root

def edit(root, table, fn, version='v1.0-odd'):
    "Damage a table: `fn` changes its rows in place (or returns new ones)"
    path = root/version/f'{table}.json'
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(fn(rows) or rows))

@pytest.fixture
def odd(tmp_path): return write_set(tmp_path/'odd')

# --- any rig ---
def test_odd_rig(odd):
    data = DrivingData(odd)
    assert (data.version, data.cams, data.lidar_channel) == ('v1.0-odd', ['eye_left', 'eye_right'], 'spinner')
    f = data.frame('k1')
    assert f.img_sizes.tolist() == [[60, 90], [48, 64]] and f.timestamp == 2_000_000
    assert f.visibility.tolist() == [4]*3 and f.num_lidar_pts.tolist() == [3]*3
    assert data.frame('k1') is f                                      # kept
    # The ego stands at (101, 50) and looks along global y: a car at (102, 60) is 10 ahead and 1 to the right, and heads right.
    np.testing.assert_allclose(f.boxes[0], [10, -1, .8, 2, 4, 1.6, -np.pi/2], atol=1e-5)
    np.testing.assert_allclose(f.velocity[0], [0, -2], atol=1e-5)     # 2 m/s along global x is to the right
    np.testing.assert_allclose(f.velocity[1], [0, 0], atol=1e-5)

def test_ego_motion_of_cameras_is_compensated(odd):
    f = DrivingData(odd).frame('k1')
    # The cameras fired 0.1 s early, when the ego was 0.1 m back along global x: 0.1 m to its left.
    np.testing.assert_allclose(f.cam2ego[:, :3, 3], [[0, .1, 1.5]]*2, atol=1e-5)
    np.testing.assert_allclose(f.cam2ego[0, :3, 2], [1, 0, 0], atol=1e-5)   # they look ahead

def test_lidar_sweeps(odd):
    data = DrivingData(odd)
    np.testing.assert_allclose(data.lidar('k2'), [[5, 0, 1.5, 7, 0]], atol=1e-5)      # the own car and the lost return are gone
    np.testing.assert_allclose(data.lidar('k2', sweeps=9)[:, [0, 1, 4]], [[5, 0, 0], [5, 1, 1], [5, 2, 2]], atol=1e-4)   # older sweeps lie to the left
    assert len(data.lidar('k2', min_distance=0.)) == 2
    with pytest.raises(ValueError, match='sweeps'): data.lidar('k2', sweeps=0)

def test_no_lidar(tmp_path):
    data = DrivingData(write_set(tmp_path/'odd', lidar=False))
    f = data.frame('k1')
    assert data.lidar_channel is None and f.lidar_path is None and f.lidar2ego is None
    np.testing.assert_allclose(f.cam2ego[0, :3, 3], [0, 0, 1.5], atol=1e-5)           # the first camera is the reference
    with pytest.raises(FileNotFoundError, match='lidar=False'): data.lidar('k1')
    assert 'points' not in SampleDataset(data, ['k1'], lidar=False)[0]
    assert data.missing_files(['k1'], lidar=False) == {} and 'k1' in data.missing_files(['k1'])

def test_missing_camera_row(odd):
    edit(odd, 'sample_data', lambda rows: [r for r in rows if r['token'] != 'eye_right1'])
    data = DrivingData(odd)
    assert data.frame('k1').cams == ('eye_left',)
    with pytest.raises(FileNotFoundError, match='eye_right'): SampleDataset(data, ['k1'])[0]
    assert SampleDataset(data, ['k0', 'k1'], skip_missing=True).tokens == ['k0']
    assert len(SampleDataset(DrivingData(odd, cams=['eye_left']), ['k1'])[0]['imgs']) == 1

def test_sizes_from_headers(odd):
    edit(odd, 'sample_data', lambda rows: [r | dict(height=0, width=0) for r in rows])
    assert DrivingData(odd).frame('k0').img_sizes.tolist() == [[60, 90], [48, 64]]

def test_splits(odd):
    data = DrivingData(odd)
    assert data.splits() == {'all': ['drive']} and data.sample_tokens() == ['k0', 'k1', 'k2'] == data.sample_tokens(scenes=['drive'])
    (odd/'v1.0-odd/splits.json').write_text(json.dumps(dict(train=['drive', 'elsewhere'], val=[])))
    assert data.splits() == {'train': ['drive'], 'all': ['drive']}
    for bad in ('val', 'tset'):
        with pytest.raises(ValueError, match='train'): data.sample_tokens(bad)
    with pytest.raises(ValueError, match='unknown scenes'): data.sample_tokens(scenes=['nowhere'])
    (odd/'v1.0-odd/splits.json').write_text('[1]')
    with pytest.raises(ValueError, match='splits.json'): data.splits()

def test_tracks_and_categories(odd):
    data = DrivingData(odd)
    assert data.tracks(categories='vehicle.car') == {'i0': [('k0', 'a0_0'), ('k1', 'a0_1'), ('k2', 'a0_2')]}
    assert set(data.tracks()) == {'i0', 'i1'} and set(data.tracks(categories='all')) == {'i0', 'i1', 'i2'}
    with pytest.raises(ValueError, match='vehicle.bicycle'): data.tracks(categories='vehicle.car,vehicle.zeppelin')
    assert SampleDataset(data, ['k0'], categories=['animal'])[0]['instance_tokens'] == ['i2']

def test_sample_without_boxes(odd):
    edit(odd, 'sample_annotation', lambda rows: [r | dict(next='') for r in rows if r['sample_token'] == 'k0'])
    data = DrivingData(odd)
    assert data.frame('k1').boxes.shape == (0, 7) and data.frame('k1').velocity.shape == (0, 2)
    it = SampleDataset(data, ['k1'], train=True, bev_aug=BEVAug())[0]
    assert it['boxes'].shape == (0, 7) and it['bev_mask'].sum() == 0 and it['visibility'].shape == (0,)
    assert data.frame('k0').velocity.isnan().all()                    # one observation has no velocity

# --- the tables are the devkit's ---
def same_as_devkit(data):
    "Every row that is kept, every shortcut, every velocity"
    nusc, t = data.nusc, data.tables
    lidar = {r['token'] for r in nusc.sample_data if r['is_key_frame'] or r['sensor_modality'] == 'lidar'}
    for name in ('scene', 'instance', 'category', 'attribute', 'visibility', 'sensor', 'calibrated_sensor', 'sample', 'sample_annotation', 'sample_data', 'ego_pose'):
        rows = getattr(nusc, name)
        if name == 'sample_data': rows = [r for r in rows if r['token'] in lidar]
        if name == 'ego_pose': rows = [r for r in rows if r['token'] in {d['ego_pose_token'] for d in nusc.sample_data if d['token'] in lidar}]
        for r in rows: assert t.get(name, r['token']) == r, name
    for s in nusc.sample:
        anns = t.take('sample_annotation', t.keyframe(s['token'])[2])
        assert [a['token'] for a in anns] == s['anns']
        with np.errstate(all='ignore'): want = [nusc.box_velocity(a['token']) for a in anns]
        if anns: np.testing.assert_array_equal(data._velocity(anns, s['timestamp']), want)

def test_tables_equal_the_devkits(odd, toy_root):
    for root in (odd, toy_root): same_as_devkit(DrivingData(root))

@pytest.mark.parametrize('name', N_REAL)
def test_real_tables_equal_the_devkits(name): same_as_devkit(real(name))

def test_tables_with_unusual_text(odd, toy_root, tmp_path):
    "A brace in a string, an object in a row, other spacing, a missing field: the same rows, with Python's own reader where it must be"
    want = DrivingData(odd).frame('k1')
    def same():
        got = DrivingData(odd).frame('k1')
        for k in ('boxes', 'velocity', 'cam2ego', 'ego2global'): np.testing.assert_array_equal(getattr(got, k), getattr(want, k))
    for table in ('sample_data', 'ego_pose', 'sample_annotation'):
        path = odd/f'v1.0-odd/{table}.json'; rows, plain = json.loads(path.read_text()), path.read_bytes()
        for text in (json.dumps(rows, indent=0), json.dumps(rows, indent=4), json.dumps(rows, separators=(',', ':')), json.dumps(rows).replace('}, {', '} , {'), '\n\n '+json.dumps(rows, indent=2).replace('\n', '\r\n')+' \n'): path.write_text(text); same()
        path.write_text(json.dumps([r | dict(fileformat='}, {"', extra=dict(a=[dict(b=1)])) for r in rows])); same()
        for broken in (plain[:-20], plain[:-1], b'{}', b'[1, 2]', b''):
            path.write_bytes(broken)
            with pytest.raises(ValueError): DrivingData(odd)
        path.write_bytes(plain)
    edit(odd, 'sample_annotation', lambda rows: [{k: v for k, v in r.items() if k != 'num_lidar_pts'} for r in rows])
    assert DrivingData(odd).frame('k1').num_lidar_pts.tolist() == [-1]*3

def test_tables_of_many_blocks(tmp_path):
    "Blocks are cut anywhere, and threads change nothing"
    from bev_reid.tables import COLUMNS, read_table
    rows = [dict(token=f'{i:032x}', timestamp=i, rotation=[1., 0, 0, i/7], translation=[i/3, -i, 1e-9*i]) for i in range(500)]
    (tmp_path/'t.json').write_text(json.dumps(rows, indent=0))
    for block, threads in ((300, 1), (1024, 3), (5001, 2), (1 << 22, 1)): assert read_table(tmp_path/'t.json', COLUMNS['ego_pose'], block=block, threads=threads).to_pylist() == rows

def test_generated_tables_load(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1]/'nbs/_tools/bench'))
    from tables import FULL, make_tables
    n = make_tables(tmp_path/'set', share=1/850)
    assert all(abs(n[k]-v/850) <= 1 for k, v in FULL.items())
    data = DrivingData(tmp_path/'set')
    assert len(data.sample_tokens()) == n['sample'] and len(data.cams) == 6 and sum(map(len, data.tracks(categories='all').values())) == n['sample_annotation']
    assert data.splits().keys() == {'train', 'all'}                   # scene-0001 is one of nuScenes' own
    same_as_devkit(data)

def test_the_devkit_is_asked_for(toy_root, tmp_path):
    "Reading a set does not import the devkit; .nusc does"
    code = "import sys; from bev_reid.data import DrivingData; d = DrivingData(sys.argv[1]); d.frame(d.sample_tokens('train')[0]); d.tracks(); assert 'nuscenes' not in sys.modules; print(type(d.nusc).__mro__[1].__name__, len(d.nusc.sample))"
    r = subprocess.run([sys.executable, '-c', code, str(toy_root)], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.stdout == 'NuScenes 8\n', r.stderr

# --- broken input names the thing ---
def test_no_tables(tmp_path, odd):
    with pytest.raises(FileNotFoundError, match='does not exist'): DrivingData(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match='no tables'): DrivingData(odd/'samples')
    with pytest.raises(ValueError, match='folder above'): DrivingData(odd/'v1.0-odd')
    with pytest.raises(ValueError, match="unknown version 'v1.0-mini'.*v1.0-odd"): DrivingData(odd, 'v1.0-mini')
    shutil.copytree(odd/'v1.0-odd', odd/'v1.0-two')
    with pytest.raises(ValueError, match='v1.0-odd.*v1.0-two'): DrivingData(odd)
    (odd/'v1.0-two/sample_data.json').unlink()
    with pytest.raises(FileNotFoundError, match='sample_data.json'): DrivingData(odd, 'v1.0-two')
    with pytest.raises(ValueError, match='eye_left'): DrivingData(odd, 'v1.0-odd', cams=['CAM_FRONT'])
    with pytest.raises(ValueError, match='has no row'): DrivingData(odd, 'v1.0-odd').frame('k9')

def test_tables_that_do_not_fit(odd):
    edit(odd, 'instance', lambda rows: rows[1:])
    with pytest.raises(ValueError, match='do not fit'): DrivingData(odd)
    (odd/'v1.0-odd/instance.json').write_text('[{"token": ')
    with pytest.raises(ValueError, match='do not fit'): DrivingData(odd)

@pytest.mark.parametrize('table,change,words', [
    ('calibrated_sensor', dict(rotation=[float('nan')]*4), 'cam2ego of eye_left .calibrated_sensor cs_eye_left'),
    ('calibrated_sensor', dict(rotation=[0, 0, 0, 0]), 'cam2ego of eye_left'),
    ('calibrated_sensor', dict(translation=[0, float('inf'), 0]), 'cam2ego of eye_left'),
    ('calibrated_sensor', dict(camera_intrinsic=[[0, 0, 0]]*3), 'intrinsics of eye_left.*not invertible'),
    ('calibrated_sensor', dict(camera_intrinsic=[]), 'intrinsics of eye_left.*3x3'),
    ('ego_pose', dict(translation=[float('nan'), 0, 0]), 'ego pose of eye_left'),
    ('sample_annotation', dict(translation=[float('nan'), 0, 0]), 'annotation a0_0'),
    ('sample_annotation', dict(size=[2, 0, 1]), 'annotation a0_0'),
])
def test_broken_rows(odd, table, change, words):
    edit(odd, table, lambda rows: rows[0].update(change))
    with pytest.raises(ValueError, match=words): DrivingData(odd).frame('k0')

def test_broken_files(odd):
    data, tokens = DrivingData(odd), ['k0', 'k1', 'k2']
    jpg, swp = odd/'samples/eye_left/0.jpg', odd/'samples/spinner/1.pcd.bin'
    jpg.write_bytes(jpg.read_bytes()[:len(jpg.read_bytes())//2])
    swp.write_bytes(swp.read_bytes()[:-7])
    for i, name in ((0, 'eye_left/0.jpg is truncated'), (1, '1.pcd.bin is truncated')):
        with pytest.raises(ValueError, match=name): SampleDataset(data, tokens)[i]
    (odd/'samples/eye_right/2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='eye_right/2.jpg.*skip-missing'): SampleDataset(data, tokens)[2]
    assert set(data.missing_files(tokens)) == {'k0', 'k1', 'k2'} and set(data.missing_files(tokens, lidar=False)) == {'k0', 'k2'}
    assert set(data.missing_files(['k1', 'k2'], sweeps=2)) == {'k1', 'k2'}
    ds = SampleDataset(data, tokens, lidar=False, skip_missing=True)
    assert ds.tokens == ['k1'] and set(ds.skipped) == {'k0', 'k2'} and ds[0]['sample_token'] == 'k1'
    with pytest.raises(ValueError, match='3 given, 3 skipped'): SampleDataset(data, tokens, skip_missing=True)
    swp.write_bytes(b'')
    with pytest.raises(ValueError, match='truncated'): load_points(swp)
    jpg.write_bytes(b'not a picture')
    with pytest.raises(ValueError, match='0.jpg'): load_img(jpg)
    assert 'damaged' in why_broken(jpg) and why_broken(odd/'samples/eye_left/1.jpg') is None

def test_image_of_another_size_than_its_table(odd):
    Image.new('RGB', (30, 20)).save(odd/'samples/eye_left/0.jpg')
    with pytest.raises(ValueError, match='0.jpg.*calibration'): SampleDataset(DrivingData(odd), ['k0'])[0]

# --- real folders ---
@pytest.mark.parametrize('name', N_REAL)
def test_real_folder(name):
    data = real(name)
    tokens = data.sample_tokens()
    assert (len(data.scenes), len(tokens)) == N_REAL[name] and len(data.cams) == 6 and data.cams[1] == 'CAM_FRONT'
    for t in tokens[:3]+tokens[-1:]:
        f = data.frame(t)
        # A box that the front camera shows is ahead, one of the back camera behind.
        size = tuple(f.img_sizes[0].tolist())
        for cam, sign in (('CAM_FRONT', 1), ('CAM_BACK', -1)):
            i = f.cams.index(cam)
            seen = in_image(project(f.boxes[:, :3], f.intrins[i], f.cam2ego[i]), size)
            assert (sign*f.boxes[seen, 0] > 0).all()
        # Back to the global frame: the table's numbers.
        xyz = transform_points(f.boxes[:, :3].double(), f.ego2global)
        want = torch.tensor([data.nusc.get('sample_annotation', a)['translation'] for a in f.ann_tokens]).double()
        assert (xyz-want).abs().max() < 1e-3
        assert f.boxes[:, 3:6].min() > 0 and ((1 <= f.visibility) & (f.visibility <= 4)).all()

def test_real_splits():
    assert real('nuscenes_val_boxes').splits() == {k: ['scene-0103', 'scene-0916'] for k in ('mini_val', 'all')}
    assert real('lyft_scene').splits().keys() == {'all'}
    with pytest.raises(ValueError, match='mini_val'): real('nuscenes_val_boxes').sample_tokens('train')

def test_real_tracks():
    data = real('nuscenes_val_boxes')
    tracks = data.tracks(categories=sorted(data.match_category('vehicle.*')-{'vehicle.bicycle', 'vehicle.motorcycle'}))   # without cycles
    assert (len(tracks), sum(map(len, tracks.values())), sum(len(t) >= 2 for t in tracks.values())) == (121, 2733, 117)
    assert len(data.tracks(categories='all')) == 215
    assert len(real('lyft_scene').tracks()) == 53 and sum(map(len, real('lyft_scene').tracks().values())) == 1011

@pytest.mark.parametrize('name', ['lyft_scene', 'nuscenes_one'])
def test_real_lidar_lies_in_boxes_and_images(name):
    data = real(name)
    f = data.frame(data.sample_tokens()[0])
    points = data.lidar(f.sample_token)
    n = points_in_boxes(points[:, :3], f.boxes).sum(0)
    assert (n-f.num_lidar_pts).abs().sum() < .03*f.num_lidar_pts.sum()                    # the annotators' own counts, up to pitch and roll
    assert (points[:, 3] == 0).all() == (name == 'lyft_scene')                            # Lyft has no intensity
    # Depth edges of the LiDAR show in the image: points of one car fall into the car's wireframe in that camera.
    car = n.argmax()
    inside = points[points_in_boxes(points[:, :3], f.boxes[car:car+1])[:, 0], :3]
    for k, c, s in zip(f.intrins, f.cam2ego, f.img_sizes.tolist()):
        corners = project(box_corners(f.boxes[car]), k, c)
        if not in_image(corners, tuple(s)).all(): continue
        uv, (lo, hi) = project(inside, k, c)[:, :2], (corners[:, :2].amin(0), corners[:, :2].amax(0))
        assert ((uv >= lo-1) & (uv <= hi+1)).all()

def test_real_missing_lidar_is_named_and_skipped():
    data = real('nuscenes_real')
    tokens = data.sample_tokens()
    bad = data.missing_files(tokens)
    assert len(bad) == 2 and all('LIDAR_TOP' in m for v in bad.values() for m in v)
    with pytest.raises(FileNotFoundError, match='LIDAR_TOP.*pcd.bin'): data.lidar(next(iter(bad)))
    assert len(SampleDataset(data, tokens, skip_missing=True)) == 1
    assert len(SampleDataset(data, tokens, skip_missing=True, lidar=False)) == 3

def test_real_batch_of_another_size():
    data = real('lyft_scene')
    ds = SampleDataset(data, data.sample_tokens()[:2], train=True, n_cams=5, bev_aug=BEVAug(), cache=True)
    batch = collate_samples([ds[0], ds[1]])
    assert batch['imgs'].shape == (2, 5, 3, 128, 352) and batch['bev_mask'].shape == (2, 1, 200, 200)
    assert .05 < batch['imgs'].mean() < .95 and len(batch['points']) == 2
    assert torch.equal(ds[0]['imgs'], batch['imgs'][0])                                   # from the cache: the same

# --- the BEV target ---
GRID = BEVGrid(xbound=(-20, 20, .5), ybound=(-10, 30, .25))

def test_bev_target_against_point_in_polygon():
    g = torch.Generator().manual_seed(0)
    r = torch.rand(40, 7, generator=g)
    boxes = torch.cat([r[:, :2]*60-25, r[:, 2:3], 1+4*r[:, 3:6], (r[:, 6:]-.5)*7], -1)
    xy = cells2metres(torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in GRID.nx[:2]), indexing='ij'), -1), GRID)
    p = torch.cat([xy.reshape(-1, 2), torch.zeros(xy.numel()//2, 1)], -1)
    for box in boxes:
        box = box[None].clone()
        box[:, 2] = 0
        got = bev_target(box, GRID).bool().flatten()
        grown, shrunk = points_in_boxes(p, box, margin=.75)[:, 0], points_in_boxes(p, box, margin=-.6)[:, 0]
        assert (got <= grown).all() and (shrunk <= got).all()        # between the box less and more a cell: corners are rounded
    assert torch.equal(bev_target(boxes, GRID), torch.stack([bev_target(b[None], GRID) for b in boxes]).amax(0))   # overlaps stay filled

def test_bev_target_edges():
    box = torch.tensor([[0., 0, 0, 2, 4, 1.5, 0]])
    assert bev_target(torch.zeros(0, 7), GRID).shape == (80, 160) and bev_target(torch.zeros(0, 7), GRID).sum() == 0
    huge = torch.tensor([[0., 0, 0, 500, 500, 1, .3]])
    assert bev_target(huge, GRID).all()                              # all corners outside, all cells inside
    assert bev_target(box+1e5, GRID).sum() == 0
    # LSS rounds (xy-low)/step, half a cell off: on average its target lies half a cell forward and left.
    g = torch.Generator().manual_seed(0)
    many = torch.cat([torch.rand(300, 2, generator=g)*10-5, box[:, 2:].expand(300, 5)], -1)
    def centre(b, mode):
        m = bev_target(b[None], GRID, mode=mode).nonzero().float().mean(0)
        return cells2metres(m, GRID)-b[:2]
    for mode, off in (('center', (0, 0)), ('lss', (.25, .125))):
        np.testing.assert_allclose(torch.stack([centre(b, mode) for b in many]).mean(0), off, atol=.03)
    with pytest.raises(ValueError, match='lss'): bev_target(box, GRID, mode='LSS')

def test_bev_target_axes():
    box = torch.tensor([[10., 20, 0, 2, 4, 1.5, 0]])                 # ahead and to the left: high x index, high y index
    i, j = bev_target(box, GRID).nonzero().float().mean(0).tolist()
    assert abs(i-59.5) < 1 and abs(j-119.5) < 1

# --- image augmentation ---
def blob_img(h, w, spots, sigma):
    v, u = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing='ij')
    return torch.stack([(255*torch.exp(-((u-x)**2+(v-y)**2)/(2*sigma**2))).byte() for x, y in spots])

@pytest.mark.parametrize('size', [(900, 1600), (1024, 1224), (225, 400), (100, 260)])
@pytest.mark.parametrize('pre', [False, True])
def test_matrix_matches_pixels(size, pre):
    "Marked points land where the matrix says, to a tenth of a pixel, for shrinking and growing, also from a shrunk copy"
    cfg, g, n = ImgAug(), torch.Generator().manual_seed(1), 0
    h, w = size
    spots = torch.tensor([[.5, .62], [.4, .7], [.57, .58]])*torch.tensor([w, h])
    img = blob_img(h, w, spots, w/80)
    for k in range(8):
        m = sample_img_aug(cfg, size, generator=g) if k else val_img_aug(cfg, size)
        src = shrink_img(img, max(128/h, 352/w)*1.03) if pre else img
        out = apply_img_aug(src, m, cfg.out_size, size=size)
        assert out.shape == (3, 128, 352) and 0 <= out.min() and out.max() <= 1
        v, u = torch.meshgrid(torch.arange(128.), torch.arange(352.), indexing='ij')
        for c, spot in enumerate(spots):
            want = transform_points(torch.tensor([[*spot, 1.]]), m)[0, :2]
            if not ((want > 24) & (want < torch.tensor([328., 104]))).all(): continue      # the whole blob must be inside
            got = torch.stack([(out[c]*u).sum(), (out[c]*v).sum()])/out[c].sum()
            assert (got-want).abs().max() < .15, (k, c, got, want)
            n += 1
    assert n >= 8

# --- decoding at reduced scale ---
def jpeg(path, img, quality=92, **kw): Image.fromarray(img.permute(1, 2, 0).numpy()).save(path, quality=quality, **kw); return path

def test_only_what_divides_the_sides_is_shrunk():
    assert [jpeg_shrink((900, 1600), s) for s in (.22, .225, .44, .51, 1, .1, .125)] == [4, 4, 2, 1, 1, 4, 4]       # 900 is no multiple of 8
    assert [jpeg_shrink(size, .1) for size in ((1024, 1224), (225, 400), (226, 400), (896, 1600))] == [8, 1, 2, 8]

@pytest.mark.parametrize('k', [2, 4, 8])
def test_shrunk_while_decoded_stays_in_place(k, tmp_path):
    "Blobs lie where the matrix sends them, as from the whole image: the intrinsics stay right"
    size, g, n = (960, 1600), torch.Generator().manual_seed(k), 0
    h, w = size
    spots = torch.tensor([[.5, .62], [.4, .7], [.57, .58]])*torch.tensor([w, h])
    path = jpeg(tmp_path/'blobs.jpg', blob_img(h, w, spots, w/60), subsampling=0)
    cfg = ImgAug(out_size=(int(960/k*.62), int(1600/k*.98)))
    src = load_img(path, scale=1/k, size=size)
    assert src.shape == (3, h//k, w//k)
    u, v = torch.arange(float(cfg.out_size[1])), torch.arange(float(cfg.out_size[0]))[:, None]
    for i in range(4):
        m = sample_img_aug(cfg, size, generator=g) if i else val_img_aug(cfg, size)
        a, b = (apply_img_aug(x, m, cfg.out_size, size=size) for x in (src, load_img(path)))
        for c, spot in enumerate(spots):
            want = transform_points(torch.tensor([[*spot, 1.]]), m)[0, :2]
            if not ((want > 30) & (want < torch.tensor([cfg.out_size[1]-30., cfg.out_size[0]-30]))).all(): continue
            x, y = (p[c]*(p[c] > .05) for p in (a, b))                                       # without the rings of the JPEG
            at, whole = (torch.stack([(p*u).sum(), (p*v).sum()])/p.sum() for p in (x, y))
            assert (at-want).abs().max() < .15 and (at-whole).abs().max() < .05, (k, c, at, whole, want)
            n += 1
    assert n >= 4

def test_shrunk_while_decoded_shows_the_same(tmp_path):
    "The tolerance: on camera pictures a grey level or so on average at a quarter of the size, half of one at half"
    files = [p for t in real('nuscenes_real').sample_tokens() for p in real('nuscenes_real').frame(t).img_paths]
    for scale, k, most in ((.22, 4, 1.6), (.44, 2, .8)):
        whole, fast = [torch.stack([shrink_img(load_img(p, **kw), scale*f) for p in files]).float() for kw, f in (({}, 1), (dict(scale=scale), k))]
        assert whole.shape == fast.shape and (whole-fast).abs().mean() < most and (whole-fast).mean().abs() < .05
        assert 10*torch.log10(255**2/(whole-fast).square().mean()) > 38                       # dB

def test_whole_jpegs_decode_as_pil_does(tmp_path):
    "Also those that OpenCV would turn, or that are grey or CMYK; and the bytes after the end mark do no harm"
    img = torch.randint(0, 255, (3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    img = torch.nn.functional.interpolate(img[None].float(), (80, 96), mode='bilinear')[0].byte()
    exif = Image.Exif(); exif[0x0112] = 6
    ways = dict(plain=Image.fromarray(img.permute(1, 2, 0).numpy())); ways |= dict(grey=ways['plain'].convert('L'), cmyk=ways['plain'].convert('CMYK'))
    for name, im in ways.items(): im.save(tmp_path/f'{name}.jpg', quality=90, **(dict(exif=exif) if name == 'plain' else {}))
    (tmp_path/'tail.jpg').write_bytes((tmp_path/'plain.jpg').read_bytes()+b'x'*30)
    ways['plain'].save(tmp_path/'same.png')
    for p in tmp_path.iterdir():
        want = torch.from_numpy(np.array(Image.open(p).convert('RGB'))).permute(2, 0, 1)
        assert (load_img(p).int()-want.int()).abs().max() <= 2, p
        assert load_img(p, scale=.5, size=(80, 96)).shape[1:] == ((40, 48) if p.stem in ('plain', 'tail') else (80, 96))

def test_samples_see_the_reduced_image(tmp_path):
    "In training and evaluation, with and without the cache"
    root = write_set(tmp_path/'odd')
    for p in root.glob('samples/eye_*/*.jpg'):
        small = load_img(p)
        jpeg(p, torch.nn.functional.interpolate(small[None].float(), scale_factor=4, mode='bicubic', antialias=True)[0].clamp(0, 255).byte())
    edit(root, 'sample_data', lambda rows: [r | dict(height=4*r['height'], width=4*r['width']) for r in rows])
    edit(root, 'calibrated_sensor', lambda rows: [r | dict(camera_intrinsic=[[4*v for v in k] for k in r['camera_intrinsic'][:2]]+r['camera_intrinsic'][2:]) for r in rows])
    data = DrivingData(root)
    for train in (False, True):
        kw = dict(img_aug=ImgAug(out_size=(24, 44)), train=train)
        a, b = (SampleDataset(data, ['k0', 'k1'], cache=c, **kw)[1] for c in (False, True))
        assert torch.equal(a['imgs'], b['imgs']) and torch.equal(a['intrins'], data.frame('k1').intrins)
        for img, m, p, size in zip(a['imgs'], a['img_aug'], data.frame('k1').img_paths, data.frame('k1').img_sizes.tolist()):
            assert (img-apply_img_aug(load_img(p), m, (24, 44), size=size)).abs().mean() < .06                        # of noise, the worst case

def test_flip_is_exact():
    img = (torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))*255).byte()
    flip = img_aug_matrix((20, 30), scale=1., flip=True)
    assert torch.equal(apply_img_aug(img, flip, (20, 30)), img.flip(-1).float()/255)
    assert torch.equal(apply_img_aug(img, torch.eye(4), (20, 30)), img.float()/255)
    crop = img_aug_matrix((10, 12), scale=1., crop=(5, 3))
    assert torch.equal(apply_img_aug(img, crop, (10, 12)), img[:, 3:13, 5:17].float()/255)
    sq = img[:, :, :20]
    turn = img_aug_matrix((20, 20), scale=1., rotate=90.)
    np.testing.assert_allclose(apply_img_aug(sq, turn, (20, 20)), sq.rot90(1, (1, 2)).float()/255, atol=.02)      # counter-clockwise as seen

def test_defaults_are_those_of_lss():
    m = val_img_aug(ImgAug(), (900, 1600))
    assert abs(m[0, 0]-.22) < 1e-6 and abs(m[1, 3]+(.89*198-128)-(.11-.5)) < 1e-4 and abs(m[0, 3]-(.11-.5)) < 1e-4
    g, s = torch.Generator().manual_seed(0), []
    for _ in range(300):
        m = sample_img_aug(ImgAug(), (900, 1600), generator=g)
        s.append((m[:2, :2].det().abs().sqrt().item(), m[:2, :2].det().item() < 0))
    scale, flips = np.array(s).T
    assert .193 <= scale.min()+1e-6 and scale.max() <= .225+1e-6 and .4 < flips.mean() < .6
    assert scale.min() < .195 and scale.max() > .223

def test_aug_is_invertible_through_projection():
    k, c = torch.tensor([[50., 0, 45], [0, 50, 30], [0, 0, 1]]), torch.eye(4)
    m = sample_img_aug(ImgAug(out_size=(40, 80)), (60, 90), generator=torch.Generator().manual_seed(2))
    p = torch.tensor([[1., .5, 8], [-2, .1, 20]])
    np.testing.assert_allclose(unproject(project(p, k, c, m), k, c, m), p, atol=1e-4)

def test_bad_config():
    for bad in (dict(out_size=(0, 5)), dict(resize=(.5, .2)), dict(crop_bottom=(0, 1.2))):
        with pytest.raises(ValueError, match=next(iter(bad))): ImgAug(**bad)

# --- BEV augmentation ---
def test_bev_aug_moves_boxes_and_world_alike():
    g = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.randn(5, 3, generator=g)*10, 1+torch.rand(5, 3, generator=g), torch.randn(5, 1, generator=g)], -1)
    dets = set()
    for _ in range(20):
        m = sample_bev_aug(BEVAug(), generator=g)
        dets.add(m[:2, :2].det().sign().item())
        assert .95-1e-5 <= m[2, 2] <= 1.05+1e-5
        got, want = box_corners(apply_bev_aug(boxes, m)), transform_points(box_corners(boxes), m)
        if m[:2, :2].det() < 0: want = want[:, [1, 0, 3, 2, 5, 4, 7, 6]]      # a mirror swaps left and right
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert dets == {-1, 1}
    assert torch.equal(sample_bev_aug(BEVAug(rotate=(0, 0), scale=(1, 1), flip_x=False, flip_y=False)), torch.eye(4))

def test_target_follows_bev_aug(odd):
    ds = SampleDataset(DrivingData(odd), ['k1'], train=True, bev_aug=BEVAug(rotate=(0, 0), scale=(1, 1), flip_x=True, flip_y=False))
    plain = SampleDataset(DrivingData(odd), ['k1'])[0]
    for epoch in range(6):
        ds.set_epoch(epoch)
        it = ds[0]
        want = plain['bev_mask'] if it['bev_aug'][0, 0] > 0 else plain['bev_mask'].flip(1)
        assert (it['bev_mask'] != want).float().mean() < 2e-3                  # a row at most: corners on a border round to even
        assert torch.equal(it['points'], plain['points'])                      # points stay in the ego frame

# --- the dataset ---
def test_draws_depend_on_seed_epoch_and_index_only(odd):
    data, tokens = DrivingData(odd), ['k0', 'k1', 'k2']
    def run(workers, epoch=0, seed=0, **kw):
        ds = SampleDataset(data, tokens, img_aug=ImgAug(out_size=(32, 64)), train=True, bev_aug=BEVAug(), n_cams=1, seed=seed, **kw)
        ds.set_epoch(epoch)
        return next(iter(torch.utils.data.DataLoader(ds, 3, num_workers=workers, collate_fn=collate_samples)))
    a = run(0)
    for b in (run(0), run(2), run(0, cache=True)):
        for k in ('imgs', 'img_aug', 'bev_aug', 'bev_mask'): assert torch.equal(a[k], b[k]), k
    assert not torch.equal(a['img_aug'], run(0, epoch=1)['img_aug']) and not torch.equal(a['img_aug'], run(0, seed=1)['img_aug'])
    assert not torch.equal(a['img_aug'][0], a['img_aug'][1])
    assert a['imgs'].shape == (3, 1, 3, 32, 64)

def test_living_workers_see_a_new_epoch(odd):
    ds = SampleDataset(DrivingData(odd), ['k0', 'k1'], img_aug=ImgAug(out_size=(32, 64)), train=True)
    dl = torch.utils.data.DataLoader(ds, 2, num_workers=1, persistent_workers=True, collate_fn=collate_samples)
    first = next(iter(dl))['img_aug']
    ds.set_epoch(1)
    assert not torch.equal(first, next(iter(dl))['img_aug'])

def test_evaluation_is_fixed_and_whole(odd):
    ds = SampleDataset(DrivingData(odd), ['k1'], bev_aug=BEVAug(), n_cams=1)   # train=False: all cameras, nothing drawn
    it = ds[0]
    ds.set_epoch(3)
    assert torch.equal(it['imgs'], ds[0]['imgs']) and len(it['imgs']) == 2 and torch.equal(it['bev_aug'], torch.eye(4))
    assert it['bev_mask'].shape == (1, 200, 200) and it['boxes'].shape == (2, 7) and it['instance_tokens'] == ['i0', 'i1']
    assert len(pickle.loads(pickle.dumps(ds))) == 1                            # workers may be spawned
    with pytest.raises(ValueError, match='n_cams'): SampleDataset(ds.data, ['k1'], n_cams=9)
    with pytest.raises(ValueError, match='no samples'): SampleDataset(ds.data, [])

def test_normalize():
    x = torch.tensor(IMAGENET_MEAN)[:, None, None].expand(2, 3, 4, 4)
    assert normalize_img(x).abs().max() == 0
    np.testing.assert_allclose(normalize_img(x+torch.tensor(IMAGENET_STD)[:, None, None]), 1, rtol=1e-5)

# --- the toy world ---
def test_toy(toy_root):
    data = DrivingData(toy_root)
    assert {'train', 'test', 'all'} <= set(data.splits()) and not set(data.splits()['train']) & set(data.splits()['test'])
    tokens = data.sample_tokens('all')
    assert data.missing_files(tokens[:4]) == {} and len(data.cams) == 6
    it = SampleDataset(data, tokens[:1], img_aug=ImgAug(out_size=(64, 128)))[0]
    assert it['imgs'].shape == (6, 3, 64, 128) and len(it['points'])


@pytest.mark.parametrize('version,want', [('v1.0-trainval', ('train', 'val')), ('v1.0-mini', ('mini_train', 'mini_val'))])
def test_official_splits_follow_the_version(version, want, tmp_path):
    "scene-0553 and scene-0796 are in mini_train and in val: the version decides which split is meant"
    data = DrivingData.__new__(DrivingData)
    data.version, data.dataroot, data.scenes = version, tmp_path, ['scene-0061', 'scene-0553', 'scene-0796', 'scene-0103']
    assert tuple(k for k in data.splits() if k != 'all') == want
    both = data.splits()[want[0]], data.splits()[want[1]]
    assert not set(both[0]) & set(both[1])
