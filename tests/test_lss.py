"""Lift-splat: parity with the published method's formulas, and depth targets and losses against slow restatements."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bev_reid.data import BEVAug, DrivingData, ImgAug, SampleDataset, collate_samples, sample_img_aug
from bev_reid.fit import plain, save_atomic
from bev_reid.geometry import BEVGrid, make_pose
from bev_reid.lss import *

GRID = BEVGrid(xbound=(-24, 24, 1), ybound=(-24, 24, 1), zbound=(-10, 10, 20), dbound=(2, 26, 2))
SMALL = dict(grid=GRID, img_size=(64, 160), up_channels=16, cam_channels=8, bev_channels=12, bev_widths=(8, 12, 16), bev_up=12)

def config(**kw): return LSSConfig(**{**SMALL, **kw})

def shaken(cfg, seed=0):
    "A network in eval mode with random weights, and statistics that keep every layer alive"
    torch.manual_seed(seed)
    m = LiftSplat(cfg)
    norms = [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]
    for n in norms: nn.init.normal_(n.weight, 1, .1); nn.init.normal_(n.bias, 0, .1); n.momentum = .7
    with torch.no_grad():
        seen = rig(1, 3, cfg, seed=seed+100)
        run_lss(m.train(), seen)
        m.head.weight /= run_lss(m.eval(), seen)['logits'].std()       # logits that vary by about one
    return m

def rig(b, n, cfg, *, size=(900, 1600), seed=0):
    "A ring of cameras around the car, looking a little down, each with an augmentation drawn for it"
    gen, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    aug = ImgAug(out_size=cfg.img_size, crop_bottom=(0., .3))
    intrins, poses, augs = [], [], []
    for _ in range(b*n):
        yaw, pitch = rng.uniform(-np.pi, np.pi), rng.uniform(-.05, .1)
        fwd = np.array([np.cos(yaw)*np.cos(pitch), np.sin(yaw)*np.cos(pitch), -np.sin(pitch)])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0])
        poses.append(make_pose(np.stack([right, np.cross(fwd, right), fwd], 1), [rng.uniform(-1, 1), rng.uniform(-1, 1), 1.5]).float())
        f = size[1]*rng.uniform(.5, .8)
        intrins.append(torch.tensor([[f, 0, size[1]/2+3], [0, f*1.01, size[0]/2-5], [0, 0, 1]]))
        augs.append(sample_img_aug(aug, size, generator=gen))
    stack = lambda x: torch.stack(x).float().unflatten(0, (b, n))
    return dict(imgs=torch.rand(b, n, 3, *cfg.img_size, generator=gen), intrins=stack(intrins), cam2ego=stack(poses), img_aug=stack(augs))

def get_geometry(batch, cfg):
    "1.1 and 1.2 of the published method: every point of the frustum in the ego frame"
    grid = cfg.grid
    # 1.1 the frustum spans the image
    (H, W), (fh, fw), D = cfg.img_size, cfg.feat_size, grid.n_depths
    us, vs, ds = torch.linspace(0, W-1, fw), torch.linspace(0, H-1, fh), torch.arange(*grid.dbound)
    frustum = torch.stack([us[None, None].expand(D, fh, fw), vs[None, :, None].expand(D, fh, fw), ds[:, None, None].expand(D, fh, fw)], -1)
    # 1.2 get_geometry: undo the augmentation, the intrinsics and the pose of the camera, in this order
    rots, trans, intrins = batch['cam2ego'][..., :3, :3], batch['cam2ego'][..., :3, 3], batch['intrins']
    post_rots, post_trans = batch['img_aug'][..., :3, :3], batch['img_aug'][..., :3, 3]
    q = frustum[None, None]-post_trans[:, :, None, None, None]
    q = torch.inverse(post_rots)[:, :, None, None, None].matmul(q[..., None])[..., 0]
    r = torch.cat([q[..., :2]*q[..., 2:], q[..., 2:]], -1)
    xyz = rots.matmul(torch.inverse(intrins))[:, :, None, None, None].matmul(r[..., None])[..., 0]+trans[:, :, None, None, None]
    return xyz

def clear_rig(b, n, cfg, **kw):
    "A rig none of whose points lies on the edge of a cell, where the last bit would decide"
    for seed in range(200):
        batch = rig(b, n, cfg, seed=seed, **kw)
        cell = (get_geometry(batch, cfg)-torch.tensor(cfg.grid.lo))/torch.tensor(cfg.grid.dx)
        if (cell-cell.round()).abs().min() > 1e-5: return batch
    raise AssertionError('no such rig')

def published(m, batch, *, floor=False):
    "The published method, restated: get_geometry, get_depth_feat, voxel_pooling, BevEncode; only the convolutions are the network's"
    cfg, grid, xyz = m.cfg, m.cfg.grid, get_geometry(batch, m.cfg)
    b, n, D = *batch['imgs'].shape[:2], grid.n_depths
    # 1.3 depth distribution times context, as one volume
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    x = ((batch['imgs']-mean[:, None, None])/std[:, None, None]).flatten(0, 1)
    fine, coarse = m.cam_encode.trunk(x)
    up = m.cam_encode.up
    x = m.cam_encode.head(up.conv(torch.cat([fine, F.interpolate(coarse, scale_factor=2, mode='bilinear', align_corners=True)], 1)))
    depth, feat = x[:, :D].softmax(1), x[:, D:]
    volume = (depth[:, None]*feat[:, :, None]).unflatten(0, (b, n)).permute(0, 1, 3, 4, 5, 2).flatten(0, 4)      # b n D fh fw C
    # 1.4 voxel_pooling: truncation toward zero, rank, sort, sum of each run
    dx, bx, nx = (torch.tensor(v) for v in (grid.dx, grid.bx, grid.nx))
    cell = (xyz-(bx-dx/2))/dx
    cell = (cell.floor() if floor else cell).long().flatten(0, 4)
    batch_ix = torch.arange(b).repeat_interleave(len(volume)//b)
    kept = ((cell >= 0) & (cell < nx)).all(1)
    volume, cell, batch_ix = volume[kept].double(), cell[kept], batch_ix[kept]
    X, Y, Z = grid.nx
    rank = cell[:, 0]*(Y*Z*b)+cell[:, 1]*(Z*b)+cell[:, 2]*b+batch_ix
    order = rank.argsort()
    volume, cell, batch_ix, rank = volume[order].cumsum(0), cell[order], batch_ix[order], rank[order]
    last = torch.ones(len(rank), dtype=torch.bool); last[:-1] = rank[1:] != rank[:-1]
    sums, cell, batch_ix = volume[last], cell[last], batch_ix[last]
    sums = torch.cat([sums[:1], sums[1:]-sums[:-1]]).float()
    bev = torch.zeros(b, sums.shape[1], Z, X, Y)
    bev[batch_ix, :, cell[:, 2], cell[:, 0], cell[:, 1]] = sums
    bev = torch.cat(bev.unbind(2), 1)
    # 1.5 the BEV encoder, and the head
    e = m.bev_encode
    x1 = e.stage1(e.stem(bev))
    x = e.up.conv(torch.cat([x1, F.interpolate(e.stage3(e.stage2(x1)), scale_factor=4, mode='bilinear', align_corners=True)], 1))
    return m.head(e.out(F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True))), bev, kept.sum().item()


@pytest.mark.parametrize('kw', [dict(index_mode='trunc'), dict(index_mode='floor'), dict(index_mode='trunc', stride=8),
                                dict(index_mode='trunc', grid=BEVGrid((-24, 24, 1), (-16, 16, 1), (-2, 4, 2), (2, 26, 2)))],
                         ids=['trunc', 'floor', 'stride 8', 'three layers, oblong'])
def test_parity_with_the_published_method(kw):
    cfg = config(**kw)
    m, batch = shaken(cfg), clear_rig(2, 6, cfg)
    with torch.no_grad():
        want, bev, n = published(m, batch, floor=cfg.index_mode == 'floor')
        got = run_lss(m, batch)
    assert n > 3000 and want.std() > .2 and (bev.abs().sum(1) > 0).float().mean() > .1      # the comparison is about something
    torch.testing.assert_close(got['logits'], want, atol=1e-4, rtol=1e-4)

def test_parity_on_the_fast_paths(monkeypatch):
    # maps of any size are convolved before they are enlarged
    monkeypatch.setattr(Enlarge, 'worth', 0)
    test_parity_with_the_published_method(dict(index_mode='trunc', stride=8))

def test_trunk_is_the_packages_own():
    cfg = config(img_size=(64, 96))
    m, x = Trunk(cfg), torch.rand(3, 3, 64, 96)
    m.drop = 0.                                                       # which images skip a block is drawn
    outs, grads = [], []
    for ours in (True, False):
        m.ours = ours; m.zero_grad()
        outs.append(m(x)); sum(y.square().mean() for y in outs[-1]).backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5); torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)

def test_images_skip_blocks_as_often_as_they_should():
    blk = Trunk(config()).blocks[2]; blk.eval(); x = torch.rand(400, blk._block_args.input_filters, 2, 2)
    with torch.no_grad():
        want, blk.training = mb_block(blk, x)-x, True                 # norms stay in eval mode
        got = mb_block(blk, x, drop=.25)-x
    kept = got.flatten(1).abs().sum(1) > 0
    assert .68 < kept.float().mean() < .82
    torch.testing.assert_close(got[kept], want[kept]/.75, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('size, scale, b, fine', [((5, 7), 2, 2, 3), ((4, 6), 4, 1, 0), ((1, 3), 2, 2, 2), ((80, 6), 2, 1, 0), ((9, 104), 2, 2, 4)])
def test_convolving_first_changes_nothing(size, scale, b, fine):
    torch.manual_seed(0)
    enlarge, conv = Enlarge(scale, size).double(), nn.Conv2d(6+fine, 5, 3, padding=1).double()
    x = torch.randn(b, 6, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randn(b, fine, *[s*scale for s in size], dtype=torch.float64, requires_grad=True) if fine else None
    got = []
    for enlarge.worth in (0, float('inf')):
        out = enlarge(x, conv, y); w = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        got.append((out, *torch.autograd.grad((out*w).sum(), (x, *conv.parameters(), *([y] if fine else [])))))
    torch.testing.assert_close(*got, atol=1e-3, rtol=1e-4)                            # the matrix is that of float32

def test_compiles_in_one_graph(monkeypatch):
    "Everything between plan and maps, the pooling included, as it is trained: under autocast, forward and backward"
    monkeypatch.setattr(Enlarge, 'worth', 0)
    cfg = config(img_size=(32, 64), grid=BEVGrid((-80, 80, 1), (-8, 8, 1), (-10, 10, 20), (2, 26, 2)))   # long enough for bands
    m, batch = shaken(cfg).train(), rig(1, 2, cfg)
    m.cam_encode.trunk.drop, outs = 0., []
    for compiled in (False, True):
        if compiled: m.compile(fullgraph=True, backend='eager')
        with torch.autocast('cpu', torch.bfloat16): outs.append(run_lss(m, batch)['logits'].float())
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-3)
    outs[1].sum().backward()
    assert m.cam_encode.trunk.stem.weight.grad.abs().sum() > 0
    assert list(m.state_dict()) == list(LiftSplat(cfg).state_dict())                  # checkpoints know nothing of it
    fast = fast_lss(m, amp='no')
    with torch.no_grad(): m.head.weight.zero_()
    assert run_lss(fast, batch)['logits'].std() > 1e-3                                # a copy runs its own weights

def test_geometry_is_never_in_half_precision():
    cfg = config(rays=True)
    m, batch = shaken(cfg), rig(1, 3, cfg)
    points = [torch.rand(500, 4)*torch.tensor([60, 60, 6, 1])-torch.tensor([30, 30, 2, 0])]
    def geometry(): return m.plan(*(batch[k] for k in ('intrins', 'cam2ego', 'img_aug'))).cells, ray_features(m.frustum, batch['intrins'], batch['cam2ego'], batch['img_aug']), depth_target(points, batch, cfg)
    want = geometry()
    with torch.autocast('cpu', torch.bfloat16): got = geometry()
    assert all(torch.equal(a, b) for a, b in zip(got, want))

@pytest.mark.parametrize('kw', [{}, dict(trunk='lite0', stride=8, rays=True, appearance=8, context_channels=8, bev_skip=True)], ids=['published', 'appearance'])
def test_fast_inference(kw, monkeypatch):
    cfg = config(**kw)
    m, batch = shaken(cfg), rig(1, 4, cfg)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with torch.no_grad(): want = run_lss(m, batch)
    for worth in (0, Enlarge.worth):
        monkeypatch.setattr(Enlarge, 'worth', worth)
        folded, half = run_lss(fast_lss(m, amp='no'), batch), run_lss(fast_lss(m, amp='bf16'), batch)
        for k in ('logits', 'bev_feats', 'depth_logits'):
            torch.testing.assert_close(folded[k], want[k], atol=1e-4, rtol=1e-4)
            assert half[k].dtype == torch.float32 and (half[k]-want[k]).abs().mean() < .2*want[k].std(), k
        depth = [o['depth_logits'].softmax(2) for o in (half, want)]
        assert (depth[0]-depth[1]).abs().max() < .05
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and any(isinstance(n, nn.BatchNorm2d) for n in m.modules())
    fast = fast_lss(m)
    assert not fast.train().training and fast.cfg == cfg and fast.img_aug == m.img_aug and not any(isinstance(n, nn.BatchNorm2d) for n in fast.modules())
    again = run_lss(fast, batch, plan=want['plan'])['logits']
    torch.testing.assert_close(again, run_lss(fast, batch)['logits'])
    with pytest.raises(ValueError, match='amp must be auto, bf16 or no'): fast_lss(m, amp='fp16')

def test_half_precision_gradients():
    "The step in bfloat16 goes where the step in float32 goes"
    cfg = config(img_size=(64, 96))
    m, x = Trunk(cfg), torch.rand(4, 3, 64, 96)
    m.drop, grads = 0., []
    for amp in (False, True):
        m.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp): out = m(x)
        sum(y.float().square().mean() for y in out).backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in m.named_parameters() if '_depthwise' in n]))
    assert F.cosine_similarity(*grads, dim=0) > .98

def test_index_modes_differ():
    cfg = config(index_mode='trunc')
    m, batch = shaken(cfg), rig(1, 6, cfg)
    with torch.no_grad(): a, b = run_lss(m, batch)['logits'], published(m, batch, floor=True)[0]
    assert (a-b).abs().max() > 1e-3

def test_bev_aug_moves_the_map():
    # a quarter turn of the lifted world is a quarter turn of the splatted map
    cfg = config(frustum_mode='center')
    m, batch = shaken(cfg), rig(1, 6, cfg)
    m.bev_encode, m.head = nn.Identity(), nn.Identity()
    turn = make_pose([np.sqrt(.5), 0, 0, np.sqrt(.5)], [0, 0, 0]).float()[None]
    with torch.no_grad(): a, b = run_lss(m, batch)['bev_feats'], run_lss(m, {**batch, 'bev_aug': turn})['bev_feats']
    moved = (a.rot90(1, (2, 3))-b).abs().sum(1) > 1e-4
    assert moved.float().mean() < .01, 'x forward goes to y left'      # but for points on the edge of a cell


@pytest.mark.parametrize('n, size, img', [(1, (480, 640), (64, 96)), (4, (1024, 1224), (96, 128)), (7, (900, 1600), (64, 160))])
def test_any_rig(n, size, img):
    cfg = config(img_size=img)
    m, batch = shaken(cfg), clear_rig(1, n, cfg, size=size)
    with torch.no_grad(): out = run_lss(m, batch)
    assert out['depth_logits'].shape == (1, n, 12, *cfg.feat_size) and out['logits'].shape == (1, 1, 48, 48) and out['bev_feats'].shape == (1, 12, 48, 48)
    torch.testing.assert_close(out['logits'], published(m, batch, floor=True)[0], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('kw, says', [(dict(trunk='b7'), 'trunk must be'), (dict(stride=4), 'stride must be'), (dict(img_size=(100, 160)), 'multiples of 32'),
                                      (dict(depth_loss='l1'), 'depth_loss must be'), (dict(grid=BEVGrid(xbound=(-25, 25, 1))), 'multiples of 8')])
def test_bad_configuration(kw, says):
    with pytest.raises(ValueError, match=says): config(**kw)


def slow_depth_target(points, batch, cfg):
    "BEVDepth's way, point by point: depth image, nearest hit, smallest depth of a patch, bin"
    (H, W), (h, w), (d0, d1, step), s = cfg.img_size, cfg.feat_size, cfg.grid.dbound, cfg.stride
    b, n = batch['intrins'].shape[:2]
    out = torch.full((b, n, h, w), -1)
    for i in range(b):
        for c in range(n):
            ego2cam, A = torch.linalg.inv(batch['cam2ego'][i, c].double()), batch['img_aug'][i, c].double()
            img = torch.zeros(H, W, dtype=torch.float64)
            for p in points[i][:, :3].double():
                x = ego2cam[:3, :3] @ p+ego2cam[:3, 3]
                if x[2] <= 0: continue
                uvw = batch['intrins'][i, c].double() @ x
                u, v = (A[:2, :2] @ (uvw[:2]/uvw[2])+A[:2, 3]).round().long().tolist()
                if 0 <= u < W and 0 <= v < H and d0 <= x[2] < d1 and (img[v, u] == 0 or x[2] < img[v, u]): img[v, u] = x[2]
            for y in range(h):
                for z in range(w):
                    patch = img[y*s:(y+1)*s, z*s:(z+1)*s]
                    if (patch > 0).any(): out[i, c, y, z] = int(((patch[patch > 0].min()-(d0-step))/step).floor())-1
    return out

@pytest.mark.parametrize('stride', [8, 16])
def test_depth_target(stride):
    cfg = config(stride=stride)
    batch = rig(2, 3, cfg)
    g = torch.Generator().manual_seed(1)
    points = [torch.rand(300, 4, generator=g)*torch.tensor([60, 60, 6, 1])-torch.tensor([30, 30, 2, 0]), torch.zeros(0, 4)]
    got, want = depth_target(points, batch, cfg), slow_depth_target(points, batch, cfg)
    assert (want >= 0).sum() > 30 and (want[1] == -1).all()
    assert (got != want).sum() <= 1                                   # float32 may round a point to the next pixel or bin

def test_depth_target_rounding():
    one = dict(intrins=torch.tensor([[[[100., 0, 80], [0, 100, 32], [0, 0, 1]]]]), cam2ego=torch.eye(4)[None, None], img_aug=torch.eye(4)[None, None])
    def bins(d, **kw): return depth_target([torch.tensor([[0, 0, d]])], one, config(**kw)).max().item()
    assert [bins(d) for d in (1.9, 2.1, 3.9, 4.1, 25.9, 26.1)] == [-1, 0, 0, 1, 11, -1]
    assert [bins(d, depth_rounding='nearest') for d in (2.1, 2.9, 3.1, 4.9)] == [0, 0, 1, 1]

def test_depth_loss_is_bevdepths():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 12, 4, 5), torch.randint(-1, 12, (2, 3, 4, 5))
    # the spec: one-hot rows, rows without a hit all zero, summed BCE of softmax probabilities over max(1, foreground)
    onehot = F.one_hot(target+1, 13)[..., 1:].flatten(0, 3).float()
    p = logits.permute(0, 1, 3, 4, 2).flatten(0, 3).softmax(-1)
    fg = onehot.max(1).values > 0
    want = F.binary_cross_entropy(p[fg], onehot[fg], reduction='none').sum()/max(1, fg.sum())
    torch.testing.assert_close(depth_loss(logits, target), want)
    ce = -(p[fg]*onehot[fg]).sum(1).log().mean()
    torch.testing.assert_close(depth_loss(logits, target, kind='ce'), ce)
    assert depth_loss(logits, torch.full_like(target, -1)).item() == 0

def test_depth_loss_survives_certainty():
    logits = torch.zeros(1, 1, 12, 1, 1); logits[:, :, 3] = 1e4; logits.requires_grad_()
    loss = depth_loss(logits, torch.tensor([[[[5]]]])); loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.fixture(scope='module')
def batch(toy_root):
    data = DrivingData(toy_root)
    cfg = config()
    ds = SampleDataset(data, data.sample_tokens(), img_aug=ImgAug(out_size=cfg.img_size), grid=cfg.grid)
    return collate_samples([ds[0], ds[5]])

@pytest.mark.parametrize('kw', [dict(depth_weight=0), dict(seg_weight=0)], ids=['segmentation alone', 'depth alone'])
def test_each_loss_reaches_the_trunk(batch, kw):
    cfg = config(**kw)
    m = shaken(cfg).train()
    losses = lss_loss(run_lss(m, batch), batch, cfg)
    losses['loss'].backward()
    assert set(losses) == {'loss', 'seg' if 'depth_weight' in kw else 'depth'}      # a weight of zero switches a loss off
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in m.cam_encode.trunk.stem.parameters())
    assert (m.head.weight.grad is None) == ('seg_weight' in kw)

def test_weights_scale_and_zero_is_refused(batch):
    cfg = config()
    with torch.no_grad():
        out = run_lss(shaken(cfg), batch)
        a, b = lss_loss(out, batch, cfg), lss_loss(out, batch, replace(cfg, seg_weight=2., depth_weight=1.5))
    torch.testing.assert_close((b['seg'], b['depth']), (2*a['seg'], a['depth']/2))
    torch.testing.assert_close(a['loss'], a['seg']+a['depth'])
    with pytest.raises(ValueError, match='nothing to learn'): lss_loss(out, batch, replace(cfg, seg_weight=0., depth_weight=0.))

def test_seg_loss_by_hand():
    logits, mask = torch.tensor([[[[0., 0.]]]]), torch.tensor([[[[1., 0.]]]])
    assert seg_loss(logits, mask, pos_weight=3.).item() == pytest.approx((3*np.log(2)+np.log(2))/2)

def test_iou_is_a_ratio_of_sums(batch):
    # sample 0: 1 of 3 cells; sample 1: 4 of 4; together 5/7, and not the mean of 1/3 and 1
    class Fake(nn.Module):
        def __init__(self): super().__init__(); self.cfg, self.w, self.i = config(), nn.Parameter(torch.zeros(1)), 0
        def forward(self, imgs, *_): x = preds[self.i]; self.i += 1; return dict(logits=x[None, None]*2-1, depth_logits=torch.zeros(1, imgs.shape[1], 12, *self.cfg.feat_size))
    preds, masks = torch.zeros(2, 48, 48), torch.zeros(2, 48, 48)
    preds[0, 0, :2] = 1; masks[0, 0, 1:3] = 1; preds[1, 5, :4] = masks[1, 5, :4] = 1
    one = {k: v[:1] for k, v in batch.items()}
    got = eval_lss(Fake().train(), [{**one, 'bev_mask': m[None, None]} for m in masks])
    assert got['iou'] == pytest.approx(5/7) and got['n_samples'] == 2 and got['depth_mae'] > 0
    with pytest.raises(ValueError, match='no sample'): eval_lss(Fake(), [])


def test_another_bev_encoder(batch):
    # the map encoder can be replaced without touching anything else
    cfg = config()
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(cfg.cam_channels, cfg.bev_channels, 3, padding=1)
        def forward(self, bev): return self.conv(bev)
    m = LiftSplat(cfg, bev_encode=Plain())
    losses = lss_loss(run_lss(m, batch), batch, cfg); losses['loss'].backward()
    assert m.bev_encode.conv.weight.grad.abs().sum() > 0 and not any('stage' in k for k in m.state_dict())

def test_another_camera_encoder(batch):
    cfg = config()
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 12+8, 16, 16)
        def forward(self, imgs): x = self.conv(imgs); return x[:, :12], x[:, 12:]
    assert run_lss(LiftSplat(cfg, cam_encode=Flat()), batch)['logits'].shape == (2, 1, 48, 48)

def test_a_checkpoint_knows_how_its_images_were_cut(tmp_path):
    cfg = config()
    m, aug = shaken(cfg), ImgAug(out_size=cfg.img_size, crop_bottom=(.2, .3), flip=False)
    save_atomic(dict(model={**{f'lss.{k}': v for k, v in m.state_dict().items()}, 'company.w': torch.ones(1)}, config=plain(dict(lss=cfg, recipe=dict(img_aug=aug)))), tmp_path/'m.pt')
    again = load_lss(tmp_path/'m.pt')
    assert again.img_aug == aug and again.cfg == cfg and not again.training
    batch = rig(1, 2, cfg)
    with torch.no_grad(): torch.testing.assert_close(run_lss(again, batch)['logits'], run_lss(m, batch)['logits'])
    save_atomic(dict(model={}, config=dict(metric={})), tmp_path/'other.pt')
    with pytest.raises(ValueError, match='not an LSS checkpoint: it holds metric'): load_lss(tmp_path/'other.pt')

def test_pretrained_b0_says_what_to_do_offline(monkeypatch):
    import efficientnet_pytorch
    def refuse(*a, **k): raise OSError('no network')
    monkeypatch.setattr(efficientnet_pytorch.EfficientNet, 'from_pretrained', refuse)
    with pytest.raises(OSError, match="could not be downloaded.*pretrained=False, or trunk='lite0'"): LiftSplat(config(pretrained=True))
