"Camera against LiDAR, colour against infrared: batches, losses, training, and the protocols of SYSU-MM01 and RegDB on small folders"
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bev_reid.crops import CropConfig
from bev_reid.cross_modal import (CrossModalNet, CrossModalRecipe, ModalSet, PairedCrops, batch_hard, bev_modalities, embed_side, evaluate_cross_modal, evaluate_regdb, evaluate_sysu,
                                  hetero_centre, image_set, load_cross_modal, paired_order, rank_of_people, regdb_sets, sysu_gallery, sysu_numbers, sysu_sets, train_cross_modal)
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, build_dataset
from bev_reid.enhance import Enhance
from bev_reid.evaluate import junk_mask
from bev_reid.fit import checkpoints, from_plain, plain
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from bev_reid.metric import MetricConfig, MetricModel

SMALL = replace(LSSConfig.recipe('toy'), trunk='b0', pretrained=False, img_size=(64, 128), grid=BEVGrid(xbound=(-32, 32, 1), ybound=(-32, 32, 1), dbound=(2, 34, 4)),
                up_channels=8, cam_channels=8, bev_channels=8, bev_widths=(8, 8, 8), bev_up=8)
TINY = CrossModalRecipe.recipe('toy', max_steps=4); TINY = replace(TINY, p=4, k=2, net=replace(TINY.net, widths=(8, 8), embedding_dim=16), fit=replace(TINY.fit, checkpoint_every=2, log_every=1))

@pytest.fixture(scope='module')
def reid(toy_root, tmp_path_factory):
    torch.manual_seed(0)
    return build_dataset(LiftSplat(SMALL).eval(), DrivingData(toy_root), tmp_path_factory.mktemp('cross')/'reid', cfg=DatasetConfig(crop=CropConfig(extent=12, size=16, clip=True), features=('rgb_lidar', 'lidar')))

# -- batches
def test_paired_batches():
    a, b = np.repeat(np.arange(10), 5), np.repeat(np.arange(4, 14), 3)                          # 4 to 9 are in both
    order = paired_order(a, b, p=3, k=4, seed=1); both = np.r_[a, b]
    seen = []
    for batch in order(0):
        batch = np.array(batch); assert len(batch) == 24 and (batch[:12] < 50).all() and (batch[12:] >= 50).all()
        assert both[batch[:12]].tolist() == both[batch[12:]].tolist()                            # the same identities, in the same order
        assert all(len(set(batch[:12].reshape(3, 4)[i])) == 4 for i in range(3))                  # five views: no repeats of four
        seen += both[batch[:12:4]].tolist()
    assert sorted(seen) == [4, 5, 6, 7, 8, 9] and order(0) == order(0) and order(0) != order(1)
    assert len(paired_order(a, b, p=100)(0)) == 1                                                # never more than there are
    with pytest.raises(ValueError, match='both modalities show, got 1: 2 stand in the first and 3'): paired_order(['x', 'y'], ['x', 'u', 'v'])

# -- losses
def plain_batch_hard(e, y, margin, m=None):
    out = []
    for i in range(len(e)):
        ok = [j for j in range(len(e)) if j != i and (m is None or m[j] != m[i])]
        pos = [float((e[i]-e[j]).norm()) for j in ok if y[j] == y[i]]; neg = [float((e[i]-e[j]).norm()) for j in ok if y[j] != y[i]]
        out.append(max(0, max(pos)-min(neg)+margin) if pos and neg else 0.)
    return torch.tensor(out)

@pytest.mark.parametrize('seed', range(4))
def test_losses_restated(seed):
    g = torch.Generator().manual_seed(seed); e = F.normalize(torch.randn(24, 8, generator=g), dim=1); y = torch.randint(0, 5, (24,), generator=g); m = torch.randint(0, 2, (24,), generator=g)
    torch.testing.assert_close(batch_hard(e, y), plain_batch_hard(e, y, .3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch_hard(e, y, margin=1., modality=m), plain_batch_hard(e, y, 1., m), atol=1e-5, rtol=0)
    keys = sorted({(int(a), int(b)) for a, b in zip(y, m)}); centres = torch.stack([e[(y == a) & (m == b)].mean(0) for a, b in keys])
    torch.testing.assert_close(hetero_centre(e, y, m), plain_batch_hard(centres, [a for a, _ in keys], .3), atol=1e-5, rtol=0)

def test_losses_at_the_edges():
    e = torch.zeros(6, 4, requires_grad=True); y = torch.tensor([0, 0, 1, 1, 2, 2]); m = torch.tensor([0, 1]*3)
    for loss in (batch_hard(e, y), batch_hard(e, y, modality=m), hetero_centre(e, y, m)):          # collapsed: the margin, and finite gradients
        torch.testing.assert_close(loss.detach(), torch.full_like(loss.detach(), .3)); e.grad = None; loss.sum().backward(); assert e.grad.isfinite().all()
    assert batch_hard(e, torch.zeros(6).long()).sum() == 0 and batch_hard(e, torch.arange(6)).sum() == 0   # no negative, no positive
    assert batch_hard(e, y, modality=torch.zeros(6).long()).sum() == 0                            # one modality missing
    far = F.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 4).float(); assert batch_hard(far, y).sum() == 0 and hetero_centre(far, y, m).sum() == 0

# -- network
def test_stems_are_apart_and_the_trunk_is_shared():
    torch.manual_seed(0); net = CrossModalNet(MetricConfig.toy(crop_size=(16, 16), dropout=0.), (3, 3)); x = torch.rand(4, 3, 16, 16)
    assert not torch.allclose(net.eval()(x, 0), net(x, 1)) and torch.allclose(net(x, 1).norm(dim=1), torch.ones(4), atol=1e-5)
    net(x, 0).sum().backward()
    assert all(p.grad is None for p in net.stems[1].parameters()) and any(p.grad is not None for p in net.stems[0].parameters()) and net.trunk[0].body[0].weight.grad is not None
    one = sum(p.numel() for p in MetricModel(replace(net.cfg, in_channels=3), 2).net.parameters()); assert sum(p.numel() for p in net.parameters()) == one+sum(p.numel() for p in net.stems[0].parameters())
    net.train(); torch.manual_seed(1); together = net.raw([x, 1-x]); assert together.shape == (8, 64)
    with pytest.raises(ValueError, match=r'modality 1 have shape \(4, 3, 8, 8\)'): net.raw([x, x[..., :8, :8]])

# -- training
def test_training_goes_on_and_ends_with_the_same_weights(reid, tmp_path):
    sides = bev_modalities(reid, ('rgb_lidar', 'lidar'))
    assert train_cross_modal(sides, tmp_path/'a', recipe=TINY, device='cpu')['step'] == 4
    half = replace(TINY, fit=replace(TINY.fit, max_steps=4))
    train_cross_modal(sides, tmp_path/'b', recipe=half, device='cpu')
    for c in checkpoints(tmp_path/'b')[1:]: c.unlink()                                            # killed after two steps
    (tmp_path/'b'/'done.json').unlink(); train_cross_modal(sides, tmp_path/'b', recipe=half, device='cpu')
    a, b = (load_cross_modal(tmp_path/k)[0].state_dict() for k in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a) and train_cross_modal(sides, tmp_path/'a', recipe=TINY, device='cpu')['resumed']
    with pytest.raises(ValueError, match='recipe.triplet: batch-hard there, across now'): train_cross_modal(sides, tmp_path/'a', recipe=replace(TINY, triplet='across', fit=replace(TINY.fit, max_steps=6)), device='cpu')

@pytest.mark.parametrize('triplet', ['across', 'hetero-centre', 'none'])
def test_every_loss_trains(reid, tmp_path, triplet):
    out = train_cross_modal(bev_modalities(reid, (('rgb_lidar.red', 'rgb_lidar.green', 'rgb_lidar.blue'), ('lidar',))), tmp_path/'x', recipe=replace(TINY, triplet=triplet, enhance=Enhance('rle'), fit=replace(TINY.fit, max_steps=1)), device='cpu')
    assert out['step'] == 1
    r = CrossModalRecipe(triplet='across'); assert from_plain(CrossModalRecipe, plain(r)) == r
    with pytest.raises(ValueError, match='triplet must be one of'): CrossModalRecipe(triplet='soft')

def test_it_learns_what_two_modalities_share(tmp_path):
    "A second modality that shows one band times a gain per row, new vehicles: far better than chance, both ways"
    g = torch.Generator().manual_seed(0); base, gain = torch.rand(48, 3, 8, 1, generator=g), .4+torch.rand(8, 1, generator=g)
    def side(name, who, infrared, seed):
        h = torch.Generator().manual_seed(seed); ids = np.repeat(who, 6); x = base[ids].expand(-1, -1, -1, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = (x[:, 1:2]*gain.repeat_interleave(2, 0)).expand(-1, 3, -1, -1) if infrared else x
        x = (x*(.8+.2*torch.rand(len(ids), 1, 1, 1, generator=h))+.03*torch.randn(x.shape, generator=h)).clamp(0, 1).numpy()
        return ModalSet(name, ids, lambda i: x[np.asarray(i)].astype(np.float32), 3)
    r = replace(TINY, p=8, k=3, net=replace(TINY.net, widths=(16, 32)), fit=replace(TINY.fit, max_steps=120, lr=5e-3, checkpoint_every=100, log_every=20))
    train_cross_modal((side('a', np.arange(32), False, 1), side('b', np.arange(32), True, 2)), tmp_path/'r', recipe=r, device='cpu')
    net = load_cross_modal(tmp_path/'r')[0]; test = side('a', np.arange(32, 48), False, 3), side('b', np.arange(32, 48), True, 4)
    a, b = (embed_side(net, s, m) for m, s in enumerate(test)); d = 1-a @ b.T
    for dist, q, k in ((d, test[0], test[1]), (d.T, test[1], test[0])): assert (k.ids[dist.argmin(1)] == q.ids).mean() > .35       # chance is 1/16

def test_enhancement_changes_light_alone_and_is_repeatable(reid):
    sides = bev_modalities(reid, ('rgb_lidar', 'lidar')); labels = [np.zeros(len(s), int) for s in sides]; n = len(sides[0]); idx = [0, 1, 2, n, n+1, n+2]
    def crops(kind, epoch=0): d = PairedCrops(sides, labels, replace(TINY, flip=False, enhance=Enhance(kind, p=1))); d.set_epoch(epoch); return d.__getitems__(idx)['crops']
    (a, b), (c, d) = crops(''), crops('rle')
    assert torch.equal(a[:, 3], c[:, 3]) and not torch.equal(a[:, :3], c[:, :3]) and torch.equal(b[:, [0, 1, 3]], d[:, [0, 1, 3]])
    assert all(torch.equal(x, y) for x, y in zip(crops('rle'), crops('rle'))) and not torch.equal(crops('rle', 1)[0], c)
    assert torch.equal(crops('mrle')[1], b)                                                       # nothing to mix in LiDAR
    with pytest.raises(ValueError, match='needs'): PairedCrops((sides[1], sides[1]), labels, replace(TINY, enhance=Enhance('grey')))

# -- BEV protocol
def test_bev_protocol(reid, tmp_path):
    train_cross_modal(bev_modalities(reid, ('rgb_lidar', 'lidar')), tmp_path/'r', recipe=TINY, device='cpu')
    res = evaluate_cross_modal(tmp_path/'r', reid, min_gap=.5)
    assert [r['direction'] for r in res['rows']] == ['rgb_lidar -> lidar', 'lidar -> rgb_lidar', 'rgb_lidar -> rgb_lidar', 'lidar -> lidar'] and res['settings']['ids_seen_in_training'] == 0
    s = bev_modalities(reid, ('rgb_lidar', 'lidar'), split='test')[0]; (a, b), junk = res['embeddings'], junk_mask(s.obs, s.obs, min_gap=.5)
    d = np.where(junk, np.inf, 1-a.astype(float) @ b.T.astype(float)); same = s.ids[:, None] == s.ids[None]; valid = (same & ~junk).any(1)
    hit = np.where(same, d, np.inf).min(1) < np.where(same, np.inf, d).min(1)
    assert res['rows'][0]['rank1'] == pytest.approx(hit[valid].mean(), abs=.02) and res['rows'][0]['n_queries'] == valid.sum()
    from bev_reid.metric import CosineMetricNet, load_metric, save_metric
    with pytest.raises(ValueError, match='measured with --protocol cross-modality'): load_metric(tmp_path/'r')
    with pytest.raises(ValueError, match='no cross-modal network'):
        load_cross_modal(save_metric(tmp_path/'m.pt', CosineMetricNet(MetricConfig.toy())))

def test_a_modality_is_missing(reid):
    with pytest.raises(ValueError, match="hold rgb_lidar, lidar, no 'bev': build a data set with --features bev"): bev_modalities(reid, ('bev', 'lidar'))
    with pytest.raises(ValueError, match='two modalities are needed'): bev_modalities(reid, ('lidar',))
    with pytest.raises(ValueError, match='share'): bev_modalities(reid, ('lidar', 'lidar'))

# -- SYSU-MM01
def person(i, cam, k, infrared):
    g, s = np.random.default_rng(i), np.random.default_rng([i, cam, k]); x = g.uniform(0, 1, (8, 1, 3)).repeat(4, 0).repeat(16, 1)*s.uniform(.8, 1)
    return Image.fromarray((255*(x[..., 1:2].repeat(3, -1) if infrared else x).clip(0, 1)).astype(np.uint8))

@pytest.fixture
def sysu(tmp_path):
    root = tmp_path/'sysu'; (root/'exp').mkdir(parents=True)
    for s, ids in dict(train=(1, 2, 5), val=(9,), test=(3, 4, 6)).items(): (root/'exp'/f'{s}_id.txt').write_text(','.join(map(str, ids)))
    for i in (1, 2, 3, 4, 5, 6, 9):
        for c in range(1, 7):
            if (i, c) == (4, 2): continue                                                         # not everybody passes every camera
            (d := root/f'cam{c}'/f'{i:04d}').mkdir(parents=True)
            for k in range(12 if c == 1 else 3): person(i, c, k, c in (3, 6)).save(d/f'{k+1:04d}.jpg')
    return root

def test_sysu_files(sysu):
    rgb, ir = sysu_sets(sysu, size=(32, 16))
    assert set(rgb.ids) == {1, 2, 5, 9} and set(rgb.cams) == {1, 2, 4, 5} and set(ir.cams) == {3, 6} and len(rgb) == 4*(12+9) and len(ir) == 4*6
    assert rgb.read([0, 1]).shape == (2, 3, 32, 16) and 0 <= rgb.read([0]).min() and rgb.read([0]).max() <= 1
    x = ir.read([0])[0]; assert np.abs(x[0]-x[1]).max() < .05
    rgb, ir = sysu_sets(sysu, split='test', size=(32, 16)); assert set(rgb.ids) == {3, 4, 6} and len(rgb) == 3*21-3

def test_sysu_trials_are_those_of_the_published_code(sysu):
    "Restated: random.seed(trial), then one choice per person and camera in sorted order"
    rgb, _ = sysu_sets(sysu, split='test', size=(32, 16))
    for mode, cams in (('all', (1, 2, 4, 5)), ('indoor', (1, 2))):
        for trial in range(10):
            random.seed(trial); want = []
            for i in (3, 4, 6):
                for c in cams:
                    files = [k for k in range(len(rgb)) if (rgb.ids[k], rgb.cams[k]) == (i, c)]
                    if files: want.append(random.choice(files))
            assert sysu_gallery(rgb.ids, rgb.cams, mode=mode, trial=trial).tolist() == want
    many = sysu_gallery(rgb.ids, rgb.cams, shots=10); per = {(i, c): sum((rgb.ids[many] == i) & (rgb.cams[many] == c)) for i in (3, 4, 6) for c in (1, 2, 4, 5)}
    assert per[3, 1] == 10 and per[3, 2] == 3 and per[4, 2] == 0 and len(set(many.tolist())) == len(many)
    with pytest.raises(ValueError, match='all or indoor'): sysu_gallery(rgb.ids, rgb.cams, mode='outdoor')

def test_sysu_numbers_by_hand():
    "Ranks over people; camera 2 does not count for queries of camera 3"
    g_ids, g_cams = [1, 2, 2, 3], [2, 1, 4, 1]
    d = np.array([[.1, .2, .3, .4], [.1, .2, .3, .4], [.1, .2, .3, .4]])
    got = sysu_numbers(d, [2, 2, 3], g_ids, [6, 3, 6], g_cams, ks=(1, 2, 3))
    assert rank_of_people(d, [2, 2, 3], g_ids).tolist() == [2, 2, 3]                             # for 3, the two images of 2 are one person
    assert (got['rank1'], got['rank2'], got['rank3']) == pytest.approx((1/3, 2/3, 1))
    assert got['mAP'] == pytest.approx(((1/2+2/3)/2+1+1/4)/3) and got['mINP'] == pytest.approx((2/3+1+1/4)/3)
    gone = sysu_numbers(d, [1, 1, 3], g_ids, [3, 6, 6], g_cams); assert gone['n_queries'] == 2    # a query whose only match is left out
    g = np.random.default_rng(0); ids, q = g.integers(0, 12, 60), g.integers(0, 12, 30); D = g.random((30, 60)); junk = g.random((30, 60)) < .2
    def slow(i):
        seen = []
        for k in np.argsort(D[i]):
            if not junk[i, k] and ids[k] not in seen: seen.append(ids[k])
        return seen.index(q[i])+1 if q[i] in seen else 0
    assert rank_of_people(D, q, ids, junk=junk).tolist() == [slow(i) for i in range(30)]
    assert rank_of_people(np.zeros((1, 3)), [5], [4, 5, 6]).tolist() == [3]                       # ties count against

def test_sysu_to_the_end(sysu, tmp_path):
    train_cross_modal(sysu_sets(sysu, size=(32, 16)), tmp_path/'r', recipe=TINY, device='cpu')
    net = load_cross_modal(tmp_path/'r')[0]; assert net.cfg.crop_size == (32, 16)
    for mode in ('all', 'indoor'):
        for shots in (1, 10):
            r = evaluate_sysu(net, sysu, mode=mode, shots=shots)
            assert r['n_trials'] == 10 and len(r['trials']) == 10 and r['n_queries'] == 18 and 0 <= r['rank1'] <= r['rank5'] <= r['rank20'] == 1 and 0 < r['mAP'] <= 1   # fewer than 20 people
    assert evaluate_sysu(net, sysu, trials=2)['trials'][0] == evaluate_sysu(net, sysu, trials=1)['trials'][0]

def test_bad_folders(sysu, tmp_path):
    with pytest.raises(FileNotFoundError, match='exp/train_id.txt'): sysu_sets(tmp_path)
    (sysu/'exp'/'test_id.txt').write_text('3;4')
    with pytest.raises(ValueError, match='separated by commas'): sysu_sets(sysu, split='test')
    (sysu/'exp'/'test_id.txt').write_text('77')
    with pytest.raises(ValueError, match='no colour images'): sysu_sets(sysu, split='test')
    (bad := tmp_path/'bad.jpg').write_bytes(b'x')
    with pytest.raises(ValueError, match='bad.jpg is no readable image'): image_set('x', [bad], [0]).read([0])
    with pytest.raises(FileNotFoundError, match='no split 3'): regdb_sets(tmp_path, 3)

# -- RegDB
@pytest.fixture
def regdb(tmp_path):
    root = tmp_path/'regdb'; (root/'idx').mkdir(parents=True)
    for m, name in enumerate(('Visible', 'Thermal')):
        for i in range(8):
            (root/name/f'p {i}').mkdir(parents=True)                                              # a blank in a path
            for k in range(3): person(20+i, m, k, m == 1).save(root/name/f'p {i}'/f'{k}.bmp')
    for t in (1, 2):
        half = set(np.random.default_rng(t).permutation(8)[:4].tolist())
        for split, ids in (('train', sorted(half)), ('test', sorted(set(range(8))-half))):
            for name in ('Visible', 'Thermal'): (root/'idx'/f'{split}_{name.lower()}_{t}.txt').write_text(''.join(f'{name}/p {i}/{k}.bmp {j}\n' for j, i in enumerate(ids) for k in range(3)))
    return root

def test_regdb_to_the_end(regdb, tmp_path):
    runs = {}
    for t in (1, 2):
        visible, thermal = regdb_sets(regdb, t, size=(32, 16)); assert len(visible) == len(thermal) == 12 and set(visible.ids) == {0, 1, 2, 3}
        train_cross_modal((visible, thermal), tmp_path/f'r{t}', recipe=TINY, device='cpu'); runs[t] = tmp_path/f'r{t}'
    rows = evaluate_regdb(runs, regdb)
    assert [r['direction'] for r in rows] == ['visible -> thermal', 'thermal -> visible'] and all(r['n_trials'] == 2 and 0 <= r['rank1'] <= r['rank20'] == 1 and 'mAP_std' in r for r in rows)
    with pytest.raises(ValueError, match='not trained on split 2 of RegDB.*would stand in the test'): evaluate_regdb({2: runs[1]}, regdb)
    with pytest.raises(ValueError, match='trained on regdb, not on a BEV'): evaluate_cross_modal(runs[1], regdb)
    (regdb/'idx'/'test_visible_1.txt').write_text('Visible/x.bmp one\n')
    with pytest.raises(ValueError, match='a path and a label'): regdb_sets(regdb, 1, split='test')

# -- signatures
def test_shapes_in_signatures_are_true():
    from test_shapes import checked
    checked('''
from bev_reid.enhance import *
x = torch.rand(2, 6, 3, 16, 20)
for f in (MRLE(p=1.), RRLE(p=1.), RLE(), RandomGrey(), RandomErasing(), ColourJitter()): assert f(x).shape == x.shape and f(x[0]).shape == x[0].shape and f(x[0, 0]).shape == (3, 16, 20) and f(x[:0]).shape == (0, 6, 3, 16, 20)
mix_channels(x, torch.rand(2, 6, 3)); mix_channels(x[0, 0], torch.rand(3))
out, boxes, gains = RRLE(p=1.).place(x[0]); scale_boxes(x[0], boxes, gains); scale_boxes(x[0], boxes[:0], gains[:0])
enhance(x, Enhance('rle+erasing')); MRLE().weights(5, 3, np.random.default_rng(0))
from bev_reid.cross_modal import *
from bev_reid.metric import MetricConfig
net = CrossModalNet(MetricConfig.toy(crop_size=(16, 16)), (4, 3)).eval()
assert net(torch.rand(3, 4, 16, 16), 0).shape == (3, 64) and net.raw([torch.rand(2, 4, 16, 16), torch.rand(3, 3, 16, 16)]).shape == (5, 64)
e, y, m = torch.rand(8, 5), torch.arange(8)//2, torch.arange(8) % 2
assert batch_hard(e, y).shape == (8,) and batch_hard(e, y, modality=m).shape == (8,) and hetero_centre(e, y, m).shape == (8,)
assert sysu_numbers(np.random.rand(4, 6), [1, 2, 3, 1], [1, 2, 3, 1, 2, 3], [3, 6, 3, 6], [1, 2, 4, 5, 1, 2])['n_queries'] == 4
side = ModalSet('x', np.arange(5), lambda i: np.zeros((len(i), 4, 16, 16), np.float32), 4)
assert embed_side(net, side, 0, mirror=True).shape == (5, 64)
''', 'enhance', 'cross_modal')
