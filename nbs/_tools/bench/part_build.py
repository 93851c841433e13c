"""Building the ReID data set at nuScenes' size: ours beside the plain way, stage by stage and as a whole

The plain way decodes every image whole with PIL, resizes it with PIL, runs the network keyframe by keyframe in float32, decodes the
images again for the patches, cuts one vehicle at a time, and writes at the end. The pictures are those of the toy world, enlarged to
1600 x 900 with grain, so that a file has the size of a nuScenes file.
"""
import functools, json, shutil, tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from bev_reid.crops import CropConfig, crop_bev, image_boxes
from bev_reid.data import DrivingData, apply_img_aug, val_img_aug
from bev_reid.dataset import DatasetConfig, Keyframes, build_dataset, collate_keyframes, observe
from bev_reid.fit import fast_amp
from bev_reid.geometry import BEVGrid
from bev_reid.lss import LiftSplat, LSSConfig, fast_lss, rgb_bev, run_lss
from bev_reid.toy import make_toy
from timing import interleave, row

SIZE = (900, 1600)   # height and width of a nuScenes image

def world(root, n_samples):
    "A toy world with images of nuScenes' size, calibration included"
    root, rng = make_toy(root, n_scenes=2, n_samples=n_samples, seed=3, img_size=(225, 400), workers=1), np.random.default_rng(0)
    for p in sorted(Path(root).glob('samples/CAM*/*.jpg')):
        big = cv2.resize(cv2.imread(str(p)), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
        grain = cv2.resize(rng.normal(0, 8, (SIZE[0]//4, SIZE[1]//4, 1)).astype(np.float32), SIZE[::-1])[..., None]
        cv2.imwrite(str(p), (big+grain).clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 75])
    tables = next(Path(root).glob('v1.0-*'))
    def edit(name, change):
        rows = json.loads((tables/name).read_text())
        for r in rows: change(r)
        (tables/name).write_text(json.dumps(rows))
    def calib(r):
        if k := r['camera_intrinsic']: r['camera_intrinsic'] = [[4*k[0][0], 0, 4*k[0][2]+1.5], [0, 4*k[1][1], 4*k[1][2]+1.5], k[2]]
    edit('calibrated_sensor.json', calib)
    edit('sample_data.json', lambda r: r.update(height=SIZE[0], width=SIZE[1]) if r['filename'].endswith('.jpg') else None)
    return root

# --- the plain way ---
def plain_imgs(frame, aug):
    "Decode whole, resize, crop"
    out = []
    for p, size in zip(frame.img_paths, frame.img_sizes.tolist()):
        m = val_img_aug(aug, size); scale = float(m[0, 0]); left, top = (int(round(float(v))) for v in scale/2-.5-m[:2, 3])
        img = Image.open(p).convert('RGB').resize((round(size[1]*scale), round(size[0]*scale)), Image.BILINEAR)
        img = img.crop((left, top, left+aug.out_size[1], top+aug.out_size[0]))
        out.append(torch.from_numpy(np.array(img)).permute(2, 0, 1).float()/255)
    return torch.stack(out)

def plain_patch(img, rect, size):
    l, t, r, b = rect.round().long().tolist()
    if r-l < 2 or b-t < 2: return torch.zeros(3, size, size, dtype=torch.uint8)
    return F.interpolate(img[None, :, t:b, l:r].float(), (size, size), mode='bilinear', antialias=True)[0].round().clamp(0, 255).byte()

def plain_patches(frame, boxes, size):
    rects, _ = image_boxes(boxes, frame.intrins, frame.cam2ego, sizes=frame.img_sizes)
    imgs = [torch.from_numpy(np.array(Image.open(p).convert('RGB'))).permute(2, 0, 1) for p in frame.img_paths]
    cams = (rects[..., 2:]-rects[..., :2]).prod(-1).argmax(1)
    return torch.stack([plain_patch(imgs[c], r[c], size) for r, c in zip(rects, cams)])

def plain_crop(bev, box, grid, cfg):
    "One vehicle: its window in cells, one grid_sample"
    t = -((torch.arange(cfg.size)+.5)/cfg.size-.5)*cfg.extent
    a, l = torch.meshgrid(t, t, indexing='ij')
    x, y = box[0]+a*box[6].cos()-l*box[6].sin(), box[1]+a*box[6].sin()+l*box[6].cos()
    lo, dx, n = (torch.tensor(v, dtype=torch.float32) for v in (grid.lo[:2], grid.dx[:2], grid.nx[:2]))
    at = ((torch.stack([x, y], -1)-lo)/dx-.5)*2/(n-1)-1
    return F.grid_sample(bev, at.flip(-1)[None], align_corners=True)[0]

def plain_run(model, frame, imgs, aug):
    mats = torch.stack([val_img_aug(aug, s) for s in frame.img_sizes.tolist()])
    return run_lss(model, dict(imgs=imgs[None], intrins=frame.intrins[None], cam2ego=frame.cam2ego[None], img_aug=mats[None]))

@torch.no_grad()
def plain_build(model, data, out, cfg, windows):
    "Everything in memory, then three files"
    crops, rgb, patches = [], [], []
    for token, boxes in windows.items():
        frame = data.frame(token)
        got = plain_run(model, frame, imgs := plain_imgs(frame, model.img_aug), model.img_aug)
        colours = rgb_bev(imgs[None], got)[:, :3]
        crops += [plain_crop(got['bev_feats'], b, model.cfg.grid, cfg.crop).half() for b in boxes]
        rgb += [(plain_crop(colours, b, model.cfg.grid, cfg.crop)*255).round().clamp(0, 255).byte() for b in boxes]
        patches += list(plain_patches(frame, boxes, cfg.patch_size))
    Path(out).mkdir(parents=True)
    for name, v in (('crops', crops), ('rgb', rgb), ('patches', patches)): np.save(Path(out)/f'{name}.npy', torch.stack(v).numpy())

# --- side by side ---
def network(quick):
    torch.manual_seed(0)
    small = dict(grid=BEVGrid((-52, 52, 1), (-52, 52, 1), (-10, 10, 20), (4, 44, 4)), bev_widths=(16, 16, 16), bev_up=32, up_channels=64)
    return LiftSplat(LSSConfig(**(small if quick else {}))).eval()

def check(model, data, items, cfg, amp):
    "The same pictures, patches and crops within what a change of the resampling filter and of the precision moves; returns what differs"
    item = items[0]; frame = data.frame(item['sample_token'])
    whole = plain_imgs(frame, model.img_aug)
    d = {'pixels': (item['imgs']-whole).abs().mean()*255, 'patches': (item['patches'].int()-plain_patches(frame, item['windows'], cfg.patch_size).int()).abs().float().mean()}
    with torch.no_grad(): exact = plain_run(model, frame, item['imgs'], model.img_aug)['bev_feats']
    rows, crops, _, _ = observe(fast_lss(model, amp='no'), collate_keyframes([item]), cfg=cfg)
    want = torch.stack([plain_crop(exact, b, model.cfg.grid, cfg.crop) for b in item['windows']])
    d['crops'] = (torch.from_numpy(crops).float()-want).abs().max()/want.abs().max()
    rough = torch.from_numpy(observe(fast_lss(model, amp=amp), collate_keyframes([item]), cfg=cfg)[1]).float()
    d[f'crops in {amp}'] = (rough-want).norm()/want.norm()
    d = {k: round(float(v), 5) for k, v in d.items()}
    assert d['pixels'] < 3 and d['patches'] < 1 and d['crops'] < 2e-3 and d[f'crops in {amp}'] < .05, d
    return d

def rows(quick, say):
    torch.set_num_threads(1); cv2.setNumThreads(0)
    amp, names = fast_amp('cpu'), {'no': 'float32', 'bf16': 'bfloat16'}
    with tempfile.TemporaryDirectory() as tmp:
        data, model = DrivingData(world(f'{tmp}/world', 1 if quick else 4)), network(quick)
        cfg, aug, grid, scene = DatasetConfig(crop=CropConfig(extent=20.)), model.img_aug, model.cfg.grid, data.scenes[0]
        ds = Keyframes(model, data, data.sample_tokens(scenes=[scene]), cfg=cfg)
        everything = {t: ds[i]['windows'] for i, t in enumerate(ds.tokens)}
        ds.tokens = ds.tokens[:4]   # the stages; the whole build takes all
        items, frames = [ds[i] for i in range(len(ds))], [data.frame(t) for t in ds.tokens]
        batch, windows = collate_keyframes(items), {it['sample_token']: it['windows'] for it in items}
        k, kb = np.mean([len(w) for w in windows.values()]), np.mean([Path(p).stat().st_size for f in frames for p in f.img_paths])/1024
        diff = check(model, data, items, cfg, amp)
        note = f"{len(everything)} keyframes of 6 images of {SIZE[1]} x {SIZE[0]}, {kb:.0f} kB each, {k:.0f} vehicles; ours differs from the plain way by {diff['pixels']:.1f} grey levels in the pixels, {100*diff['crops in '+amp]:.1f} % in the crops"
        say(note)
        def stage(name, case, ways, per=len(items), rounds=1 if quick else 2, measure='cpu_s', **kw):
            times = {w: {**t, **{c: t[c]/per for c in ('wall_s', 'cpu_s')}} for w, t in interleave(ways, rounds=rounds, slot_s=0, warm=0).items()}
            say(f"{case}: {', '.join(f'{1e3*t[measure]:.1f} ms' for t in times.values())}")
            return row('build', f'{case}, per keyframe', times, note=note, measure=measure, **kw) | dict(stage=name)
        def each(f): return lambda: [f(fr) for fr in frames]
        def decode(f): return [apply_img_aug(ds._img(p, tuple(s)), val_img_aug(aug, s), aug.out_size, size=tuple(s)) for p, s in zip(f.img_paths, f.img_sizes.tolist())]
        fast = {names[a]: fast_lss(model, amp=a) for a in dict.fromkeys((amp, 'no'))}
        singles = [collate_keyframes([it]) for it in items]
        nets = {f'ours: {a}': functools.partial(lambda f: [run_batch(f, b) for b in singles], f) for a, f in fast.items()}
        with torch.no_grad():
            m = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in run_batch(fast['float32'], batch).items()}
            sample = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(w) for w in batch['windows']]))
            got = observe(fast['float32'], batch, cfg=cfg)
            def write():
                for i, name in enumerate(('crops', 'rgb', 'patches'), 1): np.save(f'{tmp}/{name}.npy', got[i])
            def whole(a, cfg=cfg):
                shutil.rmtree(f'{tmp}/reid', ignore_errors=True); build_dataset(model, data, f'{tmp}/reid', cfg=cfg, amp=a, world=2)   # the share of one of two processes: the first scene
            def plain():
                shutil.rmtree(f'{tmp}/plain', ignore_errors=True); plain_build(model, data, f'{tmp}/plain', cfg, everything)
            alike(lambda: whole(amp), f'{tmp}/reid/scenes/{scene}', plain, f'{tmp}/plain')
            out = [
                stage('read', 'read six JPEGs', {'read_bytes': each(lambda f: [Path(p).read_bytes() for p in f.img_paths])}),
                stage('decode', 'read, decode and resize six images', {'ours: decoded at a quarter of the size': each(decode), 'plain: decoded whole, resized': each(lambda f: plain_imgs(f, aug))}, rounds=5 if quick else 3, at_least={'plain: decoded whole, resized': 2.5}),
                stage('patches', 'patches of all vehicles from the original images', {'ours: only the cameras that a patch is cut from': each(lambda f: ds._vehicles(f)['patches']),
                    'plain: all six decoded again': each(lambda f: plain_patches(f, windows[f.sample_token], cfg.patch_size))}, rounds=5 if quick else 3),
                stage('lss', 'network', {**nets, 'plain: float32, one by one': lambda: [plain_run(model, f, it['imgs'], aug) for f, it in zip(frames, items)]}),
                stage('crops', 'crops of all vehicles', {'ours: all of a batch in one call': lambda: crop_bev(m['bev_feats'], torch.cat(batch['windows']), sample, grid=grid, cfg=cfg.crop).half(),
                    'plain: one vehicle at a time': lambda: [plain_crop(m['bev_feats'][i:i+1], w, grid, cfg.crop).half() for i, ws in enumerate(batch['windows']) for w in ws]}),
                stage('write', 'write crops, colours and patches', {'np.save': write}) | dict(bytes=sum(a.nbytes for a in got[1:])/len(items)),
                stage('whole', 'the whole build', {f'ours: {names[amp]}': lambda: whole(amp), **({} if quick else {f'ours: {names[amp]}, patches from shrunk images': lambda: whole(amp, replace(cfg, patch_from='shrunk'))}), 'plain': plain},
                    per=len(everything), at_least={} if quick else {'plain': 1.5}, why={'plain': 'on a CPU the network takes most of the time, and both ways run the same network'})]
            if not quick: out.append(loaders(model, data, cfg, ds.tokens, stage))
    return out

@torch.no_grad()
def run_batch(model, b):
    return run_lss(model, b, plan=model.plan(b['intrins'], b['cam2ego'], b['img_aug']))

def alike(ours, path, plain, plain_path):
    "Both builds hold the same vehicles in the same order, nearly the same crops, the same patches"
    ours(), plain()
    a, b = (np.load(f'{p}/crops.npy').astype(np.float32) for p in (path, plain_path))
    assert a.shape == b.shape and np.linalg.norm(a-b) < .1*np.linalg.norm(b), (a.shape, b.shape)
    assert np.abs(np.load(f'{path}/patches.npy').astype(int)-np.load(f'{plain_path}/patches.npy')).max() <= 1

def loaders(model, data, cfg, tokens, stage):
    "Processes against threads: everything before the network, in wall seconds"
    ds = Keyframes(model, data, tokens*5, cfg=cfg)
    def processes(n): return lambda: [None for _ in DataLoader(ds, batch_size=4, collate_fn=collate_keyframes, num_workers=n)]
    def threads(n):
        with ThreadPoolExecutor(n) as pool: list(pool.map(ds.__getitem__, range(len(ds))))
    return stage('load', 'everything before the network', {'two loader processes': processes(2), 'two threads': lambda: threads(2), 'in the process of the network': processes(0)}, per=len(ds), rounds=1, measure='wall_s')
