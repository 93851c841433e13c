"""What every part of the benchmark shares: interleaved timing, rows with targets, peak memory in a process of its own"""
import gc, os, platform, re, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

def _busy():
    "CPU seconds that the whole machine has worked, or None where the system does not tell"
    try: user, nice, system = (int(v) for v in Path('/proc/stat').read_text().split(maxsplit=4)[1:4])
    except (OSError, ValueError): return None
    return (user+nice+system)/os.sysconf('SC_CLK_TCK')

def cpu_seconds():
    "CPU seconds of this process and of the children it has waited for"
    t = os.times()
    return t.user+t.system+t.children_user+t.children_system

def interleave(
    ways, # name -> function without arguments; the order in a round is the order of the dict
    *,
    rounds=7, # Every way gets one slot per round
    most_s=2., # A way whose calls together would take longer than this gets fewer rounds, three at the least
    slot_s=.05, # A slot repeats its call until this much time has passed (one call at the least)
    warm=1, # Calls before the first slot
    setup=None, # name -> called before each slot, outside the time
)->dict: # name -> wall_s and cpu_s (medians over slots, seconds per call), rounds, calls, others: share of the cores that other processes took
    "Time several ways of the same work side by side: what disturbs one round disturbs all of its ways"
    repeats, turns = {}, {}
    for name, f in ways.items():
        for _ in range(warm): f()
        t = time.perf_counter(); f(); t = max(time.perf_counter()-t, 1e-7)
        repeats[name], turns[name] = max(1, int(slot_s/t)), rounds if t < most_s/rounds else min(rounds, max(3, int(most_s/t)))
    slots = {name: [] for name in ways}
    for turn in range(rounds):
        for name, f in ways.items():
            if turn >= turns[name]: continue
            if setup: setup(name)
            gc.collect(); gc.disable()
            busy, cpu, wall = _busy(), time.process_time(), time.perf_counter()
            for _ in range(repeats[name]): f()
            wall, cpu, after = time.perf_counter()-wall, time.process_time()-cpu, _busy()
            gc.enable()
            others = max(0., (after-busy-cpu)/wall/os.cpu_count()) if busy is not None else 0.
            slots[name].append((wall/repeats[name], cpu/repeats[name], others))
    med = lambda name, i: statistics.median(s[i] for s in slots[name])
    return {n: dict(wall_s=med(n, 0), cpu_s=med(n, 1), rounds=turns[n], calls=repeats[n], others=round(med(n, 2), 2)) for n in ways}

def target(kind, against, bound, got, *, why=''):
    "One line of the verdict; kind: `at_least` or `at_most`; against: a name of a way, or what the value is; why: the reason, told when it is missed"
    met = got >= bound if kind == 'at_least' else got <= bound
    return dict(kind=kind, against=against, bound=bound, got=got, met=bool(met), why='' if met else why)

def row(
    part, # bev_pool, step, build, ranking, start, toy
    case, # What was measured, in the reader's words
    times, # From `interleave`, or dicts that hold `measure`; first entry: ours
    *,
    at_least=None, # {name of an alternative: how many times faster we mean to be}
    at_most=None, # {what: (value, bound)} for values that are no ratio (seconds, megabytes)
    measure='wall_s', # The figure that the ratios compare: wall_s, cpu_s, peak_mb
    note='', why=None, # why: {name: reason for a missed target}
):
    ours, why = next(iter(times)), why or {}
    ratio = {n: t[measure]/times[ours][measure] for n, t in times.items() if n != ours}
    targets = [target('at_least', n, b, ratio[n], why=why.get(n, '')) for n, b in (at_least or {}).items()]
    targets += [target('at_most', n, b, v, why=why.get(n, '')) for n, (v, b) in (at_most or {}).items()]
    return dict(part=part, case=case, ours=ours, times=times, measure=measure, ratios=ratio, targets=targets, note=note)

PEAK = """
def _peak():
    import resource
    try: return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))/1024   # ru_maxrss would count the parent's memory too
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
print(_peak())
"""

def peak_mb(code, *args):
    "Peak resident memory, in MB, of a Python process that runs `code`"
    r = subprocess.run([sys.executable, '-c', code+PEAK, *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    if r.returncode: raise RuntimeError(r.stderr[-2000:])
    return float(r.stdout.split()[-1])

def machine():
    "What the figures were measured on"
    import torch
    try: cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1].strip()
    except (OSError, TypeError): cpu = platform.processor() or platform.machine()
    return dict(cpu=cpu, simd=getattr(torch.backends.cpu, 'get_cpu_capability', lambda: '')(), cores=os.cpu_count(), threads=torch.get_num_threads(), system=platform.platform(),
                python=platform.python_version(), torch=torch.__version__)
