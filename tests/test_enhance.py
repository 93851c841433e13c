"Random linear enhancement: the published draws, no NaN on empty crops, never in place, and the guards"
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bev_reid.enhance import (GREY, MRLE, RLE, RRLE, ColourJitter, Enhance, RandomErasing, RandomGrey, _lowest, draw_boxes, enhance, light_channels, mix_channels,
                              scale_boxes, steps_of)
from bev_reid.fit import from_plain, plain

root = Path(__file__).resolve().parents[1]
def gen(seed=0): return torch.Generator().manual_seed(seed)
def noise(*shape, seed=9): return torch.rand(*shape, generator=gen(seed))
ALL = {'mrle': MRLE(p=1), 'rrle': RRLE(p=1), 'rle': RLE(MRLE(p=1), RRLE(p=1)), 'grey': RandomGrey(p=1), 'erasing': RandomErasing(p=1), 'jitter': ColourJitter(p=1)}

# -- mixing
def test_mix_by_hand():
    x, w = noise(2, 5, 3, 6, 7), noise(2, 5, 3, seed=1)
    want = (x*w[..., None, None]).sum(2, keepdim=True).expand_as(x)
    torch.testing.assert_close(mix_channels(x, w), want); torch.testing.assert_close(mix_channels(x[0, 0], w[0, 0]), want[0, 0])
    one_hot = torch.eye(3)[1].expand(2, 5, 3)
    assert torch.equal(mix_channels(x, one_hot)[:, :, 0], x[:, :, 1])

def test_weights_are_those_of_the_published_code():
    "Beta draws made to add up to 1: the statistics measured on it, not those of a Dirichlet"
    w = MRLE().weights(400_000, 3, np.random.default_rng(0))
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
    assert w.mean(0) == pytest.approx(1/3, abs=.003) and w.std() == pytest.approx(.268, abs=.003)
    assert (w.max(1) > .9).mean() == pytest.approx(.133, abs=.004) and ((w > .28) & (w < .39)).all(1).mean() == pytest.approx(.063, abs=.004)
    for beta, high, even in ((1., .006, .062), (.2, .206, .073)):
        v = MRLE(beta=beta).weights(200_000, 3, np.random.default_rng(1))
        assert (v.max(1) > .9).mean() == pytest.approx(high, abs=.005) and ((v > .28) & (v < .39)).all(1).mean() == pytest.approx(even, abs=.005)
    assert np.isfinite(MRLE(beta=1e-3).weights(1000, 3, np.random.default_rng(0))).all()      # all three draws may round to zero

def test_mrle_changes_its_share_and_leaves_grey_alone():
    x = noise(2000, 3, 6, 6); out = MRLE()(x, generator=gen())
    changed = (out != x).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(.5, abs=.04)
    assert (out[changed].std(1) < 1e-6).all() and torch.equal(out[~changed], x[~changed])      # three equal bands, or untouched
    assert out.min() >= 0 and out.max() <= 1
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(MRLE(p=1)(grey, generator=gen()), grey.contiguous())            # no change of an infrared image

# -- rectangles
def test_scale_boxes_multiplies_where_they_overlap():
    x = noise(3, 2, 8, 8); boxes = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 0, 6, 4], [2, 0, 0, 8, 8]]); gains = torch.tensor([[.5, 2.], [.1, 1.], [0., 3.]])
    want = x.clone(); want[0, :, 1:4, 2:6] *= gains[0].view(2, 1, 1); want[0, :, 2:8, 0:4] *= gains[1].view(2, 1, 1); want[2] *= gains[2].view(2, 1, 1)
    assert torch.equal(scale_boxes(x, boxes, gains), want) and torch.equal(scale_boxes(x[:1, None], boxes[:2], gains[:2])[:, 0], want[:1])
    with pytest.raises(ValueError, match='3 boxes, but gains for 2'): scale_boxes(x, boxes, gains[:2])

def test_boxes_lie_inside_and_have_their_sizes():
    b, ok = draw_boxes((200, 50), (96, 60), np.random.default_rng(0)); b = b[ok]
    assert (b >= 0).all() and (b[:, 0]+b[:, 2] <= 96).all() and (b[:, 1]+b[:, 3] <= 60).all() and (b[:, 2:] > 0).all()
    assert (b[:, 0]+b[:, 2] == 96).any() and (b[:, 1] == 0).any()                              # both edges are reached
    square, ok = draw_boxes((20_000,), (1000, 1000), np.random.default_rng(0), scale=(.02, .1)); area, r = square[ok, 2]*square[ok, 3]/1e6, square[ok, 2]/square[ok, 3]
    assert ok.all() and area.min() == pytest.approx(.02, abs=1e-3) and area.max() == pytest.approx(.1, abs=1e-3) and area.mean() == pytest.approx(.06, abs=.001)
    assert r.mean() == pytest.approx(1.82, abs=.02)                                            # uniform: tall ones are more common
    square, ok = draw_boxes((20_000,), (1000, 1000), np.random.default_rng(0), scale=(.02, .1), log_ratio=True)
    assert np.log(square[ok, 2]/square[ok, 3]).mean() == pytest.approx(0, abs=.02)

@pytest.mark.parametrize('seed', range(20))
def test_the_lowest_gain_needs_no_mask(seed):
    g = np.random.default_rng(seed); n = int(g.integers(1, 8))
    b, ok = draw_boxes((n,), (20, 24), g, scale=(.05, .5)); b = b[ok]
    if not len(b): return
    gains = np.exp(g.normal(size=(len(b), 3))); t, l, h, w = b[-1]
    mask = scale_boxes(torch.ones(1, 3, 20, 24, dtype=torch.float64), torch.tensor([[0, *r] for r in b.tolist()]), torch.tensor(gains))
    assert _lowest([tuple(r) for r in b.tolist()], gains.tolist()) == pytest.approx(mask[0, :, t:t+h, l:l+w].min().item(), rel=1e-12)

def counts(x):
    out, boxes, gains = RRLE(p=1).place(x, generator=gen(1))
    n = boxes[:, 0].bincount(minlength=len(x)).float()
    return n, (out != x).any(1).float().mean().item(), boxes, gains, out

def test_rrle_has_the_published_statistics():
    "1.7 rectangles on a noisy image (median 1, p95 4), 2.2 and up to 7 on a dark one, 30 to 36 % of the area"
    n, area, *_ = counts(noise(1500, 3, 32, 32))
    assert n.mean() == pytest.approx(1.7, abs=.12) and n.median() == 1 and n.quantile(.95) <= 4 and .26 < area < .37
    dark, darea, *_ = counts(.3*noise(1500, 3, 32, 32))
    assert 1.9 < dark.mean() < 2.6 and dark.max() >= 5 and darea > area

def test_rrle_stops_as_the_published_code_does():
    "Restated: the mask of gains goes below a tenth with the last rectangle, and not before"
    x = noise(200, 3, 24, 24); n, _, boxes, gains, out = counts(x)
    torch.testing.assert_close(scale_boxes(x, boxes, gains), out)
    for i in range(200):
        mine = boxes[:, 0] == i; M = torch.ones(1, 3, 24, 24)
        for k, (b, g) in enumerate(zip(boxes[mine], gains[mine])):
            assert M.min() >= .1
            before = scale_boxes(x[i:i+1]*M, torch.zeros(0, 5).long(), torch.zeros(0, 3))
            M = scale_boxes(M, torch.tensor([[0, *b[1:].tolist()]]), g[None])
            t, l, h, w = b[1:].tolist()
            assert (g*before[0, :, t:t+h, l:l+w].amax((1, 2)) <= 1+1e-5).all()               # the new maximum is a draw of a Beta
        assert M.min() < .1

def test_the_new_maximum_of_a_rectangle_is_a_beta_draw():
    x = .2+.5*noise(4000, 1, 16, 16); out, boxes, gains = RRLE(p=1, min_gain=10.).place(x, generator=gen(2))   # one rectangle each
    top = torch.stack([out[i, 0, t:t+h, l:l+w].max() for i, t, l, h, w in boxes.tolist()])
    assert len(boxes) == 4000 and top.mean() == pytest.approx(.5, abs=.02) and top.var() == pytest.approx(.25/1.8, abs=.006) and top.max() <= 1   # Beta(.4, .4)

# -- guards
@pytest.mark.parametrize('kind', ['one channel', 'half', 'all', 'sparse', 'speck'])
def test_empty_crops_stay_finite(kind):
    x = noise(200, 3, 96, 96)
    if kind == 'one channel': x[:, 1] = 0
    if kind == 'half': x[:, :, 48:] = 0
    if kind == 'all': x[:] = 0
    if kind == 'sparse': x *= torch.rand(200, 1, 96, 96, generator=gen(3)) < .002
    if kind == 'speck': x = x*0+1e-12
    for f in ALL.values():
        out = f(x, generator=gen(4))
        assert out.isfinite().all() and out.max() <= 1+1e-6 and (f is ALL['jitter'] or out.min() >= 0)
    out, boxes, gains = RRLE(p=1).place(x, generator=gen(4))
    assert gains.isfinite().all() and boxes[:, 0].bincount(minlength=200).max() <= 100
    if kind == 'one channel': assert (gains[:, 1] == 1).all() and (out[:, 1] == 0).all() and (boxes[:, 0].unique().numel() == 200)
    if kind == 'all': assert torch.equal(out, x) and (gains == 1).all() and boxes[:, 0].bincount().min() > 50      # they count as placed

def test_signed_values_are_refused_unless_asked_for():
    x = torch.randn(50, 4, 12, 12, generator=gen())
    with pytest.raises(ValueError, match='feature gain'): RRLE(p=1)(x)
    out, boxes, gains = RRLE(p=1, signed=True).place(x, generator=gen())
    assert (gains >= 0).all() and torch.equal(out.sign()*(out != 0), x.sign()*(out != 0)) and out.abs().max() <= x.abs().max()+1
    assert RRLE(p=0)(x).equal(x)                                                              # nothing is done, nothing is asked

@pytest.mark.parametrize('name', ALL)
def test_never_in_place_and_the_same_from_the_same_generator(name):
    f, x = ALL[name], noise(6, 3, 20, 20); keep = x.clone()
    a, b, c = f(x, generator=gen(1)), f(x, generator=gen(1)), f(x, generator=gen(2))
    assert torch.equal(x, keep) and torch.equal(a, b) and (name == 'grey' or not torch.equal(a, c)) and a.data_ptr() != x.data_ptr() and a.shape == x.shape and a.dtype == x.dtype
    torch.manual_seed(3); d = f(x); torch.manual_seed(3); assert torch.equal(d, f(x))          # the global generator, which the training loop seeds
    none = type(f)(p=0)(x) if name != 'rle' else RLE(MRLE(p=0), RRLE(p=0))(x)
    assert torch.equal(none, keep) and none.data_ptr() != x.data_ptr()

@pytest.mark.parametrize('name', ALL)
def test_shapes(name):
    f, x = ALL[name], noise(2, 6, 3, 12, 16)
    assert f(x).shape == x.shape and f(x[0, 0]).shape == x.shape[2:] and f(x[:0]).shape == (0, 6, 3, 12, 16)
    torch.testing.assert_close(f(x, generator=gen()), f(x.flatten(0, 1), generator=gen()).view_as(x))     # one draw per camera
    one = f(x[:1, :1].expand(2, 6, -1, -1, -1), generator=gen()).flatten(0, 1)
    if name != 'grey': assert len({tuple(v.flatten().tolist()) for v in one}) > 8                                 # each of the twelve has its own
    assert f(x.transpose(-1, -2)).shape == (2, 6, 3, 16, 12)                                   # not contiguous
    with pytest.raises(ValueError, match='shape'): f(x[0, 0, 0])

def test_gradients_and_half_precision():
    x = noise(4, 3, 16, 16).requires_grad_()
    for name, f in ALL.items():
        x.grad = None; f(x, generator=gen()).sum().backward(); assert x.grad.isfinite().all() and x.grad.abs().sum() > 0, name
    out, boxes, gains = RRLE(p=1).place(x, generator=gen())
    x.grad = None; out.sum().backward()
    torch.testing.assert_close(x.grad, scale_boxes(torch.ones(4, 3, 16, 16), boxes, gains))    # the gradient is the gain
    torch.testing.assert_close(out.detach(), RRLE(p=1)(x.detach(), generator=gen()))           # whether NumPy or PyTorch does it
    assert ALL['rle'](x.detach().bfloat16(), generator=gen()).isfinite().all()

# -- relatives
def test_erasing_grey_and_jitter():
    x = .1+.8*noise(1000, 3, 24, 24)
    out = RandomErasing(value=(0., .5, 1.))(x, generator=gen()); gone = (out[:, 0] == 0)
    assert gone.flatten(1).any(1).float().mean() == pytest.approx(.5, abs=.05) and (out[:, 1][gone] == .5).all() and (out[:, 2][gone] == 1).all()
    assert gone.float().mean() == pytest.approx(.5*.2, abs=.02)
    torch.testing.assert_close(RandomGrey(p=1)(x)[:, 2], (x*torch.tensor(GREY)[:, None, None]).sum(1))
    bright = ColourJitter(p=1, amount=(.4, 0, 0, 0))(.5*x, generator=gen()).mean((1, 2, 3))/(.5*x).mean((1, 2, 3))
    assert bright.min() == pytest.approx(.6, abs=.01) and bright.max() == pytest.approx(1.4, abs=.01)
    flat = ColourJitter(p=1, amount=(0, .4, 0, 0))(x, generator=gen()); lum = lambda v: (v*torch.tensor(GREY)[:, None, None]).sum(1)
    torch.testing.assert_close(lum(flat).mean((1, 2)), lum(x).mean((1, 2)), atol=.02, rtol=0)       # contrast keeps the mean
    hue = ColourJitter(p=1, amount=(0, 0, 0, .5))(.4+.05*(x-.5), generator=gen())
    torch.testing.assert_close(lum(hue), lum(.4+.05*(x-.5)), atol=2e-3, rtol=0)                     # hue and saturation keep the brightness
    assert RandomErasing(p=1)(torch.ones(1, 2, 1, 1)).sum() == 2                                    # no rectangle fits: nothing goes

# -- as a configuration
NAMES = ['bev.0', 'rgb.red', 'rgb.green', 'rgb.blue', 'rgb.seen', 'rgb_lidar.red', 'rgb_lidar.green', 'rgb_lidar.blue', 'rgb_lidar.seen', 'lidar.height_max', 'lidar.height_mean', 'lidar.intensity', 'lidar.density']

def test_only_light_is_changed():
    assert light_channels(NAMES) == ([(1, 2, 3), (5, 6, 7)], [1, 2, 3, 5, 6, 7, 11])
    x = noise(40, 13, 16, 16)
    for kind, may in (('mrle', [1, 2, 3, 5, 6, 7]), ('rrle', [1, 2, 3, 5, 6, 7, 11]), ('rle', [1, 2, 3, 5, 6, 7, 11]), ('grey', [1, 2, 3, 5, 6, 7]), ('jitter', [1, 2, 3, 5, 6, 7])):
        out = enhance(x, Enhance(kind, p=1), names=NAMES, generator=gen()); changed = (out != x).flatten(2).any(2).any(0)
        assert changed.nonzero().flatten().tolist() == may, kind
    lidar = enhance(x[:, 9:], Enhance('rle', p=1), names=NAMES[9:], generator=gen())                # intensity alone: no mixing, gains
    assert (lidar != x[:, 9:]).flatten(2).any(2).any(0).tolist() == [False, False, True, False]

def test_configuration_errors_and_round_trip():
    with pytest.raises(ValueError, match="'mrle' needs red, green and blue in the crops, and these carry lidar.height_max"): steps_of(Enhance('mrle'), NAMES[9:])
    with pytest.raises(ValueError, match='feature_gain'): steps_of(Enhance('rrle'), ['bev.0'])
    for kw, word in ((dict(kind='rlee'), "'rlee'"), (dict(kind='grey+x'), "'x'"), (dict(p=2), 'share'), (dict(mix_beta=0), 'positive'), (dict(area=(.5, .1)), 'area')):
        with pytest.raises(ValueError, match=word): Enhance(**kw)
    cfg = Enhance('grey+erasing', log_ratio=True); assert from_plain(Enhance, json.loads(json.dumps(plain(cfg)))) == cfg
    assert not Enhance().active and [type(s).__name__ for s in steps_of(cfg)] == ['RandomGrey', 'RandomErasing']
    x = noise(2, 64, 8, 8)-.5; names = [f'bev.{i}' for i in range(64)]
    out = enhance(x, Enhance('rrle', p=1, feature_gain=True), names=names, generator=gen())
    assert not torch.equal(out, x) and out.isfinite().all()
    assert enhance(x, Enhance(), names=names) is x

# -- the study
def test_the_study_runs_and_goes_on(tmp_path):
    "Every row is there, a second call computes nothing, and an unfinished one goes on"
    script, out = root/'nbs'/'_tools'/'results_rle.py', tmp_path/'rle.json'
    def go(): return subprocess.run([sys.executable, script, '--quick', '--out', out], capture_output=True, text=True, cwd=root)
    r = go(); assert r.returncode == 0, r.stderr[-2000:]
    got = json.loads(out.read_text())
    assert 'SYNTHETIC' in got['title'] and len(got['rows']) == 2*8*3 and len(got['runs']) == 2*8*2 and len(got['differences']) == 2*4*3*4
    assert {'training', 'method', 'against', 'condition', 'rank1_diff', 'rank1_diff_std', 'better', 'n_seeds'} == set(got['differences'][0])
    dropped = dict(list(got['runs'].items())[:-3]); out.write_text(json.dumps(dict(got, runs=dropped)))
    r = go(); assert r.returncode == 0 and r.stdout.count('|') == 6 and json.loads(out.read_text()) == got   # the three, with the same numbers

def test_the_kept_results_are_those_of_the_study():
    path = root/'results'/'rle.json'
    if not path.exists(): pytest.skip('the study has not been run')
    got = json.loads(path.read_text())
    assert len(got['study']['seeds']) >= 5 and len(got['runs']) == 2*8*len(got['study']['seeds']) and 'SYNTHETIC' in got['title']
    for r in got['rows']:
        v = [got['runs'][f"{r['training']}|{r['method']}|{s}"][r['condition']]['rank1'] for s in got['study']['seeds']]
        assert r['rank1'] == pytest.approx(np.mean(v)) and r['rank1_std'] == pytest.approx(np.std(v, ddof=1))
