#!/usr/bin/env python
"""Two networks that predict occupancy, side by side on held-out scenes of the toy world; writes results/occ_models.json

    python nbs/_tools/results_occ_models.py            about forty CPU minutes on one core; killed and called again it goes on
    python nbs/_tools/results_occ_models.py --quick    the same road with a tiny world and three steps: no number of it means anything
    python nbs/_tools/results_occ_models.py --show     only print what is in the file, and draw the picture again
    python nbs/_tools/results_occ_models.py --sizes    one prediction and one training step of both networks at the published sizes (200 x 200 x 16 voxels): seconds and memory

World: that of `make results` (30 scenes of 20 keyframes by day, by night and in rain: 21 to train on, 3 to choose on, 6 to measure on). Its keyframes
have no sweeps between them. Labels: those of the package's own generator (`create_occupancy`, no point labels: classes come from the boxes, the road
from the height above the ground, the rest is `other`), not the surfaces that the world was drawn from. What no ray reached is free in them, so the
mask of the loss and of the metric decides much: it is an option, and stands beside every number.

Networks: `lss`, the map of the camera-to-BEV network with channels turned into heights, and `former`, queries that ask the cameras. Both have the
same camera network, the same loss (cross-entropy, Lovász, depth of the LiDAR), as many steps, and start from the same checkpoint (`--lss`), whose
camera network, and for `lss` whose map, has seen the training scenes: vehicles and depths, never an occupancy label. The file says how many of the
vehicles that it has seen occur in which part. The learning rate of each network is chosen on the validation scenes, with short trainings.

Beside them: every voxel free, and the most frequent class of each voxel among the training keyframes, counted where the mask holds.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bev_reid.data import DrivingData
from bev_reid.dataset import identities
from bev_reid.fit import check_same_config, load_checkpoint, plain, write_json
from bev_reid.occ_files import OccFolder
from bev_reid.occ_kernels import OccGrid
from bev_reid.occ_model import OccLossConfig, OccRecipe, baselines, collate_occ, eval_occ, load_occ, occ_samples, predict_occ, train_occ
from bev_reid.occ_scene import CLASSES, OccConfig
from bev_reid.occ_score import format_scores
from bev_reid.occupancy import create_occupancy

ROOT = Path(__file__).resolve().parents[2]
LABELS = OccConfig(grid=OccGrid.preset('toy'), ground=True, camera_mask=2) # a ray through every second pixel: with fewer, far voxels between the rays count as unseen

def settings(a):
    "All that was fixed beforehand"
    s = dict(models=['lss', 'former'], seeds=[0, 1], steps=a.steps, rates=[1e-3, 3e-3], choice_steps=80, val_every=4, batch_size=2, mask=a.mask, masks=list(dict.fromkeys([a.mask, 'camera', 'none'])), labels=plain(LABELS))
    return {**s, 'steps': 2, 'choice_steps': 1, 'val_every': 1} if a.quick else s

def recipe(a, s, model, lr, seed, steps):
    "One training"
    r = OccRecipe.recipe('toy', model=model, init=str(a.lss) if a.lss else '', batch_size=s['batch_size'], seed=seed, loss=OccLossConfig(mask=s['mask']))
    return replace(r, fit=replace(r.fit, lr=lr, max_steps=steps, seed=seed, amp='auto', checkpoint_every=40, keep=1))

def remembered(model):
    "A network that looks at each keyframe once, whatever it is measured on"
    seen = {}
    def predict(batch):
        if (t := batch['sample_token'][0]) not in seen: seen[t] = predict_occ(model, batch)
        return seen[t]
    return predict

def run(a, s, data, folder, name, r):
    "Train, or go on; scores on validation scenes, and the CPU seconds of all parts"
    at, before = a.at/'runs'/name, 0.
    clock = at/'cpu.json'
    if clock.exists(): before = json.loads(clock.read_text())
    t = time.process_time()
    try: got = train_occ(data, folder, at, r, val_every=s['val_every'], device='cpu')
    finally: write_json(clock, before+time.process_time()-t)
    return got['metrics'], json.loads(clock.read_text())

def short(r): return {k: r[k] for k in ('mIoU', 'geometric', 'voxels', 'mask', 'keyframes')}

def start_of(a, data):
    "What the network that the trainings start from has seen"
    if not a.lss: return dict(path='', note='ImageNet weights of the trunk alone')
    state = load_checkpoint(a.lss); seen = set(state['config'].get('data', {}).get('company_ids', []))
    whose = identities(data)
    parts = {k: {whose[t] for s in data.sample_tokens(k) for t in data.frame(s).instance_tokens if t in whose} for k in ('train', 'val', 'test')}
    return dict(path=str(a.lss), steps=state['step'], vehicles_seen=len(seen), of_which_in={k: len(v & seen) for k, v in parts.items()}, note='trained on the training scenes for vehicles, depths and identities; no occupancy labels')

def study(a):
    s, command = settings(a), ' '.join(['python', 'nbs/_tools/results_occ_models.py', *sys.argv[1:]])
    data = DrivingData(a.world)
    if 'test' not in data.splits() or 'val' not in data.splits(): raise SystemExit(f"{a.world} needs training, validation and test scenes, it has {list(data.splits())}: make it with 3 scenes or more")
    t = time.process_time()
    if create_occupancy(data, a.at/'labels', LABELS, progress=True)['scenes']: write_json(a.at/'labels_cpu.json', time.process_time()-t)
    folder = OccFolder(a.at/'labels')
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    if out: check_same_config(out['settings'], s, a.out)
    out = {**dict(title='TOY WORLD: rendered scenes, labels of the generator', settings=s, start=start_of(a, data), classes=list(CLASSES), choices={}, rows={}), **out}
    def keep(): write_json(a.out, out)
    base = occ_samples(data, folder, 'test', recipe(a, s, 'lss', 1e-3, 0, 1))
    out['scenes'] = {k: data.splits()[k] for k in ('train', 'val', 'test')}; out['keyframes'] = {k: len(data.sample_tokens(k)) for k in ('train', 'val', 'test')}
    for m in s['masks']:
        for name, f in baselines(folder, data.sample_tokens('train'), mask=m).items():
            row = out['rows'].setdefault(name, dict(test={}))
            if m not in row['test']: row['test'][m] = eval_occ(f, base, mask=m); keep()
    for model in s['models']:
        for lr in s['rates']:
            if (key := f'{model}|{lr:g}') in out['choices']: continue
            r = recipe(a, s, model, lr, 1000, s['choice_steps'])                                  # a seed that no final training has
            val, cpu = run(a, s, data, folder, f'choice_{model}_{lr:g}', r)
            out['choices'][key] = dict(lr=lr, steps=s['choice_steps'], cpu_minutes=cpu/60, val=val); keep()
            print('choice', key, val, flush=True)
    for seed in s['seeds']:                                                                    # a whole row of networks, then the next seed
        for model in s['models']:
            if (key := f'{model}|{seed}') in out['rows']: continue
            lr = max(s['rates'], key=lambda v: out['choices'][f'{model}|{v:g}']['val']['mIoU'])
            r = recipe(a, s, model, lr, seed, s['steps'])
            val, cpu = run(a, s, data, folder, f'{model}_s{seed}', r); net, _ = load_occ(a.at/'runs'/f'{model}_s{seed}')
            predict, samples = remembered(net), occ_samples(data, folder, 'test', r)
            out['rows'][key] = dict(model=model, seed=seed, lr=lr, steps=s['steps'], parameters=sum(p.numel() for p in net.parameters()), cpu_minutes=cpu/60, command=command, val=val, test={m: eval_occ(predict, samples, mask=m) for m in s['masks']}); keep()
            print(key, f"lr {lr:g}", short(out['rows'][key]['test'][s['mask']]), flush=True)
    labels_cpu = a.at/'labels_cpu.json'
    out['cpu_minutes'] = dict(labels=json.loads(labels_cpu.read_text())/60 if labels_cpu.exists() else None, choices=sum(c['cpu_minutes'] for c in out['choices'].values()), trainings=sum(r.get('cpu_minutes', 0) for r in out['rows'].values())); keep()
    return out

def mean_of(rows):
    "Scores of several seeds: means, and the spread of the mIoU"
    def mean(v): return float(np.nanmean(v)) if np.isfinite(v).any() else float('nan')
    first = rows[0]
    return {**first, **{k: mean([r[k] for r in rows]) for k in ('mIoU', 'geometric')}, 'iou': [mean(np.array([np.nan if r['iou'][i] is None else r['iou'][i] for r in rows], float)) for i in range(len(first['iou']))],
            'rings': {k: {m: mean([r['rings'][k][m] for r in rows]) for m in ('mIoU', 'geometric')} for k in first['rings']}, 'spread': float(np.std([r['mIoU'] for r in rows], ddof=1)) if len(rows) > 1 else float('nan')}

def tables(out):
    "A table per mask, as text"
    text, s = [], out['settings']
    for m in s['masks']:
        of = {k: [r['test'][m] for r in out['rows'].values() if r.get('model') == k] for k in s['models']}
        rows = {k: mean_of(v) for k, v in of.items() if v} | {k: mean_of([out['rows'][k]['test'][m]]) for k in ('majority', 'empty')}
        each = '; '.join(' '.join([k, *(f"{100*r['mIoU']:.1f}" for r in v)]) for k, v in of.items())
        text += [f"\nloss: mask {s['mask']}; metric: mask {m}; mIoU of each seed: {each}", format_scores(rows)]
    return '\n'.join(text)

def picture(a, out, path):
    "Truth beside predictions beside errors on the held-out keyframe with the most voxels of objects"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    from bev_reid.occ_kernels import FREE
    from bev_reid.occ_show import COLORS, error_colors, show_top, show_voxels
    data, folder, s = DrivingData(a.world), OccFolder(a.at/'labels'), out['settings']
    def objects(t): lab = folder.labels(t); return int(((lab['semantics'] > 0) & (lab['semantics'] < 11) & lab['mask_camera']).sum())
    day = [t for t in data.sample_tokens('test')]
    token = max(day, key=objects); lab = folder.labels(token); mask, truth = lab['mask_camera'], np.where(lab['mask_camera'], lab['semantics'], FREE)
    nets = {m: load_occ(a.at/'runs'/f"{m}_s{s['seeds'][0]}") for m in s['models']}
    fig, axes = plt.subplots(2, 5, figsize=(13, 5.8), dpi=80, layout='constrained')
    def both(i, v, c, title): show_top(v, folder.grid, colors=c, ax=axes[0, i], title=title); show_voxels(v, folder.grid, colors=c, ax=axes[1, i])
    both(0, truth, None, 'truth, where cameras see')
    used = set(np.unique(truth))
    for i, (m, (net, r)) in enumerate(nets.items()):
        samples = occ_samples(data, folder, 'test', r); pred = np.where(mask, predict_occ(net, collate_occ([samples[samples.tokens.index(token)]]))[0], FREE); used |= set(np.unique(pred))
        v, c = error_colors(pred, truth); both(1+2*i, pred, None, m); both(2+2*i, v, c, f'{m}: errors')
    names = [Patch(color=COLORS[c], label=CLASSES[c]) for c in sorted(used-{FREE})]+[Patch(color=c, label=l) for c, l in (((.2, .65, .3), 'right'), ((1, .65, .1), 'wrong class'), ((.25, .4, .95), 'missed'), ((.9, .2, .2), 'invented'))]
    fig.legend(handles=names, loc='outside lower center', ncols=8, fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True); fig.savefig(path); plt.close(fig)
    from PIL import Image
    Image.open(path).convert('RGB').quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    return path

def one_step(model):
    "Seconds and memory of one keyframe through a network of published size; made-up images, the cameras of a real rig's layout"
    from bev_reid.occ_model import make_model, occ_loss
    torch.set_num_threads(1); torch.manual_seed(0)
    r = OccRecipe.recipe('nuscenes', model=model); net, (h, w) = make_model(r), r.lss.img_size; opt = torch.optim.AdamW(net.parameters(), 1e-4)
    yaw = torch.arange(6)*torch.pi/3; ahead, up = torch.stack([yaw.cos(), yaw.sin(), 0*yaw], -1), torch.tensor([0., 0, 1]).expand(6, 3)
    cam = torch.eye(4).repeat(6, 1, 1); cam[:, :3, :3] = torch.stack([torch.linalg.cross(ahead, up), -up, ahead], -1); cam[:, 2, 3] = 1.6      # x right, y down, z ahead
    batch = dict(imgs=torch.randn(1, 6, 3, h, w), intrins=torch.tensor([[.8*w, 0, w/2], [0, .8*w, h/2], [0, 0, 1]]).repeat(1, 6, 1, 1), cam2ego=cam[None], img_aug=torch.eye(4).repeat(1, 6, 1, 1),
                 semantics=torch.randint(0, len(CLASSES), (1, *r.grid.nx)), mask_camera=torch.rand(1, *r.grid.nx) < .3, mask_lidar=torch.rand(1, *r.grid.nx) < .3)
    def clock(f): t = time.process_time(); f(); return time.process_time()-t
    @torch.no_grad()
    def predict(): assert net(batch)['logits'].shape == (1, len(CLASSES), *r.grid.nx)
    def step(): opt.zero_grad(); occ_loss(net(batch)['logits'], batch, r.loss)['loss'].backward(); opt.step()
    net.eval(); predict(); out = dict(parameters=sum(p.numel() for p in net.parameters()), voxels=list(r.grid.nx), images=[6, h, w], predict_s=min(clock(predict) for _ in range(3)))
    net.train(); step(); return out | dict(step_s=min(clock(step) for _ in range(2)), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--world', type=Path, default=Path('demo/standard/world'), help='toy world; made as `make results` makes it where it is missing')
    p.add_argument('--lss', type=Path, default=Path('demo/standard/lss/64'), help="camera-to-BEV network to start from; '' for none")
    p.add_argument('--at', type=Path, default=Path('demo/occ_models'), help='labels and runs'); p.add_argument('--out', type=Path, default=ROOT/'results'/'occ_models.json')
    p.add_argument('--mask', choices=('camera', 'lidar', 'none'), default='camera', help='voxels of the loss and of the choice'); p.add_argument('--steps', type=int, default=720, help='of each final training')
    p.add_argument('--picture', type=Path, help='where to draw truth, predictions and errors'); p.add_argument('--quick', action='store_true'); p.add_argument('--show', action='store_true')
    p.add_argument('--sizes', action='store_true'); p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.one: print(json.dumps(one_step(a.one))); return
    if a.sizes:                                                                                # each in a process of its own: memory is that of the process
        out = json.loads(a.out.read_text()) if a.out.exists() else {}
        out['published_sizes'] = dict(command='python nbs/_tools/results_occ_models.py --sizes', threads=1, rows={m: json.loads(subprocess.run([sys.executable, __file__, '--one', m], check=True, capture_output=True, text=True).stdout) for m in ('lss', 'former')})
        write_json(a.out, out); print(json.dumps(out['published_sizes'], indent=1)); return
    a.lss = a.lss if str(a.lss) not in ('', '.') else None
    if a.quick:
        from bev_reid.toy import make_toy
        a.at, a.lss = (a.at.with_name(a.at.name+'_quick') if a.at == p.get_default('at') else a.at), None
        a.out = a.at/'occ_models.json' if a.out == p.get_default('out') else a.out
        a.world = make_toy(a.at/'world', n_scenes=3, n_samples=2, img_size=(112, 200), n_azimuth=300, workers=1)
    if not a.world.exists(): subprocess.run([Path(sys.executable).with_name('bev_reid_toy'), a.world, '--n-scenes', '30', '--conditions', 'day', 'night', 'rain'], check=True)
    if a.lss and not a.lss.exists(): raise SystemExit(f"{a.lss} does not exist: train it with `bev_reid_train_lss {a.world} {a.lss} --recipe toy --steps 1200`, or pass --lss '' to start from ImageNet")
    out = json.loads(a.out.read_text()) if a.show else study(a)
    print(tables(out))
    if a.picture: print(picture(a, out, a.picture))

if __name__ == '__main__': main()
