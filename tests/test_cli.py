"""The verbs, run as the installed commands: the whole road, and bad input, a full disk and Ctrl-C, which all end in one message and status 2."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import bev_reid.cli as cli
from bev_reid.fit import checkpoints, load_checkpoint, read_metrics
from road import BIN, CROP, LSS, METRIC, REAL, Command, env, halves, hear_ctrl_c, verb, walk

VERBS = 'toy train_lss eval_lss dataset train eval show export demo'.split()

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('road')

@pytest.fixture(scope='module')
def said(toy_root, out): return walk(toy_root, out)

@pytest.fixture
def world(toy_root, tmp_path):
    "A copy that may be damaged"
    return Path(shutil.copytree(toy_root, tmp_path/'world'))

def refused(says, name, *args, tmp, **kw):
    "The command ends with status 2 and one line that says what is wrong"
    out, err = verb(name, *args, code=2, tmp=tmp, **kw)
    last = err.strip().splitlines()[-1]
    assert last.startswith(f'bev_reid_{name}: error: '), err
    for s in [says] if isinstance(says, str) else says: assert s in last, (s, last)
    return last


@pytest.mark.parametrize('name', VERBS)
def test_help(name, tmp_path):
    text, _ = verb(name, '--help', tmp=tmp_path)
    assert getattr(cli, f'bev_reid_{name}').__doc__ in ' '.join(text.split()) and f'usage: bev_reid_{name}' in text   # lines may wrap
    assert 'options:' in text and all(len(l.split('  ')) > 1 for l in text.splitlines() if l.startswith('  --'))   # every option has its help

HEAVY = {'torch', 'numpy', 'nuscenes', 'matplotlib', 'cv2', 'pyarrow', 'sklearn', 'scipy', 'tensorboard', 'accelerate', 'IPython', 'ipywidgets', 'efficientnet_pytorch'}

def imported(*cmd):
    "Top names of everything that a process imports"
    r = subprocess.run([sys.executable, '-X', 'importtime', *map(str, cmd)], env=env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return {l.split('|')[-1].strip().split('.')[0] for l in r.stderr.splitlines() if l.startswith('import time:')}

@pytest.mark.parametrize('name', VERBS)
def test_help_loads_nothing_heavy(name):
    assert not imported(BIN/f'bev_reid_{name}', '--help') & HEAVY

@pytest.mark.parametrize('module, allowed', [('bev_reid', set()), ('bev_reid.cli', set()), ('bev_reid.toy', {'numpy'}), ('bev_reid.tables', {'numpy', 'pyarrow'}), ('bev_reid.geometry', {'numpy', 'torch'}),
    ('bev_reid.data', {'numpy', 'torch', 'cv2', 'pyarrow'}), ('bev_reid.train', {'numpy', 'torch', 'cv2', 'pyarrow'})])
def test_modules_load_what_they_need(module, allowed):
    assert not imported('-c', f'import {module}') & HEAVY-allowed

def test_verbs_are_functions(tmp_path):
    with pytest.raises(FileNotFoundError): cli.bev_reid_train_lss(str(tmp_path), str(tmp_path/'run'))             # an exception, and no exit
    with pytest.raises(ValueError, match='has no GPU') if not torch.cuda.is_available() else pytest.raises(FileNotFoundError): cli.bev_reid_train(str(tmp_path), str(tmp_path/'run'), device='cuda')


def test_the_whole_road(said, out, toy_root):
    assert 'step 4, 0 samples skipped' in said['train_lss'][0] and load_checkpoint(out/'lss')['step'] == 4
    assert {'train/seg', 'train/depth', 'train/identity', 'train/loss', 'train/lr'} <= read_metrics(out/'lss').keys()
    scores = json.loads((out/'lss.json').read_text())
    assert scores['split'] == 'test' and scores['n_samples'] == 4 and 0 <= scores['iou'] <= 1 and 'IoU' in said['eval_lss'][0]
    assert json.loads((out/'reid/dataset.json').read_text())['splits'].keys() == {'train', 'test'}
    rows = json.loads((out/'reid.json').read_text())['rows']
    assert rows[0]['method'] == 'learned embedding' and {'chance', 'position (nobody moves)', 'colour histogram of the patch'} <= {r['method'] for r in rows}
    for w in ('learned embedding', 'chance', 'single-shot', 'rank1', 'mAP'): assert w in said['eval'][0]
    assert [l.split(':')[0] for l in said['watch'][0].splitlines()] == ['step 3', 'step 6']
    assert json.loads((out/'metric/eval.json').read_text())['steps'].keys() == {'3', '6'}
    page = (out/'report.html').read_text()
    assert page.count('<section>') == 8 and 'src="http' not in page and len(page) > 1e5
    assert halves(out) == []

def test_again_is_done_at_once(said, out, toy_root, tmp_path):
    before = (out/'lss/checkpoints/step_000004.pt').stat().st_mtime_ns
    assert 'step 4' in verb('train_lss', toy_root, out/'lss', *LSS, 'fit.log_every=1', '--steps', 4, tmp=tmp_path)[0]
    assert (out/'lss/checkpoints/step_000004.pt').stat().st_mtime_ns == before
    verb('dataset', out/'lss', toy_root, out/'reid', *CROP, tmp=tmp_path)


# --- bad input ---
def test_data_root_without_tables(tmp_path):
    (tmp_path/'empty').mkdir()
    refused(['empty', 'has no tables'], 'train_lss', tmp_path/'empty', tmp_path/'run', *LSS, tmp=tmp_path)
    refused(['nowhere', 'does not exist'], 'train_lss', tmp_path/'nowhere', tmp_path/'run', *LSS, tmp=tmp_path)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('args, says', [
    (['--version', 'v1.0-full'], ["unknown version 'v1.0-full'", 'v1.0-toy']), (['--split', 'dev'], ["unknown or empty split 'dev'", "'train': 1"]),
    (['--split', 'val'], "empty split 'val'"), (['--recipe', 'kitti'], ["no LSS recipe 'kitti'", 'nuscenes, toy']), (['--cams', 'CAM_ROOF'], "CAM_ROOF"),
    (['--device', 'tpu'], '--device must be auto, cpu or cuda'), (['--split-by', 'colour'], 'split_by must be'), (['--steps', '-1'], 'max_steps'),
    (['--set', 'lss.wheels=4'], "there is no 'wheels'"), (['--set', 'classes=["vehicle.boat"]'], "unknown class 'vehicle.boat'"), (['--set', 'lss.img_size=[60,100]'], 'multiples of')])
def test_unknown_names(toy_root, tmp_path, args, says):
    refused(says, 'train_lss', toy_root, tmp_path/'run', '--recipe', 'toy', '--device', 'cpu', *args, tmp=tmp_path)
    assert not (tmp_path/'run').exists()

def test_modalities_have_their_own_recipe(tmp_path):
    refused(['--modalities', 'no --loss, --joint', 'leave them out'], 'train', tmp_path/'reid', tmp_path/'run', '--modalities', 'rgb', 'lidar', '--loss', 'triplet', '--joint', tmp=tmp_path)
    assert not (tmp_path/'run').exists()

def test_wrong_usage_shows_it(tmp_path):
    assert 'usage: bev_reid_train' in verb('train', 'reid', '--speed', '9', code=2, tmp=tmp_path)[1]

@pytest.mark.parametrize('table, damage, says', [
    ('calibrated_sensor', lambda r: r.update(translation=[float('nan')]*3), ['NaN', 'cam2ego of CAM']),
    ('calibrated_sensor', lambda r: r.update(camera_intrinsic=[[0, 0, 0]]*3), ['intrinsics of CAM', 'not invertible']),
    ('ego_pose', lambda r: r.update(rotation=[0, 0, 0, 0]), 'ego pose of')])
def test_broken_calibration(world, tmp_path, table, damage, says):
    path = world/'v1.0-toy'/f'{table}.json'
    rows = json.loads(path.read_text())
    for r in rows:
        if table == 'ego_pose' or r['camera_intrinsic']: damage(r)
    path.write_text(json.dumps(rows))
    refused(says, 'train_lss', world, tmp_path/'run', *LSS, '--steps', 1, tmp=tmp_path)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('what', ['missing image', 'truncated image', 'missing LiDAR', 'truncated LiDAR'])
def test_broken_files(world, tmp_path, what):
    scene = json.loads((world/'v1.0-toy/splits.json').read_text())['train'][0]
    from bev_reid.data import DrivingData
    data = DrivingData(world)
    f = data.frame(data.sample_tokens(scenes=[scene])[1])
    path = Path(f.lidar_path if 'LiDAR' in what else f.img_paths[3])
    path.unlink() if 'missing' in what else path.write_bytes(path.read_bytes()[:1001])
    args = ['train_lss', world, tmp_path/'run', *LSS, 'batch_size=2']
    refused([path.name, 'missing' if 'missing' in what else 'truncated', '--skip-missing'], *args, '--steps', 2, tmp=tmp_path)
    assert checkpoints(tmp_path/'run') == [] and halves(tmp_path) == []
    if what == 'truncated image': assert '1 samples skipped' in verb(*args[:3], '--skip-missing', *LSS, 'batch_size=1', '--steps', 1, tmp=tmp_path)[0]

def test_bad_data_set_options(said, out, toy_root, tmp_path):
    base = ['dataset', out/'lss', toy_root, tmp_path/'reid', '--device', 'cpu']
    refused(['crop extent 5.0 m is smaller than the longest box', 'instance', 'pass extent>='], *base, '--extent', 5, tmp=tmp_path)
    refused("unknown class 'vehicle.boat'", *base, '--extent', 16, '--classes', 'vehicle.boat', tmp=tmp_path)
    refused('not an LSS checkpoint', base[0], out/'metric', *base[2:], tmp=tmp_path)
    refused('no checkpoint at', base[0], out/'nothing', *base[2:], tmp=tmp_path)
    assert not (tmp_path/'reid').exists()
    refused(['dataset.crop.size: 16 there, 20 now', 'another folder'], 'dataset', out/'lss', toy_root, out/'reid', '--extent', 16, '--size', 20, '--device', 'cpu', tmp=tmp_path)

def test_checkpoints_of_another_configuration(said, out, toy_root, tmp_path):
    refused(['lss was made with another configuration', 'fit.lr: 0.002 there, 0.1 now'], 'train_lss', toy_root, out/'lss', *LSS, 'fit.lr=.1', 'fit.log_every=1', '--steps', 4, tmp=tmp_path)
    refused('fit.seed: 0 there, 3 now', 'train', out/'reid', out/'metric', *METRIC, 'fit.seed=3', '--steps', 6, tmp=tmp_path)
    verb('dataset', out/'lss', toy_root, tmp_path/'reid', '--extent', 20, '--size', 16, '--device', 'cpu', tmp=tmp_path)
    refused(['was trained on crops', "'extent': 16.0", "'extent': 20.0"], 'eval', out/'metric', tmp_path/'reid', tmp=tmp_path)
    refused('is not a checkpoint of a metric network', 'eval', out/'lss', out/'reid', tmp=tmp_path)
    torch.save(dict(x=1), tmp_path/'x.pt')
    refused('x.pt', 'eval_lss', tmp_path/'x.pt', toy_root, tmp=tmp_path)

def test_splits_and_identities(said, out, tmp_path):
    refused(["no split 'dev'", 'test, train'], 'eval', out/'metric', out/'reid', '--split', 'dev', tmp=tmp_path)
    refused('no finished ReID data set', 'train', out/'lss', tmp_path/'run', *METRIC, tmp=tmp_path)
    few = Path(shutil.copytree(out/'reid', tmp_path/'few'))
    t = pq.read_table(few/'observations.parquet')
    ids = np.array(t['identity'].to_pylist())
    pq.write_table(t.filter(ids == ids[np.array(t['split'].to_pylist()) == 'train'][0]), few/'observations.parquet')
    refused('at least 2 identities', 'train', few, tmp_path/'run', *METRIC, 'min_visibility=1', tmp=tmp_path)
    refused('holds out nothing', 'eval', out/'metric', few, tmp=tmp_path)
    assert not (tmp_path/'run').exists()

def test_show_without_a_data_set(said, out, tmp_path):
    refused('is not a ReID data set', 'show', out/'metric', tmp_path, '--out', tmp_path/'r.html', tmp=tmp_path)
    assert not (tmp_path/'r.html').exists()


# --- a full disk: no file may grow beyond a size ---
def full(n): return f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({n}, {n}))'

def test_full_disk(said, out, toy_root, tmp_path):
    refused(['cannot write', 'step_000001.pt'], 'train_lss', toy_root, tmp_path/'lss', *LSS, '--steps', 1, before=full(200_000), tmp=tmp_path)
    refused(['cannot write', 'before are intact'], 'dataset', out/'lss', toy_root, tmp_path/'reid', *CROP, before=full(50_000), tmp=tmp_path)
    refused('report.html', 'show', out/'metric', out/'reid', '--min-gap', .5, '--out', tmp_path/'report.html', before=full(50_000), tmp=tmp_path)
    assert halves(tmp_path) == [] and not (tmp_path/'report.html').exists() and checkpoints(tmp_path/'lss') == []
    verb('dataset', out/'lss', toy_root, tmp_path/'reid', *CROP, tmp=tmp_path)                                  # there is room again
    assert pq.read_table(tmp_path/'reid/observations.parquet').equals(pq.read_table(out/'reid/observations.parquet'))


# --- Ctrl-C ---
def stopped(p):
    p.send(signal.SIGINT)
    assert p.wait() == 2, p.err.read_text()
    assert 'interrupted; the same command goes on' in p.err.read_text() and 'Traceback' not in p.err.read_text()

def test_ctrl_c_while_training(toy_root, tmp_path):
    args = ['train_lss', toy_root, tmp_path/'cut', *LSS, 'fit.log_every=1']
    p = Command(*args, '--steps', 6, tmp=tmp_path)
    p.until(lambda: (tmp_path/'cut/metrics.csv').exists() and len((tmp_path/'cut/metrics.csv').read_text().splitlines()) > 5)
    stopped(p)
    at = load_checkpoint(tmp_path/'cut')['step']
    assert 0 < at < 6 and not (tmp_path/'cut/done.json').exists()
    verb(*args, '--steps', 6, tmp=tmp_path)
    verb('train_lss', toy_root, tmp_path/'whole', *LSS, 'fit.log_every=1', '--steps', 6, tmp=tmp_path)
    a, b = load_checkpoint(tmp_path/'cut'), load_checkpoint(tmp_path/'whole')
    assert a['step'] == b['step'] == 6
    for k in b['model']: assert torch.equal(a['model'][k], b['model'][k]), k                                    # as if nothing had happened

def test_ctrl_c_while_the_data_set_is_built(said, out, toy_root, tmp_path):
    args = ['dataset', out/'lss', toy_root, tmp_path/'reid', *CROP]
    p = Command(*args, tmp=tmp_path)
    p.until(lambda: list((tmp_path/'reid').glob('scenes/*/rows.json')) and not halves(tmp_path/'reid'))
    stopped(p)
    for s in (tmp_path/'reid/scenes').iterdir(): assert s.suffix == '.part' or len(list(s.iterdir())) == 5
    verb(*args, tmp=tmp_path)
    assert pq.read_table(tmp_path/'reid/observations.parquet').equals(pq.read_table(out/'reid/observations.parquet')) and halves(tmp_path) == []

def test_ctrl_c_while_watching(said, out, tmp_path):
    run = Path(shutil.copytree(out/'metric', tmp_path/'metric')); (run/'done.json').unlink(); (run/'eval.json').unlink()
    p = Command('eval', run, out/'reid', '--min-gap', .5, '--watch', tmp=tmp_path)
    p.until(lambda: p.out.read_text().count('step') == 2)                                                       # it waits for a third
    stopped(p)
    assert json.loads((run/'eval.json').read_text())['steps'].keys() == {'3', '6'} and halves(tmp_path) == []

def test_ctrl_c_while_a_world_is_made(tmp_path):
    p = Command('toy', tmp_path/'world', '--n-scenes', 4, '--n-samples', 20, '--workers', 1, tmp=tmp_path)
    p.until(lambda: list(tmp_path.glob('world*')))
    time.sleep(.5); stopped(p)
    assert not list((tmp_path/'world').glob('v1.0-toy/scene.json'))

def test_ctrl_c_while_loading(toy_root, tmp_path):
    # a process of its own: the signal comes in the seconds in which PyTorch is imported
    p = subprocess.Popen([BIN/'bev_reid_train_lss', toy_root, tmp_path/'run', *LSS], env=env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    while 'libtorch' not in Path(f'/proc/{p.pid}/maps').read_text(): time.sleep(.02)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 2 and 'interrupted' in err and 'Traceback' not in err, err
    assert not (tmp_path/'run').exists()

def test_bad_input_in_a_process_of_its_own(tmp_path):
    r = subprocess.run([BIN/'bev_reid_train', tmp_path/'nothing', tmp_path/'run'], env=env(), capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith('bev_reid_train: error: ') and 'no finished ReID data set' in r.stderr and r.stderr.count('\n') == 1


@pytest.mark.nuscenes
@pytest.mark.skipif(not (REAL/'lyft_scene').is_dir(), reason=f"{REAL/'lyft_scene'} is absent: set BEV_REID_DATA to the folder of real data")
def test_real_pictures(tmp_path):
    # 42 keyframes of six cameras of 1224 x 1024: two steps, then a data set split by identity
    world = REAL/'lyft_scene'
    verb('train_lss', world, tmp_path/'lss', *LSS, 'img_aug.crop_bottom=[.2,.35]', '--steps', 2, tmp=tmp_path)
    text, _ = verb('dataset', tmp_path/'lss', world, tmp_path/'reid', '--extent', 20, '--size', 8, '--device', 'cpu', tmp=tmp_path)
    summary = json.loads((tmp_path/'reid/dataset.json').read_text())
    assert summary['splits'].keys() == {'train', 'test'} and summary['n_skipped'] == 0 and summary['n_obs'] > 200
    verb('train', tmp_path/'reid', tmp_path/'metric', *METRIC, '--steps', 2, tmp=tmp_path)
    assert 'learned embedding' in verb('eval', tmp_path/'metric', tmp_path/'reid', tmp=tmp_path)[0]


def test_more_of_the_evaluation_and_export(said, out, tmp_path, capsys):
    "The flags beyond the road: a refined row, strata, pairs; what is carried away, and what is refused"
    res = cli.bev_reid_eval(str(out/'metric'), str(out/'reid'), min_gap=.4, min_visibility=1, rerank='expand', strata=True, protocol='paired', out=str(tmp_path/'e.json'))
    text = capsys.readouterr().out
    assert 'learned embedding, expand' in {r['method'] for r in res['rows']} and all(k in text for k in ('strata:', 'differences:', 'verification:', 'paired:'))
    assert json.loads((tmp_path/'e.json').read_text())['paired']
    with pytest.raises(ValueError, match='protocol must be one of all, paired, within-condition'): cli.bev_reid_eval(str(out/'metric'), str(out/'reid'), protocol='pairs')
    with pytest.raises(ValueError, match='pass --dataset'): cli.bev_reid_export(str(out/'metric'), str(tmp_path/'e.npz'))
    with pytest.raises(ValueError, match='arcface'): cli.bev_reid_train(str(out/'reid'), str(tmp_path/'run'), loss='nonsense')
    cli.bev_reid_export(str(out/'metric'), str(tmp_path/'e.npz'), dataset=str(out/'reid'))
    assert (tmp_path/'e.npz').exists() and not (tmp_path/'run').exists()
