"""The training loop: a run that dies and goes on ends with the weights of one that never died, and what is broken is named."""
import csv, errno, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch
from torch import nn

import bev_reid.fit as F
from bev_reid.fit import *
from road import env, hear_ctrl_c

X = torch.linspace(-1, 1, 40)[:, None]
PAIRS = list(zip(X, 3*X+1))

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(.3), nn.Linear(8, 1))

def loss_fn(m, batch): return dict(loss=(m(batch[0])-batch[1]).square().mean())

def cfg(**kw): return FitConfig(**{**dict(max_steps=24, lr=.05, checkpoint_every=5, log_every=4, schedule='one_cycle', keep=0), **kw})

def train(run_dir, *, loss_fn=loss_fn, config=None, pairs=PAIRS, validate=None, **kw):
    m = model()
    out = fit(m, loss_fn, Batches(pairs, shuffled(len(pairs), 8)), run_dir=run_dir, cfg=cfg(**kw), config=config, validate=validate, device='cpu')
    return m, out

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k

class Killed(Exception): pass

def dies_at(n, what=Killed):
    "A loss that fails when it is called for the n-th time"
    count = [0]
    def fn(m, batch):
        count[0] += 1
        if count[0] == n: raise what('killed')
        return loss_fn(m, batch)
    return fn


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('at', [1, 14, 33])
def test_resume_equals_uninterrupted(tmp_path, accumulate, at):
    # 5 batches an epoch: with accumulate=2 the fifth waits for another epoch; dropout and batch norm make the state more than the weights
    whole, _ = train(tmp_path/'whole', accumulate=accumulate)
    if at <= 24*accumulate:
        with pytest.raises(Killed): train(tmp_path/'cut', accumulate=accumulate, loss_fn=dies_at(at))
    again, out = train(tmp_path/'cut', accumulate=accumulate)
    same(whole, again)
    assert (out['step'], out['resumed']) == (24, False)

def test_metrics_have_no_doubles(tmp_path):
    with pytest.raises(Killed): train(tmp_path, loss_fn=dies_at(20), log_every=1)   # logged up to 19, saved at 15
    train(tmp_path, log_every=1)
    rows = list(csv.reader((tmp_path/'metrics.csv').open()))
    keys = [tuple(r[:2]) for r in rows[1:]]
    assert rows[0] == ['step', 'name', 'value'] and len(keys) == len(set(keys))
    assert read_metrics(tmp_path)['train/loss'][0] == list(range(1, 25))
    with (tmp_path/'metrics.csv').open('a') as f: f.write('24,train/lo')   # half a line of a killed process
    train(tmp_path, max_steps=26, log_every=1)
    assert read_metrics(tmp_path)['train/loss'][0] == list(range(1, 27))

def test_a_finished_run_is_not_trained_again(tmp_path):
    a, _ = train(tmp_path)
    (tmp_path/'metrics.csv').unlink()
    _, out = train(tmp_path, loss_fn=dies_at(1))
    assert out['resumed'] and out['step'] == 24 and not (tmp_path/'metrics.csv').exists()
    longer, out = train(tmp_path, max_steps=30)                       # only the length may grow
    assert out['step'] == 30

def test_killed_between_the_last_checkpoint_and_the_end(tmp_path):
    _, out = train(tmp_path, validate=lambda m: dict(score=.5))
    assert out['metrics'] == dict(score=.5)
    (tmp_path/'done.json').unlink()
    assert train(tmp_path, validate=lambda m: dict(score=.5))[1]['metrics'] == dict(score=.5)
    assert json.loads((tmp_path/'done.json').read_text())['metrics'] == dict(score=.5)

def test_keep(tmp_path):
    train(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ['step_000020.pt', 'step_000024.pt']


SCRIPT = """
import sys, time; sys.path.insert(0, {tests!r})
import test_fit as t
def slow(m, batch): time.sleep(.02); return t.loss_fn(m, batch)
t.train({run!r}, loss_fn=slow, max_steps=60, checkpoint_every=3)
"""

def child(run): return subprocess.Popen([sys.executable, '-c', SCRIPT.format(tests=str(Path(__file__).parent), run=str(run))], env=env(), stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)

def wait_for_step(run, n, p, timeout=120):
    end = time.time()+timeout
    while not (c := checkpoints(run)) or int(c[-1].stem[5:]) < n:
        assert p.poll() is None and time.time() < end, p.stderr.read()
        time.sleep(.01)

def test_kill_9_in_mid_training(tmp_path):
    whole, _ = train(tmp_path/'whole', max_steps=60)
    p = child(tmp_path/'cut')
    wait_for_step(tmp_path/'cut', 9, p); p.kill(); p.wait()
    steps = int(checkpoints(tmp_path/'cut')[-1].stem[5:])
    assert 9 <= steps < 60
    again, _ = train(tmp_path/'cut', max_steps=60, checkpoint_every=3)
    same(whole, again)

@pytest.mark.parametrize('at', [4, 11])
def test_ctrl_c_saves_a_whole_step(tmp_path, at):
    # the signal comes in the middle of a step: what is saved must be the state after it
    def fn(m, batch, n=[0]):
        n[0] += 1
        if n[0] == at: os.kill(os.getpid(), signal.SIGINT)
        return loss_fn(m, batch)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        whole, _ = train(tmp_path/'whole')
        with pytest.raises(KeyboardInterrupt): train(tmp_path/'cut', loss_fn=fn)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally: signal.signal(signal.SIGINT, old)
    assert checkpoints(tmp_path/'cut')[-1].name == f'step_{at:06d}.pt'
    again, _ = train(tmp_path/'cut')
    same(whole, again)

def test_second_ctrl_c_does_not_wait(tmp_path):
    def fn(m, batch):
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError('went on')
    with pytest.raises(KeyboardInterrupt): train(tmp_path, loss_fn=fn)
    assert not checkpoints(tmp_path)

def test_trains_outside_the_main_thread(tmp_path):
    out = []
    t = threading.Thread(target=lambda: out.append(train(tmp_path)[1]['step'])); t.start(); t.join()
    assert out == [24]


def test_damaged_checkpoint_is_named(tmp_path):
    train(tmp_path)
    last = checkpoints(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:200])
    with pytest.raises(ValueError, match=r'step_000024\.pt is not a checkpoint.*damaged'): train(tmp_path, max_steps=30)
    last.unlink()                                                     # the one before is whole
    assert train(tmp_path, max_steps=30)[1]['step'] == 30

def test_foreign_files_are_named(tmp_path):
    torch.save(dict(weights=torch.ones(1)), tmp_path/'x.pt')
    with pytest.raises(ValueError, match="lacks 'model' and 'config'"): load_checkpoint(tmp_path/'x.pt')
    with pytest.raises(FileNotFoundError, match='was it trained'): load_checkpoint(tmp_path)

def test_other_configuration_is_named(tmp_path):
    train(tmp_path, config=dict(data=dict(split='train')))
    with pytest.raises(ValueError, match=r'fit\.lr: 0\.05 there, 0\.01 now'): train(tmp_path, lr=.01, config=dict(data=dict(split='train')))
    with pytest.raises(ValueError, match=r'data\.split: train there, val now'): train(tmp_path, config=dict(data=dict(split='val')))

def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save, n = torch.save, [0]
    def full(obj, path, **kw):
        n[0] += 1
        if n[0] < 3: return save(obj, path, **kw)
        Path(path).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    whole, _ = train(tmp_path/'whole')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match=r'cannot write .*step_000015\.pt.*No space left.*are intact'): train(tmp_path/'cut')
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/'cut/checkpoints').iterdir() if p.suffix == '.part'] == []
    assert checkpoints(tmp_path/'cut')[-1].name == 'step_000010.pt'
    same(whole, train(tmp_path/'cut')[0])

def test_non_finite_loss(tmp_path):
    def nan(m, batch): out = loss_fn(m, batch); return dict(loss=out['loss']*float('nan'), part=out['loss'])
    with pytest.raises(ValueError, match=r"not finite at step 0.*'part'.*lower lr"): train(tmp_path, loss_fn=nan)
    assert not checkpoints(tmp_path)

def test_too_little_data(tmp_path):
    with pytest.raises(ValueError, match='cannot fill one batch'): train(tmp_path, pairs=PAIRS[:4])
    with pytest.raises(ValueError, match='gives no batch'): train(tmp_path, pairs=PAIRS[:8], accumulate=2)


TWO = """
import sys; sys.path.insert(0, {tests!r})
import torch, test_fit as t
from bev_reid.fit import *
m = t.model()[0]
fit(m, lambda m, b: dict(loss=(m(b[0]).sum(1)-b[1][:, 0]).square().mean()), Batches(t.PAIRS, shuffled(40, 8)), run_dir={run!r}, cfg=t.cfg(**{kw!r}), device='cpu')
"""

def test_two_processes_are_two_batches(tmp_path):
    # the gradient of two processes is the mean over two batches, and so is that of one process that accumulates two
    runs = {}
    for name, start, kw in (('two', ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'], {}), ('one', [], dict(accumulate=2))):
        script = tmp_path/f'{name}.py'
        script.write_text(TWO.format(tests=str(Path(__file__).parent), run=str(tmp_path/name), kw=kw))
        r = subprocess.run([sys.executable, *start, str(script)], env=env(), capture_output=True, text=True, timeout=240)
        assert r.returncode == 0, r.stderr
        runs[name] = load_checkpoint(tmp_path/name)
        assert len(read_metrics(tmp_path/name)['train/loss'][0]) == 6     # one process writes
    assert runs['two']['model'].keys() == runs['one']['model'].keys()
    for k, v in runs['one']['model'].items(): torch.testing.assert_close(runs['two']['model'][k], v)

def test_a_run_whose_config_holds_its_recipe_can_be_made_longer():
    "the real trainings store the whole recipe, and the length stands in it a second time"
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        def run(steps, lr=1e-3):
            m, cfg = nn.Linear(1, 1), FitConfig(max_steps=steps, lr=lr)
            return Run(m, torch.optim.Adam(m.parameters()), run_dir=d, cfg=cfg, config=dict(recipe=dict(fit=cfg)))
        run(10).save(); run(20)
        with pytest.raises(ValueError, match='lr'): run(20, lr=1e-2)

def test_half_precision_is_chosen_where_the_machine_has_it(monkeypatch):
    def has(cuda=False, cuda_bf16=False, **cpu):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: cuda_bf16 or including_emulation)
        for k in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'): monkeypatch.setattr(torch.cpu, k, lambda k=k: cpu.get(k, False), raising=False)
    has(); assert fast_amp() == fast_amp('cpu') == FitConfig(amp='auto').amp == 'no'
    has(_is_amx_tile_supported=True); assert fast_amp() == FitConfig(amp='auto').amp == 'bf16'
    has(_is_avx512_bf16_supported=True); assert fast_amp(torch.device('cpu')) == 'bf16'
    has(cuda=True); assert fast_amp() == fast_amp('cuda') == 'no'                         # a GPU that only emulates it
    has(cuda=True, cuda_bf16=True); assert fast_amp() == 'bf16' and fast_amp('cpu') == 'no'
    assert FitConfig().amp == 'no'
    for k in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'): monkeypatch.delattr(torch.cpu, k)   # an older PyTorch does not tell
    assert fast_amp('cpu') == 'no'

def test_a_run_from_before_goes_on_as_it_began(tmp_path):
    "Checkpoints written without the fused optimiser and without today's options resume, and keep their optimiser"
    with pytest.raises(Killed): train(tmp_path, loss_fn=dies_at(14))
    path = checkpoints(tmp_path)[-1]; state = load_checkpoint(path)
    del state['config']['fit']['compile']
    for g in state['optimizer']['param_groups']: g['fused'] = None
    save_atomic(state, path)
    _, out = train(tmp_path)
    assert out['step'] == 24 and all(g['fused'] is None for g in load_checkpoint(tmp_path)['optimizer']['param_groups'])

def test_compiled_training_writes_ordinary_checkpoints(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **kw: compiled.append(self))
    m, _ = train(tmp_path/'a', compile=True)
    same(m, train(tmp_path/'b')[0])
    assert compiled == [m] and load_checkpoint(tmp_path/'a')['model'].keys() == m.state_dict().keys()
