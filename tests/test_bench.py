"""The quick form of the benchmark, with loose bounds on ratios within one run: it notices when something became slow, on any machine

CPU seconds of one thread are compared, so that a busy machine disturbs both sides alike; no bound is a time.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
bench = root/'nbs'/'_tools'/'bench'

# part -> (words of the case, words of the alternative, how many times less CPU time we must take at least)
BOUNDS = dict(
    pool=[('kernel forward', 'published', 30), ('kernel forward', 'index_add_', 5), ('kernel forward', 'embedding_bag', 1.2), ('op forward:', 'published', 15),
          ('forward and backward', 'published', 10), ('forward and backward', 'embedding_bag', 1.2), ('plan from', 'PyTorch', 2)],
    step=[('inference', 'published', 1.), ('training step, ours, float32', 'published', .8)],
    build=[('decode', 'whole', 1.2)],
    ranking=[('CMC', 'argsort', 2)],
    start=[('tables', 'devkit', .8)],
    rle=[('RRLE on 64', 'published', 1.5), ('MRLE on 64', 'published', 1.2)],
    sequences=[('mean of pairs', 'published', 40), ('chamfer', 'cdist', 3)],
    occupancy=[('majority vote', 'sort rows', 1.3), ('mIoU', 'masks', 30), ('points to boxes', 'box by box', 10)],
    toy=[])

@pytest.fixture(scope='module', params=BOUNDS)
def rows(request, tmp_path_factory):
    from bev_reid import bev_pool
    if bev_pool._C is None: pytest.skip('the compiled extension is not built')
    out = tmp_path_factory.mktemp('bench')/'rows.json'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}
    r = subprocess.run([sys.executable, bench, '--part', request.param, '--quick', '--out', out], capture_output=True, text=True, env=env, cwd=root)
    assert r.returncode == 0, r.stderr[-3000:]
    return request.param, json.loads(out.read_text())


def test_nothing_became_slow(rows):
    part, got = rows
    assert got and all(r['times'] and r['ours'] in r['times'] for r in got)
    for case, other, bound in BOUNDS[part]:
        found = [(n, r) for r in got if case in r['case'] for n in r['times'] if other in n and n != r['ours']]
        assert found, f'{part} has no row "{case}" with "{other}": {[(r["case"], list(r["times"])) for r in got]}'
        for n, r in found:
            ratio = r['times'][n]['cpu_s']/r['times'][r['ours']]['cpu_s']
            assert ratio >= bound, f"{r['case']}: {ratio:.2f} times faster than {n}, at least {bound} expected"


def test_the_kept_figures_have_their_targets():
    "results/bench.json is what the speed page draws: every row says what was measured, and a missed target why"
    kept = json.loads((root/'results'/'bench.json').read_text())
    assert {r['part'] for r in kept['rows']} == {'bev_pool', 'step', 'build', 'ranking', 'start', 'toy', 'rle', 'sequences', 'occupancy'} and kept['machine']['cpu']
    for r in kept['rows']:
        for t in r['targets']: assert t['met'] == (t['got'] >= t['bound'] if t['kind'] == 'at_least' else t['got'] <= t['bound']), r['case']
