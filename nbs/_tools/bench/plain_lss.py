"""The original way of Lift-Splat-Shoot, restated from its published description: what part_step.py compares with

Plain modules, the trunk with its memory-saving swish, the volume of depth times features made and pooled with a sort and a
cumulative sum, float32 with channels first, Adam as it comes, gradients clipped to a norm of 5.
"""
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet
from torch import nn

def conv(c_in, c_out, k=3, stride=1): return [nn.Conv2d(c_in, c_out, k, stride, k//2, bias=False), nn.BatchNorm2d(c_out)]
def double(c_in, c_out): return nn.Sequential(*conv(c_in, c_out), nn.ReLU(inplace=True), *conv(c_out, c_out), nn.ReLU(inplace=True))
def enlarge(x, scale): return F.interpolate(x, scale_factor=scale, mode='bilinear', align_corners=True)

class Basic(nn.Module):
    "Residual block of ResNet-18"
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.a, self.b = nn.Sequential(*conv(c_in, c_out, stride=stride), nn.ReLU(inplace=True)), nn.Sequential(*conv(c_out, c_out))
        self.skip = nn.Sequential(*conv(c_in, c_out, 1, stride)) if stride > 1 or c_in != c_out else nn.Identity()
    def forward(self, x): return F.relu(self.b(self.a(x))+self.skip(x))

class Published(nn.Module):
    "Images and calibration to logits"
    def __init__(self, cfg):
        super().__init__()
        self.cfg, grid = cfg, cfg.grid
        self.trunk = EfficientNet.from_name('efficientnet-b0')
        self.up1, self.depthnet = double(320+112, cfg.up_channels), nn.Conv2d(cfg.up_channels, grid.n_depths+cfg.cam_channels, 1)
        a, b, c = cfg.bev_widths
        self.stem = nn.Sequential(*conv(cfg.cam_channels*grid.nx[2], a, 7, 2), nn.ReLU(inplace=True))
        self.layers = nn.ModuleList([nn.Sequential(Basic(i, o, s), Basic(o, o)) for i, o, s in ((a, a, 1), (a, b, 2), (b, c, 2))])
        self.up2, self.out, self.head = double(a+c, cfg.bev_up), nn.Sequential(*conv(cfg.bev_up, cfg.bev_channels), nn.ReLU(inplace=True)), nn.Conv2d(cfg.bev_channels, 1, 1)
        (H, W), (h, w) = cfg.img_size, cfg.feat_size
        u, v, d = torch.linspace(0, W-1, w), torch.linspace(0, H-1, h), torch.arange(*grid.dbound)
        self.register_buffer('frustum', torch.stack([u[None, None].expand(len(d), h, w), v[None, :, None].expand(len(d), h, w), d[:, None, None].expand(len(d), h, w)], -1))
        for name in ('lo', 'dx', 'nx'): self.register_buffer(name, torch.tensor(getattr(grid, name)))
        self.register_buffer('mean', torch.tensor([.485, .456, .406])[:, None, None]); self.register_buffer('std', torch.tensor([.229, .224, .225])[:, None, None])

    def features(self, x):
        "The trunk at 1/16 and at 1/32: what it holds before the map shrinks, and at its end"
        net, before = self.trunk, None
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            y = block(x, drop_connect_rate=net._global_params.drop_connect_rate*i/len(net._blocks))
            if y.shape[2] < x.shape[2]: before = x
            x = y
        return before, x

    def geometry(self, intrins, cam2ego, img_aug):
        "Points of the volume in the ego frame: undo the augmentation, the camera, its pose"
        rots, trans, post_rots, post_trans = cam2ego[..., :3, :3], cam2ego[..., :3, 3], img_aug[..., :3, :3], img_aug[..., :3, 3]
        q = self.frustum-post_trans[:, :, None, None, None]
        q = torch.inverse(post_rots)[:, :, None, None, None].matmul(q[..., None])
        r = torch.cat([q[..., :2, :]*q[..., 2:, :], q[..., 2:, :]], -2)
        return rots.matmul(torch.inverse(intrins))[:, :, None, None, None].matmul(r)[..., 0]+trans[:, :, None, None, None]

    def pool(self, geom, volume):
        "Sort the points by cell, running sum, differences at the ends of the runs"
        b, (X, Y, Z) = len(geom), self.nx.tolist()
        volume, cell = volume.flatten(0, -2), ((geom-self.lo)/self.dx).floor().long().flatten(0, -2)
        batch = torch.arange(b, device=cell.device).repeat_interleave(len(cell)//b)
        kept = ((cell >= 0) & (cell < self.nx)).all(1)
        volume, cell, batch = volume[kept], cell[kept], batch[kept]
        rank = cell[:, 0]*(Y*Z*b)+cell[:, 1]*(Z*b)+cell[:, 2]*b+batch
        order = rank.argsort()
        volume, cell, batch, rank = volume[order], cell[order], batch[order], rank[order]
        sums, last = RunSums.apply(volume, rank)
        cell, batch = cell[last], batch[last]
        bev = volume.new_zeros(b, volume.shape[1], Z, X, Y)
        bev[batch, :, cell[:, 2], cell[:, 0], cell[:, 1]] = sums
        return torch.cat(bev.unbind(2), 1)

    def forward(self, imgs, intrins, cam2ego, img_aug, bev_aug=None):
        (b, n), D = imgs.shape[:2], self.cfg.grid.n_depths
        fine, coarse = self.features(((imgs-self.mean)/self.std).flatten(0, 1))
        x = self.depthnet(self.up1(torch.cat([fine, enlarge(coarse, 2)], 1)))
        depth = x[:, :D].unflatten(0, (b, n))
        volume = x[:, :D].softmax(1)[:, None]*x[:, D:, None]                                                  # (b n) c d h w
        volume = volume.unflatten(0, (b, n)).permute(0, 1, 3, 4, 5, 2)                                        # b n d h w c
        x1 = self.layers[0](self.stem(self.pool(self.geometry(intrins, cam2ego, img_aug), volume)))
        x = self.up2(torch.cat([x1, enlarge(self.layers[2](self.layers[1](x1)), 4)], 1))
        return dict(logits=self.head(self.out(enlarge(x, 2))), depth_logits=depth)

class RunSums(torch.autograd.Function):
    "Sums of runs of equal rank by one cumulative sum; the gradient of a run goes to each of its rows"
    @staticmethod
    def forward(ctx, x, rank):
        last = torch.ones(len(rank), dtype=torch.bool, device=rank.device); last[:-1] = rank[1:] != rank[:-1]
        ctx.save_for_backward(last); ctx.mark_non_differentiable(last)
        x = x.cumsum(0)[last]
        return torch.cat([x[:1], x[1:]-x[:-1]]), last
    @staticmethod
    def backward(ctx, grad, _):
        last, = ctx.saved_tensors
        run = last.cumsum(0); run[last] -= 1
        return grad[run], None

def plain_of(ours):
    "The published network with the weights of one of ours, on its device"
    m, t, e = Published(ours.cfg), ours.cam_encode, ours.bev_encode
    for a, b in ((m.trunk._conv_stem, t.trunk.stem), (m.trunk._bn0, t.trunk.bn), (m.trunk._blocks, t.trunk.blocks), (m.up1, t.up), (m.depthnet, t.head),
                 (m.stem, e.stem), *zip(m.layers, (e.stage1, e.stage2, e.stage3)), (m.up2, e.up), (m.out, e.out), (m.head, ours.head)):
        a.load_state_dict(dict(zip(a.state_dict(), b.state_dict().values(), strict=True)))
    return m.to(ours.frustum.device).train(ours.training)
