#!/usr/bin/env python
"""Walk the whole road on one real scene and write down what comes out, for the tutorial on real data.

    python nbs/_tools/real_data.py                                   all of it: about 10 minutes on two CPU cores, 3 GB
    python nbs/_tools/real_data.py --lss-steps 10 --metric-steps 20  a trial of a minute or two; give it other folders with --out and --results
    python nbs/_tools/real_data.py --only-baselines                  what needs no network, half a minute

It needs the folder `lyft_scene` of real data (BEV_REID_DATA, by default ../shared/data beside the project). Interrupted and called again it goes
on where it stopped. The runs go to demo/lyft_scene, which git ignores; settings, tables, counts, commands and seconds to results/lyft_scene.json,
which the notebook reads. Expect a rank-1 of about 70 % (95 % of draws of the nine vehicles: 57 to 82 %),
below the colour histogram of the patch, and an IoU of about 50 % on the keyframes of the training.
"""
import argparse, json, os, shlex, time
from pathlib import Path

import numpy as np
import torch

from bev_reid import cli
from bev_reid.crops import best_patch, image_boxes
from bev_reid.data import DrivingData
from bev_reid.dataset import DatasetConfig, ReIDDataset
from bev_reid.evaluate import (BASELINE_METRICS, Observations, box_size_features, colour_features, evaluate_all, evaluate_ranking, format_table, junk_mask,
                               lazy_distances, position_features, thumbnail_features)
from bev_reid.fit import plain
from bev_reid.geometry import transform_boxes
from bev_reid.metric import embed, load_metric
from bev_reid.report import make_report
from bev_reid.train import baseline_features, observations

ROOT = Path(__file__).resolve().parents[2]

# What differs from the recipe `toy`, and why:
# - images of 1224 x 1024 are nearly square: an input of 160 x 256 keeps roofs and wheels of near cars, where 128 x 256 cuts off one or the other;
# - 42 keyframes are few: mirror every second image.
LSS_SET = ['lss.img_size=[160,256]', 'img_aug.flip=true']
METRIC_SET = []
HELD_OUT, MIN_GAP, MIN_MOVE = .5, 2., 5. # Share of identities; seconds; metres that the car has moved, in the last table
# What the README of the data measured with code of its own (rank-1, mAP; 410 observations of 34 identities, 385 queries)
REFERENCE = {'thumbnail of the patch': (.60, .49), 'colour histogram of the patch': (.63, .48), 'position (nobody moves)': (.70, .67), 'box size, 2 % noise (leak)': (.69, .67),
             'box size, 5 % noise (leak)': (.41, .37), 'box size, 10 % noise (leak)': (.22, .23), 'box size as annotated (leak)': (1., 1.), 'chance': (.06, .07)}

class Steps:
    "Runs verbs; keeps their command lines and seconds"
    def __init__(self, path, quick):
        self.path, self.quick, self.commands = path, quick, []
        self.seconds = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, verb, *args, **kw):
        "Call a verb as a function, and note how it is typed"
        def words(v): return [str(x) for x in v] if isinstance(v, (list, tuple)) else [str(v)]
        def show(a): return str(a).replace(str(self.quick[0]), '$BEV_REID_DATA').replace(str(self.quick[1]), 'demo/lyft_scene')
        line = [verb.__name__, *map(show, args)]
        for k, v in kw.items(): line += [f"--{k.replace('_', '-')}", *([] if v is True else map(show, words(v)))]
        line = ' '.join(w if w.startswith('$') else shlex.quote(w) for w in line)
        self.commands.append(line); print(f'\n$ {line}', flush=True)
        return self.time(verb.__name__, lambda: verb(*args, **kw))

    def time(self, name, fn):
        start = time.perf_counter()
        try: return fn()
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0)+time.perf_counter()-start, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True); write(self.path, self.seconds)

def write(path, obj):
    "JSON, written beside its place and renamed; numbers with four digits"
    def short(o):
        if isinstance(o, dict): return {k: short(v) for k, v in o.items()}
        if isinstance(o, (list, tuple)): return [short(v) for v in o]
        return round(o, 4) if isinstance(o, float) else o
    path.parent.mkdir(parents=True, exist_ok=True); part = path.with_name(path.name+'.part')
    part.write_text(json.dumps(short(plain(obj)), indent=1, allow_nan=False)+'\n'); os.replace(part, path)

def read_patches(data, *, classes='vehicle.*'):
    "Every vehicle observation, with the camera patch that shows most of it in the pixels of the image"
    keep, rows = data.match_category(classes), []
    for token in data.sample_tokens():
        f = data.frame(token)
        k = [i for i, c in enumerate(f.categories) if c in keep]
        rects, share = image_boxes(f.boxes[k], f.intrins, f.cam2ego, sizes=f.img_sizes)
        world, imgs = transform_boxes(f.boxes[k].double(), f.ego2global), [data.image(p) for p in f.img_paths]
        for j, i in enumerate(k):
            wh = rects[j, :, 2:]-rects[j, :, :2]
            cam = int(wh.prod(1).argmax())
            l, t, r, b = rects[j, cam].round().long().tolist()
            rows.append(dict(identity=f.instance_tokens[i], sample=token, time=f.timestamp*1e-6, scene=f.scene_token, cam=cam, visibility=int(f.visibility[i]),
                             xyz=world[j, :3].numpy(), wlh=f.boxes[i, 3:6].numpy(), px=float(wh[cam].min()), share=float(share[j, cam]),
                             patch=imgs[cam][:, t:b, l:r].numpy().copy() if min(r-l, b-t) > 1 else None))
    return rows

def protocol(data):
    "The baselines over all identities of the scene: largest patch at least 30 px on its shorter side and 60 % in the image, visibility 2, gap 2 s"
    every = read_patches(data)
    rows = [r for r in every if r['px'] >= 30 and r['share'] >= .6 and r['visibility'] >= 2]
    col = {k: np.array([r[k] for r in rows]) for k in ('identity', 'sample', 'time', 'scene', 'xyz', 'wlh')}
    obs, patches, m = Observations(col['identity'], col['sample'], col['time'], col['scene']), [r['patch'] for r in rows], BASELINE_METRICS
    methods = {'thumbnail of the patch': (thumbnail_features(patches), m['thumbnail']), 'colour histogram of the patch': (colour_features(patches), m['colour']),
               'position (nobody moves)': (position_features(col['xyz']), m['position'])}
    methods |= {f'box size, {p} % noise (leak)': (box_size_features(col['wlh'], noise=p/100), m['box_size']) for p in (2, 5, 10)}
    methods['box size as annotated (leak)'] = box_size_features(col['wlh']), m['box_size']
    table = [{k: v for k, v in r.items() if k in ('method', 'rank1', 'rank5', 'mAP', 'n_queries', 'n_ids', 'gap_median')} for r in evaluate_all(methods, obs, min_gap=MIN_GAP, scope='scene')]
    for r in table: r['rank1_reference'], r['mAP_reference'] = REFERENCE[r['method']]
    move = {i: np.ptp(np.stack([r['xyz'][:2] for r in every if r['identity'] == i]), axis=0).max() for i in {r['identity'] for r in every}}
    return dict(rows=table, n_boxes=len(every), n_ids=len(move), n_obs=len(rows), n_ids_patch=len(set(col['identity'])), n_standing=int(sum(v < .5 for v in move.values())))

def counts(dataset, split, min_visibility=2):
    "Observations, identities and those that can be found again"
    t = ReIDDataset(dataset, split=split).table
    ok = t['visibility'] >= min_visibility
    spread = {i: max(np.ptp(t[k][t['identity'] == i]) for k in ('global_x', 'global_y')) for i in np.unique(t['identity'])}
    return dict(n_obs=len(ok), n_ids=len(spread), n_obs_visible=int(ok.sum()), n_ids_visible=len(set(t['identity'][ok])), n_ids_standing=int(sum(v < .5 for v in spread.values())),
                n_cams_per_id=float(np.mean([len(set(t['cam'][ok & (t['identity'] == i)])-{''}) for i in set(t['identity'][ok])])))

def main():
    p = argparse.ArgumentParser(description='The whole road on one real scene')
    p.add_argument('--data', default=os.environ.get('BEV_REID_DATA', str(ROOT.parent/'shared'/'data')), help='folder that holds lyft_scene')
    p.add_argument('--out', default=str(ROOT/'demo'/'lyft_scene'), help='folder of the runs')
    p.add_argument('--results', default=str(ROOT/'results'/'lyft_scene.json'), help='file for the numbers')
    p.add_argument('--lss-steps', type=int, default=0, help="0: the recipe's own")
    p.add_argument('--metric-steps', type=int, default=0, help="0: the recipe's own")
    p.add_argument('--device', default='auto')
    p.add_argument('--only-baselines', action='store_true')
    a = p.parse_args()
    root, out = Path(a.data)/'lyft_scene', Path(a.out)
    if not root.exists(): p.exit(2, f'{root} does not exist: set BEV_REID_DATA to the folder that holds lyft_scene\n')
    data = DrivingData(root); out.mkdir(parents=True, exist_ok=True)
    step = Steps(out/'seconds.json', (Path(a.data), out))
    base = step.time('baselines', lambda: protocol(data))
    print(format_table(base['rows'], columns=('method', 'rank1', 'rank5', 'mAP', 'n_queries', 'n_ids')), {k: v for k, v in base.items() if k != 'rows'}, sep='\n')
    if a.only_baselines: return
    lss, reid, metric = out/'lss', out/'reid', out/'metric'
    by = dict(split_by='identity', held_out=HELD_OUT)
    some = lambda n: dict(steps=n) if n else {}
    step(cli.bev_reid_train_lss, root, lss, recipe='toy', **some(a.lss_steps), **by, set=LSS_SET, device=a.device)
    scores = step(cli.bev_reid_eval_lss, lss, root, device=a.device)
    step(cli.bev_reid_dataset, lss, root, reid, **by, device=a.device)
    step(cli.bev_reid_train, reid, metric, recipe='toy', **some(a.metric_steps), **(dict(set=METRIC_SET) if METRIC_SET else {}), device=a.device)
    res = step(cli.bev_reid_eval, metric, reid, min_gap=MIN_GAP, device=a.device)
    sides = {s: counts(reid, s) for s in ('train', 'test')}
    lead = lead_of(sides, scores, res)
    page = step.time('page', lambda: make_report(out/'report.html', data=data, lss_run=lss, dataset=reid, metric_run=metric, results=res, lead=lead, title='One real scene, from six cameras to ranked vehicles'))
    step.commands.append('bev_reid_show demo/lyft_scene/metric demo/lyft_scene/reid --out demo/lyft_scene/report.html')
    recipe = torch.load(sorted(lss.glob('checkpoints/*.pt'))[-1], map_location='cpu', weights_only=True)['config']['recipe']
    settings = dict(img_size=recipe['lss']['img_size'], crop_bottom=recipe['img_aug']['crop_bottom'], grid=recipe['lss']['grid']['xbound'], lss_steps=recipe['fit']['max_steps'], metric_steps=res['settings']['step'],
                    trunk=recipe['lss']['trunk'], company_weight=recipe['company_weight'], held_out=HELD_OUT, split_seed=DatasetConfig().seed, min_gap=MIN_GAP, min_move=MIN_MOVE, min_visibility=res['settings']['min_visibility'])
    drop = ('cmc', 'protocol', 'scope', 'min_gap')
    write(Path(a.results), dict(commands=step.commands, settings=settings, seconds=step.seconds, data=dict(keyframes=len(data.sample_tokens()), **{k: v for k, v in base.items() if k != 'rows'}),
        baselines=base['rows'], sides=sides, lss=dict(iou=scores['iou'], depth_mae=scores['depth_mae'], n_samples=scores['n_samples'], trained_on='the same keyframes'),
        held_out=dict(rows=[{k: v for k, v in r.items() if k not in drop} for r in res['rows']], cmc={k: v[:20] for k, v in res['cmc'].items()}, n_obs=res['settings']['n_obs'], n_ids=res['settings']['n_ids'], ids_seen_in_training=res['settings']['ids_seen_in_training']),
        harder=harder(data, metric, reid),
        single_shot=[{k: v for k, v in r.items() if k not in drop} for r in res['single_shot']]))
    print(f'\n{a.results} and {page} are written')

def harder(data, metric, reid):
    """Held-out vehicles ask, and all vehicles on the map answer, those of the training too. Then the same without what was seen from the same place:
    the car stands for the first 13 keyframes, and a parked vehicle seen from a parked car looks the same seconds later."""
    ds = ReIDDataset(reid, split='all', min_visibility=2)
    obs, query = observations(ds), ds.table['split'] == 'test'; asked = np.flatnonzero(query)
    ego = np.stack([data.frame(t).ego2global[:2, 3].numpy() for t in ds.table['sample_token']])
    near = np.linalg.norm(ego[query, None]-ego, axis=-1) < MIN_MOVE
    junk = junk_mask(obs.take(query), obs, min_gap=MIN_GAP)
    methods = {'learned embedding': embed(load_metric(metric).net, ds.read('crops')).numpy(), **baseline_features(ds)}
    def table(junk):
        rows = []
        for name, m in methods.items():
            x, kind = m if isinstance(m, tuple) else (m, 'cosine')
            dist = (lambda rows: x(asked[rows])) if kind == 'given' else lazy_distances(x[query], x, metric=kind)
            r = evaluate_ranking(dist, obs.ids[query], obs.ids, junk=junk)
            rows.append(dict(method=name, **r.to_dict()))
        return rows+[dict(method='chance', **r.chance)]
    return dict(wide=table(junk), moved=table(junk | near))

def lead_of(sides, scores, res):
    "What the page says first"
    return (f"One scene of the Lyft Level 5 data: {scores['n_samples']} keyframes, six cameras. Trained on {sides['train']['n_ids']} vehicles, measured on {res['settings']['n_ids']} others of the same scene "
            f"({sides['test']['n_ids_standing']} of {sides['test']['n_ids']} held-out vehicles never move, so their position alone finds most of them again). The BEV network was trained on all keyframes: it has seen the pictures "
            "of the held-out vehicles and where they stand, never who they are. One scene and one split say that the road works on real data, and not how well it would work elsewhere.")

if __name__ == '__main__': main()
