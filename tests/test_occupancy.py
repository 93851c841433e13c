"Occupancy: compiled kernels against NumPy twins, the road from sweeps to labels, files, shapes, scores, verbs"
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bev_reid.cli_occupancy as cli
from bev_reid.data import DrivingData, ImgAug
from bev_reid.occ_files import OccFolder, read_labels, write_labels
from bev_reid.occ_kernels import FREE, OccGrid, PointMap, _C, assign_points, confusion, trace_rays, vote, voxel_index
from bev_reid.occ_scene import OccConfig, SceneMap, Track, box_pose, boxes_at, category_class, open_scene, read_splits, split_sweep, to_box_frame
from bev_reid.occ_score import OccScore, scores
from bev_reid.occ_shapes import ShapeBank, ShapeConfig, check_no_leak, shape_ranking, shared_sweeps
from bev_reid.occupancy import camera_rays, create_occupancy, label_scene

needs_C = pytest.mark.skipif(_C is None, reason='no compiled extension')
rng = np.random.default_rng(0)
CFG = OccConfig(grid=OccGrid.preset('toy'), ground=True, lidar_mask=1, camera_mask=8)

def twins(f):
    a, b = f('cpp'), f('numpy')
    for x, y in zip(a, b): np.testing.assert_array_equal(x, y); assert x.dtype == y.dtype
    return a

# -- kernels
@needs_C
@pytest.mark.parametrize('n', [0, 1, 5000])
@pytest.mark.parametrize('k', [0, 1, 40])
def test_assign_twins(n, k):
    p = rng.uniform(-20, 20, (n, 3)).astype(np.float32)*[1, 1, .1]
    b = np.concatenate([rng.uniform(-20, 20, (k, 2)), rng.uniform(-1, 1, (k, 1)), rng.uniform(.3, 6, (k, 3)), rng.uniform(-4, 4, (k, 1))], 1)
    if k and n: p[:min(k, n)] = b[:min(k, n), :3]                                   # centres, and points on faces
    if k and n > k: b[0, 6] = 0; p[-1] = b[0, :3]+[b[0, 4]/2, 0, 0]
    owner, = twins(lambda s: (assign_points(p, b, margin=.05, clearance=.1, backend=s),))
    for i in np.nonzero(owner >= 0)[0][:200]:
        local = np.abs(to_box_frame(p[i:i+1], b[owner[i]])[0]); w, l, h = b[owner[i], 3:6]/2+.05
        assert (local <= [l+1e-4, w+1e-4, h+1e-4]).all()

@needs_C
def test_map_twins_whatever_the_parts():
    p, l = rng.normal(0, 3, (4000, 3)).astype(np.float32), rng.choice([4, 11, 13, 255], 4000).astype(np.uint8)
    p[:9] = np.float32([[.5, 0, 0], [-.5, 0, 0], [0, 0, 0]]*3)                       # on the borders of cells
    def run(backend, cuts):
        m = PointMap(.5, backend=backend)
        for a in np.split(np.arange(4000), cuts): m.add(p[a], l[a])
        return m.result()
    twins(lambda s: run(s, [1, 2, 2000])); twins(lambda s: run('cpp', [1000] if s == 'cpp' else [17, 900]))
    pts, counts, labels = run('cpp', [])
    assert counts.sum() == 4000 and len(np.unique(np.floor(pts/.5), axis=0)) >= .99*len(pts)

@needs_C
@pytest.mark.parametrize('voxel', [.5, .1])
def test_vote_twins(voxel):
    grid = OccGrid(low=(-4, -3, -1), high=(4, 3, 2), voxel=voxel)                    # few voxels: counted; many: sorted
    parts = []
    for i in range(4):
        m = np.eye(4); a = rng.uniform(-3, 3); m[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]; m[:3, 3] = rng.normal(size=3)
        parts.append((rng.normal(0, 2, (300*(i != 2), 3)).astype(np.float32), rng.choice([4, 10, 11], 300*(i != 2)).astype(np.uint8), [0, 7, 7, 65535][i], m))
    sem, ins = twins(lambda s: vote(parts, grid, backend=s))
    at = [voxel_index(np.asarray(p, np.float64) @ m[:3, :3].T+m[:3, 3], grid) for p, _, _, m in parts]
    for v in rng.permutation(np.unique(np.concatenate(at)))[:300]:
        if v < 0: continue
        c = np.concatenate([l[a == v] for (_, l, _, _), a in zip(parts, at)])
        assert sem.ravel()[v] in c and (c == sem.ravel()[v]).sum() == np.bincount(c).max()      # never a label that nobody gave
    assert sem[ins > 0].min() < FREE and (sem.ravel()[np.setdiff1d(np.arange(grid.size), np.concatenate(at))] == FREE).all()

@needs_C
def test_trace_twins_and_walls():
    grid = OccGrid(low=(-5, -4, -1), high=(5, 4, 2), voxel=.5)
    ends = rng.uniform(-9, 9, (500, 3)).astype(np.float32)
    ends[:5] = [[0, 0, 0], [9, 0, 0], [0, -9, 0], [np.nan, 0, 0], [4.999, 0, 0]]
    rays = [((0, 0, 0), ends), ((-7, .25, .25), ends), ((8, 8, 8), ends[:0]), ((2.5, .5, .5), np.float32([[2.5, .5, .5]]))]
    wall = rng.random(grid.nx) < .1
    for solid in (None, wall): twins(lambda s: (trace_rays(rays, grid, solid=solid, backend=s),))
    line = trace_rays([((-7, .25, .25), np.float32([[9, .25, .25]]))], grid)
    assert line.sum() == grid.nx[0] and line[:, 8, 2].all()
    stop = np.zeros(grid.nx, bool); stop[6, 8, 2] = True
    assert np.argwhere(trace_rays([((-7, .25, .25), np.float32([[9, .25, .25]]))], grid, solid=stop))[:, 0].tolist() == list(range(7))

@needs_C
def test_confusion_twins_and_large_counts():
    p, t, m = rng.integers(0, 18, (3, 20, 20, 7)).astype(np.uint8)
    for mask in (None, m > 9): twins(lambda s: (confusion(p, t, 18, mask=mask, backend=s),))
    with pytest.raises(ValueError, match='18'): confusion(np.uint8([18]), np.uint8([0]), 18)
    score = OccScore(OccGrid(low=(0, 0, 0), high=(2, 2, 2), voxel=1), mask='none')
    score.counts[0, 4, 4] = 2**24
    score.add(np.full((2, 2, 2), 4, np.uint8), dict(semantics=np.full((2, 2, 2), 4, np.uint8))); assert score.counts[0, 4, 4] == 2**24+8

def test_kernels_refuse():
    g = OccGrid(low=(0, 0, 0), high=(2, 2, 2), voxel=1)
    with pytest.raises(ValueError, match='not finite'): assign_points(np.zeros((1, 3)), [[0, 0, 0, 1, np.nan, 1, 0]])
    with pytest.raises(ValueError, match='too far'): PointMap(.1).add([[1e9, 0, 0]])
    with pytest.raises(ValueError, match='shapes differ'): confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 3)
    with pytest.raises(ValueError, match='half a voxel'): OccConfig(map_cell=.3)
    assert vote([], g)[0].min() == FREE and not trace_rays([], g).any()

def test_absent_class_is_not_perfect_and_present_ones_match_the_formula():
    p, t = rng.integers(0, 5, (2, 3000))
    c = confusion(p.astype(np.uint8), t.astype(np.uint8), 5)
    want = [((p == i) & (t == i)).sum()/((p == i) | (t == i)).sum() for i in range(4)]
    assert abs(scores(c)['mIoU']-np.mean(want)) < 1e-12
    c = confusion(np.uint8([0, 4]), np.uint8([0, 4]), 5)
    assert scores(c)['n_classes'] == 1 and np.isnan(scores(c)['iou'][1:4]).all()

# -- boxes in time
def test_no_ghost_after_the_last_annotation():
    "A car that drives on after its last annotation leaves nothing in the world for the time that is held"
    t = np.arange(3)*.5
    track = Track('a', 'vehicle.car', t, np.array([[8*x, 0, 1, 2, 4, 2, 0.] for x in t]))
    for time in (1.2, 1.5):
        box, state = boxes_at(track, [time])
        body = np.float32([[8*time, 0, 1], [8*time+1.8, .9, 1.5]])
        world, _, objects = split_sweep(body, np.full(2, 255, np.uint8), box, state, CFG)
        assert len(world) == 0 and not objects and state[0] == 2
    held = boxes_at(track, [1.5])[0][0, 0]; assert abs(held-12) < 1e-9

def test_rigid_points_come_back_exactly():
    "Points on a turning, driving box, seen at five moments, are the same in its frame"
    shape = rng.uniform(-.9, .9, (200, 3))*[2, 1, .7]
    for t in range(5):
        box = np.array([300.+7*t, 40+t, 1., 2, 4, 2, .4*t])
        world = (shape @ box_pose(box)[:3, :3].T+box_pose(box)[:3, 3]).astype(np.float32)
        np.testing.assert_allclose(split_sweep(world, np.full(200, 255, np.uint8), box[None], np.array([1]))[2][0], shape, atol=1e-4)

# -- the road from sweeps to labels
@pytest.fixture(scope='module')
def made(toy_root, tmp_path_factory):
    out = tmp_path_factory.mktemp('occ')/'labels'
    data = DrivingData(toy_root); create_occupancy(data, out, CFG)
    return data, OccFolder(out)

def tree(root): return {str(p.relative_to(root)): p.read_bytes() if p.suffix != '.npz' else {k: v.tobytes() for k, v in read_labels(p).items()} for p in sorted(Path(root).rglob('*')) if p.is_file()}

def test_backends_ranks_workers_and_kills_give_the_same(made, tmp_path):
    data, folder = made
    want = tree(folder.root)
    for token, labels in ((t, l) for _, t, l in label_scene(data, data.scenes[0], CFG, backend='numpy')):
        for k, v in labels.items(): np.testing.assert_array_equal(folder.labels(token)[k], v)
    for r in (1, 0): create_occupancy(data, tmp_path/'ranks', CFG, rank=r, world=2)
    assert tree(tmp_path/'ranks') == want
    create_occupancy(data, tmp_path/'two', CFG, limit=1); shutil.copytree(tmp_path/'two'/data.scenes[0], tmp_path/'two'/f'{data.scenes[1]}.part')   # a killed run
    shutil.rmtree(tmp_path/'two'/data.scenes[0])
    create_occupancy(data, tmp_path/'two', CFG, workers=2)
    assert tree(tmp_path/'two') == want
    assert set(OccFolder(tmp_path/'two').paths) == set(folder.paths)

def test_static_world_is_one_crop_of_the_scene_map(made):
    "World voxels of two keyframes, moved into the scene, are the same places"
    data, _ = made
    cfg = replace(CFG, lidar_mask=-1, camera_mask=0); scene = open_scene(data, data.scenes[0], cfg)
    world = SceneMap(scene, cfg)
    for _, *part in read_splits(data, scene, cfg): world.add(*part)
    points, cls, _ = world.finish()
    for i, (_, token, out) in enumerate(label_scene(data, data.scenes[0], cfg)):
        ego = scene.sweeps[i].ego; local = points.astype(np.float64) @ ego[:3, :3]-ego[:3, 3] @ ego[:3, :3]
        at = voxel_index(local, cfg.grid); got = np.zeros(cfg.grid.size, bool); got[at[at >= 0]] = True
        alone = (out['instance'] == 0)
        assert (((out['semantics'] != FREE) & alone).ravel() <= got).all() and (got <= (out['semantics'] != FREE).ravel()).all()

def test_window_zero_is_one_sweep(made):
    data, _ = made
    cfg = replace(CFG, window=0, lidar_mask=-1, camera_mask=0)
    scene = open_scene(data, data.scenes[0], cfg); parts = {i: p for i, *p in read_splits(data, scene, cfg)}
    for i, (_, token, out) in enumerate(label_scene(data, data.scenes[0], cfg)):
        p = data.lidar(token)[:, :3].numpy(); seen = np.zeros(cfg.grid.size, bool); at = voxel_index(p, cfg.grid); seen[at[at >= 0]] = True
        own = (out['semantics'] != FREE).ravel()
        assert (own & ~seen).sum() <= .01*own.sum() and own.sum() > 500               # means of cells may cross a border

def test_masks(made):
    data, folder = made
    for token in list(folder.paths)[:3]:
        l = folder.labels(token); full = l['semantics'] != FREE
        assert (l['mask_lidar'] | ~full).all() and .05 < l['mask_lidar'].mean() < .95
        assert l['mask_camera'].any() and not l['mask_camera'].all()
        o, ends = camera_rays(data.frame(token), folder.grid, stride=8)[1]
        assert data.frame(token).cams[1] == 'CAM_FRONT' and (ends[:, 0] > 0).all()   # the front camera looks ahead

def test_boxes_and_instances_are_where_the_tables_say(made):
    data, folder = made
    n = 0
    for token in folder.paths:
        f, l = data.frame(token), folder.labels(token); names = folder.instances(token)
        for box, who, name, pts in zip(f.boxes.numpy(), f.instance_tokens, f.categories, f.num_lidar_pts.tolist()):
            at = np.argwhere(l['instance'] == names.index(who)+1)
            if len(at):                                                              # a voxel of an object touches its box
                far = np.abs(to_box_frame(((at+.5)*.5+folder.grid.low), box)); w, x, h = box[3:6]/2+CFG.margin
                assert (far <= np.array([x, w, h])+.25*np.sqrt(2)+1e-3).all(), (name, far.max(0), box)
                assert (l['semantics'][tuple(at.T)] == category_class(name)).all()
            if pts >= 150 and np.abs(box[:2]).max() < 28: n += 1; assert len(at) >= 4, (name, pts)
    assert n > 20

# -- what can go wrong
def test_missing_sweeps_are_named_and_can_be_skipped(made, tmp_path):
    data, folder = made
    root = tmp_path/'gap'; shutil.copytree(data.dataroot, root)
    gap = DrivingData(root); files = sorted((root/'samples/LIDAR_TOP').iterdir()); bad = files[0]; bad.write_bytes(bad.read_bytes()[:33])
    with pytest.raises(ValueError, match='truncated'): create_occupancy(gap, tmp_path/'o', CFG)
    assert not list((tmp_path/'o').glob('*/scene.json'))
    create_occupancy(gap, tmp_path/'o', CFG, skip_missing=True)
    notes = [json.loads(p.read_text())['missing'] for p in sorted((tmp_path/'o').glob('*/scene.json'))]
    assert sum(map(len, notes)) == 1 and bad.name in sum(notes, [])[0]
    for f in files: f.unlink()
    with pytest.raises(FileNotFoundError, match='none of the'): create_occupancy(DrivingData(root), tmp_path/'p', CFG, skip_missing=True)

def test_real_sample_keyframes_only():
    root = Path(os.environ.get('BEV_REID_DATA', Path(__file__).resolve().parents[1]/'../shared/data'))/'nuscenes_one'
    if not root.exists(): pytest.skip(f'no real data at {root}')
    data = DrivingData(root)
    (_, token, out), = label_scene(data, data.scenes[0], replace(CFG, grid=OccGrid()))
    car = [i for i in range(len(data.frame(token).categories)) if data.frame(token).num_lidar_pts[i] > 100]
    assert len(np.unique(out['instance'])) > 10 and (out['semantics'] == 11).sum() > 1000 and car

# -- the leakage rule
def test_no_sweep_on_both_sides(toy_root):
    data = DrivingData(toy_root); bank = ShapeBank(data, data.scenes[0])
    shapes = bank.sightings(ShapeConfig(window=.4, min_points=3))
    shared = shared_sweeps(shapes, shapes)
    for a in range(0, len(shapes), 3):
        for b in range(len(shapes)): assert shared[a, b] == bool(set(shapes[a].sweeps) & set(shapes[b].sweeps))
    assert shared.diagonal().all()
    with pytest.raises(ValueError, match='share a sweep'): check_no_leak(shapes, shapes, np.eye(len(shapes), dtype=bool))
    junk = shared.copy(); check_no_leak(shapes, shapes, junk)
    i, j = np.argwhere(shared & ~np.eye(len(shapes), dtype=bool))[0]; junk[i, j] = False
    with pytest.raises(ValueError, match='1 pairs'): check_no_leak(shapes, shapes, junk)
    r = shape_ranking(shapes, min_gap=0.)
    for q in range(len(shapes)): assert r.n_allowed[q] == (~shared[q]).sum()
    whole = bank.track(shapes[0].instance_token)
    for pair in (([whole], shapes[:1]), (shapes[:1], [whole])):
        with pytest.raises(ValueError, match='whole track'): check_no_leak(*pair)

# -- the network
def test_training_resumes_and_is_scored(made, tmp_path):
    from bev_reid.geometry import BEVGrid
    from bev_reid.lss import LSSConfig
    from bev_reid.occ_model import OccRecipe, baselines, eval_occ, load_occ, occ_samples, train_occ
    small = dict(appearance=0, bev_channels=16, trunk='b0', pretrained=False, frozen_blocks=0, img_size=(64, 96), stride=16, bev_widths=(16, 16, 16), bev_up=16, cam_channels=8, up_channels=16)
    data, folder = made
    assert 'mIoU' not in train_occ(data, folder, tmp_path/'none', replace(OccRecipe.recipe('toy', lss=LSSConfig.recipe('toy', **small)), fit=replace(OccRecipe.recipe('toy').fit, max_steps=1)), device='cpu')['metrics'] # no scene to validate on, and the test scenes are not looked at
    root = Path(shutil.copytree(data.dataroot, tmp_path/'w')); splits = json.loads((f := root/'v1.0-toy'/'splits.json').read_text())
    f.write_text(json.dumps({**splits, 'val': splits['test'], 'test': []})); data = DrivingData(root)
    lss = LSSConfig.recipe('toy', **small)
    r = OccRecipe.recipe('toy', lss=lss); r = replace(r, fit=replace(r.fit, max_steps=2, checkpoint_every=1), loss=replace(r.loss, lovasz_voxels=2000))
    out = train_occ(data, folder, tmp_path/'run', r, device='cpu')
    assert out['step'] == 2 and 0 <= out['metrics']['mIoU'] <= 1
    model, again = load_occ(tmp_path/'run')
    assert again.loss == r.loss and again.lss == r.lss
    test = occ_samples(data, folder, 'val', r)
    rows = {n: eval_occ(m, test) for n, m in (('network', model), *baselines(folder, data.sample_tokens('train')).items())}
    assert abs(rows['network']['mIoU']-out['metrics']['mIoU']) < 1e-9
    assert rows['empty']['mIoU'] == 0 and rows['empty']['voxels'] == rows['network']['voxels'] == rows['majority']['voxels'] and rows['majority']['geometric'] > .1
    with pytest.raises(ValueError, match='the network'): occ_samples(data, folder, 'val', replace(r, grid=OccGrid()))

def test_one_voxel_stays_where_it_is(toy_root, tmp_path):
    "One point, off every axis, on a grid without symmetry: a LiDAR file, labels, the lift of a camera, the head and three pictures agree about its place"
    from matplotlib.collections import PolyCollection
    from bev_reid.geometry import BEVGrid, frustum_geometry, project
    from bev_reid.lss import LiftSplat, LSSConfig
    from bev_reid.occ_model import OccLSS, OccSamples, collate_occ, predict_occ
    from bev_reid.occ_show import show_in_camera, show_top, show_voxels
    grid, bev = OccGrid(low=(-16, -8, -1.25), high=(32, 24, 4.75)), BEVGrid(xbound=(-16, 32, .5), ybound=(-8, 24, .5), zbound=(-1.25, 4.75, 6.), dbound=(4, 28, 1))
    cfg = LSSConfig(grid=bev, img_size=(64, 96), cam_channels=1, bev_channels=1)
    root = tmp_path/'w'; shutil.copytree(toy_root, root); data = DrivingData(root)
    token = data.sample_tokens(scenes=data.scenes[:1])[0]; frame = data.frame(token); cam = frame.cams.index('CAM_FRONT_LEFT')
    class OnePixel(torch.nn.Module):
        "An image network that sees something in one pixel, at one depth"
        def forward(self, imgs):
            depth, feats = torch.zeros(len(imgs), bev.n_depths, *cfg.feat_size), torch.zeros(len(imgs), 1, *cfg.feat_size)
            depth[:, d] = 60; feats[cam, 0, v, u] = 1
            return depth, feats
    model = OccLSS(cfg, grid); model.trunk = LiftSplat(cfg, cam_encode=OnePixel(), bev_encode=torch.nn.Identity())
    batch = lambda: collate_occ([OccSamples(data, [token], OccFolder(tmp_path/'o'), img_aug=ImgAug(out_size=cfg.img_size), grid=bev)[0]])
    # a pixel and a depth whose point lies high, ahead and to the left, in nobody's box
    create_occupancy(data, tmp_path/'first', replace(CFG, grid=grid, window=0), limit=1)
    one = collate_occ([OccSamples(data, [token], OccFolder(tmp_path/'first'), img_aug=ImgAug(out_size=cfg.img_size), grid=bev)[0]])
    geom = frustum_geometry(model.trunk.frustum, one['intrins'], one['cam2ego'], one['img_aug'])[0, cam]
    cell = (geom.numpy()-grid.low)/grid.voxel; inside = (np.abs(cell-np.floor(cell)-.5) < .4) & (cell > 0) & (cell < grid.nx)
    at = np.argwhere(inside.all(-1) & (geom[..., 2] > 3.3).numpy() & (geom[..., 0] > 4).numpy() & (geom[..., 1] > 3).numpy() & (assign_points(geom.reshape(-1, 3).numpy(), frame.boxes.numpy(), margin=.5) == -1).reshape(geom.shape[:3]))
    d, v, u = (int(i) for i in at[len(at)//2]); place = geom[d, v, u].double(); want = tuple(np.floor(cell[d, v, u]).astype(int))
    assert len({want[0], want[1], want[2]}) == 3
    # generate: a sweep with this point alone
    inv = torch.linalg.inv(frame.lidar2ego.double()); row = data.tables.keyframe(token)[1]['LIDAR_TOP']
    np.array([[*(inv[:3, :3] @ place+inv[:3, 3]).tolist(), 0, 0]], np.float32).tofile(root/row['filename'])
    create_occupancy(data, tmp_path/'o', replace(CFG, grid=grid, window=0, ground=False, camera_mask=2), limit=1)
    # load
    labels = OccFolder(tmp_path/'o').labels(token)
    assert np.argwhere(labels['semantics'] != FREE).tolist() == [list(want)] and labels['mask_camera'][want] and labels['mask_lidar'][want]
    # predict: the head calls what the lift brings `other`, in the one layer
    body = model.head.body
    for p in body.parameters(): torch.nn.init.zeros_(p)
    body[0].weight.data[0, 0, 1, 1] = body[2].weight.data[0, 0] = 50.; body[4].bias.data.view(grid.nx[2], -1)[:, FREE] = 100.; body[4].weight.data[want[2]*(FREE+1), 0] = 1.
    pred = predict_occ(model.eval(), batch())[0]
    assert np.array_equal(pred, labels['semantics'])
    # plot: forward is up, left is left
    ax = show_top(pred, grid); pic = ax.images[0]; (r, c), = np.argwhere((np.asarray(pic.get_array()) < .99).any(-1)); e = pic.get_extent()
    x, y = e[2]+(r+.5)*(e[3]-e[2])/pic.get_array().shape[0], e[0]+(c+.5)*(e[1]-e[0])/pic.get_array().shape[1]
    assert np.abs([x-place[0], y-place[1]]).max() <= .25 and ax.transData.transform([[y, x], [0, 0]])[0, 0] < ax.transData.transform([[0, 0]])[0, 0] and ax.transData.transform([[0, x]])[0, 1] > ax.transData.transform([[0, 0]])[0, 1]
    assert len(next(c for c in show_voxels(pred, grid).collections if isinstance(c, PolyCollection)).get_paths()) == 3    # three faces of one voxel look at us
    ax = show_in_camera(data.image(frame.img_paths[cam]), pred, grid, frame.intrins[cam], frame.cam2ego[cam])
    uv = project(place[None].float(), frame.intrins[cam], frame.cam2ego[cam])[0, :2].numpy(); side = float(frame.intrins[cam][0, 0])*.5/float(place[:2].norm())
    assert np.abs(ax.collections[0].get_paths()[0].vertices[:4].mean(0)-uv).max() < side

# -- verbs
def shell(tmp, name, *args, **kw):
    "A verb in a process of its own, as an installed command"
    script = tmp/name; script.write_text(f'from bev_reid.cli_occupancy import {name}\n{name}()\n')
    return subprocess.Popen([sys.executable, script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, **kw)

ROOT = Path(__file__).resolve().parents[1]
TOY = ['--grid', 'toy', '--ground', '--set', 'lidar_mask=1']

def test_a_killed_creation_goes_on(made, tmp_path):
    data, folder = made; out = tmp_path/'o'
    p = shell(tmp_path, 'bev_reid_occ_create', data.dataroot, out, *TOY)
    while p.poll() is None and not list(out.glob(f'{data.scenes[1]}.part/*/labels.npz')): time.sleep(.005)
    p.kill(); p.communicate()
    assert (out/data.scenes[0]/'scene.json').exists()
    before = (out/data.scenes[0]/'scene.json').stat().st_mtime_ns
    got = cli.bev_reid_occ_create(str(data.dataroot), str(out), grid='toy', ground=True, set=['lidar_mask=1'])
    assert got['there'] in ([data.scenes[0]], data.scenes) and (out/data.scenes[0]/'scene.json').stat().st_mtime_ns == before
    assert tree(out) == tree(folder.root)

def test_verbs_end_in_one_line(made, tmp_path):
    data, folder = made
    runs = {name: shell(tmp_path, name, *args) for name, args in dict(bev_reid_occ_create=[data.dataroot, tmp_path/'x', '--set', 'grid.voxel=[0.3,0.3,0.3]'], bev_reid_occ_show=[data.dataroot, tmp_path/'nowhere']).items()}
    for (name, p), says in zip(runs.items(), ('do not divide the range', 'make it with bev_reid_occ_create')):
        _, err = p.communicate(); last = err.strip().splitlines()[-1]
        assert p.returncode == 2 and 'Traceback' not in err and last.startswith(f'{name}: error: ') and says in last, err

@pytest.mark.parametrize('name', [n for n in dir(cli) if n.startswith('bev_reid_occ_')])
def test_help_of_occupancy_verbs(name, tmp_path):
    p = shell(tmp_path, name, '--help'); text, err = p.communicate()
    assert p.returncode == 0 and getattr(cli, name).__doc__ in ' '.join(text.split()), err

def test_command_line_starts_light():
    r = subprocess.run([sys.executable, '-c', "import sys, bev_reid.cli_occupancy; print(*{'torch', 'numpy', 'scipy'} & set(sys.modules))"], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert r.stdout.strip() == '' and r.returncode == 0, r.stderr

def test_bad_input_is_refused_by_name(made, tmp_path):
    data, folder = made; root, occ = str(data.dataroot), str(folder.root)
    new = str(tmp_path/'new')
    for says, f, args, kw in [('no lidarseg.json', cli.bev_reid_occ_create, (root, new), dict(lidarseg='yes')), ("no grid 'lsd'", cli.bev_reid_occ_create, (root, new), dict(grid='lsd')),
                              ('another configuration', cli.bev_reid_occ_create, (root, occ), dict(grid='lss')), ('unknown scenes', cli.bev_reid_occ_create, (root, new), dict(scenes=['scene-x'])),
                              ('rank below world', cli.bev_reid_occ_create, (root, new), dict(rank=1)), ('does not exist', cli.bev_reid_occ_train, (root, new, new), {}),
                              ('have grid OccGrid', cli.bev_reid_occ_train, (root, occ, new), dict(set=['grid.low=[-50,-50,-2]', 'grid.high=[50,50,6]'])), ('must be camera', cli.bev_reid_occ_show, (root, occ), dict(mask='radar')),
                              ('no labels of sample', cli.bev_reid_occ_show, (root, occ), dict(sample='abc')), ('must be two of', cli.bev_reid_occ_convert, (occ, new), {}), ('holds no *.npy', cli.bev_reid_occ_convert, (occ, new), dict(source='surroundocc', to='occ')),
                              ('no vehicle is seen twice', cli.bev_reid_occ_shapes, (root,), dict(min_gap=60.)), ('unknown or empty split', cli.bev_reid_occ_shapes, (root,), dict(split='dawn'))]:
        with pytest.raises((ValueError, OSError), match=re.escape(says)): f(*args, **kw)
    assert not Path(new).exists() and tree(folder.root)                                  # nothing was begun
    blind = tmp_path/'blind'; shutil.copytree(data.dataroot, blind)
    table = lambda t: blind/data.version/f'{t}.json'
    gone = {r['token'] for r in json.loads(table('sensor').read_text()) if r['channel'] == 'LIDAR_TOP'}
    for t in ('sensor', 'calibrated_sensor', 'sample_data'): table(t).write_text(json.dumps([r for r in json.loads(table(t).read_text()) if r['token'] not in gone and r.get('sensor_token') not in gone and 'LIDAR' not in r.get('filename', '')]))
    for f, args in ((cli.bev_reid_occ_create, (str(blind), new)), (cli.bev_reid_occ_shapes, (str(blind),))):
        with pytest.raises(ValueError, match='LiDAR'): f(*args)

def test_conversions_come_back(made, tmp_path):
    data, folder = made; root, occ = str(data.dataroot), str(folder.root)
    same = lambda back: [np.testing.assert_array_equal(OccFolder(back).labels(t)['semantics'], folder.labels(t)['semantics']) for t in folder.paths]
    cli.bev_reid_occ_convert(occ, str(tmp_path/'n'), to='surroundocc'); cli.bev_reid_occ_convert(str(tmp_path/'n'), str(tmp_path/'n2'), source='surroundocc', to='occ', grid='toy')
    assert len(same(tmp_path/'n2')) == len(data.sample_tokens()) and OccFolder(tmp_path/'n2').grid == folder.grid
    cli.bev_reid_occ_convert(occ, str(tmp_path/'p'), to='seed', dataroot=root)
    names = {Path(data.tables.keyframe(t)[1]['LIDAR_TOP']['filename']).name for t in folder.paths}
    assert {p.name for p in (tmp_path/'p').iterdir()} == names                           # named as the published converter names them
    cli.bev_reid_occ_convert(str(tmp_path/'p'), str(tmp_path/'p2'), source='seed', to='occ', grid='toy', dataroot=root)
    for t in folder.paths:
        a, b = folder.labels(t)['semantics'], OccFolder(tmp_path/'p2').labels(t)['semantics']; full = (a != FREE) & (a != 0)      # noise has no vote; float16 centres stay in their voxels
        assert (a[full] == b[full]).all() and not ((b != FREE) & (a == FREE)).any()
    with pytest.raises(ValueError, match='without the camera mask'): cli.bev_reid_occ_train(root, str(tmp_path/'n2'), str(tmp_path/'r'))

def test_a_conversion_appears_whole(tmp_path, capsys):
    occ, n, n2, grid = str(tmp_path/'gts'), tmp_path/'n', tmp_path/'n2', OccGrid.preset('occ3d'); kw = dict(source='surroundocc', to='occ', grid='occ3d')
    for i in range(4): sem = np.full(grid.nx, FREE, np.uint8); sem[i:i+9, i, 2] = i; write_labels(tmp_path/'gts'/f's{i//2}'/f't{i}'/'labels.npz', sem)
    cli.bev_reid_occ_convert(occ, str(n), to='surroundocc'); assert not (tmp_path/'n.part').exists()
    files = sorted(n.rglob('*.npy')); last, good = files[-1], files[-1].read_bytes()
    for bad, says in ((good[:200], 'damaged'), (b'', 'damaged'), (b'no array', 'damaged')):
        last.write_bytes(bad)
        with pytest.raises(ValueError, match=says) as e: cli.bev_reid_occ_convert(str(n), str(n2), **kw)
        assert last.name in str(e.value) and f'{len(files)-1} of {len(files)} keyframes are ready in {n2}.part' in str(e.value) and not n2.exists()
    with pytest.raises(ValueError, match='grid lss is another'): cli.bev_reid_occ_convert(str(n), str(n2), **kw | dict(grid='lss'))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'n2.part').rglob('labels.npz')}; last.write_bytes(good); capsys.readouterr()
    assert cli.bev_reid_occ_convert(str(n), str(n2), **kw) == len(files) and f'{len(files)-1} were ready' in capsys.readouterr().out
    assert len(OccFolder(n2)) == len(files) and {n2/p.relative_to(tmp_path/'n2.part'): t for p, t in stamps.items()}.items() <= {p: p.stat().st_mtime_ns for p in n2.rglob('labels.npz')}.items() and not (tmp_path/'n2.part').exists()
    last.write_bytes(b''); assert cli.bev_reid_occ_convert(str(n), str(tmp_path/'n3'), skip_missing=True, **kw) == len(files)-1 and '1 left out' in capsys.readouterr().out
    last.write_bytes(good); assert cli.bev_reid_occ_convert(str(n), str(tmp_path/'n3'), **kw) == len(files) and len(OccFolder(tmp_path/'n3')) == len(files) and not (tmp_path/'n3.part').exists()   # into a folder that is there
    for p in files: p.write_bytes(b'')
    with pytest.raises(ValueError, match='none of the'): cli.bev_reid_occ_convert(str(n), str(tmp_path/'n4'), skip_missing=True, **kw)

def test_verbs_train_score_draw_and_rank(made, tmp_path, capsys):
    data, folder = made; root, occ = str(data.dataroot), str(folder.root)
    small = ['lss.bev_channels=16', 'lss.appearance=0', 'lss.trunk=b0', 'lss.pretrained=false', 'lss.frozen_blocks=0', 'lss.img_size=[64,96]', 'lss.stride=16', 'lss.bev_widths=[16,16,16]', 'lss.bev_up=16', 'lss.cam_channels=8', 'lss.up_channels=16', 'loss.lovasz_voxels=500']
    cli.bev_reid_occ_train(root, occ, str(tmp_path/'run'), steps=1, set=small, device='cpu')
    assert 'loss over the voxels of mask: camera' in capsys.readouterr().out
    rows = cli.bev_reid_occ_eval(str(tmp_path/'run'), root, occ, mask='lidar', out=str(tmp_path/'e.json'), device='cpu'); said = capsys.readouterr().out
    assert set(rows) == {'empty', 'majority', 'network'} and 'trained with mask: camera' in said and 'mask: lidar' in said
    assert json.loads((tmp_path/'e.json').read_text())['rows']['empty']['voxels'] == rows['network']['voxels'] > 0
    made_ = cli.bev_reid_occ_show(root, occ, out=str(tmp_path/'pic/o.png'), run=str(tmp_path/'run'))
    assert [Path(p).name for p in made_] == ['o.png', 'o-slices.png', 'o-cameras.png', 'o-errors.png'] and all(Path(p).stat().st_size > 5000 for p in made_)
    table = cli.bev_reid_occ_shapes(root, window=.5, min_gap=1., out=str(tmp_path/'g.png')); said = capsys.readouterr().out
    assert len(table) == 4 and all(0 <= r['mAP'] <= 1 and r['queries'] > 0 for r in table.values()) and 'a leak' in said and (tmp_path/'g.png').stat().st_size > 5000


def test_ground_is_followed_over_crown_and_slope():
    "A road that rises by 5 % and falls off to its sides, cars' roofs and a wall on it; the vehicle drove along the middle"
    from bev_reid.occ_scene import over_ground
    g = np.random.default_rng(0); xy = g.uniform([-40, -15], [40, 15], (60_000, 2)); road = .05*xy[:, 0]-.03*np.abs(xy[:, 1]); z = road+.01*g.normal(size=len(xy))
    roof = g.random(len(xy)) < .1; roof &= np.abs(xy[:, 1]-6) < 2; z[roof] += 1.5
    wall = np.c_[g.uniform(-40, 40, 3000), np.full(3000, 15.3), g.uniform(0, 4, 3000)]; wall[:, 2] += .05*wall[:, 0]-.45
    egos = np.tile(np.eye(4), (17, 1, 1)); egos[:, 0, 3] = np.linspace(-40, 40, 17); egos[:, 2, 3] = .05*egos[:, 0, 3]
    p = np.concatenate([np.c_[xy, z], wall]); h = over_ground(p, egos); n = len(xy)
    assert (np.abs(h[:n][~roof]) < .1).mean() > .99 and (np.abs(h[:n][roof]-1.5) < .1).all() and np.nanmedian(h[n:]) > 1
    assert (np.abs(road) > .4).mean() > .5                                       # a plane would have lost them
    island = np.r_[p, np.c_[xy[:500]+[0, 80], np.full(500, 9.)]]; assert np.isnan(over_ground(island, egos)[-500:]).all()     # nothing leads there
    assert len(over_ground(np.zeros((0, 3)), egos)) == 0

def test_converted_voxels_keep_their_grid(tmp_path):
    "SurroundOcc's files hold indices alone: ours say beside them which grid they are of"
    from bev_reid import cli_occupancy as cli
    from bev_reid.occ_files import OccFolder, write_surroundocc
    from bev_reid.fit import plain, write_json
    g = OccGrid.preset('toy'); sem = np.full(g.nx, 17, np.uint8); sem[3, 5, 2] = 4
    (tmp_path/'so'/'scene').mkdir(parents=True); write_surroundocc(tmp_path/'so'/'scene'/'k.npy', sem); write_json(tmp_path/'so'/'grid.json', plain(g))
    cli.bev_reid_occ_convert(str(tmp_path/'so'), str(tmp_path/'occ'), source='surroundocc'); back = OccFolder(tmp_path/'occ'); assert back.grid == g and back.labels('k')['semantics'][3, 5, 2] == 4
    with pytest.raises(ValueError, match='--grid lss is another'): cli.bev_reid_occ_convert(str(tmp_path/'so'), str(tmp_path/'no'), source='surroundocc', grid='lss')
    assert not (tmp_path/'no').exists() and not (tmp_path/'no.part').exists()
    cli.bev_reid_occ_convert(str(tmp_path/'occ'), str(tmp_path/'again'), to='surroundocc'); assert json.loads((tmp_path/'again'/'grid.json').read_text()) == json.loads(json.dumps(plain(g)))
