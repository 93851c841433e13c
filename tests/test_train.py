"""Both trainings and their joint form: fair batches, honest validation, the same result whether killed, shared between processes, or not."""
import json, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bev_reid.cli import set_fields
from bev_reid.crops import CropConfig
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, ReIDDataset, build_dataset, pk_order, trained_ids
from bev_reid.ema import ema_weights
from bev_reid.fit import Batches, FitConfig, checkpoints, fit, gathered, load_checkpoint, read_metrics, with_defaults
from bev_reid.joint import JointModel, JointRecipe, keyframe_order, side_by_side, source_of, train_joint, train_reid
from bev_reid.losses import LOSSES
from bev_reid.lss import load_lss
from bev_reid.metric import MetricConfig, MetricModel, load_metric
from bev_reid.train import LSSRecipe, MetricRecipe, evaluate_reid, metric_model, train_lss, train_metric, training_sets, watch
from bev_reid.validate import balanced_order
from road import SMALL, Command, METRIC, env, verb

TINY = MetricConfig(in_channels=3, crop_size=(9, 7), widths=(4, 8), blocks=1, embedding_dim=6, dropout=0.)
SETS = ['p=6', 'net.widths=[8,8]', 'net.embedding_dim=16', 'fit.log_every=1', 'val_gap=.5']

def recipe(*sets, cls=MetricRecipe, steps=6, **kw): return set_fields(cls.recipe('toy', max_steps=steps, **kw), [*SETS, *sets])

@pytest.fixture(scope='module')
def road(toy_root, tmp_path_factory):
    "A BEV network of two steps and the data set made with it"
    out, data = tmp_path_factory.mktemp('train'), DrivingData(toy_root)
    train_lss(data, out/'lss', recipe=set_fields(LSSRecipe.recipe('toy', max_steps=2), SMALL), device='cpu')
    return data, build_dataset(load_lss(out/'lss'), data, out/'reid', cfg=DatasetConfig(crop=CropConfig(extent=16., size=16)), source=str(out/'lss'))

def with_val(reid, to):
    "A copy of a data set in which every third training vehicle belongs to `val`"
    shutil.copytree(reid, to)
    t = pq.read_table(to/'observations.parquet').to_pydict()
    ids = sorted({i for i, s in zip(t['identity'], t['split']) if s == 'train'})[::3]
    t['split'] = ['val' if i in ids else s for i, s in zip(t['identity'], t['split'])]
    pq.write_table(pa.table(t), to/'observations.parquet')
    return to

def same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k

class Killed(Exception): pass

def dies(monkeypatch, cls, at):
    "The n-th call of a module's forward fails"
    was, n = cls.forward, [0]
    def forward(self, *a, **k):
        n[0] += self.training
        if n[0] == at: raise Killed
        return was(self, *a, **k)
    monkeypatch.setattr(cls, 'forward', forward)


# -- which vehicles share a batch
LOPSIDED = np.repeat(np.arange(23), [1]*5+[2]*4+[3]*4+[7]*5+[40]*5)

@pytest.mark.parametrize('p, k', [(4, 4), (8, 3), (23, 2), (64, 4), (22, 5)])
def test_nobody_starves(p, k):
    order = balanced_order(LOPSIDED, p=p, k=k, seed=3)
    for epoch in (0, 1, 7):
        batches = order(epoch); assert batches == order(epoch)
        ids = [LOPSIDED[b] for b in batches]
        assert all(len(b) == min(p, 23)*k and (np.unique(b, return_counts=True)[1] == k).all() for b in ids)      # P vehicles, K views of each, in every batch
        turns = np.bincount(np.concatenate(ids), minlength=23)/k
        assert turns.min() >= 1 and turns.max() <= 2 and turns.sum() < 23+p

@pytest.mark.parametrize('k', [2, 4, 5])
def test_every_view_comes_before_any_comes_again(k):
    order = balanced_order(LOPSIDED, p=23, k=k)                     # one batch an epoch: one turn each
    n = np.bincount(np.concatenate([order(e)[0] for e in range(40)]), minlength=len(LOPSIDED))
    for i in range(23): seen = n[LOPSIDED == i]; assert seen.max()-seen.min() <= 1 and seen.sum() == 40*k

def test_the_plain_order_starves_some():
    "what the default does, said in the prose: single observations never come up, and the rest of an epoch waits"
    turns = np.bincount(LOPSIDED[np.concatenate(pk_order(LOPSIDED, p=8, k=4)(0))], minlength=23)
    assert (turns[:5] == 0).all() and (turns[5:] == 0).sum() == 18 % 8

def test_too_few_vehicles():
    for labels in ([], [1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match='two identities'): balanced_order(labels)


# -- the loop: mean of the weights, early end, versions
def values(*v):
    "A validation that says these numbers, one after the other, by the step"
    return lambda m: dict(score=v[int(m.calls) // 5-1])

class Line(nn.Module):
    def __init__(self):
        super().__init__(); torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(.3), nn.Linear(8, 1)); self.register_buffer('calls', torch.zeros((), dtype=torch.long))
    def forward(self, b): self.calls += 1; return dict(loss=(self.net(b[0])-b[1]).square().mean())

X = torch.linspace(-1, 1, 40)[:, None]
def line(run, *, validate=None, loss_fn=lambda m, b: m(b), **kw):
    from bev_reid.fit import shuffled
    m = Line()
    cfg = FitConfig(**{**dict(max_steps=40, lr=.05, checkpoint_every=4, eval_every=5, keep=0), **kw})
    return m, fit(m, loss_fn, Batches(list(zip(X, 3*X+1)), shuffled(40, 8)), run_dir=run, cfg=cfg, validate=validate, device='cpu')

def test_early_stopping_keeps_the_best(tmp_path):
    scores = values(.1, .5, .3, .4, .2, .9, .9, .9)
    m, out = line(tmp_path, validate=scores, best_by='score', patience=3)
    assert out['step'] == 25 and out['stopped_early'] and out['best'] == dict(step=10, value=.5, waited=3)
    best = load_checkpoint(tmp_path)                                 # a folder means its best
    assert best['step'] == 10 and 'optimizer' not in best and load_checkpoint(checkpoints(tmp_path)[-1])['step'] == 25
    assert json.loads((tmp_path/'done.json').read_text())['best']['step'] == 10
    assert line(tmp_path, validate=scores, best_by='score', patience=3)[1]['resumed']
    _, out = line(tmp_path, validate=scores, best_by='score', patience=4)   # more patience: it goes on, and is rewarded
    assert out['step'] == 40 and not out['stopped_early'] and out['best']['step'] == 30
    _, whole = line(tmp_path/'whole', validate=scores, best_by='score', patience=4)
    same(load_checkpoint(tmp_path)['model'], load_checkpoint(tmp_path/'whole')['model'])

def test_nan_is_never_the_best(tmp_path):
    _, out = line(tmp_path, validate=values(float('nan'), float('nan'), .1, .2, *[0]*4), best_by='score', patience=2)
    assert out['step'] == 10 and out['stopped_early'] and not (tmp_path/'best.pt').exists()

@pytest.mark.parametrize('at', [3, 11, 22])
def test_resume_knows_mean_and_patience(tmp_path, at):
    def dying(m, b, n=[0]):
        n[0] += 1
        if n[0] == at: raise Killed
        return m(b)
    kw = dict(validate=values(.1, .5, .3, .4, .45, .3, .2, .1), best_by='score', patience=4, ema=.9)
    _, whole = line(tmp_path/'whole', **kw)
    with pytest.raises(Killed): line(tmp_path/'cut', loss_fn=dying, **kw)
    _, again = line(tmp_path/'cut', **kw)
    assert again == whole and whole['step'] == 30
    for name in ('best.pt', 'checkpoints/step_000030.pt'):
        a, b = load_checkpoint(tmp_path/'whole'/name), load_checkpoint(tmp_path/'cut'/name)
        same(a['model'], b['model']); same(a['ema'], b['ema']); assert a['best'] == b['best']

def test_mean_of_the_weights_is_validated_and_restated(tmp_path):
    "the mean, recomputed from the weights of every step"
    seen, valid, where = [], [], []
    def loss_fn(m, b): seen.append(m.net[0].weight.detach().clone()); return m(b)
    def validate(m): valid.append(m.net[0].weight.clone()); where.append(m.training); return dict(score=0.)
    m, _ = line(tmp_path, loss_fn=loss_fn, validate=validate, ema=.8, max_steps=20)
    after = seen[1:]+[m.net[0].weight.detach()]                       # weights after each step
    mean = after[0]
    for n, w in enumerate(after[1:], 1): d = min(.8, (1+n)/(10+n)); mean = d*mean+(1-d)*w
    torch.testing.assert_close(valid[-1], mean); assert not any(where)
    torch.testing.assert_close(ema_weights(load_checkpoint(tmp_path))['net.0.weight'], mean)
    assert (mean-after[-1]).abs().max() > 1e-4

def test_early_stopping_needs_its_number(tmp_path):
    with pytest.raises(ValueError, match="needs a validation"): line(tmp_path, patience=2)
    with pytest.raises(ValueError, match="best_by 'mAP'.*score"): line(tmp_path, validate=values(*[0]*9), best_by='mAP')
    for bad in (dict(ema=1.), dict(patience=-1)):
        with pytest.raises(ValueError): FitConfig(**bad)

def test_a_checkpoint_of_before_lacks_the_options_of_today(road, tmp_path):
    _, reid = road
    train_metric(reid, tmp_path/'whole', recipe=recipe(), device='cpu')
    train_metric(reid, tmp_path/'old', recipe=recipe('fit.checkpoint_every=3'), device='cpu')
    last, mid = checkpoints(tmp_path/'old')[::-1]; last.unlink(); (tmp_path/'old/done.json').unlink()
    state = torch.load(mid, weights_only=True); r = state['config']['recipe']
    for k in ('loss_args', 'balanced', 'aug', 'features', 'val_share', 'val_gap'): del r[k]
    for f in (r['fit'], state['config']['fit']): [f.pop(k) for k in ('ema', 'best_by', 'patience')]
    del state['best']; torch.save(state, mid)
    r = recipe(); train_metric(reid, tmp_path/'old', recipe=replace(r, val_gap=2.), device='cpu')
    same(load_checkpoint(tmp_path/'old')['model'], load_checkpoint(tmp_path/'whole')['model'])
    with pytest.raises(ValueError, match=r'recipe.aug.shift: 0.0 there, 0.5 now'): train_metric(reid, tmp_path/'old', recipe=recipe('aug.shift=.5'), device='cpu')


# -- large batches in parts
def still(model):
    "Batch norm by its running statistics: the network then looks at each crop by itself"
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): m.eval()
    return model

def grads(loss, halves):
    torch.manual_seed(0); model = still(MetricModel(TINY, 8, loss=loss)); g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, 9, 7, generator=g), torch.arange(8).repeat_interleave(4)
    for i in range(0, 32, 32//halves): (model(dict(crops=x[i:i+32//halves], label=y[i:i+32//halves]))['loss']/halves).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

def test_accumulation_is_the_large_batch_where_losses_are_means():
    "class vectors: equal; losses that compare observations see other pairs in half a batch, and differ"
    for loss in ('cosine-softmax', 'arcface', 'cosface', 'subcenter-arcface'): torch.testing.assert_close(grads(loss, 2), grads(loss, 1), rtol=1e-4, atol=1e-6)
    for loss in ('triplet', 'magnet', 'supcon'): assert (grads(loss, 2)-grads(loss, 1)).norm() > .02*grads(loss, 1).norm(), loss


TWO = """
import sys; sys.path.insert(0, {tests!r})
import torch, test_train as t
for loss in {names!r}: t.shared({run!r}+'/'+loss, loss, False)
"""

class Halves(MetricModel):
    "One process that embeds each half of its batch by itself, as two processes would"
    def forward(self, batch):
        raw = torch.cat([self.net.raw(x) for x in batch['crops'].chunk(2)])
        return self.head(F.normalize(raw, dim=1), batch['label'])

def shared(run, loss, halves):
    "Six steps on 16 crops a step: one process with all of them, or two with 8 each"
    g = torch.Generator().manual_seed(0); x, y = torch.randn(64, 3, 9, 7, generator=g), torch.arange(64) % 8
    items = [dict(crops=a, label=b) for a, b in zip(x, y)]
    def order(epoch): b = np.random.default_rng(epoch).permutation(64)[:16].tolist(); return [b] if halves else [b[:8], b[8:]]
    torch.manual_seed(0)
    model = Halves(TINY, 8, loss=loss) if halves else metric_model(MetricRecipe(net=TINY, loss=loss), 8)
    fit(model, lambda m, b: m(b), Batches(items, order), run_dir=run, cfg=FitConfig(max_steps=6, lr=1e-2, weight_decay=.1, grad_clip=0, log_every=1, ema=.5), device='cpu')

def test_two_processes_are_one(tmp_path):
    "losses that compare vehicles see those of both processes; the weight decay is added to the gradient, so its scale shows in spite of Adam"
    names = 'triplet', 'cosine-softmax', 'multi-similarity'
    script = tmp_path/'two.py'; script.write_text(TWO.format(tests=str(Path(__file__).parent), run=str(tmp_path/'two'), names=names))
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)], env=env(), capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr
    for loss in names:
        shared(str(tmp_path/'one'/loss), loss, True)
        two, one = (load_checkpoint(tmp_path/n/loss) for n in ('two', 'one'))
        for part in ('model', 'ema'):
            for k, v in one[part].items():
                if 'running' not in k and 'num_batches' not in k: torch.testing.assert_close(two[part][k], v, rtol=1e-3, atol=1e-4, msg=lambda m: f'{loss} {part} {k}: {m}')   # batch norm keeps the statistics of the first process
        a, b = (read_metrics(tmp_path/n/loss)['train/loss'][1] for n in ('one', 'two'))
        np.testing.assert_allclose(a, b, rtol=1e-3)

def test_gathered_alone_is_nothing(): x = torch.ones(2); assert gathered(x) is x


# -- the metric training
@pytest.mark.parametrize('sets', [['aug.shift=.5', 'aug.turn=10', 'aug.erase=.5', 'aug.noise=.1', 'balanced=true', 'fit.ema=.9'], ['loss=circle', 'loss_args={"memory_size":64}'], ['fit.accumulate=2', 'loss=arcface', 'fit.amp=bf16', 'fit.warmup_steps=2', 'fit.schedule=cosine']])
def test_killed_and_resumed_is_the_same(road, tmp_path, monkeypatch, sets):
    _, reid = road; r = recipe(*sets, 'fit.checkpoint_every=2', steps=7)
    train_metric(reid, tmp_path/'whole', recipe=r, device='cpu')
    with monkeypatch.context() as m:
        dies(m, MetricModel, 6*r.fit.accumulate)
        with pytest.raises(Killed): train_metric(reid, tmp_path/'cut', recipe=r, device='cpu')
    train_metric(reid, tmp_path/'cut', recipe=r, device='cpu')
    a, b = load_checkpoint(tmp_path/'whole'), load_checkpoint(tmp_path/'cut')
    same(a['model'], b['model']); assert a.keys() == b.keys()
    if 'ema' in a: same(a['ema'], b['ema'])
    if 'memory_size' in sets[-1]: assert a['model']['head.at'].tolist() != [0, 0]
    again = tmp_path/'other'; train_metric(reid, again, recipe=replace(r, fit=replace(r.fit, seed=1)), device='cpu')
    assert any(not torch.equal(v, a['model'][k]) for k, v in load_checkpoint(again)['model'].items())

def test_loader_processes_change_nothing(road, tmp_path):
    r = recipe('aug.shift=.5', 'aug.noise=.1', 'balanced=true', steps=5)
    for n in (0, 2): train_metric(road[1], tmp_path/str(n), recipe=r, device='cpu', n_workers=n)
    same(*(load_checkpoint(tmp_path/n)['model'] for n in '02'))

@pytest.mark.parametrize('loss', LOSSES)
def test_every_loss_trains_by_name(road, tmp_path, loss):
    _, reid = road
    train_metric(reid, tmp_path, recipe=recipe(loss=loss, steps=2), device='cpu')
    got = read_metrics(tmp_path); assert {'train/loss', 'train/pos_dist', 'train/neg_dist', 'train/emb_norm'} <= got.keys()
    assert {r['method'] for r in evaluate_reid(tmp_path, reid, min_gap=.5, baselines=False)['rows']} == {'learned embedding', 'chance'}

def test_a_training_starts_from_another_network_and_remembers_whom_it_saw(road, tmp_path):
    _, reid = road
    train_metric(reid, tmp_path/'old', recipe=recipe(steps=3), device='cpu')
    # one identity fewer: it is known from before alone
    less = tmp_path/'less'; shutil.copytree(reid, less)
    t = pq.read_table(less/'observations.parquet').to_pydict(); gone = sorted({i for i, s in zip(t['identity'], t['split']) if s == 'train'})[0]
    t['split'] = ['test' if i == gone else s for i, s in zip(t['identity'], t['split'])]; pq.write_table(pa.table(t), less/'observations.parquet')
    still = recipe('fit.lr=0', f'init={tmp_path}/old', steps=1)
    train_metric(less, tmp_path/'new', recipe=still, device='cpu')
    a, b = (load_checkpoint(tmp_path/n) for n in ('old', 'new'))
    learned = [k for k in a['model'] if k.startswith('net.') and k.endswith('weight')]
    assert len(learned) > 5
    for k in learned: assert torch.equal(a['model'][k], b['model'][k]), k
    assert gone not in b['config']['id_map'] and gone in trained_ids(b['config'])
    assert evaluate_reid(tmp_path/'new', less, min_gap=.5, baselines=False)['settings']['ids_seen_in_training'] == 1
    with pytest.raises(ValueError, match='another make'): train_metric(reid, tmp_path/'x', recipe=recipe(f'init={tmp_path}/old', 'net.widths=[8,12]', steps=1), device='cpu')
    with pytest.raises(ValueError, match='has no init'): train_joint(reid, tmp_path/'y', recipe=recipe(f'init={tmp_path}/old', cls=JointRecipe), device='cpu')

def test_a_bev_network_starts_from_another_one(road, tmp_path):
    data, reid = road; old = reid.parent/'lss'
    train_lss(data, tmp_path/'new', recipe=set_fields(LSSRecipe.recipe('toy', max_steps=1), [*SMALL, f'init={old}', 'fit.lr=0', 'company_weight=0']), device='cpu')
    a, b = load_lss(old), load_lss(tmp_path/'new')
    for (k, x), y in zip(a.named_parameters(), b.parameters()): assert torch.equal(x, y), k
    assert a.company_ids and set(b.company_ids) == set(a.company_ids)      # whom the old one saw, the new one has seen
    with pytest.raises(ValueError, match='another make'): train_lss(data, tmp_path/'x', recipe=set_fields(LSSRecipe.recipe('toy', max_steps=1), [*SMALL, f'init={old}', 'lss.bev_channels=12']), device='cpu')

def test_wrong_options_are_named():
    with pytest.raises(ValueError, match='mergin'): MetricRecipe(loss='triplet', loss_args=dict(mergin=1))
    with pytest.raises(ValueError, match='softmax'): MetricRecipe(loss='sphere')
    with pytest.raises(ValueError, match='val_share'): MetricRecipe(val_share=0)
    with pytest.raises(ValueError, match='no .*alpha'): recipe('aug.alpha=1')

@pytest.mark.parametrize('has_val', [True, False])
def test_validation_never_touches_the_test_split(road, tmp_path, has_val):
    data, reid = road; mine = tmp_path/'reid'
    with_val(reid, mine) if has_val else shutil.copytree(reid, mine)
    for s in data.splits()['test']:
        for f in ('crops', 'rgb', 'patches'): (mine/'scenes'/s/f'{f}.npy').unlink()    # whoever reads a test crop fails
    r = recipe('fit.eval_every=2', 'fit.patience=9', 'fit.ema=.5')
    out = train_metric(mine, tmp_path/'run', recipe=r, device='cpu')
    train, val = training_sets(mine, r)
    assert not set(train.table['identity']) & set(val.table['identity']) and set(val.table['split']) == {'val' if has_val else 'train'}
    assert set(load_metric(tmp_path/'run').config['id_map']) == set(train.table['identity'])
    assert out['metrics']['n_ids'] <= val.n_ids and (tmp_path/'run/best.pt').exists()
    curves = read_metrics(tmp_path/'run'); assert curves['val/mAP'][0] == [2, 4, 6] and {'val/rank1', 'val/rank5', 'val/mINP'} <= curves.keys()
    best = 2*(1+int(np.argmax(curves['val/mAP'][1]))); assert load_checkpoint(tmp_path/'run')['step'] == best == out['best']['step']
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    ev = EventAccumulator(str(tmp_path/'run')).Reload(); tags = ev.Tags()
    assert {'train/scale', 'train/pos_dist', 'train/neg_dist', 'train/emb_norm', 'train/loss', 'val/rank1', 'val/mAP'} <= set(tags['scalars'])
    assert set(tags['images']) == {'val/retrieval', 'val/cmc'} and max(len(i.encoded_image_string) for i in ev.Images('val/retrieval')) < 200_000
    import matplotlib.pyplot as plt; assert not plt.get_fignums()

def test_validation_changes_nothing_of_the_training(road, tmp_path):
    _, reid = road; reid = with_val(reid, tmp_path/'reid')
    for n, sets in (('a', []), ('b', ['fit.eval_every=1'])): train_metric(reid, tmp_path/n, recipe=recipe(*sets), device='cpu')
    same(*(load_checkpoint(checkpoints(tmp_path/n)[-1])['model'] for n in 'ab'))

def test_validation_without_pairs_is_named(road, tmp_path):
    with pytest.raises(ValueError, match='lower val_gap'): train_metric(road[1], tmp_path, recipe=recipe('fit.eval_every=1', 'val_gap=60'), device='cpu')

def test_watching_a_running_training(road, tmp_path):
    "a training and its watcher side by side, as two commands: each checkpoint once, and the watcher ends by itself"
    _, reid = road
    slow = 'import bev_reid.metric as m, time; f = m.MetricModel.forward\ndef g(self, *a): time.sleep(.15); return f(self, *a)\nm.MetricModel.forward = g'
    train = Command('train', reid, tmp_path/'run', *METRIC, 'fit.log_every=1', 'fit.checkpoint_every=4', 'fit.keep=0', '--steps', 16, tmp=tmp_path, before=slow)
    train.until(lambda: checkpoints(tmp_path/'run'))
    assert not (tmp_path/'run/done.json').exists()
    said, _ = verb('eval', tmp_path/'run', reid, '--min-gap', .5, '--watch', '--device', 'cpu', tmp=tmp_path)
    assert train.wait() == 0
    steps = [int(l.split()[1].rstrip(':')) for l in said.splitlines() if l.startswith('step')]
    assert steps == [4, 8, 12, 16] and list(json.loads((tmp_path/'run/eval.json').read_text())['steps']) == ['4', '8', '12', '16']

def test_a_checkpoint_dropped_while_it_is_evaluated(road, tmp_path):
    train_metric(road[1], tmp_path, recipe=recipe('fit.checkpoint_every=2', 'fit.keep=0'), device='cpu')
    def gone(c):
        if c.stem.endswith('02'): c.unlink(); raise FileNotFoundError(c)
        return dict(step=c.stem)
    assert list(watch(tmp_path, gone, poll=.01)) == [4, 6]


# -- joint
def joint(*sets, **kw): return recipe('n_scenes=1', 'n_frames=2', *sets, cls=JointRecipe, **{**dict(steps=4), **kw})

@pytest.mark.parametrize('n_scenes, n_frames', [(1, 2), (2, 4), (3, 3)])
def test_keyframes_of_few_scenes(n_scenes, n_frames):
    scene = np.repeat(list('abcde'), [9, 8, 1, 5, 20])
    order = keyframe_order(scene, n_scenes=n_scenes, n_frames=n_frames)
    for e in (0, 1):
        got = order(e); assert set(sum(got, [])) == set(range(len(scene))) and order(e) == got
        for b in got: names, n = np.unique(scene[b], return_counts=True); assert len(names) <= n_scenes and n.max() <= n_frames and len(set(b)) == len(b)
    assert order(0) != order(1)
    with pytest.raises(ValueError, match='two keyframes'): keyframe_order(['a', 'b'])

def test_joint_and_frozen_from_one_call(road, tmp_path):
    data, reid = road
    both = {n: train_reid(reid, tmp_path/n, recipe=joint(), joint=n == 'joint', device='cpu') for n in ('frozen', 'joint')}
    before, after = source_of(reid)[1].state_dict(), load_lss(tmp_path/'joint/lss').state_dict()
    moved = {k.split('.')[0] for k in before if not torch.equal(before[k], after[k])}; trunk = [k for k in before if '.trunk.' in k]
    assert {'cam_encode', 'bev_encode', 'local_encode', 'head'} <= moved and all(torch.equal(before[k], after[k]) for k in trunk)
    # held-out vehicles were not in the loss, and the usual verb makes the same data set as the training did
    ids, test = set(load_metric(tmp_path/'joint/metric').config['id_map']), ReIDDataset(reid, split='test')
    known = set(load_lss(tmp_path/'joint/lss').company_ids)
    assert ids <= known == ids | set(source_of(reid)[1].company_ids) and not known & set(test.table['identity'])
    verb('dataset', tmp_path/'joint/lss', data.dataroot, tmp_path/'again', '--extent', 16, '--size', 16, '--device', 'cpu', tmp=tmp_path)
    a, b = ReIDDataset(tmp_path/'again'), ReIDDataset(tmp_path/'joint/reid'); np.testing.assert_array_equal(a.read('crops'), b.read('crops'))
    assert 'rank-1' not in verb('eval', tmp_path/'joint/metric', tmp_path/'again', '--min-gap', .5, '--device', 'cpu', tmp=tmp_path)[1]
    rows = side_by_side(both, min_gap=.5); names = [r['method'] for r in rows]
    assert names[:4] == [f'{n}: {m}' for n in both for m in ('learned embedding', 'BEV crop, no metric learning')] and names[-1] == 'chance' and len(set(names)) == len(names)
    assert rows[0]['n_queries'] == rows[2]['n_queries'] > 0
    with pytest.raises(ValueError, match='another BEV network'): evaluate_reid(tmp_path/'joint/metric', reid, min_gap=.5)
    with pytest.raises(ValueError, match='wants a JointRecipe'): train_reid(reid, tmp_path/'x', recipe=recipe(), joint=True)

def test_joint_killed_and_resumed_is_the_same(road, tmp_path, monkeypatch):
    _, reid = road; r = joint('fit.checkpoint_every=2', 'fit.ema=.5', 'fit.eval_every=2', 'aug.shift=.5', 'aug.noise=.1', 'weight=2', 'trunk=true', steps=5)
    train_joint(reid, tmp_path/'whole', recipe=r, device='cpu', build=False)
    with monkeypatch.context() as m:
        dies(m, JointModel, 4)
        with pytest.raises(Killed): train_joint(reid, tmp_path/'cut', recipe=r, device='cpu', build=False)
    train_joint(reid, tmp_path/'cut', recipe=r, device='cpu', build=False)
    for n in ('checkpoints/step_000005.pt', 'best.pt'): a, b = (load_checkpoint(tmp_path/d/n) for d in ('whole', 'cut')); same(a['model'], b['model']); same(a['ema'], b['ema']); assert a['best'] == b['best']
    same(load_checkpoint(tmp_path/'whole/lss')['model'], {k.removeprefix('lss.'): v for k, v in ema_weights(load_checkpoint(tmp_path/'whole')).items() if k.startswith('lss.')})
    curves = read_metrics(tmp_path/'whole'); assert curves['val/mAP'][0] == [2, 4, 5] and {'train/seg', 'train/depth', 'train/identity', 'train/pos_dist'} <= curves.keys()

def test_validation_of_the_joint_map_is_that_of_its_data_set(road, tmp_path):
    "what validation says during a joint training is what the data set built afterwards gives"
    from bev_reid.evaluate import all_observations
    from bev_reid.metric import embed
    from bev_reid.validate import observations
    _, reid = road; r = joint('fit.eval_every=4', steps=4)
    out = train_joint(reid, tmp_path, recipe=r, device='cpu')
    val = training_sets(tmp_path/'reid', r)[1]
    res = all_observations(embed(load_metric(tmp_path/'metric').net, val.read('crops')).numpy(), observations(val), min_gap=.5)
    assert res.n_queries == out['metrics']['n_queries'] and res.mAP == pytest.approx(out['metrics']['mAP'], abs=.02)       # crops are stored in half precision, and of a folded network

def test_joint_refuses_what_it_cannot_do(road, tmp_path):
    data, reid = road
    train_lss(data, tmp_path/'other', recipe=set_fields(LSSRecipe.recipe('toy', max_steps=1), SMALL), device='cpu')
    with pytest.raises(ValueError, match='was built with'): train_joint(reid, tmp_path/'x', recipe=joint(), device='cpu', lss=tmp_path/'other')
    build_dataset(load_lss(tmp_path/'other'), data, tmp_path/'rgb', cfg=DatasetConfig(crop=CropConfig(extent=16., size=16), features=('bev', 'rgb')), source=str(tmp_path/'other'))
    with pytest.raises(ValueError, match='BEV map alone.*bev, rgb'): train_joint(tmp_path/'rgb', tmp_path/'x', recipe=joint(), device='cpu')

def test_joint_on_two_processes(road, tmp_path):
    "the scenes of the batch differ, so do the numbers of vehicles; each process writes its share of the data set"
    _, reid = road; script = tmp_path/'two.py'
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_train as t\nt.train_joint({str(reid)!r}, {str(tmp_path/'run')!r}, recipe=t.joint('loss=triplet', 'n_frames=1', steps=2), device='cpu')\n")
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)], env=env(), capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr[-3000:]
    assert (tmp_path/'run/reid/dataset.json').exists() and evaluate_reid(tmp_path/'run/metric', tmp_path/'run/reid', min_gap=.5, baselines=False)['rows'][0]['n_queries']
