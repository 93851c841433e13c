"""The stored table of alignment: its rows are those that the runner makes, with these settings, and the page can be read from it"""
import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'nbs'/'_tools'))
import results_alignment as runner
from bev_reid.scene_sim import SceneSpec

made = json.loads((root/'results'/'alignment.json').read_text())


def test_rows_are_what_the_runner_makes():
    assert list(made['rows']) == list(runner.ROWS)
    for name, (kw, cosy, proto) in runner.ROWS.items():
        r = made['rows'][name]; assert r['settings'] == kw and r['seeds'] >= 10, name
        SceneSpec(**kw); assert set(kw) <= {f.name for f in fields(SceneSpec)}
        assert ('cosypose' in r) == (cosy is not None) and ('prototype' in r) == (proto is not None)
        if cosy: assert list(r['cosypose'].values()) == list(cosy), name

def test_verdicts_follow_from_the_numbers():
    for name, r in made['rows'].items():
        for k, ok in r.get('at_least_cosypose', {}).items():
            ours, theirs = r[k][0], r['cosypose'][k]; assert ok == (ours >= theirs if k in ('views', 'recall') else ours <= theirs), (name, k)
        for k in runner.KEYS:
            if r[k]: assert r[k][1] <= r[k][0] <= r[k][2], (name, k)

def test_parts_are_the_runners():
    names = {runner.said(kw) for kw in runner.AMBIGUOUS}; a = made.get('ambiguity', dict(by_case={})); assert set(a['by_case']) <= names and len(names) == len(runner.AMBIGUOUS)
    if a['by_case']: again = runner.ambiguity(a['by_case']); assert {k: a[k] for k in again} == again       # totals are sums of the cases; a run that was cut off has fewer
    assert set(made.get('cosypose', {})) <= {n for n, (kw, *_) in runner.ROWS.items() if 'embeddings' not in kw}
    if 'weak_embeddings' in made: assert set(made['weak_embeddings']) == set(runner.WEAK) and all(set(runner.QUALITY) <= set(r) for r in made['weak_embeddings'].values())

@pytest.mark.parametrize('k, n, lo, hi', [(0, 10, 0, .278), (10, 10, .722, 1), (5, 10, .237, .763), (95, 100, .888, .978)])
def test_interval_of_a_share_by_hand(k, n, lo, hi):
    got = runner.wilson(k, n); assert got[0] == pytest.approx(lo, abs=1e-3) and got[1] == pytest.approx(hi, abs=1e-3)

def test_what_counts_as_wrong():
    e = dict(camera_deg_max=1., camera_m_max=.5, precision=1., views=4); assert not runner.is_wrong(e, {}) and runner.is_wrong(e, dict(regime='table')) and runner.is_wrong(e | dict(precision=.4), {}) and runner.is_wrong(e | dict(camera_deg_max=20.), {})
    assert not runner.is_wrong(e | dict(views=1, precision=0., camera_deg_max=np.nan, camera_m_max=np.nan), {})       # nothing was put together

def test_one_stored_row_is_made_again():
    kw = runner.ROWS['road 4x10, own classes'][0]; r = made['rows']['road 4x10, own classes']; new = runner.row(kw, None, None, r['seeds'])
    for k in ('solved', 'precision', 'recall', 'camera_deg', 'object_m'): assert new[k] == pytest.approx(r[k], rel=2e-2, abs=1e-4), k
