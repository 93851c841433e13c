"Random linear enhancement: ours against the published steps, restated image by image"
import random

import numpy as np
import torch

from timing import interleave, row

def plain_mrle(img):
    "One image, in place: a random mix of the bands"
    b = np.random.beta(.3, .3, 3); w = b/b.sum()
    g = float(w[0])*img[0]+float(w[1])*img[1]+float(w[2])*img[2]
    img[0], img[1], img[2] = g, g, g
    return img

def plain_rrle(img, min_gain=.1):
    "One image, in place: rectangles with a full-size mask of gains, whose minimum is looked up each time"
    c, H, W = img.shape
    mask = torch.ones_like(img)
    for _ in range(100):
        area, aspect = random.uniform(.02, .4)*H*W, random.uniform(.3, 1/.3)
        h, w = int(round((area*aspect)**.5)), int(round((area/aspect)**.5))
        if not (w < W and h < H): continue
        t, l = random.randint(0, H-h), random.randint(0, W-w)
        for k in range(c):
            a = np.random.beta(.4, .4)/float(img[k, t:t+h, l:l+w].max())
            img[k, t:t+h, l:l+w] *= a; mask[k, t:t+h, l:l+w] *= a
        if mask.min() < min_gain: break
    return img

def check(x):
    "The same statistics: what share changes, how dark it becomes, how many rectangles"
    from bev_reid.enhance import ModerateRandomLinearEnhancement, RadicalRandomLinearEnhancement
    g = torch.Generator().manual_seed(0); random.seed(0); np.random.seed(0)
    for ours, plain in ((RadicalRandomLinearEnhancement(p=1), plain_rrle), (ModerateRandomLinearEnhancement(p=1), plain_mrle)):
        a, b = ours(x, generator=g), torch.stack([plain(i.clone()) for i in x])
        for of in (lambda y: (y != x).float().mean(), lambda y: y.mean(), lambda y: (y-x).abs().mean()): assert abs(of(a)-of(b)) < .12*abs(of(b))+.01, (plain.__name__, float(of(a)), float(of(b)))

def rows(quick, say):
    from bev_reid.enhance import ModerateRandomLinearEnhancement, RadicalRandomLinearEnhancement
    check(torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    out, mrle, rrle = [], ModerateRandomLinearEnhancement(p=1), RadicalRandomLinearEnhancement(p=1)
    for (h, w), n in (((384, 192), 16), ((64, 64), 64)):
        x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(0))
        for name, ours, plain, bound in (('RRLE', rrle, plain_rrle, 1.2 if h > 64 else 2.), ('MRLE', mrle, plain_mrle, 1.)):
            say(f'{name} at {h} x {w}')
            torch.manual_seed(0); random.seed(0); np.random.seed(0)
            each, batch = lambda: torch.stack([plain(i.clone()) for i in x]), lambda: ours(x)
            t = interleave({'bev_reid': batch, 'published steps, restated': each}, rounds=3 if quick else 11, most_s=.5 if quick else 4., slot_s=.02 if quick else .2)
            out.append(row('rle', f'{name} on {n} images of 3 x {h} x {w}, one thread', t, measure='cpu_s', at_least={'published steps, restated': bound},
                           note='a new batch from a batch; the draws differ from call to call, and a slot sees many. The large batch is 14 MB, and writing it is half of our time'))
    return out
