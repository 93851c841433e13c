"What leaves the package comes back the same: Market-1501 folders, embeddings, safetensors, exported graphs"
import json, re, subprocess, sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bev_reid import export as ex
from bev_reid.crops import CropConfig, crop_bev
from bev_reid.dataset import DatasetConfig
from bev_reid.fit import plain, save_atomic
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig, ray_features
from bev_reid.metric import CosineMetricNet, MetricConfig, embed, save_metric

GRID, CROP = BEVGrid(xbound=(-16, 16, 1), ybound=(-16, 16, 1), dbound=(2, 18, 2)), CropConfig(extent=8., size=8)
NAME = re.compile(r'^(\d{4,})_c([1-9])s(\d+)_(\d{6})_(\d{2})\.jpg$')   # the layout as it is published
GET = re.compile(r'([-\d]+)_c(\d)')                                      # what readers search for, in the whole path

def need(*names):
    for n in names: pytest.importorskip(n, reason=f"{n} is not installed: pip install 'bev_reid[export]'")

def reid(path, *, n_ids=6, n_frames=12, cams=('BACK', 'FRONT'), per=.5, scenes=('a', 'b'), split=('train', 'test'), shared=False, returning=False):
    "A ReID data set by hand: one scene per split unless told otherwise, every vehicle in every keyframe"
    rng, rows = np.random.default_rng(0), []
    for s, name in enumerate(scenes):
        shard = path/'scenes'/name; shard.mkdir(parents=True)
        n = n_ids*n_frames
        np.save(shard/'crops.npy', rng.normal(size=(n, 4, 8, 8)).astype(np.float16)); np.save(shard/'rgb.npy', rng.integers(0, 255, (n, 3, 8, 8), np.uint8)); np.save(shard/'patches.npy', rng.integers(0, 255, (n, 3, 8, 8), np.uint8))
        for f in range(n_frames):
            for v in range(n_ids):
                who = f'v{v}' if shared else f'{split[s] if returning else name}_{v}'
                rows.append(dict(split=split[s], scene_name=name, scene_token=f'token_{name}', sample_token=f'{name}_{f}', timestamp=int((1000*s+f*per)*1e6), instance_token=f'{name}_{v}', ann_token=f'{name}_{v}_{f}',
                    identity=who, category='vehicle.car', visibility=4, coverage=1., patch_px=8., cam=cams[(f//4+v) % len(cams)] if v else '', shard=name, row=f*n_ids+v))
    table = {k: [r[k] for r in rows] for k in rows[0]}
    table['instance_id'] = np.unique(table['identity'], return_inverse=True)[1].tolist()
    pq.write_table(pa.table(table), path/'observations.parquet')
    (path/'config.json').write_text(json.dumps(dict(cams=list(cams), lss=dict(bev_channels=4), dataset=plain(DatasetConfig(crop=CROP))))); (path/'dataset.json').write_text('{}')
    return path

def read_back(root):
    "folder -> {name: (identity, camera, sequence, frame)}"
    out = {}
    for f in ('bounding_box_train', 'query', 'bounding_box_test'):
        out[f] = {}
        for p in (root/f).iterdir():
            i, c, s, n, _ = map(int, NAME.match(p.name).groups())
            assert tuple(map(int, GET.search(str(p)).groups())) == (i, c)
            out[f][p.name] = i, c, s, n
    return out

# Market-1501

@pytest.mark.parametrize('images, cameras', [('rgb_splat', 'auto'), ('patch', 'auto'), ('patch', 'time')])
def test_market_layout(tmp_path, images, cameras):
    import csv
    from PIL import Image
    d = reid(tmp_path/'reid')
    info, out = ex.export_market1501(d, tmp_path/'market1501', images=images, cameras=cameras, min_gap=1.), tmp_path/'market1501'
    got = read_back(out)
    assert {f: (len(v), len({i for i, *_ in v.values()})) for f, v in got.items()} == {f: (c['n_images'], c['n_ids']) for f, c in info['counts'].items()}
    ids = {f: {i for i, *_ in v.values()} for f, v in got.items()}
    assert not ids['bounding_box_train'] & (ids['query'] | ids['bounding_box_test']) and ids['query'] <= ids['bounding_box_test'] and 0 not in ids['bounding_box_train']
    assert info['stock_readers'] and not list(tmp_path.glob('*.part'))
    rows = {(r['folder'], r['name']): r for r in csv.DictReader((out/'names.csv').open())}
    assert len(rows) == sum(map(len, got.values()))
    t = pq.read_table(d/'observations.parquet').to_pylist(); at = {(r['instance_token'], r['sample_token']): r for r in t}
    for f, v in got.items():
        for name, (i, c, _, _) in v.items():
            r = at[rows[f, name]['instance_token'], rows[f, name]['sample_token']]
            assert rows[f, name]['scene_name'] == r['scene_name'] and int(rows[f, name]['market_id']) == i and (r['split'] == 'train') == (f == 'bounding_box_train')
            if images == 'patch': assert r['cam']
            if (images, cameras) == ('patch', 'auto'): assert ['BACK', 'FRONT'][c-1] == r['cam']
    (f, name), r = next((k, r) for k, r in rows.items() if k[0] == 'query')      # the right picture under the name
    r = at[r['instance_token'], r['sample_token']]
    want = np.load(d/'scenes'/r['shard']/f"{'patches' if images == 'patch' else 'rgb'}.npy")[r['row']].transpose(1, 2, 0).astype(int)
    assert np.abs(np.array(Image.open(out/f/name)).astype(int)-want).mean() < 12  # noise, as JPEG
    # what their rule leaves: at least one match for every query, and none nearer than the gap
    for q, (i, c, _, _) in got['query'].items():
        a = rows['query', q]
        left = [rows['bounding_box_test', n] for n, (j, k, _, _) in got['bounding_box_test'].items() if j == i and k != c]
        assert left and min(abs(int(g['timestamp'])-int(a['timestamp'])) for g in left if g['scene_name'] == a['scene_name']) >= 1e6

def test_market_refuses(tmp_path, caplog):
    d = reid(tmp_path/'reid')
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').touch()
    with pytest.raises(ValueError, match='not an empty folder'): ex.export_market1501(d, tmp_path/'full')
    with pytest.raises(ValueError, match="contains '7_c2'"): ex.export_market1501(d, tmp_path/'run_7_c2'/'market')
    with pytest.raises(ValueError, match='rgb_splat or patch'): ex.export_market1501(d, tmp_path/'m', images='rgb')
    with pytest.raises(ValueError, match='auto, time or sensor'): ex.export_market1501(d, tmp_path/'m', cameras='bev')
    with pytest.raises(ValueError, match='no query'): ex.export_market1501(d, tmp_path/'m', min_gap=60.)
    with pytest.raises(ValueError, match='must not share'): ex.export_market1501(reid(tmp_path/'shared', shared=True), tmp_path/'m')
    with pytest.raises(ValueError, match="pass cameras='time'"): ex.export_market1501(reid(tmp_path/'ten', cams=[f'C{i}' for i in range(10)]), tmp_path/'m', images='patch')
    assert not (tmp_path/'m').exists() and not list(tmp_path.glob('*.part'))
    (tmp_path/'empty').mkdir(); ex.export_market1501(d, tmp_path/'empty', min_gap=1.)
    info = ex.export_market1501(reid(tmp_path/'eight', cams=[f'C{i}' for i in range(8)], n_ids=9, n_frames=32), tmp_path/'m8', images='patch', min_gap=.5)
    assert not info['stock_readers'] and 'subclass' in caplog.text

def test_time_cameras():
    "Windows of one vehicle never touch across the gap of a query; scenes go on counting; order does not matter"
    t = np.r_[np.arange(0, 20, .5), np.arange(100, 103, .5), 0.]
    ids, sc = np.array(['x']*46+['y']), np.array(['s']*40+['u']*6+['s'])
    cam = ex.time_cameras(ids, sc, t, min_gap=2.)
    assert cam[:40].tolist() == sorted(cam[:40]) and set(cam[:40]) == {1, 2, 3} and set(cam[40:46]) == {4, 5} and cam[46] == 1
    q = ex.market_queries(ids, cam, sc, t, min_gap=2.)
    near = (ids[:, None] == ids) & (sc[:, None] == sc) & (cam[:, None] != cam) & (np.abs(t[:, None]-t) < 2)
    assert not near[q].any() and q[:40].sum() == 3 and not q[46]
    order = np.random.default_rng(0).permutation(47)
    assert (ex.time_cameras(ids[order], sc[order], t[order], min_gap=2.) == cam[order]).all()
    assert ex.time_cameras(['x']*200, ['s']*200, np.arange(200.), min_gap=2.).max() == 6   # more windows than numbers

# Embeddings and weights

@pytest.fixture
def net():
    torch.manual_seed(0)
    return CosineMetricNet(MetricConfig.toy(in_channels=4, crop_size=(8, 8), widths=(8, 8), embedding_dim=16)).eval()

def lss(**kw):
    torch.manual_seed(0)
    cfg = LSSConfig.recipe('toy', **{**dict(trunk='b0', pretrained=False, img_size=(32, 64), grid=GRID, up_channels=8, cam_channels=4, bev_channels=4, bev_widths=(8, 8, 8), bev_up=8, appearance=4, context_channels=4), **kw})
    return LiftSplat(cfg).eval()

@pytest.mark.parametrize('suffix', ['parquet', 'npz'])
def test_embeddings_come_back(tmp_path, net, suffix):
    d, out = reid(tmp_path/'reid'), tmp_path/f'e.{suffix}'
    ex.export_embeddings(net, d, out, split='test', n=7)
    emb, cols, meta = ex.read_embeddings(out)
    ds = ex.ReIDDataset(d, split='test')
    assert emb.dtype == np.float32
    np.testing.assert_allclose(emb, want := embed(net, ds.read('crops')).numpy(), atol=1e-6)
    assert np.array_equal(ex.read_embeddings(ex.save_embeddings(tmp_path/f'again.{suffix}', want, dict(a=np.arange(len(want)))))[0], want)
    assert set(cols) == set(ex.EMBEDDING_COLUMNS)
    for k, v in cols.items(): assert np.array_equal(v, ds.table[k]) and v.dtype.kind == ds.table[k].dtype.kind, k
    assert meta['metric'] == plain(net.cfg) and meta['split'] == 'test'
    if suffix == 'npz': assert np.load(out, allow_pickle=False)['embedding'].shape == emb.shape
    with pytest.raises(ValueError, match='look at x'): ex.save_embeddings(out, emb, dict(x=[1]))
    with pytest.raises(ValueError, match='.parquet or .npz'): ex.save_embeddings(tmp_path/'e.csv', emb, {})
    with pytest.raises(FileNotFoundError): ex.read_embeddings(tmp_path/'none.npz')

def test_safetensors(tmp_path, net):
    need('safetensors')
    save_metric(tmp_path/'m.pt', net, extra=dict(note='x'), step=3)
    path = ex.save_safetensors(tmp_path/'m.pt', tmp_path/'m.safetensors')
    got = ex.load_model(path)
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(got(x), net(x)) and got.cfg == net.cfg and got.config['note'] == 'x' and got.step == 3 and not got.training
    model = lss(); model.classes, model.company_ids = ('vehicle.bus',), ['a']
    again = ex.load_model(ex.save_safetensors(model, tmp_path/'lss.safetensors'))
    assert again.cfg == model.cfg and again.classes == model.classes and again.company_ids == ['a'] and again.img_aug == model.img_aug
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, str(tmp_path/'other.safetensors')); (tmp_path/'bad.safetensors').write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='no configuration of this package'): ex.load_model(tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='bad.safetensors is no safetensors file'): ex.load_model(tmp_path/'bad.safetensors')
    with pytest.raises(ValueError, match='.safetensors, .pt2 or .onnx'): ex.export_model(net, tmp_path/'m.pb')

def test_load_model_names_what_is_wrong(tmp_path, net):
    save_metric(tmp_path/'m.pt', net); save_atomic(dict(model={}, config=dict(x=1)), tmp_path/'x.pt')
    assert isinstance(ex.load_model(tmp_path/'m.pt'), CosineMetricNet)
    with pytest.raises(FileNotFoundError, match='write hf://runs/none'): ex.load_model('runs/none')
    with pytest.raises(ValueError, match='holds no network'): ex.load_model(tmp_path/'x.pt')
    with pytest.raises(ValueError, match='holds no lss'): ex.load_model(tmp_path/'m.pt', kind='lss')

def test_hub(tmp_path, net, monkeypatch):
    "The hub is asked only for hf:// names; without a connection the message says what to do"
    hub = pytest.importorskip('huggingface_hub'); need('safetensors')
    asked = []
    def fetch(name, filename, revision=None):
        asked.append((name, filename, revision))
        if name == 'me/offline': raise ConnectionError('no route')
        return str(tmp_path/'m.safetensors')
    monkeypatch.setattr(hub, 'hf_hub_download', fetch)
    ex.save_safetensors(net, tmp_path/'m.safetensors')
    with pytest.raises(FileNotFoundError): ex.load_model('me/cars')
    ex.load_model(tmp_path/'m.safetensors'); assert not asked
    ex.load_model('hf://me/cars@v1'); assert asked == [('me/cars', 'model.safetensors', 'v1')]
    with pytest.raises(OSError, match='hf download me/offline model.safetensors'): ex.load_model('hf://me/offline')
    with pytest.raises(ValueError, match='not a hub id'): ex.load_model('hf://cars')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match='pip install huggingface_hub'): ex.load_model('hf://me/cars')

def test_three_lines_need_no_training(tmp_path, net):
    "Neither training dependencies nor the devkit nor a hub client are imported"
    need('safetensors')
    ex.save_safetensors(net, tmp_path/'m.safetensors'); np.save(tmp_path/'x.npy', np.zeros((2, 4, 8, 8), np.float32))
    code = f'''
import sys, numpy as np
from bev_reid.export import load_model, embed
emb = embed(load_model({str(tmp_path/'m.safetensors')!r}), np.load({str(tmp_path/'x.npy')!r}))
assert emb.shape == (2, 16)
bad = {{m.split('.')[0] for m in sys.modules}} & {{'accelerate', 'tensorboard', 'pytorch_metric_learning', 'nuscenes', 'huggingface_hub', 'onnx', 'onnxruntime', 'trimesh', 'embreex', 'matplotlib'}}
assert not bad, bad
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

# Graphs

def rig(n=2):
    K, pose = ex._some_rig(n)
    aug = torch.eye(4).expand(1, n, 4, 4).clone(); aug[..., 0, 0] = aug[..., 1, 1] = .4; aug[..., 0, 3], aug[..., 1, 3] = 1.7, -2.3
    return K.clone(), pose.float(), aug

def test_geometry_of_the_graph():
    "Matrices alone say where rays go and in which cell each point falls"
    model = lss(); K, pose, aug = rig(3)
    cells, rays = ex._geometry(model.frustum, ex.pixel2ego(K, pose, aug), model.cfg)
    plan = model.plan(K, pose, aug)
    assert (cells.flatten() != plan.cells).sum() <= 1 and (plan.cells >= 0).sum() > 100
    torch.testing.assert_close(rays, ray_features(model.frustum, K, pose, aug), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize('kw', [dict(appearance=0, rays=False, bev_skip=False), {}], ids=['plain', 'toy'])
def test_lss_graph(tmp_path, fixed, kw):
    need('onnx', 'onnxruntime', 'onnxscript')
    import onnx, onnxruntime as ort
    model, r, imgs = lss(**kw), rig(), torch.rand(1, 2, 3, 32, 64)
    path = ex.export_model(model, tmp_path/'lss.onnx', rig=r if fixed else None, n_cams=2)
    with torch.no_grad(): want = model(imgs, *r)
    inputs = (imgs,) if fixed else (imgs, ex.pixel2ego(*r))
    opts = ort.SessionOptions(); opts.intra_op_num_threads = 2
    session = ort.InferenceSession(str(path), opts, providers=['CPUExecutionProvider'])
    for _ in range(5):                                          # threads that add into one cell would show
        for k, v in ex.run_onnx(session, *inputs).items(): np.testing.assert_allclose(v, want[k].numpy(), atol=1e-4)
    graph = onnx.load(str(path))
    assert {n.domain for n in graph.graph.node} == {''} and not {'ScatterND'} & {n.op_type for n in graph.graph.node}
    meta = json.loads({p.key: p.value for p in graph.metadata_props}['bev_reid'])
    assert meta['fixed_rig'] == fixed and meta['config']['lss'] == plain(model.cfg)
    assert not list(tmp_path.glob('*.part*'))
    with pytest.raises(ValueError, match='this network takes imgs'): ex.run_onnx(path, *inputs, imgs)

def test_lss_program_without_this_package(tmp_path):
    "A saved program runs where bev_reid was never imported"
    model, r, imgs = lss(), rig(), torch.rand(1, 2, 3, 32, 64)
    ex.export_model(model, tmp_path/'lss.pt2', n_cams=2)
    with torch.no_grad(): want = model(imgs, *r)['bev_feats']
    torch.save(dict(args=(imgs, ex.pixel2ego(*r)), want=want), tmp_path/'io.pt')
    code = f'''
import sys, json, torch
extra = {{'bev_reid.json': ''}}
program = torch.export.load({str(tmp_path/'lss.pt2')!r}, extra_files=extra); io = torch.load({str(tmp_path/'io.pt')!r})
torch.testing.assert_close(program.module()(*io['args'])[0], io['want'], atol=1e-4, rtol=0)
assert json.loads(extra['bev_reid.json'])['kind'] == 'lss' and 'bev_reid' not in sys.modules
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]

def test_metric_graph(tmp_path, net):
    need('onnx', 'onnxruntime', 'onnxscript')
    path = ex.export_model(net, tmp_path/'m.onnx')
    program = ex.metric_program(net)
    assert [(i.name, i.shape) for i in ex._session(path).get_inputs()] == [('crops', ['i', 4, 8, 8])]
    for n in (1, 2, 33):
        x = torch.randn(n, 4, 8, 8)
        np.testing.assert_allclose(ex.run_onnx(path, x)['embeddings'], net(x).detach().numpy(), atol=1e-4)
        torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=0)

def test_metric_graph_from_the_map(tmp_path, net):
    need('onnx', 'onnxruntime', 'onnxscript')
    with pytest.raises(ValueError, match='from which map'): ex.export_model(net, tmp_path/'m.onnx', from_map=True)
    with pytest.raises(ValueError, match='both grid and crop'): ex.metric_program(net, grid=GRID)
    save_metric(tmp_path/'m.pt', net, extra=dict(dataset=dict(dataset=dict(crop=plain(CROP)), lss=dict(grid=plain(GRID)))))
    path = ex.export_model(tmp_path/'m.pt', tmp_path/'m.onnx', from_map=True)
    bev = torch.randn(1, 4, 32, 32)
    for n in (1, 5):
        boxes = torch.randn(n, 7)*4
        want = net(crop_bev(bev, boxes, torch.zeros(n).long(), grid=GRID, cfg=CROP)).detach().numpy()
        np.testing.assert_allclose(ex.run_onnx(path, bev, boxes)['embeddings'], want, atol=1e-4)

def test_a_wrong_file_is_not_kept(tmp_path, net, monkeypatch):
    need('onnx', 'onnxruntime', 'onnxscript')
    monkeypatch.setattr(ex, 'run_onnx', lambda path, x: dict(embeddings=net(x).detach().numpy()+1e-3))
    with pytest.raises(ValueError, match='off by 0.001'): ex.export_model(net, tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())

def test_what_is_missing_is_named(tmp_path, net, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None); monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match=r'bev_reid\[export\]'): ex.export_model(net, tmp_path/'m.onnx')
    with pytest.raises(ImportError, match=r'bev_reid\[export\]'): ex.save_safetensors(net, tmp_path/'m.safetensors')
    assert not list(tmp_path.iterdir())
