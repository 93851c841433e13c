"Networks that predict occupancy: where their points fall, whom they ask, and that axes, gradients and the road are whole"
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bev_reid import occ_model
from bev_reid.data import DrivingData, ImgAug, img_aug_matrix
from bev_reid.fit import FitConfig, plain, save_atomic
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig, depth_loss, depth_target
from bev_reid.occ_files import OccFolder
from bev_reid.occ_former import CameraAttention, FormerConfig, OccFormer, look_up, reference_points
from bev_reid.occ_kernels import FREE, OccGrid
from bev_reid.occ_model import OccLossConfig, OccRecipe, baselines, eval_occ, load_occ, make_model, occ_loss, occ_samples, predict_occ, start_cameras, train_occ
from bev_reid.occ_scene import CLASSES, OccConfig
from bev_reid.occupancy import create_occupancy

GRID, SIZE = OccGrid(low=(-8, -4, -1), high=(8, 4, 3), voxel=1), (64, 96)       # 16 x 8 x 4: no axis can stand in for another
LSS = LSSConfig.recipe('toy', appearance=0, bev_channels=16, cam_channels=16, pretrained=False, frozen_blocks=0, img_size=SIZE, up_channels=32, bev_widths=(16, 24, 32), bev_up=24, grid=BEVGrid(xbound=(-8, 8, 1), ybound=(-4, 4, 1), dbound=(1, 10, 1)))
FORMER = FormerConfig(channels=16, heads=2, heights=2, points=2, hidden=16, voxel=16, dropout=0.)

def recipe(model, **kw): return OccRecipe(model=model, **{**dict(lss=LSS, former=FORMER, grid=GRID, img_aug=ImgAug(resize=(1., 1.), crop_bottom=(0., 0.), flip=False, rotate=(0., 0.))), **kw})

def rig(b=1, *, aug=None, seed=0):
    "Four cameras 1.5 m above the ground: ahead, left, behind, right, each 77 degrees wide"
    poses = []
    for yaw in (0, .5*math.pi, math.pi, -.5*math.pi):
        c, s = math.cos(yaw), math.sin(yaw)
        poses.append(torch.tensor([[s, 0, c, .5*c], [-c, 0, s, .5*s], [0, -1, 0, 1.5], [0, 0, 0, 1.]]))
    K = torch.tensor([[60., 0, 47.5], [0, 60., 31.5], [0, 0, 1]])
    gen = torch.Generator().manual_seed(seed)
    return dict(imgs=torch.rand(b, 4, 3, *SIZE, generator=gen), intrins=K.expand(b, 4, 3, 3).clone(), cam2ego=torch.stack(poses).expand(b, 4, 4, 4).clone(),
                img_aug=(torch.eye(4) if aug is None else aug).expand(b, 4, 4, 4).clone())

def random_attention(**kw):
    torch.manual_seed(0); net = CameraAttention(8, 3, heads=2, heights=2, points=2, **kw)
    for m in (net.offset, net.weight): nn.init.normal_(m.weight, std=.3)
    return net

# -- where points fall
def test_a_reference_point_samples_its_pixel():
    "Maps that hold their own pixel coordinates, under a crop, a mirror and a turn, on a feature map of an eighth of the size; the pixel is computed by hand"
    aug = img_aug_matrix(SIZE, scale=1.2, crop=(7., 5.), flip=True, rotate=4.)
    batch, ref = rig(2, aug=aug), reference_points(GRID, heights=2)
    batch['cam2ego'][1, :, :3, 3] += torch.tensor([.3, -.2, .1])
    at, seen = look_up(ref, batch, SIZE)
    h, w = SIZE[0]//8, SIZE[1]//8
    u, v = torch.meshgrid((torch.arange(w)+.5)*8-.5, (torch.arange(h)+.5)*8-.5, indexing='xy')
    feats = torch.stack([u, v, torch.ones(h, w)]).expand(2, 4, 3, h, w)
    net = CameraAttention(3, 3, heads=1, heights=1, points=1)
    for m in (net.value, net.out): m.weight.data.copy_(torch.eye(3).reshape(m.weight.shape)); m.bias.data.zero_()
    net.offset.bias.data.zero_()
    checked = 0
    for i, c, d in np.ndindex(2, 4, 2):
        got = net(torch.zeros(2, len(ref), 3), feats[:, c:c+1], at[:, c:c+1, :, d:d+1], seen[:, c:c+1, :, d:d+1])[i]
        K, pose, A = (batch[k][i, c].double().numpy() for k in ('intrins', 'cam2ego', 'img_aug'))
        for q, p in enumerate(ref[:, d].double().numpy()):
            cam = pose[:3, :3].T @ (p-pose[:3, 3])
            if cam[2] <= .1: assert not seen[i, c, q, d]; continue
            px = (K @ cam)[:2]/cam[2]; px = A[:2, :2] @ px+A[:2, 3]
            inside = (px >= 0).all() and px[0] <= SIZE[1]-1 and px[1] <= SIZE[0]-1
            assert bool(seen[i, c, q, d]) == bool(inside) or min(np.abs(px).min(), np.abs(px-[SIZE[1]-1, SIZE[0]-1]).min()) < 1e-3
            if (px >= 4).all() and px[0] <= SIZE[1]-5 and px[1] <= SIZE[0]-5:    # between the middles of features, where values are interpolated
                np.testing.assert_allclose(got[q].detach().numpy(), [*px, 1], atol=1e-3); checked += 1
    assert checked > 50

def test_a_turned_map_looks_where_the_world_is():
    "The look-up of a turned map is that of the unturned points"
    batch, ref = rig(), reference_points(GRID, heights=2)
    turn = torch.tensor([[0., -1.1, 0, 0], [1.1, 0, 0, 0], [0, 0, 1.1, 0], [0, 0, 0, 1]])
    moved = torch.cat([ref, torch.ones(*ref.shape[:2], 1)], -1) @ turn.T
    a, b = look_up(ref, batch, SIZE), look_up(moved[..., :3], {**batch, 'bev_aug': turn[None]}, SIZE)
    assert torch.equal(a[1], b[1]); torch.testing.assert_close(a[0][a[1]], b[0][a[1]], atol=1e-4, rtol=0)

# -- whom a query asks
def test_cameras_that_do_not_see_a_query_have_no_weight():
    net, batch, ref = random_attention(), rig(), reference_points(GRID, heights=2)
    at, seen = look_up(ref, batch, SIZE); query = torch.randn(1, len(ref), 8)
    feats = torch.randn(1, 4, 3, 8, 12, requires_grad=True); out = net(query, feats, at, seen)
    n = seen.any(-1)[0].sum(0); assert (n == 0).any() and (n == 1).any()             # over the roof nobody looks
    for q in [int((n == k).nonzero()[0]) for k in (0, 1)]+[int(n.argmax())]:
        g, = torch.autograd.grad(out[0, q].sum(), feats, retain_graph=True)
        assert (g.abs().sum((0, 2, 3, 4)) > 0).tolist() == seen[0, :, q].any(-1).tolist()
    torch.testing.assert_close(out[0, n == 0], net.out.bias.expand(int((n == 0).sum()), -1))
    nobody = net(query, feats, at, torch.zeros_like(seen)); assert torch.isfinite(nobody).all()

def test_a_point_that_is_not_seen_gives_its_share_to_the_others():
    "Of two heights only one is seen: features at the other's place do not matter"
    net, batch, ref = random_attention(), rig(), reference_points(GRID, heights=2)
    at, seen = look_up(ref, batch, SIZE); half = seen & ~seen.flip(-1); assert half.any()
    other = torch.where(half.any(-1, keepdim=True) & ~seen, torch.zeros_like(at[..., 0]), at[..., 0])
    query, feats = torch.randn(1, len(ref), 8), torch.randn(1, 4, 3, 8, 12)
    moved = at.clone(); moved[..., 0] = other; moved[..., 1] = torch.where(half.any(-1, keepdim=True) & ~seen, torch.zeros_like(at[..., 1]), at[..., 1])
    torch.testing.assert_close(net(query, feats, at, seen), net(query, feats, moved, seen), atol=1e-5, rtol=0)

@pytest.mark.parametrize('model', occ_model.MODELS)
def test_cameras_have_no_order(model):
    torch.manual_seed(0); net, batch = make_model(recipe(model)).eval(), rig(2)
    if model == 'former':
        for l in net.layers: nn.init.normal_(l.cameras.offset.weight, std=.2); nn.init.normal_(l.cameras.weight.weight, std=.2)
    order = [2, 0, 3, 1]
    with torch.no_grad(): a, b = net(batch)['logits'], net({k: v[:, order] for k, v in batch.items()})['logits']
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4); assert a.std() > 1e-3

def test_samples_of_a_batch_do_not_meet():
    "A keyframe alone and in a batch with another rig"
    torch.manual_seed(0); net, batch = make_model(recipe('former')).eval(), rig(2)
    batch['cam2ego'][1, :, :3, 3] += 2.; batch['img_aug'][1, :, 0, 3] = 30.         # sees other queries, so the sorted rows differ in length
    with torch.no_grad():
        both = net(batch)['logits']
        for i in range(2): torch.testing.assert_close(both[i:i+1], net({k: v[i:i+1] for k, v in batch.items()})['logits'], atol=2e-4, rtol=1e-4)

# -- learning
def labels(b=1):
    "An L of cars that no turn and no exchange of axes maps onto itself, and a road"
    sem = torch.full((b, *GRID.nx), FREE, dtype=torch.uint8); sem[..., 0] = 11
    sem[:, 12:14, 2, 1] = 4; sem[:, 13, 2, 2] = 10; sem[:, 3, 6, 1] = 8
    return dict(semantics=sem, mask_camera=torch.ones_like(sem), mask_lidar=torch.ones_like(sem))

@pytest.mark.parametrize('model', occ_model.MODELS)
def test_overfits_one_sample_and_keeps_its_axes(model):
    torch.manual_seed(0); net, batch = make_model(recipe(model)), {**rig(), **labels()}
    opt = torch.optim.Adam(net.parameters(), 1e-2); net.train()
    for _ in range(120): loss = occ_loss(net(batch)['logits'], batch, OccLossConfig(class_weights='none'))['loss']; opt.zero_grad(); loss.backward(); opt.step()
    pred, truth = predict_occ(net, batch), batch['semantics'].numpy()
    assert (pred == truth).mean() > .995
    assert sorted(map(tuple, np.argwhere((pred[0] != 11) & (pred[0] != FREE)))) == [(3, 6, 1), (12, 2, 1), (13, 2, 1), (13, 2, 2)]

def test_evidence_moves_along_the_axes_of_the_map():
    "A mark in the pixel of one voxel changes the answer around that voxel, and nowhere across the map: images, geometry, queries, heights and labels agree"
    torch.manual_seed(0); r = recipe('former', former=replace(FORMER, stride=1, layers=1, heights=4)); net = make_model(r).eval()
    class Feats(nn.Module):
        def forward(self, imgs, rays): return torch.zeros(len(imgs), 9, 8, 12), self.maps.flatten(0, 1)
    net.cam_encode, batch, ref = Feats(), rig(), reference_points(GRID, heights=4)
    net.layers[0].around = Silent(); net.layers[0].think = nn.Sequential(nn.Linear(16, 16)); nn.init.zeros_(net.layers[0].think[0].weight); nn.init.zeros_(net.layers[0].think[0].bias)
    net.layers[0].cameras.offset.bias.data.zero_(); net.head.near = nn.Identity()
    at, seen = look_up(ref, batch, SIZE)
    asked = 0
    for x, y in ((12, 2), (13, 6), (2, 5), (8, 7)):
        q = x*8+y; c, d = [int(i[0]) for i in seen[0, :, q].nonzero(as_tuple=True)]
        u, v = (((at[0, c, q, d]+1)*torch.tensor([12., 8.])-1)/2).round().int().tolist()
        with torch.no_grad():
            net.cam_encode.maps = torch.zeros(1, 4, 16, 8, 12); before = net(batch)['logits']
            net.cam_encode.maps[0, c, :, v, u] = 5.; moved = (net(batch)['logits']-before).abs().amax((0, 1)).amax(-1)      # x y
        near = torch.zeros(16, 8, dtype=torch.bool)
        for p in range(128):
            uv = ((at[0, c, p]+1)*torch.tensor([12., 8.])-1)/2
            near[p//8, p%8] = bool((((uv-torch.tensor([u, v])).abs() < 1).all(-1) & seen[0, c, p]).any())
        assert near[x, y] and torch.equal(moved > 1e-6, near) and 0 < near.sum() < 60; asked += 1
    assert asked == 4

class Silent(nn.Module):
    def forward(self, y, known, size): return torch.zeros_like(known)

@pytest.mark.parametrize('model', occ_model.MODELS)
def test_gradients_reach_every_part(model):
    torch.manual_seed(0); net, batch = make_model(recipe(model)).train(), {**rig(2), **labels(2)}
    batch['points'] = [torch.rand(400, 3)*torch.tensor([14., 6, 2])-torch.tensor([7., 3, 0]) for _ in range(2)]
    if model == 'former':
        for l in net.layers: nn.init.normal_(l.cameras.weight.weight, std=.1); nn.init.normal_(l.around.weight.weight, std=.1)
    for _, m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any(): nn.init.ones_(m.weight)       # residual blocks begin closed
    out = net(batch)
    loss = occ_loss(out['logits'], batch)['loss']+depth_loss(out['depth_logits'], depth_target(batch['points'], batch, LSS), kind='ce'); loss.backward()
    unused = ('trunk.head',) if model == 'lss' else ()                                         # the vehicle map of the LSS is not asked for
    silent = [k for k, p in net.named_parameters() if not k.startswith(unused or ' ') and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not silent, silent

# -- one road for all
def test_one_place_for_a_new_model(toy_root, tmp_path, monkeypatch):
    "Every model, and one that was added a line ago, is trained, resumed, loaded and measured by the same functions"
    data, cfg = DrivingData(toy_root), OccConfig(grid=OccGrid(low=(-16, -8, -1), high=(16, 8, 3), voxel=1), ground=True, lidar_mask=0, camera_mask=8)
    create_occupancy(data, tmp_path/'labels', cfg); folder = OccFolder(tmp_path/'labels')
    class Constant(nn.Module):
        def __init__(self, r): super().__init__(); self.each = nn.Parameter(torch.zeros(len(CLASSES), *r.grid.nx))
        def forward(self, batch): return dict(logits=self.each.expand(len(batch['imgs']), *self.each.shape))
    monkeypatch.setitem(occ_model.MODELS, 'constant', Constant)
    lss = replace(LSS, grid=BEVGrid(xbound=(-16, 16, 1), ybound=(-8, 8, 1), dbound=(1, 20, 1)))
    for model in occ_model.MODELS:
        r = recipe(model, lss=lss, grid=cfg.grid, batch_size=2, fit=FitConfig(max_steps=2, lr=.5 if model == 'constant' else 1e-3, checkpoint_every=1))
        assert train_occ(data, folder, tmp_path/model, r, device='cpu')['step'] == 2
        assert train_occ(data, folder, tmp_path/model, replace(r, fit=replace(r.fit, max_steps=3)), device='cpu')['step'] == 3
        net, back = load_occ(tmp_path/model); assert back.model == model and back.grid == cfg.grid and back.former == FORMER
        got = eval_occ(net, occ_samples(data, folder, 'test', back)); assert got['mask'] == 'camera' and got['voxels'] > 100 and got['keyframes'] == 4
        with pytest.raises(ValueError, match='another configuration'): train_occ(data, folder, tmp_path/model, replace(r, batch_size=1), device='cpu')
    samples = occ_samples(data, folder, 'train', r)
    most = {k: eval_occ(f, samples, mask='none') for k, f in baselines(folder, samples.tokens).items()}
    assert most['empty']['mIoU'] == 0 and most['majority']['mIoU'] > .1               # classes that occur and are never named have 0; absent ones are left out
    monkeypatch.delitem(occ_model.MODELS, 'constant')
    with pytest.raises(ValueError, match='constant.*lss, former'): load_occ(tmp_path/'constant')
    with pytest.raises(ValueError, match='do not divide'): make_model(recipe('former', former=replace(FORMER, stride=3)))

@pytest.mark.parametrize('model', occ_model.MODELS)
def test_starts_from_a_camera_network(model, tmp_path):
    torch.manual_seed(1); old = LiftSplat(replace(LSS, appearance=8, lift_rgb=1, context_channels=8))
    save_atomic(dict(model=old.state_dict(), config=dict(lss=plain(old.cfg))), tmp_path/'old.pt')
    net = make_model(recipe(model)); took = start_cameras(net, tmp_path/'old.pt'); own = net.state_dict()
    for k in took: assert torch.equal(own[k], old.state_dict()[k.removeprefix('trunk.')])
    assert len([k for k in took if 'cam_encode' in k]) == len([k for k in own if 'cam_encode' in k])
    wide = make_model(recipe(model, lss=replace(LSS, up_channels=16)))
    with pytest.raises(ValueError, match='another make'): start_cameras(wide, tmp_path/'old.pt')
    with pytest.raises(FileNotFoundError): start_cameras(net, tmp_path/'nothing')
    with pytest.raises(ValueError, match='no occupancy model'): recipe('latest')

@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path):
    "Every row is there under every mask, nothing of the measured scenes was seen, and a second call computes nothing"
    root = Path(__file__).resolve().parents[1]; out = tmp_path/'at'/'occ_models.json'
    def go(): return subprocess.run([sys.executable, root/'nbs'/'_tools'/'results_occ_models.py', '--quick', '--at', tmp_path/'at', '--out', out], capture_output=True, text=True, cwd=root)
    r = go(); assert r.returncode == 0, r.stderr[-2000:]
    check_study(got := json.loads(out.read_text()))
    r = go(); assert r.returncode == 0 and not [l for l in r.stdout.splitlines() if l.startswith(('choice', 'lss|', 'former|'))] and json.dumps(json.loads(out.read_text())) == json.dumps(got)

def check_study(got):
    "What holds for the results of any size"
    s = got['settings']; masks = set(s['masks'])
    assert set(got['rows']) == {'empty', 'majority', *(f'{m}|{k}' for m in s['models'] for k in s['seeds'])} and len(got['choices']) == len(s['models'])*len(s['rates'])
    parts = [set(v) for v in got['scenes'].values()]; assert sum(map(len, parts)) == len(set.union(*parts)) and len(parts) == 3
    for name, r in got['rows'].items():
        assert set(r['test']) == masks
        for m, t in r['test'].items(): assert t['mask'] == m and t['keyframes'] == got['keyframes']['test'] and t['voxels'] == got['rows']['empty']['test'][m]['voxels']
        if 'model' in r: assert r['lr'] == max(s['rates'], key=lambda v: got['choices'][f"{r['model']}|{v:g}"]['val']['mIoU']) and r['cpu_minutes'] > 0 and 'results_occ_models.py' in r['command']
    assert got['start'].get('of_which_in', {}).get('test', 0) == got['start'].get('of_which_in', {}).get('val', 0) == 0

def test_the_kept_results_are_whole():
    path = Path(__file__).resolve().parents[1]/'results'/'occ_models.json'
    if not path.exists(): pytest.skip('the networks have not been measured')
    got = json.loads(path.read_text()); check_study(got)
    assert len(got['settings']['seeds']) >= 2 and got['settings']['steps'] >= 200 and 'TOY' in got['title']

def test_the_kept_tables_come_from_the_script_as_it_stands(monkeypatch):
    root = Path(__file__).resolve().parents[1]; monkeypatch.syspath_prepend(str(root/'nbs'/'_tools'))
    import results_occupancy as script
    kept = json.loads((root/'results'/'occupancy.json').read_text())
    assert set(kept) == set(script.TABLES)
    for part in kept.values(): assert all(part['world'][k] == (list(v) if isinstance(v, tuple) else v) for k, v in script.WORLD.items() if k in part['world']) and {'n_scenes', 'seed'} <= part['world'].keys()
    assert (kept['reid']['result']['window_s'], kept['reid']['result']['min_gap_s']) == (script.WINDOW, script.GAP) and len(kept['agreement']['result']) == 4
