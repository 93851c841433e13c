"The explorers, used through their controls as a hand would use them"
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bev_reid.crops import CropConfig
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, build_dataset
from bev_reid.explore import RetrievalExplorer, SceneExplorer
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig
from bev_reid.train import MetricRecipe, train_metric


@pytest.fixture(scope='module')
def made(toy_root, tmp_path_factory):
    "A data set of an untrained network, and a metric network after three batches"
    tmp = tmp_path_factory.mktemp('explore')
    torch.manual_seed(0)
    grid = BEVGrid(xbound=(-32, 32, 1.), ybound=(-32, 32, 1.), dbound=(2, 34, 2))
    model = LiftSplat(LSSConfig.recipe('toy', trunk='b0', pretrained=False, img_size=(64, 128), grid=grid, bev_channels=8)).eval()
    data = DrivingData(toy_root)
    build_dataset(model, data, tmp/'reid', cfg=DatasetConfig(crop=CropConfig(extent=16., size=16, clip=True)))
    r = MetricRecipe.recipe('toy', max_steps=3)
    train_metric(tmp/'reid', tmp/'metric', recipe=replace(r, p=4, k=2, min_visibility=1), device='cpu')
    return dict(data=data, model=model, reid=tmp/'reid', metric=tmp/'metric')

@pytest.fixture
def ex(made): return RetrievalExplorer(made['reid'], made['metric'], split='train', min_gap=1., min_visibility=1, top=5)

def is_png(b): return b[:8] == b'\x89PNG\r\n\x1a\n'

def test_starts_on_a_vehicle(ex):
    assert is_png(ex.image.value)
    assert ex.query is not None and ex.ds.table['identity'][ex.query] == ex.vehicle.value
    assert ex.ds.table['range'][ex.query] == ex.ds.table['range'][ex.own].min()

def test_ranking_follows_the_protocol(ex):
    ex.once.value = False
    for gap in (True, False):
        ex.gap.value = gap
        res, o = ex.rank(), ex.obs
        i, ranked = res['query'], res['ranked']
        assert i not in ranked and not (o.frames[ranked] == o.frames[i]).any()
        near = (o.scenes[ranked] == o.scenes[i]) & (np.abs(o.times[ranked]-o.times[i]) < 1-1e-6)
        assert near.any() != gap, 'the box hides what is nearer than the gap, and shows it when it is not ticked'
        assert (np.diff(res['dist']) >= 0).all()
        assert (res['correct'] == (o.ids[ranked] == o.ids[i])).all()
        assert res['place'] == (res['correct'].argmax()+1 if res['correct'].any() else None)

def test_each_vehicle_once_keeps_its_nearest(ex):
    ex.gap.value = ex.once.value = False; every = ex.rank()
    ex.once.value = True; once = ex.rank()
    ids = ex.obs.ids[once['ranked']]
    assert len(set(ids)) == len(ids) == len(set(ex.obs.ids[every['ranked']])) < len(every['ranked'])
    for i, d in zip(ids, once['dist']): assert d == every['dist'][ex.obs.ids[every['ranked']] == i].min()

def test_every_control_draws_anew(ex):
    ex.vehicle.value = max(ex.vehicle.options, key=lambda o: (ex.ds.table['identity'] == o[1]).sum())[1]
    for name, values in dict(seen=range(len(ex.own)), what=('crops', 'rgb'), method=ex.features.names, gap=(False, True)).items():
        seen = set()
        for v in values: getattr(ex, name).value = v; assert is_png(ex.image.value); seen.add(ex.image.value)
        assert len(seen) > 1, name

def test_changes_are_drawn_once(ex, monkeypatch):
    n = []
    monkeypatch.setattr(ex, 'draw', lambda: n.append(1))
    ex.vehicle.value = ex.vehicle.options[-1][1]; assert len(n) == 1   # the slider moved as well
    ex.shuffle(); assert len(n) == 2
    ex.kind.value = ex.kind.options[1]; assert len(n) == 3

def test_filters(ex):
    t = ex.ds.table
    for kind in ex.kind.options[1:]:
        ex.kind.value = kind
        assert {t['category'][i] for i in ex.own} == {kind}
    ex.kind.value = 'all classes'
    ex.reach.value = 'beyond 30 m'
    for _, name in ex.vehicle.options: assert t['range'][t['identity'] == name].min() >= 30
    ex.vehicle.options = []; ex._list_seen()
    assert ex.query is None and is_png(ex.image.value)
    ex.shuffle()                                                       # nothing to choose from, nothing happens

def test_filters_keep_the_vehicle_where_they_can(ex):
    chosen = ex.vehicle.options[-1][1]
    ex.vehicle.value = chosen
    ex.kind.value = str(ex.ds.table['category'][ex.query])
    assert ex.vehicle.value == chosen

def test_random_button(ex):
    seen = set()
    for _ in range(8): ex.random.click(); seen.add(ex.query)
    assert len(seen) > 2 and all(i in range(len(ex.ds)) for i in seen)

def test_embeddings_are_computed_once(ex, monkeypatch):
    import bev_reid.explore as m
    ex.rank()
    monkeypatch.setattr(m, 'embed', lambda *a, **k: pytest.fail('embedded again'))
    ex.shuffle(); ex.rank()

def test_without_a_run_and_with_several(made):
    alone = RetrievalExplorer(made['reid'], split='train', min_gap=1.)
    assert alone.method.value == 'colour histogram of the patch' and is_png(alone.image.value)
    two = RetrievalExplorer(made['reid'], {'a': made['metric'], 'b': made['metric']}, split='train', min_gap=1.)
    a = two.rank(); two.method.value = 'b'; b = two.rank()
    assert (a['ranked'] == b['ranked']).all()

def test_bad_input(made):
    with pytest.raises(ValueError, match="no split 'dev'"): RetrievalExplorer(made['reid'], made['metric'], split='dev')
    with pytest.raises(FileNotFoundError): RetrievalExplorer(made['reid']/'none')
    with pytest.raises(ValueError, match='scope'): RetrievalExplorer(made['reid'], made['metric'], split='train', scope='town')
    with pytest.raises(ValueError, match='grid'): SceneExplorer(made['data'], made['model'], grid=BEVGrid())

def test_scene(made):
    sc = SceneExplorer(made['data'])
    assert sc.layer.options == ('truth',) and sc.at.max == len(sc.tokens)-1
    pics = []
    for change in (dict(at=1), dict(at=2), dict(lidar=True), dict(boxes=False), dict(scene=made['data'].scenes[1])):
        for k, v in change.items(): getattr(sc, k).value = v
        assert is_png(sc.image.value); pics.append(sc.image.value)
    assert len(set(pics)) == len(pics)
    assert sc.at.value == 0 and made['data'].frame(sc.token).scene_name == made['data'].scenes[1]
    sc.play.value = 3
    assert sc.at.value == 3

def test_scene_figure_holds_what_the_controls_say(made):
    sc = SceneExplorer(made['data'])
    n_cams = len(made['data'].cams)
    with_boxes = sc.figure()
    assert len(with_boxes.axes) == n_cams+1
    sc.boxes.value = False
    without = sc.figure()
    def lines(fig): return sum(len(ax.collections) for ax in fig.axes)
    assert lines(without) == 0 < lines(with_boxes)
    sc.lidar.value = True
    assert lines(sc.figure()) == n_cams+1

def test_predictions_are_kept(made, monkeypatch):
    sc = SceneExplorer(made['data'], made['model'])
    n, predict = [], SceneExplorer.predict
    monkeypatch.setattr(SceneExplorer, 'predict', lambda self, token: n.append(token) or predict(self, token))
    for layer in ('colours', 'features', 'predicted vehicles'): sc.layer.value = layer
    assert not n                                                       # the first picture has computed them
    sc.at.value = 1; sc.at.value = 0; sc.at.value = 1
    assert len(n) == 1

def test_a_missing_file_is_named_in_its_panel(made, monkeypatch):
    sc = SceneExplorer(made['data'])
    gone = made['data'].frame(sc.tokens[1]).img_paths[0]
    image = DrivingData.image
    def broken(self, path):
        if path == gone: raise FileNotFoundError(f'image {path} is missing')
        return image(self, path)
    def no_lidar(self, token, **kw): raise FileNotFoundError('LiDAR file x is missing')
    monkeypatch.setattr(DrivingData, 'image', broken); monkeypatch.setattr(DrivingData, 'lidar', no_lidar)
    sc.at.value = 1; sc.lidar.value = True
    texts = ' '.join(t.get_text() for ax in sc.figure().axes for t in ax.texts)
    assert Path(gone).name in texts and 'LiDAR file x' in texts
    assert sum(bool(ax.images) for ax in sc.figure().axes) == len(made['data'].cams)-1
