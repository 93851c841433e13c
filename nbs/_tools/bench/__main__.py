"""`make bench`: every part side by side with its plain alternatives, in one run

    python nbs/_tools/bench                      all parts (under 10 minutes on 2 cores), writes results/bench.json
    python nbs/_tools/bench --only pool rank     some parts: their rows replace the old ones in results/bench.json
    python nbs/_tools/bench --quick              small sizes, nothing written: guards against regressions in the tests

A part is a file part_NAME.py beside this one with `rows(quick, say)` -> a list of rows (timing.row). Each runs in a process of its own.
"""
import argparse, importlib, json, os, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from timing import ROOT, machine

PARTS = sorted(p.stem[5:] for p in Path(__file__).parent.glob('part_*.py'))

def ms(s): return f'{s*1e3:.3g} ms' if s < 1 else f'{s:.3g} s'

def verdict(t):
    got, bound = (f'{v:.3g}' if abs(v) < 100 else f'{v:.0f}' for v in (t['got'], t['bound']))
    sign = {'at_least': '≥', 'at_most': '≤'}[t['kind']]
    return f"{'met   ' if t['met'] else 'MISSED'} {t['against']}: {got} ({sign} {bound})" + (f" - {t['why']}" if t['why'] else '')

def show(rows):
    "The table: part, case, ours, each alternative with its ratio, targets"
    for r in rows:
        print(f"\n{r['part']}: {r['case']}")
        for n, t in r['times'].items():
            ratio = f"{r['ratios'][n]:8.2f} x" if n in r['ratios'] else ''
            figure = f"{t[r['measure']]:.4g} {r['measure'].split('_')[-1].upper()}" if 'wall_s' not in t else f"{ms(t['wall_s']):>10s} wall {ms(t['cpu_s']):>10s} CPU"
            print(f"  {n:58s}{figure} {ratio}")
        if r['note']: print(f"  {r['note']}")
        for t in r['targets']: print('  '+verdict(t))
    flat = [t for r in rows for t in r['targets']]
    print(f"\n{sum(t['met'] for t in flat)} of {len(flat)} targets met")

def one(part, quick, out):
    "Run one part in this process and leave its rows in a file"
    say = lambda s: print(f'  {s}', file=sys.stderr, flush=True)
    Path(out).write_text(json.dumps(importlib.import_module(f'part_{part}').rows(quick, say)))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=PARTS, default=PARTS); p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path, default=ROOT/'results'/'bench.json'); p.add_argument('--part', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.part: return one(a.part, a.quick, a.out)
    rows, failed, t0 = [], [], time.perf_counter()
    for part in a.only:
        print(f'{part} ...', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as tmp:
            t = time.perf_counter()
            cmd = [sys.executable, Path(__file__).parent, '--part', part, '--out', Path(tmp)/'rows.json', *(['--quick'] if a.quick else [])]
            if subprocess.run(cmd, cwd=ROOT).returncode: failed.append(part); continue
            rows += json.loads((Path(tmp)/'rows.json').read_text())
            print(f'{part}: {time.perf_counter()-t:.0f} s', file=sys.stderr, flush=True)
    if not a.quick:
        old = json.loads(a.out.read_text()).get('rows', []) if a.out.exists() else []
        done = {r['part'] for r in rows}
        kept = [r for r in old if r['part'] not in done]
        text = json.dumps(dict(machine=machine(), rows=kept+rows), indent=1)+'\n'
        part = a.out.with_suffix('.part'); a.out.parent.mkdir(exist_ok=True); part.write_text(text); os.replace(part, a.out)
    show(rows)
    print(f'{time.perf_counter()-t0:.0f} s')
    if failed: sys.exit(f"these parts failed: {', '.join(failed)}")

if __name__ == '__main__': main()
