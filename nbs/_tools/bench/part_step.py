"""Training step and inference of Lift-Splat-Shoot, ours beside the published way (plain_lss.py)

Same architecture (EfficientNet-b0, 128 x 352, 41 depths, 64 channels lifted, ResNet-18 stages, 200 x 200 cells), same weights;
that the outputs and the gradients agree is checked before anything is timed. A step is: forward with a plan of its own,
segmentation loss, backward, clipping, Adam. On a GPU: python nbs/_tools/bench/part_step.py --device cuda
"""
import json, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from torch import nn

from bev_reid.fit import fast_amp
from bev_reid.geometry import BEVGrid, rot_z
from bev_reid.lss import LiftSplat, LSSConfig, fast_lss, run_lss, seg_loss
from plain_lss import plain_of
from timing import ROOT, interleave, row

FULL = LSSConfig(bev_channels=128)    # the published decoder ends with 128 channels
SMALL = LSSConfig(bev_channels=128, img_size=(64, 96), grid=BEVGrid(xbound=(-20, 20, .5), ybound=(-20, 20, .5), dbound=(4, 30, 1)))
PLAIN, OURS, BF16 = 'published way, float32', 'ours, float32', 'ours, bfloat16'

def rig(cfg, b=1, n=6, seed=0, device='cpu'):
    "A ring of cameras as nuScenes has them, images of noise, a random map"
    gen = torch.Generator().manual_seed(seed)
    (h, w), r = cfg.img_size, cfg.img_size[1]/1600
    cam2ego, img_aug = torch.eye(4).repeat(b, n, 1, 1), torch.eye(4).repeat(b, n, 1, 1)
    cam2ego[..., :3, :3] = rot_z(torch.arange(n)*2*torch.pi/n+.05) @ torch.tensor([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])
    cam2ego[..., 2, 3] = 1.51
    img_aug[..., 0, 0] = img_aug[..., 1, 1] = r; img_aug[..., 1, 3] = -(900*r-h)*.9
    intrins = torch.tensor([[1266., 0, 800], [0, 1266, 450], [0, 0, 1]]).repeat(b, n, 1, 1)
    batch = dict(imgs=torch.rand(b, n, 3, h, w, generator=gen), intrins=intrins, cam2ego=cam2ego, img_aug=img_aug, bev_mask=(torch.rand(b, 1, *cfg.grid.nx[:2], generator=gen) < .03).float())
    return {k: v.to(device) for k, v in batch.items()}

def network(cfg, device):
    "Ours with random weights in which every layer is alive, and statistics that fit them"
    torch.manual_seed(0)
    net = LiftSplat(cfg)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: nn.init.normal_(m.weight, 1, .1); nn.init.normal_(m.bias, 0, .1); m.momentum, m.old = 1., m.momentum
    with torch.no_grad():
        run_lss(net.train(), rig(cfg, seed=1))
        out = run_lss(net.eval(), rig(cfg, seed=1))['logits']
        net.head.weight /= out.std(); net.head.bias.copy_((net.head.bias-out.mean())/out.std())
    for m in norms: m.momentum = m.old
    return net.to(device)

def loss_of(net, batch, amp):
    with torch.autocast(batch['imgs'].device.type, torch.bfloat16, enabled=amp): out = run_lss(net, batch)
    return seg_loss(out['logits'], batch['bev_mask']).mean()

def stepper(net, batch, amp=False, **kw):
    "One training step, as a function"
    opt = torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-7, **kw)
    def step():
        loss_of(net.train(), batch, amp).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.); opt.step(); opt.zero_grad()
        if batch['imgs'].is_cuda: torch.cuda.synchronize()
    return step

def infer(net, batch):
    def f():
        with torch.inference_mode(): run_lss(net, batch)
        if batch['imgs'].is_cuda: torch.cuda.synchronize()
    return f

def check(ours, plain, batch):
    "Both ways compute the same, logits and gradients (float32, no block skipped)"
    logits = []
    for net in (ours, plain):
        net.eval().zero_grad()
        logits.append(run_lss(net, batch)['logits']); seg_loss(logits[-1], batch['bev_mask']).mean().backward()
    off = (logits[0]-logits[1]).abs()/logits[1].std()                # the running sum of the published way rounds at 1e-3
    assert off.mean() < 1e-3 and off.max() < 2e-2, f'outputs differ: {off.mean():.1e}, {off.max():.1e}'
    for a, b in ((ours.cam_encode.trunk.stem, plain.trunk._conv_stem), (ours.cam_encode.head, plain.depthnet), (ours.bev_encode.out[0], plain.out[0])):
        off = (a.weight.grad-b.weight.grad).norm()/b.weight.grad.norm()   # and what rounds a ReLU over moves the gradients by some percent
        assert off < .06, f'gradients differ: {off:.1e}'
    ours.zero_grad(); plain.zero_grad()
    return logits[1].detach()

def accuracy(path=ROOT/'results'/'step_accuracy.json'):
    "What accuracy.py found, as a row: IoU lost against its spread over the seeds"
    if not path.exists(): return []
    got = json.loads(path.read_text()); table = got['table']
    old, new = table['published step, float32'], table['ours, bfloat16']
    times = {name: dict(wall_s=table[way]['cpu_s']['mean'], cpu_s=table[way]['cpu_s']['mean']) for name, way in ((BF16, 'ours, bfloat16'), (PLAIN, 'published step, float32'))}
    lost = {f'IoU lost on {what} scenes (bound: spread over seeds)': (old[k]['mean']-new[k]['mean'], max(old[k]['spread'], new[k]['spread'])) for what, k in (('seen', 'seen_iou'), ('held-out', 'held_out_iou'))}
    folded = max(abs(r[f'{k}_iou']-r[f'{k}_iou_folded_bf16']) for r in got['runs'] for k in ('seen', 'held_out') if f'{k}_iou_folded_bf16' in r)
    note = f"{got['seeds']} seeds, {got['steps']} steps; IoU {old['held_out_iou']['mean']:.3f} and {new['held_out_iou']['mean']:.3f} on held-out scenes; folding and bfloat16 at inference move it by {folded:.4f} at the most"
    return [row('step', 'a short training on a small toy world, evaluation included (nbs/_tools/bench/accuracy.py)', times, at_most=lost, measure='cpu_s', note=note)]

def rows(quick, say, *, device='cpu', threads=(1, 2)):
    cfg, native = SMALL if quick else FULL, fast_amp(device) == 'bf16'
    out, was = [], torch.get_num_threads()
    for n in threads[:1] if quick or device != 'cpu' else threads:
        torch.set_num_threads(n)
        ours, batch = network(cfg, device), rig(cfg, device=device)        # anew: the steps below train both
        plain = plain_of(ours)
        ref = check(ours, plain, batch)
        off = lambda net: f"{((run_lss(net, batch)['logits']-ref).abs().mean()/ref.std()).item():.3f}"
        at = f"{cfg.img_size[0]} x {cfg.img_size[1]}, batch 1, " + (f"{n} thread{'s'*(n > 1)}" if device == 'cpu' else torch.cuda.get_device_name())
        kw = dict(rounds=1 if quick else 2 if n > 1 else 3, slot_s=0, warm=0 if device == 'cpu' else 5)   # `interleave` itself calls each once before it measures
        say(f'{at}: inference')
        fast = {OURS+', norms folded': fast_lss(ours.eval(), amp='no'), **({BF16+', norms folded': fast_lss(ours.eval(), amp='bf16')} if native else {})}
        nets = {**dict(reversed(fast.items())), PLAIN: plain.eval()}
        note = 'mean change of the logits, as a share of their spread: '+', '.join(f'{off(net)} {name}' for name, net in fast.items())
        times = interleave({name: infer(net, batch) for name, net in nets.items()}, **kw)
        out.append(row('step', f'inference, {at}', times, at_least={PLAIN: 2. if native else 1.15}, measure='cpu_s' if n == 1 and device == 'cpu' else 'wall_s', note=note))
        say(f'{at}: training step')
        ways = {**({BF16: stepper(ours, batch, True, fused=True)} if native else {}), OURS: stepper(ours, batch, fused=True), PLAIN: stepper(plain, batch)}
        times = interleave(ways, **kw)
        for name, bound in ((BF16, 1.8), (OURS, 1.15)):
            if name in times: out.append(row('step', f'training step, {name}, {at}', {k: times[k] for k in (name, PLAIN)}, at_least={PLAIN: bound}, measure='cpu_s' if n == 1 and device == 'cpu' else 'wall_s'))
    if device == 'cuda':
        say('compiled')
        comp = network(cfg, device); comp.compile()
        fast = fast_lss(ours.eval(), compile=True)
        times = interleave({'ours, compiled': infer(fast, batch), 'ours': infer(fast_lss(ours.eval()), batch), PLAIN: infer(plain.eval(), batch)}, **kw)
        out.append(row('step', f'inference, compiled, {at}', times, at_least={PLAIN: 2.}))
        times = interleave({'ours, compiled': stepper(comp, batch, native, fused=True), 'ours': stepper(ours, batch, native, fused=True), PLAIN: stepper(plain, batch)}, **kw)
        out.append(row('step', f'training step, compiled, {at}', times, at_least={PLAIN: 1.8}))
    torch.set_num_threads(was)
    return out+accuracy() if device == 'cpu' and not quick else out

if __name__ == '__main__':
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu'); p.add_argument('--quick', action='store_true'); p.add_argument('--threads', type=int, nargs='+', default=[1, 2]); p.add_argument('--out', type=Path)
    a = p.parse_args()
    got = rows(a.quick, print, device=a.device, threads=tuple(a.threads))
    if a.out: a.out.write_text(json.dumps(got, indent=1)+'\n')
    for r in got: print(r['case'], {k: (round(t['wall_s'], 3), round(t['cpu_s'], 3)) for k, t in r['times'].items()}, {k: round(v, 2) for k, v in r['ratios'].items()}, r['note'])
