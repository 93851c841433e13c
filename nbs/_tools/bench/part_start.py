"Start-up: what an import, a --help and the tables of a set cost, each in a process of its own"
import os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import tables
from timing import ROOT, row

VERBS = ('toy', 'train_lss', 'eval_lss', 'dataset', 'train', 'eval', 'show', 'export', 'demo')

def spent(cmd):
    "Wall and CPU seconds of a process, from its start to its end"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    before, wall = os.times(), time.perf_counter()
    subprocess.run([str(c) for c in cmd], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=env)
    wall, after = time.perf_counter()-wall, os.times()
    return wall, after.children_user+after.children_system-before.children_user-before.children_system

def side_by_side(ways, rounds):
    "name -> medians, one process of each way per round"
    if rounds > 1: [spent(cmd) for cmd in ways.values()]               # files into the cache
    got = {n: [] for n in ways}
    for _ in range(rounds):
        for n, cmd in ways.items(): got[n].append(spent(cmd))
    return {n: dict(wall_s=statistics.median(w for w, _ in g), cpu_s=statistics.median(c for _, c in g), rounds=rounds) for n, g in got.items()}

def rows(quick, say):
    py, rounds = [sys.executable, '-c'], 1 if quick else 3
    say('import and --help')
    ways = {'import bev_reid': 'import bev_reid', 'import torch': 'import torch'}
    if not quick: ways |= {'import bev_reid.data (tables, images, LiDAR)': 'import bev_reid.data', 'import nuscenes (the devkit)': 'import nuscenes'}
    t = side_by_side({n: py+[c] for n, c in ways.items()}, rounds)
    note = 'an absolute figure in CPU seconds, which on an idle machine are the seconds of the clock'
    out = [row('start', 'import in a new Python, start to end', t, at_most={'import bev_reid, s': (t['import bev_reid']['cpu_s'], .3)}, measure='cpu_s', note=note)]
    helps = side_by_side({f'bev_reid_{v} --help': [Path(sys.executable).parent/f'bev_reid_{v}', '--help'] for v in VERBS}, rounds)
    slow = max(helps, key=lambda n: helps[n]['cpu_s'])
    out.append(row('start', '--help of the slowest of nine commands, start to end', {slow: helps[slow], 'import torch': t['import torch']}, at_most={'--help, s': (helps[slow]['cpu_s'], 1.)}, measure='cpu_s',
        note=note+'; '+', '.join(f"{n.split()[0][9:]} {h['cpu_s']:.2f} s" for n, h in helps.items())))
    share = .01 if quick else .1
    say(f'tables of {share:g} of nuScenes trainval')
    with tempfile.TemporaryDirectory() as tmp:
        n = tables.make_tables(Path(tmp)/'set', share=share)
        size = sum(f.stat().st_size for f in Path(tmp).rglob('*.json'))/1e6
        got = tables.compare(Path(tmp)/'set', rounds=1 if quick else 2, say=say)
        idle = dict.fromkeys(got, 0) if quick else {k: tables.run(tables.IDLE.format(m), tmp)['peak_mb'] for k, m in dict(ours='import bev_reid.data', devkit='import nuscenes').items()}
    extra = {k: got[k]['peak_mb']-idle[k] for k in got}
    out.append(row('start', f"tables with {n['sample_data']:,} sample_data, {n['sample_annotation']:,} annotations ({size:.0f} MB of JSON) loaded, 1 thread", {'DrivingData': got['ours'], "the devkit's NuScenes": got['devkit']},
        at_least={"the devkit's NuScenes": 1.}, at_most={} if quick else {'peak memory above the imports, MB': (extra['ours'], 250)}, measure='cpu_s', note='' if quick else f"peak memory above the imports: {extra['ours']:.0f} MB against {extra['devkit']:.0f} MB; the imports: {idle['ours']:.0f} MB (PyTorch) against {idle['devkit']:.0f} MB; whole trainval: results/tables.json"))
    return out
