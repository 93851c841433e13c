"The metric network and its losses against plain restatements"
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bev_reid.fit import Batches, FitConfig, fit, from_plain, plain
from bev_reid.metric import (LOSSES, CosineMetricNet, CosineSoftmax, MetricConfig, MetricModel, balanced_scale, batch_monitors, embed, load_metric,
                             magnet_loss, metric_loss, reindex, save_metric, triplet_loss)

TINY = MetricConfig(in_channels=3, crop_size=(9, 7), widths=(4, 8), blocks=1, embedding_dim=6, dropout=0.)

@pytest.fixture
def batch():
    torch.manual_seed(0)
    return F.normalize(torch.randn(24, 16), dim=1), torch.arange(24) % 6

# -- the head
def restate_softmax(emb, labels, w, s, penalty):
    emb, w = emb.double().numpy(), w.double().numpy()
    z = np.log1p(np.exp(s))*emb @ (w/np.linalg.norm(w, axis=1, keepdims=True)).T
    return np.mean([np.log(np.exp(r-r.max()).sum())+r.max()-r[y] for r, y in zip(z, labels)])+penalty*s*s

@pytest.mark.parametrize('s,penalty', [(0, .05), (3, .05), (-1.5, .2), (25, 0)])
def test_cosine_softmax_restated(batch, s, penalty):
    head = CosineSoftmax(6, 16, scale_init=s, scale_penalty=penalty)
    assert head(*batch)['loss'].item() == pytest.approx(restate_softmax(*batch, head.weight.detach(), s, penalty), rel=1e-5)

def test_cosine_softmax_agrees_with_pytorch_metric_learning(batch):
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    head = CosineSoftmax(6, 16, scale_init=2.)
    theirs = losses.NormalizedSoftmaxLoss(6, 16, temperature=1/head.scale.item()); theirs.W.data = head.weight.data.T.clone()
    assert head(*batch)['ce'].item() == pytest.approx(theirs(*batch).item(), rel=1e-5)

def test_paper_start_is_flat(batch):
    out = CosineSoftmax(6, 16, scale_init=0)(*batch)
    assert out['scale'].item() == pytest.approx(np.log(2)) and out['loss'].item() == pytest.approx(np.log(6), abs=.1)

def test_class_vectors_start_small_and_cut():
    w = CosineSoftmax(500, 128).weight
    assert w.abs().max() <= 2e-3 and w.std().item() == pytest.approx(.88e-3, rel=.02)     # a normal cut at two sigma has 0.88 sigma

@pytest.mark.parametrize('n', [2, 3, 10, 1000, 100000])
def test_balanced_scale(n):
    kappa = F.softplus(torch.tensor(balanced_scale(n), dtype=torch.float64)).item()
    assert 1/(1+(n-1)*np.exp(-kappa)) == pytest.approx(.9)

def test_head_gradients(batch):
    head = CosineSoftmax(6, 16, weight_std=.5).double(); head.train()
    emb = batch[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda e, w, s: F.cross_entropy(F.softplus(s)*F.linear(e, F.normalize(w, dim=1)), batch[1])+.05*s*s, (emb, head.weight, head.s))
    head = CosineSoftmax(6, 16); head(*batch)['loss'].backward()
    assert (head.weight.grad*head.weight).sum(1).abs().max() < 1e-3                        # the size of a class vector does not matter

def test_loss_stays_float32_under_autocast(batch):
    head = CosineSoftmax(6, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = head(*batch); assert out['loss'].dtype == torch.float32 and out['loss'].item() == pytest.approx(head(*batch)['loss'].item())
        emb = CosineMetricNet(TINY).eval()(torch.randn(4, 3, 9, 7)); assert emb.dtype == torch.float32
        assert metric_loss('triplet', 6)(batch[0].bfloat16(), batch[1])['loss'].dtype == torch.float32
    assert head.weight.dtype == torch.float32

def test_labels():
    labels, id_map = reindex(np.array([900, 17, 900, 5]))
    assert labels.tolist() == [2, 1, 2, 0] and id_map == {5: 0, 17: 1, 900: 2} and all(type(k) is int for k in id_map)
    assert reindex(['b', 'a'])[1] == {'a': 0, 'b': 1}
    for ids in ([], ['a', 'a']):
        with pytest.raises(ValueError, match='at least 2 identities'): reindex(ids)

# -- the other losses
def restate_triplet(emb, labels):
    e, out = emb.double().numpy(), []
    for i in range(len(e)):
        d = [np.sqrt(((e[i]-e[j])**2).sum()+1e-5) for j in range(len(e))]
        p, n = max(d[j] for j in range(len(e)) if labels[j] == labels[i]), min([d[j] for j in range(len(e)) if labels[j] != labels[i]], default=1e10)
        out.append(np.log1p(np.exp(p-n)))
    return out

def restate_magnet(emb, labels, margin=1., eps=1e-4):
    e, y, names = emb.double().numpy(), labels.numpy(), np.unique(labels)
    mu = {c: e[y == c].mean(0) for c in names}
    var = sum(((e[i]-mu[y[i]])**2).sum() for i in range(len(e)))/(len(e)-1)
    out = []
    for i in range(len(e)):
        l = {c: -((e[i]-mu[c])**2).sum()/(2*(var+eps))-margin*(c == y[i]) for c in names}; m = max(l.values())
        a, b = np.exp(l[y[i]]-m), sum(np.exp(l[c]-m) for c in names if c != y[i])
        out.append(max(0, -np.log(eps+a/(eps+b))))
    return out

def test_triplet_restated(batch): np.testing.assert_allclose(triplet_loss(*batch), restate_triplet(*batch), rtol=1e-4)
def test_magnet_restated(batch):
    np.testing.assert_allclose(magnet_loss(*batch), restate_magnet(*batch), rtol=1e-4)
    np.testing.assert_allclose(metric_loss('magnet', 6, margin=.3)(*batch)['loss'], np.mean(restate_magnet(*batch, margin=.3)), rtol=1e-4)

def test_triplet_agrees_with_pytorch_metric_learning(batch):
    losses, miners = (pytest.importorskip(f'pytorch_metric_learning.{m}') for m in ('losses', 'miners'))
    theirs = losses.TripletMarginLoss(margin=0, smooth_loss=True)(*batch, miners.BatchHardMiner()(*batch))
    assert triplet_loss(*batch).mean().item() == pytest.approx(theirs.item(), abs=1e-4)

def test_losses_of_pytorch_metric_learning_fit(batch):
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    out = metric_loss(losses.ArcFaceLoss(6, 16), 6, 16)
    out(*batch)['loss'].backward(); assert len(list(out.parameters())) == 1

@pytest.mark.parametrize('labels', [torch.zeros(5).long(), torch.arange(5), torch.tensor([0, 0, 1, 1, 2])])
@pytest.mark.parametrize('name', LOSSES)
def test_degenerate_batches_are_finite(name, labels):
    emb = torch.ones(5, 8, requires_grad=True); unit = F.normalize(emb, dim=1)             # collapsed
    out = metric_loss(name, 5, 8)(unit, labels); out['loss'].backward()
    assert out['loss'].isfinite() and emb.grad.isfinite().all()

def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="'softmax'.*cosine-softmax, triplet, magnet"): metric_loss('softmax', 5)
    with pytest.raises(TypeError, match='mergin'): metric_loss('cosine-softmax', 5, mergin=1)
    with pytest.raises(TypeError, match='mergin'): metric_loss('triplet', 5, mergin=1)
    with pytest.raises(ValueError, match='n_ids'): CosineSoftmax(1)

def test_monitors():
    emb, labels = torch.eye(3)[[0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2])
    out = {k: v.item() for k, v in batch_monitors(emb, labels).items()}
    assert out == dict(pos_dist=0, neg_dist=1, batch_rank1=1)                                # the fifth has no other view
    assert batch_monitors(emb, torch.tensor([0, 1, 0, 1, 2]))['batch_rank1'] == 0
    assert batch_monitors(emb, torch.arange(5))['pos_dist'].isnan()

# -- the network
def test_published_size():
    net = CosineMetricNet(MetricConfig.paper(in_channels=3, crop_size=(128, 64)))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2_800_864
    assert net.fc.in_features == 16*8*128 and sum(isinstance(m, torch.nn.Dropout) for m in net.modules()) == 7

@pytest.mark.parametrize('cfg', [TINY, MetricConfig(), MetricConfig.toy(crop_size=(28, 28)), MetricConfig.paper(crop_size=(31, 1)), MetricConfig(stem_pool=False, final_elu=False, bn_gain=True, crop_size=(5, 40))])
def test_unit_embeddings_of_any_crop_size(cfg):
    torch.manual_seed(0); net = CosineMetricNet(cfg); crops = torch.randn(5, cfg.in_channels, *cfg.crop_size)
    for mode in (True, False):
        emb = net.train(mode)(crops); assert emb.shape == (5, cfg.embedding_dim)
        torch.testing.assert_close(emb.norm(dim=1), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(net(crops[:1]), net(crops)[:1], atol=1e-5, rtol=1e-4)           # a batch of one

def test_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    for init in ('kaiming', 'tf'):
        model = MetricModel(MetricConfig(**{**asdict(TINY), 'init': init}), 4)
        model(dict(crops=torch.randn(16, 3, 9, 7), label=torch.arange(16) % 4))['loss'].backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
        assert not missing

def test_any_scale_of_the_input():
    "BEV features of any scale and offset give the same embedding once the input norm knows them"
    torch.manual_seed(0); net = CosineMetricNet(TINY).train(); x = torch.randn(32, 3, 9, 7)
    a, b = net(x), net(1000*x)
    torch.testing.assert_close(a, b, atol=1e-2, rtol=0)

def test_wrong_crops_and_configs():
    with pytest.raises(ValueError, match=r'\(2, 4, 9, 7\).*\(i, 3, 9, 7\)'): CosineMetricNet(TINY)(torch.randn(2, 4, 9, 7))
    with pytest.raises(ValueError, match='2 crops'): MetricModel(TINY, 3)(dict(crops=torch.randn(1, 3, 9, 7), label=torch.tensor([0])))
    with pytest.raises(ValueError, match='kaimng'): MetricConfig(init='kaimng')
    with pytest.raises(ValueError, match='dropout'): MetricConfig(dropout=1)
    with pytest.raises(ValueError, match='positive'): MetricConfig(widths=(8, 0))
    assert from_plain(MetricConfig, plain(TINY)) == TINY and MetricConfig(widths=[4, 8]).widths == (4, 8)

@pytest.mark.parametrize('loss', LOSSES)
def test_it_learns_what_it_can_see(loss):
    torch.manual_seed(0)
    patterns = torch.randn(12, 3, 9, 7)
    def views(n): y = torch.arange(12).repeat_interleave(n); return patterns[y]+.7*torch.randn(12*n, 3, 9, 7), y
    model = MetricModel(TINY, 12, loss=loss); opt = torch.optim.Adam(model.param_groups(), lr=1e-2)
    for _ in range(40):
        x, y = views(4); out = model(dict(crops=x, label=y)); opt.zero_grad(); out['loss'].backward(); opt.step()
    x, y = views(4)
    assert batch_monitors(embed(model.net, x), y)['batch_rank1'] > .9 and out['pos_dist'] < out['neg_dist']

def test_parameter_groups_are_a_partition():
    model = MetricModel(TINY, 5); decay, rest = model.param_groups()
    assert sorted(id(p) for g in (decay, rest) for p in g['params']) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert 'weight_decay' not in decay and rest['weight_decay'] == 0 and {id(model.head.s), id(model.head.weight)} <= {id(p) for p in rest['params']}

@pytest.mark.parametrize('n', [0, 1, 3, 10])
def test_embed_equals_one_batch(n):
    net = CosineMetricNet(TINY); x = np.random.default_rng(0).normal(size=(n, 3, 9, 7)).astype(np.float16)
    net.train(); out = embed(net, x, batch_size=4)
    assert net.training and out.shape == (n, 6)
    if n: torch.testing.assert_close(out, net.eval()(torch.from_numpy(x).float()).detach())

def test_embed_reads_memory_maps(tmp_path):
    x = np.lib.format.open_memmap(tmp_path/'x.npy', 'w+', np.float16, (5, 3, 9, 7)); x[:] = 1
    assert embed(CosineMetricNet(TINY), np.load(tmp_path/'x.npy', mmap_mode='r')).shape == (5, 6)

# -- on disk
def test_save_and_load(tmp_path):
    model = MetricModel(TINY, 5); _, id_map = reindex(np.array(['a', 'b', 'c', 'd', 'e']))
    path = save_metric(tmp_path/'deep'/'m.pt', model.net, model.head, id_map=id_map, extra=dict(recipe='toy'), step=7)
    ck = load_metric(path, cfg=TINY)
    x = torch.randn(3, 3, 9, 7); torch.testing.assert_close(ck.net(x), model.net.eval()(x))
    assert ck.net.cfg == TINY and ck.config['id_map'] == id_map and ck.config['recipe'] == 'toy' and ck.step == 7 and [p.name for p in path.parent.iterdir()] == ['m.pt']
    head = CosineSoftmax(5, 6); head.load_state_dict(ck.head); assert torch.equal(head.weight, model.head.weight)
    assert load_metric(save_metric(tmp_path/'n.pt', model.net)).head == {}

def test_a_run_loads_too(tmp_path):
    "The loop trains a `MetricModel` as it is, and `load_metric` opens the folder of its run"
    class Crops(torch.utils.data.Dataset):
        def __len__(self): return 12
        def __getitem__(self, i): return dict(crops=torch.full((3, 9, 7), float(i)), label=i % 3)
    torch.manual_seed(0); model = MetricModel(TINY, 3)
    batches = Batches(Crops(), lambda epoch: [list(range(12))]*2)
    fit(model, lambda m, b: m(b), batches, run_dir=tmp_path/'run', cfg=FitConfig(max_steps=3), config=dict(metric=TINY, id_map={'a': 0, 'b': 1, 'c': 2}), device='cpu')
    ck = load_metric(tmp_path/'run')
    x = torch.randn(3, 3, 9, 7); torch.testing.assert_close(ck.net(x), model.net.eval()(x))
    assert ck.step == 3 and ck.config['id_map'] == {'a': 0, 'b': 1, 'c': 2} and set(ck.head) == {'weight', 's'}

def test_bad_checkpoints(tmp_path):
    path = save_metric(tmp_path/'m.pt', CosineMetricNet(TINY))
    with pytest.raises(ValueError, match=r'crop_size: \[9, 7\] there, \[32, 32\] now.*in_channels: 3 there, 64 now'): load_metric(path, cfg=MetricConfig())
    with pytest.raises(FileNotFoundError, match='nothing.pt'): load_metric(tmp_path/'nothing.pt')
    (tmp_path/'cut.pt').write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match='cut.pt'): load_metric(tmp_path/'cut.pt')
    torch.save(dict(model={}, config=dict(lss=1)), tmp_path/'lss.pt')
    with pytest.raises(ValueError, match='lss.pt is not a checkpoint of a metric network: it holds lss'): load_metric(tmp_path/'lss.pt')

def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_metric(tmp_path/'m.pt', CosineMetricNet(TINY), step=1)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='m.pt.*No space'): save_metric(path, CosineMetricNet(TINY), step=2)
    monkeypatch.undo(); assert load_metric(path).step == 1 and [p.name for p in tmp_path.iterdir()] == ['m.pt']
