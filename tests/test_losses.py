"The losses by name: formulas restated in NumPy, precision, memory, monitors, options and resume"
import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import bev_reid.losses as L
import bev_reid.metric as M
from bev_reid.fit import Batches, FitConfig, fit, load_checkpoint
from bev_reid.losses import (LOSSES, CosineSoftmax, arcface, batch_monitors, check_loss_args, circle, cosface, first_turn, loss_options, magnet_loss, metric_loss,
                             multi_similarity, subcenter_arcface, supcon, triplet_loss)
from bev_reid.metric import MetricConfig, MetricModel, load_metric, save_metric

pytest.importorskip('pytorch_metric_learning', reason="needs pip install 'bev_reid[train]'")
TINY = MetricConfig(in_channels=3, crop_size=(9, 7), widths=(4, 8), blocks=1, embedding_dim=6, dropout=0.)
OWN, CLASSES, PAIRS = ('cosine-softmax', 'triplet', 'magnet'), ('arcface', 'cosface', 'subcenter-arcface'), ('circle', 'multi-similarity', 'supcon')

def draw(n=24, ids=6, dim=16, seed=0, spread=1.):
    g = torch.Generator().manual_seed(seed); y = torch.arange(n) % ids
    return F.normalize(spread*torch.randn(ids, dim, generator=g)[y]+torch.randn(n, dim, generator=g), dim=1), y
@pytest.fixture
def batch(): return draw()
def cosines(a, b): a, b = (v.detach().double().numpy() for v in (a, b)); return a/np.linalg.norm(a, axis=1, keepdims=True) @ (b/np.linalg.norm(b, axis=1, keepdims=True)).T
def lse(x): m = np.max(x); return m+np.log(np.exp(np.asarray(x)-m).sum())
def ce(z, y): return np.mean([lse(r)-r[k] for r, k in zip(z, y)])

# -- the three of the original, where tests/test_metric.py leaves off
def test_defaults_are_those_of_the_original():
    assert loss_options('cosine-softmax') == dict(scale_init=None, weight_std=1e-3, scale_penalty=.05, label_smoothing=0.)
    assert loss_options('magnet') == dict(margin=1., eps=1e-4) and loss_options('triplet') == {}
    assert metric_loss('cosine-softmax', 9, 4, scale_init=0).scale.item() == pytest.approx(np.log(2))

def test_scale_penalty_is_on_the_raw_scale(batch):
    for s, p in ((2., .05), (-1., .3)):
        out = metric_loss('cosine-softmax', 6, 16, scale_init=s, scale_penalty=p)(*batch)
        assert (out['loss']-out['ce']).item() == pytest.approx(p*s*s, rel=1e-4)

def test_label_smoothing_restated(batch):
    head = CosineSoftmax(6, 16, label_smoothing=.3, scale_penalty=0., weight_std=1.)
    z = head.scale.item()*cosines(batch[0], head.weight); t = .7*np.eye(6)[batch[1]]+.3/6
    assert head(*batch)['loss'].item() == pytest.approx(np.mean([(t[i]*(lse(z[i])-z[i])).sum() for i in range(24)]), rel=1e-5)

@pytest.mark.parametrize('labels', [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 1, 1]])
def test_single_views_restated(labels):
    "A vehicle seen once is its own positive (triplet), and its own mean (magnet)"
    e, y = torch.eye(4, 5)+.1, torch.tensor(labels); e = F.normalize(e+torch.arange(20).view(4, 5)/30, dim=1); x, own = e.double().numpy(), np.array(labels)
    d = np.sqrt(((x[:, None]-x[None])**2).sum(-1)+1e-5); same = own[:, None] == own
    np.testing.assert_allclose(triplet_loss(e, y), np.log1p(np.exp([d[i][same[i]].max()-d[i][~same[i]].min() for i in range(4)])), rtol=1e-4)
    mu = np.stack([x[own == c].mean(0) for c in np.unique(own)]); k = np.searchsorted(np.unique(own), own)
    d2 = ((x[:, None]-mu[None])**2).sum(-1); var = d2[range(4), k].sum()/3
    z = -d2/(2*(var+1e-4))-np.eye(len(mu))[k]; z = np.exp(z-z.max(1, keepdims=True)); a = z[range(4), k]; b = z.sum(1)-a
    np.testing.assert_allclose(magnet_loss(e, y), np.maximum(0, -np.log(1e-4+a/(1e-4+b))), rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('std,first', [(1e-3, 48.7), (1., .06)])
def test_first_turn_of_the_spec(std, first): assert first_turn(std)[0] == pytest.approx(first, rel=.2)

# -- those of the library, restated
@pytest.mark.parametrize('kw', [{}, dict(margin=10., scale=7.), dict(margin=100., scale=3.)])
def test_arcface_restated(batch, kw):
    head = arcface(6, 16, weight_std=.5, **kw); m, s = np.deg2rad(kw.get('margin', 28.6)), kw.get('scale', 64.)
    c = cosines(batch[0], head.loss.W.T); a = np.arccos(c)
    own = np.where(a <= np.pi-m, np.cos(a+m), c-m*np.sin(m))                               # beyond 180 degrees it goes on falling
    assert head(*batch)['loss'].item() == pytest.approx(ce(s*np.where(np.eye(6)[batch[1]] > 0, own, c), batch[1]), rel=1e-4)

@pytest.mark.parametrize('kw', [{}, dict(margin=.1, scale=7.)])
def test_cosface_restated(batch, kw):
    head = cosface(6, 16, **kw); c = cosines(batch[0], head.loss.W.T)
    z = kw.get('scale', 64.)*(c-kw.get('margin', .35)*np.eye(6)[batch[1]])
    assert head(*batch)['loss'].item() == pytest.approx(ce(z, batch[1]), rel=1e-4)

@pytest.mark.parametrize('k', [1, 2, 3])
def test_subcenter_arcface_restated(batch, k):
    head = subcenter_arcface(6, 16, sub_centers=k, scale=20.); assert head.loss.W.shape == (16, 6*k)
    c = cosines(batch[0], head.loss.W.T).reshape(24, 6, k).max(2); own = np.cos(np.arccos(c)+np.deg2rad(28.6))
    out = head(*batch)
    assert out['loss'].item() == pytest.approx(ce(20*np.where(np.eye(6)[batch[1]] > 0, own, c), batch[1]), rel=1e-4)
    assert out['accuracy'].item() == pytest.approx((c.argmax(1) == batch[1].numpy()).mean())

def rows(fn, emb, y, ref=None, ref_y=None):
    "`fn(positives, negatives)` of each anchor; without a reference nobody is compared with oneself"
    s = cosines(emb, emb if ref is None else ref); y, r = y.numpy(), (y if ref_y is None else ref_y).numpy()
    return np.array([fn(s[i][(r == y[i]) & ((ref is not None) | (np.arange(len(r)) != i))], s[i][r != y[i]]) for i in range(len(y))])
def circle_of(m, g): return lambda p, n: np.logaddexp(0, lse(g*np.maximum(n+m, 0)*(n-m))+lse(-g*np.maximum(1+m-p, 0)*(p-1+m)))
def supcon_of(t): return lambda p, n: np.mean(lse(np.concatenate([p, n])/t)-p/t)
def multi_similarity_of(a=2., b=50., base=.5, eps=.1):
    def fn(p, n):
        p, n = p[p-eps < n.max()], n[n+eps > p.min()]
        return np.log1p(np.exp(-a*(p-base)).sum())/a+np.log1p(np.exp(b*(n-base)).sum())/b
    return fn

@pytest.mark.parametrize('kw', [{}, dict(margin=.25, scale=128.)])
def test_circle_restated(batch, kw): assert circle(16, **kw)(*batch)['loss'].item() == pytest.approx(rows(circle_of(kw.get('margin', .4), kw.get('scale', 80.)), *batch).mean(), rel=1e-4)
@pytest.mark.parametrize('t', [.1, .5])
def test_supcon_restated(batch, t): assert supcon(16, temperature=t)(*batch)['loss'].item() == pytest.approx(rows(supcon_of(t), *batch).mean(), rel=1e-4)
@pytest.mark.parametrize('kw', [{}, dict(alpha=4., beta=20., base=.3, epsilon=.5), dict(epsilon=0.)])
def test_multi_similarity_restated(batch, kw):
    want = rows(multi_similarity_of(**{dict(alpha='a', beta='b', base='base', epsilon='eps')[k]: v for k, v in kw.items()}), *batch).mean()
    assert multi_similarity(16, **kw)(*batch)['loss'].item() == pytest.approx(want, rel=1e-4)

# -- numbers
@pytest.mark.parametrize('name', LOSSES)
def test_float32_under_autocast(batch, name):
    "Class vectors stay float32 for good, the loss is float32, and bfloat16 embeddings get a gradient"
    torch.manual_seed(0); head = metric_loss(name, 6, 16); kinds = {k: v.dtype for k, v in head.state_dict().items()}
    emb = batch[0].bfloat16().requires_grad_(); full = copy.deepcopy(head)(emb.detach().float(), batch[1])['loss']
    with torch.autocast('cpu', dtype=torch.bfloat16): out = head(emb, batch[1])
    out['loss'].backward()
    assert out['loss'].dtype == torch.float32 and out['loss'].item() == pytest.approx(full.item(), rel=1e-6)
    assert {k: v.dtype for k, v in head.state_dict().items()} == kinds and all(p.dtype == torch.float32 for p in head.parameters())
    assert emb.grad.dtype == torch.bfloat16 and emb.grad.isfinite().all()

def test_the_library_alone_falls_into_the_trap(batch):
    "Else the test above would show nothing"
    from pytorch_metric_learning.losses import ArcFaceLoss
    theirs = ArcFaceLoss(6, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16): theirs(batch[0].bfloat16(), batch[1])
    assert theirs.W.dtype == torch.bfloat16

@pytest.mark.parametrize('name', CLASSES)
def test_on_the_class_vector_the_gradient_is_finite(name):
    torch.manual_seed(0); head = metric_loss(name, 6, 2, weight_std=1.)
    for sign in (1, -1):
        emb = (sign*F.normalize(head.loss.W.detach().T, dim=1)[::head.loss.W.shape[1]//6]).clone().requires_grad_()
        head.zero_grad(); head(emb, torch.arange(6))['loss'].backward()
        assert emb.grad.isfinite().all() and head.loss.W.grad.isfinite().all()

@pytest.mark.parametrize('name', CLASSES)
def test_class_vectors_start_small(name):
    w = metric_loss(name, 300, 64).loss.W; assert w.abs().max() <= 2e-3 and w.std().item() == pytest.approx(.88e-3, rel=.05)
    assert metric_loss(name, 300, 64, weight_std=1.).loss.W.std().item() == pytest.approx(.88, rel=.05)
    with pytest.raises(ValueError, match='n_ids'): metric_loss(name, 1, 4)

# -- monitors
@pytest.mark.parametrize('name', LOSSES)
def test_monitors_of_every_loss(name):
    torch.manual_seed(0); model = MetricModel(TINY, 4, loss=name); x = torch.randn(8, 3, 9, 7)
    out = model(dict(crops=x, label=torch.arange(8) % 4)); keys = {'loss', 'pos_dist', 'neg_dist', 'batch_rank1', 'emb_norm'}
    keys |= {'scale'} if name not in ('triplet', 'magnet', 'multi-similarity') else set()
    keys |= {'accuracy'} if name in ('cosine-softmax', *CLASSES) else set()
    assert keys <= out.keys() and all(v.ndim == 0 and v.isfinite() for v in out.values()) and [k for k, v in out.items() if v.requires_grad] == ['loss']
    assert out['emb_norm'].item() == pytest.approx(model.net.raw(x).norm(dim=1).mean().item(), rel=1e-4) and abs(out['emb_norm'].item()-1) > .01
    torch.testing.assert_close(model.net(x), F.normalize(model.net.raw(x), dim=1))

def test_scales_and_accuracy(batch):
    assert [metric_loss(n, 6, 16)(*batch)['scale'].item() for n in (*CLASSES, 'circle', 'supcon')] == pytest.approx([64, 64, 64, 80, 10])
    for n in ('arcface', 'cosface'):
        head = metric_loss(n, 6, 16); assert head(*batch)['accuracy'].item() == pytest.approx((cosines(batch[0], head.loss.W.T).argmax(1) == batch[1].numpy()).mean())

# -- memory
@pytest.mark.parametrize('name,of', [('circle', circle_of(.4, 80.)), ('supcon', supcon_of(.1)), ('multi-similarity', multi_similarity_of())])
def test_memory_restated(name, of):
    head, (a, y), (b, z) = metric_loss(name, 6, 16, memory_size=48), draw(seed=1), draw(seed=2)
    assert head(a, y)['loss'].item() == pytest.approx(rows(of, a, y).mean(), rel=1e-4)       # alone in its memory
    s, both = cosines(b, torch.cat([a, b])), np.concatenate([y, z])
    want = [of(s[i][(both == z[i].item()) & (np.arange(48) != 24+i)], s[i][both != z[i].item()]) for i in range(24)]
    assert head(b, z)['loss'].item() == pytest.approx(np.mean(want), rel=1e-4)

def test_the_oldest_leaves_first():
    head = supcon(16, memory_size=40); parts = [draw(seed=i) for i in range(4)]
    for e, y in parts: head(e, y)
    kept = torch.cat([e for e, _ in parts])[-40:]; at = head.at[0].item()
    torch.testing.assert_close(torch.roll(head.loss.embedding_memory, -at, 0), kept); assert head.at.tolist() == [96 % 40, 1]

def test_memory_rules(batch):
    head = circle(16, memory_size=24)
    assert not any(p.requires_grad for p in head.parameters()) and not head.loss.embedding_memory.requires_grad
    head.eval(); want = circle(16)(*batch)['loss']
    assert torch.equal(head(*batch)['loss'], want) and head.at.tolist() == [0, 0]             # a validation leaves no trace
    head.train(); head(*batch); assert head.at.tolist() == [0, 1]
    with pytest.raises(ValueError, match='memory_size 8 is smaller than a batch of 24.*memory_size>=24'): circle(16, memory_size=8)(*batch)
    for name in (*OWN, *CLASSES): assert 'memory_size' not in loss_options(name)
    for name in PAIRS: assert loss_options(name)['memory_size'] == 0 and not list(metric_loss(name, 6).state_dict())

def test_memory_travels_in_the_state(batch):
    head, other = supcon(16, memory_size=64), supcon(16, memory_size=64); head(*batch); head(*draw(seed=3))
    state = head.state_dict(); assert all(isinstance(v, torch.Tensor) for v in state.values())
    other.load_state_dict(state)
    for s in (4, 5): assert torch.equal(head(*draw(seed=s))['loss'], other(*draw(seed=s))['loss'])

def test_memory_changes_what_is_learned(batch):
    a, b = (copy.deepcopy(batch[0]).requires_grad_() for _ in range(2))
    one, two = supcon(16), supcon(16, memory_size=48); two(*draw(seed=5))
    one(a, batch[1])['loss'].backward(); two(b, batch[1])['loss'].backward(); assert not torch.allclose(a.grad, b.grad, atol=1e-4)

# -- by name, from a configuration
def test_names():
    assert LOSSES == (*OWN, *CLASSES, *PAIRS)
    assert type(metric_loss('subcenter_arcface', 4, 4)) is type(metric_loss('subcenter-arcface', 4, 4)) and loss_options('multi_similarity') == loss_options('multi-similarity')
    for k in L.__all__: assert not hasattr(M, k) or getattr(M, k) is getattr(L, k)
    for k in ('LOSSES', 'CosineSoftmax', 'balanced_scale', 'first_turn', 'triplet_loss', 'magnet_loss', 'batch_monitors', 'BatchLoss', 'metric_loss'): assert getattr(M, k) is getattr(L, k)

@pytest.mark.parametrize('name', LOSSES)
def test_every_option_counts(name, batch):
    "Another value of each option, the state the same, gives another loss"
    change = dict(scale_init=1., weight_std=.5, scale_penalty=.5, label_smoothing=.3, margin=.7, eps=.1, scale=5., sub_centers=2, alpha=5., beta=9., base=.1, epsilon=1., temperature=1., memory_size=24)
    for k in loss_options(name):
        if k == 'memory_size': continue
        torch.manual_seed(0); a = metric_loss(name, 6, 16)(*batch)['loss']
        check_loss_args(name, {k: change[k]})
        torch.manual_seed(0); b = metric_loss(name, 6, 16, **{k: change[k]})(*batch)['loss']
        if k != 'weight_std': assert a.item() != b.item(), k

def test_wrong_options_are_named():
    with pytest.raises(ValueError, match='cosine-sofmax.*cosine-softmax, triplet'): check_loss_args('cosine-sofmax', {})
    with pytest.raises(ValueError, match="the loss arcface has no gamma; it has margin, scale, weight_std"): check_loss_args('arcface', dict(gamma=3))
    with pytest.raises(ValueError, match="triplet has no margin; it has nothing to set"): check_loss_args('triplet', dict(margin=3))
    with pytest.raises(TypeError, match="the loss circle has no gamma; it has margin, scale, memory_size"): metric_loss('circle', 5, gamma=3)
    for name, args, word in (('arcface', dict(scale=0), 'positive'), ('arcface', dict(margin=-1.), '0 or more'), ('arcface', dict(margin='a'), "a number, like 28.6; got 'a'"), ('supcon', dict(memory_size=1.5), 'whole number'),
                             ('supcon', dict(temperature=True), 'number'), ('supcon', dict(temperature=float('nan')), 'number'), ('subcenter-arcface', dict(sub_centers=0), 'positive'), ('circle', [1], 'mapping')):
        with pytest.raises(ValueError, match=word): check_loss_args(name, args)
    for name, args in (('cosine-softmax', dict(scale_init=None)), ('cosine-softmax', dict(scale_init=-2)), ('cosine-softmax', dict(scale_penalty=0)), ('multi-similarity', dict(base=-.2)), ('circle', {})): check_loss_args(name, args)

def test_without_the_library():
    "The three of its own work; the others say what to install"
    code = '''
import sys; sys.modules['pytorch_metric_learning'] = None
from bev_reid.losses import LOSSES, check_loss_args, metric_loss
for n in LOSSES:
    check_loss_args(n, {})
    try: metric_loss(n, 4, 4); print(n, 'works')
    except ImportError as e: print(n, e)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:3] == [f'{n} works' for n in OWN] and len(out) == 9 and all("pip install 'bev_reid[train]'" in l for l in out[3:])

def test_importing_does_not_load_the_library():
    subprocess.run([sys.executable, '-c', "import sys, bev_reid.metric; assert 'pytorch_metric_learning' not in sys.modules"], check=True)

# -- checkpoints
@pytest.mark.parametrize('name', LOSSES)
def test_the_head_is_saved_and_restored(name, tmp_path, batch):
    torch.manual_seed(0); model = MetricModel(TINY, 4, loss=name)
    ck = load_metric(save_metric(tmp_path/'m.pt', model.net, model.head)); head = metric_loss(name, 4, 6); head.load_state_dict(ck.head)
    e, y = draw(12, 4, 6); assert torch.equal(head(e, y)['loss'], model.head(e, y)['loss'])

class Crops(torch.utils.data.Dataset):
    def __init__(self): g = torch.Generator().manual_seed(0); self.x = torch.randn(24, 3, 9, 7, generator=g)
    def __len__(self): return 24
    def __getitem__(self, i): return dict(crops=self.x[i], label=i % 4)

@pytest.mark.parametrize('name,options', [*((n, {}) for n in LOSSES), *((n, dict(memory_size=20)) for n in PAIRS)])
def test_exact_resume(name, options, tmp_path):
    "Killed in the middle and called again, with class vectors, scale, sub-centres and memory: the same weights to the bit"
    batches = Batches(Crops(), lambda epoch: np.random.default_rng(epoch).permutation(24).reshape(3, 8).tolist())
    def run(folder, steps):
        torch.manual_seed(0); model = MetricModel(TINY, 4, loss=name, **options)
        fit(model, lambda m, b: m(b), batches, run_dir=tmp_path/folder, cfg=FitConfig(max_steps=steps, lr=1e-2), config=dict(metric=TINY), device='cpu')
        return load_checkpoint(tmp_path/folder)
    run('cut', 4); a, b = run('cut', 7), run('straight', 7)
    assert a['step'] == b['step'] == 7 and a['model'].keys() == b['model'].keys() and ('head.at' in a['model']) == bool(options)
    for k, v in a['model'].items(): assert torch.equal(v, b['model'][k]), k
    assert load_metric(tmp_path/'cut').head.keys() == MetricModel(TINY, 4, loss=name, **options).head.state_dict().keys()

@pytest.mark.parametrize('name', PAIRS)
def test_it_learns_with_a_memory(name):
    torch.manual_seed(0); patterns = torch.randn(12, 3, 9, 7); y = torch.arange(12).repeat_interleave(4)
    model = MetricModel(TINY, 12, loss=name, memory_size=96); opt = torch.optim.Adam(model.param_groups(), lr=1e-2)
    for _ in range(40): out = model(dict(crops=patterns[y]+.7*torch.randn(48, 3, 9, 7), label=y)); opt.zero_grad(); out['loss'].backward(); opt.step()
    with torch.no_grad(): assert batch_monitors(model.eval().net(patterns[y]+.7*torch.randn(48, 3, 9, 7)), y)['batch_rank1'] > .9
