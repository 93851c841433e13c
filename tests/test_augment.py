"Each augmentation of crops: exact where it can be, right on average, never in place"
import numpy as np
import pytest
import torch
from bev_reid.augment import CropAug, augment_crops, draw_aug, erase_crops, mirror_crops, move_crops, noise_crops
from bev_reid.crops import CropConfig, crop_bev
from bev_reid.fit import from_plain, plain
from bev_reid.geometry import BEVGrid

ALL = CropAug(flip=.5, shift=1., turn=15., erase=.5, noise=.2)
def gen(seed=0): return torch.Generator().manual_seed(seed)
@pytest.fixture
def crops(): return torch.randn(6, 3, 12, 12, generator=gen(9))
def still(n): return torch.zeros(n, 2), torch.zeros(n)

# -- where things go
def test_mirror_is_that_of_a_mirrored_vehicle():
    "Left and right of the crop change places; which is which comes from the crops' own convention"
    grid, cfg = BEVGrid(xbound=(-8, 8, .5), ybound=(-8, 8, .5)), CropConfig(extent=8., size=16)
    bev = torch.zeros(1, 1, *grid.nx[:2]); bev[0, 0, 18, 20] = 1                            # ahead and left of the ego
    box = torch.tensor([[0., 0, 0, 2, 4, 2, 0]])
    crop = crop_bev(bev, box, torch.zeros(1).long(), grid=grid, cfg=cfg)
    other = crop_bev(bev.flip(-1), box, torch.zeros(1).long(), grid=grid, cfg=cfg)
    torch.testing.assert_close(mirror_crops(crop, torch.tensor([True])), other, atol=1e-5, rtol=0)
    assert not torch.allclose(crop, other, atol=1e-2)

def test_mirror_takes_the_chosen_alone_and_twice_is_nothing(crops):
    which = torch.tensor([1, 0, 1, 0, 0, 1]).bool(); out = mirror_crops(crops, which)
    assert torch.equal(out[~which], crops[~which]) and torch.equal(out[which], crops[which].flip(-1)) and torch.equal(mirror_crops(out, which), crops)

@pytest.mark.parametrize('ahead,left,deg', [(1.5, 0, 0), (0, -2., 0), (0, 0, 25.), (0, 0, -90.), (1., .5, 40.)])
def test_moves_are_those_of_the_box(ahead, left, deg):
    "A crop around a displaced box equals the move of the crop around the true one, up to the interpolation"
    grid, cfg = BEVGrid(xbound=(-16, 16, .25), ybound=(-16, 16, .25)), CropConfig(extent=12., size=48)
    x, y = (torch.arange(n)*grid.dx[0]+grid.bx[0] for n in grid.nx[:2])
    def blob(x0, y0, s): return torch.exp(-((x[:, None]-x0)**2+(y[None]-y0)**2)/(2*s*s))
    bev = torch.stack([blob(2, .5, .8), blob(-1, 1.5, .6), blob(.5, -2, 1.)])[None]
    def at(x, y, deg): return crop_bev(bev, torch.tensor([[x, y, 0, 2, 4, 2, np.deg2rad(deg)]], dtype=torch.float32), torch.zeros(1).long(), grid=grid, cfg=cfg)
    a = np.deg2rad(-deg)                                                                    # content turned by deg and moved by t = box turned by -deg, moved by -R(-deg) t
    moved = move_crops(at(0, 0, 0), torch.tensor([[ahead, left]]), torch.tensor([deg]), extent=12.)
    box = at(-(np.cos(a)*ahead-np.sin(a)*left), -(np.sin(a)*ahead+np.cos(a)*left), -deg)
    torch.testing.assert_close(moved[..., 12:-12, 12:-12], box[..., 12:-12, 12:-12], atol=.02, rtol=0)

def test_whole_cells_shift_exactly_and_edges_come_in_as_zero(crops):
    out = move_crops(crops, torch.tensor([[2., -1]]).expand(6, 2), torch.zeros(6), extent=12.)   # two rows up, one column right
    torch.testing.assert_close(out[..., :10, 1:], crops[..., 2:, :-1], atol=1e-5, rtol=0)
    assert out[..., 10:, :].abs().max() < 1e-5 and out[..., 0].abs().max() < 1e-5
    torch.testing.assert_close(move_crops(crops, *still(6), extent=12.), crops, atol=1e-5, rtol=0)

def test_moves_do_not_depend_on_the_resolution():
    a = torch.zeros(1, 1, 10, 10); a[..., 4:6, 4:6] = 1; b = a.repeat_interleave(4, 2).repeat_interleave(4, 3)
    s, t = torch.tensor([[2., 3.]]), torch.zeros(1)
    def centre(x): r, c = torch.meshgrid(*[torch.linspace(.5, n-.5, n)/n for n in x.shape[-2:]], indexing='ij'); return torch.stack([(x[0, 0]*v).sum()/x.sum() for v in (r, c)])
    for x in (a, b): torch.testing.assert_close(centre(move_crops(x, s, t, extent=20.)), torch.tensor([.5-2/20, .5-3/20]), atol=1e-4, rtol=0)

def test_crops_that_are_not_square():
    x = torch.zeros(1, 1, 6, 10); x[0, 0, 2, 7] = 1
    assert (mirror_crops(x, torch.tensor([True]))[0, 0] == 1).nonzero().tolist() == [[2, 2]]
    assert augment_crops(x, ALL, extent=10., generator=gen()).shape == x.shape

# -- erasing and noise
def test_erase_restated():
    x, rects = torch.ones(4, 2, 20, 20), torch.tensor([[0., 0, 1, 1], [.5, .25, .25, .5], [.9, .9, .1, .1], [.3, .3, 0, .5]])
    want = np.ones((4, 20, 20)); want[0] = 0; want[1, 10:15, 5:15] = 0; want[2, 18:, 18:] = 0
    np.testing.assert_array_equal(erase_crops(x, rects)[:, 0], want); np.testing.assert_array_equal(erase_crops(x, rects)[:, 1], want)

def test_erasing_kills_what_is_not_finite():
    x = torch.full((1, 1, 4, 4), torch.inf); assert (erase_crops(x, torch.tensor([[0., 0, 1, 1]])) == 0).all()

def test_noise_follows_each_channel():
    x = torch.randn(64, 3, 16, 16, generator=gen())*torch.tensor([1., 100, 0]).view(3, 1, 1)
    d = noise_crops(x, .3, generator=gen(1))-x
    torch.testing.assert_close(d.std((0, 2, 3))[:2], torch.tensor([.3, 30.]), rtol=.03, atol=0); assert (d[:, 2] == 0).all()
    assert d.mean((0, 2, 3)).abs().max() < .5
    assert noise_crops(x[:1, :, :1, :1], .3, generator=gen()).isfinite().all()               # a single cell has no spread

# -- draws
def test_statistics_of_the_draws():
    cfg = CropAug(flip=.3, shift=2., turn=30., erase=.4, erase_area=(.05, .15), erase_aspect=(.5, 2.))
    d = draw_aug(100_000, cfg, generator=gen())
    assert d['which'].float().mean().item() == pytest.approx(.3, abs=.01)
    for v, top in ((d['shift'][:, 0], 2), (d['shift'][:, 1], 2), (d['turn'], 30)):           # uniform: mean 0, variance a^2/3
        assert v.abs().max() <= top and v.abs().max() > .99*top and abs(v.mean()) < .02*top and v.var().item() == pytest.approx(top**2/3, rel=.02)
    hit = d['rects'][:, 2] > 0; r = d['rects'][hit]
    assert hit.float().mean().item() == pytest.approx(.4, abs=.01)
    area, aspect = r[:, 2]*r[:, 3], r[:, 2]/r[:, 3]
    assert area.min() > .0499 and area.max() < .1501 and area.mean().item() == pytest.approx(.1, abs=.002)
    assert aspect.min() > .499 and aspect.max() < 2.001 and aspect.log().mean().abs() < .01
    assert (r[:, :2] >= 0).all() and (r[:, :2]+r[:, 2:] <= 1+1e-6).all() and (r[:, :2]+r[:, 2:]/2).mean(0).sub(.5).abs().max() < .01
    c = torch.corrcoef(torch.stack([d['which'].float(), *d['shift'].T, d['turn'], hit.float()])).fill_diagonal_(0)
    assert c.abs().max() < .02                                                               # independent of each other

def test_one_switch_leaves_the_others_alone():
    a, b = draw_aug(50, CropAug(shift=1.), generator=gen()), draw_aug(50, CropAug(shift=1., erase=1., flip=1.), generator=gen())
    assert torch.equal(a['shift'], b['shift']) and not a['rects'][:, 2:].any() and not a['which'].any() and b['which'].all()

@pytest.mark.parametrize('cfg', [ALL, CropAug(flip=.5), CropAug(shift=1.), CropAug(turn=20.), CropAug(erase=1.), CropAug(noise=.5)])
def test_seeded_and_never_in_place(crops, cfg):
    before = crops.clone(); a, b, c = (augment_crops(crops, cfg, extent=12., generator=gen(s)) for s in (1, 1, 2))
    assert torch.equal(crops, before) and torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, crops) and a.dtype == crops.dtype and a.is_contiguous()
    assert a.data_ptr() != crops.data_ptr()

def test_off_by_default(crops):
    state = torch.get_rng_state(); g = gen(); s = g.get_state()
    assert augment_crops(crops, CropAug(), extent=12., generator=g) is crops and torch.equal(g.get_state(), s) and torch.equal(torch.get_rng_state(), state)
    assert not CropAug().active and not CropAug(erase_area=(.1, .2)).active and ALL.active
    assert augment_crops(crops[:0], ALL, extent=12.).shape == (0, 3, 12, 12)

def test_the_global_generator_is_left_alone(crops):
    state = torch.get_rng_state(); augment_crops(crops, ALL, extent=12., generator=gen()); assert torch.equal(torch.get_rng_state(), state)

def test_crops_learn_through_it(crops):
    "Differentiable, so that joint training can use it"
    x = crops.clone().requires_grad_(); augment_crops(x, ALL, extent=12., generator=gen()).sum().backward(); assert x.grad.isfinite().all() and x.grad.abs().sum() > 0

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(crops, dtype): assert augment_crops(crops.to(dtype), ALL, extent=12., generator=gen()).dtype == dtype

def test_config():
    for kw, word in ((dict(flip=1.5), 'flip'), (dict(erase=-.1), 'erase'), (dict(shift=-1.), 'shift'), (dict(turn=float('nan')), 'turn'), (dict(noise=float('inf')), 'noise'),
                     (dict(erase_area=(.3, .1)), 'erase_area'), (dict(erase_area=(.3, 1.1)), 'erase_area'), (dict(erase_aspect=(0, 1)), 'erase_aspect'), (dict(erase_area=(.1,)), 'erase_area')):
        with pytest.raises(ValueError, match=word): CropAug(**kw)
    assert from_plain(CropAug, plain(ALL)) == ALL
    with pytest.raises(ValueError, match='mirror'): from_plain(CropAug, dict(mirror=.5))
