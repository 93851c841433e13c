"""Tables of nuScenes' size and schema, with no images: 850 scenes, 34,149 samples, 2.6 million rows of sample_data and of ego_pose, 1.17 million annotations

    python nbs/_tools/bench/tables.py make FOLDER --share 0.1     write the tables of a tenth of the scenes
    python nbs/_tools/bench/tables.py compare --share 0.5         ours beside the devkit, each load in a process of its own; writes results/tables.json

The numbers are nuScenes' published ones for v1.0-trainval (12 sensors: one LiDAR, six cameras, five radars); tokens and values are drawn at random.
The text is laid out as nuScenes lays it out: every value on a line of its own. All of it is 3 GB, a tenth is 0.3 GB.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
FULL = dict(scene=850, sample=34149, sample_data=2631083, ego_pose=2631083, sample_annotation=1166187, instance=64386)
CAMS = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_BACK_RIGHT', 'CAM_BACK', 'CAM_BACK_LEFT', 'CAM_FRONT_LEFT')
RADARS = ('RADAR_FRONT', 'RADAR_FRONT_LEFT', 'RADAR_FRONT_RIGHT', 'RADAR_BACK_LEFT', 'RADAR_BACK_RIGHT')
SENSORS = {c: m for m, cs in dict(lidar=('LIDAR_TOP',), camera=CAMS, radar=RADARS).items() for c in cs}
PER_SCENE = dict(lidar=391, camera=232, radar=262.4)                      # files of one channel in one scene: 20, 12 and 13 a second
VISIBILITY, CATEGORIES = ('1', '2', '3', '4'), ('vehicle.car', 'human.pedestrian.adult', 'movable_object.barrier', 'vehicle.truck', 'vehicle.bicycle')

def _split(total, n): return np.diff(np.linspace(0, total, n+1).round().astype(int))   # as even as whole numbers allow

class _Writer:
    "A table that grows row by row, as nuScenes writes it"
    def __init__(self, path): self.f, self.n = open(path, 'w'), 0
    def add(self, rows):
        if rows: self.f.write((',\n' if self.n else '[\n')+',\n'.join(rows)); self.n += len(rows)
    def close(self): self.f.write('\n]' if self.n else '[]'); self.f.close()

def _plain(rows): return [json.dumps(r, indent=0) for r in rows]
def _list(v): return '[\n'+',\n'.join(map(repr, v))+'\n]'

def make_tables(
    out, # Folder of the data root, new
    *,
    share=1., # Of the scenes
    version='v1.0-trainval',
    seed=0,
)->dict: # Rows of each table
    "Write the tables"
    rng, root = np.random.default_rng(seed), Path(out)/version
    root.mkdir(parents=True)
    def tokens(n): h = rng.bytes(16*n).hex(); return [h[i:i+32] for i in range(0, 32*n, 32)]
    n_scenes = max(1, round(FULL['scene']*share))
    small = dict(attribute=[dict(token=t, name=n, description='') for t, n in zip(tokens(2), ('vehicle.moving', 'vehicle.parked'))],
                 category=[dict(token=t, name=n, description='') for t, n in zip(tokens(5), CATEGORIES)],
                 visibility=[dict(token=v, level=f'level {v}', description='') for v in VISIBILITY],
                 sensor=[dict(token=t, channel=c, modality=m) for t, (c, m) in zip(tokens(12), SENSORS.items())],
                 log=[dict(token=t, logfile=f'n015-{i}', vehicle='n015', date_captured='2018-08-02', location='boston-seaport') for i, t in enumerate(tokens(-(-n_scenes//12)))])
    small['map'] = [dict(token=tokens(1)[0], category='semantic_prior', filename='maps/all.png', log_tokens=[l['token'] for l in small['log']])]
    files = {n: _Writer(root/f'{n}.json') for n in ('scene', 'sample', 'sample_data', 'ego_pose', 'sample_annotation', 'instance', 'calibrated_sensor')}
    for i in range(n_scenes): _scene(rng, tokens, small, files, i)
    for f in files.values(): f.close()
    (Path(out)/'maps').mkdir(); Image.new('L', (8, 8)).save(Path(out)/'maps'/'all.png')   # the devkit insists on one
    for name, rows in small.items(): (root/f'{name}.json').write_text(json.dumps(rows, indent=0))
    return {n: f.n for n, f in files.items()}|{n: len(r) for n, r in small.items()}

def _scene(rng, tokens, small, files, i):
    "All rows of one scene"
    part = {k: int(_split(v, FULL['scene'])[i]) for k, v in FULL.items()}
    scene, samples, t0 = tokens(1)[0], tokens(part['sample']), 1_533_000_000_000_000+i*60_000_000
    n, log = len(samples), small['log'][i//12]['token']
    stamps = t0+500_000*np.arange(n)
    files['scene'].add(_plain([dict(token=scene, log_token=log, nbr_samples=n, first_sample_token=samples[0], last_sample_token=samples[-1], name=f'scene-{i+1:04d}', description='Parked cars, rain')]))
    files['sample'].add(_plain([dict(token=s, timestamp=int(t), prev=samples[k-1] if k else '', next=samples[k+1] if k+1 < n else '', scene_token=scene) for k, (s, t) in enumerate(zip(samples, stamps))]))
    counts = {c: round(PER_SCENE[m]) for c, m in SENSORS.items()}
    counts['RADAR_FRONT'] += part['sample_data']-sum(counts.values())                  # so that the total is nuScenes'
    for s in small['sensor']:
        cal, camera = tokens(1)[0], s['modality'] == 'camera'
        files['calibrated_sensor'].add(_plain([dict(token=cal, sensor_token=s['token'], translation=[1.7, .0, 1.5], rotation=[.5, -.5, .5, -.5], camera_intrinsic=[[1266.4, 0., 816.3], [0., 1266.4, 491.5], [0., 0., 1.]] if camera else [])]))
        _files(rng, tokens, files, s['channel'], s['modality'], cal, samples, counts[s['channel']], stamps)
    _annotations(rng, tokens, small, files, part, samples)

def _files(rng, tokens, files, channel, modality, cal, samples, m, stamps):
    "sample_data and ego_pose of one channel of one scene"
    key = np.zeros(m, bool); at = np.linspace(0, m-1, len(samples)).round().astype(int); key[at] = True
    near = np.minimum(np.searchsorted(at, np.arange(m)), len(samples)-1)                 # a sweep belongs to the keyframe after it
    times = np.interp(np.arange(m), at, stamps).astype(int).tolist()
    toks, (h, w) = tokens(m), (900, 1600) if modality == 'camera' else (0, 0)
    ext = dict(lidar='pcd.bin', camera='jpg', radar='pcd')[modality]
    quat = rng.normal(size=(m, 4)); quat = (quat/np.linalg.norm(quat, axis=1, keepdims=True)).tolist(); xyz = rng.uniform(300, 2000, (m, 3)).tolist()
    files['sample_data'].add([f'{{\n"token":"{t}",\n"sample_token":"{samples[near[k]]}",\n"ego_pose_token":"{t}",\n"calibrated_sensor_token":"{cal}",\n"timestamp":{times[k]},\n"fileformat":"{ext[:3]}",\n'
        f'"is_key_frame":{"true" if key[k] else "false"},\n"height":{h},\n"width":{w},\n"filename":"{"samples" if key[k] else "sweeps"}/{channel}/n015-2018-08-02-17-16-37+0800__{channel}__{times[k]}.{ext}",\n'
        f'"prev":"{toks[k-1] if k else ""}",\n"next":"{toks[k+1] if k+1 < m else ""}"\n}}' for k, t in enumerate(toks)])
    files['ego_pose'].add([f'{{\n"token":"{t}",\n"timestamp":{times[k]},\n"rotation":{_list(quat[k])},\n"translation":{_list(xyz[k])}\n}}' for k, t in enumerate(toks)])

def _annotations(rng, tokens, small, files, part, samples):
    "Instances and annotations of one scene"
    rows = [[] for _ in samples]
    for tok, k in zip(tokens(part['instance']), _split(part['sample_annotation'], part['instance'])):
        k = min(int(k), len(samples)); start = int(rng.integers(len(samples)-k+1)); anns = tokens(k)
        files['instance'].add(_plain([dict(token=tok, category_token=small['category'][rng.integers(5)]['token'], nbr_annotations=k, first_annotation_token=anns[0], last_annotation_token=anns[-1])]))
        size, xyz, rot, attribute = rng.uniform(.5, 5, 3).tolist(), rng.uniform(300, 2000, (k, 3)).tolist(), rng.normal(size=(k, 4)), small['attribute'][rng.integers(2)]['token']
        rot = (rot/np.linalg.norm(rot, axis=1, keepdims=True)).tolist()
        for j, a in enumerate(anns):
            rows[start+j].append(f'{{\n"token":"{a}",\n"sample_token":"{samples[start+j]}",\n"instance_token":"{tok}",\n"visibility_token":"{VISIBILITY[rng.integers(4)]}",\n"attribute_tokens":[\n"{attribute}"\n],\n"translation":{_list(xyz[j])},\n'
                f'"size":{_list(size)},\n"rotation":{_list(rot[j])},\n"prev":"{anns[j-1] if j else ""}",\n"next":"{anns[j+1] if j+1 < k else ""}",\n"num_lidar_pts":{int(rng.integers(200))},\n"num_radar_pts":{int(rng.integers(5))}\n}}')
    for r in rows: files['sample_annotation'].add(r)

OURS = "import sys, time, json, resource\nfrom bev_reid.data import DrivingData\nw, c = time.perf_counter(), time.process_time()\ndata = DrivingData(sys.argv[1])\n"
DEVKIT = "import sys, time, json, resource\nfrom nuscenes import NuScenes\nfrom bev_reid.data import _devkit\nw, c = time.perf_counter(), time.process_time()\nnusc = NuScenes('v1.0-trainval', sys.argv[1], verbose=False)\n"
LOADED = "w, c = time.perf_counter()-w, time.process_time()-c\n"
TELL = "print(json.dumps(dict(wall_s=w, cpu_s=c, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)))"
IDLE = "import sys, json, resource\n{}\nprint(json.dumps(dict(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)))"

def run(code, root, *, threads=None, limit_mb=None):
    "What a process of its own prints last; `limit_mb` is a limit of its address space"
    import resource
    env = {**os.environ, **({} if threads is None else dict(OMP_NUM_THREADS=str(threads)))}
    before = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_mb << 20,)*2)) if limit_mb else None
    r = subprocess.run([sys.executable, '-c', code, str(root)], capture_output=True, text=True, cwd=ROOT, env=env, preexec_fn=before)
    if r.returncode: raise RuntimeError(r.stderr[-2000:])
    return json.loads(r.stdout.strip().split('\n')[-1])

def compare(root, *, rounds=3, threads=1, limit_mb=None, say=print):
    "Load with ours and with the devkit, turn and turn about: medians of seconds (imports excluded), and peak memory"
    ways, out = dict(ours=OURS+LOADED+TELL, devkit=DEVKIT+LOADED+TELL), {}
    got = {n: [] for n in ways}
    for _ in range(rounds):
        for n, code in ways.items(): got[n].append(run(code, root, threads=threads, limit_mb=limit_mb)); say(f'{n}: {got[n][-1]}')
    return {n: {k: statistics.median(x[k] for x in g) for k in g[0]}|dict(rounds=rounds) for n, g in got.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('make', 'compare')); p.add_argument('folder', nargs='?', type=Path); p.add_argument('--share', type=float, nargs='+', default=[.1])
    p.add_argument('--rounds', type=int, default=1); p.add_argument('--ours-only', action='store_true', help='for sizes at which the devkit needs more memory than there is')
    a = p.parse_args()
    if a.what == 'make': print(make_tables(a.folder, share=a.share[0])); return
    from timing import machine
    path = ROOT/'results'/'tables.json'
    rows = json.loads(path.read_text())['rows'] if path.exists() else []
    for share in a.share:
        with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
            n = make_tables(Path(tmp)/'set', share=share)
            size = sum(f.stat().st_size for f in (Path(tmp)/'set').rglob('*.json'))/1e6
            print(share, n, f'{size:.0f} MB', flush=True)
            if a.ours_only: got = dict(ours=dict(run(OURS+LOADED+TELL, Path(tmp)/'set', threads=1), rounds=1)); print(got)
            else: got = compare(Path(tmp)/'set', rounds=a.rounds)
        rows = [r for r in rows if r['share'] != share]+[dict(share=share, json_mb=size, rows=n, **got)]
        path.write_text(json.dumps(dict(machine=machine(), rows=sorted(rows, key=lambda r: r['share'])), indent=1)+'\n')

if __name__ == '__main__': main()
