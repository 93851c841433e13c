"""No accuracy lost: the published training step in float32 beside ours, in float32 and in bfloat16, over some seeds

    python nbs/_tools/bench/accuracy.py            about seven minutes on one core; writes results/step_accuracy.json

A small toy world, a small network of the same architecture, few steps: what is compared is the training, not the score. A seed
decides the first weights and the order of the samples, and is shared by all ways. Every fast path is switched on, also those that
wait for larger maps.
"""
import argparse, json, os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch

from bev_reid.data import DrivingData, ImgAug, SampleDataset, collate_samples
from bev_reid.geometry import BEVGrid
from bev_reid.lss import Enlarge, LiftSplat, LSSConfig, depth_loss, depth_target, eval_lss, fast_lss, run_lss, seg_loss
from bev_reid.toy import make_toy
from plain_lss import plain_of
from timing import ROOT, machine

CFG = LSSConfig(grid=BEVGrid(xbound=(-24, 24, .75), ybound=(-24, 24, .75), dbound=(2, 34, 1)), img_size=(64, 160), up_channels=64, cam_channels=32,
                bev_channels=32, bev_widths=(32, 48, 64), bev_up=64, depth_loss='ce', depth_weight=.3, pos_weight=6.)
WORLD = dict(n_scenes=4, n_samples=8, seed=1, img_size=(144, 256), conditions=('day',), workers=1)
WAYS = {'published step, float32': (True, False), 'ours, float32': (False, False), 'ours, bfloat16': (False, True)}

def train(plain, amp, seed, samples, steps):
    torch.manual_seed(seed)
    ours = LiftSplat(CFG).train()
    for n in ours.modules():
        if isinstance(n, torch.nn.BatchNorm2d): n.momentum = .1    # few steps: the trunk's own statistics would lag behind
    net = plain_of(ours) if plain else ours
    if plain:
        for n in net.modules():
            if isinstance(n, torch.nn.BatchNorm2d): n.momentum = .1
    opt = torch.optim.Adam(net.parameters(), 2e-3, weight_decay=1e-7, fused=not plain)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = samples[int(torch.randint(len(samples), (1,), generator=order))]
        for g in opt.param_groups: g['lr'] = 2e-3*min(1., (step+1)/20, 2*(1-step/steps))
        torch.manual_seed(seed*100_000+step)                      # which images skip a block
        with torch.autocast('cpu', torch.bfloat16, enabled=amp): out = run_lss(net, batch)
        loss = seg_loss(out['logits'], batch['bev_mask'], pos_weight=CFG.pos_weight).mean()+CFG.depth_weight*depth_loss(out['depth_logits'], depth_target(batch['points'], batch, CFG), kind='ce')
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.); opt.step(); opt.zero_grad()
    return net

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=4); p.add_argument('--steps', type=int, default=160)
    p.add_argument('--world', type=Path, help='a toy world that is there already')
    p.add_argument('--out', type=Path, default=ROOT/'results'/'step_accuracy.json')
    p.add_argument('--only', default='', help='ways whose name holds this')
    a = p.parse_args()
    Enlarge.worth = 0
    ways = {k: v for k, v in WAYS.items() if a.only in k}
    with tempfile.TemporaryDirectory() as tmp:
        data = DrivingData(a.world or make_toy(Path(tmp)/'world', **WORLD), cams=['CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT'])
        train_scenes, held = data.scenes[:3], data.scenes[3:]
        load = lambda scenes: [collate_samples([s]) for s in SampleDataset(data, data.sample_tokens(scenes=scenes), img_aug=ImgAug(out_size=CFG.img_size), grid=CFG.grid, train=False)]
        samples, held = load(train_scenes), load(held)
    rows = []
    for seed in range(a.seeds):
        for way, (plain, amp) in ways.items():
            t = time.process_time()
            net = train(plain, amp, seed, samples, a.steps)
            on = {name: eval_lss(net, s) for name, s in (('seen', samples), ('held_out', held))}
            for name in on if not plain else ():
                half = eval_lss(fast_lss(net, amp='bf16'), dict(seen=samples, held_out=held)[name])
                on[name].update(iou_folded_bf16=half['iou'])
            rows.append(dict(way=way, seed=seed, cpu_s=round(time.process_time()-t, 1), **{f'{k}_{what}': v[what] for k, v in on.items() for what in ('iou', 'depth_mae', 'iou_folded_bf16') if what in v}))
            print(rows[-1], flush=True)
        save(rows, ways, a)

def save(rows, ways, a):
    table = {way: {k: dict(mean=statistics.mean(v), spread=statistics.stdev(v) if len(v) > 1 else 0.) for k in rows[-1]
                   for v in [[r[k] for r in rows if r['way'] == way and k in r]] if k not in ('way', 'seed') and v} for way in ways}
    part = a.out.with_suffix('.part'); part.write_text(json.dumps(dict(machine=machine(), seeds=len({r["seed"] for r in rows}), steps=a.steps, table=table, runs=rows), indent=1)+'\n'); os.replace(part, a.out)
    for way, t in table.items(): print(f"{way:28s}", *(f"{k} {v['mean']:.3f} ± {v['spread']:.3f}" for k, v in t.items()), flush=True)

if __name__ == '__main__': main()
