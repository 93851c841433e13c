"""`make bench`: the pooling op beside its alternatives, at the original LSS size, interleaved in one run

Cost: about a minute on two cores. Writes results/bench.json: medians of wall and CPU seconds, and ratios to the published way.
"""
import json, platform, statistics, time
from pathlib import Path

import torch

from bev_reid.bev_pool import bev_pool, make_plan
from bev_reid.geometry import BEVGrid, frustum_geometry, make_frustum, rot_z

ROOT = Path(__file__).resolve().parents[2]

def rig(n=6, size=(128, 352)):
    "A ring of cameras 1.5 m above the ground"
    yaw = torch.arange(n)*2*torch.pi/n
    cam2ego = torch.eye(4).repeat(1, n, 1, 1)
    cam2ego[0, :, :3, :3] = rot_z(yaw) @ torch.tensor([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])
    cam2ego[..., 2, 3] = 1.5
    intrins = torch.tensor([[279., 0, size[1]/2], [0, 279, size[0]/2], [0, 0, 1]]).repeat(1, n, 1, 1)
    return intrins, cam2ego

def main(rounds=15):
    torch.manual_seed(0)
    grid, feat = BEVGrid(), (8, 22)
    geom = frustum_geometry(make_frustum(grid, (128, 352), feat), *rig())
    plan = make_plan(geom, grid)
    depth = torch.rand(1, 6, grid.n_depths, *feat).softmax(2)
    feats = torch.randn(1, 6, 64, *feat)
    ways = {'published: lift and cumulative sum': 'cumsum', 'embedding_bag': 'torch', 'ours': 'cpp'}
    ref = bev_pool(depth, feats, plan, backend='torch')
    out = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for job in ('forward', 'forward and backward'):
            times = {w: [] for w in ways}
            for _ in range(rounds):
                for name, backend in ways.items():
                    d, f = (t.clone().requires_grad_(job != 'forward') for t in (depth, feats))
                    wall, cpu = time.perf_counter(), time.process_time()
                    bev = bev_pool(d, f, plan, backend=backend)
                    if job != 'forward': bev.sum().backward()
                    times[name].append((time.perf_counter()-wall, time.process_time()-cpu))
                    assert torch.allclose(bev, ref, rtol=1e-2, atol=1e-3), name
            wall, cpu = ({w: statistics.median(t[i] for t in ts) for w, ts in times.items()} for i in (0, 1))
            out[f'{job}, {threads} thread{"s"*(threads > 1)}'] = {w: dict(wall_ms=1e3*wall[w], cpu_ms=1e3*cpu[w], times_faster=wall['published: lift and cumulative sum']/wall[w]) for w in ways}
    machine = dict(processor=platform.processor() or platform.machine(), torch=torch.__version__, python=platform.python_version())
    path = ROOT/'results'/'bench.json'; path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(size='LSS: 6 cameras, 41 depths, 8 x 22, 64 channels, 200 x 200 cells', machine=machine, results=out), indent=1)+'\n')
    for job, rows in out.items():
        print(job); [print(f"  {w:36s}{r['wall_ms']:9.3f} ms   {r['times_faster']:7.1f} x") for w, r in rows.items()]

if __name__ == '__main__': main()
