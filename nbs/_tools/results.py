#!/usr/bin/env python
"""`make results`: train and measure every variant on one toy world, and write the tables that the page of results shows

    python nbs/_tools/results.py               everything: about three hours on two cores; interrupted and called again it goes on
    python nbs/_tools/results.py --only losses best      the rows of some tables, and what they need
    python nbs/_tools/results.py --list        the commands, without running them
    python nbs/_tools/results.py --quick       the same road with a tiny world and a few steps: no number of it means anything

The world, `standard`: 30 scenes of 10 s by day, by night and in rain; 21 to train on, 3 to choose on, 6 to measure on, no vehicle in two of these parts.
Every step is one of the package's own commands, run as it stands, in a process of its own, two at a time. Runs go to demo/standard, which git ignores;
results/standard.json gets a row as soon as its last seed is measured. A command that has run is not run again, unless it or what it reads changed: delete its file in demo/standard/done to repeat it.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bev_reid.fit import write_json

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 0, 1, 2
LOSSES = 'cosine-softmax', 'triplet', 'magnet', 'arcface', 'cosface', 'subcenter-arcface', 'circle', 'multi-similarity', 'supcon'
FEATURES = dict([('bev', ['bev']), ('rgb', ['rgb']), ('rgb_lidar', ['rgb_lidar']), ('lidar', ['lidar']), ('rgb_lidar + lidar', ['rgb_lidar', 'lidar']), ('all four', ['bev', 'rgb', 'rgb_lidar', 'lidar'])])
REAL = '$BEV_REID_DATA/lyft_scene'
WIDE = 24, 48 # window in metres, cells: chosen on the validation scenes, as what follows
AUG = 'aug.shift=0.2', 'aug.turn=3'
BEST = dict(steps=1200, train=('--loss', 'triplet'), sets=('p=24', *AUG)) # the loss: see the table `tried`
LAYERS = 'raster.layers=[0.35,0.85,1.35]' # below the sills, up to the bonnet, windows, roofs: chosen on the validation scenes
TABLES = dict(losses='Losses', joint='Frozen or joint', features='What a crop carries', map='The BEV network', crop='The window', best='The best of these, trained longer',
              lyft='One real scene', conditions='By day, at night, in rain', across='The same vehicle under another condition', modal='Camera against LiDAR', choice='The window, on the validation scenes',
              tried='Loss and cells of the widest window, on the validation scenes')
SPLITS = 0, 1, 2, 3, 4 # of the identities of the real scene into two halves

@dataclass
class Job:
    "Commands in a row, and the jobs whose output they read"
    name:str
    commands:list
    needs:tuple = ()

@dataclass
class Row:
    "A line of a table: one evaluation per seed"
    table:str
    name:str
    jobs:list = field(default_factory=list)

def word(name):
    "A name as part of a path"
    return re.sub(r'[^A-Za-z0-9.]+', '_', name).strip('_')

class Plan:
    "All jobs of a size, by name, and the rows they fill"
    def __init__(self, quick):
        self.quick, self.jobs, self.rows, self.at = quick, {}, [], 'demo/standard' + ('_quick' if quick else '')
        self.seeds = SEEDS[:2] if quick else SEEDS
        self.world = self.add('world', [['bev_reid_toy', f'{self.at}/world', *(['--n-scenes', 5, '--n-samples', 8, '--height', 112, '--width', 200] if quick else ['--n-scenes', 30]), '--conditions', 'day', 'night', 'rain']])
        self.tables()

    def add(self, name, commands, *needs):
        self.jobs.setdefault(name, Job(name, [[str(w) for w in c] for c in commands], tuple(needs))); return name

    def steps(self, n): return 4 if self.quick else n

    def lss(self, name, *change):
        return self.add(f'lss/{name}', [['bev_reid_train_lss', f'{self.at}/world', f'{self.at}/lss/{name}', '--recipe', 'toy', '--steps', self.steps(1200), *(['--set', *change] if change else [])]], self.world)

    def data(self, name, lss, features, extent, size, *more):
        return self.add(f'data/{name}', [['bev_reid_dataset', f'{self.at}/{lss}', f'{self.at}/world', f'{self.at}/data/{name}', '--extent', extent, '--size', size, '--clip', '--features', *features, *more]], lss)

    def real(self, name, lss, features, *train, steps=150):
        "A row of the real scene: one data set, training and measurement for each split of its vehicles; `steps` 0 measures a network as it is"
        row, every = Row('lyft', name), ['bev', 'rgb_lidar', 'lidar']
        for s in SPLITS[:len(self.seeds)] if self.quick else SPLITS:
            at = f"{self.at}/lyft/{lss.split('/')[-1]}_{s}"
            reid = self.add(f'data/lyft/{lss}/{s}', [['bev_reid_dataset', f'{self.at}/{lss}', REAL, at, '--extent', WIDE[0], '--size', WIDE[1], '--clip', '--features', *every, '--split-by', 'identity', '--set', LAYERS, f'seed={s}']], lss)
            run = f"{self.at}/lyft/runs/{word(name)}_s{s}"
            given = next((str(t) for t in train if str(t).startswith(self.at)), run)
            fit = [['bev_reid_train', at, run, '--recipe', 'toy', '--steps', self.steps(steps), '--features', *features, *BEST['train'], '--set', 'p=8', 'fit.eval_every=0', f'fit.seed={s}', 'fit.amp=auto', *AUG, *[t for t in train if '=' in t]]] if steps else []
            row.jobs.append(self.add(f'lyft/{name}/{s}', [*fit, ['bev_reid_eval', given if not steps else run, at, '--imagenet', '--out', f'{run}.json']], reid, *[f'best/best/{self.seeds[0]}' for t in train if 'best' in str(t)]))
        self.rows.append(row)

    def row(self, table, name, data, *train, steps=300, sets=(), measure=('--bare',), first=None, seeds=None, amp=('fit.amp=auto',)):
        "Train and measure with every seed"
        row = Row(table, name)
        for s in seeds or self.seeds:
            run = f"{self.at}/runs/{word(f'{table} {name}')}_s{s}"
            joint = '--joint' in train
            reid, out = f'{run}/reid' if joint else f'{self.at}/{data}', f'{run}.json'
            row.jobs.append(self.add(f'{table}/{name}/{s}', [
                ['bev_reid_train', f'{self.at}/{data}', run, '--recipe', 'toy', '--steps', self.steps(steps), *train, '--set', f'fit.seed={s}', *amp, *sets],
                ['bev_reid_eval', f'{run}/metric' if joint else run, reid, *(first if first and s == self.seeds[0] else measure), '--out', out]], data))
        self.rows.append(row)

    def same(self, table, name, other, row):
        "A row that another table has, too"
        self.rows.append(Row(table, name, next(r.jobs for r in self.rows if (r.table, r.name) == (other, row))))

    def again(self, table, other, ending, *options):
        "The runs of another table, measured with other options"
        for r in [r for r in self.rows if r.table == other]:
            evals = [self.jobs[j].commands[-1] for j in r.jobs]
            self.rows.append(Row(table, r.name, [self.add(f'{table}/{r.name}/{k}', [[*c[:3], *options, '--out', c[-1].replace('.json', f'_{ending}.json')]], j) for k, (c, j) in enumerate(zip(evals, r.jobs))]))

    def tables(self):
        "What the page shows"
        every = ['bev', 'rgb', 'rgb_lidar', 'lidar']
        base = self.data('base', self.lss('64'), every, 10, 20)
        for loss in LOSSES: self.row('losses', loss, base, '--loss', loss, '--features', 'bev')
        for name, f in FEATURES.items(): self.row('features', name, base, '--features', *f) if name != 'bev' else self.same('features', name, 'losses', 'cosine-softmax')
        self.same('map', '64 channels', 'losses', 'cosine-softmax')
        for name, change in {'32 channels': 'lss.bev_channels=32', '128 channels': 'lss.bev_channels=128', 'no depth loss': 'lss.depth_weight=0'}.items():
            key = word(name)
            self.row('map', name, self.data(key, self.lss(key, change), ['bev'], 10, 20), '--features', 'bev')
        seen = ['rgb_lidar', 'lidar']
        self.same('crop', '10 m, 0.5 m cells', 'features', 'rgb_lidar + lidar')
        windows = {'10 m, 0.5 m cells, layers': (10, 20), '7 m, 0.25 m cells, layers': (7, 28), '10 m, 0.25 m cells, layers': (10, 40), '16 m, 0.4 m cells, layers': (16, 40),
                   '16 m, 0.4 m cells, layers, as the ego sees it': (16, 40, '--ego-up'), '16 m, 0.4 m cells, layers, masked by the box (leak)': (16, 40, '--mask')}
        for name, (extent, size, *more) in windows.items():
            key = word(name)
            self.row('crop', name, self.data(key, 'lss/64', seen, extent, size, *more, '--set', LAYERS))
        wide = self.data('wide', 'lss/64', seen, *WIDE, '--set', LAYERS)
        parts = '--bare', '--strata', '--background'
        self.row('crop', '24 m, 0.5 m cells, layers', wide, measure=parts)
        self.row('best', 'best', wide, *BEST['train'], steps=BEST['steps'], sets=BEST['sets'], measure=('--bare', '--rerank', 'k-reciprocal'),
                 first=('--strata', '--background', '--protocol', 'paired', '--rerank', 'k-reciprocal', '--imagenet'))
        self.row('crop', '24 m, half of the crops without surroundings', wide, sets=('aug.alone=0.5',), measure=parts)
        chosen = '--split', 'val', '--bare'
        for loss in 'triplet', 'supcon': self.row('tried', f'24 m, 0.5 m cells, {loss}', wide, '--loss', loss, measure=chosen)
        fine = self.data('fine', 'lss/64', seen, 24, 64, '--set', LAYERS)
        self.row('tried', '24 m, 0.375 m cells, cosine-softmax', fine, measure=chosen)
        best = f'{self.at}/runs/best_best_s{self.seeds[0]}'
        lyft = ['--recipe', 'toy', '--steps', self.steps(200), '--set', 'company_weight=0', 'lss.img_size=[160,256]', 'img_aug.flip=true']
        for name, more, need in ('imagenet', [], []), ('nothing', ['lss.pretrained=false', 'lss.frozen_blocks=0'], []), ('toy', [f'init={self.at}/lss/64'], ['lss/64']):
            self.add(f'lss/lyft_{name}', [['bev_reid_train_lss', REAL, f'{self.at}/lss/lyft_{name}', *lyft, *more]], *need)
        self.real('bev, trunk from ImageNet', 'lss/lyft_imagenet', ['bev'])
        self.real('bev, no pretraining', 'lss/lyft_nothing', ['bev'])
        self.real('bev, BEV network from the toy world', 'lss/lyft_toy', ['bev'])
        self.real('rgb_lidar + lidar', 'lss/lyft_imagenet', seen)
        self.real('rgb_lidar + lidar, from the toy world', 'lss/lyft_imagenet', seen, f'init={best}')
        self.real('rgb_lidar + lidar, toy world alone', 'lss/lyft_imagenet', seen, best, steps=0)
        five = range(2 if self.quick else 5)
        day = '--train-condition', 'day+dry'
        for name, more in {'every condition': (), 'by day': day, 'by day, grey + erasing': (*day, '--augment', 'grey+erasing'), 'by day, colour jitter': (*day, '--augment', 'jitter'), 'by day, RLE': (*day, '--augment', 'rle')}.items():
            self.row('conditions', name, base, *more, '--features', *seen, measure=('--protocol', 'within-condition'), seeds=five)
        self.row('conditions', 'every condition, 900 steps', base, '--features', *seen, measure=('--protocol', 'within-condition'), seeds=five, steps=900)
        for what, f in ('colours at the predicted depth', 'rgb'), ('BEV features', 'bev'), ('colours on LiDAR points', 'rgb_lidar'):
            self.row('modal', f'{what}, LiDAR', base, '--modalities', f, 'lidar', measure=('--protocol', 'cross-modality'), amp=(), steps=900, seeds=five)
        self.again('across', 'conditions', 'across', '--protocol', 'cross-condition')
        self.again('choice', 'crop', 'val', '--split', 'val', '--bare')
        self.same('tried', '24 m, 0.5 m cells, cosine-softmax', 'choice', '24 m, 0.5 m cells, layers')
        alone = self.data('bev', 'lss/64', ['bev'], 10, 20) # a joint training wants crops of the map and nothing else
        self.row('joint', 'frozen', alone, '--features', 'bev', steps=80)
        self.row('joint', 'joint', alone, '--features', 'bev', '--joint', steps=80, sets=('n_frames=2',))


def text(command): return shlex.join(command)

class Runner:
    "Runs the jobs, two at a time, each once"
    def __init__(self, plan, out, workers):
        self.plan, self.out, self.workers, self.lock, self.stop = plan, out, workers, threading.Condition(), False
        self.folder = ROOT/plan.at; self.done, self.other = {}, {}
        for f in (self.folder/'done').glob('*.json'):
            d = json.loads(f.read_text())
            j = plan.jobs.get(d['name'])
            if j: (self.done if d['commands'] == j.commands else self.other)[d['name']] = d

    def forget(self, d):
        "Remove what a job has made: a training there would refuse to go on with other options"
        for c in d['commands']:
            made = {'bev_reid_train': 2, 'bev_reid_train_lss': 2, 'bev_reid_dataset': 3}.get(c[0])
            if made and self.folder in (ROOT/c[made]).parents: shutil.rmtree(ROOT/c[made], ignore_errors=True)
        (self.folder/'done'/(word(d['name'])+'.json')).unlink()

    def wanted(self, tables):
        "Jobs that are left, in an order in which they can run"
        first = ['best', 'features', 'crop', 'losses', 'lyft', 'map', 'joint', 'choice', 'tried', 'conditions', 'across', 'modal'] # what a run that is cut off should have
        todo, order = [j for t in first if t in tables for r in self.plan.rows if r.table == t for j in r.jobs], []
        def visit(n):
            for m in self.plan.jobs[n].needs: visit(m)
            if n not in order and (n not in self.done or any(m in order for m in self.plan.jobs[n].needs)): order.append(n)
        for n in todo: visit(n)
        return order

    def run(self, tables):
        left, running = self.wanted(tables), set()
        anew = set(left) # their commands are others now, or what they read is made anew, for a table that was not asked for, too
        while more := {n for n in self.done if n not in anew and anew & set(self.plan.jobs[n].needs)}: anew |= more
        for n in anew:
            for d in self.done, self.other:
                if n in d: self.forget(d.pop(n))
        total, begun = len(left), time.perf_counter()
        failed = []
        def worker():
            while True:
                with self.lock:
                    while True:
                        if self.stop or not left: return
                        ready = next((n for n in left if all(m in self.done for m in self.plan.jobs[n].needs)), None)
                        if ready: break
                        if not running: return
                        self.lock.wait()
                    left.remove(ready); running.add(ready)
                    print(f'[{total-len(left)}/{total}, {time.perf_counter()-begun:.0f} s] {ready}', flush=True)
                ok = self.one(self.plan.jobs[ready])
                with self.lock:
                    running.discard(ready)
                    if not ok: failed.append(ready); self.stop = True
                    self.write(); self.lock.notify_all()
        threads = [threading.Thread(target=worker) for _ in range(self.workers)]
        for t in threads: t.start()
        try:
            for t in threads: t.join()
        except KeyboardInterrupt:
            self.stop = True; print('interrupted; the same command goes on', file=sys.stderr); os._exit(2)
        self.write()
        if failed: raise SystemExit(f"{failed[0]} failed: see {self.folder/'logs'/(word(failed[0])+'.log')}")

    def one(self, job):
        "Run the commands of a job, and remember how long they took"
        log = self.folder/'logs'/(word(job.name)+'.log'); log.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault('BEV_REID_DATA', str(ROOT.parent/'shared'/'data')); env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive'); start, cpu = time.perf_counter(), 0.
        with open(log, 'a') as f:
            for c in job.commands:
                f.write(f'\n$ {text(c)}\n'); f.flush()
                p = subprocess.Popen([str(Path(sys.executable).parent/c[0]), *map(os.path.expandvars, c[1:])], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
                _, status, used = os.wait4(p.pid, 0); p.returncode = status
                cpu += used.ru_utime+used.ru_stime
                if status: return False
        self.done[job.name] = dict(name=job.name, commands=job.commands, seconds=round(time.perf_counter()-start, 1), cpu=round(cpu, 1))
        write_json(self.folder/'done'/(word(job.name)+'.json'), self.done[job.name])
        return True

    def write(self):
        "Rows that are whole"
        rows = []
        for r in self.plan.rows:
            if not all(j in self.done for j in r.jobs): continue
            found = [json.loads((ROOT/self.done[j]['commands'][-1][-1]).read_text()) for j in r.jobs]
            own = [d['rows'][0] for d in found]
            keep = ('rank1', 'rank5', 'mAP', 'mINP', 'rank1_ci', 'mAP_ci', 'n_queries', 'n_ids', 'n_gallery')
            row = dict(table=r.table, name=r.name, seeds=[{k: o[k] for k in keep if k in o} for o in own], commands=[text(c) for c in self.done[r.jobs[0]]['commands']],
                       cpu=round(sum(self.done[j]['cpu'] for j in r.jobs)/len(r.jobs)))
            if r.table in ('conditions', 'across', 'modal'): row['every_seed'] = [[{k: v for k, v in x.items() if k in ('condition', 'query', 'gallery', 'direction', 'method', 'rank1_chance', 'mAP_chance', *keep)} for x in d['rows']] for d in found]
            if r.table == 'crop' and 'background' in found[0]: row['motion'], row['background'] = [[x for x in d['strata'] if x['stratum'] == 'motion'] for d in found], [d['background'] for d in found]
            if r.table == 'lyft': row['baselines'] = [[{k: v for k, v in x.items() if k in ('method', *keep)} for x in d['rows'][1:]] for d in found]
            if r.table == 'best': row['found'] = found[0]; row['every_seed'] = [[{k: v for k, v in x.items() if k in ('method', *keep)} for x in d['rows']] for d in found]
            rows.append(row)
        before = [dict(name=n, commands=[text(c) for c in d['commands']], cpu=d['cpu']) for n, d in self.done.items() if n.split('/')[0] in ('world', 'lss', 'data')]
        write_json(self.out, short(dict(tables=TABLES, rows=rows, before=before, cpu_minutes=round(sum(d["cpu"] or 0 for d in self.done.values())/60, 1), seeds=list(self.plan.seeds), quick=self.plan.quick)))

def short(o):
    "Numbers with four digits"
    if isinstance(o, dict): return {k: short(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [short(v) for v in o]
    return round(o, 4) if isinstance(o, float) else o

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=list(TABLES), default=list(TABLES), help='tables; all where left out')
    p.add_argument('--list', action='store_true', help='print the commands and end')
    p.add_argument('--quick', action='store_true', help='a tiny world and a few steps')
    p.add_argument('--workers', type=int, default=2, help='commands at a time, one thread each')
    p.add_argument('--out', type=Path, help='file for the numbers')
    a = p.parse_args()
    plan = Plan(a.quick)
    run = Runner(plan, a.out or (ROOT/plan.at/'standard.json' if a.quick else ROOT/'results'/'standard.json'), a.workers)
    if a.list:
        for n in run.wanted(a.only): print(f'# {n}', *map(text, plan.jobs[n].commands), '', sep='\n')
        return
    run.run(a.only)
    print(f'{run.out}: {len(json.loads(run.out.read_text())["rows"])} rows')

if __name__ == '__main__': main()
