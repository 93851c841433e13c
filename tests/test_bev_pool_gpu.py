"""The pooling kernels for a GPU

Triton decides when it is imported whether it interprets or compiles, so what needs its interpreter runs in a process of its own and the rest
of the suite never sees it. Without a GPU: the kernels are compared with float64 in the interpreter (gpu_kernels.py) and compiled, not run,
for GPUs of several generations. With one, the tests marked `cuda` run the same comparisons there, and the op itself.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed (CUDA builds of PyTorch bring it; pip install triton)')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def run(*cmd, tmp, interpret=False, rc=0):
    "Run Python in a process of its own; returns its output"
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET' and not k.startswith('PYTEST_')}
    env |= dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1', TRITON_CACHE_DIR=str(tmp/'triton'))
    if interpret: env |= dict(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    r = subprocess.run([sys.executable, *map(str, cmd)], capture_output=True, text=True, env=env, cwd=root)
    assert r.returncode == rc, (r.stdout+r.stderr)[-5000:]
    return r.stdout+r.stderr

def pytest_here(name, **kw): return run('-m', 'pytest', '-p', 'no:cacheprovider', '-p', 'no:xdist', root/'tests'/name, **kw)


@needs_triton
def test_kernels_in_the_interpreter(tmp_path): assert 'failed' not in pytest_here('gpu_kernels.py', tmp=tmp_path, interpret=True)


COMPILE = r'''
import re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bev_reid import bev_pool_gpu as m
def compile(kernel, blocks, arch, types, aligned):
    names, warps = kernel.arg_names, blocks.pop('num_warps')
    src = ASTSource(fn=kernel, signature={n: types.get(n, 'constexpr') for n in names}, constexprs={(names.index(k),): v for k, v in blocks.items()},
                    attrs={(names.index(n),): [['tt.divisibility', 16]] for n in aligned})
    return triton.compile(src, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=warps))
every = ('*fp32', 64), ('*fp16', 130), ('*bf16', 80)
for arch, cases in {90: every, 75: every[1:2], 80: every[2:], 100: every[:1]}.items():
    for t, c in cases:
        ints = dict(depth_idx='*i32', feat_idx='*i32', indptr='*i32', interval_cells='*i32', cells='*i32', n='i32', row='i32', n_pixels='i32', hw='i32', d='i32')
        floats = dict(depth=t, feats=t, grad='*fp32', out='*fp32', grad_depth=t, grad_feats=t)
        aligned = ['depth', 'feats', 'row'] if c != 130 else []
        for kernel, blocks in ((m._pool_kernel, m._forward_blocks(c, 1, 1)), (m._pool_kernel, m._forward_blocks(c, 99, 1)), (m._pool_backward_kernel, m._backward_blocks(c))):
            k = compile(kernel, dict(blocks, C=c), arch, {n: v for n, v in (ints | floats).items() if n in kernel.arg_names}, aligned)
            ptx = k.asm['ptx']
            assert not re.search(r'\b(atom|red)\.|\.f64', ptx), 'atomics or float64 in the kernel'
            wide = re.search(r'ld\.global\.v4|cp\.async\.c[ag]\.shared\.global [^;]*, 0x10', ptx)
            assert not aligned or wide, 'aligned rows are not read in 16 bytes'
            assert len(k.asm['cubin']) > 1000
            print(arch, t, c, kernel.fn.__name__)
'''

@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    "Triton brings its assembler, so a machine without a GPU can build for one: Turing, Ampere, Hopper, Blackwell"
    (tmp_path/'compile.py').write_text(COMPILE)
    assert run(tmp_path/'compile.py', tmp=tmp_path).count('kernel') == 18


def test_the_package_does_without_triton(tmp_path):
    out = run('-c', '''
import sys; sys.modules['triton'] = None
import torch
from bev_reid import bev_pool_gpu as m
from bev_reid.bev_pool import bev_pool, plan_from_cells
assert m.triton is m._NoTriton and not m.triton_takes(torch.zeros(1))
assert bev_pool(torch.rand(1, 1, 2, 2, 2), torch.rand(1, 1, 3, 2, 2), plan_from_cells(torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64), (2, 2, 1))).shape == (1, 3, 2, 2)
print('fine')''', tmp=tmp_path)
    assert 'fine' in out

def test_pooling_on_a_cpu_imports_no_gpu_kernels(tmp_path):
    run('-c', '''
import sys, torch
from bev_reid.bev_pool import bev_pool, plan_from_cells
bev_pool(torch.rand(1, 1, 2, 2, 2), torch.rand(1, 1, 3, 2, 2), plan_from_cells(torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64), (2, 2, 1)))
assert 'bev_reid.bev_pool_gpu' not in sys.modules''', tmp=tmp_path) # PyTorch itself imports Triton with its first custom op


def test_tiles_depend_on_sizes_alone_and_fit():
    from bev_reid.bev_pool_gpu import _backward_blocks, _forward_blocks
    for c in (1, 5, 32, 64, 80, 96, 128, 130, 512, 2000):
        for kept, cells in ((0, 0), (1, 1), (41_079, 40_000), (202_768, 16_384)):
            f, b = _forward_blocks(c, kept, cells), _backward_blocks(c)
            assert f == _forward_blocks(c, 4*kept, 4*cells)                              # a batch adds up in the order of its samples
            assert all(v & (v-1) == 0 and v > 0 for blocks in (f, b) for n, v in blocks.items() if n != 'STAGES') # Triton wants powers of two
            assert f['CELLS']*f['POINTS']*f['CHANNELS']//f['num_warps'] <= 1024 and b['CHANNELS'] >= c


# ---- the benchmark ----

GPU_PY = root/'nbs'/'_tools'/'bench'/'gpu.py'

@needs_triton
def test_benchmark_ways_agree(tmp_path): assert run(GPU_PY, '--check', tmp=tmp_path, interpret=True).count('7 of 7 ways agree') == 6

@needs_triton
def test_benchmark_says_so_where_there_is_no_gpu(tmp_path):
    assert 'no GPU' in run(GPU_PY, '--out', tmp_path/'x.json', tmp=tmp_path, interpret=True, rc=2) and not (tmp_path/'x.json').exists()

@needs_triton
def test_benchmark_writes_its_table(tmp_path):
    "The whole run on a tiny size, with a clock that measures nothing"
    run('-c', f'''
import sys, types
sys.path.insert(0, {str(GPU_PY.parent)!r})
import gpu, torch
from bev_reid.geometry import BEVGrid
gpu.SIZES = {{'tiny': (BEVGrid((-8, 8, 8), (-8, 8, 8), (-10, 10, 20), (1, 9, 4)), (32, 64), (1, 2), 4, .1)}}
class Clock:
    flush, calls = [0]*100, 0
    def interleave(self, ways, rounds=1):
        for f in ways.values(): f()
        return {{n: dict(gpu_us=1.+i, gpu_us_spread=[1., 2.], call_us=2.) for i, n in enumerate(ways)}}
props = types.SimpleNamespace(name='none', multi_processor_count=1, total_memory=1, major=9, minor=0)
gpu.Clock, gpu.GPU, gpu.peak_bytes, gpu.copy_bandwidth = Clock, True, lambda f: 0, lambda clock: 1e9
gpu.Published.__init__ = lambda self: vars(self).update(built=None, language='test')
torch.cuda.get_device_properties = lambda i: props
gpu.check = lambda: True
sys.argv = ['gpu.py', '--out', {str(tmp_path/'out.json')!r}, '--sweep']
gpu.main()
''', tmp=tmp_path, interpret=True)
    out = json.loads((tmp_path/'out.json').read_text())
    assert len(out['sweep']) == 2*2 and all(s['best'] and s['chosen_us'] for s in out['sweep'])
    assert len(out['rows']) == 2*3*2 and out['device']['name'] == 'none' and out['copy_gb_per_s'] == 1
    for r in out['rows']:
        assert len(r['ways']) == 7 and next(iter(r['ways'])) == 'ours' and r['ways']['ours']['times_ours'] == 1 and r['least_mb'] > 0
        assert all(t['error'] < 1e-2 for t in r['ways'].values())


@pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler')
@needs_triton
def test_restated_cuda_kernels_on_the_cpu(tmp_path):
    "The benchmark's CUDA C, compiled as C++ and run thread after thread"
    run('-c', f'''
import sys, ctypes, subprocess, torch
sys.path.insert(0, {str(GPU_PY.parent)!r})
import gpu
head = 'struct Dim {{ int x; }}; static Dim blockIdx, threadIdx, blockDim;\\n#define __global__\\n'
tail = 'extern "C" void thread(int b, int t, int n) {{ blockIdx.x = b; threadIdx.x = t; blockDim.x = n; }}'
src = {str(tmp_path/'k.cpp')!r}; so = {str(tmp_path/'k.so')!r}
open(src, 'w').write(head+gpu.CUDA+tail)
subprocess.run(['c++', '-shared', '-fPIC', '-O1', src, '-o', so], check=True)
lib = ctypes.CDLL(so)
def kernel(name):
    def launch(grid, block, args):
        c = [ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else ctypes.c_int(a) for a in args]
        for b in range(grid[0]):
            for t in range(block[0]): lib.thread(b, t, block[0]); getattr(lib, name)(*c)
    return launch
case = gpu.Case(gpu.random_plan(), 7, torch.float32)
p = gpu.Published(); p.built = [kernel('channel_threads'), kernel('pixel_threads')]
ways = {{k: f for make in (gpu.forward_ways, gpu.both_ways) for k, f in make(case, p).items() if 'BEVPoolv2' in k}}
assert len(ways) == 3
for k, f in ways.items(): assert gpu.error(f(), gpu.truth(case)) < 1e-5, k
''', tmp=tmp_path, interpret=True)


# ---- on a GPU ----

def make(b=2, n=6, d=41, h=8, w=22, c=64, nx=(50, 50, 2), dtype=torch.float32):
    from bev_reid.bev_pool import plan_from_cells
    g = torch.Generator().manual_seed(0)
    per = nx[0]*nx[1]*nx[2]
    cells = torch.randint(-1000, per, (b, n, d, h, w), generator=g)
    cells = torch.where(cells < 0, -1, cells+per*torch.arange(b).view(-1, 1, 1, 1, 1))
    return torch.randn(b, n, d, h, w, generator=g).softmax(2).to(dtype), torch.randn(b, n, c, h, w, generator=g).to(dtype), plan_from_cells(cells, nx)

def pooled(depth, img_feats, plan, where, weight):
    from bev_reid.bev_pool import bev_pool
    d, x = (t.detach().to(where).requires_grad_() for t in (depth, img_feats))
    bev = bev_pool(d, x, plan.to(where))
    (bev*weight.to(where)).sum().backward()
    return bev.detach().cpu(), d.grad.cpu(), x.grad.cpu()

@pytest.mark.cuda
@needs_gpu
@needs_triton
def test_kernels_on_the_gpu(tmp_path): assert 'failed' not in pytest_here('gpu_kernels.py', tmp=tmp_path)

@pytest.mark.cuda
@needs_gpu
@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('c', [64, 80])
def test_op_equals_the_cpus(c, dtype):
    from bev_reid.bev_pool_gpu import triton_takes
    depth, img_feats, plan = make(c=c, dtype=dtype)
    assert triton_takes(depth.cuda(), img_feats.cuda()) and not triton_takes(depth.cuda().double(), img_feats.cuda())
    weight = torch.randn(2, 2*c, 50, 50)
    got, want = pooled(depth, img_feats, plan, 'cuda', weight), pooled(depth, img_feats, plan, 'cpu', weight)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for g, w, tol in zip(got, want, (1e-5, *2*[max(1e-5, 2*torch.finfo(dtype).eps)])): assert (g-w).norm() <= tol*w.norm()
    again = pooled(depth, img_feats, plan, 'cuda', weight)
    assert all(torch.equal(a, b) for a, b in zip(got, again))

@pytest.mark.cuda
@needs_gpu
def test_float64_falls_back_on_the_gpu():
    depth, img_feats, plan = make(dtype=torch.float64)
    weight = torch.randn(2, 128, 50, 50, dtype=torch.float64)
    for g, w in zip(pooled(depth, img_feats, plan, 'cuda', weight), pooled(depth, img_feats, plan, 'cpu', weight)): assert g.dtype == torch.float64 and torch.allclose(g, w)

@pytest.mark.cuda
@needs_gpu
@needs_triton
@pytest.mark.parametrize('channels_last', [False, True])
def test_opcheck_on_the_gpu(channels_last):
    from bev_reid import bev_pool as m
    depth, img_feats, plan = make(n=2, d=3, h=2, w=4, c=5, nx=(3, 4, 2))
    if channels_last: img_feats = img_feats.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 2))
    depth, img_feats, plan = depth.cuda(), img_feats.cuda(), plan.to('cuda')
    rest = plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, plan.cells, plan.nx
    torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (depth, img_feats, *rest))
    torch.library.opcheck(torch.ops.bev_reid.bev_pool_backward.default, (torch.randn(2, 10, 3, 4, device='cuda'), depth, img_feats, plan.interval_cells, plan.cells, plan.nx))
    torch.library.opcheck(torch.ops.bev_reid.bev_pool.default, (depth.requires_grad_(), img_feats.requires_grad_(), *rest))

@pytest.mark.cuda
@needs_gpu
@needs_triton
def test_compiles_in_one_graph_on_the_gpu():
    from bev_reid.bev_pool import bev_pool
    depth, img_feats, plan = make(d=5, c=16)
    depth, img_feats, plan = depth.cuda().requires_grad_(), img_feats.cuda().requires_grad_(), plan.to('cuda')
    def plain(d, x): return bev_pool(d, x, plan).relu()
    want, got = plain(depth, img_feats), torch.compile(plain, fullgraph=True)(depth, img_feats)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (depth, img_feats)) for y in (got, want))): torch.testing.assert_close(a, b)

@pytest.mark.cuda
@needs_gpu
@needs_triton
def test_more_elements_than_int32_can_number():
    "A map of more than 2^31 elements: the last cell's rows land where they belong"
    from bev_reid.bev_pool import BEVPoolPlan
    from bev_reid.bev_pool_gpu import pool_triton, pool_triton_backward
    if torch.cuda.mem_get_info()[0] < 30e9: pytest.skip('needs 30 GB of free GPU memory')
    nx, c = (5800, 5800, 1), 64
    n_cells = nx[0]*nx[1]
    assert n_cells*c > 2**31
    order = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    plan = BEVPoolPlan(order, order % 2, order[[0, 1]]*4, order[:1]+n_cells-1, torch.full((4,), n_cells-1, dtype=torch.int32), (1, 1, 2, 1, 2), nx).to('cuda')
    depth, feats = torch.rand(1, 1, 2, 1, 2, device='cuda'), torch.randn(1, 1, c, 1, 2, device='cuda')
    bev = pool_triton(depth, feats, plan.depth_idx, plan.feat_idx, plan.indptr, plan.interval_cells, nx)
    torch.testing.assert_close(bev[0, :, -1, -1], torch.einsum('dw,cw->c', depth[0, 0, :, 0], feats[0, 0, :, 0]))
    assert not bev[0, :, 0].any() and not bev[0, :, -1, :-1].any()
    gd, gx = pool_triton_backward(bev, depth, feats, plan.cells, nx)
    torch.testing.assert_close(gd[0, 0, 0, 0], torch.einsum('c,cw->w', bev[0, :, -1, -1], feats[0, 0, :, 0]))
    torch.testing.assert_close(gx[0, 0, :, 0], bev[0, :, -1, -1, None]*depth[0, 0].sum(0))
