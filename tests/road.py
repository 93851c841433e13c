"""The whole road on a tiny world, walked by the installed commands and read by several test files.

Importing PyTorch takes seconds, and the tests run dozens of commands. So one clean process imports it once and forks a child per command,
which runs the installed console script as it stands, with its own arguments, output, exit status and signals.
"""
import json, os, runpy, signal, subprocess, sys, time
from pathlib import Path

BIN = Path(sys.executable).parent
REAL = Path(os.environ.get('BEV_REID_DATA') or Path(__file__).parents[1]/'../shared/data')
# an untrained b0 on small images and a small grid: a step takes a fraction of a second
SMALL = ['lss.trunk=b0', 'lss.pretrained=false', 'lss.img_size=[64,128]', 'lss.grid.xbound=[-24,24,1]', 'lss.grid.ybound=[-24,24,1]', 'lss.grid.dbound=[2,26,2]',
         'lss.up_channels=16', 'lss.cam_channels=16', 'lss.bev_channels=16', 'lss.bev_widths=[16,16,16]', 'lss.bev_up=16', 'lss.appearance=6', 'fit.amp=no']
LSS = ['--recipe', 'toy', '--device', 'cpu', '--set', *SMALL]
CROP = ['--extent', '16', '--size', '16', '--device', 'cpu']
METRIC = ['--recipe', 'toy', '--device', 'cpu', '--set', 'p=6', 'net.widths=[8,8]', 'net.embedding_dim=16']


def env(**kw): return {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'MPLBACKEND': 'Agg', 'PATH': f"{BIN}:{os.environ['PATH']}", **kw}

def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell's background job ignores it, and its children inherit that

def _serve():
    "Import once; for every line of standard input fork a command or wait for one"
    import torch, torch.utils.tensorboard, accelerate, bev_reid.cli, bev_reid.demo   # noqa: F401
    running = set()
    for line in sys.stdin:
        job = json.loads(line)
        if 'argv' in job:
            answer = os.fork()
            if not answer:
                for n, k in ((1, 'out'), (2, 'err')): os.dup2(os.open(job[k], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), n)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.chdir(job['cwd']); os.environ.update(job['env'])
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.argv = job['argv']; del sys.modules['bev_reid.cli']
                if job['before']: exec(job['before'], {})
                try: runpy.run_path(sys.argv[0], run_name='__main__')
                except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
                except BaseException: import traceback; traceback.print_exc(); code = 1
                else: code = 0
                sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
            running.add(answer)
        else:
            end, answer = time.time()+job['timeout'], None
            while answer is None and time.time() < end:
                pid, status = os.waitpid(job['wait'], os.WNOHANG)
                if pid: answer = os.waitstatus_to_exitcode(status); running.discard(pid)
                else: time.sleep(.01)
        print(json.dumps(answer), flush=True)
    for pid in running: os.kill(pid, signal.SIGKILL)   # what a failed test left behind

class Command:
    "A running command"
    server, n = None, 0
    def __init__(self, verb, *args, cwd=None, before='', tmp, **kw):
        if Command.server is None: Command.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env(), preexec_fn=hear_ctrl_c)
        Command.n += 1
        self.name, self.out, self.err = verb, Path(tmp)/f'{os.getpid()}_{Command.n}.out', Path(tmp)/f'{os.getpid()}_{Command.n}.err'
        self.out.touch(); self.err.touch()
        self.pid = self._ask(argv=[str(BIN/f'bev_reid_{verb}'), *map(str, args)], cwd=str(cwd or tmp), env=kw, before=before, out=str(self.out), err=str(self.err))

    def _ask(self, **job):
        self.server.stdin.write(json.dumps(job)+'\n'); self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def send(self, sig): os.kill(self.pid, sig)
    def wait(self, timeout=240): return self._ask(wait=self.pid, timeout=timeout)

    def until(self, seen, timeout=120):
        "Wait until a function says so"
        end = time.time()+timeout
        while not seen():
            assert time.time() < end, f'bev_reid_{self.name}: nothing came\n{self.err.read_text()}'
            time.sleep(.01)

def verb(name, *args, code=0, tmp, **kw):
    "Run a command to its end; returns what it printed (stdout, stderr)"
    p = Command(name, *args, tmp=tmp, **kw)
    got, out, err = p.wait(), p.out.read_text(), p.err.read_text()
    assert got == code, f'bev_reid_{name} ended with {got}, not {code}\n{out}\n{err}'
    assert 'Traceback' not in err, err
    return out, err

def halves(path): return sorted(str(p.relative_to(path)) for p in Path(path).rglob('*.part'))

def walk(world, out):
    "lss, reid, metric and report.html from a toy world; returns what each command printed"
    said, kw = {}, dict(tmp=out)
    said['train_lss'] = verb('train_lss', world, out/'lss', *LSS, 'fit.log_every=1', '--steps', 4, **kw)
    said['eval_lss'] = verb('eval_lss', out/'lss', world, '--device', 'cpu', '--out', out/'lss.json', **kw)
    said['dataset'] = verb('dataset', out/'lss', world, out/'reid', *CROP, **kw)
    said['train'] = verb('train', out/'reid', out/'metric', *METRIC, 'fit.log_every=1', 'fit.checkpoint_every=3', '--steps', 6, **kw)
    said['eval'] = verb('eval', out/'metric', out/'reid', '--min-gap', .5, '--out', out/'reid.json', '--device', 'cpu', **kw)
    said['watch'] = verb('eval', out/'metric', out/'reid', '--min-gap', .5, '--watch', '--device', 'cpu', **kw)
    said['show'] = verb('show', out/'metric', out/'reid', '--min-gap', .5, '--n', 2, '--out', out/'report.html', **kw)
    return said

if __name__ == '__main__': _serve()
