#!/usr/bin/env python
"""Run the notebooks and store their outputs, small and the same every time.

    python nbs/_tools/outputs.py                          all notebooks
    python nbs/_tools/outputs.py 01_viz tutorials/tour    some
    python nbs/_tools/outputs.py tour --flags nuscenes    also run cells that carry this flag
    python nbs/_tools/outputs.py --check                  run nothing: are sizes, ids and contents as they should be?

Cells with a flag of `tst_flags` (settings.ini) that was not asked for are skipped and keep the outputs they have. So do cells that are never
evaluated. Pictures become PNG with a palette of 128 colours, large ones of 64 (or JPEG where that is much smaller), widgets become the pictures and texts they
show, and what differs from run to run (counts, addresses, stderr) goes. A notebook that fails is left as it was.
"""
import argparse, base64, io, json, os, re, sys, tempfile
from configparser import ConfigParser
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
MAX_NB, MAX_OUTPUT, MAX_ALL = 400_000, 150_000, 6_000_000
WIDGET = 'application/vnd.jupyter.widget-view+json'
SECRETS = re.compile(r'(?<![\w.])/(?:home|root|tmp|work|Users)/\w|CPU times:|Wall time:|\d(?:it/s|s/it)\b')

def notebooks(names=()):
    "Paths of the notebooks of these names (all without names)"
    every = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
    if not names: return every
    out = []
    for n in names:
        stem = n.removesuffix('.ipynb').removeprefix('nbs/')
        found = [p for p in every if stem in (p.stem, str(p.relative_to(NBS).with_suffix('')))]
        if not found: sys.exit(f"no notebook is called {n!r}; there are: {', '.join(p.stem for p in every)}")
        out += found
    return out

def source(cell): return ''.join(cell['source'])
def directives(cell): return re.findall(r'^#\|\s*(.+?)\s*$', source(cell), re.M)

def skipped(cell, flags):
    "Why a cell is not run, or nothing"
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini')
    for d in directives(cell):
        if d.replace(' ', '') == 'eval:false': return d
        if d in cfg['DEFAULT']['tst_flags'].split() and d not in flags: return d

# Pictures

def decode(data): return base64.b64decode(''.join(data))
def encode(raw): return base64.b64encode(raw).decode()

LARGE = 27_000 # Bytes of a picture (a third more as text); a larger one gets fewer colours

def squeeze(raw):
    "(mime type, bytes) of a picture with a palette, or as JPEG where that is much smaller"
    from PIL import Image
    img = Image.open(io.BytesIO(raw)).convert('RGBA')
    img = Image.alpha_composite(Image.new('RGBA', img.size, 'white'), img).convert('RGB')
    def pack(colours, quality):
        png, jpg = io.BytesIO(), io.BytesIO()
        img.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(png, 'png', optimize=True)
        img.save(jpg, 'jpeg', quality=quality, optimize=True)
        return ('image/jpeg', jpg.getvalue()) if len(jpg.getvalue()) < .7*len(png.getvalue()) else ('image/png', png.getvalue())
    mime, small = pack(128, 85)
    return pack(64, 78) if len(small) > LARGE else (mime, small)

def same_picture(a, b):
    "Whether two pictures differ by less than an eye can see (another processor rounds otherwise)"
    import numpy as np
    from PIL import Image
    a, b = (np.asarray(Image.open(io.BytesIO(x)).convert('RGB'), dtype=float) for x in (a, b))
    if a.shape != b.shape: return False
    d = abs(a-b).max(-1)
    return d.mean() < .5 and (d > 48).sum() < 12 # a few new markers change the mean of a white page by nothing

def store_pictures(out, old):
    "Squeeze the picture of an output; keep the stored bytes where nothing visible has changed"
    data = out.get('data', {})
    if 'image/png' not in data: return
    mime, raw = squeeze(decode(data.pop('image/png')))
    for m in ('image/png', 'image/jpeg'):
        if m in old.get('data', {}) and same_picture(raw, decode(old['data'][m])): mime, raw = m, decode(old['data'][m])
    data[mime] = encode(raw)

# Widgets

def freeze(model, state, buffers):
    "The outputs that a widget shows: its pictures and texts, and one line that names the values of its controls"
    controls, shown = [], []
    children = [c.removeprefix('IPY_MODEL_') for c in state.get(model, {}).get('children', [])]
    if any(state.get(c, {}).get('_model_name', '').endswith('ProgressModel') for c in [model, *children]): return [] # A progress bar
    def walk(ref):
        key = ref.removeprefix('IPY_MODEL_')
        s = state.get(key, {})
        name = s.get('_model_name', '')
        if name == 'OutputModel': shown.extend(json.loads(json.dumps(s.get('outputs', []))))
        elif name == 'ImageModel':
            raw = next((b['data'] for b in buffers.get(key, {}).values() if b['path'] == ['value']), None)
            if raw: shown.append(dict(output_type='display_data', metadata={}, data={f"image/{s.get('format', 'png')}": raw}))
        elif name == 'HTMLModel' and s.get('value'): shown.append(dict(output_type='display_data', metadata={}, data={'text/html': s['value']}))
        elif s.get('description'):
            i, labels = s.get('index'), s.get('_options_labels')
            value = labels[i] if labels and isinstance(i, int) else s.get('value')
            controls.append(f"{escape(str(s['description']).rstrip(': '))}" + ('' if value is None else f": <b>{escape(str(value))}</b>"))
        for c in s.get('children', []): walk(c)
    walk(model)
    line = [dict(output_type='display_data', metadata={}, data={'text/html': '<small>'+' · '.join(controls)+'</small>'})] if controls else []
    return line+[{k: v for k, v in o.items() if k != 'transient'} for o in shown]

# Running

def tidy(outputs, state, buffers, old, warn):
    "Outputs as they are stored"
    out = []
    for o in outputs:
        for o in (freeze(o['data'][WIDGET]['model_id'], state, buffers) if WIDGET in o.get('data', {}) else [o]):
            if o['output_type'] == 'stream':
                if o['name'] != 'stdout': warn(o['text']); continue
                if out and out[-1]['output_type'] == 'stream': out[-1]['text'] += o['text']; continue
            o.get('metadata', {}).clear()
            out.append(o)
    for o in out:
        if o['output_type'] == 'stream': o['text'] = '\n'.join(l.split('\r')[-1].rstrip() for l in o['text'].split('\n'))
    for i, o in enumerate(out): store_pictures(o, old[i] if i < len(old) else {})
    return out

def environment(tmp):
    "What the kernels see: the tree's own package, two threads, 96 dpi, nobody's personal settings"
    (tmp/'matplotlibrc').write_text('figure.dpi: 96\nsavefig.dpi: figure\n')
    data = ROOT.parent/'shared'/'data'
    env = dict(OMP_NUM_THREADS='2', OMP_WAIT_POLICY='passive', MATPLOTLIBRC=str(tmp/'matplotlibrc'), IPYTHONDIR=str(tmp/'ipython'), PYTHONHASHSEED='0',
               PYTHONDONTWRITEBYTECODE='1', PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]), TQDM_DISABLE='1',
               JUPYTER_PLATFORM_DIRS='1', PYDEVD_DISABLE_FILE_VALIDATION='1')
    if 'BEV_REID_DATA' not in os.environ and data.exists(): env['BEV_REID_DATA'] = str(data)
    return env

def run(path, flags=(), timeout=1800):
    "Run a notebook and store its outputs; returns whether the file changed"
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    nb = nbformat.read(path, as_version=4)
    name = path.relative_to(NBS)
    def warn(text): print(f'  {name}: {text.strip()[:400]}', file=sys.stderr)
    old = {c['id']: (source(c), c.get('outputs', [])) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if 'id' in c}
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', extra_arguments=['--log-level=ERROR'], resources=dict(metadata=dict(path=str(path.parent))))
    ran = {}
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code' or skipped(cell, flags): continue
            if 'nbdev_export(' in cell.source: ran[cell.id] = []; continue # The export is a step of its own
            try: client.execute_cell(cell, i)
            except (CellControlSignal, DeadKernelError) as e: raise SystemExit(f'{name}, cell {cell.id}:\n'+re.sub(r'\x1b\[[\d;]*m', '', str(e)))
            ran[cell.id] = cell.outputs
    new = {i: tidy(json.loads(json.dumps(o)), client.widget_state, client.widget_buffers, old.get(i, ('', []))[1], warn) for i, o in ran.items()}
    return store(path, {i: (old[i][0], o) for i, o in new.items() if i in old})

def store(path, outputs):
    "Put outputs into those cells of the file whose source has not changed meanwhile, clean, and write if anything differs"
    before = path.read_text(encoding='utf-8')
    nb = json.loads(before)
    for c in nb['cells']:
        if c.get('id') in outputs and source(c) == outputs[c['id']][0]: c['outputs'] = outputs[c['id']][1]
    after = text_of(nb)
    if after == before: return False
    part = path.with_name(path.name+'.part')
    part.write_text(after, encoding='utf-8')
    os.replace(part, path)
    return True

def text_of(nb):
    "A notebook as nbdev writes it, clean"
    from nbdev.clean import clean_nb
    clean_nb(nb)
    for c in nb['cells']: # Strings become lists of lines, as Jupyter writes them; base64 stays one string
        if isinstance(c['source'], str): c['source'] = c['source'].splitlines(keepends=True)
        for o in c.get('outputs', []):
            if isinstance(o.get('text'), str): o['text'] = o['text'].splitlines(keepends=True)
            for k, v in o.get('data', {}).items():
                if isinstance(v, str) and not k.startswith('image/'): o['data'][k] = v.splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+'\n'

# Checking

def check(path):
    "What is wrong with a notebook as it is stored, one text each"
    text = path.read_text(encoding='utf-8')
    nb, bad = json.loads(text), []
    if len(text.encode()) > MAX_NB: bad.append(f'{len(text.encode())/1e3:.0f} kB, at most {MAX_NB/1e3:.0f}: draw fewer or smaller figures')
    if (nb.get('nbformat'), nb.get('nbformat_minor')) != (4, 5): bad.append('not nbformat 4.5')
    ids = [c.get('id') for c in nb['cells']]
    if None in ids or len(set(ids)) < len(ids): bad.append('cell ids are missing or double: run nbdev_clean')
    elif text_of(json.loads(text)) != text: bad.append('not clean: run nbdev_clean')
    for c in nb['cells']:
        where = f"cell {c.get('id')}"
        if len(json.dumps(c.get('outputs', []))) > MAX_OUTPUT: bad.append(f'{where}: an output of more than {MAX_OUTPUT/1e3:.0f} kB')
        for o in c.get('outputs', []):
            if o['output_type'] == 'error': bad.append(f"{where}: an error is stored, {o['ename']}")
            if o.get('name') == 'stderr': bad.append(f'{where}: stderr is stored')
            if WIDGET in o.get('data', {}): bad.append(f'{where}: a live widget is stored; it is blank in a static page')
            words = ''.join(o.get('text', []))+''.join(''.join(v) for k, v in o.get('data', {}).items() if k in ('text/plain', 'text/html', 'text/markdown'))
            if m := SECRETS.search(re.sub(r'data:image/\w+;base64,[\w+/=]+', '', words)): bad.append(f'{where}: a path of one machine or a timing is stored, {m[0]!r}')
    return bad

def main():
    p = argparse.ArgumentParser(description='Run the notebooks and store their outputs')
    p.add_argument('names', nargs='*', help='notebooks, by name (default: all)')
    p.add_argument('--flags', default='', help='flags of cells to run as well, as one word list: "nuscenes slow"')
    p.add_argument('--timeout', type=int, default=1800, help='seconds for one cell')
    p.add_argument('--check', action='store_true', help='run nothing; check what is stored')
    a = p.parse_args()
    paths = notebooks(a.names)
    if a.check:
        bad = [f'{q.relative_to(NBS)}: {b}' for q in paths for b in check(q)]
        total = sum(q.stat().st_size for q in notebooks())
        if total > MAX_ALL: bad.append(f'all notebooks: {total/1e6:.1f} MB, at most {MAX_ALL/1e6:.0f}')
        if bad: sys.exit('\n'.join(bad))
        print(f'{len(paths)} notebooks are sound, {total/1e3:.0f} kB in all')
        return
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        os.environ.pop('MPLBACKEND', None) # with Agg, as tests set it, no figure would reach the notebook
        os.environ.update(environment(Path(tmp)))
        for q in paths:
            print(f'{q.relative_to(NBS)} ...', end=' ', flush=True)
            try: print('stored' if run(q, a.flags.split(), a.timeout) else 'unchanged', f'({q.stat().st_size/1e3:.0f} kB)')
            except SystemExit as e: print('FAILED'); failed.append(str(e))
    if failed: sys.exit('\n\n'.join(failed))

if __name__ == '__main__': main()
