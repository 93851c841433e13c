"The toy world: two of ten scenes of twenty keyframes, six cameras and LiDAR, scaled up"
import hashlib, os, tempfile, time
from pathlib import Path

from timing import cpu_seconds, row

def timed(fn):
    cpu, wall = cpu_seconds(), time.perf_counter()
    fn()
    return dict(wall_s=time.perf_counter()-wall, cpu_s=cpu_seconds()-cpu, rounds=1)

def scale(t, k): return dict(t, wall_s=t['wall_s']*k, cpu_s=t['cpu_s']*k)
def digest(folder, index): return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in sorted((folder/'samples').rglob(f'toy-{index+1:04d}__*'))}

def rows(quick, say):
    from bev_reid.toy import ToyConfig, make_toy, write_scene
    cfg = ToyConfig(n_scenes=2, n_samples=2, img_size=(48, 80), n_azimuth=180, density=.5) if quick else ToyConfig(n_scenes=2)
    cores, k = min(2, os.cpu_count() or 1), 1 if quick else 5
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        say(f'two scenes, {cores} processes')
        ours = timed(lambda: make_toy(tmp/'world', cfg, workers=cores))
        say('one of them, here')
        one = timed(lambda: write_scene(cfg, tmp/'one', 0))
        assert digest(tmp/'one', 0) == digest(tmp/'world', 0), 'the pixels depend on the process'
    what = f"{2*k} scenes x {cfg.n_samples} keyframes x 6 cameras ({cfg.img_size[0]} x {cfg.img_size[1]}) and LiDAR"
    times = {f'make_toy, {cores} processes': scale(ours, k), 'one process, scene by scene': scale(one, 2*k)}
    return [row('toy', what+('' if quick else ', from two of the ten scenes'), times, measure='cpu_s', at_most={} if quick else {'CPU seconds of ten scenes / 2 cores': (times[f'make_toy, {cores} processes']['cpu_s']/2, 120.)},
        note='a tiny world: processes cost more than they bring' if quick else 'measured on 2 scenes (the one process: on 1) and multiplied; an absolute figure: the scenes share nothing, so two idle cores take half the CPU seconds')]
