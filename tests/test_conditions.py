"Conditions of scenes, protocols within and across them, and training on some of them"
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from bev_reid.conditions import (condition_of, cross_conditions, dataset_conditions, evaluate_conditions, format_conditions, in_condition, matches, read_override, scene_conditions,
                                 select_condition, with_conditions, within_conditions)
from bev_reid.crops import CropConfig
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, ReIDDataset, build_dataset
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from bev_reid.train import MetricRecipe, train_metric
from bev_reid.validate import take

SMALL = replace(LSSConfig.recipe('toy'), trunk='b0', pretrained=False, img_size=(64, 128), grid=BEVGrid(xbound=(-32, 32, 1), ybound=(-32, 32, 1), dbound=(2, 34, 4)),
                up_channels=8, cam_channels=8, bev_channels=8, bev_widths=(8, 8, 8), bev_up=8)

@pytest.fixture(scope='module')
def reid(toy_root, tmp_path_factory):
    torch.manual_seed(0)
    return build_dataset(LiftSplat(SMALL).eval(), DrivingData(toy_root), tmp_path_factory.mktemp('cond')/'reid', cfg=DatasetConfig(crop=CropConfig(extent=12, size=16, clip=True), features=('rgb_lidar', 'lidar')))

@pytest.fixture(scope='module')
def run(reid, tmp_path_factory):
    r = MetricRecipe.recipe('toy', max_steps=2, p=6); out = tmp_path_factory.mktemp('cond')/'run'
    train_metric(reid, out, recipe=replace(r, net=replace(r.net, widths=(8, 8), embedding_dim=16)), device='cpu')
    return out

# -- descriptions
@pytest.mark.parametrize('text, label, said', [
    ('Night, after rain, many peds, PMD, ped with bag, jaywalk truck, scooter', 'night after-rain', 2), ('Rain, at intersection, ped on street', 'day rain', 1), ('Heavy rain at NIGHT', 'night rain', 2),
    ('Parked truck, construction, intersection, turn left, following a van', 'day dry', 0), ('Train crosses, terrain with drains, a constraint, raincoat', 'day dry', 0), ('Rainy day', 'day rain', 2),
    ('After the rain, dense traffic', 'day after-rain', 1), ('It is raining, after rain it stops', 'day rain', 2), ('Night, no rain', 'night dry', 1), ('Nighttime, knights', 'night dry', 1),
    ('Fortnight market, overnight parking', 'day dry', 0), ('Day, toy town, 3 parked vehicles', 'day dry', 1), ('', 'day dry', 0), ('night-time, after heavy rain', 'night after-rain', 2)])
def test_words_are_words(text, label, said):
    got, words = condition_of(text); assert (got, len(words)) == (label, said)

def test_questions():
    labels = ['day dry', 'day rain', 'day after-rain', 'night dry', 'night rain']
    def which(q): return [l for l in labels if matches(l, q)]
    assert which('day') == labels[:3] and which('rain') == ['day rain', 'night rain'] and which('dry') == ['day dry', 'night dry'] and which('Night + rain') == ['night rain']
    assert which(['night', 'day+rain']) == ['day rain', 'night dry', 'night rain'] and which('after-rain') == ['day after-rain']
    for bad, word in (('dusk', "'dusk'"), ('', 'which condition'), ('day+fog', "'fog'")):
        with pytest.raises(ValueError, match=word): matches('day dry', bad)

def test_counts_remainder_and_override(tmp_path):
    text = {'a': 'Night', 'b': 'Bus, peds', 'c': 'Rain', 'd': 'Bus'}
    c = scene_conditions(text); assert c.counts == {'day dry': 2, 'day rain': 1, 'night dry': 1} and c.remainder == ['b', 'd']
    assert '2 of 4 say nothing and are taken for dry days: b, d' in str(c) and 'night dry 1' in str(c)
    (path := tmp_path/'o.json').write_text(json.dumps({'b': 'night+rain', 'd': 'dry'}))
    c = scene_conditions(text, override=path); assert c.labels['b'] == 'night rain' and not c.remainder and c.scenes('night') == ['a', 'b'] and '0 of 4' in str(c)
    with pytest.raises(ValueError, match='does not have: zz'): scene_conditions(text, override={'zz': 'night'})
    with pytest.raises(ValueError, match='at once'): read_override({'a': 'day night'})
    with pytest.raises(ValueError, match="'foggy'"): read_override({'a': 'foggy'})
    with pytest.raises(ValueError, match='must be text'): read_override({'a': 3})
    with pytest.raises(FileNotFoundError, match='none.json'): read_override(tmp_path/'none.json')
    for bad, word in (('{', 'is no JSON'), ('[1]', 'must map')):
        path.write_text(bad)
        with pytest.raises(ValueError, match=word): read_override(path)

def test_conditions_of_a_dataset(reid, toy_root, tmp_path):
    c = dataset_conditions(reid); assert set(c.labels.values()) == {'day dry'} and set(c.labels) == set(DrivingData(toy_root).scenes)
    ds = ReIDDataset(reid, split='test'); name = ds.table['scene_name'][0]
    night = with_conditions(ds, override={name: 'night'})
    assert set(night.table['condition']) == {'night dry'} and 'condition' not in ds.table and len(night) == len(ds)
    assert len(in_condition(ds, 'night', override={name: 'night'})) == len(ds)
    with pytest.raises(ValueError, match=r"no observation under the condition 'night': day dry \d+"): in_condition(ds, 'night')
    ds.config = dict(ds.config, dataroot=str(tmp_path/'gone'))                                 # the world was deleted
    with pytest.raises(FileNotFoundError, match='names every scene'): dataset_conditions(ds)
    assert dataset_conditions(ds, override={n: 'rain' for n in c.labels}).counts == {'day rain': len(c.labels)}

# -- training on some
def test_selection(reid, run, tmp_path):
    train, test = (ReIDDataset(reid, split=s).table['scene_name'][0] for s in ('train', 'test'))
    over = {train: 'night', test: 'rain'}
    sel = select_condition(reid, tmp_path/'sel', 'night', override=over)
    a, b = ReIDDataset(reid, split='train'), ReIDDataset(sel, split='train')
    assert len(a) == len(b) and np.array_equal(a.read('crops', [0, 3]), b.read('crops', [0, 3])) and b.config['condition'] == 'night' and b.config['condition_scenes'] == [train]
    assert len(ReIDDataset(sel, split='test')) == len(ReIDDataset(reid, split='test'))         # the test stays whole
    assert select_condition(reid, tmp_path/'sel', 'night', override=over) == sel                # again: nothing happens
    with pytest.raises(ValueError, match='condition: night there, day now'): select_condition(reid, tmp_path/'sel', 'day', override={train: 'day'})
    with pytest.raises(ValueError, match='0 vehicles to train on under the condition .rain.: its training scenes are night dry 1'): select_condition(reid, tmp_path/'no', 'rain', override=over)
    assert not (tmp_path/'no').exists() and not list(tmp_path.glob('*.part'))
    r = MetricRecipe.recipe('toy', max_steps=1, p=4); r = replace(r, net=replace(r.net, widths=(8, 8), embedding_dim=16))
    train_metric(sel, tmp_path/'run', recipe=r, device='cpu')
    res = evaluate_conditions(tmp_path/'run', reid, min_gap=.5, min_queries=1, min_ids=1, override=over, baselines=False)
    assert res['settings']['trained_on'] == 'night' and [r['condition'] for r in res['rows']] == ['day rain'] and 'trained on: night' in format_conditions(res)
    with pytest.raises(ValueError, match='another configuration'): train_metric(reid, tmp_path/'run', recipe=replace(r, fit=replace(r.fit, max_steps=2)), device='cpu')   # a run does not change its condition

# -- measuring
def fake(reid, ids, cond, scenes, times):
    "A data set whose table is written by hand"
    ds = take(ReIDDataset(reid), np.arange(len(ReIDDataset(reid))) < len(ids)); ds.table = {k: v.copy() for k, v in ds.table.items()}
    ds.table |= dict(identity=np.array(ids), condition=np.array(cond), scene_token=np.array(scenes), sample_token=np.array([f'{s}{t}' for s, t in zip(scenes, times)]), timestamp=np.array(times, float)*1e6)
    return ds

def test_across_by_hand(reid):
    "Vehicles a and b by day and at night, c by day alone; at night b looks like a"
    ids, cond = list('aabbc')+list('aabb'), ['day dry']*5+['night dry']*4
    ds = fake(reid, ids, cond, ['D']*5+['N']*4, [0, 5, 0, 5, 0]+[0, 5, 0, 5])
    e = np.eye(4)[[0, 0, 1, 1, 2, 0, 0, 0, 1]]
    rows = cross_conditions(e+1e-3*np.arange(9)[:, None]*np.eye(4)[3], ds, min_queries=1, min_ids=1)
    got = {(r['query'], r['gallery']): r for r in rows}
    assert len(rows) == 4
    day = got['day dry', 'night dry']; assert (day['n_queries'], day['n_ids'], day['rank1']) == (4, 2, 1.)          # c cannot be found, and does not ask
    night = got['night dry', 'day dry']; assert (night['n_queries'], night['rank1']) == (4, .75)                      # the first view of b finds a
    own = got['night dry', 'night dry (own)']; assert own['n_queries'] == 4 and own['rank1'] == pytest.approx(.5)
    assert 'too few' in cross_conditions(e, ds)[0]['note'] and np.isnan(cross_conditions(e, ds)[0]['rank1'])

def test_nobody_comes_back(reid, run):
    with pytest.raises(ValueError, match='seen under two conditions .*nuScenes ends with its scene.*use within-condition'): evaluate_conditions(run, reid, protocol='cross-condition')
    with pytest.raises(ValueError, match='must be within-condition or cross-condition'): evaluate_conditions(run, reid, protocol='both')

def test_within_by_hand(reid):
    ids, cond = list('aabb')+list('ccdd'), ['day dry']*4+['night dry']*4
    ds = fake(reid, ids, cond, ['D']*4+['N']*4, [0, 5, 0, 5]*2)
    e = np.eye(6)[[0, 0, 1, 1, 0, 2, 2, 2]]+1e-3*np.arange(8)[:, None]                            # the first view of c looks like a, which drives by day
    rows = within_conditions(lambda d: {'x': e[np.isin(ids, d.table['identity'])]}, ds, min_queries=1, min_ids=1)
    assert [(r['condition'], r['n_queries'], r['n_ids']) for r in rows] == [('day dry', 4, 2), ('night dry', 4, 2)] and rows[0]['rank1'] == 1
    assert rows[1]['rank1'] < 1 and rows[1]['rank1_chance'] == pytest.approx(.5)                 # the gallery of night has two entries that are not junk

def test_reports(reid, run):
    res = evaluate_conditions(run, reid, min_gap=.5, min_queries=1, min_ids=1)
    methods = Counter(r['method'] for r in res['rows']); assert methods['learned embedding'] == 1 and len(methods) >= 6   # beside the baselines
    text = format_conditions(res); assert text.startswith('SYNTHETIC (toy world)') and 'scenes: day dry 2' in text and 'every condition' in text
    with_column = with_conditions(ReIDDataset(reid, split='test', min_visibility=2))
    assert sum(r['n_queries'] for r in res['rows'] if r['method'] == 'learned embedding') <= len(with_column)
    few = evaluate_conditions(run, reid, min_gap=.5, min_queries=10_000, baselines=False)['rows'][0]; assert np.isnan(few['rank1']) and 'too few' in few['note']
