#!/usr/bin/env python
"""Build the documentation site from the notebooks as they are stored: nothing is run
or imported, and no data is needed.

    python nbs/_tools/site.py --out _docs

nbdev's own processors decide what a page shows (hidden and exported cells go, documented symbols come). A small staging step turns Quarto's
markdown dialect into MyST and each documented symbol into an entry of Sphinx's Python domain. Sphinx, MyST-NB and furo make the pages.
Any warning is an error. Math comes from MathJax's CDN, or from nbs/_tools/static/mathjax (npm's mathjax@3, its `es5` folder) where that exists.
"""
import argparse, ast, inspect, io, itertools, json, os, re, shutil, sys, tempfile, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS, STATIC = ROOT/'nbs', Path(__file__).parent/'static'
SECTIONS = ('Start', 'The road', 'Rooms', 'Tutorials', 'Project')

def page_of(path):
    "Page of a notebook: its path without the number"
    rel = path.relative_to(NBS).with_suffix('')
    return str(rel.with_name(re.sub(r'^\d+[a-z]?_', '', rel.name)))

def section_of(path):
    rel = path.relative_to(NBS)
    number = re.match(r'(\d+)', rel.name)
    if len(rel.parts) > 1: return 'Tutorials'
    if number is None: return 'Start'
    return 'The road' if int(number[1]) < 20 else 'Rooms'

def notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))

# Symbols

class Symbols:
    "What the package exports, and where its entries stand"
    def __init__(self, settings):
        self.full, self.settings, self.trees, self.texts, self.comments = {}, settings, {}, {}, {}
        for path in sorted((ROOT/settings['lib_path']).glob('[!_]*.py')):
            mod = f"{settings['lib_path']}.{path.stem}"
            text = self.texts[mod] = path.read_text(encoding='utf-8')
            tree = self.trees[mod] = ast.parse(text)
            self.comments[mod] = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_': self.full.setdefault(node.name, []).append(mod)
    def node(self, mod, name):
        body = self.trees[mod].body
        for part in name.split('.'):
            node = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part), None)
            if node is None: return None
            body = node.body
        return node
    def link(self, name, mod):
        "Full name of a symbol that a text names, or None; a symbol of the page's own module goes first"
        head = name.split('.')[0]
        mods = self.full.get(head, [])
        home = mod if mod in mods else mods[0] if len(mods) == 1 else None
        return None if home is None or self.node(home, name) is None else f'{home}.{name}'

def linkify(text, syms, mod, known, own=None):
    "Names of symbols in backticks become cross references, outside of code blocks"
    def sub(m):
        full = syms.link(m[1], mod)
        return m[0] if full is None or full == own or full not in known else f'{{py:obj}}`{m[1]}{m[2]} <{full}>`'
    out, fence = [], None
    for line in text.split('\n'):
        f = re.match(r'\s*(```+|~~~+)', line)
        if f: fence = None if fence and f[1].startswith(fence) else fence or f[1]
        out.append(line if fence or f else re.sub(r'(?<![`}\[])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])', lambda m: sub([m[0], m[1], m[2] or '']), line))
    return '\n'.join(out)

def code(text): return f'`` {text} ``' if '`' in text else f'`{text}`'

def decorators(node): return {d.id if isinstance(d, ast.Name) else d.attr if isinstance(d, ast.Attribute) else decorators_of_call(d) for d in node.decorator_list}
def decorators_of_call(d): return getattr(getattr(d, 'func', None), 'id', getattr(getattr(d, 'func', None), 'attr', ''))

def signature(node):
    "Arguments as they are written, without annotations, and (name, annotation, line) of each; the lines say where docments stand"
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        if init is None and 'dataclass' not in decorators(node): return None, []
        if init is None:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            return ', '.join(n.target.id+(f'={ast.unparse(n.value)}' if n.value is not None else '') for n in fields), [(n.target.id, n.annotation, n.end_lineno) for n in fields]
        node = init
    a = node.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    params = [(x.arg, x.annotation, x.end_lineno) for x in every if x.arg not in ('self', 'cls')]
    bare = ast.parse(ast.unparse(ast.FunctionDef(name='f', args=a, body=[ast.Pass()], decorator_list=[], returns=None, lineno=0, type_params=[]))).body[0].args
    for x in [*bare.posonlyargs, *bare.args, *filter(None, [bare.vararg]), *bare.kwonlyargs, *filter(None, [bare.kwarg])]: x.annotation = None
    if bare.args and bare.args[0].arg in ('self', 'cls'): bare.args.pop(0)
    return ast.unparse(bare), params

def entry(name, mod, syms, known, level=0, kind=None):
    "An entry of the Python domain for a symbol: signature, docstring, arguments with their docments"
    node = syms.node(mod, name)
    kind = kind or ('class' if isinstance(node, ast.ClassDef) else 'function')
    args, params = signature(node)
    own, head, fence, notes = f'{mod}.{name}', name.split('.')[-1] if level else name, '`'*(8-level), syms.comments[mod]
    def oneline(s): return linkify(re.sub(r'(`[^`]*`)|<', lambda m: m[1] or '\\<', ' '.join((s or '').split())), syms, mod, known, own)
    def typ(anno):
        text = ' '.join(ast.get_source_segment(syms.texts[mod], anno).split())
        return linkify(code(text), syms, mod, known) if text.isidentifier() else code(text)
    lines = [f'{fence}{{py:{kind}}} {head}'+(f'({args})' if args is not None and kind != 'property' else '')]
    lines += [f':module: {mod}'] if not level else []
    lines += ['', linkify(inspect.cleandoc(ast.get_docstring(node) or ''), syms, mod, known, own), '']
    for p, anno, line in params:
        if isinstance(anno, ast.Call): # A command's Param(help, ...): the text is its docment
            notes.setdefault(line, next((a.value for a in anno.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), ''))
            anno = None
        elif isinstance(anno, ast.Name) and anno.id[0] == '_': anno = None
        if anno or line in notes: lines += [f':param {p}: {oneline(notes.get(line))}'.rstrip()]+([f':type {p}: {typ(anno)}'] if anno else [])
    if getattr(node, 'returns', None) is not None and kind != 'property':
        last = max([node.returns.end_lineno, *(l for *_, l in params)])
        note = oneline(notes.get(last)) if node.returns.end_lineno not in {l for *_, l in params} else ''
        if note or typ(node.returns) != '`None`': lines.append(f':returns: {typ(node.returns)}'+(f' – {note}' if note else ''))
    for n in node.body if isinstance(node, ast.ClassDef) else []:
        if not isinstance(n, ast.FunctionDef) or n.name[0] == '_' or not ast.get_docstring(n): continue
        lines += ['', entry(f'{name}.{n.name}', mod, syms, known, level+1, 'property' if decorators(n) & {'property', 'cached_property'} else 'method')]
    return '\n'.join(lines+[fence])

# Staging

def processors():
    "nbdev's processors, without those that run code or write Quarto's own links"
    from nbdev.processors import FilterDefaults
    class Stage(FilterDefaults):
        def base_procs(self): return [p for p in super().base_procs() if p.__name__ not in ('exec_show_docs', 'insert_warning', 'add_links', 'clean_show_doc', 'add_fold')]
    return Stage()

CALLOUTS = dict(note='note', tip='tip', warning='warning', important='important', caution='caution')

def to_myst(text, pages, here):
    "Quarto's markdown as MyST: callouts, fenced divs, labels, references, links between notebooks"
    out, stack, fence = [], [], None
    for line in text.split('\n'):
        f = re.match(r'\s*(```+|~~~+)', line)
        if f: fence = None if fence and f[1].startswith(fence) else fence or f[1]
        d = None if fence or f else re.match(r'\s*:::+\s*(.*)$', line)
        if d is None: out.append(line); continue
        if d[1]:
            kind = next((v for k, v in CALLOUTS.items() if f'callout-{k}' in d[1]), None)
            title = re.search(r'title="([^"]*)"', d[1])
            stack.append(kind)
            if kind: out.append(f':::::{{{kind}}}' if not title else f':::::{{admonition}} {title[1]}\n:class: {kind}\n')
        elif stack and stack.pop(): out.append(':::::')
    text = '\n'.join(out)
    text = re.sub(r'\$\$\s*\{#(eq-[\w-]+)\}', r'$$ (\1)', text)
    text = re.sub(r'^!\[(.*?)\]\((\S+?)\)\{#(fig-[\w-]+)[^}]*\}\s*$', r'```{figure} \2\n:name: \3\n\n\1\n```', text, flags=re.M)
    text = re.sub(r'(?<![\w`])@(eq-[\w-]+)', r'{eq}`\1`', text)
    text = re.sub(r'(?<![\w`])@(fig-[\w-]+)', r'{numref}`\1`', text)
    def relink(m):
        target = os.path.normpath(os.path.join(os.path.dirname(here), m[1]))
        page = pages.get(target)
        if page is None: raise SystemExit(f'{here}: a link to {m[1]}, which is no notebook')
        return f"]({os.path.relpath(page, os.path.dirname(pages[here]) or '.')}.ipynb{m[2] or ''})"
    return re.sub(r'\]\((?!\w+:)([^)#\s]+\.ipynb)(#[^)\s]*)?\)', relink, text)

def stage(path, dst, *, syms, known, pages):
    "Write one notebook as a MyST-NB page"
    from execnb.nbio import read_nb
    nb = read_nb(path)
    mod = next((f"{syms.settings['lib_path']}.{m[1]}" for c in nb.cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))), None)
    processors()(nb)
    fm, cells = getattr(nb, 'frontmatter_', {}), []
    here = str(path.relative_to(NBS))
    def md(text): cells.append(dict(cell_type='markdown', metadata={}, id=f'md{len(cells)}', source=to_myst(linkify(text, syms, mod, known), pages, here)))
    title = fm.get('title', page_of(path))
    md(f'# {title}'+(f"\n\n{{.lead}}\n{fm['description']}" if fm.get('description') else '')+(f'\n\n```{{py:module}} {mod}\n:no-typesetting:\n```' if mod in syms.trees else ''))
    todo = list(nb.cells[1:] if fm else nb.cells)
    def line_of(c): return getattr(syms.node(mod, m[1]), 'lineno', 0) if mod and (m := re.match(r'\s*show_doc\(([\w.]+)', c.source)) else None
    runs = [list(g) for _, g in itertools.groupby(todo, key=lambda c: line_of(c) is not None)] # nbdev lists the symbols of one cell last first
    for c in itertools.chain(*(sorted(r, key=line_of) if line_of(r[0]) is not None else r for r in runs)):
        if c.cell_type == 'raw': continue
        if c.cell_type == 'markdown':
            if c.source.strip(): md(c.source)
            continue
        if m := re.match(r'\s*show_doc\(([\w.]+)', c.source):
            node = mod and syms.node(mod, m[1])
            if node and ast.get_docstring(node): cells.append(dict(cell_type='markdown', metadata={}, id=f'md{len(cells)}', source=entry(m[1], mod, syms, known)))
            continue
        opts = {m[1]: m[2] for m in re.finditer(r'^#\|\s*([\w-]+):\s*(\S.*?)\s*$', c.source, re.M)}
        src = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip('\n')
        outs = [dict(o) for o in c.get('outputs', []) if o.get('name') != 'stderr'] if opts.get('output') != 'false' else []
        if opts.get('include') == 'false' or not (src or outs): continue
        if src.startswith(('!', '%%bash', '%%sh')): # A command line: no Python to highlight
            md('```sh\n'+re.sub(r'^(!|%%\w+\n?)', '', src, flags=re.M).strip('\n')+'\n```')
            opts['echo'] = 'false'
            if not outs: continue
        tags = ['remove-input'] if opts.get('echo') == 'false' else ['hide-input'] if opts.get('code-fold') == 'true' else []
        cells.append(dict(cell_type='code', metadata=dict(tags=tags), id=f'c{len(cells)}', execution_count=None, outputs=outs, source=src))
    out = dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python')))
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(json.dumps(out), encoding='utf-8')
    return title

def documented(path, lib):
    "Symbols that get an entry on a page: those defined in exported cells"
    nb, names = json.loads(path.read_text(encoding='utf-8')), set()
    src = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    mod = next((m[1] for s in src if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)
    for s in src:
        if not re.search(r'^#\|\s*exports?\b', s, re.M) or re.search(r'^#\|\s*hide\b', s, re.M): continue
        for n in ast.parse(s).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' and ast.get_docstring(n):
                names.add(f'{lib}.{mod}.{n.name}')
                if isinstance(n, ast.ClassDef): names |= {f'{lib}.{mod}.{n.name}.{k.name}' for k in n.body if isinstance(k, ast.FunctionDef) and k.name[0] != '_' and ast.get_docstring(k)}
    return names

def stage_all(src, settings):
    "Write all pages and their tree below `src`"
    syms, paths = Symbols(settings), notebooks()
    known = set().union(*(documented(p, settings['lib_path']) for p in paths)) if paths else set()
    pages = {str(p.relative_to(NBS)): page_of(p) for p in paths}
    if len(set(pages.values())) < len(pages): raise SystemExit(f'two notebooks have the same page: {sorted(pages.values())}')
    tree = {s: [] for s in SECTIONS}
    for p in paths:
        stage(p, src/f'{pages[str(p.relative_to(NBS))]}.ipynb', syms=syms, known=known, pages=pages)
        if p.name != 'index.ipynb': tree[section_of(p)].append(page_of(p))
    for name in ('CONTRIBUTING', 'CHANGELOG'):
        if (ROOT/f'{name}.md').exists():
            shutil.copy(ROOT/f'{name}.md', src/f'{name.lower()}.md')
            tree['Project'].append(name.lower())
    if (NBS/'images').exists(): shutil.copytree(NBS/'images', src/'images')
    if (NBS/'tutorials'/'images').exists(): shutil.copytree(NBS/'tutorials'/'images', src/'tutorials'/'images')
    toc = '\n\n'.join(f'```{{toctree}}\n:hidden:\n:caption: {s}\n\n'+'\n'.join((['Overview <self>'] if s == 'Start' else [])+pp)+'\n```' for s, pp in tree.items() if pp or s == 'Start')
    index = src/'index.ipynb'
    if index.exists():
        nb = json.loads(index.read_text(encoding='utf-8'))
        nb['cells'].append(dict(cell_type='markdown', metadata={}, id='toc', source=toc))
        index.write_text(json.dumps(nb), encoding='utf-8')
    else: (src/'index.md').write_text(f"# {settings['title']}\n\n{settings['description']}\n\n{toc}\n", encoding='utf-8')

# Sphinx

def configuration(settings, syms):
    local = STATIC/'mathjax'/'tex-chtml-full.js'
    light = {'color-brand-primary': '#0072b2', 'color-brand-content': '#0072b2', 'color-brand-visited': '#5b4b9a', 'color-api-name': '#0072b2', 'color-api-pre-name': '#6b7280',
             'font-stack': 'Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif', 'font-stack--monospace': '"JetBrains Mono", "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace'}
    dark = {'color-brand-primary': '#56b4e9', 'color-brand-content': '#56b4e9', 'color-brand-visited': '#b9a7f0', 'color-api-name': '#56b4e9'}
    def source(domain, info):
        if domain != 'py' or info['module'] not in syms.trees: return None
        node = syms.node(info['module'], info['fullname']) if info['fullname'] else None
        return f"{settings['git_url']}/blob/{settings['branch']}/{info['module'].replace('.', '/')}.py"+(f'#L{node.lineno}' if node is not None else '')
    return dict(project=settings['title'], author=settings['author'], copyright=settings['copyright'], version=settings['version'], release=settings['version'],
        extensions=['myst_nb', 'sphinx.ext.mathjax', 'sphinx.ext.linkcode'], linkcode_resolve=source, root_doc='index', language='en',
        nb_execution_mode='off', nb_merge_streams=True, myst_heading_anchors=3, numfig=True,
        myst_enable_extensions=['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath', 'fieldlist', 'html_image'],
        add_module_names=False, python_display_short_literal_types=True, toc_object_entries=True, toc_object_entries_show_parents='hide',
        highlight_language='text', html_theme='furo', html_title=settings['title'], html_static_path=[str(STATIC)], html_css_files=['style.css'], html_favicon=str(STATIC/'mark.svg'), html_logo=str(STATIC/'mark.svg'),
        html_theme_options=dict(light_css_variables=light, dark_css_variables=dark, source_repository=settings['git_url'], source_branch=settings['branch'], top_of_page_buttons=[],
            footer_icons=[dict(name='GitHub', url=settings['git_url'], html='GitHub')]),
        html_show_sourcelink=False, html_copy_source=False, html_show_sphinx=False, html_last_updated_fmt=None, pygments_style='friendly',
        mathjax_path='mathjax/tex-chtml-full.js' if local.exists() else 'https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml-full.js')

def build(out, settings, *, quiet=True):
    "Stage, run Sphinx, and put the finished site at `out` in one step"
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace
    syms = Symbols(settings)
    part = out.with_name(out.name+'.part')
    with tempfile.TemporaryDirectory() as tmp:
        src, html = Path(tmp)/'src', Path(tmp)/'html' # MyST-NB writes a folder beside `html`, too
        src.mkdir()
        stage_all(src, settings)
        with docutils_namespace():
            app = Sphinx(str(src), None, str(html), str(Path(tmp)/'trees'), 'html', confoverrides=configuration(settings, syms), status=None if quiet else sys.stdout,
                         warning=sys.stderr, warningiserror=True, freshenv=True)
            app.build(force_all=True)
        if app.statuscode: raise SystemExit('the site has warnings (above): nothing was written')
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(html, part, ignore=shutil.ignore_patterns('.doctrees', '.buildinfo'))
    (part/'.nojekyll').touch()
    old = out.with_name(out.name+'.old')
    shutil.rmtree(old, ignore_errors=True)
    if out.exists(): os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)

def main():
    p = argparse.ArgumentParser(description='Build the documentation site')
    p.add_argument('--out', default='_docs', help='folder of the site, from the root of the project')
    p.add_argument('--verbose', action='store_true', help="show Sphinx's own messages")
    a = p.parse_args()
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    os.chdir(ROOT)
    out = (ROOT/a.out).resolve()
    build(out, dict(cfg['DEFAULT']), quiet=not a.verbose)
    print(f'{len(list(out.rglob("*.html")))} pages, {sum(f.stat().st_size for f in out.rglob("*") if f.is_file())/1e6:.1f} MB: {out}/index.html')

if __name__ == '__main__': main()
