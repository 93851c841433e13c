"The running mean of weights against its formula, and its resume"
import copy

import pytest
import torch
from torch import nn
from bev_reid.ema import ema_of, ema_weights
from bev_reid.fit import load_checkpoint, save_atomic
from bev_reid.metric import CosineMetricNet, MetricConfig, MetricModel, load_metric

TINY = MetricConfig(in_channels=3, crop_size=(9, 7), widths=(4, 8), blocks=1, embedding_dim=6, dropout=0.)

def make(): torch.manual_seed(0); return MetricModel(TINY, 4, loss='supcon', memory_size=32)

def train(model, opt, ema, steps):
    "Steps whose data depend on their number alone"
    for i in steps:
        torch.manual_seed(i); x, y = torch.randn(16, 3, 9, 7), torch.arange(16) % 4
        model.train(); opt.zero_grad(); model(dict(crops=x, label=y))['loss'].backward(); opt.step(); ema.update_parameters(model)

@pytest.mark.parametrize('decay', [0., .3, .999])
def test_restated(decay):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)); ema = ema_of(net, decay)
    mean, torch_gen = None, torch.Generator().manual_seed(0)
    for t in range(12):
        with torch.no_grad():
            for p in net.parameters(): p += torch.randn(p.shape, generator=torch_gen)
        net(torch.randn(8, 3, generator=torch_gen)); ema.update_parameters(net)
        now = {k: v.double() for k, v in net.state_dict().items()}
        d = min(decay, (1+t)/(10+t))
        mean = now if mean is None else {k: d*mean[k]+(1-d)*now[k] for k in now}
    for k, v in ema.module.state_dict().items():
        if k.endswith('tracked'): assert v == 12                                           # a counter is copied
        else: torch.testing.assert_close(v.double(), mean[k], atol=1e-5, rtol=1e-5)

def test_the_model_is_left_alone():
    a, b = make(), make()
    oa, ob = (torch.optim.Adam(m.param_groups(), lr=1e-2) for m in (a, b))
    ema = ema_of(a); train(a, oa, ema, range(4))
    class Off: update_parameters = staticmethod(lambda m: None)
    train(b, ob, Off, range(4))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())) and a.training
    assert not ema.module.training and not any(p.requires_grad for p in ema.parameters()) and all(p.requires_grad for p in a.net.fc.parameters())
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(ema.module.parameters(), a.parameters()))

def test_batch_norm_of_the_mean_fits_its_weights():
    "The averaged network in evaluation mode sees unit variance behind its norms, as it would with statistics recomputed"
    torch.manual_seed(0); net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False)); ema = ema_of(net, .9)
    opt = torch.optim.SGD(net.parameters(), lr=.05)
    for _ in range(300): opt.zero_grad(); net(torch.randn(64, 4)).pow(4).mean().backward(); opt.step(); ema.update_parameters(net)
    out = ema.module(torch.randn(4000, 4)); assert out.var(0).sub(1).abs().max() < .15 and out.mean(0).abs().max() < .1

def test_exact_resume(tmp_path):
    straight = make(); opt = torch.optim.Adam(straight.param_groups(), lr=1e-2); ema = ema_of(straight, .9); train(straight, opt, ema, range(14))
    first = make(); o = torch.optim.Adam(first.param_groups(), lr=1e-2); e = ema_of(first, .9); train(first, o, e, range(7))
    save_atomic(dict(model=first.state_dict(), optimizer=o.state_dict(), ema=e.state_dict(), config=dict(metric={}), step=7), tmp_path/'c.pt')
    state = load_checkpoint(tmp_path/'c.pt')                                                # weights_only
    again = make(); o = torch.optim.Adam(again.param_groups(), lr=1e-2); e = ema_of(again, .9)
    again.load_state_dict(state['model']); o.load_state_dict(state['optimizer']); e.load_state_dict(state['ema']); train(again, o, e, range(7, 14))
    for a, b in ((straight, again), (ema, e)):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k

def test_load_metric_takes_the_mean(tmp_path):
    from bev_reid.fit import plain
    model = make(); opt = torch.optim.Adam(model.param_groups(), lr=1e-2); ema = ema_of(model, .9); train(model, opt, ema, range(5))
    state = dict(model=model.state_dict(), config=plain(dict(metric=TINY)), step=5)
    x = torch.randn(4, 3, 9, 7)
    save_atomic(state, tmp_path/'a.pt'); save_atomic({**state, 'ema': ema.state_dict()}, tmp_path/'b.pt')
    torch.testing.assert_close(load_metric(tmp_path/'a.pt').net(x), model.eval().net(x))
    torch.testing.assert_close(load_metric(tmp_path/'b.pt').net(x), ema.module.net(x))
    assert not torch.allclose(model.net(x), ema.module.net(x), atol=1e-3)

def test_bad_decay():
    for d in (1., -.1, 2.):
        with pytest.raises(ValueError, match='decay'): ema_of(nn.Linear(1, 1), d)
    assert ema_weights(dict(model={'a': 1}, ema=None)) == {'a': 1}

def test_copies_go_on_after_a_deep_copy():
    net = nn.Linear(2, 2); ema = copy.deepcopy(ema_of(net)); ema.update_parameters(net)
    assert torch.equal(ema.module.weight, net.weight)
