"The tools of nbs/_tools: what they make of notebooks, without running Sphinx"
import ast
import json
import runpy
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
settings = dict(cfg['DEFAULT'])
def tool(name): return runpy.run_path(str(root/'nbs'/'_tools'/f'{name}.py'))

@pytest.fixture(scope='module')
def site(): return tool('site')

@pytest.fixture(scope='module')
def syms(site): return site['Symbols'](settings)

pages = {'index.ipynb': 'index', '01_viz.ipynb': 'viz', 'tutorials/01_tour.ipynb': 'tutorials/tour'}

def test_dialect(site):
    def myst(text, here='index.ipynb'): return site['to_myst'](text, pages, here)
    assert myst('::: {.callout-note}\nhello\n:::') == ':::::{note}\nhello\n:::::'
    assert ':::::{admonition} Mind' in myst('::: {.callout-tip title="Mind"}\nx\n:::')
    assert myst('::: {.column}\nx\n:::') == 'x'
    assert myst('```\n::: {.callout-note}\n```') == '```\n::: {.callout-note}\n```'
    assert myst('$$ a $$ {#eq-a} and @eq-a') == '$$ a $$ (eq-a) and {eq}`eq-a`'
    assert '```{figure} a.png\n:name: fig-a' in myst('![seen](a.png){#fig-a}')
    assert myst('[v](01_viz.ipynb#the-rig)') == '[v](viz.ipynb#the-rig)'
    assert myst('[v](../01_viz.ipynb)', 'tutorials/01_tour.ipynb') == '[v](../viz.ipynb)'
    assert myst('[v](tutorials/01_tour.ipynb)') == '[v](tutorials/tour.ipynb)'
    with pytest.raises(SystemExit, match='99_none'): myst('[v](99_none.ipynb)')

def test_links_to_symbols(site, syms):
    known = {'bev_reid.geometry.box_bev', 'bev_reid.viz.show_bev'}
    def link(text): return site['linkify'](text, syms, 'bev_reid.viz', known)
    assert link('use `show_bev` or `box_bev()`') == 'use {py:obj}`show_bev <bev_reid.viz.show_bev>` or {py:obj}`box_bev() <bev_reid.geometry.box_bev>`'
    assert link('`none` [`show_bev`](x)\n```\n`show_bev`\n```') == '`none` [`show_bev`](x)\n```\n`show_bev`\n```'

def test_entry_holds_docments_and_shapes(site, syms):
    text = site['entry']('transform_points', 'bev_reid.geometry', syms, set())
    assert '{py:function} transform_points(points, src2dst)\n:module: bev_reid.geometry' in text
    assert ':param points: Points in the source frame, metres\n:type points: `Float[Tensor, "*b n 3"]`' in text
    assert ':returns: `Float[Tensor, "*b n 3"]` – The same points' in text
    text = site['entry']('BEVGrid', 'bev_reid.geometry', syms, set())
    assert '{py:class} BEVGrid(xbound=(-50.0, 50.0, 0.5)' in text and ':param dbound: Depth along the optical axis' in text

def test_every_page_can_be_staged(site, tmp_path):
    "No broken links between notebooks, no two pages of one name, and nothing hidden comes through"
    site['stage_all'](tmp_path, settings)
    for p in site['notebooks']():
        staged = tmp_path/f"{site['page_of'](p)}.ipynb"
        nb = json.loads(staged.read_text())
        assert ''.join(nb['cells'][0]['source']).startswith('# '), p.name
        code = '\n'.join(c['source'] for c in nb['cells'] if c['cell_type'] == 'code')
        assert 'nbdev_export()' not in code and '#|' not in code, p.name
    assert '{toctree}' in ''.join(p.read_text() for p in tmp_path.glob('index.*'))

def test_readme_of_a_notebook(tmp_path):
    def md(s): return dict(cell_type='markdown', source=[s])
    def code(s, *outputs): return dict(cell_type='code', source=[s], outputs=list(outputs))
    png = dict(output_type='display_data', data={'image/png': 'x', 'text/plain': ['<Figure>']})
    cells = [md('# t\n\n> d'), code('#| hide\nimport x'), md('[v](01_viz.ipynb#a) ![i](images/i.png){width=3}\n\n::: {.callout-note}\nn\n:::'), code('#| slow\nf(1)', dict(output_type='execute_result', data={'text/plain': ['2']}), png), code('!make demo')]
    path = tmp_path/'index.ipynb'
    path.write_text(json.dumps(dict(cells=cells)))
    text = tool('readme')['convert'](path, settings)
    assert text.split('\n\n', 1)[1] == f"# t\n\n> d\n\n[v]({settings['doc_host']}{settings['doc_baseurl']}/viz.html#a) ![i](nbs/images/i.png)\n\n> [!NOTE]\n> n\n\n```python\nf(1)\n```\n\n```\n2\n```\n\n```sh\nmake demo\n```\n"

def test_pictures_are_squeezed_the_same_every_time():
    import base64, io
    import numpy as np
    from PIL import Image
    t, raw = tool('outputs'), io.BytesIO()
    x = np.zeros((90, 120, 3), np.uint8); x[20:40] = 200, 30, 60
    Image.fromarray(x).save(raw, 'png')
    mime, small = t['squeeze'](raw.getvalue())
    assert mime == 'image/png' and t['squeeze'](raw.getvalue())[1] == small and Image.open(io.BytesIO(small)).mode == 'P'
    noise = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).resize((600, 450)).save(noise, 'png')
    assert t['squeeze'](noise.getvalue())[0] == 'image/jpeg'
    x[0, 0] = 3 # Invisible: the stored bytes stay
    other = io.BytesIO(); Image.fromarray(x).save(other, 'png')
    out = dict(data={'image/png': base64.b64encode(other.getvalue()).decode()})
    t['store_pictures'](out, dict(data={'image/png': t['encode'](small)}))
    assert out['data'] == {'image/png': t['encode'](small)}

def test_a_few_new_markers_are_another_picture():
    import io
    import numpy as np
    from PIL import Image
    same, g = tool('outputs')['same_picture'], np.random.default_rng(0)
    def png(x): raw = io.BytesIO(); Image.fromarray(x.astype(np.uint8)).save(raw, 'png'); return raw.getvalue()
    page = np.full((400, 600, 3), 250.); marked = page.copy(); marked[100:105, 200:205] = 200, 0, 0
    assert same(png(page), png(page+g.choice([-1, 0, 1], page.shape, p=[.1, .8, .1]))) and not same(png(page), png(marked)) and not same(png(page), png(page[:-1]))

@pytest.mark.parametrize('name', ['site', 'readme', 'outputs'])
def test_tools_need_nothing_of_the_package(name):
    "They work before it is built"
    tree = ast.parse((root/'nbs'/'_tools'/f'{name}.py').read_text(encoding='utf-8'))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('bev_reid')]
