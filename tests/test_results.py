"""The program behind the page of results: its commands are real ones, its rows are those that the page shows, and an interrupted run goes on"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'nbs'/'_tools'))
import results


@pytest.fixture(scope='module')
def plan(): return results.Plan(False)


def options(command):
    "Flags of a command, and what --set changes"
    flags = [w for w in command if w.startswith('--')]
    sets = command[command.index('--set')+1:] if '--set' in command else []
    return flags, [s for s in sets if not s.startswith('--')]


def test_commands_are_understood(plan):
    import inspect
    from bev_reid import cli
    from bev_reid.joint import JointRecipe
    from bev_reid.dataset import DatasetConfig
    from bev_reid.train import LSSRecipe, MetricRecipe
    for job in plan.jobs.values():
        for c in job.commands:
            known = inspect.signature(getattr(cli, c[0])).parameters
            flags, sets = options(c)
            assert not [f for f in flags if f[2:].replace('-', '_') not in known], c
            cfg = {'bev_reid_train_lss': LSSRecipe, 'bev_reid_train': JointRecipe if '--joint' in c else MetricRecipe}.get(c[0])
            if sets: cli.set_fields(cfg.recipe('toy') if cfg else DatasetConfig(), sets)


def test_runs_do_not_share_folders(plan):
    writes = [c[2] if c[0] == 'bev_reid_train_lss' or c[0] == 'bev_reid_train' else c[3] for j in plan.jobs.values() for c in j.commands if c[0] in ('bev_reid_train', 'bev_reid_train_lss', 'bev_reid_dataset')]
    assert len(writes) == len(set(writes))
    assert len({results.word(n) for n in plan.jobs}) == len(plan.jobs)


def test_what_a_job_reads_is_made_before(plan):
    def reads(c): return {'bev_reid_toy': [], 'bev_reid_train_lss': c[1:2], 'bev_reid_dataset': c[1:3], 'bev_reid_train': c[1:2], 'bev_reid_eval': c[1:3]}[c[0]]+[w[5:] for w in c if w.startswith('init=')]
    def writes(n): return [w for c in plan.jobs[n].commands for w in c[1:4]]
    def before(n): return [w for m in plan.jobs[n].needs for w in writes(m)+before(m)]
    for name, job in plan.jobs.items():
        own = []
        for c in job.commands:
            for w in reads(c):
                if not w.startswith('$'): assert any(w == have or w.startswith(have+'/') for have in own+before(name) if have.startswith(plan.at)), (name, w)
            own += c[1:4]


def test_stored_rows_come_from_these_commands(plan):
    made = json.loads((root/'results'/'standard.json').read_text())
    now = {(r.table, r.name): [shlex.join(c) for c in plan.jobs[r.jobs[0]].commands] for r in plan.rows}
    assert made['rows'] and not made['quick']
    for r in made['rows']: assert r['commands'] == now[r['table'], r['name']], r['name']
    assert {s for r in made['rows'] for s in [len(r['seeds'])]} <= {len(results.SEEDS), len(results.SPLITS)}


def test_goes_on_and_writes_whole_rows_only(tmp_path, monkeypatch):
    "Two jobs of a row with commands that only copy a file: the first run is cut off after one"
    plan = results.Plan.__new__(results.Plan)
    plan.quick, plan.jobs, plan.rows, plan.at, plan.seeds = True, {}, [], 'work', (0, 1)
    row = dict(rows=[dict(method='learned embedding', rank1=.5, mAP=.25)])
    (tmp_path/'src.json').write_text(json.dumps(row))
    tool = tmp_path/'bin'; tool.mkdir(); (tool/'copy').write_text('#!/bin/sh\necho x >> ran; cp "$1" "$3"\n'); (tool/'copy').chmod(0o755)
    monkeypatch.setattr(results, 'ROOT', tmp_path); monkeypatch.setattr(results.sys, 'executable', str(tool/'python'))
    for s in (0, 1): plan.add(f'losses/a/{s}', [['copy', 'src.json' if s == 0 else 'late.json', '--out', f'{s}.json']])
    plan.rows = [results.Row('losses', 'a', [f'losses/a/{s}' for s in (0, 1)])]
    out = tmp_path/'out.json'
    with pytest.raises(SystemExit, match='losses/a/1 failed'): results.Runner(plan, out, 1).run(['losses'])
    assert json.loads(out.read_text())['rows'] == []
    (tmp_path/'late.json').write_text(json.dumps(row))
    results.Runner(plan, out, 2).run(['losses'])
    got = json.loads(out.read_text())['rows']
    assert [len(r['seeds']) for r in got] == [2] and got[0]['seeds'][1]['mAP'] == .25
    assert (tmp_path/'ran').read_text().count('x') == 3                   # the first one ran once

def test_what_changed_runs_again(tmp_path, monkeypatch):
    "Other options of a training: its folder goes, it runs anew, and so does what reads it; listing removes nothing"
    tool = tmp_path/'bin'; tool.mkdir()
    for name, body in ('bev_reid_train', 'mkdir -p "$2"; echo "$3" > "$2/step"; cp src.json "$5"; echo "$1" >> ran'), ('bev_reid_eval', 'cp "$1/step" seen; cp src.json "$4"; echo eval >> ran'):
        (tool/name).write_text('#!/bin/sh\n'+body+'\n'); (tool/name).chmod(0o755)
    (tmp_path/'src.json').write_text(json.dumps(dict(rows=[dict(method='learned embedding', rank1=.5, mAP=.25)])))
    monkeypatch.setattr(results, 'ROOT', tmp_path); monkeypatch.setattr(results.sys, 'executable', str(tool/'python'))
    def runner(steps):
        plan = results.Plan.__new__(results.Plan)
        plan.quick, plan.jobs, plan.at, plan.seeds = True, {}, 'work', (0,)
        plan.add('best/a/0', [['bev_reid_train', 'data', 'work/a', steps, '--out', 'a.json']])
        plan.add('losses/b/0', [['bev_reid_train', 'other', 'work/b', '7', '--out', 'b.json']])
        plan.add('lyft/c/0', [['bev_reid_eval', 'work/a', 'data', '--out', 'c.json']], 'best/a/0')
        plan.rows = [results.Row(t, n, [f'{t}/{n}/0']) for t, n in (('best', 'a'), ('losses', 'b'), ('lyft', 'c'))]
        return results.Runner(plan, tmp_path/'out.json', 1)
    every = ['best', 'losses', 'lyft']
    runner(3).run(every); assert (tmp_path/'ran').read_text().split() == ['data', 'other', 'eval']
    (tmp_path/'work/a/left').touch(); runner(3).run(every); assert (tmp_path/'work/a/left').exists()
    assert runner(9).wanted(every) == ['best/a/0', 'lyft/c/0'] and (tmp_path/'work/a/left').exists()
    runner(9).run(['best']); assert not (tmp_path/'work/a/left').exists() and json.loads((tmp_path/'out.json').read_text())['rows'][-1]['table'] == 'losses'
    runner(9).run(every)
    assert (tmp_path/'ran').read_text().split() == ['data', 'other', 'eval', 'data', 'eval'] and (tmp_path/'seen').read_text() == '9\n'
    assert (tmp_path/'work/b/step').exists()


def page(folder, files, capsys):
    "Run the cells of the page of conditions on these results; what it prints, and its names"
    import matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot as plt
    (folder/'results').mkdir(); (folder/'nbs'/'tutorials').mkdir(parents=True)
    for name, d in files.items(): (folder/'results'/f'{name}.json').write_text(json.dumps(d))
    cells = [''.join(c['source']) for c in json.loads((root/'nbs'/'tutorials'/'conditions.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    names, here = {}, os.getcwd()
    os.chdir(folder/'nbs'/'tutorials')
    try:
        for c in cells:
            if '#| hide' not in c: exec(c, names)
    finally: os.chdir(here); plt.close('all')
    return capsys.readouterr().out, names


def test_page_of_conditions_says_what_is_missing(tmp_path, capsys):
    said, _ = page(tmp_path, {}, capsys)
    for table in ('conditions', 'across', 'modal'): assert f'not measured yet: python nbs/_tools/results.py --only {table}' in said
    assert 'helps' not in said and 'better than' not in said


def test_page_of_conditions_follows_the_numbers(tmp_path, capsys):
    "Made-up rows with a known answer: RLE two points above the plain training by day and as many below it at night, in every seed but for a little"
    def row(name, day, night): return dict(table='conditions', name=name, every_seed=[[dict(condition=c, method='learned embedding', rank1=v+.001*s, rank1_chance=.01, mAP=v+.001*s, n_queries=9, n_ids=3) for c, v in (('day dry', day), ('night dry', night))] for s in range(5)])
    wobble = row('by day, RLE', .52, .48)
    for s, seed in enumerate(wobble['every_seed']):
        for x in seed: x['rank1'] += .001*(-1)**s; x['mAP'] = .5+.001*s+.1*(-1)**s
    across = dict(table='across', name='by day', every_seed=[[dict(query='day dry', gallery='night dry', rank1=.2+.01*s, rank1_chance=.05, n_queries=60, n_ids=9), dict(query='day dry', gallery='day dry (own)', note='too few')] for s in range(5)])
    modal = dict(table='modal', name='a, b', every_seed=[[dict(direction=d, rank1=v+.001*s, mAP=v, rank1_chance=.01, mAP_chance=.01) for d, v in (('a -> b', .01), ('b -> a', .2), ('a -> a', .3), ('b -> b', .4))] for s in range(3)])
    said, names = page(tmp_path, dict(standard=dict(rows=[row('by day', .5, .5), wobble, across, modal])), capsys)
    assert 'day dry, rank1: RLE is: better than: "by day" (+2.0)' in said and 'night dry, rank1: RLE is: worse than: "by day" (-2.0)' in said and 'day dry, mAP: RLE is: no different from: "by day"' in said
    assert 'day dry -> night dry  22.0 ± 1.6     5.0' in said and '(own)' not in said
    assert 'against chance: above it: b -> a' in said and 'not to be told from it: a -> b' in said and 'against a -> a: below it: a -> b' in said
    noise = .01*np.array([-2, -1, 0, 1, 2])/2.5**.5                       # five numbers of standard deviation 0.01
    assert [names['judge'](f*2.776*.01/5**.5+noise) for f in (1.2, -1.2, .8)] == ['helps', 'costs', 'no difference']


def test_page_of_conditions_reads_the_kept_results(tmp_path, capsys):
    kept = {n: json.loads((root/'results'/f'{n}.json').read_text()) for n in ('rle', 'sequences', 'standard')}
    said, _ = page(tmp_path, kept, capsys)
    r = next(r for r in kept['rle']['rows'] if (r['training'], r['method'], r['condition']) == ('day', 'rle', 'linear'))
    assert f"{100*r['rank1']:.1f} ± {100*r['rank1_std']:.1f}" in next(l for l in said.split('\n') if l.startswith('rle '))
    d = next(d for d in kept['rle']['differences'] if (d['training'], d['method'], d['against'], d['condition']) == ('day', 'rle', 'none', 'linear'))
    assert f"rle ({100*d['rank1_diff']:+.1f})" in said.split('asked in the linear band')[1].split('\n')[1]
    for kind in ('aligned', 'unaligned'):
        d = next(d for d in kept['sequences']['summary'][kind]['differences'] if (d['a'], d['b'], d.get('encoder')) == ('chamfer', 'mean_descriptor', 'raw'))
        line = next(l for l in said.split('\n') if l.startswith(f'{kind}, five sightings, against their mean'))
        assert f"chamfer ({100*d['mean']:+.1f})" in line and ('chamfer' in line.split('costs:')[-1]) == (d['mean'] < 0)
