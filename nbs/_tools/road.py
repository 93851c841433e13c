#!/usr/bin/env python
"""Draw the picture of the README from a finished demo: cameras, map, crops, rankings.

    python nbs/_tools/road.py demo          writes nbs/images/road.png

Keyframe and queries are drawn by a seed from the held-out split: the keyframe is the one with the most vehicles, the queries are not chosen. Crops and map have
false colours (principal components).
"""
import argparse, io, json
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from bev_reid.data import DrivingData
from bev_reid.explore import Picture, RetrievalExplorer, SceneExplorer
from bev_reid.viz import INK, RIGHT, WRONG, bare, crop_pics, id_colors, rig_layout, show_bev, show_boxes, show_img, to_rgb

OUT = Path(__file__).resolve().parents[1]/'images'/'road.png'

def cameras(fig, f, data, keep, names, *, at, w):
    "The cameras of a keyframe with the boxes of its vehicles, at (left, top) in inches"
    W, H = fig.get_size_inches()
    for r, row in enumerate(rig_layout(f.cam2ego)):
        for c, i in enumerate(row):
            h = w*(f.img_sizes[i, 0]/f.img_sizes[i, 1]).item()
            ax = fig.add_axes(((at[0]+c*(w+.04))/W, 1-(at[1]+(r+1)*(h+.04))/H, w/W, h/H))
            show_img(data.image(f.img_paths[i]), ax)
            show_boxes(ax, f.boxes[keep], f.intrins[i], f.cam2ego[i], size=tuple(f.img_sizes[i].tolist()), colors=list(id_colors(names)), lw=.8)

def tile(ax, pic, x, y, hue):
    ax.imshow(pic, extent=(x, x+.94, y, y+.94), interpolation='nearest')
    ax.add_patch(Rectangle((x, y), .94, .94, fill=False, ec=hue, lw=2.5, zorder=3))

def draw(demo, *, split, seed, gap):
    torch.manual_seed(seed)
    demo = Path(demo)
    data = DrivingData(json.loads((demo/'reid'/'config.json').read_text())['dataroot'])
    rank = RetrievalExplorer(demo/'reid', demo/'metric', split=split, min_gap=gap, top=4, seed=seed)
    scene = SceneExplorer(data, demo/'lss')
    t = rank.ds.table
    tokens, count = np.unique(t['sample_token'], return_counts=True)
    token = str(tokens[count.argmax()]); f = data.frame(token)
    grid = scene.grid
    here = [k for k, c in enumerate(f.categories) if c in scene.classes]
    on = [k for k in here if (f.boxes[k, :2].abs() < torch.tensor([grid.xbound[1], grid.ybound[1]])).all()]
    seen = [k for k in here if f.visibility[k] > 1]
    fig = Picture(figsize=(13.4, 3.15), dpi=110)
    W, H = fig.get_size_inches()
    cameras(fig, f, data, seen, [scene.names[f.instance_tokens[k]] for k in seen], at=(.05, .78), w=1.5)
    ax = fig.add_axes((5.05/W, .17/H, 2.5/W, 2.5/H))
    show_bev(scene.predict(token)['features'].float(), grid, boxes=f.boxes[on], ids=[scene.names[f.instance_tokens[k]] for k in on], ax=ax)
    ax.set(xticks=[], yticks=[], xlabel='', ylabel='')
    rows = np.flatnonzero(t['sample_token'] == token); rows = rows[np.argsort(t['range'][rows])][:9]
    ax = fig.add_axes((7.9/W, .17/H, 2.05/W, 2.5/H)); ax.set_axis_off()
    crops = crop_pics(list(torch.from_numpy(rank.ds.read('crops', rows).astype(np.float32))))
    for k, (i, pic) in enumerate(zip(rows, crops)): tile(ax, pic, k % 3, 2-k//3, id_colors([str(t['identity'][i])])[0])
    ax.set(xlim=(-.05, 3), ylim=(-.05, 3), aspect='equal')
    ax = fig.add_axes((10.25/W, .17/H, 3.1/W, 2.5/H)); ax.set_axis_off()
    for r in range(4):
        rank.shuffle(); res = rank.rank()
        at = np.r_[res['query'], res['ranked'][:4]]
        for k, (i, pic) in enumerate(zip(at, rank.ds.read('patches', at))): tile(ax, to_rgb(torch.from_numpy(pic)), k+.25*(k > 0), 3-r, INK if k == 0 else RIGHT if res['correct'][k-1] else WRONG)
    ax.set(xlim=(-.05, 5.25), ylim=(-.05, 4), aspect='equal')
    for x, text in ((.05, 'cameras and their calibration'), (5.05, 'one map of features, seen from above'), (7.9, 'a crop per vehicle, heading up'), (10.25, 'query, and the gallery by distance')):
        fig.text(x/W, 1-.3/H, text, fontsize=10, color='#333')
    for x in (4.72, 7.59, 9.98): fig.add_artist(FancyArrowPatch((x/W, .47), ((x+.26)/W, .47), arrowstyle='-|>', mutation_scale=14, color='#666', lw=1.5))
    return fig.png(110), token

def main():
    p = argparse.ArgumentParser(description='Draw the picture of the README from a finished demo')
    p.add_argument('demo', help='folder of a demo: lss, reid, metric and the world they came from')
    p.add_argument('--split', default='test'); p.add_argument('--seed', type=int, default=0); p.add_argument('--gap', type=float, default=2.); p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    raw, token = draw(a.demo, split=a.split, seed=a.seed, gap=a.gap)
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    for colours in (256, 128, 96, 64, 48):
        buf = io.BytesIO()
        Image.open(io.BytesIO(raw)).convert('RGB').quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buf, 'png', optimize=True)
        if buf.tell() <= 150_000: break
    Path(a.out).write_bytes(buf.getvalue())
    print(f'{a.out}: {buf.tell()/1e3:.0f} kB, {colours} colours, keyframe {token}')

if __name__ == '__main__': main()
