"The toy world: does what its tables say agree with what its sensors see?"
import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from bev_reid.geometry import points_in_boxes
from bev_reid.toy import CAMS, VERSION, ToyConfig, identity_of, make_actor, make_scene, make_toy, poses_at, rects_touch, split_names, toy_truth
from bev_reid.toy import _rects

pytest.importorskip('embreex')
SMALL = dict(n_scenes=2, n_samples=2, img_size=(48, 80), n_azimuth=180, density=.5, seed=3)


@pytest.fixture(scope='module')
def nusc(toy_root):
    from nuscenes import NuScenes
    return NuScenes(VERSION, str(toy_root), verbose=False)


def rot(q):
    from pyquaternion import Quaternion
    return Quaternion(q).rotation_matrix


def lidar_global(nusc, sample):
    "Points of a keyframe in the global frame, and in the ego frame"
    sd = nusc.get('sample_data', sample['data']['LIDAR_TOP'])
    cs, ep = nusc.get('calibrated_sensor', sd['calibrated_sensor_token']), nusc.get('ego_pose', sd['ego_pose_token'])
    p = np.fromfile(f"{nusc.dataroot}/{sd['filename']}", np.float32).reshape(-1, 5)
    assert set(np.unique(p[:, 4])) <= set(range(32)) and p[:, 3].min() >= 0 and p[:, 3].max() <= 255
    ego = p[:, :3].astype(float) @ rot(cs['rotation']).T+cs['translation']
    return ego @ rot(ep['rotation']).T+ep['translation'], ego


def inside(nusc, ann, points, margin=.04):
    "Points in the box of an annotation; the road under the wheels is left out"
    w, l, h = ann['size']
    x, y, z = ((points-ann['translation']) @ rot(ann['rotation'])).T
    return (abs(x) <= l/2+margin) & (abs(y) <= w/2+margin) & (z <= h/2+margin) & (z > -h/2+.03)


def test_loads(nusc, toy_root):
    assert len(nusc.scene) == 2 and len(nusc.sample) == 8 and len(nusc.sample_data) == 8*7
    assert all(n.startswith('Day') for n in (s['description'] for s in nusc.scene))
    assert {c['name'] for c in nusc.category} >= {'vehicle.car', 'vehicle.truck', 'vehicle.bus.rigid', 'vehicle.bicycle', 'human.pedestrian.adult'}
    for sd in nusc.sample_data: assert (toy_root/sd['filename']).stat().st_size > 500
    assert not (toy_root/'scenes').exists() and not (toy_root/'config.json').exists()
    for t in ('category', 'attribute', 'visibility', 'sensor', 'calibrated_sensor', 'ego_pose', 'log', 'scene', 'sample', 'sample_data', 'instance', 'sample_annotation', 'map'):
        toks = [r['token'] for r in getattr(nusc, t)]
        assert toks and len(set(toks)) == len(toks), t


def test_devkit_renders(nusc, tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    s = nusc.sample[0]
    nusc.render_sample_data(s['data']['CAM_FRONT'], out_path=str(tmp_path/'cam.png'), verbose=False)
    nusc.render_sample_data(s['data']['LIDAR_TOP'], out_path=str(tmp_path/'lidar.png'), underlay_map=False, verbose=False)
    nusc.render_annotation(nusc.get_sample_data(s['data']['CAM_FRONT'])[1][0].token, out_path=str(tmp_path/'ann.png'))
    plt.close('all')
    assert len(list(tmp_path.glob('*.png'))) == 3


def test_chains(nusc):
    for inst in nusc.instance:
        a, n, times = nusc.get('sample_annotation', inst['first_annotation_token']), 0, []
        assert a['prev'] == ''
        while True:
            n += 1
            times.append(nusc.get('sample', a['sample_token'])['timestamp'])
            assert a['instance_token'] == inst['token']
            if not a['next']: break
            nxt = nusc.get('sample_annotation', a['next'])
            assert nxt['prev'] == a['token']
            a = nxt
        assert n == inst['nbr_annotations'] and a['token'] == inst['last_annotation_token'] and times == sorted(times)
    for sc in nusc.scene:
        for ch in (*CAMS, 'LIDAR_TOP'):
            sd, n = nusc.get('sample_data', nusc.get('sample', sc['first_sample_token'])['data'][ch]), 1
            while sd['next']:
                nxt = nusc.get('sample_data', sd['next'])
                assert nxt['prev'] == sd['token'] and nxt['timestamp']-sd['timestamp'] == 500_000
                sd, n = nxt, n+1
            assert n == sc['nbr_samples']


def test_point_counts(nusc):
    "num_lidar_pts is what the LiDAR hit; the box says the same up to range noise at its faces"
    said = found = diff = 0
    for s in nusc.sample:
        p, _ = lidar_global(nusc, s)
        for a in s['anns']:
            a = nusc.get('sample_annotation', a)
            n = inside(nusc, a, p).sum()
            said, found, diff = said+a['num_lidar_pts'], found+n, diff+abs(n-a['num_lidar_pts'])
    assert said > 10_000 and diff/said < .01


def test_boxes_of_the_package_agree(nusc):
    from pyquaternion import Quaternion
    s = nusc.sample[0]
    anns = [nusc.get('sample_annotation', a) for a in s['anns']]
    boxes = torch.tensor([[*a['translation'], *a['size'], Quaternion(a['rotation']).yaw_pitch_roll[0]] for a in anns])
    p, _ = lidar_global(nusc, s)
    n = points_in_boxes(torch.as_tensor(p[p[:, 2] > .03]), boxes.double(), margin=.04).sum(0)
    assert (n-torch.tensor([a['num_lidar_pts'] for a in anns])).abs().float().mean() < 2


def test_lidar_and_cameras_agree(nusc, toy_root):
    "A LiDAR point on X that no nearer surface hides falls on a pixel of X, at X's depth"
    hit = total = 0
    gaps = []
    for s in nusc.sample[::2]:
        truth = toy_truth(toy_root, s['token'])
        p, ego = lidar_global(nusc, s)
        own = np.full(len(p), -1)
        for a in s['anns']:
            a = nusc.get('sample_annotation', a)
            own[inside(nusc, a, p)] = truth['instances'].index(a['instance_token'])
        for ch in CAMS:
            cs = nusc.get('calibrated_sensor', nusc.get('sample_data', s['data'][ch])['calibrated_sensor_token'])
            cam = (ego-cs['translation']) @ rot(cs['rotation'])
            ids, z = truth[ch]
            uv = cam @ np.array(cs['camera_intrinsic']).T
            u, v = np.round(uv[:, :2]/np.maximum(uv[:, 2:], 1e-6)).T
            ok = (cam[:, 2] > .3) & (u >= 1) & (u < ids.shape[1]-1) & (v >= 1) & (v < ids.shape[0]-1) & (own >= 0)
            u, v, d, o = u[ok].astype(int), v[ok].astype(int), cam[ok, 2], own[ok]
            near = [(ids[v+j, u+i] == o, abs(z[v+j, u+i]-d)) for i in (-1, 0, 1) for j in (-1, 0, 1)]   # within a pixel: LiDAR points lie between pixel centres
            free = z[v, u] > d-.5
            same = np.any([m for m, _ in near], 0)
            hit, total = hit+(same & free).sum(), total+free.sum()
            exact = (ids[v, u] == o) & free
            gaps.append(np.min([np.where(m, g, np.inf) for m, g in near], 0)[exact])
    gaps = np.concatenate(gaps)
    assert total > 5_000 and hit/total >= .99
    assert np.median(gaps) < .02 and np.quantile(gaps, .9) < .08


def test_velocity_and_attributes(nusc):
    "The devkit's velocity is the difference of positions, and attributes follow it"
    moving = 0
    for a in nusc.sample_annotation:
        v = nusc.box_velocity(a['token'])[:2]
        name = [nusc.get('attribute', t)['name'] for t in a['attribute_tokens']]
        assert len(name) == 1
        if not a['prev'] or not a['next'] or np.isnan(v).any(): continue
        x, y = (np.array(nusc.get('sample_annotation', a[k])['translation'][:2]) for k in ('prev', 'next'))
        assert np.allclose(v, (y-x)/((nusc.get('sample', nusc.get('sample_annotation', a['next'])['sample_token'])['timestamp']-nusc.get('sample', nusc.get('sample_annotation', a['prev'])['sample_token'])['timestamp'])*1e-6), atol=1e-6)
        if name[0] in ('vehicle.parked', 'vehicle.stopped', 'pedestrian.standing'): assert np.hypot(*v) < .25
        if name[0] == 'vehicle.moving':
            moving += 1
            assert np.hypot(*v) > .1
            if np.hypot(*v) > 3 and name[0] == 'vehicle.moving':    # along its heading
                r = rot(a['rotation'])[:2, 0]
                assert v @ r/np.hypot(*v) > .9
    assert moving > 5


def test_visibility(nusc, toy_root):
    "Levels follow from pixels: what hides nothing has level 4, and hidden objects show fewer pixels"
    s = nusc.sample[1]
    truth = toy_truth(toy_root, s['token'])
    shown = defaultdict(list)
    for a in s['anns']:
        a = nusc.get('sample_annotation', a)
        i = truth['instances'].index(a['instance_token'])
        px = sum((truth[ch][0] == i).sum() for ch in CAMS)
        assert px or a['num_lidar_pts']
        shown[a['visibility_token']].append(px)
        if not px: assert a['visibility_token'] == '1'
    assert {'1', '4'} <= set(shown) and np.mean(shown['4']) > np.mean(shown['1'])


@pytest.mark.parametrize('index', range(4))
def test_no_overlaps(index):
    "No two road users share ground at any keyframe, and none stands where the ego is"
    sc = make_scene(ToyConfig(), index)
    near = 0
    for step in range(len(sc.times)):
        rects = np.stack([_rects(p, a.size) for p, a in zip(sc.poses[step], sc.actors)])
        i, j = np.triu_indices(len(rects), 1)
        assert not rects_touch(rects[i], rects[j]).any()
        e = sc.ego[step]+[1.35*np.cos(sc.ego[step, 2]), 1.35*np.sin(sc.ego[step, 2]), 0]
        assert not rects_touch(np.broadcast_to(_rects(e, (1.8, 4.2)), rects.shape), rects).any()
    d = np.hypot(*(sc.poses[..., :2]-sc.ego[:, None, :2]).transpose(2, 0, 1)).min(0)
    near = sum(x < 30 and a.category.startswith('vehicle') for x, a in zip(d, sc.actors))
    assert 18 <= near <= 48


def test_splits_share_no_identity():
    cfg = ToyConfig(returns=.5)
    ids = {k: {identity_of(cfg, s, slot) for s in v for slot in range(60)} for k, v in split_names(10).items()}
    assert not (ids['train'] & ids['val'] or ids['train'] & ids['test'] or ids['val'] & ids['test'])
    assert len(ids['test']) < 120                          # somebody came back
    for n in range(2, 12): assert split_names(n)['test'] and sum(map(len, split_names(n).values())) == n


def test_side_tables(nusc, toy_root):
    splits, ident = (json.loads((toy_root/VERSION/f'{k}.json').read_text()) for k in ('splits', 'identity'))
    assert splits == {'train': ['scene-0001'], 'val': [], 'test': ['scene-0002']}
    assert set(ident) == {i['token'] for i in nusc.instance}


def test_an_identity_looks_the_same_everywhere():
    make_actor.cache_clear()
    a = make_actor(0, 17)
    make_actor.cache_clear()
    b, c = make_actor(0, 17), make_actor(0, 18)
    assert a is not b and a.size == b.size and np.array_equal(a.tris, b.tris) and np.array_equal(a.rgb, b.rgb)
    assert a.size != c.size
    lo, hi = a.tris.reshape(-1, 3).min(0), a.tris.reshape(-1, 3).max(0)
    assert np.allclose([hi[1]-lo[1], hi[0]-lo[0], hi[2]-lo[2]], a.size, atol=2e-3) and np.allclose(lo[2], 0, atol=1e-5)


def digest(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def test_deterministic_and_resumable(tmp_path):
    a = digest(make_toy(tmp_path/'a', **SMALL, workers=1, conditions=('day', 'night')))
    part = tmp_path/'b.part'
    from bev_reid.toy import _stored, write_scene
    cfg = ToyConfig(**SMALL, conditions=('day', 'night'))
    write_scene(cfg, part, 1)                              # a run that was killed after one scene
    (part/'config.json').write_text(json.dumps(_stored(cfg)))
    before = (part/'scenes'/'0001.json').stat().st_mtime_ns
    assert before
    b = digest(make_toy(tmp_path/'b', cfg, workers=2))
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a)
    assert not part.exists()
    c = digest(make_toy(tmp_path/'c', **{**SMALL, 'seed': 4}, conditions=('day', 'night'), workers=1))
    assert a.keys() != c.keys() or any(a[k] != c[k] for k in a)


def test_conditions_and_sweeps(tmp_path):
    from nuscenes import NuScenes
    from PIL import Image
    root = make_toy(tmp_path/'w', **{**SMALL, 'n_scenes': 3}, sweeps=1, conditions=('day', 'night', 'rain'), workers=2)
    nusc = NuScenes(VERSION, str(root), verbose=False)
    assert [s['description'].split(',')[0] for s in nusc.scene] == ['Day', 'Night', 'Rain']
    mean, std = {}, {}
    for s in nusc.scene:
        imgs = [np.asarray(Image.open(root/nusc.get('sample_data', nusc.get('sample', s['first_sample_token'])['data'][c])['filename'])) for c in CAMS]
        mean[s['description'][:3]], std[s['description'][:3]] = np.mean(imgs), np.std(imgs)
    assert mean['Nig'] < .6*mean['Day'] and std['Rai'] < std['Day']
    lidar = [d for d in nusc.sample_data if d['sensor_modality'] == 'lidar']
    assert sum(d['is_key_frame'] for d in lidar) == 6 and sum(not d['is_key_frame'] for d in lidar) == 3
    d = next(d for d in lidar if not d['is_key_frame'])
    assert nusc.get('sample_data', d['prev'])['is_key_frame'] and nusc.get('sample_data', d['next'])['timestamp']-d['timestamp'] == 250_000


def test_bad_input(tmp_path, toy_root):
    for bad, word in ((dict(colour=3), 'colour'), (dict(conditions=('snow',)), 'snow'), (dict(n_scenes=0), 'n_scenes'), (dict(n_samples=2.5), 'n_samples'), (dict(img_size=(3, 3)), 'img_size'), (dict(returns=2), 'returns')):
        with pytest.raises(ValueError, match=word): make_toy(tmp_path/'x', **bad)
    with pytest.raises(ValueError, match='other settings: .*seed'): make_toy(toy_root, n_scenes=2, n_samples=4, img_size=(112, 200), seed=1)
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'mine.txt').write_text('keep')
    with pytest.raises(ValueError, match='no toy world'): make_toy(tmp_path/'full')
    assert (tmp_path/'full'/'mine.txt').exists() and not (tmp_path/'x').exists() and not list(tmp_path.glob('*.part'))
    assert make_toy(toy_root, n_scenes=2, n_samples=4, img_size=(112, 200)) == toy_root      # the same again costs nothing
