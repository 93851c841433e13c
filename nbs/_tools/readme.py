#!/usr/bin/env python
"""Make README.md from nbs/index.ipynb (nbdev_readme needs Quarto).

    python nbs/_tools/readme.py            write it
    python nbs/_tools/readme.py --check    is it what the notebook says?

Text goes over as it is, code as fenced blocks, outputs as text. Pictures that are outputs are left out: a README holds no binaries; link files of
nbs/images instead (`![what it shows](images/rig.png)`). Cells with `#| hide` and the directives of others go; links between notebooks lead to
the site.
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'

def site(settings): return settings['doc_host'].rstrip('/')+'/'+settings['doc_baseurl'].strip('/')

def relink(text, settings):
    "Links that hold from the root of the repository: notebooks to their pages, pictures to nbs/images"
    def page(m):
        path = re.sub(r'(^|/)\d+[a-z]?_', r'\1', m[1].removeprefix('./').removesuffix('.ipynb'))
        return f']({site(settings)}/{path}.html{m[2] or ""})'
    text = re.sub(r'\]\((?!\w+:)([^)#\s]+\.ipynb)(#[^)\s]*)?\)', page, text)
    text = re.sub(r'(!\[[^\]]*\]\([^)]*\))\{[^}]*\}', r'\1', text) # Quarto's attributes
    return re.sub(r'(\]\(|src=")(?:\./)?(images/)', r'\1nbs/\2', text)

def callouts(text):
    "Quarto's callouts as GitHub's alerts; other fenced divs go"
    out, stack = [], []
    for line in text.split('\n'):
        d = re.match(r'\s*:::+\s*(.*)$', line)
        if d is None: out.append(('> '+line).rstrip() if any(stack) else line)
        elif d[1]:
            m = re.search(r'callout-(note|tip|warning|important|caution)', d[1])
            stack.append(m)
            if m: out.append(f'> [!{m[1].upper()}]')
        elif stack: stack.pop()
    return '\n'.join(out)

def texts(outputs):
    "What outputs say, without pictures"
    for o in outputs:
        if o.get('name') == 'stderr' or o['output_type'] == 'error': continue
        data = o.get('data', {})
        if 'text' in o: yield 'text', ''.join(o['text'])
        elif 'text/markdown' in data: yield 'markdown', ''.join(data['text/markdown'])
        elif not any(k.startswith('image/') or k == 'text/html' for k in data) and 'text/plain' in data: yield 'text', ''.join(data['text/plain'])

def convert(path, settings):
    "README of a notebook"
    nb, parts, titled = json.loads(path.read_text(encoding='utf-8')), [], False
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'raw':
            m = re.search(r'^title:\s*(.+?)\s*$', src, re.M)
            if m and not titled: parts.append('# '+m[1].strip('"\'')); titled = True
            m = re.search(r'^description:\s*(.+?)\s*$', src, re.M)
            if m: parts.append('> '+m[1].strip('"\''))
        elif c['cell_type'] == 'markdown':
            titled |= src.lstrip().startswith('# ')
            parts.append(relink(callouts(src.strip()), settings))
        else:
            opts = re.findall(r'^#\|\s*(.+?)\s*$', src, re.M)
            if any(re.match(r'(hide|export|exporti|default_exp)\b|include:\s*false', o) for o in opts) or 'nbdev_export(' in src: continue
            src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
            lang, src = ('sh', re.sub(r'^[!%]+\s*(?:bash|sh)?\n?', '', src, flags=re.M)) if src.startswith(('!', '%%bash', '%%sh')) else ('python', src)
            if src.strip() and 'echo: false' not in opts: parts.append(f'```{lang}\n{src}\n```')
            if 'output: false' not in opts:
                for kind, t in texts(c.get('outputs', [])):
                    if t.strip(): parts.append(t.strip() if kind == 'markdown' else f'```\n{t.strip(chr(10))}\n```')
    head = '<!-- made from nbs/index.ipynb by nbs/_tools/readme.py: do not edit -->'
    return '\n\n'.join([head, *(p for p in parts if p)])+'\n'

def main():
    p = argparse.ArgumentParser(description='Make README.md from nbs/index.ipynb')
    p.add_argument('--check', action='store_true', help='write nothing; exit 1 if README.md is not what the notebook says')
    a = p.parse_args()
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    src, dst = NBS/'index.ipynb', ROOT/'README.md'
    if not src.exists(): sys.exit(f'{src} does not exist: README.md is made from it')
    text = convert(src, cfg['DEFAULT'])
    for m in re.finditer(r'(?:\]\(|src=")(nbs/images/[^)"\s]+)', text):
        if not (ROOT/m[1]).exists(): sys.exit(f'index.ipynb shows {m[1]}, which does not exist')
    same = dst.exists() and dst.read_text(encoding='utf-8') == text
    if a.check: sys.exit(None if same else 'README.md is not what nbs/index.ipynb says: run python nbs/_tools/readme.py')
    if not same:
        dst.with_name('README.md.part').write_text(text, encoding='utf-8')
        dst.with_name('README.md.part').replace(dst)
    print('unchanged' if same else 'written', f'({len(text)} characters)')

if __name__ == '__main__': main()
